"""Tables and figures of the identity-mapping comparisons, from their run folders alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import precision
from experiments.identity_tables import FAIL, PAPER, VARIANTS, paper_error, paper_network
from experiments.images import summary_row
from research.analysis import figures, results, signal_figures, tables
from research.analysis.results import Run, spread


def report(workdir: Path, names: list[str]) -> None:
    """Writes `summary.csv` and `figures/` into the working folder and prints the tables."""
    runs = results.read_runs(workdir / "runs" / name for name in names)
    tables.write_csv(workdir / "summary.csv", [summary_row(run, ("variant", "unit", "depth")) for run in runs])
    written = []
    made_from = figures.provenance(runs)
    for network, same in results.group(runs, _network).items():
        variants = results.group(same, lambda run: run.config["variant"])
        reference = paper_network(network, variants)
        title = f"\n{network}, {same[0].config['dataset']}: paper | here{precision.title(same[0].config)}"
        title += results.unfinished(names, runs)
        print(tables.render(title, [_row(reference, *item) for item in variants.items()]))
        for name, figure in _figures(network, reference, variants).items():
            written += figures.save(figure, workdir / "figures" / f"{name}_{network}", made_from)
    print("\n" + "\n".join(["Differences of these runs from the paper's:", *differences(runs)]))
    print(f"\nwritten: {workdir / 'summary.csv'}, {', '.join(map(str, written))}")


def differences(runs: Sequence[Run]) -> list[str]:
    """What of the setting is not the paper's, one line each."""
    config = runs[0].config
    here = {
        "data": (config["dataset"], "cifar10"),
        "width": (config["width"], 16),
        "steps": (config["steps"], 64_000),
        "examples a step": (config["batch_size"], 128),
        "learning rate": (config["learning_rate"], 0.1),
        "warm-up steps": (config["warmup_steps"], 400),
        "augmentation": (config["augmentation"], "crop_and_flip"),
        "weight decay": (config["weight_decay"], 1e-4),
        "seeds": (len({run.config["seed"] for run in runs}), 5),
    }
    lines = [f"  {name}: {ours} (paper: {papers})" for name, (ours, papers) in here.items() if ours != papers]
    if others := [network for network in results.group(runs, _network) if network not in PAPER]:
        lines.append(f"  networks: {', '.join(others)} (paper: {', '.join(PAPER)})")
    return [*lines, "  mean ± standard deviation over seeds (paper: median of 5; 'fail' is an error above 20%)"]


def _network(run: Run) -> str:
    return f"{run.config['unit']}-{run.config['depth']}"


def _row(reference: str, variant: str, runs: Sequence[Run]) -> dict[str, Any]:
    diverged = sum(1 for run in runs if run.result.get("failure"))
    return {
        "unit": VARIANTS[variant].label,
        f"paper: {reference}, test error": paper_error(variant, reference),
        "here: test error": results.percent(runs, "test_error"),
        "training error": results.percent(runs, "train_error"),
        "training loss": _number(runs, "train_loss"),
        "parameters": runs[0].result.get("params", "-"),
        "diverged": f"{diverged} of {len(runs)}" if diverged else "",
    }


def _number(runs: Sequence[Run], name: str) -> str:
    found = spread(run.result.get(name) for run in runs)
    if not found.n:
        return "failed"
    return f"{found.mean:.3f} ± {found.std:.3f}" if found.n > 1 else f"{found.mean:.3f}"


def _figures(network: str, reference: str, variants: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    labelled = {VARIANTS[variant].label: runs for variant, runs in variants.items()}
    papers = [PAPER[reference][variant] for variant in variants]
    drawn = {
        "errors": figures.ranked(
            labelled,
            {"train_error": "training error here", "test_error": "test error here"},
            ("test error in the paper", [None if error == FAIL else error for error in papers]),
            f"{_setting(variants)}; the paper: {reference}, cifar10, 64,000 steps",
        ),
        "curves": figures.mean_curves(labelled, "loss", "training loss", _setting(variants)),
    }
    signals = {
        label: found
        for label, runs in labelled.items()
        if (found := next((signal for run in runs if (signal := run.read_json("signal.json"))), None))
    }
    if signals:
        drawn["signal"] = signal_figures.signal_propagation(signals, int(network.split("-")[1]))
    return drawn


def _setting(variants: Mapping[str, Sequence[Run]]) -> str:
    run = next(iter(variants.values()))[0]
    config = run.config
    return f"{_network(run)}, width {config['width']}, {config['dataset']}, {config['steps']:,} steps"
