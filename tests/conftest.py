"""What the tests of whole commands share: a way to start an experiment, and one folder of compiled programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# One small network: every command that trains it in the same way finds its programs compiled.
TINY = ("--depths=8", "--blocks=residual", "--width=4", "--batch_size=16")


class Commands:
    """Starts experiments in fresh processes, as a user does.

    The bits of a run depend on NPROC, so it is pinned. The optimiser of XLA's code generator is off: these tests are
    about what happens around the programs, and compile ten times as long as they run.
    """

    tiny = TINY

    def __init__(self, cache: Path):
        self.cache = cache
        self.environment = os.environ | {
            "NPROC": "2",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }

    def line(self, *flags: object, experiment: str = "depth_ablation") -> list[str]:
        return [sys.executable, "-m", f"experiments.{experiment}", f"--compilation_cache={self.cache}", *map(str, flags)]

    def run(self, *flags: object, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess:
        """Runs an experiment to its end."""
        options = {"env": self.environment, "timeout": 300} | options
        return subprocess.run(self.line(*flags), cwd=cwd, capture_output=True, text=True, **options)

    def start(self, *flags: object) -> subprocess.Popen:
        """Starts an experiment and returns; to be used as a context manager."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.line(*flags), cwd=ROOT, env=self.environment, **pipes)

    def script(self, script: str, *arguments: object, timeout: float = 300, **environment) -> subprocess.CompletedProcess:
        """Runs Python source in the same surroundings."""
        command = [sys.executable, "-c", script, *map(str, arguments)]
        options = {"env": self.environment | environment, "timeout": timeout}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("compiled"))
