"""The report of sequence experiments, from run folders made by hand: units, the papers' numbers, divergence."""

import csv
import io
import json
import math
import re

import pytest

from experiments.recurrence_ablation import Config, cells
from experiments.recurrence_report import report, score_text, scores_of
from experiments.recurrence_tables import DIFFERENCES, PAPER
from experiments.sequence_recipes import RECIPES
from experiments.sequence_tasks import TASKS
from research.analysis import recurrence_figures

FAILURE = {"failure": "the loss is not finite at step 30", "failed_at_step": 30}
# Chung et al. 2014, Table 2, test: tanh, GRU, LSTM.
TABLE_2 = {
    "nottingham": (3.13, 3.23, 3.20),
    "jsb": (9.10, 8.54, 8.67),
    "muse": (6.23, 5.99, 6.23),
    "piano": (9.03, 8.82, 9.03),
}
# Bai et al. 2018, Table 1: LSTM, GRU, RNN; accuracies of the two orders of pixels in percent.
TABLE_1 = {
    ("mnist", None): (87.2, 96.2, 21.5),
    ("permuted_mnist", None): (85.7, 87.3, 25.3),
    ("adding", 600): (0.164, 5.3e-5, 0.177),
    ("copy", 1000): (0.0204, 0.0197, 0.0202),
    ("jsb", None): (8.45, 8.43, 8.91),
    ("nottingham", None): (3.29, 3.46, 4.05),
    ("words", None): (78.93, 92.48, 114.50),
    ("characters", None): (1.36, 1.37, 1.48),
}
ZAREMBA = {"small": 114.5, "medium": 82.7, "large": 78.4}


def result(test, metric="loss", baseline=None):
    """Of as many seeds as there are test scores; None where one diverged."""
    scores = {f"{split}_{metric}": test for split in ("train", "validation", "test")}
    seconds = {"compile": 1.0, "train": 2.5, "evaluate": 0.5, "checkpoint": 0.25}
    return scores | {"baseline": baseline, "params": 69_291, "steps": 40, "seconds": seconds}


def metrics(*rows, metric="loss"):
    return [{"step": 10 * n, f"validation_{metric}": list(row)} for n, row in enumerate(rows, start=1)]


def grid(recipe, task, *kinds, seeds=(0, 1), **flags):
    return cells(Config(recipes=(recipe,), tasks=(task,), cells=kinds, seeds=seeds, **flags))


def table(out, title):
    """The table under a title: first column -> the others, by name."""
    lines = out.split(f"\n{title}", 1)[1].split("\n\n")[0].splitlines()[1:]
    names, *rows = (re.split("  +", line) for line in lines if not line.startswith("without"))
    return {row[0]: dict(zip(names[1:], row[1:], strict=False)) for row in rows}


# What the papers printed, and in which unit


def test_the_papers_numbers():
    expected = {
        ("chung2014", task, None): dict(zip(("tanh", "gru_before", "lstm_peepholes"), scores, strict=True))
        for task, scores in TABLE_2.items()
    }
    for (task, length), scores in TABLE_1.items():
        scores = [1 - score / 100 for score in scores] if "mnist" in task else scores
        expected["bai2018", task, length] = dict(zip(("lstm", "gru", "tanh"), scores, strict=True))
    expected |= {(f"zaremba2014_{size}", "words", None): {"lstm": score} for size, score in ZAREMBA.items()}
    assert PAPER.keys() == expected.keys()
    for setting, scores in expected.items():
        assert PAPER[setting] == pytest.approx(scores), setting
    # What a preset runs is what stands in the table.
    assert {(recipe, task, None) for recipe, tasks in RECIPES.items() for task in tasks if recipe != "default"} == {
        (recipe, task, None) for recipe, task, _ in PAPER
    }
    assert DIFFERENCES.keys() == {recipe.split("_")[0] for recipe, *_ in PAPER}


@pytest.mark.parametrize(
    ("task", "values", "text"),
    [
        ("words", [math.log(100), math.log(120)], "110 ± 14 (n=2)"),  # a mean of perplexities, not of nats
        ("words", [math.log(78.9321)], "78.93"),
        ("words", [1e4, 1.0], "inf (n=2)"),
        ("words", [math.log(10_070.4), math.log(9929)], "10000 ± 100 (n=2)"),
        ("characters", [2 * math.log(2), math.log(2)], "1.5 ± 0.71 (n=2)"),
        ("digits", [0.125, 0.375], "25.00% ± 17.68 (n=2)"),
        ("permuted_mnist", [0.038], "3.80%"),
        ("jsb", [8.45, 8.65], "8.55 ± 0.14 (n=2)"),
        ("adding", [5.3e-5], "5.30e-05"),
        ("copy", [0.0204], "0.0204"),
        *((task, [], "failed") for task in ("words", "characters", "digits", "adding")),
    ],
)
def test_scores_are_in_the_unit_in_which_they_are_read(task, values, text):
    assert score_text(task, values) == text


def test_one_score_a_value():
    assert scores_of("words", [0.0, math.log(3)]) == pytest.approx([1, 3])
    assert scores_of("characters", [1.0]) == pytest.approx([1.442695])
    assert scores_of("nottingham", [3.2]) == [3.2]


# Reports


def test_published_numbers_stand_beside_ours(finished, tmp_path, capsys):
    lstm, tanh, mgu = grid("bai2018", "words", "lstm", "tanh", "mgu", units=(7, 5))
    (small,) = grid("zaremba2014_small", "words", "lstm", seeds=(5,))
    gru, own = (grid(recipe, "mnist", "gru", seeds=(0,))[0] for recipe in ("bai2018", "default"))
    short, full = grid("bai2018", "adding", "gru", seeds=(0,), lengths=(200, 600))
    for cell, test in ((lstm, [100, 120]), (tanh, [200, 200]), (mgu, [90, 90]), (small, [115])):
        finished(tmp_path, cell, result([math.log(score) for score in test]))
    for cell in (gru, own):
        finished(tmp_path, cell, result([0.05], "error", baseline=0.9))
    for cell in (short, full):
        finished(tmp_path, cell, result([0.01], baseline=1 / 6))
    every = [lstm, tanh, mgu, small, gru, own, short, full]
    report(tmp_path, [cell.name for cell in every])
    out = capsys.readouterr().out
    assert "not finished" not in out

    title, where = TASKS["words"].title, "perplexity where the validation loss was lowest"
    words = table(out, f"{title} (bai2018), {where}")
    assert words["LSTM"] == {
        "units": "7 + 5",
        "parameters": "69,291",
        "paper: test": "78.93",
        "train": "110 ± 14 (n=2)",
        "validation": "110 ± 14 (n=2)",
        "here: test": "110 ± 14 (n=2)",
        "steps": "40",
        "seconds": "4",
    }
    assert (words["tanh"]["paper: test"], words["MGU"]["paper: test"]) == ("114.5", "-")
    found = table(out, f"{title} (zaremba2014_small), {where}")
    assert (found["LSTM"]["paper: test"], found["LSTM"]["here: test"]) == ("114.5", "115")
    assert found["LSTM"]["units"] == "200 + 200"
    published, unpublished = (table(out, f"MNIST pixel by pixel{s}, error after") for s in (" (bai2018)", ""))
    assert (published["GRU"]["paper: test"], published["GRU"]["here: test"]) == ("3.80%", "5.00%")
    assert "paper: test" not in unpublished["GRU"] and unpublished["GRU"]["test"] == "5.00%"
    # The paper's number is that of its length alone.
    other, same = (table(out, f"adding problem, T = {length} (bai2018), mean") for length in (200, 600))
    assert same["GRU"]["paper: test"] == "5.30e-05" and "paper: test" not in other["GRU"]
    for paper in ("bai2018", "zaremba2014"):
        assert out.count(f"Differences from {paper}: {DIFFERENCES[paper]}.\n") == 1
    assert "Differences from chung2014" not in out and out.count("without memory: 0.1667\n") == 2


def figures_of(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "figures").iterdir()}


def test_diverged_seeds_are_counted_and_the_others_go_on(finished, tmp_path, capsys):
    tanh, irnn, lstm, gru = grid("default", "adding", "tanh", "irnn", "lstm", "gru", seeds=(3, 4, 5), lengths=(25,))
    finished(tmp_path, tanh, FAILURE, metrics([None, None, 0.3]))
    curve = metrics([0.2, 0.1, 0.4], [0.1, None, 0.2], [0.1, None, None])
    finished(tmp_path, irnn, result([0.2, None, 0.3], baseline=1 / 6), curve)
    finished(tmp_path, lstm, result([0.2, 0.1, 0.3], baseline=1 / 6), curve)
    names = [cell.name for cell in (tanh, irnn, lstm, gru)]
    report(tmp_path, names)
    out = capsys.readouterr().out
    found = table(out, "adding problem, T = 25, mean squared error after the last step (1 of 4 cells are not finished)")
    columns = ("test", "diverged")
    assert {cell: tuple(row.get(column) for column in columns) for cell, row in found.items()} == {
        "tanh": ("failed", "3 of 3"),
        "IRNN": ("0.25 ± 0.071 (n=2)", "1 of 3"),
        "LSTM": ("0.2 ± 0.1 (n=3)", None),
    }
    assert found["tanh"]["parameters"] == found["tanh"]["steps"] == "-" and found["tanh"]["seconds"] == "0"
    # Known from the runs that got to their end, though the first did not.
    assert "without memory: 0.1667\n" in out

    rows = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    columns = "task length cell recipe batch_size optimizer learning_rate clip_norm units params steps seed"
    columns += " train_loss train_error validation_loss validation_error test_loss test_error baseline"
    assert list(rows[0]) == [*columns.split(), "seconds_of_all_seeds", "failure", "final_state_sha256"]
    assert [(row["cell"], row["seed"], row["test_loss"], row["failure"]) for row in rows] == [
        *(("tanh", seed, "", FAILURE["failure"]) for seed in "345"),
        *(("irnn", seed, loss, "") for seed, loss in zip("345", ("0.2", "", "0.3"), strict=True)),
        *(("lstm", seed, loss, "") for seed, loss in zip("345", ("0.2", "0.1", "0.3"), strict=True)),
    ]
    assert {row["seconds_of_all_seeds"] for row in rows} == {"0", "4.25"}

    # The same runs give the same bytes, and nothing but failures is still a report.
    made = figures_of(tmp_path)
    assert made.keys() == {"loss_curves.png", "loss_curves.svg"}
    report(tmp_path, names)
    assert figures_of(tmp_path) == made
    capsys.readouterr()
    report(tmp_path, [tanh.name])
    out = capsys.readouterr().out
    assert "3 of 3" in out and "without memory" not in out


def test_every_recipe_and_length_has_figures_of_its_own(finished, tmp_path, capsys, monkeypatch):
    drawn, draw = [], recurrence_figures.score_against_length
    monkeypatch.setattr(
        recurrence_figures, "score_against_length", lambda *a, **options: drawn.append(a) or draw(*a, **options)
    )
    norms = {"initial": [[1e-3, 0.1, 1.0]], "final": [[0.5, 0.7, 1.0]]}
    every = [
        cell
        for recipe in ("default", "bai2018")
        for cell in grid(recipe, "adding", "lstm", "gru", seeds=(0,), lengths=(25, 50))
    ]
    for cell in every:
        found = FAILURE if (cell.cell, cell.length) == ("lstm", 50) else result([1 / cell.length], baseline=1 / 6)
        run = finished(tmp_path, cell, found, metrics([0.2], [0.1]))
        if found is not FAILURE and cell.cell == "lstm":
            (run.path / "gradients.json").write_text(json.dumps(norms))
    report(tmp_path, [cell.name for cell in every])
    # The baseline is there where only the second cell has a result.
    scores = {"LSTM": {25: [0.04], 50: []}, "GRU": {25: [0.04], 50: [0.02]}}
    assert drawn == 2 * [(scores, "test mean squared error", {25: 1 / 6, 50: 1 / 6})]
    stems = {
        f"{stem}{recipe}" for stem in ("adding_against_length", "gradient_adding25") for recipe in ("", "_bai2018")
    }
    made = figures_of(tmp_path)
    assert made.keys() == {f"{stem}.{suffix}" for stem in (*stems, "loss_curves") for suffix in ("png", "svg")}
    out = capsys.readouterr().out
    assert all(f"{tmp_path}/figures/{name}" in out for name in made)
    svg = made["gradient_adding25_bai2018.svg"].decode()
    assert "T = 25 (bai2018)" in svg and "before training" in svg and "after training" in svg
