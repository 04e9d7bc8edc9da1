"""Figures of what travels along depth: signals, layer responses, the propagation identities; and of memory."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from research.analysis.figures import legend_below, line_style, new, plain_logarithmic_labels, styled
from research.analysis.results import Run


@styled
def signal_propagation(signals: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], depth: int) -> Figure:
    """How activations and gradients change from the first layer to the last, before training and after.

    Args:
      signals: kind of block -> `initial` and `final` -> statistics of `research.analysis.signal.propagation`.
      depth: layers of the networks, for the title.
    """
    panels = {
        "output_variance": ("variance of the block's output", "block"),
        "weight_gradient_norm": (r"$\Vert dL/dW \Vert$ of the convolution", "convolution"),
        "block_input_gradient_norm": (r"$\Vert dL/dx \Vert$ at the block's input", "block"),
    }
    moments = {"initial": "at initialisation", "final": "after training"}
    figure, axes = new(len(panels), len(moments), height=2.7)
    for row, (moment, when) in enumerate(moments.items()):
        for axis, (statistic, (title, xlabel)) in zip(axes[row * len(panels) :], panels.items(), strict=False):
            for number, (name, found) in enumerate(signals.items()):
                values = found[moment][statistic]
                axis.plot(range(1, len(values) + 1), values, markersize=2.5, label=name, **line_style(number))
            axis.set(yscale="log", xlabel=xlabel, ylabel=title, title=f"{depth} layers, {when}")
            plain_logarithmic_labels(axis)
            axis.locator_params(axis="x", integer=True)
    legend_below(figure, axes[0])
    return figure


@styled
def layer_responses(responses: Mapping[str, Sequence[float]]) -> Figure:
    """Standard deviation of each layer's response: in the order of the layers, and sorted. He et al. 2015, Figure 7.

    Args:
      responses: name of a network -> `response_std` of `research.analysis.signal.propagation`.
    """
    figure, axes = new(2, width=4.2, height=3.0, sharey=True)
    for number, (name, values) in enumerate(responses.items()):
        line = line_style(number) | {"markersize": 3, "markevery": max(1, len(values) // 9)}
        for axis, shown in zip(axes, (values, sorted(values, reverse=True)), strict=True):
            axis.plot(range(1, len(shown) + 1), shown, label=name, **line)
    axes[0].set(title="in order of depth", xlabel="convolution", ylabel="std of the response after BN", ylim=(0, None))
    axes[1].set(title="sorted by size", xlabel="rank")
    legend_below(figure, axes[0])
    return figure


@styled
def identities(variants: Mapping[str, Sequence[Run]], title: str) -> Figure:
    """The statistics of `research.analysis.identities` against the unit: a line a kind of unit, the mean over runs."""
    panels = {
        "gradient_norm": r"$\Vert dE/dx_l \Vert$",
        "shortcut_gradient_norm": r"part of $dE/dx_l$ through shortcuts alone",
        "jacobian_gain": r"unit's Jacobian, $\Vert J \Vert_F / \sqrt{dim}$",
        "shortcut_jacobian_gain": r"its shortcut's, $\Vert J_h \Vert_F / \sqrt{dim}$",
    }
    figure, axes = new(2, 2, width=4.4, height=3.0)
    for axis, (statistic, name) in zip(axes, panels.items(), strict=True):
        for number, (label, runs) in enumerate(variants.items()):
            values = [sum(seeds) / len(seeds) for seeds in zip(*(run.result[statistic] for run in runs), strict=True)]
            values = [value or math.nan for value in values]  # through a shortcut scaled by 0 nothing comes: no line
            line = line_style(number) | {"markevery": (number % 6, 6), "markersize": 4}
            axis.plot(range(1, len(values) + 1), values, label=label, **line)
        axis.set(title=name, xlabel="unit l", yscale="log")
        axis.locator_params(axis="x", integer=True)
    for axis in axes[2:]:
        plain_logarithmic_labels(axis)
    figure.suptitle(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@styled
def memory_against_depth(groups: Mapping[str, Mapping[int, Run]], powers: Mapping[str, float], title: str) -> Figure:
    """Bytes of a step's temporaries against layers on two logarithmic scales.

    Args:
      groups: name -> layers -> run.
      powers: name -> slope of the group's guide, a dotted line through its deepest network: 1 or 1/2.
      title: of the figure.
    """
    figure, (axis,) = new(1, width=4.8, height=4.0)
    for number, (name, by_depth) in enumerate(groups.items()):
        depths = sorted(by_depth)
        sizes = [by_depth[depth].result["temporary_bytes"] / 2**30 for depth in depths]
        axis.plot(depths, sizes, label=name, **line_style(number))
        slope = {1.0: "depth", 0.5: "its square root"}[powers[name]]
        guide = [sizes[-1] * (depth / depths[-1]) ** powers[name] for depth in depths]
        axis.plot(depths, guide, color="0.5", linewidth=0.8, linestyle=":", label=f"proportional to {slope}")
    axis.set(title=title, xlabel="layers", ylabel="temporaries of a step (GiB)", xscale="log", yscale="log")
    ticks = sorted({depth for by_depth in groups.values() for depth in by_depth})
    axis.set_xticks(ticks, [str(depth) for depth in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())
    plain_logarithmic_labels(axis)
    axis.legend()
    return figure
