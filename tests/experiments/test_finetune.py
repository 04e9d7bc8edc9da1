"""Fine-tuning: the images that the network sees, what it starts from, what the runs record, and the report."""

import csv
import dataclasses
import functools
import io
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments import finetune, runner
from experiments.finetune import Config
from research.data import files
from research.errors import CarouselError, UsageError
from research.models import imagenet_resnet, weights
from research.training import loop, run_folder

HEAD = {"params/head/kernel", "params/head/bias"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Random weights of a ResNet-18 of 5 classes, in our format. Not to be written to."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    weights.save(path, unflatten_dict(random_arrays(), sep="/"))
    return path


def random_arrays():
    model, random = imagenet_resnet(18, num_classes=5), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))

    def draw(name, shape):
        if name.endswith("kernel"):
            return random.normal(0, np.sqrt(2 / np.prod(shape[-4:-1])), shape)
        return random.uniform(0.9, 1.1, shape) if name.endswith(("scale", "var")) else random.normal(0, 0.1, shape)

    flat = flatten_dict(shapes, sep="/").items()
    return {name: np.asarray(draw(name, leaf.shape), np.float32) for name, leaf in flat}


def assert_features_of(file, variables):
    """All but the head is bit by bit what the file holds, and the head is another one of ten classes."""
    there, here = (flatten_dict(v, sep="/") for v in (weights.load(file), variables))
    assert there.keys() == here.keys() and here.keys() > HEAD
    for name in here.keys() - HEAD:
        np.testing.assert_array_equal(here[name], there[name], err_msg=name)
    assert {name: here[name].shape for name in HEAD} == {"params/head/kernel": (512, 10), "params/head/bias": (10,)}


# What the network sees


def test_preparation_by_hand():
    """2x2 made 4x4: a new pixel's centre lies a quarter from one old centre and three quarters from the next."""
    pixels = np.uint8([[0, 255], [51, 204]]).reshape(1, 2, 2, 1)
    share = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    grey = share @ (pixels[0, :, :, 0] / 255) @ share.T
    expected = np.stack([(grey - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))], axis=-1)
    for prepared in (finetune.prepare(pixels, size=4), jax.jit(functools.partial(finetune.prepare, size=4))(pixels)):
        assert prepared.dtype == jnp.float32
        np.testing.assert_allclose(prepared, expected[None], rtol=1e-5, atol=1e-6)


def test_colours_keep_their_places_and_an_equal_size_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3)).astype(np.uint8)
    expected = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(finetune.prepare(pixels, size=6), expected, rtol=1e-5, atol=1e-6)


# The grid


def test_the_grid_of_a_file(file):
    grid = finetune.cells(Config(weights=str(file), seeds=(0, 1)))
    assert [cell.name for cell in grid] == [
        f"{start}-resnet18-s32-digits-seed{seed}" for start in ("weights", "scratch") for seed in (0, 1)
    ]
    digest = files.sha256(file.read_bytes())
    assert [cell.weights_sha256 for cell in grid] == [digest, digest, None, None]
    assert {cell.width for cell in grid} == {64}
    assert {cell.depth for cell in finetune.cells(Config(starts=("scratch",), depth=50))} == {50}
    assert {cell.depth for cell in finetune.cells(Config(starts=("scratch",)))} == {18}


def test_a_run_is_of_the_content_of_a_file_wherever_it_lies(file, tmp_path):
    here, _ = finetune.cells(Config(weights=str(file)))
    moved, altered = tmp_path / "moved.safetensors", tmp_path / "altered.safetensors"
    shutil.copy(file, moved)
    assert runner.identity(finetune.cells(Config(weights=str(moved)))[0]) == runner.identity(here)
    with run_folder.open_run(tmp_path / "run", runner.identity(here)):
        pass
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    altered.write_bytes(content)
    other, scratch = finetune.cells(Config(weights=str(altered)))
    assert runner.identity(scratch) == runner.identity(finetune.cells(Config(weights=str(file)))[1])
    with pytest.raises(UsageError, match=r"weights_sha256 is \"\w{64}\" there and \"\w{64}\" here"):
        run_folder.check_config(tmp_path / "run", runner.identity(other))
    # And where the file is replaced between two cells of a grid.
    with pytest.raises(CarouselError, match=r"altered\.safetensors has changed since this command began"):
        finetune.run(dataclasses.replace(other, weights_sha256=here.weights_sha256), None)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({}, 2, "--starts has weights: say which by --weights=FILE, or take --starts=scratch"),
        ({"weights": "FILE", "depth": 34}, 2, "--depth=34: FILE holds a ResNet-18; leave --depth out"),
        ({"starts": ("scratch",), "depth": 20}, 2, "depth 20 is none of the ImageNet networks"),
        (
            {"starts": ("scratch",), "width": 16},
            2,
            "--width=16: the first stage of an ImageNet network has 64 channels",
        ),
        ({"weights": "MISSING"}, 1, "cannot read MISSING: No such file"),
        ({"weights": "MISSING", "starts": ("scratch",)}, 1, "cannot read MISSING: No such file"),
        ({"weights": "TEXT"}, 1, "TEXT is not a safetensors file"),
        ({"weights": "CUT"}, 1, "CUT is damaged"),
        ({"weights": "THEIRS"}, 1, "THEIRS is not a file of weights in our format: make one by `python -m research"),
    ],
)
def test_a_grid_that_cannot_be_trained_is_refused(file, tmp_path, changes, code, message):
    paths = {"FILE": file} | {name: tmp_path / name for name in ("MISSING", "TEXT", "CUT", "THEIRS")}
    paths["TEXT"].write_text("a text that goes on for a while")
    paths["CUT"].write_bytes(file.read_bytes()[:-1])
    safetensors.numpy.save_file({"conv1.weight": np.zeros(2, np.float32)}, paths["THEIRS"], {"format": "pt"})
    if "weights" in changes:
        changes = changes | {"weights": str(paths[changes["weights"]])}
    with pytest.raises(CarouselError) as caught:
        finetune.cells(Config(**changes))
    line = str(caught.value)
    for name, path in paths.items():
        line = line.replace(str(path), name)
    assert message in line and "\n" not in line and caught.value.exit_code == code


def test_images_too_small_for_the_network_are_refused():
    (field,) = (field for field in dataclasses.fields(Config) if field.name == "image_size")
    assert field.metadata["minimum"] == 16  # the runner refuses less


# What run() hands to the trainer


class Handed(Exception):
    """What reached the trainer."""


def handed(monkeypatch, cell):
    def stop(*arguments, start):
        raise Handed(*arguments, start)

    monkeypatch.setattr(loop, "train", stop)
    with pytest.raises(Handed) as caught:
        finetune.run(cell, loop.Context(None, "", None))
    return caught.value.args


def test_the_trainer_gets_the_weights_and_the_preparation(monkeypatch, file):
    grid = finetune.cells(Config(weights=str(file), seeds=(0, 1), image_size=24))
    heads = []
    for cell in grid:
        _, task, _, schedule, splits, plan, _, start = handed(monkeypatch, cell)
        assert (plan.steps, plan.seed, float(schedule(0))) == (30, cell.seed, pytest.approx(0.01))
        assert task.keywords["prepare"](np.zeros((2, 8, 8, 1), np.uint8), None).shape == (2, 24, 24, 3)
        if cell.start == "weights":
            assert_features_of(file, start)
            heads.append(start["params"]["head"]["kernel"])
            assert splits.checksums["resnet18.safetensors"] == cell.weights_sha256
        else:
            assert start is None and "resnet18.safetensors" not in splits.checksums
        assert "optdigits.csv.gz" in splits.checksums
    assert len(heads) == 2 and not np.array_equal(*heads)


# A finished grid


@pytest.fixture(scope="module")
def finished(commands, file, tmp_path_factory):
    """The command at its smallest, two steps from weights and two from scratch. Not to be written to."""
    workdir = tmp_path_factory.mktemp("finetune") / "work"
    done = finetuning(
        commands, "--smoke", "--train_evaluation_examples=64", f"--weights={file}", f"--workdir={workdir}"
    )
    assert done.returncode == 0, done.stderr
    done.workdir = workdir
    return done


def finetuning(commands, *flags):
    script = "from experiments import finetune, runner; runner.main(finetune.EXPERIMENT)"
    # With the code generator's optimiser: without it these convolutions take longer than their compilation.
    return commands.script(script, f"--compilation_cache={commands.cache}", *flags, XLA_FLAGS="")


def run_of(finished, start):
    return finished.workdir / "runs" / f"{start}-resnet18-s16-digits-seed0"


def test_training_starts_from_the_weights_and_moves_them(finished, file):
    def variables(start, step):
        return weights.load(run_of(finished, start) / f"checkpoints/step_{step:08}.safetensors")

    first = variables("weights", 0)
    assert_features_of(file, first)
    with pytest.raises(AssertionError):
        assert_features_of(file, variables("scratch", 0))
    last = flatten_dict(variables("weights", 2), sep="/")
    still = [name for name, leaf in flatten_dict(first, sep="/").items() if np.array_equal(leaf, last[name])]
    assert not still  # all layers are trained, and the running averages go on
    losses = {start: run_folder.read_metrics(run_of(finished, start))[0]["loss"] for start in ("weights", "scratch")}
    assert losses["weights"] != losses["scratch"]


def test_runs_record_their_weights(finished, file):
    digest = files.sha256(file.read_bytes())
    for start, expected in (("weights", digest), ("scratch", None)):
        environment, config = (
            json.loads((run_of(finished, start) / f"{name}.json").read_text()) for name in ("environment", "config")
        )
        assert environment["data_checksums"].get("resnet18.safetensors") == expected == config["weights_sha256"]
        assert "weights" not in config and config["depth"] == 18


def test_table_and_figures(finished, file):
    title, header, *lines = finished.stdout.strip().splitlines()[:4]
    assert title == "ResNet-18, digits at 16x16: errors after 2 steps"
    assert re.split("  +", header)[:3] == ["start", "weights", "parameters"]
    digest = files.sha256(file.read_bytes())
    assert [line.split()[1:4] for line in lines] == [
        ["weights", digest[:12], "11,181,642"],
        ["scratch", "-", "11,181,642"],
    ]
    rows = list(csv.DictReader(io.StringIO((finished.workdir / "summary.csv").read_text())))
    assert [(row["start"], row["weights_sha256"], row["image_size"]) for row in rows] == [
        ("weights", digest, "16"),
        ("scratch", "", "16"),
    ]
    for row, line in zip(rows, lines, strict=True):
        assert f"{float(row['test_error']):.2%}" in line and 0 <= float(row["train_error"]) <= 1
    assert {path.name for path in (finished.workdir / "figures").iterdir()} == {
        f"{name}.{suffix}" for name in ("error_curves", "loss_curves") for suffix in ("png", "svg")
    }
    drawn = (finished.workdir / "figures/error_curves.svg").read_text()
    assert "from weights" in drawn and "from scratch" in drawn


def test_a_command_without_weights_is_one_line(commands, tmp_path):
    done = finetuning(commands, "--smoke", f"--workdir={tmp_path / 'work'}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --starts has weights: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "work").exists()
