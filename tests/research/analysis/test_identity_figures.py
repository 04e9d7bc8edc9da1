"""The figures of the comparisons after He et al. 2016: what is drawn, also where runs diverged or there is only one."""

import dataclasses
import math

import pytest
from matplotlib.colors import to_hex

from research.analysis import figures, signal_figures


@pytest.fixture
def variants(make_run):
    """A kind of unit -> runs: one of three seeds, one of which two diverged after a while, one that never trained."""

    def run(name, seed, errors, result=None):
        return make_run(f"{name}-{seed}", {"variant": name, "seed": seed}, errors, result)

    failure = {"failure": "diverged", "failed_at_step": 3}
    return {
        "original": [run("original", seed, [0.8, 0.4, 0.2 + 0.02 * seed]) for seed in range(3)],
        "gate": [run("gate", 0, [0.9, 0.5, 0.3]), *(run("gate", seed, [0.7, 0.6], failure) for seed in (1, 2))],
        "dropout": [run("dropout", seed, [], failure) for seed in range(2)],
    }


def lines(axis):
    """Data of the lines with points, without the guides across a panel."""
    found = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]
    return [(x, y) for x, y in found if len(x) and y != [0, 1]]


def legend_texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


# Rows of numbers


PAPER = ("paper", [6.61, 8.7, None])
METRICS = {"train_error": "training", "test_error": "test"}


def test_ranked_shows_every_run_its_mean_and_the_papers_number(variants, saved):
    figure = figures.ranked(variants, METRICS, PAPER, "a title")
    assert [axis.get_title() for axis in figure.axes] == ["training", "test", "paper"]
    assert {axis.get_xlabel() for axis in figure.axes} == {"error (%)"} and figure.get_suptitle() == "a title"
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["original", "gate", "dropout"]
    assert first.get_ylim() == (2.5, -0.5)  # the first on top
    for axis, shift in zip(figure.axes, (0, 5), strict=False):
        # Runs, mean; runs, mean; nothing for the last.
        drawn = [line.get_data() for line in axis.get_lines() if line.get_marker() in ("o", "D")]
        assert [list(y) for _, y in drawn] == [[0, 0, 0], [0], [1], [1]]
        runs, mean, *gate = (list(x) for x, _ in drawn)
        assert runs == pytest.approx([20 + shift, 22 + shift, 24 + shift]) and mean == pytest.approx([22 + shift])
        assert gate == [pytest.approx([30 + shift])] * 2
        spread, alone = axis.containers
        (bar,) = spread.lines[2]
        (ends,) = bar.get_segments()
        assert [end[0] for end in ends] == pytest.approx([20 + shift, 24 + shift])  # the standard deviation is 2
        assert not alone.lines[2], "a bar for a single run"
        assert [text.get_text() for text in axis.texts] == ["2 of 3 diverged", "2 of 2 diverged"]
        assert [text.xy[1] for text in axis.texts] == [1, 2]
        (guide,) = [line for line in axis.get_lines() if list(line.get_ydata()) == [0, 1]]
        assert list(guide.get_xdata()) == pytest.approx([22 + shift] * 2)
    last = figure.axes[-1]
    assert lines(last) == [([6.61], [0]), ([8.7], [1])]
    assert [(text.get_text(), text.xy[1]) for text in last.texts] == [("fail (> 20%)", 2)]
    saved(figure)


@pytest.mark.parametrize("name", ["gate", "dropout"])
def test_ranked_of_one_kind_of_unit(variants, saved, name):
    figure = figures.ranked({name: variants[name]}, METRICS, ("paper", [None]), "a title")
    assert [text.get_text() for text in figure.axes[-1].texts] == ["fail (> 20%)"]
    saved(figure)


# Curves


def test_mean_curves_are_means_and_ranges_of_what_all_runs_have(variants, saved):
    figure = figures.mean_curves(variants, "error", "training loss", "a title")
    (axis,) = figure.axes
    assert (axis.get_title(), axis.get_xlabel(), axis.get_ylabel()) == ("a title", "step", "training loss")
    assert axis.get_yscale() == "log"
    steps, means = zip(*lines(axis), strict=True)
    assert steps == ([10, 20, 30], [10, 20])  # of the diverged runs there is no more
    assert means[0] == pytest.approx([0.8, 0.4, 0.22]) and means[1] == pytest.approx([2.3 / 3, 1.7 / 3])
    for band, low, high in zip(axis.collections, (0.2, 0.5), (0.24, 0.6), strict=True):
        ends = band.get_paths()[0].vertices
        at_end = ends[ends[:, 0] == ends[:, 0].max()][:, 1]
        assert (at_end.min(), at_end.max()) == pytest.approx((low, high))
    assert legend_texts(figure) == ["original (n = 3)", "gate (n = 3)"]
    saved(figure)


def test_a_mean_curve_of_one_run_and_of_none(variants, saved, tmp_path):
    single = figures.mean_curves({"gate": variants["gate"][:1]}, "error", "loss", "a title")
    assert lines(single.axes[0]) == [([10, 20, 30], [0.9, 0.5, 0.3])]
    saved(single)
    empty = figures.mean_curves({"dropout": variants["dropout"]}, "error", "loss", "a title")
    assert lines(empty.axes[0]) == [] and legend_texts(empty) == []
    assert all(path.stat().st_size for path in figures.save(empty, tmp_path / "empty", {}))


def test_mean_curves_of_seeds_trained_at_once(make_run):
    records = [{"step": 1, "loss": [4.0, 2.0, None]}, {"step": 2, "loss": [3.0, 1.0, None]}]
    run = dataclasses.replace(make_run("several", {}, [], {}), metrics=records)
    figure = figures.mean_curves({"lstm": [run]}, "loss", "loss", "a title")
    assert lines(figure.axes[0]) == [([1, 2], [3.0, 2.0])] and legend_texts(figure) == ["lstm (n = 2)"]


def test_layer_responses_in_order_and_sorted(saved):
    responses = {"plain, 20 layers": [1.0, 3.0, 2.0], "residual, 56 layers": [0.5, 0.25]}
    figure = signal_figures.layer_responses(responses)
    ordered, by_size = figure.axes
    assert lines(ordered) == [([1, 2, 3], [1.0, 3.0, 2.0]), ([1, 2], [0.5, 0.25])]
    assert lines(by_size) == [([1, 2, 3], [3.0, 2.0, 1.0]), ([1, 2], [0.5, 0.25])]
    assert [axis.get_title() for axis in figure.axes] == ["in order of depth", "sorted by size"]
    assert ordered.get_ylabel() == "std of the response after BN" and ordered.get_ylim()[0] == 0
    assert legend_texts(figure) == list(responses)
    saved(figure)


def test_legends_of_a_whole_table_fit_below_the_panels(saved):
    """The depth ablation's ten networks, and the eleven rows of He et al. 2016, Table 1."""
    networks = [f"{block}, {depth} layers" for depth in (20, 32, 44, 56, 110) for block in ("residual", "plain")]
    saved(signal_figures.layer_responses({name: [3.0, 1.0] for name in networks}))
    moment = {name: [2.0, 1.0] for name in ("output_variance", "weight_gradient_norm", "block_input_gradient_norm")}
    labels = [f"shortcut-only gate, b = -{number}" for number in range(11)]
    saved(signal_figures.signal_propagation({label: {"initial": moment, "final": moment} for label in labels}, 110))


# Identities


PANELS = ("gradient_norm", "shortcut_gradient_norm", "jacobian_gain", "shortcut_jacobian_gain")


def test_identities_are_means_over_seeds_unit_by_unit(make_run, saved):
    def run(name, seed, factor):
        values = {panel: [factor * k * (1 + seed) for k in (1.0, 2.0, 4.0)] for k, panel in enumerate(PANELS)}
        return make_run(f"{name}-{seed}", {}, [], values)

    kinds = {"identity": [run("identity", seed, 1.0) for seed in (0, 1)], "zero": [run("zero", 0, 0.0)]}
    figure = signal_figures.identities(kinds, "a title")
    assert len(figure.axes) == 4 and figure.get_suptitle() == "a title"
    assert len({axis.get_title() for axis in figure.axes}) == 4
    for axis in figure.axes:
        (x, y), (_, nothing) = lines(axis)
        assert (x, y) == ([1, 2, 3], [1.5, 3.0, 6.0])
        assert all(map(math.isnan, nothing))  # 0 has no place on a logarithmic scale
        assert (axis.get_yscale(), axis.get_xlabel()) == ("log", "unit l")
    assert legend_texts(figure) == ["identity", "zero"]
    saved(figure)
    alone = signal_figures.identities({"zero": kinds["zero"]}, "a title")
    saved(alone)


def test_each_panel_of_identities_shows_its_own_statistic(make_run):
    run = make_run("one", {}, [], {panel: [10.0**k, 10.0**k] for k, panel in enumerate(PANELS)})
    figure = signal_figures.identities({"one": [run]}, "a title")
    assert [lines(axis) for axis in figure.axes] == [[([1, 2], [10.0**k] * 2)] for k in range(4)]
    titles = [axis.get_title() for axis in figure.axes]
    assert ["shortcuts alone" in title for title in titles] == [False, True, False, False]
    assert ["J_h" in title for title in titles] == [False, False, False, True]


# Memory


def test_memory_against_depth_with_a_guide_a_group(make_run, saved):
    def run(name, depth, gib):
        return make_run(f"{name}-{depth}", {}, [], {"temporary_bytes": int(gib * 2**30)})

    groups = {
        "kept": {1001: run("kept", 1001, 8.0), 164: run("kept", 164, 2.0)},
        "again": {164: run("again", 164, 0.5), 1001: run("again", 1001, 1.0)},
    }
    figure = signal_figures.memory_against_depth(groups, {"again": 0.5, "kept": 1.0}, "a title")
    (axis,) = figure.axes
    assert (axis.get_xscale(), axis.get_yscale(), axis.get_title()) == ("log", "log", "a title")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["164", "1001"]
    kept, linear, again, root = lines(axis)
    assert (kept, again) == (([164, 1001], [2.0, 8.0]), ([164, 1001], [0.5, 1.0]))
    # Guides go through the deepest network.
    assert linear == ([164, 1001], pytest.approx([8 * 164 / 1001, 8]))
    assert root == ([164, 1001], pytest.approx([math.sqrt(164 / 1001), 1]))
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == ["kept", "proportional to depth", "again", "proportional to its square root"]
    colours = [to_hex(line.get_color()).upper() for line in axis.get_lines()]
    assert (colours[0], colours[2]) == figures.COLOURS[:2]
    saved(figure)
    # The legend stands inside, where it hides no point.
    box = axis.get_legend().get_window_extent()
    assert not any(
        box.contains(*axis.transData.transform(point)) for x, y in lines(axis) for point in zip(x, y, strict=True)
    )
    # Alone, the second keeps its own guide.
    alone = signal_figures.memory_against_depth({"again": {164: groups["again"][164]}}, {"again": 0.5}, "a title")
    assert [text.get_text() for text in alone.axes[0].get_legend().get_texts()][1] == "proportional to its square root"
    saved(alone)
