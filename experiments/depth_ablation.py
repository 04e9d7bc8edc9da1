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
from collections.abc import Mapping
from typing import Any

from experiments import images, precision
from experiments.options import option
from experiments.runner import Experiment, main, report_of

# What a data set is trained with unless flags say otherwise: sized for minutes (CIFAR-10: an hour) on two cores.
DEFAULTS = {
    "digits": {"width": 8, "epochs": 15},
    "mnist": {"width": 8, "epochs": 2},
    "cifar10": {"width": 16, "epochs": 10},
}


@dataclasses.dataclass(frozen=True)
class Config(images.ImageConfig):
    """The flags."""

    depths: tuple[int, ...] = option((8, 20, 56), "Layers, each 6n+2.")
    blocks: tuple[str, ...] = option(("plain", "residual"), "Kinds of block.", choices=("plain", "residual"))
    warmup_from_depth: int = option(0, "Only networks at least this deep warm up.", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(images.ImageCell):
    """One network to train."""

    block: str
    depth: int

    @property
    def name(self) -> str:
        return f"{self.block}-{self.depth}-w{self.width}-seed{self.seed}{precision.suffix(self)}"


def cells(config: Config) -> list[Cell]:
    """The grid: blocks x depths x seeds."""
    from research.models import cifar_resnet

    recipe = images.recipe(config, DEFAULTS)
    for depth in config.depths:
        cifar_resnet(depth, width=recipe["width"])  # raises where there is no such network
    return [
        Cell(
            **recipe
            | {"warmup_steps": config.warmup_steps if depth >= config.warmup_from_depth else 0}
            | {"block": block, "depth": depth, "seed": seed}
        )
        for depth in config.depths
        for block in config.blocks
        for seed in config.seeds
    ]


def run(cell: Cell, context: Any) -> Mapping[str, Any]:
    """Trains one network and measures how signals travel in it, before and after."""
    trained = images.train(cell, functools.partial(network_of, cell), context)
    images.measure_signal(trained, network_of, cell, context)
    return trained.result


def network_of(cell: Cell, **options: Any) -> Any:
    """The network of a cell; options go to `cifar_resnet`."""
    from research.models import cifar_resnet

    return cifar_resnet(cell.depth, cell.block, cell.width, dtype=precision.dtype(cell), **options)


EXPERIMENT = Experiment(
    name="depth_ablation",
    config=Config,
    cells=cells,
    run=run,
    report=report_of("depth_report"),
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
