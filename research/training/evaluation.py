"""Evaluation that sees every example of a split exactly once."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from research.training import parallel
from research.training.step import Data, make_evaluation

# Examples a call: one compiled program serves every split and every data set.
_BATCH = 256


class Evaluator:
    """Means of a task's metrics over a range of examples, by one program compiled ahead of time.

    The last batch is padded and the padding masked; that each example counted once is asserted. A task that averages
    over something else than examples, such as frames, sums their number as `weight`.
    """

    def __init__(self, evaluate: Callable, mesh: Mesh, variables: Any, data: Data):
        self._mesh, self._data = mesh, data
        self._batch = -(-_BATCH // mesh.size) * mesh.size
        places = self._place(0, 0)
        self._call = jax.jit(make_evaluation(evaluate)).lower(variables, data, *places).compile()

    def _place(self, first, last):
        indices = np.arange(first, first + self._batch, dtype=np.int32)
        mask = (indices < last).astype(np.float32)
        indices = np.minimum(indices, max(first, last - 1))
        return parallel.shard_batch(indices, self._mesh), parallel.shard_batch(mask, self._mesh)

    def __call__(self, variables: Any, first: int, last: int) -> dict[str, float]:
        """Means over the examples `first, ..., last - 1` of the data set."""
        sums: dict[str, float] = {}
        for start in range(first, last, self._batch):
            # Fetched batch by batch: queued programs on several CPU devices can deadlock.
            part = jax.device_get(self._call(variables, self._data, *self._place(start, last)))
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in part.items()}
        count = sums.pop("count")
        assert count == last - first, f"{count} examples were evaluated, not {last - first}"
        weight = sums.pop("weight", count)  # of what the means are, where that is not examples
        return {name: value / weight for name, value in sums.items()}
