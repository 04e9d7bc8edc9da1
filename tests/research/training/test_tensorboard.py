"""TensorBoard's events say what metrics.jsonl says, each step once, whatever happened to the run."""

import json
import math
import signal
import struct
import time

import pytest

from research.training import run_folder, tensorboard

tensorboardX = pytest.importorskip("tensorboardX", reason="the extra [tensorboard] is not installed")


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(folder):
    """The events of the one file in a run's folder, every checksum verified."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = (folder / "tensorboard").iterdir()
    assert "tfevents" in path.name
    data, events = path.read_bytes(), []
    while data:
        (length,), content = struct.unpack("<Q", data[:8]), data[12:]
        assert struct.unpack("<I", data[8:12]) == (masked(data[:8]),)
        assert struct.unpack("<I", content[length : length + 4]) == (masked(content[:length]),)
        events.append(Event.FromString(content[:length]))
        data = content[length + 4 :]
    return events


def scalars(folder):
    """(step, tag, value) in the order of the file, NaN as None."""
    return [
        (event.step, value.tag, None if math.isnan(value.simple_value) else value.simple_value)
        for event in read_events(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


def single(value):
    return None if value is None else struct.unpack("f", struct.pack("f", value))[0]


def expected(folder, seeds=()):
    """What `scalars` should be, by metrics.jsonl."""
    found = []
    for record in run_folder.read_metrics(folder):
        for name, value in record.items():
            if isinstance(value, list):
                found += [(record["step"], f"{name}/seed{s}", single(v)) for s, v in zip(seeds, value, strict=True)]
            elif name != "step":
                found.append((record["step"], name, single(value)))
    return found


@pytest.fixture
def run(tmp_path):
    """`(config={}) -> metrics, lines said` of an open run with events, as often as one likes."""
    opened = []

    def call(config=None):
        while opened:
            opened.pop().__exit__(None, None, None)
        opened.append(run_folder.open_run(tmp_path / "run", config or {"seed": 0, "blocks": "residual"}))
        folder, said = opened[0].__enter__(), []
        folder.metrics.changed = tensorboard.Mirror(folder.path, said.append)
        return folder.metrics, said

    yield call
    while opened:
        opened.pop().__exit__(None, None, None)


def test_events_are_the_metrics_on_the_disk_and_the_configuration(run, tmp_path):
    metrics, said = run()
    metrics.append({"step": 10, "loss": 0.1, "learning_rate": 1e-3})
    metrics.append({"step": 10, "validation_error": None})
    assert not (tmp_path / "run" / "tensorboard").exists(), "what is not durable yet may never be"
    metrics.flush()
    assert scalars(tmp_path / "run") == expected(tmp_path / "run")
    metrics.append({"step": 20, "loss": -2.0})
    metrics.flush()
    found = scalars(tmp_path / "run")
    assert found == expected(tmp_path / "run") and found[-1] == (20, "loss", -2.0)
    assert (10, "validation_error", None) in found and said == []
    version, start, config, *rest = read_events(tmp_path / "run")
    assert version.file_version == "brain.Event:2" and start.session_log.status == start.session_log.START
    assert "| blocks | residual |" in config.summary.value[0].tensor.string_val[0].decode()
    assert all(time.time() - 600 < event.wall_time <= time.time() for event in (version, start, config, *rest))


def test_each_of_several_seeds_has_a_tag(run, tmp_path):
    metrics, _ = run({"seed": [3, 5]})
    metrics.append({"step": 1, "loss": [0.5, None], "learning_rate": 0.25})
    metrics.flush()
    assert scalars(tmp_path / "run") == expected(tmp_path / "run", seeds=(3, 5))
    assert [tag for _, tag, _ in scalars(tmp_path / "run")] == ["loss/seed3", "loss/seed5", "learning_rate"]


def test_a_run_that_goes_on_has_every_step_once(run, tmp_path):
    metrics, _ = run()
    metrics.append({"step": 1, "loss": 1.0})
    size = metrics.flush()
    metrics.append({"step": 2, "loss": 2.0})
    metrics.flush()
    # A checkpoint was written at step 1 alone.
    metrics, said = run()
    assert metrics.truncate(size)
    assert scalars(tmp_path / "run") == [(1, "loss", 1.0)]
    for step in (2, 3):
        metrics.append({"step": step, "loss": 2.0 * step})
        metrics.flush()
    assert scalars(tmp_path / "run") == expected(tmp_path / "run") == [(1, "loss", 1), (2, "loss", 4), (3, "loss", 6)]
    # From the beginning again, in the same process.
    metrics.truncate(0)
    metrics.append({"step": 1, "loss": 9.0})
    metrics.flush()
    assert scalars(tmp_path / "run") == [(1, "loss", 9.0)] and said == []


def test_a_run_that_records_nothing_has_no_events(run, tmp_path):
    metrics, said = run()
    metrics.truncate(0)
    metrics.flush()
    assert not (tmp_path / "run" / "tensorboard").exists() and said == []


def test_a_finished_run_without_events_gets_them(run, tmp_path):
    metrics, said = run()
    metrics.changed = lambda: None
    metrics.append({"step": 1, "loss": 1.0})
    metrics.flush()
    tensorboard.complete(tmp_path / "run", said.append)
    assert scalars(tmp_path / "run") == [(1, "loss", 1.0)]
    before = [path.name for path in (tmp_path / "run" / "tensorboard").iterdir()]
    tensorboard.complete(tmp_path / "run", said.append)
    assert [path.name for path in (tmp_path / "run" / "tensorboard").iterdir()] == before and said == []


def test_a_folder_that_cannot_be_made_is_told_once_and_loses_nothing(run, tmp_path):
    metrics, said = run()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    for step in (1, 2):
        metrics.append({"step": step, "loss": 1.0})
        metrics.flush()
    (line,) = said
    assert line.startswith("warning: cannot write ") and str(tmp_path / "run" / "tensorboard") in line
    assert "\n" not in line and "the training goes on" in line
    assert [record["step"] for record in run_folder.read_metrics(tmp_path / "run")] == [1, 2]


def test_after_a_full_disk_the_missing_events_follow(run, tmp_path, monkeypatch):
    metrics, said = run()
    metrics.append({"step": 1, "loss": 1.0})
    metrics.flush()

    def full(file, data):
        raise OSError(28, "No space left on device")

    append = tensorboard.append_durably
    monkeypatch.setattr(tensorboard, "append_durably", full)
    for step in (2, 3):
        metrics.append({"step": step, "loss": 1.0})
        metrics.flush()
    assert len(said) == 1 and "No space left on device" in said[0]
    monkeypatch.setattr(tensorboard, "append_durably", append)
    metrics.append({"step": 4, "loss": 1.0})
    metrics.flush()
    assert scalars(tmp_path / "run") == expected(tmp_path / "run") and len(said) == 1


# Whole commands.

RUN = "residual-8-w4-seed0"


def outcome(workdir):
    folder = workdir / "runs" / RUN
    result = json.loads((folder / "result.json").read_text())
    return result["final_state_sha256"], (folder / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def without(commands, tmp_path_factory):
    folder = tmp_path_factory.mktemp("without")
    done = commands.run(*commands.many_checkpoints, f"--workdir={folder}")
    assert done.returncode == 0, done.stderr
    assert not (folder / "runs" / RUN / "tensorboard").exists()
    return folder


def test_kills_leave_every_step_once_and_change_no_bit(commands, without, tmp_path):
    flags = (*commands.many_checkpoints, "--tensorboard", f"--workdir={tmp_path}")
    folder = tmp_path / "runs" / RUN
    for wait, step in ((0.0, 2), (0.05, 9), (0.1, 19)):
        with commands.start(*flags) as process:
            end = time.monotonic() + 120
            while not any(int(path.name[5:13]) >= step for path in folder.glob("checkpoints/step_*")):
                assert process.poll() is None and time.monotonic() < end, process.communicate()
                time.sleep(0.005)
            time.sleep(wait)
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL and list(folder.glob("tensorboard/*"))
    done = commands.run(*flags)
    assert done.returncode == 0 and "going on from step" in done.stderr, done.stderr
    assert scalars(folder) == expected(folder) and len({step for step, _, _ in scalars(folder)}) == 30
    assert outcome(tmp_path) == outcome(without)


def test_events_of_finished_runs_are_made_without_training(commands, without, tmp_path):
    done = commands.run(*commands.many_checkpoints, "--tensorboard", f"--workdir={without}")
    assert done.returncode == 0 and "finished before" in done.stderr, done.stderr
    assert scalars(without / "runs" / RUN) == expected(without / "runs" / RUN)


def test_without_the_package_one_line_before_training(commands, tmp_path):
    script = "import sys; sys.modules['tensorboardX'] = None\n"
    script += "from experiments import depth_ablation, runner; runner.main(depth_ablation.EXPERIMENT)"
    done = commands.script(script, "--smoke", "--tensorboard", f"--workdir={tmp_path / 'work'}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "CAROUSEL_EXTRAS=test,dev,tensorboard launch/run install" in line
    assert not (tmp_path / "work").exists()
