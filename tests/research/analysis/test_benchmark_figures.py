"""The figure of the benchmark: which mark stands where, and what is missing."""

import pytest

from research.analysis import benchmark_figures

PANELS = {
    "train": {"small": {"torch": [2.0, 1.0, 4.0], "flax": [3.0]}, "large": {"torch": [0.5]}},
    "inference": {"large": {"flax": [1.5]}},
}


def test_rows_are_workloads_and_marks_medians():
    figure = benchmark_figures.speed_ratios(PANELS, {"torch": "PyTorch", "flax": "Flax"})
    train, inference = figure.axes
    assert [train.get_title(), inference.get_title()] == ["train", "inference"]
    assert [label.get_text() for label in train.get_yticklabels()] == ["small", "large"]
    assert train.get_ylim() == (1.5, -0.5) and train.get_xscale() == "log"
    torch, flax = train.containers
    assert list(torch[0].get_xdata()) == [2.0, 0.5] and list(flax[0].get_xdata()) == [3.0]
    assert list(torch[0].get_ydata()) == pytest.approx([-0.08, 0.92])
    whole, point = torch[2][0].get_segments()  # from the least to the largest
    assert list(whole[:, 0]) == pytest.approx([1.0, 4.0]) and list(point[:, 0]) == pytest.approx([0.5, 0.5])
    (alone,) = inference.containers
    assert list(alone[0].get_ydata()) == pytest.approx([1.08])
    assert all(any(list(line.get_xdata()) == [1, 1] for line in axis.get_lines()) for axis in figure.axes)
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert texts == ["against PyTorch", "against Flax"]
