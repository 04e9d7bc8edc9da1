"""What users wait for besides steps: start-up, whole jobs, compilation, and the host between stretches of steps.

Every number is of fresh processes, which take turns round after round, as the sides of a workload do; a round in which
one takes more than twice its least time is repeated. Their compilation caches are of their own and begin empty.

startup: from starting `experiments.depth_ablation` (ResNet-20 on the digits, `--steps_per_call=1`) to the line that
tells of its first step; `cold` with an empty compilation cache, `second` with the one that this left. `baseline`
imports JAX, reads the digits and does nothing: no device is asked for. `torch` takes a step of the same network in
PyTorch, eager.

whole_job: the depth ablation by its defaults, from start to end with tables and figures, in a new working folder;
`cold` and `second` as before.

compile: tracing and compiling the trainer's stretch of steps for the CIFAR ResNet of 20 and of 1,202 layers (`shallow`,
`deep`; width 16, batch 128), without a cache, after JAX has begun; no process is asked for both.

host: the share of time in which the device waits, of ResNet-20 (CIFAR's sizes, 45,000 images, batch 128, stretches of
10 steps). The trainer itself trains, its compiled stretch called through a clock: seconds from the first stretch's end
to the last one's, less those from the call of each stretch until its results are there. Handing the stretch over to the
device is in those; `at most` counts all of that for the host as well. Drawing the order of examples, records of metrics
and the progress bar are the host's; evaluations and checkpoints are left out.
"""

import dataclasses
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments import benchmark_timing as timing
from research.errors import CarouselError, Interrupted

JOBS = ("startup", "whole_job", "compile", "host")
_ROOT = Path(__file__).resolve().parents[1]
# What would give processes a cache of the user's, or colours and a live bar instead of lines.
_UNWANTED = ("JAX_COMPILATION_CACHE_DIR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
# Of the depth ablation, and what the reporter writes when that step is done.
ONE_STEP = ("--blocks=residual", "--seeds=0", "--steps=1", "--steps_per_call=1", "--evaluations=1")
FIRST_STEP = "  step 1/1  "


@dataclasses.dataclass(frozen=True)
class Job:
    """One job; fields as the flags."""

    job: str
    rounds: int
    repeats: int
    torch: bool
    tiny: bool

    @property
    def name(self) -> str:
        return f"{'tiny-' if self.tiny else ''}{self.job}"


def jobs(config: Any, torch: bool) -> list[Job]:
    """The jobs that a config of the benchmark asks for; `torch` where PyTorch is a peer."""
    return [Job(job, config.job_rounds, config.repeats, torch and job == "startup", config.tiny) for job in config.jobs]


def run(job: Job, context: Any) -> Mapping[str, Any]:
    """Takes the rounds of a job; a result is the rounds, name of a process -> seconds."""
    from research.training import environment

    environment.record(context.folder.path, context.command, {}, context.reporter.note)
    scratch = context.folder.path.resolve() / "scratch"

    def take():
        # Emptied, also of what a killed process left, so that every round begins with nothing compiled.
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            return _TAKE[job.job](job, Starter(scratch, context.should_stop))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    rounds = timing.until_counted(take, job.rounds, job.repeats)
    shown = ", ".join(f"{timing.median_seconds(rounds, name):.3g} s {name}" for name in rounds[0])
    context.reporter.note(f"{context.label}: {shown}; {len(timing.counted(rounds))} of {len(rounds)} rounds count")
    return {"rounds": rounds}


class Starter:
    """Starts processes whose files lie in one folder.

    Args:
      folder: for working folders and the compilation cache.
      should_stop: asked a few times a second; where it says so, the process is ended and `Interrupted` raised.
    """

    def __init__(self, folder: Path, should_stop: Callable[[], bool] = lambda: False):
        self._folder, self._should_stop = folder, should_stop
        self._environment = {name: value for name, value in os.environ.items() if name not in _UNWANTED}
        self._environment["PYTHONPATH"] = timing.python_path(_ROOT)

    def experiment(self, *flags: str, until: str | None = None) -> float:
        """Seconds of a depth ablation in a new working folder, its cache the folder's; see `seconds`."""
        workdir = self._folder / "work"
        shutil.rmtree(workdir, ignore_errors=True)
        places = (f"--workdir={workdir}", f"--compilation_cache={self._folder / 'compiled'}")
        return self.seconds("depth_ablation", *flags, *places, until=until)[0]

    def seconds(self, module: str, *arguments: object, until: str | None = None) -> tuple[float, str]:
        """Runs a module of `experiments`; returns seconds and output, both streams of it.

        Args:
          module: its name.
          *arguments: of its command line.
          until: the time is that until this is in the output, and the process is then killed; None for its end.

        Raises:
          CarouselError: it failed, or ended without having said `until`.
          Interrupted: as `should_stop` asked.
        """
        command = [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        start, output = time.perf_counter(), b""
        with subprocess.Popen(command, cwd=_ROOT, env=self._environment, **pipes) as process:
            try:
                while until is None or until.encode() not in output:
                    if self._should_stop():
                        raise Interrupted(f"{self._folder.parent}: stopped; the same command measures it again")
                    if select.select([process.stdout], [], [], 0.2)[0]:
                        part = os.read(process.stdout.fileno(), 1 << 16)
                        if not part:
                            break
                        output += part
                if until is None:
                    process.wait()
                seconds = time.perf_counter() - start
            finally:
                process.kill()
        text = output.decode(errors="replace")
        if process.returncode if until is None else until not in text:
            if self._should_stop():  # Ctrl-C reaches the process too, and may end it first
                raise Interrupted(f"{self._folder.parent}: stopped; the same command measures it again")
            last = next(reversed(text.splitlines()), "it said nothing")
            raise CarouselError(f"a process of the benchmark failed ({' '.join(command[1:4])}): {last}")
        return seconds, text


def _startup(job: Job, start: Starter) -> dict[str, float]:
    depth, width = (8, 4) if job.tiny else (20, 8)
    flags = (f"--depths={depth}", f"--width={width}", *ONE_STEP)
    found = {name: start.experiment(*flags, until=FIRST_STEP) for name in ("cold", "second")}
    found["baseline"], _ = start.seconds("benchmark_worker", "baseline", until=timing.READY)
    if job.torch:
        from research.training import environment

        threads = environment.usable_cores() or 1
        found["torch"], _ = start.seconds("benchmark_torch_start", depth, width, threads, until=timing.READY)
    return found


def _whole_job(job: Job, start: Starter) -> dict[str, float]:
    flags = ("--smoke", "--depths=8", "--blocks=residual") if job.tiny else ()
    return {name: start.experiment(*flags) for name in ("cold", "second")}


def _compile(job: Job, start: Starter) -> dict[str, float]:
    depths = {"shallow": 8, "deep": 14} if job.tiny else {"shallow": 20, "deep": 1202}
    return {name: _said(start, "compile", depth, int(job.tiny))["seconds"] for name, depth in depths.items()}


def _host(job: Job, start: Starter) -> dict[str, float]:
    return _said(start, "host", 3 if job.tiny else 21, int(job.tiny))


def _said(start: Starter, *arguments: object) -> dict[str, float]:
    return json.loads(start.seconds("benchmark_worker", *arguments)[1].splitlines()[-1])


_TAKE = {"startup": _startup, "whole_job": _whole_job, "compile": _compile, "host": _host}
