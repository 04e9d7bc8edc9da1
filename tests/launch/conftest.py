"""What the tests of launchers share: a launcher as a process, and waiting for what it does."""

import subprocess
import sys
import time

import pytest

from research.files import read_json

_DEADLINE = 240.0


@pytest.fixture
def launcher(commands):
    """`(name, *words, **options) -> Popen` of `python -m launch.NAME`; what is left of them is killed at the end."""
    started = []

    def start(name, *words, **options):
        command = [sys.executable, "-m", f"launch.{name}", *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, **pipes, **({"env": commands.environment} | options)))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def sweep(launcher, commands, tmp_path):
    """`(*flags, launcher="local") -> Popen` of a launcher of the depth ablation in the folder `work` here."""

    def start(*flags, name="local", **options):
        cache = f"--compilation_cache={commands.cache}"
        return launcher(name, "depth_ablation", *flags, f"--workdir={tmp_path / 'work'}", cache, **options)

    return start


@pytest.fixture
def wait_for():
    """`(question) -> its first answer that is true`, asked again and again."""

    def wait(question):
        deadline = time.monotonic() + _DEADLINE
        while not (answer := question()):
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)
        return answer

    return wait


@pytest.fixture
def digest():
    """`(run folder) -> SHA-256 of the final state` of a finished run."""
    return lambda folder: read_json(folder / "result.json")["final_state_sha256"]
