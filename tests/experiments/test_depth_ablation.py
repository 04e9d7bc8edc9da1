"""The depth ablation: its grid, the paper's recipe, and everything that a finished grid leaves behind."""

import csv
import functools
import io
import json
import os
import pathlib
import re
import runpy
import shutil
import statistics
import struct

import numpy as np
import pytest

from experiments import depth_ablation, runner
from experiments import images as experiment_images
from experiments.depth_ablation import Config
from research.data import images
from research.errors import CarouselError, UsageError
from research.training import loop

SHARED = pathlib.Path(os.environ.get("CAROUSEL_DATA", pathlib.Path(__file__).parents[3] / "shared/data"))
HE2015 = depth_ablation.EXPERIMENT.presets["he2015"]
RUN_FILES = {"config.json", "environment.json", "metrics.jsonl", "result.json", "signal.json", "checkpoints", "lock"}
FIGURES = ("error_curves", "error_against_depth", "layer_responses", "signal")


# The grid


def test_names_are_unique_and_tell_the_cells_apart():
    grid = depth_ablation.cells(Config(depths=(8, 14, 20), seeds=(0, 1, 10)))
    assert len(grid) == len({cell.name for cell in grid}) == 3 * 2 * 3
    assert {(cell.block, cell.depth, cell.seed) for cell in grid} == {
        (block, depth, seed) for block in ("plain", "residual") for depth in (8, 14, 20) for seed in (0, 1, 10)
    }
    assert {cell.name for cell in grid}.isdisjoint(cell.name for cell in depth_ablation.cells(Config(width=4)))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 150),  # 15 epochs of 1,280 / 128
        ({"epochs": 3}, 30),
        ({"epochs": 1, "batch_size": 100}, 10),
        ({"epochs": 1, "batch_size": 1280}, 1),
        ({"steps": 7}, 7),
        ({"dataset": "mnist"}, 860),
        ({"dataset": "cifar10"}, 3520),
    ],
)
def test_epochs_become_steps(changes, steps):
    assert {cell.steps for cell in depth_ablation.cells(Config(**changes))} == {steps}


@pytest.mark.parametrize(
    ("steps", "evaluations", "steps_per_call", "every"),
    [(150, 10, 10, 20), (150, 15, 10, 10), (150, 1, 10, 150), (4, 2, 2, 2), (30, 30, 1, 1), (5, 100, 10, 10)],
)
def test_evaluations_fall_between_stretches(steps, evaluations, steps_per_call, every):
    config = Config(steps=steps, evaluations=evaluations, steps_per_call=steps_per_call)
    assert depth_ablation.cells(config)[0].evaluate_every == every


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (8, 21)}, "depth 21 is not 6n\\+2.*try 20 or 26"),
        ({"depths": (2,)}, "depth 2 is not.*try 8 or 14"),
        ({"depths": (-4,)}, "depth -4 is not.*try 8 or 14"),
        ({"depths": (0,)}, "depth 0 is not.*try 8"),
        ({"batch_size": 1281}, "batch_size=1281: digits has 1280 training images"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: give a positive number"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"devices": 3, "batch_size": 16}, "batch_size=16 does not divide by 3 devices"),
    ],
)
def test_a_grid_that_cannot_be_trained_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        depth_ablation.cells(Config(**changes))


def test_defaults_of_the_data_sets():
    grids = {name: depth_ablation.cells(Config(dataset=name))[0] for name in images.LOADERS}
    assert {name: cell.augmentation for name, cell in grids.items()} == {
        "digits": "none",
        "mnist": "none",
        "cifar10": "crop_and_flip",
    }
    assert {name: cell.width for name, cell in grids.items()} == {"digits": 8, "mnist": 8, "cifar10": 16}
    assert depth_ablation.cells(Config(dataset="cifar10", augmentation="none"))[0].augmentation == "none"


def test_where_and_on_how_many_devices_is_no_part_of_a_cell():
    plain, moved = (
        runner.identity(depth_ablation.cells(Config(**changes))[0])
        for changes in ({}, {"data_dir": "elsewhere", "devices": 4, "parallel": "jit"})
    )
    assert plain == moved
    assert plain != runner.identity(depth_ablation.cells(Config(weight_decay=0.0))[0])


@pytest.mark.parametrize("name", sorted(images.LOADERS))
def test_the_number_of_training_images_is_that_of_the_loader(name, tmp_path):
    folder = SHARED
    if name == "cifar10" and (SHARED / "cifar10/unpack.py").exists():
        pytest.importorskip("PIL", reason="the packed CIFAR-10 needs Pillow")
        folder = tmp_path
        runpy.run_path(str(SHARED / "cifar10/unpack.py"))["main"](folder)
    try:
        data = images.load(name, str(folder))
    except CarouselError as error:
        pytest.skip(f"no {name} to read, set CAROUSEL_DATA: {error}")
    assert images.TRAIN_EXAMPLES[name] == len(data.train)


# The paper's recipe, as run() hands it to the trainer


class Handed(Exception):
    """What reached the trainer."""


def handed(monkeypatch, cell):
    def stop(*arguments, start):
        assert start is None
        raise Handed(*arguments)

    monkeypatch.setattr(loop, "train", stop)
    digits = images.load("digits")
    monkeypatch.setattr(experiment_images, "load", lambda *_: digits)
    with pytest.raises(Handed) as caught:
        depth_ablation.run(cell, loop.Context(None, "", None))
    return caught.value.args


def test_the_preset_is_the_papers_recipe(monkeypatch):
    grid = depth_ablation.cells(Config(**HE2015))
    assert [cell.depth for cell in grid if cell.block == "residual"] == [20, 32, 44, 56, 110]
    assert len(grid) == 10
    for cell in grid:
        model, task, _, schedule, splits, plan, _ = handed(monkeypatch, cell)
        assert (cell.dataset, cell.width, cell.weight_decay) == ("cifar10", 16, 1e-4)
        assert (plan.steps, plan.batch_size, plan.seed) == (64_000, 128, cell.seed)
        assert plan.evaluate_every == 1_000 and plan.evaluate_every % plan.steps_per_call == 0
        assert task.keywords["crop"] == 4 and task.keywords["flip"] is True
        assert [stage.units for stage in model().stages] == [(cell.depth - 2) // 6] * 3 and model().residual == (
            cell.block == "residual"
        )
        assert model(axis_name="batch").axis_name == "batch"
        rate = functools.cache(lambda step, schedule=schedule: float(schedule(step)))
        warm = cell.depth == 110
        assert [rate(0), rate(399)] == pytest.approx([0.01 if warm else 0.1] * 2)
        assert [rate(400), rate(31_999)] == pytest.approx([0.1, 0.1])
        assert [rate(32_000), rate(47_999)] == pytest.approx([0.01, 0.01])
        assert [rate(48_000), rate(63_999)] == pytest.approx([0.001, 0.001])


@pytest.mark.parametrize(
    ("augmentation", "crop", "flip"), [("none", 0, False), ("crop", 4, False), ("crop_and_flip", 4, True)]
)
def test_augmentation_reaches_the_task(monkeypatch, augmentation, crop, flip):
    (cell, *_) = depth_ablation.cells(Config(augmentation=augmentation))
    _, task, _, _, splits, _, _ = handed(monkeypatch, cell)
    assert (task.keywords["crop"], task.keywords["flip"]) == (crop, flip)
    # The mean is that of the training images alone.
    first, last = splits.range("train")
    np.testing.assert_allclose(task.keywords["mean"], splits.arrays["images"][first:last].mean(0), rtol=1e-6)
    assert [splits.range(name) for name in ("train", "validation", "test")] == [(0, 1280), (1280, 1497), (1497, 1797)]


# A finished grid


def rows(workdir):
    return list(csv.DictReader(io.StringIO((workdir / "summary.csv").read_text())))


def outputs(workdir):
    names = [f"figures/{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg")]
    return {name: (workdir / name).read_bytes() for name in ("summary.csv", *names)}


def check_grid(workdir, depths, seeds):
    assert {path.name for path in (workdir / "figures").iterdir()} == {
        f"{n}.{s}" for n in FIGURES for s in ("png", "svg")
    }
    for name, content in outputs(workdir).items():
        if name.endswith("png"):
            assert content.startswith(b"\x89PNG\r\n\x1a\n") and min(struct.unpack(">2I", content[16:24])) > 200
        elif name.endswith("svg"):
            assert content.startswith(b"<?xml") and content.rstrip().endswith(b"</svg>")
    found = rows(workdir)
    columns = "dataset block depth width seed steps batch_size learning_rate augmentation params failure seconds"
    columns += " train_error validation_error test_error train_loss validation_loss test_loss final_state_sha256"
    columns += " compile_seconds train_seconds evaluate_seconds checkpoint_seconds examples_per_second"
    assert set(columns.split()) == found[0].keys()
    assert [(row["block"], int(row["depth"]), int(row["seed"])) for row in found] == [
        (block, depth, seed) for depth in depths for block in ("plain", "residual") for seed in seeds
    ]
    assert {path.name for path in (workdir / "runs").iterdir()} == {
        f"{row['block']}-{row['depth']}-w4-seed{row['seed']}" for row in found
    }
    assert len({row["final_state_sha256"] for row in found}) == len(found)
    for row in found:
        folder = workdir / "runs" / f"{row['block']}-{row['depth']}-w4-seed{row['seed']}"
        assert {path.name for path in folder.iterdir()} == RUN_FILES
        result = json.loads((folder / "result.json").read_text())
        assert all(
            row[name] == str(result[name]) for name in ("train_error", "test_loss", "params", "final_state_sha256")
        )
        assert 0 <= result["test_error"] <= 1 and result["steps"] == 4
        blocks = (result["params"] > 0) and (int(row["depth"]) - 2) // 2
        signal = json.loads((folder / "signal.json").read_text())
        for moment in ("initial", "final"):
            assert len(signal[moment]["block_input_gradient_norm"]) == blocks
            assert len(signal[moment]["weight_gradient_norm"]) == 2 * blocks
            assert all(value > 0 for value in signal[moment]["weight_gradient_norm"])
        assert signal["initial"] != signal["final"]
    commands = {json.loads(path.read_text())["command"] for path in workdir.glob("runs/*/environment.json")}
    assert len(commands) == 1 and "experiments.depth_ablation" in commands.pop()


def test_smoke_leaves_every_file(smoke):
    check_grid(smoke.workdir, (8,), (0, 1, 2))
    assert str(smoke.workdir / "summary.csv") in smoke.stdout
    progress = smoke.stderr.splitlines()
    assert all(re.match(r"\[[1-6]/6\] (plain|residual)-8-w4-seed[012]\b", line) for line in progress), progress


def test_seeds_give_mean_and_spread_and_their_number(smoke):
    for block in ("plain", "residual"):
        errors = [float(row["test_error"]) for row in rows(smoke.workdir) if row["block"] == block]
        shown = f"{statistics.fmean(errors):.2%} ± {100 * statistics.stdev(errors):.2f} (n=3)"
        (line,) = [line for line in smoke.stdout.splitlines() if line.startswith(block)]
        assert shown in line


def test_the_report_alone_gives_the_same_bytes_again(commands, smoke, tmp_path):
    # Elsewhere, so that nothing of the first report is left; twice.
    workdir = tmp_path / "again"
    shutil.copytree(smoke.workdir / "runs", workdir / "runs")
    flags = ("--smoke", "--depths=8", "--seeds=0,1,2", "--report_only", f"--workdir={workdir}")
    made = []
    for _ in range(2):
        done = commands.run(*flags)
        assert (done.returncode, done.stderr) == (0, "")
        made.append(outputs(workdir))
    assert made[0] == made[1] == outputs(smoke.workdir)
    # It does read the runs.
    path = workdir / "runs" / "plain-8-w4-seed0" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test_error": 0.5}))
    assert commands.run(*flags).returncode == 0
    changed = outputs(workdir)
    assert all(changed[name] != made[0][name] for name in ("summary.csv", "figures/error_against_depth.svg"))


def test_a_report_of_failed_and_missing_runs(commands, smoke, tmp_path):
    workdir = tmp_path / "work"
    for name in ("plain-8-w4-seed0", "residual-8-w4-seed0"):
        shutil.copytree(smoke.workdir / "runs" / name, workdir / "runs" / name)
    (workdir / "runs" / "plain-8-w4-seed0" / "result.json").write_text(
        '{"failure": "it diverged", "failed_at_step": 3}'
    )
    (workdir / "runs" / "plain-8-w4-seed0" / "signal.json").unlink()
    done = commands.run("--smoke", "--depths=8,14", "--report_only", f"--workdir={workdir}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 of 4 cells are not finished" in done.stdout
    assert [row["failure"] for row in rows(workdir)] == ["it diverged", ""]
    assert rows(workdir)[0]["test_error"] == "" and re.search("plain .*failed", done.stdout)
    # Nothing but failures.
    done = commands.run("--smoke", "--depths=8", "--blocks=plain", "--report_only", f"--workdir={workdir}")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_report_of_nothing_says_so(commands, tmp_path):
    done = commands.run("--smoke", "--depths=8", "--report_only", f"--workdir={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no finished run among the 2 asked for") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_diverged_network_is_reported_and_the_others_are_trained(commands, tmp_path):
    # Only the residual network of two is left to train: with this rate its loss overflows.
    done = commands.run("--smoke", *commands.tiny, "--learning_rate=1e6", f"--workdir={tmp_path}")
    assert done.returncode == 1, done.stderr
    *progress, line = done.stderr.splitlines()
    assert not [note for note in progress if "error:" in note]
    assert re.fullmatch(r"error: \S+/residual-8-w4-seed0: the loss is not finite at step \d .*--learning_rate", line)
    (row,) = rows(tmp_path)
    assert row["failure"] == line.removeprefix("error: ") and row["test_error"] == ""
    assert (tmp_path / "figures" / "error_curves.png").exists()
    last = (tmp_path / "runs" / "residual-8-w4-seed0" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] < int(re.search(r"at step (\d)", line)[1])


@pytest.mark.slow
def test_smoke_in_full(commands, tmp_path):
    done = commands.run("--smoke", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    check_grid(tmp_path, (8, 20, 56), (0,))
