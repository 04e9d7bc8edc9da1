"""The figure of a scaling curve: speed and memory of a training step against one thing that varies."""

from collections.abc import Sequence
from typing import Protocol

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from research.analysis.figures import COLOURS, MARKERS, new, plain_logarithmic_labels, styled

_GUIDE = {"color": "0.3", "linewidth": 1.2, "linestyle": ":", "zorder": 1}  # under what was measured


class Point(Protocol):
    """What is drawn of a point: speeds in examples a second, sizes in bytes of a device."""

    value: int
    examples_a_second: float
    least: float
    most: float
    reference: float
    bytes: int
    argument_bytes: int


class Axis(Protocol):
    """How the panels are labelled, and the power of the memory's guide in what varies."""

    label: str
    examples: str
    speed_guide: str
    memory_guide: str
    memory_power: int


@styled
def scaling(points: Sequence[Point], axis: Axis, title: str, cores: int | None) -> Figure:
    """Speed on the left, memory of a device on the right, all scales logarithmic.

    Marks are medians, bars reach from the least to the most; dotted lines are references: of speed the points' own, of
    memory a power of what varies through the largest point. Where devices vary, a line tells the number of cores.

    Args:
      points: ascending.
      axis: labels.
      title: of the figure.
      cores: of the machine, None where that is not known.
    """
    figure, (speed, memory) = new(2, width=3.7, height=3.4)
    figure.suptitle(title, fontsize=10)
    values = [point.value for point in points]
    middles = [point.examples_a_second for point in points]
    bars = [
        [point.examples_a_second - point.least for point in points],
        [point.most - point.examples_a_second for point in points],
    ]
    marks = {"marker": MARKERS[0], "color": COLOURS[0], "markersize": 5, "capsize": 3}
    speed.errorbar(values, middles, yerr=bars, label="measured: median, least to most", **marks)
    speed.plot(values, [point.reference for point in points], label=axis.speed_guide, **_GUIDE)
    if axis.memory_power < 0 and cores is not None and values[0] <= cores <= values[-1]:
        speed.axvline(cores, color="0.4", linewidth=0.8, linestyle="--", label=f"cores of the machine: {cores}")
    speed.set(title="speed", ylabel=f"{axis.examples} per second")

    lines = {
        "temporaries and arguments": [point.bytes for point in points],
        "arguments: weights, momenta, data": [point.argument_bytes for point in points],
    }
    for number, (name, sizes) in enumerate(lines.items(), start=1):
        style = {"marker": MARKERS[number], "color": COLOURS[number], "linestyle": ("-", "--")[number - 1]}
        memory.plot(values, [size / 2**20 for size in sizes], label=name, markersize=5, **style)
    largest = max(points, key=lambda point: point.bytes)
    guide = [largest.bytes / 2**20 * (value / largest.value) ** axis.memory_power for value in values]
    memory.plot(values, guide, label=axis.memory_guide, **_GUIDE)
    memory.set(title="memory of a training step", ylabel="MiB per device")
    for panel in (speed, memory):
        panel.set(xlabel=axis.label, xscale="log", yscale="log")
        panel.set_xticks(values, [str(value) for value in values])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.margins(x=0.08, y=0.1)
        plain_logarithmic_labels(panel)
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure
