"""The one training step, whole stretches of it as one program, and evaluation. Pure functions; see `parallel`."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from research.training.state import TrainState

Data = dict[str, jax.Array]


def make_stretch(
    loss: Callable, optimizer: optax.GradientTransformation, schedule: optax.Schedule, axis_name: str | None
) -> Callable[[TrainState, Data, jax.Array, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """A function `(state, data, indices, key) -> (state, metrics)` that takes as many steps as `indices` has rows.

    `data` holds the whole data set; `indices` `[steps, batch]` choose the examples of each step. With an axis name it
    is to be mapped over devices: indices hold this device's share of each batch, and gradients and metrics are averaged
    over the axis. They travel as one vector, since XLA:CPU does not merge collectives. Where the loss is a mean over
    something else than examples, whose number may differ from device to device, a metric `weight` says of how many.

    The metrics come back stacked, `[steps]`: the task's own, `gradient_norm` (of the loss without weight decay) and
    `learning_rate`.
    """

    def step(state, data, indices, key):
        batch = {name: array[indices] for name, array in data.items()}
        step_key = jax.random.fold_in(key, state.step)
        keys = example_keys(indices, step_key)
        (_, (collections, metrics)), gradients = jax.value_and_grad(
            lambda params: loss({**state.variables, "params": params}, batch, keys, step_key), has_aux=True
        )(state.params)
        share = metrics.pop("weight", None)
        if axis_name is not None:
            if share is not None:
                share = share / lax.pmean(share, axis_name)
                gradients, metrics = jax.tree.map(lambda x: x * share, (gradients, metrics))
            # The gradient of each device's own loss, averaged after: right because check_vma is off (`parallel`).
            vector, unravel = ravel_pytree((gradients, metrics))
            gradients, metrics = unravel(lax.pmean(vector, axis_name))
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        metrics["learning_rate"] = schedule(state.step)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, collections, opt_state), metrics

    def example_keys(indices, step_key):
        # A key belongs to a place in the global batch, so that augmentation does not depend on the number of devices.
        share = indices.shape[0]
        first = 0 if axis_name is None else lax.axis_index(axis_name) * share
        return jax.vmap(partial(jax.random.fold_in, step_key))(first + jnp.arange(share))

    def stretch(state, data, indices, key):
        return lax.scan(lambda state, row: step(state, data, row, key), state, indices)

    return stretch


def permutations(key: jax.Array, examples: int) -> Callable[[int], np.ndarray]:
    """The random order of an epoch's examples, int32 `[examples]`, drawn from `fold_in(key, epoch)`.

    With the keys of several seeds `[seeds, examples]`. The last two epochs are kept on the host: drawn anew for every
    stretch, they would leave the device idle for longer than everything else between stretches.
    """

    @lru_cache(maxsize=2)
    def permutation(epoch):
        return np.asarray(_permutation(key, epoch, examples))

    return permutation


@partial(jax.jit, static_argnums=2)
def _permutation(key, epoch, examples):
    def draw(key):
        return jax.random.permutation(jax.random.fold_in(key, epoch), jnp.arange(examples, dtype=jnp.int32))

    return jax.vmap(draw)(key) if key.ndim else draw(key)


def shuffled_indices(
    permutation: Callable[[int], np.ndarray], first_step: int, *, steps: int, batch_size: int, examples: int
) -> np.ndarray:
    """Which examples the steps `first_step, ..., first_step + steps - 1` see: `[..., steps, batch_size]`, int32.

    The stream of examples is one random permutation after another; step t takes places t batch_size and following. A
    batch may span two epochs; no example is left out of any epoch.

    Args:
      permutation: of an epoch, from `permutations`; leading axes (seeds) lead here too.
      first_step, steps, batch_size, examples: a training of one batch after another.
    """
    first, offset = divmod(first_step * batch_size, examples)
    last = ((first_step + steps) * batch_size - 1) // examples
    places = np.concatenate([permutation(epoch) for epoch in range(first, last + 1)], axis=-1)
    rows = places[..., offset : offset + steps * batch_size]
    return rows.reshape(*rows.shape[:-1], steps, batch_size)


def indices_in_order(first_step: int, *, steps: int, batch_size: int, examples: int) -> np.ndarray:
    """As `shuffled_indices`, but one batch after another as the examples lie, from the beginning again at the end.

    Examples are a multiple of the batch size, so that place n of a batch always goes on where it was.
    """
    batches = (first_step + np.arange(steps)) % (examples // batch_size)
    return (batches[:, None] * batch_size + np.arange(batch_size)).astype(np.int32)


def make_evaluation(
    evaluate: Callable, carries: bool = False
) -> Callable[[Any, Data, jax.Array, jax.Array], tuple[dict[str, jax.Array], dict[str, Any]]]:
    """A function `(variables, data, indices, mask) -> (sums, new collections)` for one batch.

    `indices` and `mask` are `[batch]`; `evaluate` and `carries` are a task's.
    """

    def evaluation(variables, data, indices, mask):
        found = evaluate(variables, {name: array[indices] for name, array in data.items()} | {"mask": mask})
        return found if carries else (found, {})

    return evaluation
