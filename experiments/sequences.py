"""What experiments on sequences share: the recipe's flags, a cell's fields, the networks, one training.

Seeds of a cell are trained side by side in one program; each result and logged metric is a list over them.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import precision, training
from experiments.options import option
from experiments.sequence_recipes import RECIPES
from experiments.sequence_tasks import TASKS, Loaded, text_path
from research.errors import CarouselError, UsageError

# Kinds of cell: the name in `research.models.recurrent.CELLS`, and what differs from its defaults.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tanh": ("tanh", {}),
    "relu": ("relu", {}),
    "sigmoid": ("sigmoid", {}),
    "irnn": ("irnn", {}),
    "leaky": ("leaky", {}),
    "lstm": ("lstm", {}),
    "lstm_peepholes": ("lstm", {"peepholes": True}),
    "lstm_goodfellow": ("lstm", {"candidate": "sigmoid"}),
    "gru": ("gru", {}),
    "gru_before": ("gru", {"reset": "before"}),
    "mgu": ("mgu", {}),
}
NGRAM = "4-gram"
LABELS = {
    "tanh": "tanh",
    "relu": "ReLU",
    "sigmoid": "sigmoid",
    "irnn": "IRNN",
    "leaky": "leaky",
    "lstm": "LSTM",
    "lstm_peepholes": "LSTM, peepholes",
    "lstm_goodfellow": "LSTM, Goodfellow",
    "gru": "GRU",
    "gru_before": "GRU, reset before",
    "mgu": "MGU",
    NGRAM: "4-gram",
}


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """The flags of the recipe; an experiment adds its grid. What is not given comes from `--recipes`."""

    cells: tuple[str, ...] = option(("tanh", "irnn", "lstm", "gru"), "Kinds of recurrent cell.", choices=tuple(KINDS))
    recipes: tuple[str, ...] = option(
        ("default",), "Where flags that are not given come from; a published one is a preset.", choices=tuple(RECIPES)
    )
    seeds: tuple[int, ...] = option((0, 1, 2), "Trained side by side in one program.", minimum=0)
    units: tuple[int, ...] | None = option(None, "Units of each layer, from the input on.", minimum=1)
    epochs: int | None = option(None, "Passes over the training set.", minimum=1)
    steps: int | None = option(None, "Optimiser steps, instead of --epochs.", minimum=1)
    batch_size: int | None = option(None, "Sequences a step, over all devices; of a text its streams.", minimum=1)
    time: int | None = option(None, "Tokens of a text that gradients go back (the state goes on).", minimum=1)
    optimizer: str | None = option(None, "The optimiser.", choices=("sgd", "adam", "rmsprop"))
    learning_rate: float | None = option(None, "Its learning rate.")
    clip_norm: float | None = option(None, "Gradients are clipped to this norm; 0 for not.", minimum=0)
    forget_bias: float | None = option(None, "Added to the LSTM's forget gate.")
    dropout: float | None = option(None, "Between the layers of a language model, not in time.", minimum=0)
    weight_noise: float | None = option(None, "Standard deviation of noise on the weights in training.", minimum=0)
    segment: int | None = option(None, "Steps of a segment that is computed again: memory for time.", minimum=1)
    evaluations: int = option(10, "How often, evenly spread, validation and test scores are measured.", minimum=1)
    steps_per_call: int | None = option(None, "Steps of a compiled stretch; interval of the logged loss.", minimum=1)
    text: str | None = option(None, "A text file, or a folder of three (default: ptb in --data_dir).")
    data_dir: str | None = option(None, "Folder of the data sets' original files (default: ./data).")
    parallel: str = option("auto", "How a step is spread over devices.", choices=("auto", "pmap", "jit", "shard_map"))
    devices: int | None = option(None, "How many devices (default: all; on the CPU 1).", minimum=1)
    precision: str = precision.field()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceCell:
    """One kind of network to train on one task, with all seeds: fields as the flags of the same names.

    Further ones: `use_bias` of the recurrent layers; `init_scale` s, all parameters of a language model from U(-s, s);
    `hold_epochs` and `decay` of the learning rate, 0 for a constant one; `select` of the trainer's Plan; `corpus` and
    `checksums`, name and SHA-256 of the text's files, so that another text is another run wherever it lies.
    """

    task: str
    cell: str
    recipe: str
    seed: tuple[int, ...]
    length: int | None = None
    corpus: str | None = None
    checksums: tuple[str, ...] = ()
    units: tuple[int, ...] = ()
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 32
    time: int | None = None
    optimizer: str = "adam"
    learning_rate: float = 2e-3
    hold_epochs: int = 0
    decay: float = 1.0
    clip_norm: float = 1.0
    forget_bias: float = 1.0
    use_bias: bool = True
    init_scale: float | None = None
    dropout: float = 0.0
    weight_noise: float = 0.0
    segment: int | None = None
    select: str = "last"
    evaluations: int = 10
    steps_per_call: int = 50
    text: str | None = option(None, "", identity=False)
    data_dir: str | None = option(None, "", identity=False)
    parallel: str = option("auto", "", identity=False)
    devices: int | None = option(None, "", identity=False)
    precision: str = precision.field()

    @property
    def name(self) -> str:
        parts = [self.task + (f"{self.length}" if self.length else "")] + [self.corpus] * bool(self.corpus)
        parts += [self.cell, *map(str, self.units)]
        parts += [] if self.recipe == "default" else [self.recipe]
        return "-".join([*parts, "seeds" + ".".join(map(str, self.seed))]) + precision.suffix(self)


def cell_of(config: SequenceConfig, task: str, cell: str, recipe: str, length: int | None = None) -> SequenceCell:
    """The network that the flags ask for, with the recipe's values where they say nothing.

    Raises:
      UsageError: nothing can be trained so.
    """
    if task not in RECIPES[recipe]:
        raise UsageError(f"--recipes={recipe} says nothing of {task}: it is for {', '.join(RECIPES[recipe])}")
    fields = {f.name for f in dataclasses.fields(SequenceCell)}
    chosen = dict(RECIPES[recipe][task])
    chosen |= chosen.pop("cells", {}).get(cell, {})
    chosen.pop("lengths", None)  # the experiment's grid has them
    given = {n: v for n, v in vars(config).items() if n in fields and v is not None}
    if {"steps", "epochs"} & given.keys():
        chosen = {name: value for name, value in chosen.items() if name not in ("steps", "epochs")}
    grid = {"task": task, "cell": cell, "recipe": recipe, "length": length, "seed": config.seeds}
    made = SequenceCell(**chosen | given | grid)
    if not made.units:
        raise UsageError(f"--recipes={recipe} has no size for {cell} on {task}: give --units")
    if not (math.isfinite(made.learning_rate) and made.learning_rate > 0):
        raise UsageError(f"--learning_rate={made.learning_rate}: give a positive number")
    if not made.dropout < 1:
        raise UsageError(f"--dropout={made.dropout}: give a probability below 1")
    if made.devices and made.batch_size % made.devices:
        raise UsageError(f"--batch_size={made.batch_size} does not divide by {made.devices} devices: give a multiple")
    if cell == NGRAM and made.dropout:
        raise UsageError(f"--dropout={made.dropout}: {NGRAM} has no layers to drop between; leave it out of --cells")
    if cell == NGRAM and len(made.units) > 1:
        units = ",".join(map(str, made.units))
        raise UsageError(f"--units={units}: {NGRAM} has one hidden layer; give one number or leave it out of --cells")
    if TASKS[task].network != "text":
        return made
    if made.segment:
        raise UsageError(f"--segment={made.segment}: a text is read in windows, give a smaller --time instead")
    return dataclasses.replace(made, **_text_of(made))


def _text_of(cell: SequenceCell) -> dict[str, Any]:
    """Name and checksums of the text; without them where it is missing, which a report does not need."""
    from research.data import text

    path = text_path(cell)
    with contextlib.suppress(CarouselError):
        return {"corpus": Path(path).stem, "checksums": tuple(text.checksums(path).values())}
    return {"corpus": Path(path).stem}


def check(cell: SequenceCell) -> None:
    """Whether the cell can be trained.

    Raises:
      CarouselError: its text is missing.
    """
    from research.data import text

    if TASKS[cell.task].network == "text":
        text.checksums(text_path(cell))


def load(cell: SequenceCell) -> Loaded:
    return TASKS[cell.task].load(cell)


def of_vocabulary(size: int) -> Loaded:
    """What `network_of` asks of a text, without the text."""
    return Loaded(None, None, inputs=size, outputs=size)


def network_of(cell: SequenceCell, data: Loaded, axis_name: str | None = None, streams: int | None = None) -> Any:
    """The network of a cell; `streams` side by side, if not those of training."""
    from research.models import language, sequence
    from research.models.recurrent import CELLS

    shape, dtype = TASKS[cell.task].network, precision.dtype(cell)
    of_text = {"streams": streams or cell.batch_size, "axis_name": axis_name, "dtype": dtype}
    if cell.cell == NGRAM:
        return language.FeedForwardLanguageModel(data.inputs, cell.units[0], cell.units[0], **of_text)
    kind, options = KINDS[cell.cell]
    if kind == "lstm":
        options = options | {"forget_bias": cell.forget_bias}
    unit = CELLS[kind](**options)
    if shape == "text":
        return language.RecurrentLanguageModel(
            data.inputs,
            cell.units[0],
            unit,
            cell.units,
            dropout=cell.dropout,
            init_scale=cell.init_scale,
            **of_text,
        )
    stack = sequence.Stack(unit, cell.units, use_bias=cell.use_bias, segment=cell.segment, dtype=dtype)
    return {"one": sequence.SequenceToOne, "each": sequence.SequenceToSequence}[shape](stack, data.outputs)


def train(cell: SequenceCell, data: Loaded, context: Any) -> tuple[Any, dict[str, Any]]:
    """Trains the cell's networks: the trainer's outcome, and what every result.json holds."""
    from research.tasks.noise import with_weight_noise
    from research.training import loop, optimizers

    examples = data.splits.train
    if cell.batch_size > examples:
        raise UsageError(f"--batch_size={cell.batch_size}: {cell.task} has {examples} training sequences, give fewer")
    plan = training.plan_of(cell, data.splits, select=cell.select)
    schedule = optimizers.constant(cell.learning_rate)
    if cell.hold_epochs:
        an_epoch = examples // cell.batch_size
        epochs = {"hold_epochs": cell.hold_epochs, "factor": cell.decay, "epochs": -(-plan.steps // an_epoch)}
        schedule = optimizers.exponential_epochs(cell.learning_rate, **epochs, steps_per_epoch=an_epoch)
    optimizer = optimizers.OPTIMIZERS[cell.optimizer](schedule, clip_norm=cell.clip_norm or None)

    def make_task(apply):
        task = data.make_task(apply)
        return with_weight_noise(task, cell.weight_noise) if cell.weight_noise else task

    outcome = loop.train(
        functools.partial(network_of, cell, data), make_task, optimizer, schedule, data.splits, plan, context
    )
    return outcome, training.result_of(outcome, plan) | {"baseline": data.baseline}


_CONFIG = ("task", "length", "cell", "recipe", "batch_size", "optimizer", "learning_rate", "clip_norm")


def summary_rows(run: Any) -> list[dict[str, Any]]:
    """Rows of `summary.csv`, one a seed: task, network, recipe, results, times."""
    config, result = run.config, run.result
    scores = [f"{split}_{metric}" for split in ("train", "validation", "test") for metric in ("loss", "error")]
    seconds = result.get("seconds") or {}
    return [
        {name: config[name] for name in _CONFIG}
        | precision.column(config)
        | {"units": "+".join(map(str, config["units"])), "params": result.get("params"), "steps": result.get("steps")}
        | {"seed": seed}
        | {name: _at(result.get(name), number) for name in scores}
        | {"baseline": result.get("baseline"), "seconds_of_all_seeds": sum(seconds.values())}
        | {"failure": result.get("failure", ""), "final_state_sha256": result.get("final_state_sha256", "")}
        for number, seed in enumerate(config["seed"])
    ]


def _at(values: Sequence[float] | None, number: int) -> float | None:
    return values[number] if values else None
