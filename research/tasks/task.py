"""What the trainer asks of a model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

# apply(variables, inputs, train=..., key=...) -> (outputs, new variables other than the parameters)
Apply = Callable[..., tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model reads, and two questions; all pure functions.

    Attributes:
      loss: `(variables, batch, keys, key) -> (mean loss, (new collections, metrics))`; keys `[batch]`, one an example,
        and the step's key are the same whatever the number of devices. Where the mean is over something else than
        examples, the metric `weight` is their number.
      evaluate: `(variables, batch) -> sums`: each metric summed over the examples whose `batch["mask"]` is 1, their
        `count`, and where means are over something else than examples its sum as `weight`.
      inputs: `batch -> what the model reads`: an array, or a dictionary of the model's named arguments.
      carries: a batch goes on where the batch before it stopped, training in order as well; `evaluate` gives
        `(sums, new collections)`, which the evaluation of the next batch is handed.
    """

    loss: Callable
    evaluate: Callable
    inputs: Callable
    carries: bool = False
