"""What becomes of the jobs that launch/slurm.py submitted: waiting, the report, and why a cell did not finish."""

import collections
import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live

from experiments import runner
from launch import slurm_jobs
from launch.cells import Launch
from launch.table import line, steps, table
from research.errors import CarouselError, Interrupted
from research.files import read_json
from research.training import run_folder, status

FOLDER = "slurm"
"""Of a working folder: holds what belongs to Slurm."""

_POLL_SECONDS = 2.0
_LINE_SECONDS = 10.0  # between lines where the output is a file, and questions where Slurm is away


def read_jobs(workdir: Path) -> dict[str, Any]:
    """The record of the jobs that were submitted last; empty where there were none."""
    path = workdir / FOLDER / "jobs.json"
    return read_json(path) if path.exists() else {}


def wait(launch: Launch, jobs: Mapping[str, Any]) -> int:
    """Shows progress until the last task of the array has ended, then makes the report; returns the exit code."""
    console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            told = -float("inf")
            while tasks := _queued(jobs["array"], console):
                statuses = [status.read(folder) for folder in launch.grid.folders]
                if console.is_terminal:
                    live.update(Group(table(statuses, rows=max(1, console.height - 8)), _told(tasks)), refresh=True)
                elif time.monotonic() - told >= _LINE_SECONDS:
                    told = time.monotonic()
                    console.print(f"{line(statuses)}; {_told(tasks)}", markup=False)
                time.sleep(_POLL_SECONDS)
        with contextlib.suppress(CarouselError):
            # The report is made here and now; a job for it that is running already writes the same.
            if jobs["report"] in slurm_jobs.queued([jobs["report"]]):
                slurm_jobs.ask("scancel", "--state=PENDING", jobs["report"])
    except KeyboardInterrupt:
        print(f"no longer waiting; the jobs go on (to end them: scancel {jobs['array']})", file=sys.stderr)
        return Interrupted.exit_code
    return finish(launch)


def _queued(array: str, console: Console) -> dict[int | None, tuple[str, str]]:
    """The tasks that have not ended; asks until there is an answer, since Slurm may be away for a while."""
    while True:
        try:
            return slurm_jobs.queued([array]).get(array, {})
        except CarouselError as error:
            console.print(f"{error}; asking again", markup=False)
            time.sleep(_LINE_SECONDS)


def _told(tasks: Mapping[int | None, tuple[str, str]]) -> str:
    """Such as 'Slurm: 1 PENDING (Resources), 2 RUNNING'."""
    counts = collections.Counter(f"{state} ({why})" if state == "PENDING" else state for state, why in tasks.values())
    return f"Slurm: {', '.join(f'{number} {state}' for state, number in sorted(counts.items(), key=str))}"


def finish(launch: Launch) -> int:
    """Makes the report where all cells are finished; returns the exit code of the in-process run.

    Raises:
      CarouselError: a cell is not finished; why has been printed.
    """
    names = launch.unfinished()
    if names:
        for reason in _reasons(launch, names):
            print(reason, file=sys.stderr)
        total = len(launch.grid.names)
        raise CarouselError(
            f"{launch.workdir}: {len(names)} of {total} cells are not finished; the same command goes on with them"
        )
    return runner.conclude(launch.experiment, launch.grid)


def _reasons(launch: Launch, names: Sequence[str]) -> list[str]:
    """A line for each unfinished cell: what its folder says, what Slurm says, where its log is."""
    jobs = read_jobs(launch.workdir)
    told: dict[int | None, str] = {}
    if jobs:
        with contextlib.suppress(CarouselError):  # the folders tell enough where Slurm is away
            told |= slurm_jobs.endings(jobs["array"])
            queued = slurm_jobs.queued([jobs["array"]]).get(jobs["array"], {})
            told |= {index: state for index, (state, _) in queued.items()}
    by_name = {name: told.get(index) for index, name in enumerate(jobs.get("cells", ()))}
    lines = []
    for name in names:
        folder, log = launch.folder(name), launch.workdir / "logs" / f"{name}.log"
        run = status.read(folder) if (folder / run_folder.CONFIG).exists() else status.Status(name, "not submitted")
        parts = [f"{run.state} at step {steps(run)}" if steps(run) else run.state, run.message]
        parts += [f"Slurm: {by_name[name]}" if by_name.get(name) else "", f"log: {log}" if log.exists() else ""]
        lines.append(f"{name}: {'; '.join(filter(None, parts))}")
    return lines
