"""Tables and figures of the depth ablation, from its run folders alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import precision
from experiments.images import summary_row
from research.analysis import figures, results, signal_figures, tables
from research.analysis.results import Run, spread

# He et al. 2015, Table 6: depth -> parameters as printed, test error in percent (at 110 the best of five runs; their
# mean is 6.61). For plain networks the paper shows curves only.
PAPER = {
    20: (".27M", 8.75),
    32: (".46M", 7.51),
    44: (".66M", 7.17),
    56: (".85M", 6.97),
    110: ("1.7M", 6.43),
    1202: ("19.4M", 7.93),
}


def report(workdir: Path, names: list[str]) -> None:
    """Writes `summary.csv` and `figures/` into the working folder and prints the tables."""
    runs = results.read_runs(workdir / "runs" / name for name in names)
    networks = results.group(runs, lambda run: (run.config["block"], run.config["depth"], run.config["width"]))
    tables.write_csv(workdir / "summary.csv", [summary_row(run, ("block", "depth")) for run in runs])
    dataset = runs[0].config["dataset"]
    title = f"\n{dataset}: errors after the last step{precision.title(runs[0].config)}"
    print(tables.render(title + results.unfinished(names, runs), [_row(*item) for item in networks.items()]))
    if beside := [_beside_paper(*item) for item in networks.items() if _is_papers(*item)]:
        print(tables.render("\nthe paper | here (CIFAR-10, width 16)", beside))
    written = _draw(runs, workdir / "figures")
    print(f"\nwritten: {workdir / 'summary.csv'}, {', '.join(str(path) for path in written)}")


def _draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    def depth(run):
        return run.config["depth"]

    blocks = results.group(runs, lambda run: run.config["block"])
    deepest = max(depth(run) for run in runs)
    probed = [run for run in runs if depth(run) == deepest and (run.path / "signal.json").exists()]
    signals = {run.config["block"]: run.read_json("signal.json") for run in reversed(probed)}  # the first seed's
    drawn = {
        "error_curves": figures.error_curves(
            {f"{block}, {same[0].config['dataset']}": same for block, same in blocks.items()}, depth, "layers"
        ),
        "error_against_depth": figures.error_against(
            {block: results.group(same, depth) for block, same in blocks.items()},
            "layers",
            {"train_error": "training error", "test_error": "test error"},
        ),
    }
    responses = _responses(runs)
    if responses:
        drawn["layer_responses"] = signal_figures.layer_responses(responses)
    if signals:
        in_order = {block: signals[block] for block in blocks if block in signals}
        drawn["signal"] = signal_figures.signal_propagation(in_order, deepest)
    made_from = figures.provenance(runs)
    return [path for name, figure in drawn.items() for path in figures.save(figure, folder / name, made_from)]


def _responses(runs: Sequence[Run]) -> dict[str, list[float]]:
    """After training, of the first seed of each network that did not diverge."""
    networks = results.group(runs, lambda run: f"{run.config['block']}, {run.config['depth']} layers")
    found = {
        name: [signal for run in same if (signal := run.read_json("signal.json"))] for name, same in networks.items()
    }
    return {name: signals[0]["final"]["response_std"] for name, signals in found.items() if signals}


def _row(network: tuple[str, int, int], runs: Sequence[Run]) -> dict[str, Any]:
    block, depth, width = network
    speed = spread(run.result.get("examples_per_second") for run in runs).mean
    return {
        "block": block,
        "layers": str(depth),
        "width": str(width),
        "parameters": runs[0].result.get("params", "-"),
        **{f"{s} error": results.percent(runs, f"{s}_error") for s in ("train", "validation", "test")},
        "steps": runs[0].config["steps"],
        "seconds": f"{sum(sum(run.result.get('seconds', {}).values()) for run in runs):.1f}",
        "examples/s": "-" if math.isnan(speed) else f"{speed:,.0f}",
    }


def _is_papers(network: tuple[str, int, int], runs: Sequence[Run]) -> bool:
    _, depth, width = network
    return runs[0].config["dataset"] == "cifar10" and width == 16 and depth in PAPER


def _beside_paper(network: tuple[str, int, int], runs: Sequence[Run]) -> Mapping[str, Any]:
    block, depth, _ = network
    params, error = PAPER[depth]
    return {
        "block": block,
        "layers": str(depth),
        "parameters: paper": params,
        "here": runs[0].result.get("params", "-"),
        "test error: paper": f"{error}%" if block == "residual" else "curves only",
        "here ": results.percent(runs, "test_error"),
        "steps: paper": 64_000,
        "here  ": runs[0].config["steps"],
    }
