"""The residual unit against the papers' formulas in NumPy: every placement, join, option and branch, in training.

The formulas are written out for each placement by name; nothing of `PLACEMENTS`, Flax or `research.ops` stands behind
them but the masks of dropout, which have tests of their own.
"""

import functools
import itertools
from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from research.models import cifar_resnet
from research.models.convolution import Convolution
from research.models.joins import JOINS
from research.models.residual_unit import PLACEMENTS, ResidualUnit
from research.ops.dropout import keep_mask

placements = pytest.mark.parametrize("placement", PLACEMENTS)

X = np.random.default_rng(0).standard_normal((4, 5, 5, 4))  # an odd size, halved to 3
KEY = jax.random.key(7)
SCALES = {"shortcut_scale": 0.3, "branch_scale": 0.8}
BASIC = (Convolution(4), Convolution(4))
WIDER = (Convolution(6, 3, 2), Convolution(6))


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@functools.cache
def make(convolutions, placement="original", join="identity", **options):
    constructor = partial(JOINS[join], **SCALES) if join == "scale" else JOINS[join]
    norm = partial(nn.BatchNorm, use_running_average=False, momentum=0.9, epsilon=1e-5)
    unit = ResidualUnit(convolutions, True, PLACEMENTS[placement], norm, partial(constructor, train=True), **options)
    return unit, jax.eval_shape(lambda: unit.init(jax.random.key(0), X, KEY))


def forward(unit, variables, x=X, key=KEY):
    (y, _), updated = unit.apply(variables, x, key, mutable=["batch_stats"])
    return y, updated


# The formulas


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def convolve(x, kernel, stride=1, groups=1):
    size, half = kernel.shape[0], kernel.shape[0] // 2
    height, width = ((n - 1) // stride + 1 for n in x.shape[1:3])
    padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    parts = []
    for own, taps in zip(np.split(padded, groups, axis=-1), np.split(kernel, groups, axis=-1), strict=True):
        y = np.zeros((len(x), height, width, taps.shape[-1]))
        for i, j in np.ndindex(size, size):
            y += own[:, i:, j:][:, ::stride, ::stride][:, :height, :width] @ taps[i, j]
        parts.append(y)
    return np.concatenate(parts, axis=-1)


def normalise(x, params):
    mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    return params["scale"] * (x - mean) / np.sqrt(variance + 1e-5) + params["bias"]


def branch_of(x, params, convolutions, placement, activated):
    """F(x), and the activated x that a shortcut across a change of shape reads."""
    last = len(convolutions)

    def conv(i, x):
        row = convolutions[i - 1]
        return convolve(x, params[f"conv{i}"]["kernel"], row.stride, row.groups)

    def norm(i, x):
        return normalise(x, params[f"norm{i}"])

    y = x
    if placement == "full_preactivation":
        y = a = x if activated else relu(norm(1, x))
        for i in range(1, last):
            y = relu(norm(i + 1, conv(i, y)))
        return conv(last, y), a
    if placement == "relu_only_preactivation" and not activated:
        y = relu(x)
    a = y
    for i in range(1, last):
        y = relu(norm(i, conv(i, y)))
    y = conv(last, y)
    if placement != "norm_after_addition":
        y = norm(last, y)
    return (relu(y) if placement == "relu_before_addition" else y), a


def shortcut_of(x, params, features, stride, projected, normalised):
    if projected:
        x = convolve(x, params["projection"]["kernel"], stride)
        return normalise(x, params["projection_norm"]) if normalised else x
    new = features - x.shape[-1]
    y = np.zeros((*x[:, ::stride, ::stride].shape[:3], features))
    y[..., new // 2 : new // 2 + x.shape[-1]] = x[:, ::stride, ::stride]
    return y


def formula(params, x, convolutions, placement, join, option="A", squeeze_ratio=0, activated=False, **unused):
    features, stride = convolutions[-1].features, max(row.stride for row in convolutions)
    changes = stride > 1 or features != x.shape[-1]
    f, a = branch_of(x, params, convolutions, placement, activated)
    if squeeze_ratio:
        squeeze, excite = (params["squeeze_excitation"][name] for name in ("squeeze", "excite"))
        hidden = relu(f.mean(axis=(1, 2)) @ squeeze["kernel"] + squeeze["bias"])
        f = f * sigmoid(hidden @ excite["kernel"] + excite["bias"])[:, None, None]
    source = a if changes else x
    projected = option == "C" or (option == "B" and changes)
    h = shortcut_of(source, params, features, stride, projected, placement != "full_preactivation")
    if join == "identity":
        y = h + f
    elif join == "scale":
        y = 0.3 * h + 0.8 * f
    elif join == "dropout":
        y = np.where(keep_mask(KEY, h.shape, rate=0.5), h, 0) + f
    else:
        gate = params["join"]["gate"]
        g = sigmoid(convolve(source, gate["kernel"], stride) + gate["bias"])
        y = (1 - g) * h + (g if join == "exclusive_gate" else 1) * f
    if placement == "norm_after_addition":
        y = normalise(y, params[f"norm{len(convolutions)}"])
    return relu(y) if placement in ("original", "norm_after_addition") else y


def check(convolutions, placement, join, lively, relative, **options):
    """Values equal the formula's, and no parameter is dead."""
    unit, shapes = make(convolutions, placement, join, **options)
    variables = lively(shapes)
    weights = np.random.default_rng(1).standard_normal(forward_shape(convolutions))

    def loss(params):
        y, _ = forward(unit, {**variables, "params": params})
        return (y * weights).sum(), y

    gradients, y = jax.grad(loss, has_aux=True)(variables["params"])
    assert y.dtype == np.float64
    expected = formula(variables["params"], X, convolutions, placement, join, **options)
    assert relative(y, expected) < 1e-12
    new = y.shape[-1] - X.shape[-1]
    for path, gradient in flatten_dict(gradients, sep="/").items():
        live = np.abs(gradient) > 1e-9
        if path == "projection_norm/bias" and placement == "norm_after_addition" and join in ("identity", "scale"):
            assert not live.any()  # by the formula: the norm after the addition takes a shift away again
        elif path.startswith("join/gate") and join == "shortcut_gate" and options.get("option") == "A" and new:
            padded = np.r_[: new // 2, y.shape[-1] - (new - new // 2) : y.shape[-1]]
            assert not live[..., padded].any()  # by the formula: (1 - g) 0
            assert np.delete(live, padded, axis=-1).all()
        else:  # behind a ReLU that is shut for all four images a weight has none
            assert live.mean() > (0.3 if "squeeze" in path else 0.9), path


def forward_shape(convolutions):
    size = 3 if any(row.stride == 2 for row in convolutions) else 5
    return 4, size, size, convolutions[-1].features


@placements
@pytest.mark.parametrize("join", JOINS)
def test_every_placement_join_and_option_is_the_formula(placement, join, lively, relative):
    for convolutions, option in ((BASIC, "A"), (BASIC, "C"), (WIDER, "A"), (WIDER, "B")):
        check(convolutions, placement, join, lively, relative, option=option)


KINDS = {
    "one layer": ((Convolution(4),), {}),
    "bottleneck": ((Convolution(2, 1), Convolution(2), Convolution(4, 1)), {}),
    "wider bottleneck": ((Convolution(3, 1, 2), Convolution(3), Convolution(6, 1)), {"option": "B"}),
    "ResNeXt": ((Convolution(6, 1), Convolution(6, 3, 2, 3), Convolution(8, 1)), {"option": "B"}),
    "SE": (WIDER, {"option": "B", "squeeze_ratio": 2}),
    "SENet-154": (WIDER, {"option": "B", "squeeze_ratio": 3, "projection_kernel": 3}),
    "first unit": (BASIC, {"activated": True}),
    "first unit that widens": (WIDER, {"option": "B", "activated": True}),
}


@placements
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_branch_is_the_formula(placement, kind, lively, relative):
    convolutions, options = KINDS[kind]
    check(convolutions, placement, "identity", lively, relative, **options)


def test_without_a_shortcut_the_unit_is_its_branch(lively, relative):
    unit, shapes = make(WIDER)
    variables = lively(shapes)
    y, _ = forward(unit.clone(residual=False), variables)
    branch, _ = branch_of(X, variables["params"], WIDER, "original", False)
    assert relative(y, relu(branch)) < 1e-12


# Every option changes something


def assert_all_differ(outputs):
    for (one, a), (two, b) in itertools.combinations(outputs.items(), 2):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() > 0.1, (one, two)


def test_placements_differ_with_the_same_parameters(lively):
    made = {placement: make(BASIC, placement) for placement in PLACEMENTS}
    assert len({str(jax.tree.structure(shapes)) for _, shapes in made.values()}) == 1
    variables = lively(made["original"][1])
    assert_all_differ({placement: forward(unit, variables)[0] for placement, (unit, _) in made.items()})


def test_joins_differ_with_the_same_parameters(lively):
    variables = lively(make(WIDER, join="exclusive_gate")[1])
    assert_all_differ({join: forward(make(WIDER, join=join)[0], variables)[0] for join in JOINS})


def test_options_and_excitation_differ_with_the_same_parameters(lively):
    variables = lively(make(WIDER, option="B", squeeze_ratio=2)[1])
    options = {
        "A": {"option": "A"},
        "B": {"option": "B"},
        "SE": {"squeeze_ratio": 2},
        "activated": {"activated": True, "placement": "relu_only_preactivation"},
        "not activated": {"placement": "relu_only_preactivation"},
    }
    assert_all_differ({name: forward(make(WIDER, **chosen)[0], variables)[0] for name, chosen in options.items()})


# Names: a contract, since checkpoints outlive refactors


def names(shapes):
    return {path.rsplit("/", 1)[0] for path in flatten_dict(shapes["params"], sep="/")}


@placements
def test_names_inside_a_unit(placement):
    convolutions = KINDS["wider bottleneck"][0]
    expected = {"conv1", "conv2", "conv3", "norm1", "norm2", "norm3"}
    assert names(make(convolutions, placement)[1]) == expected
    full = placement == "full_preactivation"
    # The first unit reads what the stem has normalised: norm i stands at convolution i all the same.
    assert names(make(convolutions, placement, activated=True)[1]) == expected - ({"norm1"} if full else set())
    projection = {"projection"} if full else {"projection", "projection_norm"}
    assert names(make(convolutions, placement, option="B")[1]) == expected | projection
    excitation = {"squeeze_excitation/squeeze", "squeeze_excitation/excite"}
    assert names(make(convolutions, placement, squeeze_ratio=2)[1]) == expected | excitation
    for join in JOINS:
        gate = {"join/gate"} if "gate" in join else set()
        assert names(make(convolutions, placement, join)[1]) == expected | gate


@pytest.mark.parametrize(
    ("option", "projected"),
    [
        ("A", set()),
        ("B", {"stage2_first", "stage3_first"}),
        ("C", {f"stage{k}_{part}" for k in (1, 2, 3) for part in ("first", "rest")}),
    ],
)
def test_option_c_projects_everywhere_and_b_where_the_shape_changes(option, projected, abstract_variables):
    params = abstract_variables(cifar_resnet(20, width=2, option=option))["params"]
    assert {name for name, unit in params.items() if "projection" in unit} == projected
    for name in projected:
        assert params[name]["projection"]["kernel"].shape[-4:-2] == (1, 1)
        assert "projection_norm" in params[name]


def test_names_of_a_preactivated_network(abstract_variables):
    variables = abstract_variables(cifar_resnet(29, unit="bottleneck", placement="full_preactivation", width=2))
    assert set(variables["params"]) == {"stem_conv", "stem_norm", "final_norm", "head"} | {
        f"stage{k}_{part}" for k in (1, 2, 3) for part in ("first", "rest")
    }
    assert set(variables["batch_stats"]) == set(variables["params"]) - {"stem_conv", "head"}
    everywhere = {"conv1", "conv2", "conv3", "norm1", "norm2", "norm3"}
    for k in (1, 2, 3):
        first = everywhere | {"projection"}  # stage 1 widens from 16 to 64 too
        assert set(variables["params"][f"stage{k}_first"]) == first - ({"norm1"} if k == 1 else set())
        assert set(variables["params"][f"stage{k}_rest"]) == everywhere
    assert variables["params"]["final_norm"]["scale"].shape == (32,)


@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if name != "full_preactivation"])
def test_other_placements_have_no_final_norm(placement, abstract_variables):
    names = set(abstract_variables(cifar_resnet(8, placement=placement, width=2))["params"])
    assert names == {"stem_conv", "stem_norm", "stage1_first", "stage2_first", "stage3_first", "head"}
