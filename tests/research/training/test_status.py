"""What a run folder says about a run that is not finished, while its process lives and after it has died."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from research.errors import CarouselError, Interrupted
from research.training import run_folder, status


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "runs" / "a"
    run_folder.reserve(path, {"depth": 8})
    return path


def test_a_run_to_come_is_pending_and_stays_a_run_to_come(folder):
    assert status.read(folder) == status.Status("a", "pending")
    run_folder.reserve(folder, {"depth": 20})  # there already; that it is another one is found when it is opened
    assert json.loads((folder / "config.json").read_text()) == {"depth": 8}


def test_a_run_is_followed(folder, monkeypatch):
    monkeypatch.setattr(status, "_WRITE_EVERY", 0.0)
    with run_folder.open_run(folder, {"depth": 8}) as run, status.kept(folder) as keeper:
        assert status.read(folder) == status.Status("a", "running")
        keeper.progress(10, 40, 3.5, "loss 2")
        assert status.read(folder) == status.Status("a", "running", 10, 40, 3.5, "loss 2")
        run.finish({"steps": 40})
    assert status.read(folder) == status.Status("a", "done", 40, 40)
    assert status.read(folder).finished
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "lock", "metrics.jsonl", "result.json"]


def test_it_is_not_written_at_every_step(folder, monkeypatch):
    with status.kept(folder) as keeper:
        keeper.progress(1, 40, None)
        assert status.read(folder).step is None
        monkeypatch.setattr(status, "_WRITE_EVERY", 0.0)
        keeper.progress(2, 40, None)
        assert status.read(folder).step == 2


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (Interrupted("stopped at step 5"), "stopped", "interrupted"),
        (KeyboardInterrupt(), "stopped", "interrupted"),
        (CarouselError("the disk\nis full"), "failed", "the disk is full"),
        (ZeroDivisionError("a bug"), "failed", "ZeroDivisionError: a bug"),
    ],
)
def test_how_a_run_ended_stays(folder, error, state, message):
    with pytest.raises(type(error)), status.kept(folder) as keeper:
        keeper.progress(5, 40, 60.0, "loss 2")
        raise error
    assert status.read(folder) == status.Status("a", state, 5, 40, None, message)
    with status.kept(folder):  # started again
        assert status.read(folder) == status.Status("a", "running")


def test_a_diverged_run_says_why(folder):
    with run_folder.open_run(folder, {"depth": 8}) as run:
        run.finish({"failure": "the loss is not finite", "failed_at_step": 7})
    assert status.read(folder) == status.Status("a", "diverged", 7, None, None, "the loss is not finite")
    assert status.read(folder).finished


TRAINS = """
import sys, time
from research.training import status
with status.kept(sys.argv[1]) as keeper:
    print("running", flush=True)
    time.sleep(600)
"""


def test_a_killed_run_is_not_taken_for_a_running_one(folder, commands):
    command = [sys.executable, "-c", TRAINS, str(folder)]
    with subprocess.Popen(command, env=commands.environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "running\n"
        assert status.read(folder).state == "running"
        process.send_signal(signal.SIGKILL)
    found = status.read(folder)
    assert (found.state, found.message) == ("stopped", "its process has ended without a word (killed?)")


def test_another_process_of_the_same_number_is_not_the_run(folder):
    with status.kept(folder):
        path = folder / status.STATUS
        told = json.loads(path.read_text())
        assert told["pid"] == os.getpid() and status.read(folder).state == "running"
        path.write_text(json.dumps(told | {"started": "1"}))
        assert status.read(folder).state == "stopped"


def test_on_another_machine_a_run_is_alive_as_long_as_it_is_touched(folder, monkeypatch):
    monkeypatch.setattr(status, "_TOUCH_EVERY", 0.01)
    with status.kept(folder):
        path = folder / status.STATUS
        path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "another-" + socket.gethostname()}))
        deadline = time.monotonic() + 60
        os.utime(path, (0, 0))
        while status.read(folder).state != "running":  # the thread touches it
            assert time.monotonic() < deadline
    nothing = dict.fromkeys(("step", "steps", "message", "seconds_left", "pid", "started"))
    path.write_text(json.dumps({"state": "running", "host": "another"} | nothing))
    os.utime(path, (0, 0))
    assert status.read(folder).state == "stopped"


def test_a_run_of_earlier_code_is_stopped_if_it_was_begun(folder):
    (folder / "checkpoints").mkdir()
    assert status.read(folder).state == "pending"
    (folder / "checkpoints" / "step_00000000.safetensors").write_bytes(b"")
    assert status.read(folder).state == "stopped"
    (folder / status.STATUS).write_text("{")  # cut off
    assert status.read(folder).state == "stopped"


def test_an_unwritable_folder_stops_no_run(folder):
    (folder / status.STATUS).mkdir()  # in the way
    with status.kept(folder) as keeper:
        keeper.progress(1, 2, 3.0)


def test_all_runs_of_a_working_folder(folder, tmp_path):
    run_folder.reserve(tmp_path / "runs" / "b", {"depth": 20})
    (tmp_path / "runs" / "no run").mkdir()
    assert [each.name for each in status.read_all(tmp_path)] == ["a", "b"]
    with pytest.raises(CarouselError, match=r"no run folders.*--workdir"):
        status.read_all(tmp_path / "runs")
    with pytest.raises(CarouselError, match=r"has no config\.json"):
        status.read(tmp_path / "runs" / "no run")
