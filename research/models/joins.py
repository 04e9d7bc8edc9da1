"""How a residual unit joins its shortcut with its branch: the six kinds of He et al. 2016, Table 1, as Linen modules.

The sixth, a 1x1 convolution on every shortcut, is projection option C of the unit itself. Called as
`join(x, shortcut, branch, key)`: x what the unit reads `[batch, height, width, channels]`; shortcut and branch
`[batch, height', width', features]`, x in the shape of the result, and F(x); key the unit's own in training, for those
that draw.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.models.convolution import Convolution
from research.ops import dropout, shortcuts


class Join(nn.Module):
    """What every kind is told.

    Attributes:
      train: whether this is training.
      axis_name: the mapped axis over which the batch is split.
      dtype: of layers, see `research.models.resnet.ResNet`.
    """

    train: bool
    axis_name: str | None = None
    dtype: Any = None


class Add(Join):
    """y = x + F."""

    def __call__(self, x: jax.Array, shortcut: jax.Array, branch: jax.Array, key: jax.Array | None) -> jax.Array:
        return branch + shortcut


class Scale(Join):
    """y = lambda x + mu F, both constant. lambda = 0 is the plain network."""

    shortcut_scale: float = 0.5
    branch_scale: float = 0.5

    def __call__(self, x: jax.Array, shortcut: jax.Array, branch: jax.Array, key: jax.Array | None) -> jax.Array:
        return shortcuts.scaled_sum(
            shortcut, branch, shortcut_scale=self.shortcut_scale, branch_scale=self.branch_scale
        )


class Gate(Join):
    """A gate g = sigmoid(W x + b), W a 1x1 convolution (strided where the unit is), and one of two uses of it.

        exclusive:      y = (1 - g) x + g F
        shortcut only:  y = (1 - g) x + F

    Attributes:
      exclusive: whether F is gated too.
      bias: b at initialisation; the paper tries 0 to -10, and -6 or -7 are its best.
    """

    exclusive: bool = True
    bias: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, shortcut: jax.Array, branch: jax.Array, key: jax.Array | None) -> jax.Array:
        stride = -(-x.shape[1] // shortcut.shape[1])
        layer = Convolution(shortcut.shape[-1], kernel=1, stride=stride).layer(
            "gate", use_bias=True, bias_init=nn.initializers.constant(self.bias), dtype=self.dtype
        )
        gate = nn.sigmoid(layer(x))
        return (shortcuts.exclusive_gating if self.exclusive else shortcuts.shortcut_only_gating)(
            shortcut, branch, gate
        )


class DropoutShortcut(Join):
    """y = m x + F with m in {0, 1} drawn per element in training, y = (1 - rate) x + F in evaluation.

    The kept elements are not scaled up: that m has the expectation 1 - rate, as if the shortcut were scaled by it, is
    what the paper's argument is about (section 3.1).
    """

    rate: float = 0.5

    def __call__(self, x: jax.Array, shortcut: jax.Array, branch: jax.Array, key: jax.Array | None) -> jax.Array:
        if not self.train or self.is_initializing():
            return (1 - self.rate) * shortcut + branch
        keep = dropout.keep_mask(key, shortcut.shape, rate=self.rate, axis_name=self.axis_name)
        return jnp.where(keep, shortcut, 0) + branch


JOINS = {
    "identity": Add,
    "scale": Scale,
    "exclusive_gate": partial(Gate, exclusive=True),
    "shortcut_gate": partial(Gate, exclusive=False),
    "dropout": DropoutShortcut,
}
