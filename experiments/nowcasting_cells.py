"""The grid of the nowcasting experiment: its flags, its cells, and the networks that their names tell."""

import dataclasses
import math
import re
from typing import Any

from experiments import nowcasting_data, precision
from experiments.options import option
from research.errors import UsageError

BASELINES = {"persistence": "persistence", "optical_flow": "optical flow"}
"""Forecasts without learning, and what to call them."""


@dataclasses.dataclass(frozen=True)
class CellKind:
    """A value of `--cells`: what networks of it are called, and its name and options in `recurrent.CELLS`."""

    title: str
    kind: str
    options: dict[str, Any]


CELLS = {
    "lstm": CellKind("LSTM", "lstm", {"peepholes": True}),
    "lstm_by_position": CellKind("LSTM, peepholes by position", "lstm", {"peepholes": True, "by_position": True}),
    "gru": CellKind("GRU", "gru", {}),
    "gru_before": CellKind("GRU, reset before", "gru", {"reset": "before"}),
}

# What a data set's cells take where the flags say nothing.
DEFAULTS: dict[str, dict[str, Any]] = {
    "moving_digits": {
        # The first three have about as many parameters as each other; the fourth 13 times as many.
        "networks": ("3x3-3x3-16-16", "3x3-1x1-24-24", "fc-18-18", "fc-128-128", "persistence"),
        "frame": 24,
        "patch": 2,
        "observed": 5,
        "horizon": 5,
        "pool": 500,
        "train_examples": 10_000,
        "validation_examples": 256,
        "test_examples": 512,
        "batch_size": 8,
        "steps": 2_500,
        # The paper's is 0.001, for longer training; of 0.001, 0.003 and 0.01 the best for the first of the networks.
        "learning_rate": 1e-2,
    },
    "moving_mnist": {
        "networks": ("3x3-3x3-16-16", "3x3-1x1-24-24", "fc-128-128", "persistence"),
        "frame": 64,
        "patch": 4,
        "observed": 10,
        "horizon": 10,
        "pool": 500,
        "train_examples": 10_000,
        "validation_examples": 500,
        "test_examples": 1_000,
        "batch_size": 8,
        "epochs": 1,
        "learning_rate": 1e-2,
    },
    "radar": {
        "networks": ("3x3-3x3-16-16", "fc-64-64", "optical_flow", "persistence"),
        "frame": 64,
        "patch": 2,
        "observed": 5,
        "horizon": 15,
        "scale": 2,
        "batch_size": 8,
        "steps": 1_000,
        "learning_rate": 3e-3,
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    dataset: str = option("moving_digits", "What to forecast.", choices=tuple(DEFAULTS))
    networks: tuple[str, ...] | None = option(
        None,
        "(input kernel)-(state kernel)-widths, such as 5x5-5x5-128-64-64; fc-2048-2048; persistence; optical_flow.",
    )
    cells: tuple[str, ...] = option(("lstm",), "Kinds of cell.", choices=tuple(CELLS))
    seeds: tuple[int, ...] = option((0,), "Seeds of every network.", minimum=0)
    frame: int | None = option(None, "Height and width of frames; radar is cut into such squares.", minimum=8)
    observed: int | None = option(None, "Frames that are seen.", minimum=2)
    horizon: int | None = option(None, "Frames to forecast.", minimum=1)
    patch: int | None = option(None, "Patches of so many pixels both ways become channels.", minimum=1)
    digits: int = option(2, "Digits in a frame.", minimum=1)
    pool: int | None = option(None, "Digits to draw from.", minimum=1)
    train_examples: int | None = option(None, "Training sequences of digits.", minimum=1)
    validation_examples: int | None = option(None, "Validation sequences of digits.", minimum=1)
    test_examples: int | None = option(None, "Test sequences of digits.", minimum=1)
    published: str | None = option(None, "mnist_test_seq.npy, on whose sequences moving_mnist is scored as well.")
    scale: int | None = option(None, "Radar: means over blocks of so many pixels both ways.", minimum=1)
    wet: float = option(0.05, "Radar: squares with rain on at least this share of their pixels.", minimum=0)
    validation_days: tuple[str, ...] | None = option(None, "Radar: days such as 20160711 (default: the last but one).")
    test_days: tuple[str, ...] | None = option(None, "Radar: days such as 20170131 (default: the last).")
    epochs: int | None = option(None, "Passes over the training set.", minimum=1)
    steps: int | None = option(None, "Optimiser steps, instead of --epochs.", minimum=1)
    batch_size: int | None = option(None, "Sequences a step, over all devices.", minimum=1)
    optimizer: str = option("rmsprop", "The optimiser.", choices=("rmsprop", "adam"))
    learning_rate: float | None = option(None, "Its learning rate.")
    clip_norm: float = option(0.0, "Gradients are clipped to this norm; 0 for not.", minimum=0)
    forget_bias: float = option(1.0, "Added to the LSTM's forget gate.")
    segment: int | None = option(None, "Steps of a segment that is computed again: memory for time.", minimum=1)
    evaluations: int = option(5, "How often, evenly spread, validation and test losses are measured.", minimum=1)
    steps_per_call: int = option(50, "Steps of a compiled stretch; interval of the logged loss.", minimum=1)
    data_dir: str | None = option(None, "Folder of MNIST or of radar frames (default: ./data).")
    parallel: str = option("auto", "How a step is spread over devices.", choices=("auto", "pmap", "jit", "shard_map"))
    devices: int | None = option(None, "How many devices (default: all; on the CPU 1).", minimum=1)
    precision: str = precision.field()


@dataclasses.dataclass(frozen=True, kw_only=True)
class NowcastCell:
    """One network of one seed: fields as the flags of the same names; of a baseline, `cell` and `seed` mean nothing.

    `files` is of the radar's frames, so that a run on other ones is another run wherever they lie.
    """

    dataset: str
    network: str
    cell: str
    seed: int
    frame: int
    observed: int
    horizon: int
    patch: int
    digits: int
    pool: int | None = None
    train_examples: int | None = None
    validation_examples: int | None = None
    test_examples: int | None = None
    published: str | None = None
    scale: int = 1
    wet: float
    validation_days: tuple[str, ...] | None
    test_days: tuple[str, ...] | None
    files: str | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 16
    optimizer: str
    learning_rate: float = 1e-3
    clip_norm: float
    forget_bias: float
    segment: int | None
    evaluations: int
    steps_per_call: int
    data_dir: str | None = option(None, "", identity=False)
    parallel: str = option("auto", "", identity=False)
    devices: int | None = option(None, "", identity=False)
    precision: str = precision.field()

    @property
    def name(self) -> str:
        if self.network in BASELINES:
            return f"{self.dataset}-{self.network}{precision.suffix(self)}"
        kind = [] if self.cell == "lstm" else [self.cell]
        return "-".join([self.dataset, self.network, *kind, f"seed{self.seed}"]) + precision.suffix(self)


def cells(config: Config) -> list[NowcastCell]:
    """The grid: seeds x networks x kinds of cell; a baseline stands there once.

    Raises:
      UsageError: nothing can be trained so.
    """
    defaults = dict(DEFAULTS[config.dataset])
    if config.steps or config.epochs:
        defaults = {name: value for name, value in defaults.items() if name not in ("steps", "epochs")}
    networks = config.networks or defaults["networks"]
    fields = {f.name for f in dataclasses.fields(NowcastCell)}
    chosen = {name: value for name, value in defaults.items() if name in fields}
    chosen |= {name: value for name, value in vars(config).items() if name in fields and value is not None}
    chosen = dict.fromkeys(("segment", "validation_days", "test_days")) | chosen
    if config.dataset == "radar":
        chosen["files"] = nowcasting_data.fingerprint(config.data_dir)
    found = []
    for seed in config.seeds:
        for network in networks:
            layers_of(network)
            if network not in BASELINES:
                found += [NowcastCell(network=network, cell=cell, seed=seed, **chosen) for cell in config.cells]
            elif seed == config.seeds[0]:
                # The same ones whatever the grid is, so that a working folder can grow.
                found.append(NowcastCell(network=network, cell="lstm", seed=0, **chosen))
    for cell in found:
        _check_numbers(cell)
    return found


def _check_numbers(cell: NowcastCell) -> None:
    if cell.frame % cell.patch:
        raise UsageError(f"--frame={cell.frame} does not divide by --patch={cell.patch}: give a multiple")
    if not (math.isfinite(cell.learning_rate) and cell.learning_rate > 0):
        raise UsageError(f"--learning_rate={cell.learning_rate}: give a positive number")
    if not math.isfinite(cell.forget_bias):
        raise UsageError(f"--forget_bias={cell.forget_bias}: give a finite number")
    if cell.devices and cell.batch_size % cell.devices:
        raise UsageError(f"--batch_size={cell.batch_size} does not divide by {cell.devices} devices: give a multiple")
    if cell.dataset == "radar" and cell.digits != 2:
        raise UsageError(f"--digits={cell.digits}: radar frames have none; leave it out")
    if cell.dataset != "radar" and (cell.validation_days or cell.test_days or cell.scale != 1):
        raise UsageError("--validation_days, --test_days and --scale are for --dataset=radar: leave them out")
    if cell.dataset != "moving_mnist" and cell.published:
        raise UsageError(f"--published={cell.published}: it is for --dataset=moving_mnist; leave it out")
    if cell.dataset != "radar" and cell.network == "optical_flow":
        raise UsageError("optical_flow is a forecast of rain: give --dataset=radar or leave it out of --networks")


def layers_of(network: str) -> tuple[tuple[int, int] | None, tuple[int, ...]]:
    """Kernel sizes (None for vectors) and widths that a network's name tells; of a baseline nothing.

    Raises:
      UsageError: it tells none.
    """
    if network in BASELINES:
        return None, ()
    if match := re.fullmatch(r"(?:fc|(\d+)x\1-(\d+)x\2)((?:-[1-9]\d*)+)", network):
        kernels = None if match[1] is None else (int(match[1]), int(match[2]))
        if kernels is None or all(size % 2 for size in kernels):
            return kernels, tuple(int(width) for width in match[3][1:].split("-"))
    raise UsageError(
        f"--networks: {network!r} is no network; write (input kernel)-(state kernel)-widths with odd square kernels, "
        f"such as 3x3-3x3-16-16, or fc-64-64, or one of {', '.join(BASELINES)}"
    )


def network_of(cell: NowcastCell) -> Any:
    """The network of a cell."""
    from research.models import forecaster, recurrent

    kernels, features = layers_of(cell.network)
    kind = CELLS[cell.cell]
    options = kind.options | ({"forget_bias": cell.forget_bias} if kind.kind == "lstm" else {})
    unit = recurrent.CELLS[kind.kind](**options)
    shape = (features, cell.horizon, kernels, cell.patch)
    return forecaster.EncoderForecaster(unit, *shape, segment=cell.segment, dtype=precision.dtype(cell))


def label_of(network: str, cell: str) -> str:
    """What tables and figures call a network."""
    if network in BASELINES:
        return BASELINES[network]
    kind = CELLS[cell].title
    return f"FC-{kind} {network[3:]}" if layers_of(network)[0] is None else f"Conv{kind} {network}"
