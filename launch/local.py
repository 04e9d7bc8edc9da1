"""The cells of an experiment over several processes of one machine.

`python -m launch.local EXPERIMENT [--workers=N] [the experiment's flags]` ends with the tables and figures of
`python -m experiments.EXPERIMENT`, and the same bits: each process keeps to its share of the cores (or its GPU), and
has as many threads as a run by itself. A cell that fails is tried once more after the others; what it wrote is in
WORKDIR/logs. Ctrl-C has every cell write a checkpoint, and the same command goes on from there.
"""

import collections
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.live import Live

from experiments import command_line, runner
from launch import cells, machine
from launch.table import line, table
from research.errors import CarouselError, Interrupted, UsageError
from research.files import make_folder
from research.training import run_folder, status
from research.training.progress import clock

_POLL = 0.1
_REFRESH = 0.5
_LINE_EVERY = 10.0
_TAIL = 10
_TRIES = 2


@dataclasses.dataclass
class _Try:
    """One process that trains one cell."""

    name: str
    number: int
    slot: int
    process: subprocess.Popen
    log: Path
    start: float


def launch(sweep: cells.Launch, workers: int | None) -> int:
    """Trains the cells, makes the report; returns the exit code.

    Raises:
      CarouselError: another launcher is at work in the folder, or a cell cannot be trained.
      Interrupted: as was asked; every cell has written a checkpoint.
    """
    gpus, cores = machine.gpus(), machine.cores()
    if workers is None:
        workers = 1 if sweep.experiment.alone else len(gpus) or max(1, len(cores))
    if workers > 1 and sweep.experiment.alone:
        raise UsageError(f"{sweep.experiment.name} measures time and memory, one cell at a time: give --workers=1")
    with cells.lock(sweep.workdir):
        runner.prepare(sweep.experiment, sweep.grid)
        pool = _Pool(sweep, workers, gpus, cores)
        failed = pool.run()
        any_finished = len(sweep.unfinished()) < len(sweep.grid.names)
        code = runner.conclude(sweep.experiment, sweep.grid) if any_finished else 0
    for attempt, reason in failed.values():
        _tell_failure(attempt, reason)
    return CarouselError.exit_code if failed else code


class _Pool:
    def __init__(self, sweep: cells.Launch, workers: int, gpus: list[str], cores: list[int]):
        self._sweep = sweep
        unfinished = sweep.unfinished()
        self._queue = collections.deque((name, 1) for name in unfinished)
        workers = max(1, min(workers, len(unfinished)))
        self._cores = machine.shares(cores, workers)
        self._gpus = machine.shares(gpus, workers)
        self._memory = f"{0.9 / -(-workers // len(gpus)):.3f}" if len(gpus) in range(1, workers) else None
        self._free = list(range(workers))
        self._running: list[_Try] = []
        self._failed: dict[str, tuple[_Try, str]] = {}
        self._stop = command_line.StopRequest(
            "stopping: every running cell writes a checkpoint; Ctrl-C again ends at once"
        )
        self._stopped = False
        self._console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
        self._finished: dict[str, status.Status] = {}

    def run(self) -> dict[str, tuple[_Try, str]]:
        """Trains what is not finished; returns the last try of every cell that failed, and why."""
        total, todo = len(self._sweep.grid.cells), len(self._queue)
        if todo:
            self._note(f"{todo} of {total} cells to train, {len(self._free)} at a time; logs: {self._logs}")
        live = Live(console=self._console, auto_refresh=False, transient=True)
        try:
            with live:
                self._until_done(live)
        finally:
            for each in self._running:  # Ctrl-C for the second time, or an error of ours
                each.process.kill()
        if self._stop() and (self._queue or self._stopped):
            done = total - len(self._sweep.unfinished())
            raise Interrupted(f"{self._sweep.workdir}: {done} of {total} cells are finished; the same command goes on")
        return self._failed

    def _until_done(self, live: Live) -> None:
        shown = told = -float("inf")
        while self._running or (self._queue and not self._stop()):
            while self._free and self._queue and not self._stop():
                self._running.append(self._start(*self._queue.popleft()))
            if self._stop() and not self._stopped:
                self._stopped = True
                for each in self._running:
                    each.process.terminate()
            for each in [each for each in self._running if each.process.poll() is not None]:
                self._end(each)
            now = time.monotonic()
            if self._console.is_terminal and now - shown >= _REFRESH:
                shown = now
                live.update(table(self._statuses(), rows=max(1, self._console.height - 7)), refresh=True)
            elif not self._console.is_terminal and now - told >= _LINE_EVERY:
                if told > 0:
                    self._note(line(self._statuses()))
                told = now
            time.sleep(_POLL)

    @property
    def _logs(self) -> Path:
        return self._sweep.workdir / "logs"

    def _statuses(self) -> list[status.Status]:
        told = []
        for name in self._sweep.grid.names:
            told.append(self._finished.get(name) or status.read(self._sweep.folder(name)))
            if told[-1].finished:
                self._finished[name] = told[-1]
        return told

    def _start(self, name: str, number: int) -> _Try:
        slot = self._free.pop(0)
        log = self._logs / f"{name}.log"
        make_folder(self._logs)
        environment = os.environ | self._sweep.environment() | {command_line.LAUNCHER: str(os.getpid())}
        if self._gpus[slot]:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[slot])
            if self._memory:
                environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", self._memory)
        with open(log, "ab") as file:
            # A session of its own: Ctrl-C is for this process, which then asks the others.
            process = subprocess.Popen(
                self._sweep.command(name),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        if self._cores[slot]:
            os.sched_setaffinity(process.pid, self._cores[slot])  # Python has not begun; threads to come inherit it
        return _Try(name, number, slot, process, log, time.monotonic())

    def _end(self, each: _Try) -> None:
        self._running.remove(each)
        self._free.append(each.slot)
        code, seconds = each.process.returncode, clock(time.monotonic() - each.start)
        if run_folder.finished(self._sweep.folder(each.name)):
            self._failed.pop(each.name, None)
            self._note(f"{each.name}: done in {seconds}")
        elif self._stop() and code == Interrupted.exit_code:
            self._note(f"{each.name}: stopped, with a checkpoint")
        elif self._stop():
            self._note(f"{each.name}: ended with {_reason(code)} while stopping")
        else:
            again = each.number < _TRIES and code != UsageError.exit_code
            self._failed[each.name] = (each, _reason(code))
            self._note(f"{each.name}: {_reason(code)} after {seconds}{'; it is tried once more' if again else ''}")
            if again:
                self._queue.append((each.name, each.number + 1))

    def _note(self, text: str) -> None:
        self._console.print(text, markup=False)


def _reason(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _tell_failure(attempt: _Try, reason: str) -> None:
    lines = attempt.log.read_text(errors="replace").splitlines()[-_TAIL:]
    times = "once" if attempt.number == 1 else f"{attempt.number} times"
    print(f"\nerror: {attempt.name} failed {times} ({reason}); the end of {attempt.log}:", file=sys.stderr)
    for text in lines:
        print(f"    {text}", file=sys.stderr)


def main() -> None:
    own = flags.FlagValues()
    flags.DEFINE_integer(
        "workers", None, "Processes at a time (default: one a GPU, else one a core).", lower_bound=1, flag_values=own
    )
    cells.main(__doc__, own, lambda sweep: launch(sweep, own.workers))


if __name__ == "__main__":
    main()
