"""Signal propagation across time: how much of the loss's gradient reaches each earlier hidden state.

In a vanilla network dL/dh_t = dL/dh_T prod_{s > t} diag(act') U, a product that vanishes or explodes with the distance;
a cell with an open forget gate carries the error unchanged (the constant error carousel). The counterpart across depth
is `research.analysis.signal`. Source: Hochreiter 1991; Bengio et al. 1994; Pascanu et al. 2013, equation 5.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def state_gradient_norms(
    layer: Any, variables: Any, x: jax.Array, loss: Callable[[jax.Array], jax.Array]
) -> list[float]:
    """The L2 norm of dL/dh_t, through all that comes after t, for every time; the mean over the batch.

    Args:
      layer: a `research.models.recurrent.Recurrent`.
      variables: of the layer.
      x: `[batch, time, features]`.
      loss: of the outputs `[batch, time, n]`, a scalar that is a sum over the batch.

    Returns:
      `[time]` numbers, the first time first.
    """

    @jax.jit
    def norms(variables, x):
        zeros = jnp.zeros((*x.shape[:2], layer.features))
        gradient = jax.grad(lambda nudge: loss(layer.apply(variables, x, nudge=nudge)[1]))(zeros)
        return jnp.sqrt(jnp.square(gradient).sum(axis=-1)).mean(axis=0)

    return [float(norm) for norm in jax.device_get(norms(variables, x))]
