"""Pooling: the largest value of each window."""

import chex
import jax
import jax.numpy as jnp
from jax import lax


def max_pool(x: jax.Array, *, window: int, stride: int, padding: int = 0) -> jax.Array:
    """The maximum over square windows; what is outside the image counts as minus infinity.

        y[n, h, w, c] = max_{0 <= i, j < window} x[n, s h + i - p, s w + j - p, c]

    Of equal values the first in reading order takes the gradient; NaN is larger than any number. Written as window^2
    strided slices, compared one after the other: the gradient of XLA's own reduction over windows looks each maximum up
    again, which takes 6 to 10 times as long on the CPU.

    Args:
      x: `[batch, height, width, channels]`.
      window: height and width of a window in pixels.
      stride: step between windows in pixels, both ways.
      padding: pixels outside the image on every side, less than the window.

    Returns:
      `[batch, (height + 2 p - window) // s + 1, (width + 2 p - window) // s + 1, channels]`.
    """
    chex.assert_rank(x, 4)
    if padding:
        outside = ((0, 0, 0), (padding, padding, 0), (padding, padding, 0), (0, 0, 0))
        x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), outside)
    height, width = (stride * ((size - window) // stride) + 1 for size in x.shape[1:3])
    best = None
    for i in range(window):
        for j in range(window):
            tap = x[:, i : i + height : stride, j : j + width : stride]
            best = tap if best is None else jnp.where((tap > best) | (tap != tap), tap, best)
    return best
