"""What the tests of single experiments share: a command without a process of its own, and runs made by hand."""

import os

import pytest
from absl import flags

from experiments import runner
from research.analysis.results import read_run
from research.files import write_json_atomic
from research.training import run_folder

ENVIRONMENT = {"command": "launch/run by hand", "source": {"commit": "c0ffee" * 6, "dirty": False}}


@pytest.fixture
def command(monkeypatch):
    """`(experiment, *arguments) -> exit code`, all that a command does, without the seconds that a process takes."""
    before = set(flags.FLAGS)
    monkeypatch.setattr(runner, "_StopRequest", lambda: lambda: False)  # it would take over pytest's signals
    monkeypatch.setenv("NPROC", os.environ.get("NPROC", "2"))

    def forget():
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)

    def call(experiment, *arguments):
        forget()
        runner._define_flags(experiment)
        try:
            runner.parse_flags([experiment.name, "--compilation_cache=", *map(str, arguments)])
        except SystemExit as stop:
            return stop.code
        return runner._guarded(experiment)

    yield call
    forget()
    flags.FLAGS.unparse_flags()


@pytest.fixture
def refusal(command, capsys, monkeypatch):
    """`(experiment, *arguments) -> the one line` with which a command was refused as a request, exit code 2."""

    def fail(*_):
        pytest.fail("it was not refused")

    monkeypatch.setattr(runner, "_run_all", fail)

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
