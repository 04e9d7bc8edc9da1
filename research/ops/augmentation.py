"""Random image transformations: one image and one key in, one image out. Batches are made of them by `jax.vmap`."""

import chex
import jax
import jax.numpy as jnp
from jax import lax


def random_crop(image: jax.Array, key: jax.Array, *, padding: int) -> jax.Array:
    """A window of the image's own size, drawn uniformly from the image padded with zeros on every side.

    Args:
      image: `[height, width, channels]`.
      key: a PRNG key.
      padding: pixels on each side; He et al. 2015 pad 4 on CIFAR-10.

    Source: Lee et al. 2015, "Deeply-supervised nets"; He et al. 2015, section 4.2.
    """
    chex.assert_rank(image, 3)
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return lax.dynamic_slice(padded, (top, left, jnp.zeros_like(top)), image.shape)


def random_flip(image: jax.Array, key: jax.Array) -> jax.Array:
    """The image or, with probability 1/2, its mirror image (left and right exchanged); `[height, width, channels]`."""
    chex.assert_rank(image, 3)
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)
