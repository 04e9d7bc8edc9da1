"""Shortcut connections: identity across a change of shape, and the ways of joining a shortcut with its branch.

A residual unit is y = h(x) + F(x). He et al. 2016, "Identity Mappings in Deep Residual Networks", section 3, compare
what may stand for h; where it is not the identity, the signal from unit l to unit L is multiplied L - l times.
"""

import chex
import jax
import jax.numpy as jnp


def subsample_and_pad(x: jax.Array, features: int, strides: tuple[int, int]) -> jax.Array:
    """Identity shortcut across a change of shape: every s-th pixel, and zeros for the channels that are new.

        y[n, h, w, :] = [0 ... 0, x[n, s h, s w, :], 0 ... 0]

    The zeros are split over both sides. Source: He et al. 2015, "Deep Residual Learning", section 3.3, option A (the
    paper does not say on which side the zeros go; nothing in the network can tell).

    Args:
      x: `[batch, height, width, channels]`.
      features: channels of the result, at least those of x.
      strides: steps `(vertical, horizontal)` in pixels.

    Returns:
      `[batch, ceil(height / s), ceil(width / s), features]`.
    """
    chex.assert_rank(x, 4)
    new = features - x.shape[-1]
    if new < 0:
        raise ValueError(f"a zero-padded shortcut cannot narrow {x.shape[-1]} channels to {features}")
    x = x[:, :: strides[0], :: strides[1], :]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


def scaled_sum(shortcut: jax.Array, branch: jax.Array, *, shortcut_scale: float, branch_scale: float) -> jax.Array:
    """Constant scaling: y = lambda x + mu F; arrays of equal shape. Source: section 3.1."""
    chex.assert_equal_shape([shortcut, branch])
    return shortcut_scale * shortcut + branch_scale * branch


def exclusive_gating(shortcut: jax.Array, branch: jax.Array, gate: jax.Array) -> jax.Array:
    """y = (1 - g) x + g F, g in (0, 1) elementwise: a highway unit. Source: section 3.1; Srivastava et al. 2015."""
    chex.assert_equal_shape([shortcut, branch, gate])
    return (1 - gate) * shortcut + gate * branch


def shortcut_only_gating(shortcut: jax.Array, branch: jax.Array, gate: jax.Array) -> jax.Array:
    """y = (1 - g) x + F, g in (0, 1) elementwise. Source: section 3.1."""
    chex.assert_equal_shape([shortcut, branch, gate])
    return (1 - gate) * shortcut + branch
