"""Checkpoints: every bit comes back, every damage is seen, and no moment of death loses what was acknowledged."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import research
from research.errors import CarouselError
from research.training import checkpoint

ROOT = Path(research.__file__).parents[1]
DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
DTYPES += ["float16", "float32", "float64", ml_dtypes.bfloat16]


def state(step, size=50):
    return {"params/kernel": np.arange(size, dtype=np.float32) + step, "count": np.array(step, np.int32)}


def equal(a, b):
    return a.keys() == b.keys() and all(
        (a[k].dtype, a[k].shape, a[k].tobytes()) == (b[k].dtype, b[k].shape, b[k].tobytes()) for k in a
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run_script(script, *arguments, prefix=()):
    """Runs `script` in a fresh Python; returns the finished process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*prefix, sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


# Round trips


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_dtype_comes_back_to_the_bit(tmp_path, dtype):
    bits = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, 240, dtype=np.uint8)
    array = bits.view(dtype)  # random bits: NaN payloads, denormals and negative zeros among them
    arrays = {
        "vector": array,
        "matrix": array.reshape(2, -1),
        "scalar": array[:1].reshape(()),
        "empty": array[:0].reshape(0, 3),
    }
    path = checkpoint.save(tmp_path, 7, arrays, None)
    loaded = checkpoint.load(path)
    assert loaded.step == 7 and loaded.path == path and equal(loaded.arrays, arrays)
    assert all(value.flags.writeable and value.flags.aligned for value in loaded.arrays.values())


def test_memory_layout_and_byte_order_do_not_change_the_values(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {"transposed": array.T, "strided": array[:, ::2], "fortran": np.asfortranarray(array)}
    arrays["big_endian"] = array.astype(">f4")
    loaded = checkpoint.load(checkpoint.save(tmp_path, 0, arrays, {})).arrays
    for name, expected in arrays.items():
        np.testing.assert_array_equal(loaded[name], expected)
        assert loaded[name].dtype == np.float32


def test_metadata_comes_back(tmp_path):
    metadata = {
        "best": float("-inf"),
        "text": 'ü "quoted" {\n',
        "sha256": "0" * 64,
        "list": [1, 2.5, None],
        "size": 2**60,
    }
    assert checkpoint.load(checkpoint.save(tmp_path, 1, {}, metadata)).metadata == metadata


def test_equal_states_give_equal_files(tmp_path):
    # safetensors alone fails this: it writes metadata in random order.
    files = {checkpoint.save(tmp_path, 3, state(3), {"epoch": 1}).read_bytes() for _ in range(20)}
    assert len(files) == 1


def test_plain_safetensors_tools_can_read_it(tmp_path):
    path = checkpoint.save(tmp_path, 12, state(12), {"epoch": 3})
    assert equal(safetensors.numpy.load_file(path), state(12))
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    assert (metadata["step"], json.loads(metadata["carousel"])) == ("12", {"epoch": 3})
    content = path.read_bytes().replace(metadata["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(content).hexdigest() == metadata["sha256"]  # the recipe of the module's docstring


@pytest.mark.parametrize("array", [np.zeros(2, np.complex64), np.array(["text"]), np.array([None])])
def test_other_dtypes_are_refused_by_name(tmp_path, array):
    with pytest.raises(TypeError, match="'odd' of dtype"):
        checkpoint.save(tmp_path, 1, {"odd": array}, {})
    assert not names(tmp_path)


def test_the_reserved_name_is_refused(tmp_path):
    with pytest.raises(TypeError, match="__metadata__"):
        checkpoint.save(tmp_path, 1, {"__metadata__": np.zeros(2)}, {})


@pytest.mark.parametrize(("step", "keep"), [(-1, 2), (1, 0)])
def test_senseless_arguments_are_refused(tmp_path, step, keep):
    with pytest.raises(ValueError, match="step must be"):
        checkpoint.save(tmp_path, step, {}, {}, keep=keep)


# Damage


def damaged(path, content):
    path.write_bytes(content)
    try:
        checkpoint.load(path)
    except checkpoint.DamagedCheckpoint as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return True
    return False


def test_single_bit_flips_are_all_detected(tmp_path):
    path = checkpoint.save(tmp_path, 5, state(5), {"epoch": 1})
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    generator = random.Random(0)
    # All bits of the header's length and of the first places, where a flip changes how the rest is read; then anywhere.
    bits = [*range(40 * 8), *generator.sample(range(header * 8), 150), *generator.sample(range(len(content) * 8), 300)]
    for bit in bits:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        assert damaged(path, flipped), f"bit {bit} of {len(content) * 8}"
    assert not damaged(path, content)


def test_every_truncation_and_every_addition_is_detected(tmp_path):
    path = checkpoint.save(tmp_path, 5, state(5), {"epoch": 1})
    content = path.read_bytes()
    for length in range(len(content)):
        assert damaged(path, content[:length]), f"length {length} of {len(content)}"
    assert damaged(path, content + b"\0") and damaged(path, content + content)


@pytest.mark.parametrize("tail", [1, 8, 100, 10_000])
def test_a_zeroed_tail_is_detected(tmp_path, tail):
    path = checkpoint.save(tmp_path, 5, {"ones": np.ones(5000, np.float32)}, {})
    content = path.read_bytes()
    assert damaged(path, content[:-tail] + bytes(tail))


def test_a_file_under_the_name_of_another_step_is_detected(tmp_path):
    first, second = (checkpoint.save(tmp_path, step, state(step), {}) for step in (1, 2))
    first.rename(tmp_path / "swap")
    second.rename(first)
    (tmp_path / "swap").rename(second)
    for path, step in ((first, 2), (second, 1)):
        with pytest.raises(checkpoint.DamagedCheckpoint, match=f"it holds step {step}"):
            checkpoint.load(path)
    log = []
    assert checkpoint.latest(tmp_path, log.append) is None
    assert len(log) == 1


def test_a_file_of_another_program_is_not_taken_for_a_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(state(1), path, metadata={"step": "1"})
    with pytest.raises(checkpoint.DamagedCheckpoint, match="no SHA-256"):
        checkpoint.load(path)


def test_a_missing_file_is_one_clear_line(tmp_path):
    with pytest.raises(CarouselError, match=r"cannot read checkpoint .*absent\.safetensors: No such file"):
        checkpoint.load(tmp_path / "absent.safetensors")


# Which one is used


def test_latest_of_nothing_touches_nothing(tmp_path):
    assert checkpoint.latest(tmp_path / "checkpoints", pytest.fail) is None
    assert not names(tmp_path)
    assert checkpoint.latest(tmp_path, pytest.fail) is None


def test_the_newest_wins_by_number_and_leftovers_are_swept(tmp_path):
    for step in (99_999_999, 100_000_000):  # by name the shorter one would come last
        checkpoint.save(tmp_path, step, state(step), {})
    (tmp_path / ".tmp-123-step_00000007.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    found = checkpoint.latest(tmp_path, pytest.fail)
    assert found.step == 100_000_000 and equal(found.arrays, state(100_000_000))
    assert names(tmp_path) == ["notes.txt", "step_100000000.safetensors", "step_99999999.safetensors"]
    assert checkpoint.latest(tmp_path, pytest.fail, before=100_000_000).step == 99_999_999
    assert checkpoint.latest(tmp_path, pytest.fail, before=5) is None


def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, state(step), {}, keep=3)
    for step in (20, 30):
        with open(tmp_path / f"step_000000{step}.safetensors", "r+b") as file:
            file.truncate(100)
    (tmp_path / "step_00000030.safetensors.corrupt").write_text("from an earlier time")
    log = []
    assert checkpoint.latest(tmp_path, log.append).step == 10
    assert len(log) == 1 and "\n" not in log[0]
    for part in ("step_00000030.safetensors (", "step_00000020.safetensors (", ".corrupt", "goes on from step 10"):
        assert part in log[0]
    assert names(tmp_path) == [
        "step_00000010.safetensors",
        "step_00000020.safetensors.corrupt",
        "step_00000030.safetensors.2.corrupt",
        "step_00000030.safetensors.corrupt",
    ]
    assert (tmp_path / "step_00000030.safetensors.corrupt").read_text() == "from an earlier time"
    assert (tmp_path / "step_00000030.safetensors.2.corrupt").stat().st_size == 100
    assert checkpoint.latest(tmp_path, pytest.fail).step == 10  # said once


def test_all_damaged_means_from_the_beginning(tmp_path):
    checkpoint.save(tmp_path, 10, state(10), {}).write_bytes(b"")
    log = []
    assert checkpoint.latest(tmp_path, log.append) is None
    assert len(log) == 1 and "starts from the beginning" in log[0]
    assert names(tmp_path) == ["step_00000010.safetensors.corrupt"]


def test_the_newest_are_kept_beside_the_best(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for step in range(1, 6):
        path = checkpoint.save(folder, step, state(step), {})
        if step == 2:
            best = checkpoint.save_best(folder, step, state(step), {"accuracy": 0.5})
    assert names(folder) == ["best.safetensors", "step_00000004.safetensors", "step_00000005.safetensors"]
    assert path.name == "step_00000005.safetensors"
    loaded = checkpoint.load(best)
    assert (loaded.step, loaded.metadata) == (2, {"accuracy": 0.5}) and equal(loaded.arrays, state(2))
    checkpoint.save_best(folder, 5, state(5), {"accuracy": 0.6})
    assert checkpoint.load(best).step == 5
    checkpoint.save(folder, 6, state(6), {}, keep=1)
    assert names(folder) == ["best.safetensors", "step_00000006.safetensors"]


def test_saving_behind_later_steps_deletes_neither_them_nor_itself(tmp_path):
    for step in (100, 110):
        checkpoint.save(tmp_path, step, state(step), {})
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, state(step), {})
    assert [int(name[5:13]) for name in names(tmp_path)] == [20, 30, 100, 110]
    checkpoint.save(tmp_path, 120, state(120), {})
    assert [int(name[5:13]) for name in names(tmp_path)] == [110, 120]


def test_an_old_one_that_cannot_be_deleted_does_not_fail_the_run(tmp_path):
    (tmp_path / "step_00000001.safetensors").mkdir()  # unlink refuses a folder, whoever asks
    for step in (2, 3):
        checkpoint.save(tmp_path, step, state(step), {}, keep=1)
    assert names(tmp_path) == ["step_00000001.safetensors", "step_00000003.safetensors"]


# Systems that refuse


@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "cure"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "make it writable"), (errno.EIO, "check the file system")],
)
def test_a_refused_save_is_one_line_and_harms_nothing(tmp_path, monkeypatch, where, code, cure):
    checkpoint.save(tmp_path, 10, state(10), {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(*arguments, **keywords):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(*(("builtins.open", refuse) if where == "open" else (os, where, refuse)))
        for save in (checkpoint.save, checkpoint.save_best):
            with pytest.raises(CarouselError, match="the checkpoint of step 10 is intact") as caught:
                save(tmp_path, 20, state(20), {})
            message = str(caught.value)
            assert str(tmp_path) in message and os.strerror(code) in message and cure in message
            assert "\n" not in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CarouselError, match=r"there is no older checkpoint.*choose another --workdir"):
        checkpoint.save(tmp_path / "file" / "checkpoints", 1, state(1), {})


FULL = """
import os, resource, sys
from pathlib import Path
import numpy as np
from research.errors import CarouselError
from research.training import checkpoint
folder, how = Path(sys.argv[1]), sys.argv[2]
state = lambda step: {"x": np.full(25_000, step, np.float32)}  # 100 kB


def refused(step, reason):
    try:
        checkpoint.save(folder, step, state(step), {})
    except CarouselError as error:
        assert reason in str(error) and "step 1 is intact" in str(error), error
    else:
        raise AssertionError("saved")
    assert [path.name for path in folder.iterdir()] == ["step_00000001.safetensors"], list(folder.iterdir())
    assert checkpoint.latest(folder, sys.exit).arrays["x"][0] == 1


if how == "disk":
    mount = lambda options: os.system(f"mount -t tmpfs -o {options} none {folder}") == 0 or sys.exit(77)
    mount("size=160k")
checkpoint.save(folder, 1, state(1), {})
if how == "disk":
    refused(2, "No space left on device")
    mount("remount,ro")
    refused(3, "Read-only file system")
elif how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    refused(2, "File too large")
elif how == "permission":
    os.chdir(folder.parent)  # the folders above may be closed to the other user
    folder = Path(folder.name)
    folder.chmod(0o555)
    if os.getuid() == 0:  # modes do not bind root
        os.setuid(65534)
    refused(2, "Permission denied")
"""


@pytest.mark.parametrize("how", ["limit", "permission"])
def test_a_size_limit_or_a_read_only_folder_harms_nothing(tmp_path, how):
    tmp_path.chmod(0o755)
    result = run_script(FULL, tmp_path / "checkpoints", how)
    assert result.returncode == 0, result.stderr


def test_a_full_and_then_read_only_disk_harms_nothing(tmp_path):
    prefix = ("unshare", "--user", "--map-root-user", "--mount")  # the mount is seen by that process alone
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this system lets no process have its own mounts")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    result = run_script(FULL, folder, "disk", prefix=prefix)
    if result.returncode == 77:
        pytest.skip(f"tmpfs cannot be mounted here: {result.stderr}")
    assert result.returncode == 0, result.stderr
    assert not names(folder)  # so it was the mount that was full


# Death at any moment

EVERY_MOMENT = """
import builtins, os, signal, sys
from pathlib import Path
import numpy as np
from research.training import checkpoint
state = lambda step: {"x": np.full(25_000, step, np.float32)}
calls = 0


def mortal(function):
    def wrapped(*arguments, **keywords):
        global calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return wrapped


moment = 0
while True:
    moment += 1
    folder = Path(sys.argv[1]) / str(moment)
    for step in (10, 20):
        checkpoint.save(folder, step, state(step), {})
    checkpoint.save_best(folder, 10, state(10), {})
    child = os.fork()
    if child == 0:
        builtins.open = mortal(open)
        for name in ("open", "fsync", "replace", "unlink"):
            setattr(os, name, mortal(getattr(os, name)))
        checkpoint.save(folder, 30, state(30), {})
        checkpoint.save_best(folder, 30, state(30), {})
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    leftovers = len(list(folder.glob(".tmp-*")))
    found, best = checkpoint.latest(folder, sys.exit), checkpoint.load(folder / "best.safetensors")
    assert all((item.arrays["x"] == item.step).all() for item in (found, best))
    assert not list(folder.glob(".tmp-*"))
    print(code, found.step, best.step, leftovers)
    if code == 0:
        break
"""


def test_death_before_any_system_call_leaves_the_old_state_or_the_new(tmp_path):
    result = run_script(EVERY_MOMENT, tmp_path)
    assert result.returncode == 0, result.stderr
    codes, steps, bests, leftovers = zip(*(map(int, line.split()) for line in result.stdout.splitlines()), strict=True)
    assert set(codes[:-1]) == {-signal.SIGKILL} and codes[-1] == 0
    assert steps[0] == 20 and steps[-1] == 30 and list(steps) == sorted(steps)  # one moment at which it changes
    assert bests[0] == 10 and bests[-1] == 30 and list(bests) == sorted(bests)
    assert max(leftovers) == 1 and leftovers[-1] == 0


SAVER = """
import sys
import numpy as np
from research.training import checkpoint
folder = sys.argv[1]
found = checkpoint.latest(folder)
step = found.step if found else 0
while True:
    step += 1
    checkpoint.save(folder, step, {"x": np.full(100_000, step, np.float32)}, {"step": step})
    print(step, flush=True)
"""


def test_twenty_random_kills_lose_nothing_acknowledged(tmp_path):
    generator = random.Random(0)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    folder, acknowledged, restored = tmp_path / "checkpoints", 0, []
    for _ in range(20):
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, folder], env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            first = process.stdout.readline()
            time.sleep(generator.uniform(0, 0.05))
            process.kill()
            lines = (first + process.stdout.read()).splitlines(keepends=True)
        acknowledged = max([acknowledged, *(int(line) for line in lines if line.endswith("\n"))])
        found = checkpoint.latest(folder, pytest.fail)
        assert found.step >= acknowledged and found.metadata == {"step": found.step}
        assert (found.arrays["x"] == found.step).all()
        restored.append(found.step)
    assert restored == sorted(set(restored))  # every life went on from the one before
