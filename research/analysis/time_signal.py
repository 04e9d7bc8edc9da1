"""Signal propagation across time: how much of the loss's gradient reaches each earlier hidden state.

In a vanilla network dL/dh_t = dL/dh_T prod_{s > t} diag(act') U, a product that vanishes or explodes with the distance;
a cell with an open forget gate carries the error unchanged (the constant error carousel). The counterpart across depth
is `research.analysis.signal`. Source: Hochreiter 1991; Bengio et al. 1994; Pascanu et al. 2013, equation 5.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def state_gradient_norms(
    layer: Any,
    params: Any,
    x: jax.Array,
    loss: Callable[[Any, jax.Array], jax.Array],
    of_layer: Callable[[Any], Any] = lambda params: params,
) -> list[list[float]]:
    """The L2 norm of dL/dh_t, through all that comes after t, for every seed and time; the mean over the batch.

    Args:
      layer: a `research.models.recurrent.Recurrent`.
      params: of the whole model, each leaf with a leading axis over seeds.
      x: `[batch, time, features]`, what the layer reads, one for all seeds.
      loss: `(params, outputs) -> scalar` of one seed, with outputs `[batch, time, n]` of the layer: what the rest of
        the model makes of them. A sum over the batch.
      of_layer: picks the layer's parameters out of the model's.

    Returns:
      `[seeds][time]` numbers, the first time first.
    """

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def norms(params, x):
        def nudged(nudge):
            return loss(params, layer.apply({"params": of_layer(params)}, x, nudge=nudge)[1])

        gradient = jax.grad(nudged)(jnp.zeros((*x.shape[:2], layer.features)))
        return jnp.linalg.norm(gradient, axis=-1).mean(axis=0)

    return jax.device_get(norms(params, x)).tolist()
