"""The propagation identities of He et al. 2016, section 2, unit by unit at initialisation; nothing is trained.

With h and f identities, x_L = x_l + sum F and dE/dx_l = dE/dx_L (1 + d/dx_l sum F): the first term reaches every unit
whole. Where the shortcut scales, gates or convolves, that term is multiplied unit by unit; after 18 units of one stage
0.5^18 is 4e-6. The report shows the gradient at every unit, its part through shortcuts alone, and the gain of every
unit's Jacobian, for the kinds of unit of `identity_mappings` at 110 layers.

Differences from the paper: it argues, and prints no such figure. Batch statistics couple the images of a batch, so a
gradient is that of the whole batch.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import images
from experiments.identity_mappings import network_of, parse_network
from experiments.identity_tables import VARIANTS
from experiments.options import option
from experiments.runner import Experiment, main

_STATISTICS = ("gradient_norm", "shortcut_gradient_norm", "jacobian_gain", "shortcut_jacobian_gain", "forward_residue")


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    dataset: str = option("digits", "Whose images go through the networks.", choices=images.DATASETS)
    data_dir: str | None = option(None, "Folder of the data set's original files (default: ./data).")
    network: str = option("basic-110", "Unit and layers, such as basic-110 or bottleneck-164.")
    variants: tuple[str, ...] = option(
        (
            "full_preactivation",
            "original",
            "scale_0.5_0.5",
            "exclusive_gate_0",
            "exclusive_gate_-6",
            "shortcut_gate_0",
            "conv_1x1",
        ),
        "Kinds of shortcut and of activation.",
        choices=tuple(VARIANTS),
    )
    seeds: tuple[int, ...] = option((0, 1, 2), "Initialisations.", minimum=0)
    width: int = option(8, "Channels of the first stage.", minimum=1)
    batch_size: int = option(64, "Images in the pass.", minimum=2)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One network to look into."""

    dataset: str
    variant: str
    unit: str
    depth: int
    width: int
    batch_size: int
    seed: int
    data_dir: str | None = option(None, "", identity=False)
    precision = "float32"  # no field: the identities are about rounding, there is no choice

    @property
    def name(self) -> str:
        return (
            f"{self.variant}-{self.unit}-{self.depth}-w{self.width}-b{self.batch_size}-{self.dataset}-seed{self.seed}"
        )


def cells(config: Config) -> list[Cell]:
    """The grid: variants x seeds."""
    unit, depth = parse_network(config.network)
    images.check_batch_size(config)
    same = {name: getattr(config, name) for name in ("dataset", "width", "batch_size", "data_dir")}
    grid = [
        Cell(**same, variant=variant, unit=unit, depth=depth, seed=seed)
        for variant in config.variants
        for seed in config.seeds
    ]
    for cell in grid:
        network_of(cell)  # raises where there is no such network
    return grid


def run(cell: Cell, context: Any) -> Mapping[str, Any]:
    """Initialises one network and measures one pass."""
    import jax

    from research.analysis.identities import identities
    from research.tasks import classification
    from research.training import environment, optimizers, state

    data = images.load(cell.dataset, cell.data_dir)
    environment.record(context.folder.path, context.command, data.checksums, context.reporter.note)
    batch = classification.prepare(data.train.images[: cell.batch_size], images.mean_image(data))
    labels = data.train.labels[: cell.batch_size]
    model = network_of(cell, num_classes=data.num_classes)
    initial = state.initialize(model, optimizers.sgd(lambda step: 0.0), cell.seed, batch)
    measured = identities(model)(initial.variables, batch, labels, jax.random.key(cell.seed))
    context.reporter.note(f"{context.label}: done")
    return {**measured, "params": sum(leaf.size for leaf in jax.tree.leaves(initial.params))}


def report(workdir: Path, names: list[str]) -> None:
    """Writes `summary.csv` (a row a unit) and the figure; prints what the identities say."""
    from research.analysis import figures, results, signal_figures, tables

    runs = results.read_runs(workdir / "runs" / name for name in names)
    variants = results.group(runs, lambda run: VARIANTS[run.config["variant"]].label)
    tables.write_csv(workdir / "summary.csv", [row for run in runs for row in _units(run)])
    rows = [{"unit": label, **_row(same)} for label, same in variants.items()]
    config = runs[0].config
    network = f"{config['unit']}-{config['depth']}"
    title = f"\n{network} at initialisation, means over seeds (n={len({run.config['seed'] for run in runs})})"
    print(tables.render(title, rows))
    written = figures.save(
        signal_figures.identities(
            variants, f"{network}, width {config['width']}, {config['dataset']}, at initialisation"
        ),
        workdir / "figures" / f"identities_{network}",
        figures.provenance(runs),
    )
    print(f"\nwritten: {workdir / 'summary.csv'}, {', '.join(map(str, written))}")


def _units(run: Any) -> list[dict[str, Any]]:
    config = {name: run.config[name] for name in ("dataset", "variant", "unit", "depth", "width", "seed")}
    lists = [run.result[name] for name in _STATISTICS]
    return [
        config | {"number": number} | dict(zip(_STATISTICS, values, strict=True))
        for number, values in enumerate(zip(*lists, strict=True), start=1)
    ]


def _row(runs: Sequence[Any]) -> dict[str, Any]:
    def mean(numbers):
        numbers = [number for number in numbers if number is not None]
        return sum(numbers) / len(numbers) if numbers else float("nan")

    def ratio(name):
        # Over the units of the last stage that keep the shape, which the identities are about. There are none where a
        # stage is one unit, and nothing to compare where the shortcut is scaled by 0.
        stages = [run.result[name][2 * len(run.result[name]) // 3 + 1 :] for run in runs]
        return mean([stage[0] / stage[-1] for stage in stages if stage and stage[-1]])

    residues = [value for run in runs for value in run.result["forward_residue"] if value is not None]
    return {
        "|dE/dx_l| / |dE/dx_L|, last stage": f"{ratio('gradient_norm'):.3g}",
        "through shortcuts alone": f"{ratio('shortcut_gradient_norm'):.3g}",
        "gain of a unit's Jacobian": f"{mean([v for run in runs for v in run.result['jacobian_gain']]):.3f}",
        "of its shortcut's": f"{mean([v for run in runs for v in run.result['shortcut_jacobian_gain']]):.3f}",
        "largest |x_L - x_l - sum F| / |x_L|": f"{max(residues, default=float('nan')):.2g}",
    }


EXPERIMENT = Experiment(
    name="propagation",
    config=Config,
    cells=cells,
    run=run,
    report=report,
    smoke={"width": 4, "batch_size": 4, "seeds": (0,), "network": "basic-20"},
)

if __name__ == "__main__":
    main(EXPERIMENT)
