"""One run over several processes, on one machine or many: every cell is trained by all of them jointly.

    python -m launch.hosts EXPERIMENT --coordinator=HOST:PORT --num_processes=N --process_id=I [flags of EXPERIMENT]

is started once for every I from 0 to N-1; by `srun python -m launch.hosts EXPERIMENT ...` the three flags come from
Slurm. `--devices` counts those of all processes together. Process 0 listens at HOST:PORT, and it alone writes, shows
progress and makes the report: no file system need be shared, but the data are read by every process.

Every process is the child of a small parent, this one, since JAX's runtime aborts a process that lost another: the
parent gives that an exit code and a line. Exit codes: those of an experiment, and 76 where another process was lost:
then all of them are to be started again and go on from the last checkpoint. SIGTERM or Ctrl-C to one of them stops all,
after a checkpoint, with 75.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from absl import flags

from experiments import command_line
from launch import cells
from research.errors import Interrupted, Lost, UsageError

# Variable with the folder that a child may fill, and what lies there once it has met the others.
SCRATCH, JOINED = "CAROUSEL_SCRATCH", "joined"


class Place(NamedTuple):
    """Which of how many processes this is, and where they meet."""

    coordinator: str
    processes: int
    process: int


def own_flags() -> flags.FlagValues:
    """The launcher's flags."""
    own = flags.FlagValues()
    kind = {"flag_values": own}
    flags.DEFINE_string("coordinator", None, "HOST:PORT where process 0 listens (default: from Slurm).", **kind)
    flags.DEFINE_integer("num_processes", None, "How many there are (default: from Slurm).", lower_bound=1, **kind)
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0 (default: from Slurm).", lower_bound=0, **kind)
    flags.DEFINE_integer("start_timeout", 300, "Seconds to wait until all are there.", lower_bound=1, **kind)
    return own


def place_of(own: flags.FlagValues, environment: Mapping[str, str]) -> Place:
    """What the flags say, and Slurm where they say nothing.

    Raises:
      UsageError: something is missing or impossible.
    """
    asked = (own.coordinator, own.num_processes, own.process_id)
    place = Place(*(a if a is not None else b for a, b in zip(asked, _from_slurm(environment), strict=True)))
    if missing := [f"--{flag}" for flag, value in zip(_PLACE_FLAGS, place, strict=True) if value is None]:
        raise UsageError(f"{' and '.join(missing)} missing: give --{', --'.join(_PLACE_FLAGS)}, or start it by srun")
    if not re.fullmatch(r".+:\d{1,5}", place.coordinator):
        raise UsageError(f"--coordinator={place.coordinator}: give HOST:PORT, where process 0 listens")
    if place.process >= place.processes:
        raise UsageError(
            f"--process_id={place.process}: of {place.processes} processes the last is {place.processes - 1}"
        )
    return place


_PLACE_FLAGS = ("coordinator", "num_processes", "process_id")


def _from_slurm(environment: Mapping[str, str]) -> tuple[str | None, int | None, int | None]:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    job, tasks, task = (environment.get(f"SLURM_{name}") for name in ("JOB_ID", "NTASKS", "PROCID"))
    # Above the ports that systems give to outgoing connections.
    coordinator = f"{first_node(nodes)}:{61440 + int(job) % 4096}" if nodes and job else None
    return coordinator, int(tasks) if tasks else None, int(task) if task else None


def first_node(nodes: str) -> str:
    """The first of Slurm's list of nodes, such as `n[03-05,9],m1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else nodes


def launch(asked: cells.Launch, own: flags.FlagValues) -> int:
    """Starts this process's child and waits for it.

    Raises:
      UsageError: the processes cannot train such an experiment.
    """
    place = place_of(own, os.environ)
    environment = os.environ | asked.environment() | {command_line.LAUNCHER: str(os.getpid())}
    _check(asked, place, int(environment["NPROC"]))
    told = dict(zip(_PLACE_FLAGS, place, strict=True)) | {"start_timeout": own.start_timeout}
    with tempfile.TemporaryDirectory(prefix="carousel-") as scratch:
        command = [sys.executable, "-m", "launch.host_process", asked.experiment.name]
        command += [*(f"--{name}={value}" for name, value in told.items()), *asked.words]
        code = _watch(command, environment | {SCRATCH: scratch}, f"process {place.process} of {place.processes}")
        if code == Lost.exit_code:
            _tell_loss(place, joined=(Path(scratch) / JOINED).exists(), timeout=own.start_timeout)
        return code


def _tell_loss(place: Place, joined: bool, timeout: int) -> None:
    if joined:
        what = "another process of this run was lost"
        cure = "start all of them again with the same commands, they go on from the last checkpoint"
    else:
        what = f"not all processes came together at {place.coordinator} within {timeout} s, or one was lost at once"
        cure = "start all of them, with the same flags, on machines that reach that host and port"
    print(f"error: process {place.process} of {place.processes}: {what}; {cure}", file=sys.stderr)


def _check(asked: cells.Launch, place: Place, threads: int) -> None:
    config = asked.grid.config
    if not hasattr(config, "parallel"):
        raise UsageError(f"{asked.experiment.name} trains nothing over several devices: start it by itself")
    devices = config.devices
    if devices and devices % place.processes:
        raise UsageError(f"--devices={devices} do not divide by {place.processes} processes: give a multiple")
    share = devices // place.processes if devices else 1
    if share > 1 and threads < 4 * share:
        raise UsageError(
            f"NPROC={threads} threads are too few for {share} devices a process, which would wait for each other for "
            f"ever: set it to {4 * share} or more, or leave it out"
        )


def _watch(command: list[str], environment: Mapping[str, str], name: str) -> int:
    """Runs the child, hands signals on to it, says how it ended."""
    # In a process group of its own: Ctrl-C would reach it twice, which ends it at once.
    child = subprocess.Popen(command, env=environment, process_group=0)
    handed_on = []

    def hand_on(number, frame):
        handed_on.append(number)
        child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    code = child.wait()
    if -code in handed_on:  # before it had begun
        print(f"interrupted: {name}: stopped before the first step", file=sys.stderr)
        return Interrupted.exit_code
    if code == -signal.SIGABRT:  # by JAX's runtime, whose words are above
        return Lost.exit_code
    if code < 0:
        print(f"error: {name} was ended by {signal.Signals(-code).name}; start all of them again", file=sys.stderr)
        return 128 - code
    return code


if __name__ == "__main__":
    _own = own_flags()
    cells.main(__doc__, _own, lambda asked: launch(asked, _own))
