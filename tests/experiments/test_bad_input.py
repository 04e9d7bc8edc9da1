"""Whatever is wrong with a command line, the files or the disk: one line that says what to do, and its exit code."""

import gzip
import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest

from experiments import depth_ablation, runner
from tests.commands import refusal, run_of, saved_steps

# The request: exit code 2, and nothing is made. `{}` is the working folder.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depht=8"], "Unknown command line flag 'depht'. Did you mean: depths"),
        (["--dataset=imagenet"], "dataset=imagenet.*digits|mnist|cifar10"),
        (["--blocks=plain,dense"], "--blocks=plain,dense: 'dense' is unknown; choose from plain, residual"),
        (["--parallel=threads"], "parallel=threads.*auto|pmap|jit|shard_map"),
        (["--augmentation=cutout"], "augmentation=cutout.*none|crop|crop_and_flip"),
        (["--preset=he2016"], "preset=he2016.*he2015"),
        (["--depths=21"], "depth 21 is not 6n\\+2 .*try 20 or 26"),
        (["--depths=8,2"], "depth 2 is not 6n\\+2 .*try 8 or 14"),
        (["--depths=-8"], "depth -8 is not 6n\\+2 .*try 8 or 14"),
        (["--depths=8,twenty"], "--depths=8,twenty is not a list of whole numbers: write --depths=1,2,3"),
        (["--depths="], "--depths= is empty"),
        (["--seeds=0,0"], "--seeds=0,0 names a value twice"),
        (["--seeds=-1"], "--seeds=-1: give at least 0"),
        (["--batch_size=1281"], "--batch_size=1281: digits has 1280 training images, give fewer"),
        (["--batch_size=0"], "--batch_size=0: give at least 1"),
        (["--epochs=1", "--steps=10"], "--epochs=1 and --steps=10: give exactly one of them"),
        (["--steps=0"], "--steps=0: give at least 1"),
        (["--steps=ten"], "steps.*ten"),
        (["--learning_rate=nan"], "--learning_rate=nan: give a positive number"),
        (["--learning_rate=0"], "--learning_rate=0.0: give a positive number"),
        (["--learning_rate=-1"], "--learning_rate=-1.0: give a positive number"),
        (["--weight_decay=-1"], "--weight_decay=-1.0: give at least 0"),
        (["--devices=0"], "--devices=0: give at least 1"),
        (["--devices=3", "--batch_size=16"], "--batch_size=16 does not divide by 3 devices: give a multiple"),
        (["depths=8"], "unexpected argument 'depths=8': flags are written --name=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_requests_that_make_no_sense(commands, tmp_path, flags, message):
    workdir = tmp_path / "work"
    line = refusal(commands.run("--smoke", f"--workdir={workdir}", *flags), 2)
    assert re.search(message, line), line
    assert not workdir.exists()


@pytest.mark.parametrize("seed", [2**32, 2**70])
def test_a_seed_that_would_be_cut_to_another(commands, tmp_path, seed):
    line = refusal(commands.run("--smoke", *commands.tiny, f"--seeds={seed}", f"--workdir={tmp_path}"), 2)
    assert f"seed {seed} does not fit 32 bits" in line


def test_a_folder_of_another_configuration(commands, tmp_path):
    (cell,) = depth_ablation.cells(
        depth_ablation.Config(depths=(8,), blocks=("residual",), width=4, batch_size=16, steps=4, learning_rate=0.25)
    )
    folder = run_of(tmp_path)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(runner.identity(cell)))
    before = sorted(tmp_path.rglob("*"))
    done = commands.run(*commands.tiny, "--steps=5", "--learning_rate=0.5", f"--workdir={tmp_path}")
    line = refusal(done, 2)
    assert f"{folder} belongs to another configuration: " in line
    assert "learning_rate is 0.25 there and 0.5 here" in line and "steps is 4 there and 5 here" in line
    assert "batch_size" not in line and "another --workdir" in line
    assert sorted(tmp_path.rglob("*")) == before


# The data: exit code 1.


def mnist(commands, tmp_path):
    return commands.run(
        "--smoke", *commands.tiny, "--dataset=mnist", "--data_dir=data", f"--workdir={tmp_path / 'work'}", cwd=tmp_path
    )


def test_missing_files_are_named_with_their_folder_and_the_command_that_gets_them(commands, tmp_path):
    line = refusal(mnist(commands, tmp_path), 1)
    assert line == (
        "train-images-idx3-ubyte.gz is missing in data/mnist: "
        "get it with `python -m research.data.download mnist --data_dir=data`"
    )


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "altered", "replaced"])
def test_damaged_files_are_named_with_the_damage(commands, tmp_path, damage):
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    # Of the right shape, so that only its checksum is wrong.
    content = gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, 60_000, 28, 28) + bytes(60_000 * 28 * 28), compresslevel=1)
    content, message = {
        "truncated": (content[:-5_000], "truncated"),
        "corrupt": (content[:10] + b"\xff" + content[11:], "corrupt gzip data"),
        "altered": (content, "checksum mismatch"),
        "replaced": (b"<html>moved</html>", "wrong magic number"),
    }[damage]
    (folder / "train-images-idx3-ubyte.gz").write_bytes(content)
    line = refusal(mnist(commands, tmp_path), 1)
    assert line.startswith("data/mnist/train-images-idx3-ubyte.gz: ") and re.search(message, line), line
    assert "delete the file and run `python -m research.data.download mnist --data_dir=data`" in line


# The working folder and the disk: exit code 1.


def test_a_file_where_the_working_folder_should_be(commands, tmp_path):
    path = tmp_path / "work"
    path.write_text("mine")
    line = refusal(commands.run("--smoke", *commands.tiny, f"--workdir={path}"), 1)
    assert str(path) in line and "a file is in the way: choose another --workdir" in line
    assert path.read_text() == "mine"


@pytest.mark.parametrize("workdir", ["/proc/carousel", "/sys/carousel"])
def test_a_folder_that_cannot_be_made(commands, workdir):
    # Not even by root.
    line = refusal(commands.run("--smoke", *commands.tiny, f"--workdir={workdir}"), 1)
    assert line.startswith(f"cannot make the run folder {run_of(Path(workdir))}: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(commands, tmp_path):
    workdir = tmp_path / "work"
    workdir.mkdir(mode=0o500)
    line = refusal(commands.run("--smoke", *commands.tiny, f"--workdir={workdir}"), 1)
    assert "Permission denied; make it writable or choose another --workdir" in line


def test_a_limit_on_file_sizes(commands, interrupted, tmp_path):
    workdir = tmp_path / "work"
    shutil.copytree(interrupted, workdir)
    # 512 or 1,024 bytes a block: less than a checkpoint, more than any other file.
    limited = ("sh", "-c", 'ulimit -f 30 && exec "$@"', "sh")
    done = commands.run(*commands.many_checkpoints, f"--workdir={workdir}", prefix=limited)
    line = refusal(done, 1)
    assert line.startswith(f"cannot write {run_of(workdir)}/checkpoints/") and "File too large; the checkpoint" in line
    assert f"of step {saved_steps(interrupted)[-1]} is intact" in line and "start the same command again" in line
    assert not list(workdir.rglob(".tmp*"))
    assert {path: path.read_bytes() for path in workdir.rglob("step_*")} == {
        workdir / path.relative_to(interrupted): path.read_bytes() for path in interrupted.rglob("step_*")
    }


def test_a_report_that_does_not_fit(commands, smoke, tmp_path):
    shutil.copytree(smoke.workdir, tmp_path / "work")
    before = {path: path.read_bytes() for path in (tmp_path / "work").rglob("*") if path.is_file()}
    flags = ("--smoke", "--depths=8", "--seeds=0,1,2", "--report_only", f"--workdir={tmp_path / 'work'}")
    done = commands.run(*flags, prefix=("sh", "-c", 'ulimit -f 20 && exec "$@"', "sh"))
    line = refusal(done, 1)
    assert f"{tmp_path / 'work'}/figures/" in line and "File too large" in line
    # The old figures are still there, whole, and nothing else.
    assert {path: path.read_bytes() for path in (tmp_path / "work").rglob("*") if path.is_file()} == before
