"""What training carries from step to step, and the one place where a Flax module becomes pure functions."""

import hashlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from research.errors import CarouselError, UsageError

CARRY = "carry"
"""The collection of a model's recurrent state, which goes from batch to batch in training and in evaluation."""


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
      step: number of steps taken, int32 `[]`.
      params: what the optimiser updates.
      collections: other variables of the model by collection, such as BatchNorm's `batch_stats`.
      opt_state: of the optax transformation.
    """

    step: jax.Array
    params: Any
    collections: dict[str, Any]
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.params, **self.collections}


def stream(seed: int | tuple[int, ...], name: str) -> jax.Array:
    """The key of one named stream of randomness of a run, of several seeds all; the step is folded in where it is used.

    Raises:
      UsageError: a seed is not one of 32 bits. JAX would drop the others, and two seeds would give one run.
    """
    if isinstance(seed, tuple):
        return jnp.stack([stream(each, name) for each in seed])
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed {seed} does not fit 32 bits: give one from 0 to {2**32 - 1}")
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def over_seeds(function: Callable, seed: int | tuple[int, ...], in_axes: Any = 0) -> Callable:
    """The function for one seed as it is; for several, over the leading axis that `in_axes` says arguments have."""
    return jax.vmap(function, in_axes) if isinstance(seed, tuple) else function


def initialize(
    model: nn.Module, optimizer: optax.GradientTransformation, seed: int | tuple[int, ...], inputs: Any
) -> TrainState:
    """The state before the first step, compiled as one program; of several seeds along a leading axis of every leaf.

    Args:
      model: called as `model(inputs, train=...)`.
      optimizer: gives `opt_state`.
      seed: of the run, or several.
      inputs: a batch of what the model reads, or its shapes and types; values and batch size do not matter.
    """

    def init(key):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
        collections = dict(_called(model.init, key, zeros, train=True))
        params = collections.pop("params")
        return TrainState(jnp.zeros((), jnp.int32), params, collections, optimizer.init(params))

    return jax.jit(over_seeds(init, seed))(stream(seed, "parameters"))


def _called(method, first, x, **options):
    return method(first, **x, **options) if isinstance(x, Mapping) else method(first, x, **options)


def replace_variables(initial: TrainState, variables: Mapping[str, Any]) -> TrainState:
    """The state before the first step with other variables, such as imported weights; the optimiser's stay as they are.

    Raises:
      UsageError: names or shapes are not the model's.
    """
    named = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (initial.variables, dict(variables)))
    ]
    if odd := sorted(name for name, _ in named[0].items() ^ named[1].items()):
        shapes = [str(names.get(odd[0], "nothing")) for names in named]
        raise UsageError(
            f"the weights to start from are not this network's: {odd[0]} is {shapes[0]} here and {shapes[1]} there"
        )
    collections = dict(variables)
    return initial._replace(params=collections.pop("params"), collections=collections)


def bind(model: nn.Module):
    """The model as a pure function `apply(variables, x, *, train, key=None) -> (output, collections)`.

    A dictionary x is passed as named arguments. In training the collections are the updated ones and `key` is what
    dropout draws from; in evaluation only `CARRY` is updated, where the model has it.
    """

    def apply(variables, x, *, train, key=None):
        mutable = [name for name in variables if (name != "params" if train else name == CARRY)]
        if not (train or mutable):
            return _called(model.apply, variables, x, train=False), {}
        rngs = {"dropout": key} if train and key is not None else None
        return _called(model.apply, variables, x, train=train, mutable=mutable, rngs=rngs)

    return apply


def flatten(state: TrainState) -> dict[str, np.ndarray]:
    """The state as named host arrays, for a checkpoint."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def sha256(state: TrainState) -> str:
    """A digest of every name and bit of the state: equal for equal runs."""
    digest = hashlib.sha256()
    for name, array in sorted(flatten(state).items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def unflatten(arrays: dict[str, np.ndarray], like: TrainState, source: str) -> TrainState:
    """The state that `flatten` gave, with the structure of `like`.

    Raises:
      CarouselError: names, shapes or types differ from those of `like`; nothing is half restored.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    expected = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    odd = sorted(expected.keys() ^ arrays.keys()) or sorted(
        name
        for name, leaf in expected.items()
        if arrays[name].shape != leaf.shape or arrays[name].dtype != np.dtype(leaf.dtype)
    )
    if odd:
        raise CarouselError(
            f"{source} does not hold this run's state: {odd[0]} is missing, extra, or of another shape or type "
            f"({len(odd)} such arrays); choose another --workdir or delete the run folder"
        )
    return treedef.unflatten([arrays[name] for name in expected])
