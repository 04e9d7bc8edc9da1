"""Drawing one of several from logits."""

import jax
import jax.numpy as jnp
from jax import lax


def sample(key: jax.Array, logits: jax.Array, *, temperature: float = 1.0, top_k: int | None = None) -> jax.Array:
    """Draws from the distribution that logits give, sharpened or flattened, of the likeliest k alone.

        p_i ~ exp(z_i / T) where z_i is one of the k largest, else 0        T = 0: the largest

    Args:
      key: a PRNG key.
      logits: z `[..., classes]`.
      temperature: T >= 0, a Python number.
      top_k: k >= 1; None for all. Of equal logits the first are kept.

    Returns:
      Numbers of classes `[...]`, int32.

    Raises:
      ValueError: the temperature is negative, or k is not between 1 and the number of classes.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature} is negative: give 0 for the likeliest, 1 for the distribution")
    if top_k is not None and not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(f"top_k {top_k} is not between 1 and the {logits.shape[-1]} classes")
    if temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    if top_k is None:
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)
    kept, classes = lax.top_k(logits, top_k)
    place = jax.random.categorical(key, kept / temperature)
    return jnp.take_along_axis(classes, place[..., None], axis=-1)[..., 0].astype(jnp.int32)
