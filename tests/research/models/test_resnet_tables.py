"""Every network of the papers: exact parameters, multiply-adds and operations, and one line for a wrong request.

Popular ports are often other networks under the same name, so each one is counted twice here: the published (or
canonical) totals, and how many convolutions, normalisations, ReLUs and additions the paper's description implies.
"""

import math
from typing import NamedTuple

import jax
import pytest
from flax.traverse_util import flatten_dict

from research.errors import UsageError
from research.models import MODELS, cifar_resnet, imagenet_resnet, senet154
from research.models.joins import JOINS
from research.models.residual_unit import PLACEMENTS
from research.models.resnet_tables import IMAGENET_DEPTHS

FULL = {"placement": "full_preactivation"}
FULL_BOTTLENECK = {"placement": "full_preactivation", "unit": "bottleneck"}
CARDINALITY_32 = {"groups": 32, "group_width": 4}
CARDINALITY_64 = {"groups": 64, "group_width": 4}
SE = {"squeeze_ratio": 16}


class Row(NamedTuple):
    """A network and what its paper says of it."""

    name: str
    model: object
    size: int  # of an image in pixels
    parameters: int
    macs: int
    convolutions: int
    norms: int
    relus: int
    units: int  # additions of a shortcut
    pads: int = 0  # shortcuts that pad channels


def cifar(name, parameters, macs, convolutions, norms, relus, units, pads=0, depth=110, **options):
    return Row(name, cifar_resnet(depth, **options), 32, parameters, macs, convolutions, norms, relus, units, pads)


def imagenet(name, parameters, macs, convolutions, norms, relus, units, pads=0, size=224, depth=50, **options):
    model = imagenet_resnet(depth, **options)
    return Row(name, model, size, parameters, macs, convolutions, norms, relus, units, pads)


# Where a row has no published multiply-adds, they follow from the row it is compared with: a projection of 1x1 costs
# input channels x features x pixels, 131,072 on CIFAR for a change of width and twice that within a stage.
ROWS = [
    # He et al. 2015, section 4.2: option B adds two projections with normalisation, 2,752 parameters; option C one in
    # every unit, and costs what the gates of He et al. 2016, section 3 cost without their biases.
    cifar("20-A", 269_722, 40_551_040, 19, 19, 19, 9, 2, depth=20, option="A"),
    cifar("20-B", 272_474, 40_813_184, 21, 21, 19, 9, depth=20, option="B"),
    cifar("110-B", 1_730_714, 253_149_824, 111, 111, 109, 54, option="B"),
    cifar("110-C", 1_826_202, 266_781_312, 163, 163, 109, 54, option="C"),
    # He et al. 2016: gates are a biased 1x1 convolution a unit; scaling and dropout are free.
    cifar("110-exclusive-gate", 1_824_186, 266_781_312, 163, 109, 109, 54, 2, join="exclusive_gate"),
    cifar("110-shortcut-gate", 1_824_186, 266_781_312, 163, 109, 109, 54, 2, join="shortcut_gate"),
    cifar("110-scale", 1_727_962, 252_887_680, 109, 109, 109, 54, 2, join="scale"),
    cifar("110-dropout", 1_727_962, 252_887_680, 109, 109, 109, 54, 2, join="dropout"),
    # Tables 2 and 3. Full pre-activation has as many norms as the original: the first unit's is the stem's, and one
    # is added at the end. ReLUs before the addition leave none after it, but two at the network's two ends.
    cifar("110-norm-after-addition", 1_727_962, 252_887_680, 109, 109, 109, 54, 2, placement="norm_after_addition"),
    cifar("110-relu-before-addition", 1_727_962, 252_887_680, 109, 109, 109, 54, 2, placement="relu_before_addition"),
    cifar("110-relu-only", 1_727_962, 252_887_680, 109, 109, 109, 54, 2, placement="relu_only_preactivation"),
    cifar("110-full", 1_727_962, 252_887_680, 109, 109, 109, 54, 2, **FULL),
    cifar("110-single", 1_727_962, 252_887_680, 109, 109, 109, 108, 2, unit="single"),
    cifar("110-single-full", 1_727_962, 252_887_680, 109, 109, 109, 108, 2, unit="single", **FULL),
    # Bottlenecks: 9n+2 layers and three projections, normalised in the original placement and bare in the full one.
    cifar("164", 1_704_154, 244_500_992, 166, 166, 163, 54, depth=164, unit="bottleneck"),
    cifar("164-full", 1_703_258, 244_500_992, 166, 163, 163, 54, depth=164, **FULL_BOTTLENECK),
    cifar("164-full-100", 1_726_388, 244_524_032, 166, 163, 163, 54, depth=164, num_classes=100, **FULL_BOTTLENECK),
    cifar("1001-full", 10_327_706, 1_487_849_984, 1003, 1000, 1000, 333, depth=1001, **FULL_BOTTLENECK),
    cifar(
        *("1001-full-100", 10_350_836, 1_487_873_024, 1003, 1000, 1000, 333),
        **{"depth": 1001, "num_classes": 100, **FULL_BOTTLENECK},
    ),
    # He et al. 2015, Table 1. Options A and the plain networks have the parameters of the convolutions on the path.
    imagenet("18", 11_689_512, 1_814_073_344, 20, 20, 17, 8, depth=18),
    imagenet("18-A", 11_515_688, 1_794_805_760, 17, 17, 17, 8, 3, depth=18, option="A"),
    imagenet("plain-18", 11_515_688, 1_794_805_760, 17, 17, 17, 0, depth=18, block="plain"),
    imagenet("34", 21_797_672, 3_663_761_408, 36, 36, 33, 16, depth=34),
    imagenet("34-A", 21_623_848, 3_644_493_824, 33, 33, 33, 16, 3, depth=34, option="A"),
    imagenet("34-C", 22_716_840, 3_830_747_136, 49, 49, 33, 16, depth=34, option="C"),
    imagenet("plain-34", 21_623_848, 3_644_493_824, 33, 33, 33, 0, depth=34, block="plain"),
    imagenet("50", 25_557_032, 4_089_184_256, 53, 53, 49, 16),
    imagenet("50-1x1", 25_557_032, 3_857_973_248, 53, 53, 49, 16, stride_on="1x1"),
    imagenet("101", 44_549_160, 7_801_405_440, 104, 104, 100, 33, depth=101),
    imagenet("152", 60_192_808, 11_513_626_624, 155, 155, 151, 50, depth=152),
    # Without normalised projections a v2 network has 2 (256 + 512 + 1024 + 2048) parameters less than its v1.
    imagenet("200-v2", 64_673_832 - 7_680, 15_007_481_856, 203, 199, 199, 66, depth=200, **FULL),
    imagenet("50-v2", 25_549_352, 4_089_184_256, 53, 49, 49, 16, **FULL),
    imagenet("101-v2", 44_541_480, 7_801_405_440, 104, 100, 100, 33, depth=101, **FULL),
    # Xie et al. 2017.
    imagenet("50-32x4d", 25_028_904, 4_230_479_872, 53, 53, 49, 16, **CARDINALITY_32),
    imagenet("101-64x4d", 83_455_272, 15_460_270_080, 104, 104, 100, 33, depth=101, **CARDINALITY_64),
    imagenet("101-64x4d-320", 83_455_272, 31_549_440_000, 104, 104, 100, 33, size=320, depth=101, **CARDINALITY_64),
    # Hu et al. 2018: a ReLU more in every unit.
    imagenet("SE-50", 28_088_024, 4_091_699_200, 53, 53, 65, 16, **SE),
    imagenet("SE-50-1x1", 28_088_024, 3_860_488_192, 53, 53, 65, 16, stride_on="1x1", **SE),
    imagenet("SE-101-32x4d", 48_955_416, 7_974_739_968, 104, 104, 133, 33, depth=101, **CARDINALITY_32, **SE),
    Row("SENet-154", senet154(), 224, 115_088_984, 20_688_363_520, 157, 157, 203, 50),
    Row("SENet-154-320", senet154(), 320, 115_088_984, 42_212_171_776, 157, 157, 203, 50),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_counts_are_the_published_ones(row, operations, abstract_variables):
    params = abstract_variables(row.model, row.size)["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == row.parameters
    counts, macs = operations(row.model, row.size)
    assert macs == row.macs
    assert counts["conv_general_dilated"] == row.convolutions
    assert counts["rsqrt"] == row.norms
    assert counts["max"] == row.relus
    assert counts.get("pad", 0) == row.pads + (row.size > 32)  # the pooling pads as well
    squeezed = row.units if row.model.squeeze_ratio else 0
    gated = row.units if "gate" in row.name else 0
    assert counts.get("logistic", 0) == squeezed + gated
    assert counts["dot_general"] == 1 + 2 * squeezed
    # A norm adds its epsilon and its shift, a dense layer and a gate their bias (and the gate 1 - g), a unit its
    # shortcut.
    assert counts["add"] == 2 * row.norms + 1 + 2 * squeezed + gated + row.units
    assert counts.get("ne", 0) == (9 - 1) * (row.size > 32)  # each pixel of the pooling's window but the first, for NaN


def test_multiply_adds_are_what_the_papers_print():
    """In units of 10^9, rounded (He et al.'s 3.8 is the 1x1 stride's 3.86, cut off)."""
    printed = {"18": "1.81", "34": "3.66", "50-1x1": "3.86", "SE-50-1x1": "3.86", "50-32x4d": "4.23"}
    printed |= {"101-64x4d-320": "31.55", "SENet-154": "20.69", "SENet-154-320": "42.21"}
    found = {row.name: f"{row.macs / 1e9:.2f}" for row in ROWS if row.name in printed}
    assert found == printed


def test_resnext_is_as_large_as_its_resnet(abstract_variables):
    """Xie et al. 2017, Table 2: cardinality against width of a group at about equal cost."""
    for groups, width in ((1, 64), (2, 40), (4, 24), (8, 14), (32, 4)):
        params = abstract_variables(imagenet_resnet(50, groups=groups, group_width=width), 64)["params"]
        inside = params["stage1_first"]["conv2"]["kernel"].shape
        assert inside == (3, 3, width, groups * width)
        total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        assert total == pytest.approx(25.3e6, rel=0.02), (groups, width)


@pytest.mark.parametrize(("ratio", "millions"), [(2, 45.7), (4, 35.7), (8, 30.7), (16, 28.1), (32, 26.9)])
def test_the_squeeze_ratio_costs_what_the_paper_prints(ratio, millions, abstract_variables):
    params = abstract_variables(imagenet_resnet(50, squeeze_ratio=ratio), 64)["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == pytest.approx(millions * 1e6, rel=4e-3)


@pytest.mark.parametrize("depth", IMAGENET_DEPTHS)
def test_depth_counts_the_layers_with_weights_on_the_path(depth, abstract_variables):
    """Stem, convolutions of every unit and the classifier; projections are not counted."""
    params = flatten_dict(abstract_variables(imagenet_resnet(depth), 64)["params"])
    layers = [
        1 if leaf.ndim < 5 else leaf.shape[0]
        for path, leaf in params.items()
        if path[-1] == "kernel" and "projection" not in path
    ]
    assert sum(layers) == depth


def test_where_the_map_is_halved():
    """In the first 1x1 of a bottleneck (R1, and R2's on CIFAR) or in the 3x3 (ResNeXt, SENet-154)."""

    def strides(model):
        return [[row.stride for row in stage.convolutions] for stage in model.stages]

    assert strides(imagenet_resnet(50)) == [[1, 1, 1], [1, 2, 1], [1, 2, 1], [1, 2, 1]]
    assert strides(imagenet_resnet(50, stride_on="1x1")) == [[1, 1, 1], [2, 1, 1], [2, 1, 1], [2, 1, 1]]
    assert strides(imagenet_resnet(34)) == [[1, 1], [2, 1], [2, 1], [2, 1]]
    assert strides(cifar_resnet(11, unit="bottleneck")) == [[1, 1, 1], [2, 1, 1], [2, 1, 1]]
    assert strides(cifar_resnet(5, unit="single")) == [[1], [2], [2]]
    assert strides(senet154()) == [[1, 1, 1], [1, 2, 1], [1, 2, 1], [1, 2, 1]]


# Requests


@pytest.mark.parametrize(("unit", "layers"), [("single", 3), ("basic", 6), ("bottleneck", 9)])
@pytest.mark.parametrize("depth", [-4, 1, 2, 4, 6, 7, 12, 19, 108, 166, 1000, 1002])
def test_a_wrong_depth_names_the_nearest_valid_ones(unit, layers, depth):
    valid = [layers * n + 2 for n in range(1, 500)]
    assert depth not in valid
    below = max([d for d in valid if d < depth], default=valid[0])
    with pytest.raises(UsageError) as caught:
        cifar_resnet(depth, unit=unit)
    assert f"depth {depth} is not {layers}n+2" in str(caught.value)
    assert str(caught.value).endswith(f"try {below} or {below + layers}") and "\n" not in str(caught.value)
    for nearest in (below, below + layers):
        assert sum(stage.units for stage in cifar_resnet(nearest, unit=unit).stages) == (nearest - 2) // (layers // 3)


WRONG = [
    (cifar_resnet, {"unit": "block"}, "unit 'block' is unknown: choose from basic, bottleneck, single"),
    (cifar_resnet, {"block": "highway"}, "block 'highway' is unknown: choose from plain, residual"),
    (cifar_resnet, {"option": "D"}, "option 'D' is unknown: choose from auto, A, B, C"),
    (cifar_resnet, {"placement": "post"}, f"placement 'post' is unknown: choose from {', '.join(PLACEMENTS)}"),
    (cifar_resnet, {"join": "sum"}, f"join 'sum' is unknown: choose from {', '.join(JOINS)}"),
    (cifar_resnet, {"width": 0}, "width 0 is not a number of channels: give at least 1"),
    (
        imagenet_resnet,
        {"depth": 20},
        "depth 20 is none of the ImageNet networks: choose from 18, 34, 50, 101, 152, 200",
    ),
    (imagenet_resnet, {"block": "highway"}, "block 'highway' is unknown: choose from plain, residual"),
    (imagenet_resnet, {"option": "auto"}, "option 'auto' is unknown: choose from A, B, C"),
    (imagenet_resnet, {"placement": "post"}, f"placement 'post' is unknown: choose from {', '.join(PLACEMENTS)}"),
    (imagenet_resnet, {"stride_on": "2x2"}, "stride_on '2x2' is unknown: choose from 1x1, 3x3"),
    (imagenet_resnet, {"depth": 34, "groups": 32}, "depth 34 has no bottlenecks; take 50 or more"),
    (imagenet_resnet, {"depth": 18, "group_width": 4}, "depth 18 has no bottlenecks; take 50 or more"),
]


def named(value):
    return getattr(value, "__name__", str(value)[:40])


@pytest.mark.parametrize(("constructor", "wrong", "message"), WRONG, ids=named)
def test_a_wrong_request_is_one_line_that_names_the_choices(constructor, wrong, message):
    with pytest.raises(UsageError) as caught:
        constructor(**wrong)
    assert str(caught.value).endswith(message) and "\n" not in str(caught.value)


def test_the_table_of_models_holds_the_constructors():
    assert dict(MODELS) == {"resnet": cifar_resnet, "imagenet_resnet": imagenet_resnet, "senet154": senet154}
