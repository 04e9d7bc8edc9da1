"""SIGKILL at random moments of a run's whole life, over and over, until the run ends all the same."""

import collections
import dataclasses
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from tests.commands import ROOT, Commands, bits, run_of

EVERY = 10
"""Steps between the checkpoints of the run that is killed."""
_WATCHED = ROOT / "tests" / "faults" / "watched.py"


@dataclasses.dataclass
class Life:
    """What a process told before it ended; see watched.py.

    Attributes:
      phase: in which it ended.
      begun: the step from which it went on; None where it did not come so far.
      step: the last one that it took.
      acknowledged: of its last checkpoint.
      saving: whether it ended while it wrote a checkpoint.
    """

    phase: str = "start"
    begun: int | None = None
    step: int | None = None
    acknowledged: int | None = None
    saving: bool = False

    @classmethod
    def read(cls, log: Path) -> "Life":
        life = cls()
        for word, value in map(str.split, log.read_text().splitlines() if log.exists() else ()):
            if word == "phase":
                life.phase = value
            elif word == "from":
                life.begun = life.step = int(value)
            elif word == "step":
                life.step = int(value)
            elif word == "saved":
                life.acknowledged = int(value)
            life.saving = word == "saving"
        return life


@dataclasses.dataclass
class Count:
    """What came of it.

    Attributes:
      kills: by SIGKILL, all in all.
      phases: how many of them in which phase.
      in_a_save: how many while a checkpoint was being written.
      restarts: processes that were started on a run that had been killed.
      runs: that were killed, started again, and ended.
      lost: steps taken and taken again, for each kill of a run that had begun.
    """

    kills: int = 0
    phases: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    in_a_save: int = 0
    restarts: int = 0
    runs: int = 0
    lost: list[int] = dataclasses.field(default_factory=list)


def watched_line(commands: Commands, *flags: object) -> list[str]:
    """The command of the depth ablation under watch."""
    interpreter, _, _, *rest = commands.line(*flags)  # without `-m experiments.depth_ablation`
    return [interpreter, str(_WATCHED), *rest]


def watched(commands: Commands, log: Path, *flags: str, **environment: str) -> AbstractContextManager[subprocess.Popen]:
    """Starts the run that is to be killed."""
    log.unlink(missing_ok=True)
    return commands.popen(watched_line(commands, *flags), FAULTS_LOG=str(log), **environment)


def whole_life(commands: Commands, folder: Path, flags: tuple[str, ...]) -> float:
    """Makes the run `folder`/whole, which nothing happens to; returns how many seconds it takes once it is compiled."""
    for workdir in (folder / "compiling", folder / "whole"):
        start = time.monotonic()
        with watched(commands, folder / "log", *flags, f"--workdir={workdir}") as process:
            _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    return time.monotonic() - start


def kill_inside_a_save(process, workdir: Path, after: int) -> None:
    """Kills a process while a checkpoint of step `after` or later lies under its temporary name.

    The process is stopped when the file is seen, looked at again, and let go where it was quicker. A file that an
    earlier process left does not count.
    """

    def inside():
        found = (run_of(workdir) / "checkpoints").glob(f".tmp-{process.pid}-step_*")
        return any(int(path.name.rpartition("step_")[2][:8]) >= after for path in found)

    while process.poll() is None:
        if inside():
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if inside():
                process.kill()
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.002)


def kill_many_times(
    commands: Commands,
    folder: Path,
    kills: int,
    into_saves: int,
    seed: int = 0,
    steps: int = 300,
    flags: tuple[str, ...] = (),
    count: Count | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Count:
    """Kills runs of `steps` steps at `kills` random moments, `into_saves` of them inside a save: all end as ever.

    A moment is uniform over the time that an uninterrupted run takes. A run that ends before it comes is compared with
    that one, and the next is begun. Returns the count, which is kept in `count` where that is given.

    Raises:
      AssertionError: a run went on from before an acknowledged checkpoint, lost more steps than there are between two,
        did not go on at all, or ended differently.
    """
    generator, count = random.Random(seed), count or Count()
    flags = (*Commands.tiny, f"--steps={steps}", f"--evaluations={steps // EVERY}", "--steps_per_call=1", *flags)
    seconds, log = whole_life(commands, folder, flags), folder / "log"
    aimed = set(generator.sample(range(kills), into_saves))
    number, killed, known = 0, False, Life()  # `known`: of the lives of this run so far
    while count.kills < kills or killed:
        workdir = folder / str(number)
        after = generator.randrange(steps - EVERY) if count.kills in aimed else None
        disk = {} if after is None else {"FAULTS_SLOW_DISK": str(after)}
        with watched(commands, log, *flags, f"--workdir={workdir}", **disk) as process:
            if after is not None:
                kill_inside_a_save(process, workdir, after)
            elif count.kills < kills:
                _sleep(process, generator.uniform(0, seconds))
                process.kill()
            output = process.communicate(timeout=600)
        count.restarts += killed
        life = Life.read(log)
        if life.begun is not None:
            assert life.begun >= (known.acknowledged or 0), f"{workdir}: went on behind an acknowledged checkpoint"
            if known.step is not None:
                count.lost.append(known.step - life.begun)
                assert 0 <= count.lost[-1] <= EVERY, f"{workdir}: lost {count.lost[-1]} steps"
            known = dataclasses.replace(life, acknowledged=life.acknowledged or life.begun)
        if process.returncode == 0:
            compare(workdir, folder / "whole")
            count.runs += killed
            number, killed, known = number + 1, False, Life()
        else:
            assert process.returncode == -signal.SIGKILL, f"{workdir}: did not go on: {output[1]}"
            count.kills, killed = count.kills + 1, True
            count.phases["save" if life.saving else life.phase] += 1
            count.in_a_save += life.saving
            say(f"kill {count.kills}: {'save' if life.saving else life.phase}, step {known.step}")
    return count


def compare(workdir: Path, whole: Path) -> None:
    """Raises AssertionError where a finished run, or a figure of it, is not to the bit what `whole` is."""
    assert bits(workdir) == bits(whole), f"{workdir} is not {whole}"
    figures = [{path.name: path.read_bytes() for path in (each / "figures").glob("*")} for each in (workdir, whole)]
    assert figures[0] == figures[1], f"the figures of {workdir} are not those of {whole}"


def _sleep(process, seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
