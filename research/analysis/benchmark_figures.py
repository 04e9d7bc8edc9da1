"""The figure of the benchmark: how many times as fast ours is, workload by workload."""

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from research.analysis.figures import COLOURS, MARKERS, legend_below, new, styled


@styled
def speed_ratios(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], labels: Mapping[str, str]
) -> Figure:
    """One panel a mode, one row a workload, one mark a peer: right of the line at 1 ours is the faster.

    Marks are medians over rounds, bars reach from the least to the largest.

    Args:
      panels: mode -> workload -> peer -> ratios, one a round.
      labels: peer -> what the legend calls it.
    """
    rows = list(dict.fromkeys(workload for panel in panels.values() for workload in panel))
    size = {"width": 4.0, "height": 1.3 + 0.3 * max(2, len(rows))}
    figure, axes = new(len(panels), sharey=True, **size)
    for axis, (mode, panel) in zip(axes, panels.items(), strict=True):
        for number, (peer, label) in enumerate(labels.items()):
            shift = 0.16 * (number - (len(labels) - 1) / 2)
            found = {rows.index(name): ratios[peer] for name, ratios in panel.items() if peer in ratios}
            if not found:
                continue
            middles = [statistics.median(values) for values in found.values()]
            axis.errorbar(
                middles,
                [row + shift for row in found],
                xerr=[
                    [middle - min(values) for middle, values in zip(middles, found.values(), strict=True)],
                    [max(values) - middle for middle, values in zip(middles, found.values(), strict=True)],
                ],
                fmt=MARKERS[number],
                color=COLOURS[number],
                markersize=5,
                capsize=2,
                linewidth=1,
                label=f"against {label}",
            )
        axis.axvline(1, color="0.3", linewidth=1)
        axis.set(title=mode, xlabel="times as fast", xscale="log", yticks=range(len(rows)), yticklabels=rows)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.1)
    legend_below(figure, axes[0])
    return figure
