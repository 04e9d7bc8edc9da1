"""Vanilla against gated recurrence: what residual against plain is across depth, across time.

The error that reaches an earlier state is a product over all steps between. In a vanilla network every factor holds
U and the activation's slope, and the product vanishes or explodes; the cell of an LSTM or GRU carries it through a sum
that the gates keep near the identity (Hochreiter and Schmidhuber 1997: the constant error carousel). So what depends on
inputs long ago is learned by gated cells and not by vanilla ones, and the gradient shows why.

By default: tanh, IRNN, LSTM and GRU on the adding problem and on 8x8 digits pixel by pixel (T = 64), three seeds side
by side in one program, in under five minutes on two cores. Presets: `chung2014` (Table 2's cells at matched sizes on
four sets of polyphonic music), `bai2018` (the recurrent rows of the TCN paper's table), `zaremba2014` (word models of
the Penn Treebank, three sizes).

Differences from the papers: the report lists them with its 'paper | here' tables.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments import sequences
from experiments.options import option
from experiments.runner import Experiment, main, report_of
from experiments.sequence_recipes import RECIPES
from experiments.sequence_tasks import TASKS
from experiments.sequences import SequenceCell

# Of so many validation sequences the gradient at every hidden state is taken.
_PROBED = 64


@dataclasses.dataclass(frozen=True)
class Config(sequences.SequenceConfig):
    """The flags."""

    tasks: tuple[str, ...] = option(("adding", "digits"), "What to learn.", choices=tuple(TASKS))
    lengths: tuple[int, ...] | None = option(
        None, "T of the adding problem and of copy memory (default: the recipe's).", minimum=2
    )


def cells(config: Config) -> list[SequenceCell]:
    """The grid: recipes x tasks x lengths x cells; seeds are inside of a cell."""
    return [
        sequences.cell_of(config, task, cell, recipe, length)
        for recipe in config.recipes
        for task in config.tasks
        for length in _lengths(config, recipe, task)
        for cell in config.cells
    ]


def _lengths(config: Config, recipe: str, task: str) -> tuple[int | None, ...]:
    if not TASKS[task].has_length:
        return (None,)
    return config.lengths or RECIPES[recipe].get(task, {}).get("lengths", (None,))


def run(cell: SequenceCell, context: Any) -> Mapping[str, Any]:
    """Trains the networks of all seeds; of one output after one layer the gradients at all states, before and after."""
    from research.files import write_json_atomic

    data = sequences.load(cell)
    outcome, result = sequences.train(cell, data, context)
    if TASKS[cell.task].network == "one" and len(cell.units) == 1:
        moments = {"initial": outcome.initial, "final": outcome.final}
        norms = {moment: gradient_norms(cell, data, state.params) for moment, state in moments.items()}
        write_json_atomic(context.folder.path / "gradients.json", norms)
    return result


def gradient_norms(cell: SequenceCell, data: Any, params: Any) -> list[list[float | None]]:
    """|dL/dh_t| of each seed and time: L the loss of the output after the last step, the mean over sequences."""
    import jax.numpy as jnp

    from research.analysis import time_signal
    from research.files import json_ready
    from research.models.recurrent import Recurrent

    first, _ = data.splits.range("validation")
    batch = {name: array[first : first + _PROBED] for name, array in data.splits.arrays.items()}
    stack = sequences.network_of(cell, data).stack
    layer = Recurrent(stack.cell, stack.features[0], use_bias=stack.use_bias, dtype=stack.dtype)

    def loss(params, outputs):
        head = params["head"]
        task = data.make_task(lambda *_, **__: (outputs[:, -1] @ head["kernel"] + head["bias"], {}))
        return task.evaluate(params, batch | {"mask": jnp.ones(len(x))})["loss"]

    x = data.make_task(None).inputs(batch)
    norms = time_signal.state_gradient_norms(layer, params, x, loss, lambda params: params["stack"]["layer1"])
    return json_ready(norms)


_CHUNG = {
    "recipes": ("chung2014",),
    "cells": ("tanh", "gru_before", "lstm_peepholes"),
    "tasks": tuple(RECIPES["chung2014"]),
    "evaluations": 50,
}
_BAI = {
    "recipes": ("bai2018",),
    "cells": ("lstm", "gru", "tanh"),
    "tasks": tuple(RECIPES["bai2018"]),
    "evaluations": 50,
}
_ZAREMBA = {
    "recipes": ("zaremba2014_small", "zaremba2014_medium", "zaremba2014_large"),
    "cells": ("lstm",),
    "tasks": ("words",),
    "seeds": (0,),
    "evaluations": 55,
}


EXPERIMENT = Experiment(
    name="recurrence_ablation",
    config=Config,
    cells=cells,
    run=run,
    report=report_of("recurrence_report"),
    presets={"chung2014": _CHUNG, "bai2018": _BAI, "zaremba2014": _ZAREMBA},
    smoke={
        "units": (8,),
        "steps": 4,
        "batch_size": 4,
        "steps_per_call": 2,
        "evaluations": 2,
        "lengths": (10,),
        "seeds": (0, 1),
    },
    exclusive=(("epochs", "steps"),),
    check=sequences.check,
    divergence_is_a_result=True,
)

if __name__ == "__main__":
    main(EXPERIMENT)
