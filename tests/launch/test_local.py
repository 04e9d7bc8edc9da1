"""Sweeps over processes of one machine: the same report as in one process, whatever is killed on the way."""

import os
import re
import signal

import pytest

from experiments import command_line, runner
from experiments.depth_ablation import Config
from experiments.depth_ablation import cells as grid
from launch import local
from research.training import run_folder, status


def ended(process, code):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


def figures(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "figures").iterdir()}


def test_the_report_is_that_of_one_process(sweep, smoke, tmp_path):
    out, err = ended(sweep("--smoke", "--depths=8", "--seeds=0,1,2", "--workers=2"), 0)
    assert figures(tmp_path / "work") == figures(smoke.workdir)  # to the last byte, and what they were made from
    rows = [re.sub(r" +[\d.]+ +[\d,]+$", "", line) for line in out.splitlines() if line.startswith(("plain", "resid"))]
    assert rows and all(row in smoke.stdout for row in rows)
    assert len(re.findall(r"^\S+: done in \d", err, re.MULTILINE)) == 6
    assert "6 of 6 cells to train, 2 at a time" in err
    out, err = ended(sweep("--smoke", "--depths=8", "--seeds=0,1,2", "--workers=2"), 0)
    assert "cells to train" not in err and "residual" in out  # nothing is trained twice, the report is made again


def test_a_failed_cell_is_told_at_the_end_and_the_others_are_trained(sweep, tmp_path, commands):
    work = tmp_path / "work"
    bad, good = grid(Config(depths=(8,), width=4, batch_size=16, steps=4))
    folder = work / "runs" / bad.name
    run_folder.reserve(folder, runner.identity(bad))
    (folder / "checkpoints").write_text("a file in the way")
    flags = (*commands.tiny[:1], *commands.tiny[2:], "--steps=4")
    out, err = ended(sweep(*flags, "--workers=2"), 1)
    assert f"{bad.name}: exit code 1 after 0:" in err and "; it is tried once more" in err
    assert f"{good.name}: done in" in err and "residual" in out
    end = err.partition(f"error: {bad.name} failed 2 times (exit code 1); the end of {work / 'logs' / bad.name}.log:")[
        2
    ]
    assert re.search(r"^    error: .*checkpoints.*a file is in the way", end, re.MULTILINE)
    assert {each.name: each.state for each in status.read_all(work)} == {bad.name: "failed", good.name: "done"}
    (folder / "checkpoints").unlink()
    ended(sweep(*flags, "--workers=2"), 0)  # once the reason is gone, the same command goes on


def running(work, steps=1):
    """The processes of running cells that have taken so many steps, once there are two."""
    told = [folder / status.STATUS for folder in (work / "runs").glob("*") if _at_step(folder, steps)]
    return [run_folder.read_json(path)["pid"] for path in told] if len(told) == 2 else None


def _at_step(folder, steps):
    try:
        found = status.read(folder)
    except Exception:  # it is being made
        return False
    return found.state == "running" and (found.step or 0) >= steps


@pytest.fixture(scope="module")
def uninterrupted(commands, tmp_path_factory):
    work = tmp_path_factory.mktemp("whole")
    done = commands.run(*commands.many_checkpoints, "--seeds=0,1", f"--workdir={work}")
    assert done.returncode == 0, done.stderr
    return work


def test_a_killed_cell_goes_on(sweep, commands, tmp_path, uninterrupted, wait_for):
    work = tmp_path / "work"
    process = sweep(*commands.many_checkpoints, "--seeds=0,1", "--workers=2")
    os.kill(wait_for(lambda: running(work))[0], signal.SIGKILL)
    _, err = ended(process, 0)
    assert len(re.findall(r"killed by SIGKILL after 0:\d\d; it is tried once more", err)) == 1
    assert "going on from step" in "".join(path.read_text() for path in (work / "logs").iterdir())
    assert figures(work) == figures(uninterrupted)


def test_ctrl_c_has_every_cell_write_a_checkpoint_and_the_next_start_goes_on(
    sweep, commands, tmp_path, uninterrupted, wait_for
):
    work = tmp_path / "work"
    process = sweep(*commands.many_checkpoints, "--seeds=0,1", "--workers=2")
    pids = wait_for(lambda: running(work))
    process.send_signal(signal.SIGINT)
    _, err = ended(process, 75)
    assert f"interrupted: {work}: 0 of 2 cells are finished; the same command goes on" in err
    assert err.count(": stopped, with a checkpoint") == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert {each.state for each in status.read_all(work)} == {"stopped"}
    ended(sweep(*commands.many_checkpoints, "--seeds=0,1", "--workers=2"), 0)
    assert figures(work) == figures(uninterrupted)


def test_a_killed_launcher_leaves_nothing_behind(sweep, commands, tmp_path, uninterrupted, wait_for):
    work = tmp_path / "work"
    flags = (*commands.many_checkpoints, "--seeds=0,1", "--workers=2")
    process = sweep(*flags)
    pids = wait_for(lambda: running(work))
    _, err = ended(sweep(*flags), 1)  # meanwhile a second one is refused
    assert err.startswith(f"error: working folder {work} is being written by process {process.pid} on ")
    process.kill()
    wait_for(lambda: not any(_exists(pid) for pid in pids))
    ended(sweep(*flags), 0)
    assert figures(work) == figures(uninterrupted)


def _exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_measures_time_runs_alone(launcher, tmp_path):
    _, err = ended(launcher("local", "memory", "--smoke", "--workers=2", f"--workdir={tmp_path}"), 2)
    assert err == "error: memory measures time and memory, one cell at a time: give --workers=1\n"


def test_every_process_has_its_share(monkeypatch, tmp_path):
    started = []

    class Process:
        pid = 42

        def __init__(self, command, **options):
            started.append(options["env"])

    class Sweep:
        workdir = tmp_path
        experiment = None
        grid = runner.Grid(None, grid(Config()), tmp_path)

        def command(self, name):
            return [name]

        def unfinished(self):
            return self.grid.names

        def environment(self):
            return {"NPROC": "8"}

    bound = []
    monkeypatch.setattr(local.subprocess, "Popen", Process)
    monkeypatch.setattr(local.os, "sched_setaffinity", lambda pid, cores: bound.append(cores), raising=False)
    monkeypatch.setattr(local.command_line, "StopRequest", lambda text: lambda: False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    for folder in Sweep.grid.folders:
        folder.mkdir(parents=True)
    for gpus, memory in ((["0", "3"], "0.450"), (["0", "1", "2", "3"], None), ([], None)):
        started.clear()
        bound.clear()
        pool = local._Pool(Sweep(), 4, gpus, list(range(8)))
        for cell in Sweep.grid.cells[:4]:
            pool._start(cell.name, 1)
        assert bound == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert [env.get("CUDA_VISIBLE_DEVICES") for env in started] == (gpus * 4)[:4] if gpus else [None] * 4
        assert {env.get("XLA_PYTHON_CLIENT_MEM_FRACTION") for env in started} == {memory}
        assert {(env["NPROC"], env[command_line.LAUNCHER]) for env in started} == {("8", str(os.getpid()))}
