"""Files that are whole or not there."""

import errno
import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from research import files
from research.errors import CarouselError


def one_line(caught, *parts):
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
    return True


def test_json_is_sorted_indented_and_ends_in_a_newline(tmp_path):
    path = tmp_path / "a.json"
    files.write_json_atomic(path, {"b": [1, 0.1], "a": None})
    assert path.read_bytes() == b'{\n "a": null,\n "b": [\n  1,\n  0.1\n ]\n}\n'
    files.write_json_atomic(path, {"a": 2})
    assert files.read_json(path) == {"a": 2}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_refuses_non_finite_numbers_and_the_helper_makes_them_null(tmp_path, value):
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json_atomic(path, {"loss": value})
    assert not list(tmp_path.iterdir())
    files.write_json_atomic(path, files.json_ready({"loss": value, "all": [np.float32(value), 1.0]}))
    assert files.read_json(path) == {"loss": None, "all": [None, 1.0]}


def test_json_ready_takes_numbers_of_every_kind():
    value = {
        "a": np.int64(3),
        "b": np.bool_(True),
        "c": np.array([1.0, np.nan]),
        "d": ml_dtypes.bfloat16(0.5),
        "e": (1,),
    }
    ready = files.json_ready(value)
    assert ready == {"a": 3, "b": True, "c": [1.0, None], "d": 0.5, "e": [1]}
    assert ready["b"] is True and type(ready["a"]) is int


@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_a_refused_write_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "result.json"
    files.write_json_atomic(path, {"old": 1})

    def refuse(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*(("builtins.open", refuse) if where == "open" else (os, where, refuse)))
        with pytest.raises(CarouselError) as caught:
            files.write_json_atomic(path, {"new": 2})
    assert one_line(caught, path, "No space left on device", "free some space")
    assert [item.name for item in tmp_path.iterdir()] == ["result.json"]
    assert files.read_json(path) == {"old": 1}


def test_an_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "a", b"content")
    assert not list(tmp_path.iterdir())


def test_a_file_is_durable_before_it_has_its_name_and_its_name_after(tmp_path, monkeypatch):
    calls = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(descriptor):
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real["fsync"](descriptor)

    def replace(source, target):
        calls.append(("replace", Path(target).name))
        real["replace"](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to name descriptors by")
    files.write_atomic(tmp_path / "a", b"content")
    assert calls == [("fsync", f".tmp-{os.getpid()}-a"), ("replace", "a"), ("fsync", tmp_path.name)]


@pytest.mark.parametrize(("code", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_only_a_missing_operation_on_folders_is_forgiven(tmp_path, monkeypatch, code, raises):
    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    if raises:
        with pytest.raises(OSError, match=os.strerror(code)):
            files.sync_folder(tmp_path)
    else:
        files.sync_folder(tmp_path)
