"""The report of the nowcasting experiment, from run folders made by hand: the paper's numbers, seeds, divergence."""

import csv
import io
import re

import numpy as np
import pytest
import safetensors.numpy

from experiments.nowcasting_cells import BASELINES, Config, cells, label_of
from experiments.nowcasting_report import PAPER_CROSS_ENTROPY, PAPER_RADAR, SCORES, TITLES, report
from research.analysis import nowcast_figures
from research.data import radar

FAILURE = {"failure": "the loss is not finite at step 30", "failed_at_step": 30}
CROSS_ENTROPY = "cross-entropy (nats per sequence)"
RAIN = ("rainfall_mse", "csi", "far", "pod", "correlation")
METRICS = [{"step": step, "validation_loss": 900.0 - step} for step in (10, 20)]


def result(lead=3, params=616, minutes=None, **overall):
    """Scores whose means are `overall`; over lead times they rise by a tenth each."""
    by_lead = {name: [value * (0.9 + 0.1 * k) for k in range(lead)] for name, value in overall.items()}
    scores = {"scores": {"by_lead": by_lead, "overall": overall}, "minutes": minutes, "params": params}
    if not params:  # a baseline's
        return scores | {"examples": {"train": 1_200, "validation": 30, "test": 40}}
    losses = {f"{split}_loss": 900.0 for split in ("train", "validation", "test")}
    times = {"steps": 40, "seconds": {"compile": 1.0, "train": 2.5}, "final_state_sha256": "5a" * 32}
    return result(lead, 0, minutes, **overall) | {"params": params} | losses | times


def grid(dataset, *networks, **flags):
    return cells(Config(dataset=dataset, networks=networks, **flags))


def table(out):
    """The title, and first column -> the others, by name."""
    title, *lines = out.removeprefix("\n").splitlines()
    names, *rows = (re.split("  +", line.strip()) for line in lines)
    rows = rows[: next(n for n, row in enumerate(rows) if len(row) != len(names))]
    return title, {row[0]: dict(zip(names[1:], row[1:], strict=True)) for row in rows}


def files_of(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "figures").iterdir()}


def stems_of(workdir):
    return {name.partition(".")[0] for name in files_of(workdir)}


@pytest.fixture
def drawn(monkeypatch):
    """Name of the function -> what it was given to draw: arguments and options."""
    found = {}
    for name in ("score_against_lead", "receptive_field", "strip", "animation"):
        draw = getattr(nowcast_figures, name)

        def record(*arguments, draw=draw, name=name, **options):
            found[name] = arguments, options
            return draw(*arguments, **options)

        monkeypatch.setattr(nowcast_figures, name, record)
    return found


def write(run, name, **arrays):
    (run.path / f"{name}.safetensors").write_bytes(safetensors.numpy.save(arrays))


def test_the_papers_numbers():
    """Shi et al. 2015, Tables 1 and 2."""
    assert PAPER_CROSS_ENTROPY == {
        "fc-2048-2048": 4832.49,
        "5x5-5x5-256": 3887.94,
        "5x5-5x5-128-128": 3733.56,
        "5x5-5x5-128-64-64": 3670.85,
        "9x9-1x1-128-128": 4782.84,
        "9x9-1x1-128-64-64": 4231.50,
    }
    assert {network: tuple(row[score] for score in RAIN) for network, row in PAPER_RADAR.items()} == {
        "3x3-3x3-64-64": (1.420, 0.577, 0.195, 0.660, 0.908),
        "fc-2000-2000": (1.865, 0.286, 0.335, 0.351, 0.774),
        "optical_flow": (1.684, 0.522, 0.301, 0.642, 0.850),
    }


def test_table_1_stands_beside_seeds(finished, tmp_path, capsys):
    networks = ("5x5-5x5-256", "3x3-3x3-4", "persistence")
    chosen = grid("moving_mnist", *networks, seeds=(0, 1, 2))
    for cell in chosen:
        baseline = cell.network in BASELINES
        scores = {"squared_error": 50.0 + cell.seed, "ssim": 0.5}
        scores |= {} if baseline else {"cross_entropy": 4000 + 12.0 * cell.seed}
        finished(tmp_path, cell, result(params=0 if baseline else 13_524_496, **scores), METRICS)
    report(tmp_path, [cell.name for cell in chosen])
    out = capsys.readouterr().out
    title, rows = table(out)
    frames = "64x64 pixels, 10 frames seen, 10 forecast"
    assert title == f"{TITLES['moving_mnist']}, {frames}; 1,200 training, 40 test sequences; test scores"
    ours = {
        "parameters": "13,524,496",
        CROSS_ENTROPY: "4012 ± 12 (n=3)",
        "squared error per frame": "51 ± 1 (n=3)",
        "SSIM": "0.5 ± 0 (n=3)",
        "steps": "40",
        "seconds": "10",  # of all seeds
    }
    nothing = {"parameters": "-", CROSS_ENTROPY: "-", "squared error per frame": "50", "SSIM": "0.5"}
    paper = "paper: cross-entropy"
    assert rows == {
        label_of(networks[0], "lstm"): ours | {paper: "3887.94"},
        label_of(networks[1], "lstm"): ours | {paper: "-"},
        label_of(networks[2], "lstm"): nothing | dict.fromkeys(("steps", "seconds", paper), "-"),
    }
    assert "paper: Shi et al. 2015, Table 1" in out and "rain is" not in out
    # Of what nothing else was written there is no strip, no animation and no receptive field.
    assert stems_of(tmp_path) == {"loss_curves", "scores_against_lead"}


@pytest.mark.parametrize(
    ("dataset", "flags"),
    [
        ("moving_digits", {}),
        ("moving_mnist", {"cells": ("gru",)}),
        ("moving_mnist", {"cells": ("lstm_by_position",)}),
        ("moving_mnist", {"digits": 3}),
        ("moving_mnist", {"horizon": 5}),
    ],
    ids=str,
)
def test_the_papers_number_is_of_its_data_and_its_cell_alone(finished, tmp_path, capsys, dataset, flags):
    (cell,) = grid(dataset, "5x5-5x5-256", **flags)
    finished(tmp_path, cell, result(cross_entropy=4000.0), METRICS)
    report(tmp_path, [cell.name])
    assert "paper" not in capsys.readouterr().out.split("\nwritten: ")[0]


def test_table_2_stands_beside_scores_of_rain(finished, tmp_path, capsys, drawn):
    networks = ("3x3-3x3-64-64", "optical_flow", "persistence")
    chosen = grid("radar", *networks, frame=8, observed=2, horizon=3)
    frames = np.random.default_rng(0).random((5, 8, 8), np.float32)
    numbers = dict(zip(RAIN, (1.2344, 0.5, 0.25, None, 0.875), strict=True))  # no rain was seen
    for cell in chosen:
        baseline = cell.network in BASELINES
        found = result(params=0 if baseline else 896_260, minutes=5, **dict.fromkeys(RAIN, 1.0))
        found["scores"]["overall"] = numbers | ({} if baseline else {"cross_entropy": 123.0})
        found["scores"]["by_lead"]["pod"] = [None] * 3
        run = finished(tmp_path, cell, found, () if baseline else METRICS)
        write(run, "example", frames=frames, prediction=frames[2:] / 2)
    report(tmp_path, [cell.name for cell in chosen])
    out = capsys.readouterr().out
    title, rows = table(out)
    assert title.startswith(f"{TITLES['radar']}, ")
    columns = {score: SCORES[score][0] for score in RAIN}
    assert len(rows) == len(networks)
    for row in rows.values():
        assert [row[columns[score]] for score in ("rainfall_mse", "csi", "far", "correlation")] == [
            *("1.23", "0.5", "0.25", "0.875")
        ]
        assert columns["pod"] not in row
    assert "rain is 0.5 mm/h or more" in out
    _, paper = table(out.split("all frames\n")[1])
    assert list(paper) == [label_of("3x3-3x3-64-64", "lstm"), label_of("fc-2000-2000", "lstm"), "ROVER2"]
    for found, expected in zip(paper.values(), PAPER_RADAR.values(), strict=True):
        assert found == {columns[score]: f"{value:g}" for score, value in expected.items()}
    assert stems_of(tmp_path) == {"loss_curves", "scores_against_lead", "strip", "forecast"}

    # Drawn are minutes and mm/h.
    labels = [label_of(network, "lstm") for network in networks]
    for name in ("strip", "animation"):
        (inputs, truth, predictions, *_), options = drawn[name]
        rain = radar.to_rain_from_grey(frames)
        np.testing.assert_allclose(np.concatenate([inputs, truth]), rain)
        assert list(predictions) == labels
        np.testing.assert_allclose(predictions[labels[0]], radar.to_rain_from_grey(frames[2:] / 2))
        assert (options["scale"], options["minutes"], len(inputs)) == ("rain", 5, 2)
    (panels, axes), options = drawn["score_against_lead"]
    assert panels.keys() <= axes.keys() and len(panels) == 4  # not the POD, which nothing has
    assert options == {"minutes": 5, "baselines": labels[1:]}


def test_the_published_sequences_have_a_table_of_their_own(finished, tmp_path, capsys):
    chosen = grid("moving_mnist", "5x5-5x5-256", "persistence", published="mnist_test_seq.npy")
    for cell in chosen:
        found = result(squared_error=50.0, ssim=0.5)
        found["published_scores"] = result(squared_error=60.0, ssim=0.25)["scores"]
        found["examples"]["published"] = 10_000
        finished(tmp_path, cell, found, METRICS)
    report(tmp_path, [cell.name for cell in chosen])
    out = capsys.readouterr().out
    _, rows = table(out.split("experiments/nowcasting.py\n")[1])
    assert "The 10,000 published sequences" in out
    assert [(row["squared error per frame"], row["SSIM"]) for row in rows.values()] == [("60", "0.25")] * 2
    assert all("paper: cross-entropy" not in row for row in rows.values())  # its test set was another


def test_diverged_seeds_are_counted_and_the_others_go_on(finished, tmp_path, capsys):
    chosen = grid("moving_digits", "fc-3", "3x3-3x3-2", "3x3-1x1-2", seeds=(0, 1, 2))
    by_name = {cell.name: cell for cell in chosen}
    for cell in chosen:
        if cell.network == "3x3-1x1-2":
            continue  # not finished
        lost = cell.network == "fc-3" or cell.seed == 0
        metrics = METRICS[:1] if lost else METRICS
        finished(tmp_path, cell, FAILURE if lost else result(cross_entropy=100.0 + 10 * cell.seed), metrics)
    report(tmp_path, list(by_name))
    out = capsys.readouterr().out
    title, rows = table(out)
    # Known from the runs that got to their end, though the first did not.
    assert "; 1,200 training, 40 test sequences; " in title and "3 of 9 cells are not finished" in title
    conv, fc = (rows[label_of(network, "lstm")] for network in ("3x3-3x3-2", "fc-3"))
    assert (conv[CROSS_ENTROPY], conv["diverged"]) == ("115 ± 7.1 (n=2)", "1 of 3")
    assert (conv["parameters"], conv["steps"], conv["seconds"]) == ("616", "40", "7")
    assert (fc[CROSS_ENTROPY], fc["diverged"], fc["parameters"], fc["steps"]) == ("-", "3 of 3", "-", "-")

    found = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert sorted((row["network"], row["seed"], row["cross_entropy"], row["failure"]) for row in found) == [
        ("3x3-3x3-2", "0", "", FAILURE["failure"]),
        ("3x3-3x3-2", "1", "110.0", ""),
        ("3x3-3x3-2", "2", "120.0", ""),
        *(("fc-3", seed, "", FAILURE["failure"]) for seed in "012"),
    ]
    made = files_of(tmp_path)
    report(tmp_path, list(by_name))
    assert files_of(tmp_path) == made
    capsys.readouterr()
    report(tmp_path, [name for name, cell in by_name.items() if cell.network == "fc-3"])
    assert "3 of 3" in capsys.readouterr().out


def test_what_is_drawn_is_of_the_first_seed_that_has_it(finished, tmp_path, capsys, drawn):
    networks = ("3x3-3x3-2", "1x1-1x1-2", "5x5-3x3-2", "persistence")
    chosen = grid("moving_digits", *networks, seeds=(0, 1), frame=8, observed=2, horizon=3)
    random = np.random.default_rng(0)
    frames, predictions, maps = random.random((5, 8, 8), np.float32), {}, {}
    for cell in chosen:
        if (cell.network, cell.seed) == ("3x3-3x3-2", 0):
            finished(tmp_path, cell, FAILURE, METRICS[:1])
            continue
        baseline = cell.network in BASELINES
        found = result(params=0 if baseline else 616, squared_error=10.0 + cell.seed)
        found |= {} if baseline else {"receptive_field": [3, 5]}
        run = finished(tmp_path, cell, found, METRICS)
        if cell.network == "5x5-3x3-2":
            continue  # its files are gone
        name, size = label_of(cell.network, cell.cell), 7 if cell.network == "3x3-3x3-2" else 3
        prediction, field = random.random((3, 8, 8), np.float32), random.random((2, size, size), np.float32)
        predictions.setdefault(name, prediction)
        write(run, "example", frames=frames, prediction=prediction)
        if not baseline:
            maps.setdefault(name, field)
            write(run, "receptive_field", maps=field)
    report(tmp_path, [cell.name for cell in chosen])
    assert stems_of(tmp_path) == {"loss_curves", "scores_against_lead", "receptive_field", "strip", "forecast"}
    out = capsys.readouterr().out
    assert all(f"figures/{name}" in out for name in files_of(tmp_path))

    (inputs, truth, shown), options = drawn["strip"]
    assert (options["scale"], options["minutes"]) == ("grey", None)
    np.testing.assert_array_equal(inputs, frames[:2])
    np.testing.assert_array_equal(truth, frames[2:])
    assert shown.keys() == predictions.keys()
    for name, prediction in predictions.items():
        np.testing.assert_array_equal(shown[name], prediction)
    (fields, sizes), _ = drawn["receptive_field"]
    assert sizes == {name: [3, 5] for name in maps}
    conv, still = (fields[label_of(network, "lstm")] for network in networks[:2])
    np.testing.assert_array_equal(conv, maps[label_of("3x3-3x3-2", "lstm")])
    # The smaller one stands in the middle of a map of the same size.
    np.testing.assert_array_equal(still[:, 2:5, 2:5], maps[label_of("1x1-1x1-2", "lstm")])
    assert still.shape == conv.shape and np.count_nonzero(still) == 2 * 3 * 3
    (panels, _), options = drawn["score_against_lead"]
    assert options == {"minutes": None, "baselines": [label_of("persistence", "lstm")]}
    (scores,) = panels.values()
    by_hand = [[value * (0.9 + 0.1 * k) for k in range(3)] for value in (10.0, 11.0)]
    for network in networks:
        rows = {"3x3-3x3-2": by_hand[1:], "persistence": by_hand[:1]}.get(network, by_hand)
        np.testing.assert_allclose(scores[label_of(network, "lstm")], rows)


def test_figures_tell_what_made_them(finished, tmp_path, capsys):
    (cell,) = grid("moving_digits", "fc-3")
    run = finished(tmp_path, cell, result(cross_entropy=100.0), METRICS)
    report(tmp_path, [cell.name])
    for name in ("loss_curves", "scores_against_lead"):
        svg = (tmp_path / "figures" / f"{name}.svg").read_text()
        assert cell.name in svg and run.sha256 in svg and run.environment["command"] in svg
