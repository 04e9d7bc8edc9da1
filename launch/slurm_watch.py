"""What becomes of the jobs that launch/slurm.py submitted: waiting, the report, and why a cell did not finish."""

import collections
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import slurm_jobs
from launch.cells import Launch
from research.errors import CarouselError, Interrupted
from research.files import read_json
from research.training import run_folder, status

FOLDER = "slurm"
"""Of a working folder: holds what belongs to Slurm."""

_POLL_SECONDS = 2.0


def read_jobs(workdir: Path) -> dict[str, Any]:
    """The record of the jobs that were submitted last; empty where there were none."""
    path = workdir / FOLDER / "jobs.json"
    return read_json(path) if path.exists() else {}


def unfinished(launch: Launch) -> list[str]:
    """Names of the cells without a result."""
    folders = zip(launch.grid.names, launch.grid.folders, strict=True)
    return [name for name, folder in folders if not run_folder.finished(folder)]


def wait(launch: Launch, jobs: Mapping[str, Any]) -> int:
    """Shows progress until the last task of the array has ended, then makes the report; returns the exit code."""
    shown, away = None, False
    try:
        while True:
            try:
                tasks, away = slurm_jobs.queued([jobs["array"]]).get(jobs["array"], {}), False
            except CarouselError as error:
                if not away:
                    print(f"{error}; asking again", file=sys.stderr)
                tasks, away = {None: ("unknown", "")}, True
            line = _progress(launch, tasks)
            if line != shown:
                print(line, file=sys.stderr)
                shown = line
            if not tasks:
                break
            time.sleep(_POLL_SECONDS)
        with contextlib.suppress(CarouselError):
            # The report is made here and now; a job for it that is running already writes the same.
            if jobs["report"] in slurm_jobs.queued([jobs["report"]]):
                slurm_jobs.ask("scancel", "--state=PENDING", jobs["report"])
    except KeyboardInterrupt:
        print(f"no longer waiting; the jobs go on (to end them: scancel {jobs['array']})", file=sys.stderr)
        return Interrupted.exit_code
    return finish(launch)


def _progress(launch: Launch, tasks: Mapping[int | None, tuple[str, str]]) -> str:
    states = collections.Counter(status.read(folder).state for folder in launch.grid.folders)
    queued = collections.Counter(
        f"{state} ({reason})" if state == "PENDING" else state for state, reason in tasks.values()
    )
    told = f"; Slurm: {_counts(queued)}" if queued else ""
    return f"cells: {_counts(states)}{told}"


def _counts(counter: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in sorted(counter.items()))


def finish(launch: Launch) -> int:
    """Makes the report where all cells are finished; returns the exit code of the in-process run.

    Raises:
      CarouselError: a cell is not finished; why has been printed.
    """
    runs = [status.read(folder) for folder in launch.grid.folders if (folder / run_folder.CONFIG).exists()]
    open_cells = unfinished(launch)
    if open_cells:
        for line in _reasons(launch.workdir, open_cells, {run.name: run for run in runs}):
            print(line, file=sys.stderr)
        raise CarouselError(
            f"{launch.workdir}: {len(open_cells)} of {len(launch.grid.names)} cells are not finished; the same command "
            "goes on with them"
        )
    code = subprocess.run(launch.report_command(), env=os.environ | launch.environment()).returncode
    failures = [] if launch.experiment.divergence_is_a_result else [run for run in runs if run.state == "diverged"]
    for run in failures:
        print(f"error: {run.message}", file=sys.stderr)
    return code or (CarouselError.exit_code if failures else 0)


def _reasons(workdir: Path, names: Sequence[str], runs: Mapping[str, status.Status]) -> list[str]:
    """A line for each unfinished cell: what its folder says, what Slurm says, where its log is."""
    jobs = read_jobs(workdir)
    told = {}
    if jobs:
        with contextlib.suppress(CarouselError):  # the folders tell enough where Slurm is away
            told = slurm_jobs.endings(jobs["array"])
            told |= {i: state for i, (state, _) in slurm_jobs.queued([jobs["array"]]).get(jobs["array"], {}).items()}
    by_name = {name: told.get(index) for index, name in enumerate(jobs.get("cells", ()))}
    lines = []
    for name in names:
        run = runs.get(name)
        parts = [run.state if run else "not begun"]
        if run and run.step is not None:
            parts.append(f"at step {run.step} of {run.steps}")
        if run and run.message:
            parts.append(run.message)
        if by_name.get(name):
            parts.append(f"Slurm: {by_name[name]}")
        log = workdir / "logs" / f"{name}.log"
        if log.exists():
            parts.append(f"log: {log}")
        lines.append(f"{name}: {'; '.join(parts)}")
    return lines
