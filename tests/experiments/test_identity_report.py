"""The report of the identity-mapping comparisons, from run folders made by hand: what stands where, and divergence."""

import csv
import dataclasses
import io
import re

import pytest

from experiments.identity_mappings import EXPERIMENT, Config, cells
from experiments.identity_report import differences, report
from research.analysis.results import Run

SUFFIXES = ("png", "svg")
SHORTCUTS = EXPERIMENT.presets["shortcuts"]
VALUES = [4.0, 2.0, 1.0]
SIGNAL = dict.fromkeys(("output_variance", "weight_gradient_norm", "block_input_gradient_norm"), VALUES)
FAILURE = {"failure": "the loss is not finite at step 300", "failed_at_step": 300}


def result(error, loss):
    return {
        **{f"{split}_error": error + shift for split, shift in (("train", -0.02), ("validation", 0.01), ("test", 0.0))},
        **{f"{split}_loss": loss for split in ("train", "validation", "test")},
        "params": 1_727_962,
        "steps": 64_000,
        "seconds": {"compile": 1.0, "train": 2.0, "evaluate": 0.5, "checkpoint": 0.25},
        "examples_per_second": 1_000.0,
        "final_state_sha256": "ab" * 32,
    }


def metrics(length):
    return [{"step": 100 * n, "loss": 1.0 / n} for n in range(1, length + 1)]


@pytest.fixture
def grid(finished, tmp_path):
    """Two seeds of three kinds of unit: one trains, one diverges once, one always. Returns the names of the cells."""
    variants = ("original", "scale_0.5_1", "dropout")
    chosen = cells(Config(**SHORTCUTS | {"variants": variants, "seeds": (0, 1)}))
    for cell in chosen:
        fails = cell.variant == "dropout" or (cell.variant, cell.seed) == ("scale_0.5_1", 1)
        outcome = FAILURE if fails else result(0.07 + 0.01 * cell.seed, 0.2 + 0.1 * cell.seed)
        signal = None if fails else {"initial": SIGNAL, "final": SIGNAL}
        finished(tmp_path, cell, outcome, metrics(3 if fails else 5), signal)
    return [cell.name for cell in chosen]


def table(out, title):
    """The table under a title: first column -> the others, by name."""
    lines = out.split(title, 1)[1].split("\n\n")[0].splitlines()[1:]
    names, *rows = (re.split("  +", line) for line in lines)
    return {row[0]: dict(zip(names[1:], row[1:], strict=False)) for row in rows}


def test_the_papers_numbers_stand_beside_ours_and_a_diverged_run_is_a_result(grid, tmp_path, capsys):
    report(tmp_path, grid)
    found = table(capsys.readouterr().out, "basic-110, cifar10: paper | here")
    assert found == {
        "original": {
            "paper: basic-110, test error": "6.61%",
            "here: test error": "7.50% ± 0.71 (n=2)",
            "training error": "5.50% ± 0.71 (n=2)",
            "training loss": "0.250 ± 0.071",
            "parameters": "1,727,962",
        },
        "scaling 0.5, 1": {
            "paper: basic-110, test error": "fail",
            "here: test error": "7.00%",
            "training error": "5.00%",
            "training loss": "0.200",
            "parameters": "1,727,962",
            "diverged": "1 of 2",
        },
        "dropout 0.5": {
            "paper: basic-110, test error": "fail",
            "here: test error": "failed",
            "training error": "failed",
            "training loss": "failed",
            "parameters": "-",
            "diverged": "2 of 2",
        },
    }


def test_a_network_of_its_own_has_a_table_and_figures_of_its_own(finished, tmp_path, capsys):
    networks = ("bottleneck-164", "basic-56", "single-110")
    chosen = cells(Config(networks=networks[:1], variants=("original", "norm_after_addition"), seeds=(0,)))
    chosen += cells(Config(networks=networks[1:], variants=("original", "exclusive_gate_-6"), seeds=(0,)))
    for cell in chosen:
        finished(tmp_path, cell, result(0.1, 0.3), metrics(2))
    report(tmp_path, [cell.name for cell in chosen])
    out = capsys.readouterr().out
    own, *others = (table(out, f"{network}, digits: paper | here") for network in networks)
    column = "paper: bottleneck-164, test error"
    assert (own["original"][column], own["BN after addition"][column]) == ("5.93%", "6.50%")
    # Beside the paper's ResNet-110 where the paper has no such network, or not all of its rows.
    for other in others:
        column = "paper: basic-110, test error"
        assert (other["original"][column], other["exclusive gate, b = -6"][column]) == ("6.61%", "8.70%")
    # No signal was measured, so none is drawn.
    names = {
        f"{kind}_{network}.{suffix}" for kind in ("errors", "curves") for network in networks for suffix in SUFFIXES
    }
    assert {path.name for path in (tmp_path / "figures").iterdir()} == names


def test_files_of_a_report(grid, tmp_path, capsys):
    report(tmp_path, [*grid, "original-basic-110-w16-seed7"])
    out = capsys.readouterr().out
    assert "(1 of 7 cells are not finished)" in out
    rows = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    columns = "dataset variant unit depth width seed steps batch_size learning_rate augmentation params failure seconds"
    columns += " train_error validation_error test_error train_loss validation_loss test_loss final_state_sha256"
    columns += " compile_seconds train_seconds evaluate_seconds checkpoint_seconds examples_per_second"
    assert rows[0].keys() == set(columns.split())
    assert [f"{row['variant']}-{row['unit']}-{row['depth']}-w{row['width']}-seed{row['seed']}" for row in rows] == grid
    assert [row["failure"] for row in rows] == ["", "", "", *[FAILURE["failure"]] * 3]
    assert [row["seconds"] for row in rows] == ["3.75"] * 3 + ["0"] * 3
    assert rows[0]["test_error"] == "0.07" and rows[5]["test_error"] == ""

    files = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert files.keys() == {f"{kind}_basic-110.{s}" for kind in ("errors", "curves", "signal") for s in SUFFIXES}
    for name, content in files.items():
        assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
        assert f"{tmp_path}/figures/{name}" in out
    report(tmp_path, grid)
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == files


# What is not the paper's


def runs_of(**changes):
    """Runs as `differences` reads them: configurations alone."""
    grid = cells(Config(**SHORTCUTS | {"variants": ("original",)} | changes))
    return [Run(None, dataclasses.asdict(cell), {}, {}, [], "") for cell in grid]


@pytest.mark.parametrize("preset", sorted(EXPERIMENT.presets))
def test_a_preset_differs_in_nothing_but_the_statistic(preset):
    (line,) = differences(runs_of(**EXPERIMENT.presets[preset]))
    assert line.strip().startswith("mean ± standard deviation over seeds (paper: median of 5")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"dataset": "digits", "augmentation": "crop_and_flip"}, "data: digits (paper: cifar10)"),
        ({"width": 8}, "width: 8 (paper: 16)"),
        ({"steps": 6_400}, "steps: 6400 (paper: 64000)"),
        ({"batch_size": 64}, "examples a step: 64 (paper: 128)"),
        ({"learning_rate": 0.05}, "learning rate: 0.05 (paper: 0.1)"),
        ({"weight_decay": 0.0}, "weight decay: 0.0 (paper: 0.0001)"),
        ({"warmup_steps": 10}, "warm-up steps: 10 (paper: 400)"),
        ({"augmentation": "none"}, "augmentation: none (paper: crop_and_flip)"),
        ({"seeds": (0, 1, 2)}, "seeds: 3 (paper: 5)"),
        (
            {"networks": ("basic-110", "basic-56")},
            "networks: basic-56 (paper: basic-110, bottleneck-164, single-110, bottleneck-1001)",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_the_papers_is_listed(changes, line):
    assert [found.strip() for found in differences(runs_of(**changes))[:-1]] == [line]


def test_the_differences_are_printed(finished, tmp_path, capsys):
    (cell,) = cells(Config(networks=("basic-8",), variants=("original",), seeds=(0,)))
    finished(tmp_path, cell, result(0.1, 0.3), metrics(2))
    report(tmp_path, [cell.name])
    printed = capsys.readouterr().out.split("Differences of these runs from the paper's:\n")[1].split("\n\n")[0]
    names = [line.split(":")[0].strip() for line in printed.splitlines()]
    expected = ["data", "width", "steps", "warm-up steps", "augmentation", "seeds", "networks"]
    assert names[:-1] == expected
