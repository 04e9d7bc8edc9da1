"""Figures of recurrent networks: how they learn, how far back they remember, how far back their gradient reaches."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from research.analysis.figures import legend_below, line_style, new, plain_logarithmic_labels, styled
from research.analysis.results import Run, curves, spread

# Of all seeds of all cells: what a model without memory scores, and where a seed was lost.
_BASELINE = {"color": "0.3", "linestyle": ":", "linewidth": 1.2}
# Scores worse than the baseline by this factor leave the panel upwards: they would flatten all others.
_EXPLODED = 30
_LOST = {"marker": "x", "markersize": 6, "markeredgewidth": 1.5, "linestyle": "none"}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One task in `loss_curves`.

    Attributes:
      groups: cell -> its runs, of one seed or of several.
      metric: name in metrics.jsonl.
      ylabel: of the metric.
      baseline: the metric of the best model without memory, where that is known.
      log: on a logarithmic scale.
      from_zero: a linear scale begins at zero, as it should for an error rate.
    """

    groups: Mapping[str, Sequence[Run]]
    metric: str
    ylabel: str
    baseline: float | None = None
    log: bool = False
    from_zero: bool = True


@styled
def loss_curves(panels: Mapping[str, Panel]) -> Figure:
    """A logged metric against the step, one panel a task and one line a cell: mean and range over seeds.

    A seed that ends before the panel's last step has diverged: a cross in the cell's colour stands where it ended, and
    the mean goes on over the others. A cell has one colour in all panels, and its n is that of all of them.
    """
    rows = -(-len(panels) // 3)
    columns = -(-len(panels) // rows)
    figure, axes = new(columns, rows, width=3.9 if columns > 1 else 5.2, height=2.9 if columns > 1 else 3.8)
    cells = list(dict.fromkeys(cell for panel in panels.values() for cell in panel.groups))
    counts, lost = {cell: set() for cell in cells}, False
    for axis, (title, panel) in zip(axes, panels.items(), strict=False):
        found = {cell: curves(runs, panel.metric) for cell, runs in panel.groups.items()}
        last = max((steps[-1] for seeds in found.values() for steps, _ in seeds), default=0)
        for cell, seeds in found.items():
            steps, low, mean, high = _over_seeds(seeds)
            style = line_style(cells.index(cell))
            axis.plot(steps, mean, markersize=4, markevery=_marked(cells.index(cell), len(steps)), **style)
            axis.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
            ends = [(steps[-1], values[-1]) for steps, values in seeds if steps[-1] < last]
            if ends:
                axis.plot(*np.transpose(ends), color=style["color"], zorder=3, **_LOST)
            counts[cell].add(len(seeds))
            lost = lost or bool(ends)
        if panel.baseline is not None:
            axis.axhline(panel.baseline, **_BASELINE)
        axis.set(title=title, xlabel="step", ylabel=panel.ylabel)
        _scale(axis, panel.log, panel.baseline, panel.from_zero)
    for axis in axes[len(panels) :]:
        axis.remove()
    for number, cell in enumerate(cells):
        axes[0].plot([], [], markersize=4, label=f"{cell} ({_count(counts[cell])})", **line_style(number))
    if any(panel.baseline is not None for panel in panels.values()):
        axes[0].plot([], [], label="without memory", **_BASELINE)
    if lost:
        axes[0].plot([], [], color="0.3", label="a seed diverged", **_LOST)
    legend_below(figure, axes[0])
    return figure


@styled
def score_against_length(
    groups: Mapping[str, Mapping[int, Sequence[float]]],
    ylabel: str,
    baseline: Mapping[int, float] | None = None,
    log: bool = False,
) -> Figure:
    """Final score against the length of the sequences, a line a cell.

    Filled marks are means over seeds with bars of one standard deviation, open ones the seeds. Cells stand a little
    beside each other, so that bars do not cover each other.

    Args:
      groups: cell -> length -> the score of every seed that has one.
      ylabel: of the score.
      baseline: length -> the score of the best model without memory.
      log: on a logarithmic scale.
    """
    figure, (axis,) = new(1, width=5.2, height=3.8)
    lengths = sorted({length for by_length in groups.values() for length in by_length})
    for number, (cell, by_length) in enumerate(groups.items()):
        style, aside = line_style(number), 1.02 ** (number - (len(groups) - 1) / 2)
        points = {length: spread(scores) for length, scores in sorted(by_length.items())}
        points = {length: point for length, point in points.items() if point.n}
        seeds = [(length * aside, score) for length in points for score in by_length[length]]
        axis.plot(
            *np.reshape(seeds, (-1, 2)).T,
            color=style["color"],
            marker=style["marker"],
            markersize=4,
            markerfacecolor="none",
            linestyle="none",
            alpha=0.4,
        )
        x, mean = [length * aside for length in points], [point.mean for point in points.values()]
        axis.plot(x, mean, markersize=5, label=f"{cell} ({_count({p.n for p in points.values()})})", **style)
        bars = [point.std if point.n > 1 else 0 for point in points.values()]
        axis.errorbar(x, mean, yerr=bars, fmt="none", capsize=2.5, elinewidth=1, ecolor=style["color"])
    if baseline is not None:
        axis.plot(
            sorted(baseline), [baseline[length] for length in sorted(baseline)], label="without memory", **_BASELINE
        )
    axis.set(xlabel="length of the sequences", ylabel=ylabel, xscale="log")
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", which="minor", length=0)
    _scale(axis, log, max(baseline.values()) if baseline else None)
    legend_below(figure, axis)
    return figure


@styled
def gradient_against_distance(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float | None]]]], floor: float = 1e-12
) -> Figure:
    """The gradient's norm at each hidden state against its distance in time from the last, on a logarithmic scale.

    Lines are geometric means over seeds, bands their range; norms are as they are, not relative to that at the last
    state. Norms below the floor, zeros above all, are drawn on it, and the axis says so. A seed with a norm that is not
    a finite number is left out.

    Args:
      panels: title, such as the moment of training -> cell -> `[seed][time]` norms, the first time first: what
        `research.analysis.time_signal.state_gradient_norms` gives.
      floor: the smallest norm that is told from nothing.
    """
    figure, axes = new(len(panels), width=4.2, height=3.3, sharey=True)
    cells = list(dict.fromkeys(cell for by_cell in panels.values() for cell in by_cell))
    counts, reached = {cell: set() for cell in cells}, False
    for axis, (title, by_cell) in zip(axes, panels.items(), strict=True):
        for cell, seeds in by_cell.items():
            norms = np.asarray(seeds, float)[:, ::-1]  # None becomes NaN
            norms = norms[np.isfinite(norms).all(axis=1)]
            counts[cell].add(len(norms))
            if not len(norms):
                continue
            reached = reached or bool((norms < floor).any())
            norms = np.maximum(norms, floor)
            distances, mean = range(norms.shape[1]), np.exp(np.log(norms).mean(axis=0))
            style = line_style(cells.index(cell))
            axis.plot(distances, mean, markersize=4, markevery=_marked(cells.index(cell), len(distances)), **style)
            low, high = norms.min(axis=0), norms.max(axis=0)
            axis.fill_between(distances, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel=r"distance in time $T - t$")
    for axis in axes:  # their y axis is one, and now it has seen all lines
        _scale(axis, log=True)
    below = f" ({floor:g} where less)" if reached else ""
    axes[0].set(ylabel=rf"$\Vert dL/dh_t \Vert${below}")
    for number, cell in enumerate(cells):
        axes[0].plot([], [], markersize=4, label=f"{cell} ({_count(counts[cell])})", **line_style(number))
    legend_below(figure, axes[0])
    return figure


def _over_seeds(seeds):
    """Steps, and at each the least, the mean and the greatest of the seeds that are still there."""
    at_step: dict[int, list[float]] = {}
    for steps, values in seeds:
        for step, value in zip(steps, values, strict=True):
            at_step.setdefault(step, []).append(value)
    rows = [(step, min(v), math.fsum(v) / len(v), max(v)) for step, v in sorted(at_step.items())]
    return list(zip(*rows, strict=True)) or [()] * 4


def _marked(number: int, points: int) -> tuple[int, int]:
    """The first and every how many-th point of a line has its mark; other lines begin elsewhere."""
    return number % 5 * max(1, points // 30), max(1, points // 6)


def _scale(axis: Axes, log: bool, baseline: float | None = None, from_zero: bool = True) -> None:
    axis.margins(x=0.03)
    if log:
        axis.set(yscale="log")
    elif from_zero:
        axis.set(ylim=(0, None))
    low, high = axis.get_ylim()
    if baseline is not None and high > _EXPLODED * baseline:
        high = 2 * baseline
        axis.set(ylim=(low, high))
    if not log:
        return
    if high / low < 100:
        plain_logarithmic_labels(axis)


def _count(counts: set[int]) -> str:
    return f"n = {'-'.join(map(str, sorted(counts or {0})))}"
