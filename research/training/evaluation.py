"""Evaluation that sees every example of a split exactly once."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.tasks.task import Task
from research.training import parallel
from research.training.state import over_seeds
from research.training.step import Data, make_evaluation


class Evaluator:
    """Means of a task's metrics over a range of examples, by one program compiled ahead of time.

    The last batch is padded and the padding masked; that each example counted once is asserted. A task that averages
    over something else than examples, such as frames, sums their number as `weight`. Where a batch goes on from the one
    before (`Task.carries`), the collections are handed on.

    Args:
      task, variables, data: see `research.training.step.make_evaluation`.
      mesh: the devices.
      batch_size: examples a call, rounded up to a multiple of the devices.
      seed: of the run; with several, variables have a leading axis over them.
    """

    def __init__(
        self, task: Task, mesh: Mesh, variables: Any, data: Data, *, batch_size: int, seed: int | tuple[int, ...] = 0
    ):
        self._mesh, self._data = mesh, data
        self._batch = -(-batch_size // mesh.size) * mesh.size
        call = over_seeds(make_evaluation(task.evaluate, task.carries), seed, (0, None, None, None))
        # What is carried goes into the next call as it came into this one: whole on every device.
        call = jax.jit(call, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._call = parallel.compile_for(mesh, call.lower(variables, data, *self._place(0, 0)))

    def _place(self, first, last):
        indices = np.arange(first, first + self._batch, dtype=np.int32)
        mask = (indices < last).astype(np.float32)
        indices = np.minimum(indices, max(first, last - 1))
        return parallel.shard_batch(indices, self._mesh), parallel.shard_batch(mask, self._mesh)

    def __call__(self, variables: Any, first: int, last: int) -> dict[str, Any]:
        """Means over the examples `first, ..., last - 1` of the data set; of several seeds a list each."""
        sums: dict[str, Any] = {}
        for start in range(first, last, self._batch):
            part, carried = self._call(variables, self._data, *self._place(start, last))
            variables = {**variables, **carried} if carried else variables
            # Fetched batch by batch: queued programs on several CPU devices can deadlock.
            part = {name: np.asarray(value, np.float64) for name, value in jax.device_get(part).items()}
            sums = {name: sums.get(name, 0.0) + value for name, value in part.items()}
        count = sums.pop("count")
        assert np.all(count == last - first), f"{count} examples were evaluated, not {last - first}"
        weight = sums.pop("weight", count)  # of what the means are, where that is not examples
        return {name: (value / weight).tolist() for name, value in sums.items()}
