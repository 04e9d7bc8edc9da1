"""The speed of training steps and inference: ours, the same networks in PyTorch, and in stock Flax layers; and jobs.

All sides of a workload run in one process, in turn, round after round, each on all cores; a round in which a side
falls below half its own best speed is repeated. What is compared is medians of seconds a step, and the median over
rounds of how many times as fast ours is. Our training step is the trainer's own: several steps a compiled call, data
resident, timed from call to result. All sides look up a batch of random data, prepare it, and in training take the
task's loss, its gradient and a step of SGD with momentum.

GFLOP/s are of convolutions and matrix products, two operations a multiply-add, counted in the jaxpr of our forward
pass; a training step counts as three of them (which is a little too much: nobody needs the gradient at the images). The
peak is that of a float32 matrix product in the same process, `--peak_size` cubed.

PyTorch is eager, channels_last where there are maps; with `--compile` torch.compile runs besides, and of the two the
faster counts. PyTorch starts from our weights, and its first result has to be ours. Stock Flax is `nn.Conv` with XLA's
own gradient, unrolled, and `nn.RNN`; it has no ConvLSTM with peepholes ('-'). Language models run without dropout and
begin every window with zeros.

Besides steps, what users wait for: `experiments.benchmark_jobs`. `--jobs=` leaves that out, `--workloads=` the rest.

Not measured: anything but float32 on the CPU.
"""

import dataclasses
import functools
import importlib.util
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from experiments import benchmark_jobs
from experiments import benchmark_timing as timing
from experiments.benchmark_jobs import JOBS, Job
from experiments.benchmark_report import MODES, WORKLOADS, report, summary
from experiments.options import option
from experiments.runner import Experiment, main
from research.errors import CarouselError, Interrupted, UsageError

PEERS = ("torch", "flax")
_PASSES = {"train": 3, "inference": 1}
# Forward multiply-adds of a stretch, as long as those of the trainer's: seconds on a few cores.
_STRETCH_MULTIPLY_ADDS = 1.3e11
# Relative difference of first results from ours above which PyTorch computes something else.
_TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    workloads: tuple[str, ...] = option(tuple(WORKLOADS), "What to run.", choices=tuple(WORKLOADS), may_be_empty=True)
    modes: tuple[str, ...] = option(MODES, "A training step, a forward pass.", choices=MODES)
    peers: tuple[str, ...] | None = option(None, "What to compare with (default: all that is there).", choices=PEERS)
    compile: bool = option(False, "PyTorch by torch.compile as well; takes minutes and a C++ compiler.")
    jobs: tuple[str, ...] = option(JOBS, "What users wait for besides steps.", choices=JOBS, may_be_empty=True)
    rounds: int = option(5, "Rounds that count.", minimum=1)
    job_rounds: int = option(3, "Rounds of a job that count.", minimum=1)
    seconds: float = option(1.0, "Each side runs at least so long a round.", minimum=0)
    repeats: int = option(5, "Disturbed rounds that are made up for, at most.", minimum=0)
    steps_per_call: int | None = option(
        None, "Training steps of our compiled stretch (default: 2 to 50, fewer of larger ones).", minimum=1
    )
    peak_size: int = option(2048, "Rows of the matrix product whose speed is the peak.", minimum=1)
    tiny: bool = option(False, "Workloads of the same kinds, small: to try the command.")
    devices: int | None = option(None, "Devices of our side (default: 1).", minimum=1)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One workload in one mode; fields as the flags."""

    workload: str
    mode: str
    peers: tuple[str, ...]
    compile: bool
    rounds: int
    seconds: float
    repeats: int
    steps_per_call: int | None
    peak_size: int
    tiny: bool
    devices: int | None

    @property
    def name(self) -> str:
        return f"{'tiny-' if self.tiny else ''}{self.workload}-{self.mode}"


def cells(config: Config) -> list[Cell | Job]:
    """The grid: workloads x modes, then jobs. Says so where PyTorch is left out because it is not there.

    Raises:
      UsageError: it is empty.
    """
    if not (config.workloads or config.jobs):
        raise UsageError("--workloads= --jobs= leaves nothing to measure: give one of them a value")
    peers = config.peers
    if peers is None:
        peers = tuple(peer for peer in PEERS if peer != "torch" or has_torch())
        if "torch" not in peers:
            print(f"note: PyTorch is not installed and left out ({_INSTALL})", file=sys.stderr)
    chosen = ("workloads", "modes", "peers", "jobs", "job_rounds")
    same = {name: value for name, value in vars(config).items() if name not in chosen}
    return [
        Cell(workload=workload, mode=mode, peers=peers, **same)
        for workload in config.workloads
        for mode in config.modes
    ] + benchmark_jobs.jobs(config, torch="torch" in peers)


_INSTALL = "CAROUSEL_EXTRAS=test,dev,bench launch/run install"


def has_torch() -> bool:
    """Whether PyTorch is installed; does not load it."""
    return importlib.util.find_spec("torch") is not None


def check(cell: Cell | Job) -> None:
    """Whether the cell's peers can run.

    Raises:
      CarouselError: PyTorch, or the compiler that torch.compile needs, is not there.
    """
    torch = cell.torch if isinstance(cell, Job) else "torch" in cell.peers
    if torch and not has_torch():
        raise CarouselError(f"--peers=torch needs PyTorch: {_INSTALL}, or leave it out")
    if isinstance(cell, Cell) and cell.compile and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise CarouselError("--compile needs a C++ compiler (g++) on the PATH: install one, or leave it out")


def run(cell: Cell | Job, context: Any) -> Mapping[str, Any]:
    """Builds the sides, holds their first results against each other, times them in turn; a job's processes."""
    if isinstance(cell, Job):
        return benchmark_jobs.run(cell, context)
    from experiments import benchmark_workloads as workloads
    from research.training import environment

    environment.record(context.folder.path, context.command, {}, context.reporter.note)
    work = workloads.workload(cell.workload, cell.tiny)
    multiply_adds = work.multiply_adds()
    steps = cell.steps_per_call or max(2, min(50, round(_STRETCH_MULTIPLY_ADDS / multiply_adds)))
    sides, results, built = {}, {}, {}

    def between():
        if context.should_stop():
            raise Interrupted(f"{context.folder.path}: stopped between rounds; the same command measures it again")

    for name, build in builders(cell, work, steps).items():
        between()
        start = time.perf_counter()
        side = build()
        if side is None:
            continue
        sides[name], results[name] = side, _first_result(name, side, between)
        built[name] = time.perf_counter() - start
    differences = {
        name: relative_difference(result, results["ours"]) for name, result in results.items() if "torch" in name
    }
    for name, difference in differences.items():
        if not difference <= _TOLERANCE:
            raise CarouselError(
                f"{cell.name}: the first result of {name} differs from ours by {difference:.1g} of its size: unequal "
                "work is not compared; report this, or leave the workload out of --workloads"
            )

    rounds = timing.measure(sides, rounds=cell.rounds, seconds=cell.seconds, repeats=cell.repeats, between=between)
    result = {
        "sides": list(sides),  # in their turn
        "rounds": rounds,
        "first_call_seconds": built,
        "first_result_difference": differences,
        "batch": work.batch,
        "steps_per_call": steps,
        "gigaflops_a_step": 2e-9 * multiply_adds * _PASSES[cell.mode],
        "peak_gigaflops_a_second": matmul_peak(cell.peak_size),
    }
    numbers = summary(result)
    shown = ", ".join(f"{1e3 * numbers['seconds'][name]:.3g} ms {name}" for name in sides)
    context.reporter.note(f"{context.label}: {shown}; {numbers['counted']} of {len(rounds)} rounds count")
    return result


def _first_result(name: str, side: timing.Side, between: Callable[[], None]) -> Any:
    """Of the call that compiles; where torch.compile fails, in whatever way, that is one line."""
    try:
        return side.call()
    except Exception as error:
        if name != "torch.compile":
            raise
        between()  # Ctrl-C ends its compiler too
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CarouselError(f"torch.compile failed ({reason}): leave --compile out") from error


def builders(cell: Cell, work: Any, steps: int) -> dict[str, Callable[[], Any]]:
    """Side -> what makes it; ours first, with `steps` training steps a call."""
    from experiments import benchmark_workloads as workloads
    from research.training import environment

    found = {"ours": lambda: workloads.ours(work, cell.mode, steps=steps, devices=cell.devices)}
    if "torch" in cell.peers:
        from experiments import benchmark_torch

        threads = environment.usable_cores() or 1
        make = functools.partial(benchmark_torch.side, work, cell.mode, steps=steps, threads=threads)
        found["torch"] = make
        if cell.compile:
            found["torch.compile"] = functools.partial(make, compiled=True)
    if "flax" in cell.peers:
        found["flax"] = lambda: workloads.flax(work, cell.mode, steps=steps)
    return found


def relative_difference(result: Any, expected: Any) -> float:
    """||a - b|| / ||b||; of training, whose calls take different numbers of steps, over the steps of both."""
    import numpy as np

    a, b = np.ravel(result), np.ravel(expected)
    shared = min(a.size, b.size)
    return float(np.linalg.norm(a[:shared] - b[:shared]) / np.linalg.norm(b[:shared]))


@functools.lru_cache(maxsize=1)
def matmul_peak(size: int, tries: int = 8) -> float:
    """GFLOP/s of the fastest of some float32 products of two square matrices."""
    import jax
    import jax.numpy as jnp

    x, best = jnp.ones((size, size), jnp.float32), float("inf")
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    for _ in range(tries):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2e-9 * size**3 / best


EXPERIMENT = Experiment(
    name="benchmark",
    config=Config,
    cells=cells,
    run=run,
    report=report,
    check=check,
    alone=True,
    smoke={
        "tiny": True,
        "rounds": 2,
        "job_rounds": 1,
        "seconds": 0.0,
        "repeats": 0,
        "steps_per_call": 2,
        "peak_size": 128,
    },
)

if __name__ == "__main__":
    main(EXPERIMENT)
