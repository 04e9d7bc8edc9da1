"""Dropout whose mask belongs to a place in the global batch, so that it does not depend on the number of devices."""

import jax
import jax.numpy as jnp
from jax import lax


def keep_mask(key: jax.Array, shape: tuple[int, ...], *, rate: float, axis_name: str | None = None) -> jax.Array:
    """Which elements stay: independent, each with probability `1 - rate`; bool of `shape`.

    Args:
      key: the same on every device.
      shape: `[batch, ...]` of this device's share.
      rate: probability of being dropped, in [0, 1).
      axis_name: mapped axis over which the batch is split, in order; None where the batch is whole.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate {rate} is not a probability below 1")
    first = 0 if axis_name is None else lax.axis_index(axis_name) * shape[0]
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(first + jnp.arange(shape[0]))
    return jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape[1:]))(keys)
