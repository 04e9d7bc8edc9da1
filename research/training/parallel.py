"""One pure stretch of steps, compiled over devices in three ways that agree: `pmap`, `jit` and `shard_map`.

All three keep state and data replicated and split every batch. `jit` leaves the splitting to the compiler; in the other
two a step sees its device's share and averages over the axis `batch`, BatchNorm included. The devices may be those of
several processes (`distributed`), which all call these functions alike.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.errors import CarouselError, UsageError

# XLA:CPU gives convolutions and products to its library YNNPACK where it can, whose convolutions take up to 1.6 times
# as long as its own; sums over many numbers stay there.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}

MODES = ("auto", "pmap", "jit", "shard_map")
AXIS = "batch"


def choose_mode(parallel: str, devices: int) -> str:
    """`auto` is `pmap` where there are several devices and `jit` where there is one."""
    if parallel not in MODES:
        raise UsageError(f"--parallel={parallel} is unknown: choose one of {', '.join(MODES)}")
    return parallel if parallel != "auto" else ("pmap" if devices > 1 else "jit")


def make_mesh(devices: int | None = None) -> Mesh:
    """The first `devices` devices (all of them by default) in a row along the axis `batch`."""
    available = jax.devices()
    if devices is not None and not 1 <= devices <= len(available):
        raise CarouselError(f"--devices={devices}: this machine shows {len(available)} ({available[0].platform})")
    if devices is not None and jax.process_count() > 1 and devices < len(available):
        raise CarouselError(f"--devices={devices}: all {len(available)} of the processes have to be used")
    return Mesh(np.asarray(available[:devices]), (AXIS,))


def axis_name(mode: str) -> str | None:
    """The axis that the model and the step have to average over: none under `jit`, where arrays are global."""
    return None if mode == "jit" else AXIS


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The tree with a copy of every leaf on each device."""
    return _put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(array: Any, mesh: Mesh, axis: int = 0) -> jax.Array:
    """The array split over the devices along `axis`."""
    return _put(array, NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS)))


def _put(tree: Any, sharding: NamedSharding) -> Any:
    """The tree, which is on the host and the same in every process, on the devices; each process feeds its own."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(array):
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(array)), impl=jax.random.key_impl(array))
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree)


class Stretch:
    """A compiled stretch of steps: `(state, data, indices, key) -> (state, metrics)`, indices on the host."""

    def __init__(self, compiled: Any, place: Callable):
        self._compiled, self._place = compiled, place

    def __call__(self, state: Any, data: Any, indices: Any, key: jax.Array) -> tuple[Any, Any]:
        return self._compiled(state, data, self._place(indices), key)

    @property
    def memory(self) -> dict[str, int]:
        """What one device needs, by XLA's buffer assignment: `temporary_bytes` and `argument_bytes`.

        Arguments are state, data, indices and key; the new state takes the place of the old, which is donated.
        """
        found = self._compiled.memory_analysis()
        return {"temporary_bytes": found.temp_size_in_bytes, "argument_bytes": found.argument_size_in_bytes}


def compile_stretch(stretch: Callable, mode: str, mesh: Mesh, arguments: tuple[Any, Any, Any, Any]) -> Stretch:
    """Compiles `stretch(state, data, indices, key) -> (state, metrics)` ahead of time; the state is donated.

    Args:
      stretch: made with `axis_name(mode)`.
      mode: `pmap`, `jit` or `shard_map`.
      mesh: from `make_mesh`; the batch must divide by its size.
      arguments: examples of the arguments, replicated (indices `[steps, batch]` on the host, several seeds as a leading
        axis); only shapes matter.

    Returns:
      The compiled stretch, to be called with arguments like those.
    """
    state, data, indices, key = arguments
    replicated, split = PartitionSpec(), PartitionSpec(*[None] * (indices.ndim - 1), AXIS)
    if mode == "pmap":
        # [..., steps, devices, share]: pmap maps a whole axis.
        def place(indices):
            *lead, batch = indices.shape
            by_device = indices.reshape(*lead, mesh.size, batch // mesh.size)
            return _put(by_device, NamedSharding(mesh, split))

        function = jax.pmap(
            stretch,
            axis_name=AXIS,
            in_axes=(None, None, indices.ndim - 1, None),
            out_axes=None,
            devices=list(mesh.devices),
            donate_argnums=0,
        )
    else:

        def place(indices):
            return shard_batch(indices, mesh, axis=indices.ndim - 1)

        if mode == "shard_map":
            # With check_vma the gradient of a local loss would arrive summed over devices; see `make_stretch`.
            specs = {"in_specs": (replicated, replicated, split, replicated), "out_specs": replicated}
            stretch = jax.shard_map(stretch, mesh=mesh, check_vma=False, **specs)
        function = jax.jit(stretch, donate_argnums=0, out_shardings=NamedSharding(mesh, replicated))
    return Stretch(compile_for(mesh, function.lower(state, data, place(indices), key)), place)


def compile_for(mesh: Mesh, lowered: Any) -> Any:
    """The compiled program, with the options that make it fast on such devices as far as this JAX knows them."""
    if mesh.devices.flat[0].platform == "cpu":
        try:
            return lowered.compile(compiler_options=_CPU_OPTIONS)
        except jax.errors.JaxRuntimeError as error:
            if "compile option" not in str(error):
                raise
    return lowered.compile()
