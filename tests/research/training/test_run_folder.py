"""Run folders: one configuration, one writer, files that are whole, and metrics that resume to the byte."""

import errno
import hashlib
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import research
from research import files
from research.errors import CarouselError, UsageError
from research.training import run_folder

ROOT = Path(research.__file__).parents[1]
CONFIG = {"depth": 20, "model": {"norm": "batch", "widths": (16, 32)}, "rate": 0.1}


def one_line(caught, *parts):
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
    return True


# The folder and its configuration


def test_a_run_from_beginning_to_end(tmp_path):
    path = tmp_path / "runs" / "a"
    assert not run_folder.finished(path)
    with run_folder.open_run(path, CONFIG) as run:
        assert run.path == path and run.checkpoints == path / "checkpoints"
        run.metrics.append({"step": 1, "loss": 0.5})
        with pytest.raises(CarouselError, match="is not finished"):
            run_folder.read_result(path)
        run.finish({"loss": math.nan, "accuracy": np.float32(0.25)})
    assert run_folder.finished(path)
    assert run_folder.read_result(path) == {"loss": None, "accuracy": 0.25}
    assert run_folder.read_metrics(path) == [{"step": 1, "loss": 0.5}]  # `finish` flushes
    assert sorted(item.name for item in path.iterdir()) == ["config.json", "lock", "metrics.jsonl", "result.json"]


def test_the_same_configuration_may_come_back(tmp_path):
    for _ in range(2):
        with run_folder.open_run(tmp_path, CONFIG):
            pass
    assert files.read_json(tmp_path / "config.json")["model"]["widths"] == [16, 32]


def test_another_configuration_is_refused_with_every_difference(tmp_path):
    with run_folder.open_run(tmp_path, CONFIG):
        pass
    before = (tmp_path / "config.json").read_bytes()
    other = {"depth": 56, "model": {"norm": "batch", "widths": (16, 64)}, "seed": None}
    with pytest.raises(UsageError) as caught, run_folder.open_run(tmp_path, other):
        pytest.fail("opened")
    assert one_line(
        caught,
        f"run folder {tmp_path} belongs to another configuration",
        "depth is 20 there and 56 here",
        "model.widths is [16, 32] there and [16, 64] here",
        "rate is 0.1 there and absent here",
        "seed is absent there and null here",
        "choose another --workdir, or delete the folder",
    )
    assert "norm" not in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before
    with run_folder.open_run(tmp_path, CONFIG):  # the refusal let go of the lock
        pass


def test_a_check_of_the_configuration_writes_nothing(tmp_path):
    run_folder.check_config(tmp_path / "new", CONFIG)
    with run_folder.open_run(tmp_path / "old", CONFIG):
        run_folder.check_config(tmp_path / "old", CONFIG)  # nor does it need the lock
        with pytest.raises(UsageError, match="depth is 20 there and 56 here"):
            run_folder.check_config(tmp_path / "old", CONFIG | {"depth": 56})
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_configuration_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(UsageError) as caught, run_folder.open_run(tmp_path / "a", {"rate": math.nan}):
        pytest.fail("opened")
    assert one_line(caught, tmp_path / "a", "give finite numbers")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "result.json"])
def test_results_without_a_configuration_are_not_adopted(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(CarouselError) as caught, run_folder.open_run(tmp_path, CONFIG):
        pytest.fail("opened")
    assert one_line(caught, tmp_path, name, "no config.json", "--workdir")


def test_a_damaged_configuration_or_result_is_one_line(tmp_path):
    for name in ("config.json", "result.json"):
        (tmp_path / name).write_text('{"depth": ')
    with pytest.raises(CarouselError) as caught, run_folder.open_run(tmp_path, CONFIG):
        pytest.fail("opened")
    assert one_line(caught, tmp_path / "config.json", "not valid JSON", "delete the run's folder")
    with pytest.raises(CarouselError) as caught:
        run_folder.read_result(tmp_path)
    assert one_line(caught, tmp_path / "result.json", "not valid JSON", "delete it and start the same command again")


def begun(path, **environment):
    """An unfinished run with a checkpoint, of `environment`."""
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "environment.json").write_text(json.dumps(environment))
    return path


def test_an_unfinished_run_of_another_format_is_refused_with_the_commit_that_can_finish_it(tmp_path):
    source = {"commit": "ab12" * 10, "dirty": True}
    path = begun(tmp_path / "a", format=run_folder.FORMAT + 1, source=source)
    for config in (CONFIG, {"another": 1}):  # formats may tell configurations in other ways
        with pytest.raises(CarouselError) as caught:
            run_folder.check_config(path, config)
        assert one_line(caught, path, "in format 2 by commit ab12ab12", "with changes, and", "goes on with format 1")
        assert one_line(caught, "check out that commit to finish it, or choose another --workdir")
    with pytest.raises(CarouselError, match="was begun in format 2"), run_folder.open_run(path, CONFIG):
        pytest.fail("opened")
    (path / "result.json").write_text("{}")
    run_folder.check_config(path, CONFIG)  # finished ones are only read


def test_a_run_without_a_format_is_of_the_first(tmp_path, monkeypatch):
    for name, environment in (("old", {}), ("new", {"format": 1})):
        run_folder.check_config(begun(tmp_path / name, **environment), CONFIG)
    (tmp_path / "old" / "environment.json").write_text("{")
    (tmp_path / "new" / "environment.json").unlink()
    for name in ("old", "new"):
        run_folder.check_config(tmp_path / name, CONFIG)
    monkeypatch.setattr(run_folder, "FORMAT", 2)
    for name in ("old", "new"):
        with pytest.raises(CarouselError, match="was begun in format 1 by commit unknown"):
            run_folder.check_config(tmp_path / name, CONFIG)


def test_what_a_killed_writer_left_is_swept(tmp_path):
    (tmp_path / ".tmp-123-config.json").write_text("{")
    (tmp_path / "lock").write_text(f"process 123 on {'a-long-name' * 100}\n")
    with run_folder.open_run(tmp_path, CONFIG):
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        assert not list(tmp_path.glob(".tmp-*"))


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "a").write_text("")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(CarouselError) as caught, run_folder.open_run(path, CONFIG):
            pytest.fail("opened")
        assert one_line(caught, path, "a file is in the way: choose another --workdir")


READ_ONLY = """
import os, sys
from research.errors import CarouselError
from research.training import run_folder
os.chdir(sys.argv[1])  # the folders above may be closed to the other user
os.mkdir("run", 0o555)
os.chmod(".", 0o555)
if os.getuid() == 0:  # modes do not bind root
    os.setuid(65534)
for path in ("run", "new"):
    try:
        with run_folder.open_run(path, {}):
            sys.exit("opened")
    except CarouselError as error:
        print(error)
"""


def test_a_read_only_folder_is_one_line(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", READ_ONLY, tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    tmp_path.chmod(0o755)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 2
    for line, path in zip(lines, ("run/lock", "new"), strict=True):
        assert f" {path}: Permission denied; make it writable or choose another --workdir" in line


# The lock

HOLDER = """
import os, signal, sys
from research.training import run_folder
with run_folder.open_run(sys.argv[1], {}):
    child = os.fork() if len(sys.argv) > 2 else None
    if child == 0:
        signal.alarm(60)  # a child that outlives the run, with the lock's descriptor
        signal.pause()
    print(child, flush=True)
    sys.stdin.readline()
"""


def holder(path, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, path, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_second_process_is_kept_out_until_the_first_is_dead(tmp_path):
    with holder(tmp_path) as process:
        assert process.stdout.readline() == "None\n"
        with pytest.raises(CarouselError) as caught, run_folder.open_run(tmp_path, {}):
            pytest.fail("opened")
        assert caught.value.exit_code == 1
        assert one_line(
            caught,
            f"run folder {tmp_path} is being written by process {process.pid} on {socket.gethostname()}",
            "wait for it or choose another --workdir",
        )
        process.kill()
        process.wait()
    with run_folder.open_run(tmp_path, {}):
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_forked_child_does_not_keep_the_lock_of_a_run_that_ended(tmp_path):
    with holder(tmp_path, "fork") as process:
        child = int(process.stdout.readline())
        process.stdin.close()
        process.wait()
        try:
            with run_folder.open_run(tmp_path, {}):
                os.kill(child, 0)  # it still lives
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_folder_is_locked_within_a_process_too(tmp_path):
    with (
        run_folder.open_run(tmp_path, CONFIG),
        pytest.raises(CarouselError, match="is being written by"),
        run_folder.open_run(tmp_path, CONFIG),
    ):
        pytest.fail("opened")


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        if operation != run_folder.fcntl.LOCK_UN:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with pytest.raises(CarouselError) as caught, run_folder.open_run(tmp_path, CONFIG):
        pytest.fail("opened")
    assert one_line(caught, "cannot lock", tmp_path / "lock", os.strerror(errno.ENOLCK))


# Metrics


def test_metrics_are_one_line_each_in_the_order_given(tmp_path):
    metrics = run_folder.Metrics(tmp_path / "metrics.jsonl")
    metrics.append({"step": np.int32(1), "loss": 0.1 + 0.2, "accuracy": np.float32(0.1), "norm": math.inf})
    metrics.append({"z": 1, "a": "text"})
    assert (tmp_path / "metrics.jsonl").stat().st_size == 0  # nothing before `flush`
    size = metrics.flush()
    content = (tmp_path / "metrics.jsonl").read_text()
    first = '{"step": 1, "loss": 0.30000000000000004, "accuracy": 0.10000000149011612, "norm": null}\n'
    assert content == first + '{"z": 1, "a": "text"}\n'
    assert size == len(content)
    assert metrics.flush() == size  # nothing is written twice
    metrics.close()


def test_the_bits_of_floats_round_trip(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    metrics = run_folder.Metrics(tmp_path / "metrics.jsonl")
    metrics.append({"values": values})
    metrics.flush()
    metrics.close()
    (record,) = run_folder.read_metrics(tmp_path)
    assert np.array(record["values"], np.float32).tobytes() == values.tobytes()


def test_a_resumed_file_equals_one_that_was_never_cut(tmp_path):
    def record(step):
        return {"step": step, "loss": 1 / step}

    with run_folder.open_run(tmp_path / "whole", {}) as run:
        for step in range(1, 7):
            run.metrics.append(record(step))
        run.metrics.flush()

    path = tmp_path / "killed" / "metrics.jsonl"
    with run_folder.open_run(path.parent, {}) as run:
        for step in range(1, 4):
            run.metrics.append(record(step))
        size = run.metrics.flush()  # a checkpoint of step 3 records this
        run.metrics.append(record(4))
        run.metrics.flush()
        run.metrics.append(record(5))  # and this one is lost with the process
    with open(path, "ab") as file:
        file.write(b'{"step": 5, "lo')  # or half of it was written
    with run_folder.open_run(path.parent, {}) as run:
        assert run.metrics.truncate(size)
        for step in range(4, 7):
            run.metrics.append(record(step))
        run.metrics.flush()
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_truncate_drops_what_waits_and_refuses_a_file_that_is_too_short(tmp_path):
    metrics = run_folder.Metrics(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1})
    size = metrics.flush()
    assert not metrics.truncate(size + 1)
    assert metrics.flush() == size  # unchanged
    assert metrics.truncate(size)
    metrics.append({"step": 2})
    assert metrics.truncate(0)
    assert metrics.flush() == 0
    metrics.close()


def test_the_digest_of_metrics_goes_on_over_sittings_and_finds_a_changed_record(tmp_path):
    path, known = tmp_path / "metrics.jsonl", {}
    for sitting in range(3):
        metrics = run_folder.Metrics(path)
        for step in range(2):
            metrics.append({"step": 2 * sitting + step})
            size = metrics.flush()
            known[size] = metrics.sha256
        assert all(hashlib.sha256(path.read_bytes()[:size]).hexdigest() == digest for size, digest in known.items())
        metrics.append({"step": 99})
        assert metrics.flush() not in known
        assert metrics.truncate(size, known[size]) and metrics.sha256 == known[size]
        metrics.close()
    content = path.read_bytes()
    changed = content.replace(b"3", b"2")
    path.write_bytes(changed)
    metrics = run_folder.Metrics(path)
    sizes = sorted(known)
    assert not any(metrics.truncate(size, known[size]) for size in reversed(sizes[3:]))
    assert path.read_bytes() == changed
    assert metrics.truncate(sizes[2], known[sizes[2]])
    metrics.close()


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_FSIZE)[0] >= 0, reason="a file size limit is set already")
def test_a_refused_flush_leaves_whole_lines_and_may_be_tried_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = run_folder.Metrics(path)
    metrics.append({"step": 1})
    size = metrics.flush()
    for step in range(2, 50):
        metrics.append({"step": step})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # within the eighth line; Python ignores SIGXFSZ
    try:
        with pytest.raises(CarouselError) as caught:
            metrics.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert one_line(caught, path, "File too large", "ulimit")
    assert path.stat().st_size == size
    metrics.flush()
    metrics.close()
    assert [record["step"] for record in run_folder.read_metrics(tmp_path)] == list(range(1, 50))


def test_readers_see_whole_lines_only_and_name_a_bad_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert run_folder.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CarouselError, match=r"metrics.jsonl line 2 is not valid JSON"):
        run_folder.read_metrics(tmp_path)
    with pytest.raises(CarouselError, match=r"cannot read .*is this the folder of a run"):
        run_folder.read_metrics(tmp_path / "absent")


def test_a_truncated_file_falls_back_to_an_older_checkpoint(tmp_path):
    """The loop that a trainer runs on resume, over both modules."""
    from research.training import checkpoint

    with run_folder.open_run(tmp_path, {}) as run:
        for step in (10, 20, 30):
            run.metrics.append({"step": step})
            checkpoint.save(run.checkpoints, step, {}, {"metrics_bytes": run.metrics.flush()}, keep=3)
    os.truncate(tmp_path / "metrics.jsonl", 15)  # one line and three bytes
    with run_folder.open_run(tmp_path, {}) as run:
        found = checkpoint.latest(run.checkpoints, pytest.fail)
        while found and not run.metrics.truncate(found.metadata["metrics_bytes"]):
            found = checkpoint.latest(run.checkpoints, pytest.fail, before=found.step)
        assert found.step == 10
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 10}
