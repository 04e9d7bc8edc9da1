"""What Slurm's own commands say of jobs, in Python's terms. squeue must answer; sacct need not be there."""

import collections
import re
import shutil
import subprocess
from collections.abc import Collection, Sequence

from research.errors import CarouselError

_SECONDS = 60  # for an answer of Slurm's controller, which may be busy
_IN_THE_QUEUE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "RESIZING", "SUSPENDED")


def ask(*command: str) -> str:
    """What a command of Slurm prints.

    Raises:
      CarouselError: it is not here, or fails.
    """
    if not shutil.which(command[0]):
        raise CarouselError(
            f"{command[0]} is not found: start this where a Slurm cluster takes jobs, or use launch.local"
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise CarouselError(f"{command[0]} gives no answer within {_SECONDS} s: try again later") from None
    if done.returncode:
        told = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise CarouselError(f"{command[0]}: {told.removeprefix(f'{command[0]}: ').removeprefix('error: ')}")
    return done.stdout


def submit(command: Sequence[str]) -> str:
    """Calls `sbatch --parsable ...`; returns the job's number."""
    answer = ask(*command)
    found = re.search(r"^(\d+)(;\S+)?$", answer, re.MULTILINE)
    if not found:
        raise CarouselError(f"sbatch gave no job number but {answer.strip()!r}: look at squeue before trying again")
    return found[1]


def queued(jobs: Collection[str]) -> dict[str, dict[int | None, tuple[str, str]]]:
    """Which of these jobs have not ended.

    Returns:
      job -> index in the array (None: it is no array) -> state and the reason for it.
    """
    found: dict[str, dict[int | None, tuple[str, str]]] = collections.defaultdict(dict)
    # Not --jobs: squeue fails for a job that it has forgotten.
    for line in ask("squeue", "--me", "--noheader", "--array", "--format=%F|%K|%T|%r").splitlines():
        job, index, state, reason = line.split("|", 3)
        if job in jobs:
            found[job][int(index) if index.isdigit() else None] = (state, reason)
    return dict(found)


def endings(job: str) -> dict[int, str]:
    """How the tasks of a job array ended, such as 'FAILED, exit code 1', of those of which Slurm still knows.

    From sacct where it answers, else from `scontrol show job`, which forgets a job some minutes after its end.
    """
    return _from_scontrol(job) | _from_sacct(job)


def _from_sacct(job: str) -> dict[int, str]:
    try:
        lines = ask("sacct", "-n", "-P", "-X", f"--jobs={job}", "--format=JobID,State,ExitCode").splitlines()
    except CarouselError:
        return {}  # many clusters keep no accounts
    rows = (line.split("|") for line in lines)
    told = {row[0].partition("_")[2]: row[1:] for row in rows if len(row) == 3}
    # It lags by some seconds, and then says that a task is running which has ended.
    return {int(i): _told(*row) for i, row in told.items() if i.isdigit() and not row[0].startswith(_IN_THE_QUEUE)}


def _from_scontrol(job: str) -> dict[int, str]:
    try:
        lines = ask("scontrol", "--oneliner", "show", "job", job).splitlines()
    except CarouselError:
        return {}
    found = {}
    for line in lines:
        index, state, code = (re.search(rf" {name}=(\S+)", line) for name in ("ArrayTaskId", "JobState", "ExitCode"))
        if index and state and code and index[1].isdigit() and not state[1].startswith(_IN_THE_QUEUE):
            found[int(index[1])] = _told(state[1], code[1])
    return found


def _told(state: str, code: str) -> str:
    code, _, signal = code.partition(":")
    if signal not in ("", "0"):
        return f"{state}, signal {signal}"
    return state if code == "0" else f"{state}, exit code {code}"
