"""Starts experiments as users do, in fresh processes, and compares the bits that they leave."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Commands:
    """Starts experiments in fresh processes, as a user does, with warnings as errors.

    The bits of a run depend on NPROC, so it is pinned. The optimiser of XLA's code generator is off: these tests are
    about what happens around the programs, and most of their time goes into compiling them.
    """

    # One small network, trained in one way, so that every command after the first finds its programs compiled.
    tiny = ("--depths=8", "--blocks=residual", "--width=4", "--batch_size=16")
    many_checkpoints = (*tiny, "--steps=30", "--evaluations=30", "--steps_per_call=1")
    cell = "residual-8-w4-seed0"
    """The one cell of all these."""

    def __init__(self, cache: Path):
        self.cache = cache
        self.environment = os.environ | {
            "NPROC": "2",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "error",
        }

    def line(self, *flags: object, experiment: str = "depth_ablation") -> list[str]:
        command = [sys.executable, "-m", f"experiments.{experiment}", f"--compilation_cache={self.cache}"]
        return [*command, *map(str, flags)]

    def run(
        self, *flags: object, experiment: str = "depth_ablation", prefix: tuple[str, ...] = (), **options
    ) -> subprocess.CompletedProcess:
        """Runs an experiment to its end."""
        options = {"env": self.environment, "timeout": 300, "cwd": ROOT} | options
        line = [*prefix, *self.line(*flags, experiment=experiment)]
        return subprocess.run(line, capture_output=True, text=True, **options)

    def start(self, *flags: object) -> contextlib.AbstractContextManager[subprocess.Popen]:
        """Starts the depth ablation and goes on; it is killed if it is not at its end when the body is."""
        return self.popen(self.line(*flags))

    @contextlib.contextmanager
    def popen(self, line: list[str], **environment: str) -> Iterator[subprocess.Popen]:
        """Starts a command in the same surroundings; as `start`."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(line, cwd=ROOT, env=self.environment | environment, **pipes) as process:
            try:
                yield process
            finally:
                process.kill()  # else a failed test would wait for it, for ever where it is stopped

    def script(
        self, script: str, *arguments: object, timeout: float = 300, cwd: Path = ROOT, **environment
    ) -> subprocess.CompletedProcess:
        """Runs Python source in the same surroundings."""
        command = [sys.executable, "-c", script, *map(str, arguments)]
        options = {"env": self.environment | environment, "timeout": timeout, "cwd": cwd}
        return subprocess.run(command, capture_output=True, text=True, **options)


def notes(errors: str) -> list[str]:
    """What a command said on standard error besides its progress."""
    return [line for line in errors.splitlines() if not re.match(r"\[\d+/\d+\] ", line)]


def refusal(done: subprocess.CompletedProcess, code: int) -> str:
    """The one line of a command that was refused with this exit code."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = notes(done.stderr)
    assert line.startswith("error: ") and len(line) < 600
    return line.removeprefix("error: ")


def run_of(workdir: Path) -> Path:
    """The run folder of `Commands.cell`."""
    return workdir / "runs" / Commands.cell


def bits(workdir: Path) -> dict[str, object]:
    """What must be equal however often a run was interrupted: its result but for times, and its files."""
    folder = run_of(workdir)
    result = json.loads((folder / "result.json").read_text())
    files = ("metrics.jsonl", "signal.json", "checkpoints/best.safetensors")
    digests = {name: _sha256(folder / name) for name in files}
    return {name: value for name, value in result.items() if "second" not in name} | digests


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def saved_steps(workdir: Path) -> list[int]:
    """The steps of which there are checkpoints, in order."""
    return sorted(int(path.name[5:13]) for path in (run_of(workdir) / "checkpoints").glob("step_*.safetensors"))


def wait_for(workdir: Path, step: int, process: subprocess.Popen) -> None:
    """Until the run, which `process` makes, has the checkpoint of `step` or a later one."""
    end = time.monotonic() + 120
    while max(saved_steps(workdir), default=-1) < step:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.005)
