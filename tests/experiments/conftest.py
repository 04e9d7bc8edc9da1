"""What the tests of single experiments share: a command without a process of its own, and runs made by hand."""

import os

import pytest
from absl import flags

from experiments import command_line, runner
from research.analysis.results import read_run
from research.files import write_json_atomic
from research.training import run_folder

ENVIRONMENT = {"command": "launch/run by hand", "source": {"commit": "c0ffee" * 6, "dirty": False}}


@pytest.fixture(scope="module")
def command():
    """`(experiment, *arguments, stop=None) -> exit code`, all that a command does, without a process of its own.

    `stop` is the question that training asks between stretches.
    """
    before = set(flags.FLAGS)

    def forget():
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()

    def call(experiment, *arguments, stop=lambda: False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command_line, "StopRequest", lambda: stop)  # it would take over pytest's signals
            patch.setenv("NPROC", os.environ.get("NPROC", "2"))
            runner.define_flags(experiment)
            try:
                command_line.parse_flags([experiment.name, "--compilation_cache=", *map(str, arguments)])
                return command_line.guarded(lambda: runner._launch(experiment, runner.flags.FLAGS))
            except SystemExit as stopped:
                return stopped.code
            finally:
                forget()

    return call


@pytest.fixture
def refusal(command, capsys, monkeypatch):
    """`(experiment, *arguments) -> the one line` with which a command was refused as a request, exit code 2."""

    def fail(*_):
        pytest.fail("it was not refused")

    monkeypatch.setattr(runner, "run_cells", fail)

    def call(experiment, *arguments):
        assert command(experiment, *arguments) == 2
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert out == "" and line.startswith("error: ")
        return line.removeprefix("error: ")

    return call


@pytest.fixture
def finished():
    """`(workdir, cell, result, metrics=(), signal=None) -> Run`: the folder of a finished run, written and read."""

    def write(workdir, cell, result, metrics=(), signal=None):
        path = workdir / "runs" / cell.name
        with run_folder.open_run(path, runner.identity(cell)) as folder:
            write_json_atomic(path / run_folder.ENVIRONMENT, ENVIRONMENT)
            for record in metrics:
                folder.metrics.append(record)
            if signal is not None:
                write_json_atomic(path / "signal.json", signal)
            folder.finish(result)
        return read_run(path)

    return write
