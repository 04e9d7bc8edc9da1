"""Plain against residual networks of growing depth: the degradation problem, He et al. 2015, section 4.2.

Deeper plain networks end with a higher TRAINING error: they are not overfitted, they are not optimised. With identity
shortcuts of no parameters the same layers train.

By default: depth 8, 20 and 56 on the embedded 8x8 digits, in under three minutes on two cores. `--preset=he2015` is the
paper's CIFAR-10 recipe: 64k iterations of 128 on 45k images, crops and flips, per-pixel mean, learning rate 0.1 divided
by 10 at 32k and 48k, weight decay 1e-4, and for 110 layers a warm-up.

Differences from the paper: the warm-up lasts 400 iterations (the paper: until the training error is below 80%, 'about
400'); one network trains on all devices with synchronised BatchNorm (the paper: two GPUs, unsynchronised); momentum is
in PyTorch's form; the last model is reported, none is chosen. The default run is scaled down: digits, width 8, 15
epochs, the learning rate dropped at the same fractions of the run.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from experiments.depth_report import report
from experiments.runner import Experiment, main, option
from research.data.images import TRAIN_EXAMPLES
from research.errors import UsageError
from research.files import write_json_atomic

# What a data set is trained with unless flags say otherwise: sized for minutes (CIFAR-10: an hour) on two cores.
DEFAULTS = {
    "digits": {"width": 8, "epochs": 15},
    "mnist": {"width": 8, "epochs": 2},
    "cifar10": {"width": 16, "epochs": 10},
}
_AUGMENTATIONS = ("auto", "none", "crop", "crop_and_flip")
_PARALLEL = ("auto", "pmap", "jit", "shard_map")


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    dataset: str = option(
        "digits", "What to classify; digits are embedded, the others are read from --data_dir.", choices=tuple(DEFAULTS)
    )
    data_dir: str | None = option(None, "Folder of the data set's original files (default: ./data).")
    depths: tuple[int, ...] = option((8, 20, 56), "Layers, each 6n+2.")
    blocks: tuple[str, ...] = option(("plain", "residual"), "Kinds of block.", choices=("plain", "residual"))
    seeds: tuple[int, ...] = option((0,), "One run of every network per seed.", minimum=0)
    width: int | None = option(
        None, "Channels of the first stage (default: 16 as in the paper, 8 on digits and mnist).", minimum=1
    )
    epochs: int | None = option(
        None, "Passes over the training set (default: 15 on digits, 2 on mnist, 10 on cifar10).", minimum=1
    )
    steps: int | None = option(None, "Optimiser steps, instead of --epochs.", minimum=1)
    batch_size: int = option(128, "Examples a step, over all devices.", minimum=1)
    learning_rate: float = option(0.1, "Divided by 10 after 1/2 and 3/4 of the steps.")
    weight_decay: float = option(1e-4, "L2 penalty of every parameter.", minimum=0)
    warmup_steps: int = option(10, "First steps at a tenth of the learning rate.", minimum=0)
    warmup_from_depth: int = option(0, "Only networks at least this deep warm up.", minimum=0)
    augmentation: str = option(
        "auto",
        "Random crops (padding 4), mirror images; auto: both on cifar10, none elsewhere.",
        choices=_AUGMENTATIONS,
    )
    evaluations: int = option(10, "How often, evenly spread, validation and test errors are measured.", minimum=1)
    train_evaluation_examples: int | None = option(
        None, "Of how many training examples the final training error is (default: all).", minimum=1
    )
    steps_per_call: int = option(10, "Steps of a compiled stretch; interval of the logged training error.", minimum=1)
    parallel: str = option(
        "auto", "How a step is spread over devices; auto: jit on one, pmap on several.", choices=_PARALLEL
    )
    devices: int | None = option(
        None, "How many devices (default: all; on the CPU, where any number can be made, 1).", minimum=1
    )


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
    train_evaluation_examples: int | None
    data_dir: str | None = option(None, "", identity=False)
    parallel: str = option("auto", "", identity=False)
    devices: int | None = option(None, "", identity=False)

    @property
    def name(self) -> str:
        return f"{self.block}-{self.depth}-w{self.width}-seed{self.seed}"


def cells(config: Config) -> list[Cell]:
    """The grid: blocks x depths x seeds."""
    from research.models import cifar_resnet

    if not (math.isfinite(config.learning_rate) and config.learning_rate > 0):
        raise UsageError(f"--learning_rate={config.learning_rate}: give a positive number")
    examples = TRAIN_EXAMPLES[config.dataset]
    if config.batch_size > examples:
        raise UsageError(
            f"--batch_size={config.batch_size}: {config.dataset} has {examples} training images, give fewer"
        )
    if config.devices and config.batch_size % config.devices:
        raise UsageError(
            f"--batch_size={config.batch_size} does not divide by {config.devices} devices: give a multiple of that"
        )
    width = config.width or DEFAULTS[config.dataset]["width"]
    for depth in config.depths:
        cifar_resnet(depth, width=width)  # raises where there is no such network
    epochs = config.epochs or DEFAULTS[config.dataset]["epochs"]
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
            width=width,
            seed=seed,
            steps=steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            warmup_steps=config.warmup_steps if depth >= config.warmup_from_depth else 0,
            augmentation=augmentation,
            evaluate_every=stretches * config.steps_per_call,
            steps_per_call=config.steps_per_call,
            train_evaluation_examples=config.train_evaluation_examples,
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
    from research.tasks import classification
    from research.training import loop, optimizers

    data = _data(cell.dataset, cell.data_dir)
    parts = (data.train, data.validation, data.test)
    splits = loop.Splits(
        {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels")},
        *map(len, parts),
        checksums=data.checksums,
    )
    mean = data.train.images.mean(axis=0, dtype=np.float64).astype(np.float32)
    crop, flip = (4 if "crop" in cell.augmentation else 0), "flip" in cell.augmentation
    schedule = optimizers.step_decay(
        cell.learning_rate, drops=(cell.steps // 2, cell.steps * 3 // 4), warmup_steps=cell.warmup_steps
    )
    make_model = functools.partial(cifar_resnet, cell.depth, cell.block, cell.width, data.num_classes)
    plan = loop.Plan(**{field.name: getattr(cell, field.name) for field in dataclasses.fields(loop.Plan)})
    outcome = loop.train(
        make_model,
        functools.partial(classification.classification, mean=mean, crop=crop, flip=flip),
        optimizers.sgd(schedule, weight_decay=cell.weight_decay),
        schedule,
        splits,
        plan,
        context,
    )
    measure = signal.propagation(make_model())
    batch = classification.prepare(data.train.images[:128], mean), data.train.labels[:128]
    moments = {"initial": outcome.initial, "final": outcome.final}
    signals = {moment: measure(state.variables, *batch) for moment, state in moments.items()}
    write_json_atomic(context.folder.path / "signal.json", signals)
    errors = {f"{split}_{metric}": v for split, metrics in outcome.evaluations.items() for metric, v in metrics.items()}
    return {
        **errors,
        "params": sum(leaf.size for leaf in jax.tree.leaves(outcome.final.params)),
        "steps": cell.steps,
        "seconds": outcome.seconds,
        "examples_per_second": outcome.examples_per_second,
        "final_state_sha256": outcome.sha256,
    }


EXPERIMENT = Experiment(
    name="depth_ablation",
    config=Config,
    cells=cells,
    run=run,
    report=report,
    presets={
        "he2015": {
            "dataset": "cifar10",
            "width": 16,
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
