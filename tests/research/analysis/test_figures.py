"""Figures: the same bytes from the same runs, anywhere; what made them is in them; and what they show."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

import research
from research.analysis import figures, signal_figures  # before pyplot: it chooses a backend that needs no display

plt = matplotlib.pyplot

ROOT = Path(research.__file__).parents[1]


def depth(run):
    return run.config["depth"]


def by_block(runs):
    return {block: [run for run in runs if run.config["block"] == block] for block in ("plain", "residual")}


def make_all(runs):
    """Every figure of the module from the runs, by name."""
    blocks = by_block(runs)
    against = {name: {d: [run for run in own if depth(run) == d] for d in (8, 20)} for name, own in blocks.items()}
    signals = {name: own[-2].read_json("signal.json") for name, own in blocks.items()}
    metrics = {"train_error": "training error", "test_error": "test error"}
    return {
        "curves": figures.error_curves(blocks, depth, "layers"),
        "against": figures.error_against(against, "layers", metrics),
        "signal": signal_figures.signal_propagation(signals, 20),
    }


def save_all(runs, folder):
    """Saves every figure and returns the files' names and hashes."""
    made_from = figures.provenance(runs)
    written = [
        path for name, figure in make_all(runs).items() for path in figures.save(figure, folder / name, made_from)
    ]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written}


# The same runs, the same bytes

ELSEWHERE = """
import importlib.util, json, sys
from pathlib import Path
from research.analysis.results import read_runs
spec = importlib.util.spec_from_file_location("test_figures", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
print(json.dumps(tests.save_all(read_runs(Path(name) for name in sys.argv[3:]), Path(sys.argv[2]))))
"""


def test_the_same_runs_give_the_same_bytes_here_and_elsewhere(grid, tmp_path):
    first = save_all(grid, tmp_path / "first")
    assert set(first) == {f"{name}.{suffix}" for name in ("curves", "against", "signal") for suffix in ("png", "svg")}
    assert len(set(first.values())) == 6
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == sorted(first)  # nothing else is left
    assert save_all(grid, tmp_path / "second") == first

    # In another process, with another order of sets, place, time zone, language and taste.
    shutil.copytree(tmp_path / "runs", tmp_path / "copied" / "runs")
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: red\nfont.family: monospace\nsvg.fonttype: path\n")
    environment = {
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": "12345",
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
        "TZ": "Asia/Tokyo",
        "SOURCE_DATE_EPOCH": "1000000000",
        "LC_ALL": "C",
    }
    copies = [str(tmp_path / "copied" / "runs" / run.path.name) for run in grid]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ELSEWHERE, __file__, str(tmp_path / "third"), *copies],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == first


def test_other_runs_give_other_bytes(grid, make_run, tmp_path):
    changed = make_run("plain-8-0b", {"block": "plain", "depth": 8, "seed": 0}, [0.9, 0.8, 0.7, 0.6])
    for name in ("first", "second"):
        figure = figures.error_curves(by_block(grid), depth, "layers")  # what is drawn stays: only the hashes differ
        figures.save(figure, tmp_path / name, figures.provenance(grid if name == "first" else [changed, *grid[1:]]))
    for suffix in ("png", "svg"):
        assert (tmp_path / f"first.{suffix}").read_bytes() != (tmp_path / f"second.{suffix}").read_bytes()


def test_making_figures_changes_no_global_style(grid, tmp_path):
    before = dict(matplotlib.rcParams)
    figures.save(make_all(grid)["against"], tmp_path / "against", {})
    assert dict(matplotlib.rcParams) == before


def test_saving_closes_the_figure(grid, tmp_path):
    open_before = plt.get_fignums()
    figure = figures.error_curves(by_block(grid), depth, "layers")
    assert plt.get_fignums() != open_before
    figures.save(figure, tmp_path / "curves", {})
    assert plt.get_fignums() == open_before


# Provenance


def test_files_carry_what_made_them(grid, tmp_path):
    made_from = figures.provenance(grid)
    png, svg = figures.save(make_all(grid)["curves"], tmp_path / "curves", made_from)
    with Image.open(png) as image:
        in_png = image.text
    assert in_png["Software"] == "carousel"
    (description,) = ET.parse(svg).iter("{http://purl.org/dc/elements/1.1/}description")
    for text in (in_png["Description"], description.text):
        assert json.loads(text) == made_from
    assert "dc:date" not in svg.read_text()
    assert made_from["commands"] == "launch/run depth_ablation --depths=8,20"
    assert made_from["commits"] == "c0ffee" * 6
    assert json.loads(made_from["runs"]) == {run.path.name: run.sha256 for run in grid}


@pytest.mark.parametrize(
    ("source", "commits"),
    [
        ({"commit": "abc", "dirty": False}, "abc"),
        ({"commit": "abc", "dirty": True}, "abc (with changes)"),
        ({"commit": None, "dirty": None}, "unknown"),
        (None, "unknown"),
    ],
)
def test_commits_are_marked(make_run, source, commits):
    run = make_run("a", {}, [0.5], environment={"command": "b", "source": source})
    assert figures.provenance([run, run])["commits"] == commits


def test_every_command_and_commit_is_named_once(make_run):
    runs = [
        make_run(f"{n}", {}, [0.5], environment={"command": command, "source": {"commit": commit, "dirty": False}})
        for n, (command, commit) in enumerate([("run b", "2"), ("run a", "1"), ("run b", "1")])
    ]
    made_from = figures.provenance(runs)
    assert (made_from["commands"], made_from["commits"]) == ("run a; run b", "1, 2")
    assert list(json.loads(made_from["runs"])) == ["0", "1", "2"]


# What is drawn


def lines(axis):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines() if len(line.get_xdata())]


def legend_texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_error_curves_show_every_run(grid):
    figure = figures.error_curves(by_block(grid), depth, "layers")
    assert [axis.get_title() for axis in figure.axes] == ["plain", "residual"]
    for axis, runs in zip(figure.axes, by_block(grid).values(), strict=True):
        drawn = lines(axis)
        expected = [run.series(name) for run in runs for name in ("error", "test_error")]
        assert drawn == [(steps, [100 * error for error in errors]) for steps, errors in expected]
        colours = [line.get_color() for line in axis.get_lines() if len(line.get_xdata())]
        assert colours == [figures.COLOURS[0]] * 4 + [figures.COLOURS[1]] * 4  # a colour a depth, shared by its seeds
    assert legend_texts(figure) == ["8 layers", "20 layers", "training error", "test error"]


def test_errors_against_depth_are_means_and_deviations(grid):
    groups = {name: {d: [r for r in own if depth(r) == d] for d in (20, 8)} for name, own in by_block(grid).items()}
    figure = figures.error_against(groups, "layers", {"test_error": "test error"})
    (axis,) = figure.axes
    assert (axis.get_title(), axis.get_xlabel()) == ("test error", "layers")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["8", "20"]
    plain, residual = (container.lines for container in axis.containers)
    # Errors are base + 0.05 + 0 or 0.01; of plain-20 one seed diverged and the other is alone.
    for (line, _, (bars,)), means, deviations in (
        (plain, [35.5, 35.0], [0.5 * 2**0.5, 0]),
        (residual, [25.5, 25.5], [0.5 * 2**0.5] * 2),
    ):
        assert list(line.get_xdata()) == [0, 1]
        assert list(line.get_ydata()) == pytest.approx(means)
        heights = [(segment[1][1] - segment[0][1]) / 2 for segment in bars.get_segments()]
        assert heights == pytest.approx(deviations)
    assert legend_texts(figure) == ["plain (n = 1-2)", "residual (n = 2)"]


def test_signals_are_drawn_before_and_after_training(grid):
    figure = make_all(grid)["signal"]
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["20 layers, at initialisation"] * 3 + ["20 layers, after training"] * 3
    signals = [own[-2].read_json("signal.json") for own in by_block(grid).values()]
    names = ["output_variance", "weight_gradient_norm", "block_input_gradient_norm"]
    for place, axis in enumerate(figure.axes):
        moment = "initial" if place < 3 else "final"
        values = [found[moment][names[place % 3]] for found in signals]
        assert lines(axis) == [(list(range(1, len(v) + 1)), v) for v in values]
        assert axis.get_yscale() == "log"
    assert legend_texts(figure) == ["plain", "residual"]


def test_runs_without_numbers_leave_gaps_and_not_errors(make_run, tmp_path):
    """A grid in which all runs of a kind diverged at once is still reported."""
    failed = {"failure": "diverged", "failed_at_step": 1}
    runs = [
        make_run("plain", {"block": "plain", "depth": 8}, [], failed),
        make_run("residual", {"block": "residual", "depth": 8}, [0.5]),
    ]
    groups = {run.config["block"]: {8: [run]} for run in runs}
    made_from = figures.provenance(runs)
    for name, figure in (
        ("curves", figures.error_curves(by_block(runs), depth, "layers")),
        ("against", figures.error_against(groups, "layers", {"test_error": "test error"})),
        ("signal", signal_figures.signal_propagation({}, 8)),
    ):
        assert all(path.stat().st_size for path in figures.save(figure, tmp_path / name, made_from))
