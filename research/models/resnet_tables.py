"""The residual networks of the papers as tables: CIFAR 6n+2 and 9n+2, ImageNet 18 to 200, ResNeXt, SENet.

Every constructor's parameter count is exact to the published network (tests pin them). R1 is He et al. 2015, R2 is He
et al. 2016; see `research.models.resnet`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from research.errors import UsageError
from research.models.convolution import Convolution
from research.models.joins import JOINS, Join
from research.models.residual_unit import PLACEMENTS
from research.models.resnet import ResNet, Stage

# The branches: width of the stage and stride of its first unit -> convolutions.
_CIFAR_UNITS = {
    "basic": lambda width, stride: (Convolution(width, 3, stride), Convolution(width)),
    "bottleneck": lambda width, stride: (
        Convolution(width, 1, stride),
        Convolution(width),
        Convolution(4 * width, 1),
    ),
    "single": lambda width, stride: (Convolution(width, 3, stride),),
}


def cifar_resnet(
    depth: int = 20,
    block: str = "residual",
    width: int = 16,
    num_classes: int = 10,
    unit: str = "basic",
    placement: str = "original",
    join: str = "identity",
    shortcut_scale: float = 0.5,
    branch_scale: float = 0.5,
    gate_bias: float = 0.0,
    option: str = "auto",
    remat: bool = False,
    axis_name: str | None = None,
    dtype: Any = None,
) -> ResNet:
    """The CIFAR networks: three stages of n units at full, half and quarter resolution, the width doubled each time.

    Args:
      depth: weight layers: 6n+2 of `basic` units (R1, section 4.2), 9n+2 of `bottleneck` (R2: 164, 1001), 3n+2 of
        `single` (R2, Table 3: skips over one layer).
      block: `residual` or `plain`.
      width: channels of the first stage (of a bottleneck's inside; outside it has four times as many).
      num_classes: outputs.
      unit: `basic`, `bottleneck` or `single`.
      placement: of the activations (R2, Table 2): original, norm_after_addition, relu_before_addition,
        relu_only_preactivation or full_preactivation.
      join: of shortcut and branch (R2, Table 1): identity, scale, exclusive_gate, shortcut_gate or dropout.
      shortcut_scale: factor of the shortcut where the join is scale.
      branch_scale: factor of the branch where the join is scale.
      gate_bias: b at initialisation where the join is a gate.
      option: shortcut (R1, section 3.3): A zero channels where the width grows, B a projection there, C a projection in
        every unit; auto is A, but B for bottlenecks, whose first unit widens already.
      remat: see `ResNet`.
      axis_name, dtype: see `ResNet`.

    Raises:
      UsageError: there is no such network.
    """
    _choose("unit", unit, _CIFAR_UNITS)
    convolutions = _CIFAR_UNITS[unit]
    layers = 3 * len(convolutions(1, 1))
    n, remainder = divmod(depth - 2, layers)
    if remainder or n < 1:
        below = max(layers + 2, depth - remainder)
        units = {1: "one layer", 2: "two layers", 3: "three layers"}[layers // 3]
        raise UsageError(
            f"depth {depth} is not {layers}n+2 (three stages of n blocks of {units}): try {below} or {below + layers}"
        )
    if width < 1:
        raise UsageError(f"width {width} is not a number of channels: give at least 1")
    options = ("A", "B", "C")
    _choose("option", option, ("auto", *options))
    return ResNet(
        stem=(Convolution(width),),
        pool=False,
        stages=tuple(Stage(n, convolutions(width * 2**k, 1 if k == 0 else 2)) for k in range(3)),
        num_classes=num_classes,
        residual=_residual(block),
        placement=_choose("placement", placement, PLACEMENTS),
        join=_join(join, shortcut_scale, branch_scale, gate_bias),
        option=("B" if unit == "bottleneck" else "A") if option == "auto" else option,
        remat=remat,
        axis_name=axis_name,
        dtype=dtype,
    )


# R1, Table 1 (and R2 for 200): depth -> units of each stage; below 50 layers they are basic, from 50 on bottlenecks.
_IMAGENET_UNITS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
IMAGENET_DEPTHS = tuple(_IMAGENET_UNITS)


def imagenet_resnet(
    depth: int = 50,
    block: str = "residual",
    num_classes: int = 1000,
    placement: str = "original",
    option: str = "B",
    stride_on: str = "3x3",
    groups: int = 1,
    group_width: int = 64,
    squeeze_ratio: int = 0,
    remat: bool = False,
    axis_name: str | None = None,
    dtype: Any = None,
) -> ResNet:
    """The ImageNet networks, plain, residual (v1), pre-activation (v2), ResNeXt and SE-ResNet.

    ResNet-50 v2 is `placement="full_preactivation"`; ResNeXt-101 64x4d is `depth=101, groups=64, group_width=4`;
    SE-ResNet-50 is `squeeze_ratio=16`.

    Args:
      depth: 18 or 34 (basic units), 50, 101, 152 or 200 (bottlenecks).
      block: `residual` or `plain`.
      num_classes: outputs.
      placement: of the activations: original (v1), full_preactivation (v2), or another of `PLACEMENTS`.
      option: shortcut (R1, section 3.3): A zero channels where the width grows, B a projection there, C a projection in
        every unit.
      stride_on: where a bottleneck halves the map: on the first `1x1` as in R1, or on the `3x3` as in Facebook's Torch
        code, torchvision and ResNeXt ('v1.5').
      groups: of the 3x3 of a bottleneck, the cardinality of ResNeXt.
      group_width: channels of a group in the first stage.
      squeeze_ratio: r of squeeze-and-excitation, 0 for none.
      remat: see `ResNet`.
      axis_name, dtype: see `ResNet`.

    Raises:
      UsageError: there is no such network.
    """
    if depth not in _IMAGENET_UNITS:
        raise UsageError(f"depth {depth} is none of the ImageNet networks: choose from {_listed(_IMAGENET_UNITS)}")
    if depth < 50 and (groups, group_width) != (1, 64):
        raise UsageError(
            f"groups={groups}, group_width={group_width}: depth {depth} has no bottlenecks; take 50 or more"
        )
    first, second = {"1x1": (2, 1), "3x3": (1, 2)}[_choose("stride_on", stride_on, ("1x1", "3x3"))]

    def convolutions(width, strided):
        if depth < 50:
            return Convolution(width, 3, 2 if strided else 1), Convolution(width)
        inside = width * group_width // 64 * groups
        strides = (first, second) if strided else (1, 1)
        return (
            Convolution(inside, 1, strides[0]),
            Convolution(inside, 3, strides[1], groups),
            Convolution(4 * width, 1),
        )

    return ResNet(
        stem=(Convolution(64, 7, 2),),
        pool=True,
        stages=tuple(Stage(units, convolutions(64 * 2**k, k > 0)) for k, units in enumerate(_IMAGENET_UNITS[depth])),
        num_classes=num_classes,
        residual=_residual(block),
        placement=_choose("placement", placement, PLACEMENTS),
        option=_choose("option", option, ("A", "B", "C")),
        squeeze_ratio=squeeze_ratio,
        remat=remat,
        axis_name=axis_name,
        dtype=dtype,
    )


def senet154(num_classes: int = 1000, remat: bool = False, axis_name: str | None = None, dtype: Any = None) -> ResNet:
    """SENet-154: ResNeXt-152 64x4d with a stem of three 3x3, wider groups, halved first 1x1, 3x3 projections, SE.

    Source: Hu et al. 2018, section 6.6 and appendix; the stage table as in the authors' released network.

    Args:
      num_classes: outputs.
      remat: see `ResNet`.
      axis_name, dtype: see `ResNet`.
    """

    def convolutions(width, stride):
        return Convolution(2 * width, 1), Convolution(4 * width, 3, stride, 64), Convolution(4 * width, 1)

    return ResNet(
        stem=(Convolution(64, 3, 2), Convolution(64), Convolution(128)),
        pool=True,
        stages=tuple(
            Stage(units, convolutions(64 * 2**k, 1 if k == 0 else 2)) for k, units in enumerate(_IMAGENET_UNITS[152])
        ),
        num_classes=num_classes,
        option="B",
        projection_kernel=3,
        squeeze_ratio=16,
        head_dropout=0.2,
        remat=remat,
        axis_name=axis_name,
        dtype=dtype,
    )


def _listed(names) -> str:
    return ", ".join(map(str, names))


def _choose(name: str, value: str, choices) -> str:
    if value not in choices:
        raise UsageError(f"{name} {value!r} is unknown: choose from {_listed(choices)}")
    return value


def _residual(block: str) -> bool:
    return _choose("block", block, ("plain", "residual")) == "residual"


def _join(join: str, shortcut_scale: float, branch_scale: float, gate_bias: float) -> Callable[..., Join]:
    constructor = JOINS[_choose("join", join, JOINS)]
    if join == "scale":
        return partial(constructor, shortcut_scale=shortcut_scale, branch_scale=branch_scale)
    return partial(constructor, bias=gate_bias) if join.endswith("_gate") else constructor
