"""Examples a second and memory of a training step against devices, depth, width and sequence length.

Four curves, of which each varies one thing:

    devices   virtual CPU devices 1, 2, 4, 8, one global batch (strong scaling): a CIFAR ResNet
    depth     layers of the ResNet: 20, 56, 110
    width     channels of its first stage: 8, 16, 32, 64
    time      steps of a sequence, T = 100 ... 1600: an LSTM, the network of the adding problem

Every point is the trainer's own compiled stretch of steps on random data that lie on the device (the benchmark's: task,
gradient, SGD with momentum), in a process of its own, since JAX fixes the number of devices when it starts. On several
devices it is `pmap` with synchronised BatchNorm, as in training; first losses have to be those of one device. The
points of a curve take turns, round after round, on all cores; marks are medians over rounds, bars reach from the least
to the largest, and a round in which a point falls below half its own best speed is repeated. The time is from a call
of several steps to its losses.

Memory is what the compiled step needs on one device by XLA's buffer assignment: temporaries and arguments (weights,
momenta, data). GFLOP/s are of convolutions and matrix products, two operations a multiply-add, three passes a step.
References in the figures: speed in proportion to devices, or to 1 / multiply-adds, from the first point on; memory in
proportion to what varies (of a device: to 1 / devices) through the last (the first).

Not measured: accelerators (all runs on the CPU), several hosts, compilation, data that do not fit the device, and what
the process holds besides the step. Virtual devices share the machine's cores: beyond their number (a line in the
figure) the curve says what splitting and synchronising cost, and below it how well one device used all the cores.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments import benchmark_timing as timing
from experiments.options import option
from experiments.runner import Experiment, main
from experiments.scaling_report import AXES, points, report
from research.errors import CarouselError, Interrupted, UsageError

# Relative difference of first losses from those of the fewest devices above which something else is computed.
_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    axes: tuple[str, ...] = option(tuple(AXES), "What to vary, a curve each.", choices=tuple(AXES))
    # Not `devices`: that flag is the number of devices of the whole process, to the launcher and to the runner.
    device_counts: tuple[int, ...] = option((1, 2, 4, 8), "Virtual CPU devices.", minimum=1)
    depths: tuple[int, ...] = option((20, 56, 110), "Layers of the ResNet, 6n+2.")
    widths: tuple[int, ...] = option((8, 16, 32, 64), "Channels of its first stage.", minimum=1)
    lengths: tuple[int, ...] = option((100, 200, 400, 800, 1600), "Steps of a sequence, T.", minimum=1)
    base_depth: int = option(20, "Layers where they do not vary.")
    base_width: int = option(16, "Channels of the first stage where they do not vary.", minimum=1)
    image_size: int = option(32, "Height and width of an image in pixels.", minimum=4)
    batch_size: int = option(128, "Images a step, over all devices.", minimum=1)
    units: int = option(77, "Of the LSTM.", minimum=1)
    sequence_batch_size: int = option(50, "Sequences a step.", minimum=1)
    rounds: int = option(5, "Rounds that count.", minimum=1)
    seconds: float = option(1.0, "Each point runs at least so long a round.", minimum=0)
    repeats: int = option(3, "Disturbed rounds that are made up for, at most.", minimum=0)
    steps_per_call: int = option(2, "Training steps of the compiled stretch.", minimum=1)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One curve.

    Attributes:
      axis: what varies, of `AXES`.
      values: that it takes, ascending.
      network: `cifar` or `adding`, of `benchmark_workloads`.
      sizes: what the network and its data are made with, without what varies.
      rounds, seconds, repeats, steps_per_call: as the flags.
    """

    axis: str
    values: tuple[int, ...]
    network: str
    sizes: Mapping[str, int]
    rounds: int
    seconds: float
    repeats: int
    steps_per_call: int

    @property
    def name(self) -> str:
        fixed = "-".join(f"{name}{size}" for name, size in self.sizes.items())
        return f"{self.axis}-{'.'.join(map(str, self.values))}-{fixed}"

    def point(self, value: int) -> dict[str, Any]:
        """What the process of that value is to do."""
        varied, devices = ({}, value) if self.axis == "devices" else ({self.axis: value}, 1)
        sizes = {**self.sizes, **varied}
        return {"network": self.network, "sizes": sizes, "devices": devices, "steps": self.steps_per_call}


def cells(config: Config) -> list[Cell]:
    """One cell a curve.

    Raises:
      UsageError: there is no such network, or the batch does not divide by a number of devices.
    """
    from research.models import resnet_tables

    images = {
        "depth": config.base_depth,
        "width": config.base_width,
        "size": config.image_size,
        "batch": config.batch_size,
    }
    sequences = {"units": config.units, "batch": config.sequence_batch_size}
    values = {
        "devices": config.device_counts,
        "depth": config.depths,
        "width": config.widths,
        "time": config.lengths,
    }
    same = {name: getattr(config, name) for name in ("rounds", "seconds", "repeats", "steps_per_call")}
    grid = []
    for axis in config.axes:
        network, sizes = ("adding", sequences) if axis == "time" else ("cifar", images)
        fixed = {name: size for name, size in sizes.items() if name != axis}
        grid.append(Cell(axis, tuple(sorted(values[axis])), network, fixed, **same))
    for cell in grid:
        for value in cell.values:
            sizes, devices = cell.point(value)["sizes"], cell.point(value)["devices"]
            if cell.network == "cifar":
                resnet_tables.cifar_resnet(depth=sizes["depth"], width=sizes["width"])  # raises where there is none
            if sizes["batch"] % devices:
                raise UsageError(f"--batch_size={sizes['batch']} does not divide by {devices} devices: give a multiple")
    return grid


def run(cell: Cell, context: Any) -> Mapping[str, Any]:
    """Starts a process a point, holds the first losses of device counts against each other, times all in turn."""
    import jax

    from experiments import scaling_worker
    from research.training import environment

    jax.config.update("jax_platforms", "cpu")  # as the processes: the record is to be of what was measured
    environment.record(context.folder.path, context.command, {}, context.reporter.note)

    def between():
        if context.should_stop():
            raise Interrupted(f"{context.folder.path}: stopped between rounds; the same command measures it again")

    with contextlib.ExitStack() as stack:
        workers = {
            value: stack.enter_context(
                scaling_worker.start(f"{cell.axis} {value}", cell.point(value), jax.config.jax_compilation_cache_dir)
            )
            for value in cell.values
        }
        found = {}
        for value, worker in workers.items():  # they compile side by side
            found[str(value)] = worker.found()
            between()
        if cell.axis == "devices":
            check_equal_work(found)
        sides = {str(value): timing.Side(worker.call, cell.steps_per_call) for value, worker in workers.items()}
        rounds = timing.measure(sides, rounds=cell.rounds, seconds=cell.seconds, repeats=cell.repeats, between=between)
    result = {"points": found, "rounds": rounds, "cores": environment.usable_cores()}
    shown = ", ".join(f"{point.examples_a_second:,.0f}" for point in points(cell.axis, result))
    good = f"{len(timing.counted(rounds))} of {len(rounds)} rounds count"
    context.reporter.note(f"{context.label}: {shown} examples/s; {good}")
    return result


def check_equal_work(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether all device counts had the losses of the first.

    Raises:
      CarouselError: one had not: what is measured is not the same training.
    """
    first, *others = found
    expected = found[first]["first_losses"]
    for name in others:
        pairs = zip(found[name]["first_losses"], expected, strict=True)
        difference = max(abs(loss - wanted) / abs(wanted) for loss, wanted in pairs)
        if not difference <= _TOLERANCE:
            raise CarouselError(
                f"the first losses on {name} devices differ from those on {first} by {difference:.1g} of their size: "
                "unequal work is not compared; report this, or leave it out of --device_counts"
            )


EXPERIMENT = Experiment(
    name="scaling",
    config=Config,
    cells=cells,
    run=run,
    report=report,
    alone=True,
    smoke={
        "device_counts": (1, 2),
        "depths": (8, 14),
        "widths": (2, 4),
        "lengths": (4, 8),
        "base_depth": 8,
        "base_width": 2,
        "image_size": 8,
        "batch_size": 4,
        "units": 4,
        "sequence_batch_size": 3,
        "rounds": 2,
        "seconds": 0.0,
        "repeats": 0,
    },
)

if __name__ == "__main__":
    main(EXPERIMENT)
