"""What the tests of whole commands share: a way to start an experiment, and one folder of compiled programs."""

import pytest

from tests.commands import Commands, wait_for


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


@pytest.fixture(scope="session")
def uninterrupted(commands, tmp_path_factory):
    """The working folder of a finished run with many checkpoints. Not to be written to."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "work"
    done = commands.run(*commands.many_checkpoints, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="session")
def interrupted(commands, tmp_path_factory):
    """The same run, stopped after some steps. Not to be written to."""
    workdir = tmp_path_factory.mktemp("interrupted") / "work"
    with commands.start(*commands.many_checkpoints, f"--workdir={workdir}") as process:
        wait_for(workdir, 8, process)
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 75
    return workdir


@pytest.fixture
def quick_compilation():
    """XLA does little to programs, for tests of which compiling is most of the time."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
