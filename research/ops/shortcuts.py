"""Shortcut connections without parameters."""

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
