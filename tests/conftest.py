"""What the tests of whole commands share: a way to start an experiment, and one folder of compiled programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Commands:
    """Starts experiments in fresh processes, as a user does, with warnings as errors.

    The bits of a run depend on NPROC, so it is pinned. The optimiser of XLA's code generator is off: these tests are
    about what happens around the programs, and most of their time goes into compiling them.
    """

    # One small network, trained in one way, so that every command after the first finds its programs compiled.
    tiny = ("--depths=8", "--blocks=residual", "--width=4", "--batch_size=16")
    many_checkpoints = (*tiny, "--steps=30", "--evaluations=30", "--steps_per_call=1")

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

    def start(self, *flags: object) -> subprocess.Popen:
        """Starts the depth ablation and returns; to be used as a context manager."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.line(*flags), cwd=ROOT, env=self.environment, **pipes)

    def script(
        self, script: str, *arguments: object, timeout: float = 300, cwd: Path = ROOT, **environment
    ) -> subprocess.CompletedProcess:
        """Runs Python source in the same surroundings."""
        command = [sys.executable, "-c", script, *map(str, arguments)]
        options = {"env": self.environment | environment, "timeout": timeout, "cwd": cwd}
        return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session")
def smoke(commands, tmp_path_factory):
    """A finished `--smoke` grid: plain and residual networks of depth 8, three seeds. Not to be written to."""
    workdir = tmp_path_factory.mktemp("smoke") / "work"
    done = commands.run("--smoke", "--depths=8", "--seeds=0,1,2", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    done.workdir = workdir
    return done


@pytest.fixture
def quick_compilation():
    """XLA does little to programs, for tests of which compiling is most of the time."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
