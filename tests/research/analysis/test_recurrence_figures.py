"""The figures of recurrent networks: what is drawn of several seeds at once, also where some diverged."""

import math
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from research.analysis import figures, recurrence_figures
from research.analysis.recurrence_figures import Panel
from research.analysis.results import Run

CELLS = ("tanh", "irnn", "leaky", "lstm", "lstm with peepholes", "gru", "mgu")


def run(metrics):
    return Run(Path("a"), {}, {}, {}, metrics, "")


def seeds(*rows, metric="loss"):
    """One run of several seeds, with a row of values every 10 steps."""
    return [run([{"step": 10 * k, metric: list(row)} for k, row in enumerate(rows, start=1)])]


def lines(axis, marker=None):
    """Data of the lines with points; the baselines across a panel among them."""
    found = [line for line in axis.get_lines() if len(line.get_xdata()) and marker in (None, line.get_marker())]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in found]


def band(collection):
    """Least and greatest of a band at its end."""
    ends = collection.get_paths()[0].vertices
    at_end = ends[ends[:, 0] == ends[:, 0].max()][:, 1]
    return at_end.min(), at_end.max()


def colour(artist):
    return to_hex(artist.get_color()).upper()


def legend_texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


# Curves


def test_loss_curves_are_means_and_ranges_over_seeds_and_runs(saved):
    single = run([{"step": 10, "loss": 8.0}, {"step": 20, "test_loss": 5.0}, {"step": 20, "loss": 6.0}])
    panels = {
        "adding": Panel(
            {"tanh": seeds([4, 2], [3, 1]) + [single], "lstm": seeds([0.5, 0.4], [0.01, 0.02])},
            "loss",
            "MSE",
            0.2,
            True,
        ),
        "copy": Panel(
            {"gru": seeds([3], [1], metric="test_loss"), "lstm": seeds([1], [2], metric="test_loss")},
            "test_loss",
            "nats",
        ),
    }
    figure = recurrence_figures.loss_curves(panels)
    adding, copy = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["adding", "copy"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["MSE", "nats"]
    assert [axis.get_yscale() for axis in figure.axes] == ["log", "linear"]
    assert {axis.get_xlabel() for axis in figure.axes} == {"step"} and copy.get_ylim()[0] == 0
    tanh, lstm, baseline = lines(adding)
    assert tanh == ([10, 20], pytest.approx([14 / 3, 10 / 3])) and lstm == ([10, 20], pytest.approx([0.45, 0.015]))
    assert baseline == ([0, 1], [0.2, 0.2])
    assert band(adding.collections[0]) == (1, 6)
    assert lines(copy) == [([10, 20], [3, 1]), ([10, 20], [1, 2])]
    # A cell has one colour in all panels.
    drawn = [[colour(line) for line in axis.get_lines()[:2]] for axis in figure.axes]
    assert drawn == [list(figures.COLOURS[:2]), [figures.COLOURS[2], figures.COLOURS[1]]]
    assert legend_texts(figure) == ["tanh (n = 3)", "lstm (n = 1-2)", "gru (n = 1)", "without memory"]
    saved(figure)


def test_a_diverged_seed_leaves_a_cross_and_the_mean_to_the_others(saved):
    groups = {"tanh": seeds([1, 3], [None, 5], [None, 7]), "irnn": seeds([9], [8], [None]), "gru": seeds([None])}
    figure = recurrence_figures.loss_curves({"adding": Panel(groups, "loss", "loss")})
    (axis,) = figure.axes
    assert lines(axis, "x") == [([10], [1]), ([20], [8])]
    assert [colour(line) for line in axis.get_lines() if line.get_marker() == "x"][:2] == list(figures.COLOURS[:2])
    assert lines(axis)[0] == ([10, 20, 30], [2, 5, 7]) and ([10, 20], [9, 8]) in lines(axis)
    assert legend_texts(figure) == ["tanh (n = 2)", "irnn (n = 1)", "gru (n = 0)", "a seed diverged"]
    saved(figure)


@pytest.mark.parametrize(("count", "grid"), [(1, (1, 1)), (4, (2, 2)), (5, (2, 3))])
def test_panels_and_the_legend_of_all_cells_have_room(saved, count, grid):
    groups = {cell: seeds([1, 2], [1, None]) for cell in CELLS}
    panels = {f"task {number}": Panel(groups, "loss", "loss", 0.5) for number in range(count)}
    figure = recurrence_figures.loss_curves(panels)
    assert [axis.get_title() for axis in figure.axes] == list(panels)
    assert figure.axes[0].get_gridspec().get_geometry() == grid
    saved(figure)


# Scores


def test_scores_against_length(saved):
    groups = {
        "lstm": {400: [0.5], 100: [0.1, 0.2, 0.6]},
        "gru": {100: [0.01, 0.03], 200: [], 400: [0.2]},
        "tanh": {},
    }
    figure = recurrence_figures.score_against_length(groups, "MSE", {400: 0.3, 100: 0.2}, log=True)
    (axis,) = figure.axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("length of the sequences", "MSE")
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["100", "200", "400"]
    marks, lstm, other_marks, gru = lines(axis, "o") + lines(axis, "s")
    assert marks[1] == [0.1, 0.2, 0.6, 0.5] and other_marks[1] == [0.01, 0.03, 0.2]
    for (x, mean), expected in ((lstm, [0.3, 0.5]), (gru, [0.02, 0.2])):
        assert mean == pytest.approx(expected) and x == pytest.approx([100, 400], rel=0.03)
    assert lstm[0][0] < gru[0][0] and marks[0] == [lstm[0][0]] * 3 + [lstm[0][1]]
    assert [line.get_markerfacecolor() for line in axis.get_lines() if list(line.get_ydata()) == marks[1]] == ["none"]
    bars = axis.containers[0].lines[2][0].get_segments()
    deviation = math.sqrt((0.04 + 0.01 + 0.09) / 2)
    assert [end for bar in bars for end in bar[:, 1]] == pytest.approx([0.3 - deviation, 0.3 + deviation, 0.5, 0.5])
    assert ([100, 400], [0.2, 0.3]) in lines(axis)
    assert legend_texts(figure) == ["lstm (n = 1-3)", "gru (n = 1-2)", "tanh (n = 0)", "without memory"]
    saved(figure)


def test_scores_that_are_not_logarithmic_begin_at_zero(saved):
    groups = {cell: {100: [0.1 * number]} for number, cell in enumerate(CELLS)}
    figure = recurrence_figures.score_against_length(groups, "error")
    assert figure.axes[0].get_yscale() == "linear" and figure.axes[0].get_ylim()[0] == 0
    assert legend_texts(figure) == [f"{cell} (n = 1)" for cell in CELLS]
    saved(figure)


# Gradients


def test_gradients_against_distance_are_geometric_means(saved):
    panels = {
        "before training": {"tanh": [[0.0, 1e-4, 1.0], [1e-30, 1e-2, 4.0]], "lstm": [[1.0, 2.0, 4.0]]},
        "after training": {"lstm": [[3.0, 3.0, 3.0], [None, 1.0, 1.0], [math.nan, 1.0, 1.0]], "tanh": [[None] * 3]},
    }
    figure = recurrence_figures.gradient_against_distance(panels)
    before, after = figure.axes
    assert [axis.get_title() for axis in figure.axes] == list(panels)
    assert {axis.get_yscale() for axis in figure.axes} == {"log"} and before.get_ylim() == after.get_ylim()
    assert {axis.get_xlabel() for axis in figure.axes} == {"distance in time $T - t$"}
    tanh, lstm = lines(before)
    assert tanh == ([0, 1, 2], pytest.approx([2.0, 1e-3, 1e-12])) and lstm == ([0, 1, 2], pytest.approx([4, 2, 1]))
    assert band(before.collections[1]) == (1, 1)
    assert before.collections[0].get_datalim(before.transData).ymax == 4
    assert lines(after) == [([0, 1, 2], pytest.approx([3, 3, 3]))]
    assert colour(after.get_lines()[0]) == figures.COLOURS[1]
    assert before.get_ylabel() == r"$\Vert dL/dh_t \Vert$ (1e-12 where less)"
    assert legend_texts(figure) == ["tanh (n = 0-2)", "lstm (n = 1)"]
    saved(figure)


def test_the_axis_names_a_floor_where_one_was_reached(saved):
    panels = {"before training": {"lstm": [[0.1, 1.0]]}}
    assert recurrence_figures.gradient_against_distance(panels).axes[0].get_ylabel() == r"$\Vert dL/dh_t \Vert$"
    floored = recurrence_figures.gradient_against_distance(panels, floor=0.5)
    assert floored.axes[0].get_ylabel().endswith("(0.5 where less)")
    assert lines(floored.axes[0]) == [([0, 1], pytest.approx([1.0, 0.5]))]


@pytest.mark.parametrize("log", [True, False])
def test_what_explodes_leaves_the_panel_and_does_not_flatten_the_others(saved, log):
    panel = Panel({"irnn": seeds([0.1], [1e30]), "lstm": seeds([0.1], [0.01])}, "loss", "MSE", 0.2, log)
    (axis,) = (figure := recurrence_figures.loss_curves({"adding": panel})).axes
    saved(figure)
    assert axis.get_ylim()[1] == pytest.approx(0.4) and axis.get_ylim()[0] < 0.02
    scores = {"irnn": {10: [1e30], 20: [0.1]}, "lstm": {10: [0.1], 20: [0.01]}}
    (axis,) = (figure := recurrence_figures.score_against_length(scores, "MSE", {10: 0.2, 20: 0.2}, log)).axes
    saved(figure)
    assert axis.get_ylim()[1] == pytest.approx(0.4)
