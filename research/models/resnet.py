"""Residual networks and their plain counterparts: what every depth and variant of `research.models.resnet_tables` is.

A network is a table: its stem, and the units of each stage. The units of a stage after its first are alike and run
under `nn.scan`, so that compiling 1,202 layers costs about what compiling 20 does; their parameters carry a leading
axis of units. Parameter names (`stem_conv`, `stage1_first`, `stage1_rest`, ..., `head`) are a contract.

Sources: He et al. 2015, "Deep Residual Learning for Image Recognition" (R1); He et al. 2016, "Identity Mappings in Deep
Residual Networks" (R2); Xie et al. 2017 (ResNeXt); Hu et al. 2018 (squeeze-and-excitation, SENet-154).

Differences from the papers: none known in the architectures. R1 does not say whether its initialisation counts fan-in
or fan-out; this is fan-in (R2's released code: fan-out). BatchNorm's running averages use momentum 0.9 per step, and
epsilon 1e-5. A v2 ImageNet network has its first activation right after the first convolution, before the max-pooling,
as R2 writes and Facebook's Torch code does; TensorFlow's models and timm have it after the pooling. All max-pooling is
padded by one pixel, as in R1's and torchvision's networks; the released SENets pool without padding, rounding up.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.models import repeat
from research.models.convolution import Convolution
from research.models.head import head
from research.models.joins import JOINS, Join
from research.models.residual_unit import PLACEMENTS, ResidualUnit
from research.ops import dropout, initializers, pooling


class Stage(NamedTuple):
    """Equal units; only the first has strides.

    Attributes:
      units: how many.
      convolutions: of the first unit's branch.
    """

    units: int
    convolutions: tuple[Convolution, ...]

    @property
    def rest(self) -> tuple[Convolution, ...]:
        """The convolutions of the units after the first."""
        return tuple(row._replace(stride=1) for row in self.convolutions)


class ResNet(nn.Module):
    """A stem, stages of residual units, global average pooling and a linear classifier.

    Attributes:
      stem: its convolutions, each followed by normalisation and ReLU.
      pool: a 3x3 max-pooling of stride 2 after the stem.
      stages: see `Stage`.
      num_classes: outputs.
      residual: residual units, or plain ones of the same layers.
      placement: a key of `PLACEMENTS`.
      join: constructor of a `Join`.
      option, projection_kernel, squeeze_ratio: of `ResidualUnit`.
      head_dropout: probability with which a feature is dropped before the classifier in training.
      remat: compute units again in the backward pass, all but each stage's first (`research.models.repeat`).
      axis_name: the mapped axis over which BatchNorm takes its means; None on one device and under `jit`.
      dtype: of activations and of the operands of products, such as bfloat16; None for that of x and the parameters,
        which are float32 always, as are BatchNorm's statistics, the pooled features and the logits.
    """

    stem: tuple[Convolution, ...]
    pool: bool
    stages: tuple[Stage, ...]
    num_classes: int
    residual: bool = True
    placement: str = "original"
    join: Callable[..., Join] = JOINS["identity"]
    option: str = "A"
    projection_kernel: int = 1
    squeeze_ratio: int = 0
    head_dropout: float = 0.0
    remat: bool = False
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits `[batch, num_classes]` of images `[batch, height, width, channels]`."""
        norm, keys = self._norm(train), self._keys()
        for number, row in enumerate(self.stem, start=1):
            suffix = "" if number == 1 else str(number)
            x = row.layer(f"stem_conv{suffix}", dtype=self.dtype)(x)
            x = nn.relu(norm(name=f"stem_norm{suffix}")(x))
        if self.pool:
            x = pooling.max_pool(x, window=3, stride=2, padding=1)
        for number, stage in enumerate(self.stages, start=1):
            first = ResidualUnit(**self.unit_arguments(number, first=True, train=train), name=f"stage{number}_first")
            x, _ = first(x, keys and keys[number][0])
            if stage.units > 1:
                x = self._rest(number, train, x, keys and keys[number][1:])
        for kind in PLACEMENTS[self.placement].final:
            x = nn.relu(x) if kind == "r" else norm(name="final_norm")(x)
        x = x.mean(axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        if train and self.head_dropout and not self.is_initializing():
            keep = dropout.keep_mask(keys[0], x.shape, rate=self.head_dropout, axis_name=self.axis_name)
            x = x * keep / (1 - self.head_dropout)
        return head(self.num_classes, self.dtype, kernel_init=initializers.he_normal, name="head")(x)

    def _keys(self):
        """The classifier's key, then the keys of each stage's units; None where nothing is drawn."""
        if not self.has_rng("dropout"):
            return None
        head, *stages = jax.random.split(self.make_rng("dropout"), 1 + len(self.stages))
        return [head, *(jax.random.split(key, stage.units) for key, stage in zip(stages, self.stages, strict=True))]

    def _norm(self, train):
        options = {"momentum": 0.9, "epsilon": 1e-5, "axis_name": self.axis_name, "dtype": self.dtype}
        return partial(nn.BatchNorm, use_running_average=not train, **options)

    def unit_arguments(self, stage: int, *, first: bool, train: bool) -> dict[str, Any]:
        """What the first unit of a stage (counted from 1), or each of the others, is constructed with."""
        row = self.stages[stage - 1]
        return {
            "convolutions": row.convolutions if first else row.rest,
            "residual": self.residual,
            "placement": PLACEMENTS[self.placement],
            "norm": self._norm(train),
            "join": partial(self.join, train=train, axis_name=self.axis_name, dtype=self.dtype),
            "option": self.option,
            "projection_kernel": self.projection_kernel if first and stage > 1 else 1,
            "squeeze_ratio": self.squeeze_ratio,
            "activated": first and stage == 1,
            "dtype": self.dtype,
        }

    def _rest(self, stage, train, x, keys):
        name, arguments = f"stage{stage}_rest", self.unit_arguments(stage, first=False, train=train)
        if self.remat and not self.is_initializing():
            return repeat.rematerialised(self, name, ResidualUnit(**arguments, parent=None), x, keys)
        return repeat.scanned(ResidualUnit, self.stages[stage - 1].units - 1)(**arguments, name=name)(x, keys)[0]


def unstack_blocks(collection: Mapping[str, Any]) -> list[Any]:
    """The units of a ResNet's collection (parameters, gradients, intermediates) in order of depth, one tree each."""
    blocks = []
    stages = {name.split("_")[0] for name in collection if name.startswith("stage")}
    for stage in sorted(stages, key=lambda name: int(name.removeprefix("stage"))):
        blocks.append(collection[f"{stage}_first"])
        rest = collection.get(f"{stage}_rest")
        if rest is not None:
            length = jax.tree.leaves(rest)[0].shape[0]
            blocks += [jax.tree.map(lambda leaf, i=i: leaf[i], rest) for i in range(length)]
    return blocks
