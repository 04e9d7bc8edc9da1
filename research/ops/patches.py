"""Patches of a frame as channels: a smaller map with the same numbers."""

import chex
import jax


def fold(frames: jax.Array, size: int) -> jax.Array:
    """Each patch of size x size pixels becomes one pixel of a map: `[..., h, w, c]` to `[..., h/s, w/s, s s c]`.

        y[i, j, (a, b, c)] = x[i s + a, j s + b, c]

    Shi et al. 2015, section 4.1, fold 64 x 64 frames by 4: the convolutions see 16 x 16 maps of 16 channels.

    Raises:
      AssertionError: height or width are not multiples of the size.
    """
    *rest, height, width, channels = frames.shape
    chex.assert_is_divisible(height, size)
    chex.assert_is_divisible(width, size)
    parts = frames.reshape(*rest, height // size, size, width // size, size, channels)
    return parts.swapaxes(-4, -3).reshape(*rest, height // size, width // size, size * size * channels)


def unfold(patches: jax.Array, size: int) -> jax.Array:
    """The frames that `fold` was given.

    Raises:
      AssertionError: the channels are not a multiple of size^2.
    """
    *rest, height, width, channels = patches.shape
    chex.assert_is_divisible(channels, size * size)
    parts = patches.reshape(*rest, height, width, size, size, channels // size**2)
    return parts.swapaxes(-4, -3).reshape(*rest, height * size, width * size, channels // size**2)
