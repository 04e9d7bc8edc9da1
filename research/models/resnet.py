"""Residual networks and their plain counterparts, He et al. 2015, "Deep Residual Learning for Image Recognition".

A network is a table: the number of blocks and the width of each stage. The blocks of a stage after its first are
alike and run under `nn.scan`, so that compiling 1,202 layers costs about what compiling 20 does; their parameters carry
a leading axis of blocks. Parameter names (`stem_conv`, `stage1_first`, `stage1_rest`, ..., `head`) are a contract.

Differences from the paper: none known in the architecture. The paper does not say whether its initialisation counts
fan-in or fan-out; this is fan-in. BatchNorm's running averages use momentum 0.9 per step, and epsilon 1e-5.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from research.errors import UsageError
from research.ops import conv, initializers, shortcuts

_ONE_PIXEL = ((1, 1), (1, 1))


def _convolve(x, kernel, strides, padding, **unused):
    """nn.Conv's injected convolution: the repository's one door (only undilated, ungrouped NHWC is asked for)."""
    return conv.conv2d(x, kernel, strides=strides, padding=padding)


Conv3x3 = partial(
    nn.Conv,
    kernel_size=(3, 3),
    padding=_ONE_PIXEL,
    use_bias=False,
    kernel_init=initializers.he_normal,
    conv_general_dilated=_convolve,
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, with or without the shortcut around them.

        residual:  y = relu(F(x) + shortcut(x))        F(x) = norm2(conv2(relu(norm1(conv1(x)))))
        plain:     y = relu(F(x))

    Source: section 3.2, Figure 2 (left).

    Attributes:
      features: channels of the result.
      strides: of the first convolution and of the shortcut, in pixels.
      residual: whether the shortcut is there.
      norm: constructor of a normalisation layer.
    """

    features: int
    strides: tuple[int, int]
    residual: bool
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        x = self._probe("input", x)
        response1 = self._probe("response1", self.norm(name="norm1")(self._conv1(x)))
        activation1 = self._probe("activation1", nn.relu(response1))
        response2 = self._probe("response2", self.norm(name="norm2")(Conv3x3(self.features, name="conv2")(activation1)))
        y = response2 + self._shortcut(x) if self.residual else response2
        return self._probe("output", nn.relu(y)), None

    def _conv1(self, x):
        return Conv3x3(self.features, strides=self.strides, name="conv1")(x)

    def _shortcut(self, x):
        if self.strides == (1, 1) and x.shape[-1] == self.features:
            return x
        return shortcuts.subsample_and_pad(x, self.features, self.strides)

    def _probe(self, name, x):
        """Lets an analysis read x ('intermediates') and take gradients at x ('perturbations'); costs nothing else."""
        self.sow("intermediates", name, x)
        return self.perturb(name, x) if self.has_variable("perturbations", name) else x


class ResNet(nn.Module):
    """A 3x3 stem, stages of basic blocks, global average pooling and a linear classifier (section 4.2).

    Each stage after the first halves the map in its first block and doubles the width.

    Attributes:
      stage_sizes: blocks of each stage.
      width: channels of the first stage.
      num_classes: outputs.
      residual: residual blocks, or plain ones of the same layers.
      axis_name: the mapped axis over which BatchNorm takes its means; None on one device and under `jit`.
    """

    stage_sizes: tuple[int, ...]
    width: int = 16
    num_classes: int = 10
    residual: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits `[batch, num_classes]` of images `[batch, height, width, channels]`."""
        norm = partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, axis_name=self.axis_name
        )
        x = nn.relu(norm(name="stem_norm")(Conv3x3(self.width, name="stem_conv")(x)))
        for stage, blocks in enumerate(self.stage_sizes, start=1):
            features = self.width * 2 ** (stage - 1)
            strides = (1, 1) if stage == 1 else (2, 2)
            x, _ = BasicBlock(features, strides, self.residual, norm, name=f"stage{stage}_first")(x)
            if blocks > 1:
                rest = _repeat(BasicBlock, blocks - 1)
                x, _ = rest(features, (1, 1), self.residual, norm, name=f"stage{stage}_rest")(x, None)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=initializers.he_normal, name="head")(x)


def _repeat(block: type[nn.Module], length: int):
    """`length` blocks in a row as one compiled body; every collection they hold gains a leading axis of blocks."""
    return nn.scan(
        block,
        variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0, "perturbations": 0},
        split_rngs={"params": True},
        length=length,
    )


def cifar_resnet(
    depth: int = 20,
    block: str = "residual",
    width: int = 16,
    num_classes: int = 10,
    axis_name: str | None = None,
) -> ResNet:
    """The 6n+2-layer network of section 4.2: n blocks of two layers in each of three stages.

    Raises:
      UsageError: the depth is not 6n+2 with n >= 1, or the block is unknown.
    """
    blocks, remainder = divmod(depth - 2, 6)
    if remainder or blocks < 1:
        below = max(8, depth - (depth - 2) % 6)
        raise UsageError(
            f"depth {depth} is not 6n+2 (three stages of n blocks of two layers): try {below} or {below + 6}"
        )
    if block not in ("plain", "residual"):
        raise UsageError(f"block {block!r} is unknown: choose plain or residual")
    if width < 1:
        raise UsageError(f"width {width} is not a number of channels: give at least 1")
    return ResNet((blocks,) * 3, width, num_classes, block == "residual", axis_name)


def unstack_blocks(collection: Mapping[str, Any]) -> list[Any]:
    """The blocks of a ResNet's collection (parameters, gradients, intermediates) in order of depth, one tree each."""
    blocks = []
    stages = {name.split("_")[0] for name in collection if name.startswith("stage")}
    for stage in sorted(stages, key=lambda name: int(name.removeprefix("stage"))):
        blocks.append(collection[f"{stage}_first"])
        rest = collection.get(f"{stage}_rest")
        if rest is not None:
            length = jax.tree.leaves(rest)[0].shape[0]
            blocks += [jax.tree.map(lambda leaf, i=i: leaf[i], rest) for i in range(length)]
    return blocks
