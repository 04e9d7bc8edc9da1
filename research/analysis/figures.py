"""Figures from run folders: PNG and SVG, the same bytes each time they are made from the same runs.

Every file says in its own metadata what made it: the command and commit of the runs, and their hashes. Colours are of
Okabe and Ito's palette, which survives colour blindness; line styles and markers tell the same in print.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: no window, no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from research.analysis.results import Run, curves, spread
from research.files import write_output

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_DASHED = (0, (3, 1.5))
_STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
    # SVG: text stays text, and element ids do not depend on the moment.
    "svg.fonttype": "none",
    "svg.hashsalt": "carousel",
}


# A decorator: for the length of a call the house style, over Matplotlib's defaults and not over a user's own settings.
styled = plt.style.context(["default", _STYLE])


def new(columns: int, rows: int = 1, *, width: float = 3.6, height: float = 3.0, **options):
    """An empty figure of `rows x columns` panels of `width x height` inches, and the panels in a list, row by row."""
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **options)
    return figure, list(axes.flat)


def legend_below(figure: Figure, axis: Axes) -> None:
    """One legend for all panels, under them, where it hides no curve; entries are those of `axis`."""
    handles, labels = axis.get_legend_handles_labels()
    widest = 0.55 + 0.055 * max(map(len, labels), default=0)  # inches of an entry, handle and space included
    fitting = int(figure.get_figwidth() / widest)
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(len(labels), 6, fitting)))


def plain_logarithmic_labels(axis: Axes) -> None:
    """Labels 1, 2, 5, 10, ... in plain numbers on a logarithmic y axis."""
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def line_style(number: int) -> dict[str, str]:
    """Colour, marker and dashes of the line of that number: told apart in grey as well."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker, "linestyle": ("--", "-", "-.", ":")[(number + number // 8) % 4]}


def provenance(runs: Sequence[Run]) -> dict[str, str]:
    """What a figure carries: the runs' commands, commits (marked where the tree was dirty) and hashes."""
    commits = {_commit(run) for run in runs}
    return {
        "commands": "; ".join(sorted({run.environment["command"] for run in runs})),
        "commits": ", ".join(sorted(commits)),
        "runs": json.dumps({run.path.name: run.sha256 for run in runs}, sort_keys=True),
    }


def _commit(run: Run) -> str:
    source = run.environment.get("source") or {}
    return f"{source.get('commit') or 'unknown'}{' (with changes)' if source.get('dirty') else ''}"


@styled
def save(figure: Figure, path: Path, made_from: Mapping[str, str]) -> list[Path]:
    """Writes `path.png` and `path.svg`, each in one move and with the provenance in its metadata; closes the figure."""
    description = json.dumps(made_from, sort_keys=True)
    metadata = {
        "png": {"Software": "carousel", "Description": description},
        "svg": {"Creator": "carousel", "Description": description, "Date": None},
    }
    written = []
    for suffix, values in metadata.items():
        content = io.BytesIO()
        figure.savefig(content, format=suffix, metadata=values)
        written.append(path.with_suffix(f".{suffix}"))
        write_output(written[-1], content.getvalue())
    plt.close(figure)
    return written


@styled
def error_curves(panels: Mapping[str, Sequence[Run]], key: Callable[[Run], int], unit: str) -> Figure:
    """Error against step, one panel a name, side by side on one scale: He et al. 2015, Figure 6.

    Thin dashed lines are the training error (of minibatches, averaged over the logging interval), thick ones the test
    error. Runs of equal `key(run)` (seeds) share a colour and a marker, named by the key and the unit.
    """
    figure, axes = new(len(panels), width=4.2, height=3.3, sharey=True)
    keys = sorted({key(run) for runs in panels.values() for run in runs})
    for axis, (name, runs) in zip(axes, panels.items(), strict=True):
        for run in runs:
            number = keys.index(key(run))
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            steps, errors = run.series("error")
            axis.plot(steps, [100 * e for e in errors], color=colour, linewidth=0.8, linestyle=_DASHED)
            steps, errors = run.series("test_error")
            axis.plot(steps, [100 * e for e in errors], color=colour, marker=marker, markersize=3.5)
        axis.set(title=name, xlabel="step")
        axis.margins(x=0.02)
    axes[0].set(ylabel="error (%)", ylim=(0, None))
    for number, value in enumerate(keys):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        axes[0].plot([], [], markersize=3.5, label=f"{value} {unit}", **style)
    axes[0].plot([], [], color="0.4", linewidth=0.8, linestyle=_DASHED, label="training error")
    axes[0].plot([], [], color="0.4", label="test error")
    legend_below(figure, axes[0])
    return figure


@styled
def error_against(groups: Mapping[str, Mapping[int, Sequence[Run]]], xlabel: str, metrics: Mapping[str, str]) -> Figure:
    """Final error against a number such as depth: one panel a metric (`result key -> title`), one line a group.

    Points are means over seeds, bars one standard deviation, where there are several.
    """
    figure, axes = new(len(metrics), height=3.2, sharey=True)
    ticks = sorted({x for by_x in groups.values() for x in by_x})
    for axis, (metric, title) in zip(axes, metrics.items(), strict=True):
        for number, (name, by_x) in enumerate(groups.items()):
            points = {x: spread(run.result.get(metric) for run in runs) for x, runs in sorted(by_x.items())}
            points = {x: point for x, point in points.items() if point.n}
            several = any(point.n > 1 for point in points.values())
            axis.errorbar(
                [ticks.index(x) for x in points],
                [100 * point.mean for point in points.values()],
                yerr=[100 * point.std if point.n > 1 else 0 for point in points.values()] if several else None,
                capsize=3,
                markersize=5,
                label=f"{name} ({_counts(points.values())})",
                **line_style(number),
            )
        axis.set(title=title, xlabel=xlabel, xticks=range(len(ticks)), xticklabels=ticks)
        axis.margins(x=0.08)
    axes[0].set(ylabel="error (%)", ylim=(0, None))
    legend_below(figure, axes[0])
    return figure


@styled
def ranked(
    groups: Mapping[str, Sequence[Run]],
    metrics: Mapping[str, str],
    paper: tuple[str, Sequence[float | None]],
    title: str,
) -> Figure:
    """One row a group, one panel a metric (`result key -> title`), and the paper's numbers in a last panel.

    Open circles are runs, filled marks their mean with one standard deviation; the dashed line is the first group's
    mean. `paper` is a title and a value in percent a group, None where the paper's run failed.
    """
    figure, axes = new(len(metrics) + 1, width=2.7, height=1.2 + 0.3 * max(2, len(groups)), sharey=True)
    figure.suptitle(title, fontsize=10)
    rows = range(len(groups))
    for axis, (metric, heading) in zip(axes, metrics.items(), strict=False):
        found = [[run.result.get(metric) for run in runs] for runs in groups.values()]
        for row, values in enumerate(found):
            seen, value = [100 * v for v in values if v is not None], spread(values)
            if value.n:  # a line without points, not clipped, would have no extent, and the layout would collapse
                points = {"markersize": 4, "markerfacecolor": "none", "color": "0.55", "clip_on": False}
                axis.plot(seen, [row] * len(seen), "o", **points)
                bar = 100 * value.std if value.n > 1 else None
                axis.errorbar(100 * value.mean, row, xerr=bar, fmt="D", markersize=5, capsize=3, color=COLOURS[0])
            if value.n < len(values):
                _annotate_right(axis, row, f"{len(values) - value.n} of {len(values)} diverged")
        first = spread(found[0])
        if first.n:
            axis.axvline(100 * first.mean, color="0.4", linestyle=_DASHED, linewidth=0.8)
        axis.set(title=heading, xlabel="error (%)", xlim=(0, None) if first.n else None)
    heading, values = paper
    for row, value in enumerate(values):
        if value is None:
            _annotate_right(axes[-1], row, "fail (> 20%)")
        else:
            axes[-1].plot(value, row, "s", markersize=5, color=COLOURS[1])
    if values and values[0] is not None:
        axes[-1].axvline(values[0], color="0.4", linestyle=_DASHED, linewidth=0.8)
    axes[-1].set(
        title=heading, xlabel="error (%)", xlim=(0, 1.6 * max([v for v in values if v is not None], default=1))
    )
    axes[0].set(yticks=rows, yticklabels=list(groups), ylim=(len(groups) - 0.5, -0.5))
    return figure


def _annotate_right(axis, row, text):
    axis.annotate(
        text, (0.99, row), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=7, color="0.3"
    )


@styled
def mean_curves(groups: Mapping[str, Sequence[Run]], metric: str, ylabel: str, title: str) -> Figure:
    """A logged metric against the step, on a logarithmic scale: mean and range over runs and seeds, a line a group."""
    figure, (axis,) = new(1, width=5.6, height=4.2)
    for number, (name, runs) in enumerate(groups.items()):
        found = curves(runs, metric)
        if not found:
            continue
        length = min(len(steps) for steps, _ in found)  # of what diverged there is a part
        steps, values = found[0][0][:length], list(zip(*(values[:length] for _, values in found), strict=True))
        line = line_style(number) | {"markevery": (number % 5, max(1, length // 6)), "markersize": 4}
        axis.plot(steps, [sum(v) / len(v) for v in values], label=f"{name} (n = {len(found)})", **line)
        axis.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], color=line["color"], alpha=0.15, linewidth=0
        )
    axis.set(title=title, xlabel="step", ylabel=ylabel, yscale="log")
    plain_logarithmic_labels(axis)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _counts(points):
    counts = sorted({point.n for point in points})
    return f"n = {'-'.join(map(str, counts))}" if counts else "failed"
