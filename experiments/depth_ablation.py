"""Plain against residual networks of growing depth: the degradation problem, He et al. 2015, section 4.2.

Deeper plain networks end with a higher TRAINING error: they are not overfitted, they are not optimised. With identity
shortcuts of no parameters the same layers train to any depth.

By default: depth 8, 20 and 56 on the embedded 8x8 digits, in under three minutes on two cores. `--preset=he2015` is the
paper's CIFAR-10 recipe: 64k iterations of 128 on 45k images, crops and flips, per-pixel mean, learning rate 0.1 divided
by 10 at 32k and 48k, weight decay 1e-4, and for 110 layers a warm-up.

Differences from the paper: the warm-up lasts 400 iterations (the paper: until the training error is below 80%, 'about
400'); one network trains on all devices with synchronised BatchNorm (the paper: two GPUs, unsynchronised); momentum is
in PyTorch's form; the default run is a scaled one (digits, 30 epochs, drops at the same fractions of the schedule).
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.runner import Experiment, main, option
from research.data.images import TRAIN_EXAMPLES
from research.errors import UsageError

# FACTS of He et al. 2015, Table 6: depth -> parameters as printed, test error in percent (of the best run at 110).
PAPER = {20: (".27M", 8.75), 32: (".46M", 7.51), 44: (".66M", 7.17), 56: (".85M", 6.97), 110: ("1.7M", 6.43), 1202: ("19.4M", 7.93)}  # fmt: skip
DEFAULT_EPOCHS = {"digits": 30, "mnist": 2, "cifar10": 10}
DATASETS = tuple(DEFAULT_EPOCHS)


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    dataset: str = option("digits", "What to classify; digits are embedded, the others are read from --data_dir.", choices=DATASETS)  # fmt: skip
    data_dir: str | None = option(None, "Folder of the data set's original files (default: ./data).")
    depths: tuple[int, ...] = option((8, 20, 56), "Layers, each 6n+2.")
    blocks: tuple[str, ...] = option(("plain", "residual"), "Kinds of block.", choices=("plain", "residual"))
    seeds: tuple[int, ...] = option((0,), "One run of every network per seed.")
    width: int = option(16, "Channels of the first stage (16 in the paper); doubled in each further stage.")
    epochs: int | None = option(None, "Passes over the training set (default: 30 on digits, 2 on mnist, 10 on cifar10).")
    steps: int | None = option(None, "Optimiser steps, instead of --epochs.")
    batch_size: int = option(128, "Examples a step, over all devices.")
    learning_rate: float = option(0.1, "Divided by 10 after 1/2 and 3/4 of the steps.")
    weight_decay: float = option(1e-4, "L2 penalty of every parameter.")
    warmup_steps: int = option(10, "First steps at a tenth of the learning rate.")
    warmup_from_depth: int = option(0, "Only networks at least this deep warm up.")
    augmentation: str = option("auto", "Training images: random crops (padding 4) and mirror images; auto is crop_and_flip on cifar10 and none elsewhere.", choices=("auto", "none", "crop", "crop_and_flip"))  # fmt: skip
    evaluations: int = option(15, "How often, evenly spread, the validation and test errors are measured.")
    steps_per_call: int = option(10, "Steps of one compiled stretch, and the interval of the logged training error.")
    parallel: str = option("auto", "How a step is spread over devices; auto: jit on one, pmap on several.", choices=("auto", "pmap", "jit", "shard_map"))  # fmt: skip
    devices: int | None = option(None, "How many devices; on the CPU these are made (default there: 1, else all).")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One network to train."""

    dataset: str
    block: str
    depth: int
    width: int
    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    augmentation: str
    evaluate_every: int
    steps_per_call: int
    data_dir: str | None = option(None, "", identity=False)
    parallel: str = option("auto", "", identity=False)
    devices: int | None = option(None, "", identity=False)

    @property
    def name(self) -> str:
        return f"{self.block}-{self.depth}-w{self.width}-seed{self.seed}"


def cells(config: Config) -> list[Cell]:
    """The grid: blocks x depths x seeds."""
    for depth in config.depths:
        if depth < 8 or (depth - 2) % 6:
            below = max(8, depth - (depth - 2) % 6)
            raise UsageError(f"--depths: {depth} is not 6n+2 (three stages of n two-layer blocks); try {below} or {below + 6}")  # fmt: skip
    examples = TRAIN_EXAMPLES[config.dataset]
    for name in ("width", "batch_size", "evaluations", "steps_per_call"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name}={getattr(config, name)}: give at least 1")
    for name in ("epochs", "steps", "devices"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UsageError(f"--{name}={getattr(config, name)}: give at least 1")
    if config.batch_size > examples:
        raise UsageError(
            f"--batch_size={config.batch_size} is larger than the {examples} training images of {config.dataset}: "
            "give at most that"
        )
    if not (math.isfinite(config.learning_rate) and config.learning_rate > 0):
        raise UsageError(f"--learning_rate={config.learning_rate}: give a positive number")
    epochs = config.epochs or DEFAULT_EPOCHS[config.dataset]
    steps = config.steps or max(1, round(epochs * examples / config.batch_size))
    # Whole stretches between evaluations, so that one compiled program serves all of the run.
    stretches = max(1, round(steps / config.evaluations / config.steps_per_call))
    augmentation = config.augmentation
    if augmentation == "auto":
        augmentation = "crop_and_flip" if config.dataset == "cifar10" else "none"
    return [
        Cell(
            dataset=config.dataset,
            block=block,
            depth=depth,
            width=config.width,
            seed=seed,
            steps=steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            warmup_steps=config.warmup_steps if depth >= config.warmup_from_depth else 0,
            augmentation=augmentation,
            evaluate_every=stretches * config.steps_per_call,
            steps_per_call=config.steps_per_call,
            data_dir=config.data_dir,
            parallel=config.parallel,
            devices=config.devices,
        )
        for depth in config.depths
        for block in config.blocks
        for seed in config.seeds
    ]


@functools.lru_cache(maxsize=1)
def _data(dataset: str, data_dir: str | None):
    from research.data import images

    return images.load(dataset, data_dir)


def run(cell: Cell, context: Any) -> Mapping[str, Any]:
    """Trains one network and measures how signals travel in it, before and after."""
    import jax
    import numpy as np

    from research.analysis import signal
    from research.models import cifar_resnet
    from research.tasks.classification import classification
    from research.training import environment, loop, optimizers
    from research.training.run_folder import write_json_atomic

    data = _data(cell.dataset, cell.data_dir)
    environment.record(context.folder.path, sys.argv, data.checksums, context.reporter.note)
    parts = (data.train, data.validation, data.test)
    splits = loop.Splits(
        {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels")},
        *map(len, parts),
    )
    mean = data.train.images.mean(axis=0, dtype=np.float64).astype(np.float32)
    crop, flip = (4 if "crop" in cell.augmentation else 0), "flip" in cell.augmentation
    schedule = optimizers.step_decay(
        cell.learning_rate, drops=(cell.steps // 2, cell.steps * 3 // 4), warmup_steps=cell.warmup_steps
    )
    make_model = functools.partial(cifar_resnet, cell.depth, cell.block, cell.width, data.num_classes)
    plan = loop.Plan(
        seed=cell.seed,
        steps=cell.steps,
        batch_size=cell.batch_size,
        steps_per_call=cell.steps_per_call,
        evaluate_every=cell.evaluate_every,
        parallel=cell.parallel,
        devices=cell.devices,
    )
    outcome = loop.train(
        make_model,
        functools.partial(classification, mean=mean, crop=crop, flip=flip),
        optimizers.sgd(schedule, weight_decay=cell.weight_decay),
        schedule,
        splits,
        plan,
        context,
    )
    measure = signal.propagation(make_model())
    probe = (data.train.images[:128].astype(np.float32) - mean) / 128, data.train.labels[:128]
    write_json_atomic(
        context.folder.path / "signal.json",
        {
            "initial": measure(outcome.initial.variables, *probe),
            "final": measure(outcome.final.variables, *probe),
        },
    )
    errors = {f"{split}_{metric}": v for split, metrics in outcome.evaluations.items() for metric, v in metrics.items()}
    return {
        **errors,
        "params": sum(leaf.size for leaf in jax.tree.leaves(outcome.final.params)),
        "steps": cell.steps,
        "seconds": outcome.seconds,
        "examples_per_second": outcome.examples_per_second,
        "final_state_sha256": outcome.sha256,
    }


def report(workdir: Path, names: list[str]) -> None:
    """Makes `summary.csv`, the tables on standard output and `figures/`, from the run folders."""
    from research.analysis import figures, results, tables

    runs = results.read_runs(workdir / "runs" / name for name in names)
    tables.write_csv(workdir / "summary.csv", [_summary(run) for run in runs])
    unfinished = len(names) - len(runs)
    missing = f"; {unfinished} of {len(names)} cells are not finished" if unfinished else ""
    networks = results.group(runs, lambda run: (run.config["block"], run.config["depth"], run.config["width"]))
    print(tables.render(f"\n{runs[0].config['dataset']}: final errors{missing}", [_row(*item) for item in networks.items()]))
    if paper := _beside_paper(networks):
        print(tables.render("\nBeside the paper (CIFAR-10, width 16)", paper))

    def by(block):
        return [run for run in runs if run.config["block"] == block]

    def depth(run):
        return run.config["depth"]

    blocks = list(results.group(runs, lambda run: run.config["block"]))
    made_from = figures.provenance(runs)
    curves = {f"{block}, {runs[0].config['dataset']}": by(block) for block in blocks}
    against = {block: results.group(by(block), depth) for block in blocks}
    deepest = max(depth(run) for run in runs)
    signals = {block: next((run for run in by(block) if depth(run) == deepest), None) for block in blocks}
    signals = {block: run.read_json("signal.json") for block, run in signals.items() if run}
    written = []
    for name, figure in (
        ("error_curves", figures.error_curves(curves, depth, lambda value: f"{value} layers")),
        ("error_against_depth", figures.error_against(against, "layers", {"train_error": "training error", "test_error": "test error"})),  # fmt: skip
        ("signal", figures.signal_propagation({name: found for name, found in signals.items() if found}, deepest)),
    ):
        written += figures.save(figure, workdir / "figures" / name, made_from)
    print(f"\nwritten: {workdir / 'summary.csv'}, " + ", ".join(str(path) for path in written))


def _summary(run) -> dict[str, Any]:
    keys = ("dataset", "block", "depth", "width", "seed", "steps", "batch_size", "learning_rate", "augmentation")
    measured = ("params", "train_error", "validation_error", "test_error", "train_loss", "validation_loss", "test_loss")
    seconds = run.result.get("seconds", dict.fromkeys(("compile", "train", "evaluate", "checkpoint"), 0.0))
    return {
        **{name: run.config[name] for name in keys},
        **{name: run.result.get(name) for name in measured},
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "seconds": sum(seconds.values()),
        "examples_per_second": run.result.get("examples_per_second"),
        "failure": run.result.get("failure", ""),
        "final_state_sha256": run.result.get("final_state_sha256", ""),
    }


def _row(network, runs) -> dict[str, Any]:
    from research.analysis.results import spread

    block, depth, width = network
    speed = spread(run.result.get("examples_per_second") for run in runs).mean
    errors = {f"{s} error": spread(run.result.get(f"{s}_error") for run in runs).percent() for s in ("train", "validation", "test")}  # fmt: skip
    return {
        "block": block,
        "layers": str(depth),
        "width": str(width),
        "parameters": runs[0].result.get("params", "-"),
        "runs": len(runs),
        **errors,
        "steps": runs[0].config["steps"],
        "seconds": f"{sum(sum(run.result.get('seconds', {}).values()) for run in runs):.1f}",
        "examples/s": "-" if math.isnan(speed) else f"{speed:,.0f}",
    }


def _beside_paper(networks) -> list[dict[str, Any]]:
    """A row for each network that is the paper's: residual or plain, CIFAR-10, width 16, a depth of its Table 6."""
    from research.analysis.results import spread

    rows = []
    for (block, depth, width), runs in networks.items():
        if runs[0].config["dataset"] == "cifar10" and width == 16 and depth in PAPER:
            params, error = PAPER[depth]
            rows.append(
                {
                    "block": block,
                    "layers": str(depth),
                    "parameters, paper": params,
                    "here": runs[0].result.get("params", "-"),
                    "test error, paper": f"{error}%" if block == "residual" else "curves only",
                    "here ": spread(run.result.get("test_error") for run in runs).percent(),
                    "steps, paper": 64_000,
                    "here  ": runs[0].config["steps"],
                }
            )
    return rows


EXPERIMENT = Experiment(
    name="depth_ablation",
    config=Config,
    cells=cells,
    run=run,
    report=report,
    presets={
        "he2015": {
            "dataset": "cifar10",
            "depths": (20, 32, 44, 56, 110),
            "steps": 64_000,
            "batch_size": 128,
            "learning_rate": 0.1,
            "weight_decay": 1e-4,
            "warmup_steps": 400,
            "warmup_from_depth": 110,
            "augmentation": "crop_and_flip",
            "evaluations": 64,
            "steps_per_call": 100,
        }
    },
    smoke={"width": 4, "steps": 4, "batch_size": 16, "steps_per_call": 2, "evaluations": 2},
    exclusive=(("epochs", "steps"),),
)

if __name__ == "__main__":
    main(EXPERIMENT)
