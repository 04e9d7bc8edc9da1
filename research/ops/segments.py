"""A loop in segments of which only the beginnings are kept for the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def scan_in_segments(run: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, *, size: int) -> tuple[Any, Any]:
    """Runs `run` over one segment after another; inside of a segment everything is computed again in the backward pass.

    Held are the carries before the n / size segments and the inside of one: at size = sqrt(n), memory that grows with
    the square root of n. Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4.

    Args:
      run: `(carry, xs of some steps) -> (carry, ys of those steps)`, such as a `lax.scan`; any number of steps.
      carry: before the first step.
      xs: arrays `[n, ...]`.
      size: steps of a segment; where they do not divide n, the last segment is shorter.

    Returns:
      The last carry, and all ys `[n, ...]`.
    """
    run = jax.checkpoint(run)
    length = jax.tree.leaves(xs)[0].shape[0]
    whole = length - length % size
    carry, ys = lax.scan(run, carry, jax.tree.map(lambda x: x[:whole].reshape(whole // size, size, *x.shape[1:]), xs))
    ys = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys)
    if whole < length:
        carry, rest = run(carry, jax.tree.map(lambda x: x[whole:], xs))
        ys = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, rest)
    return carry, ys
