"""Pooling: the largest value of each window."""

import chex
import jax
import jax.numpy as jnp
from jax import lax


def max_pool(x: jax.Array, *, window: int, stride: int, padding: int = 0) -> jax.Array:
    """The maximum over square windows; what is outside the image counts as minus infinity.

        y[n, h, w, c] = max_{0 <= i, j < window} x[n, s h + i - p, s w + j - p, c]

    Args:
      x: `[batch, height, width, channels]`.
      window: height and width of a window in pixels.
      stride: step between windows in pixels, both ways.
      padding: pixels outside the image on every side, less than the window.

    Returns:
      `[batch, (height + 2 p - window) // s + 1, (width + 2 p - window) // s + 1, channels]`.
    """
    chex.assert_rank(x, 4)
    sides = (padding, padding)
    return lax.reduce_window(
        x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), ((0, 0), sides, sides, (0, 0))
    )
