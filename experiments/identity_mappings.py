"""Which shortcut, and where the activations sit: He et al. 2016, "Identity Mappings in Deep Residual Networks".

A unit is y = h(x) + F(x), next x = f(y). With h and f both identities the signal reaches any unit from any other; what
scales, gates or convolves the shortcut is multiplied over all the units between. The paper's three comparisons on
CIFAR-10 are presets: `--preset=shortcuts` (Table 1: six kinds of h at 110 layers), `--preset=activations` (Table 2:
five placements of the activations, f among them, at 110 and 164) and `--preset=depth` (Table 3: original against full
pre-activation to 1,001 layers).

By default: a scaled-down version on the embedded 8x8 digits, in under five minutes on two cores.

Differences from the paper: means and standard deviations over seeds (the paper: medians of five runs); one network
trains on all devices with synchronised BatchNorm (the paper: two GPUs, unsynchronised); initialisation counts fan-in
(the released code: fan-out); a projection has BatchNorm where convolutions do. Table 3's CIFAR-100 half is left out.
The report lists what else differs in the runs at hand.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from experiments import images, precision
from experiments.identity_tables import TABLE1, TABLE2, TABLE2_NETWORKS, TABLE3, TABLE3_NETWORKS, VARIANTS
from experiments.options import option
from experiments.runner import Experiment, main, report_of
from research.errors import UsageError

DEFAULTS = {
    "digits": {"width": 8, "epochs": 10},
    "mnist": {"width": 8, "epochs": 1},
    "cifar10": {"width": 16, "epochs": 10},
}


@dataclasses.dataclass(frozen=True)
class Config(images.ImageConfig):
    """The flags."""

    seeds: tuple[int, ...] = option((0, 1, 2), "One run of every network per seed.", minimum=0)
    evaluations: int = option(5, "How often, evenly spread, validation and test errors are measured.", minimum=1)
    networks: tuple[str, ...] = option(("basic-56",), "Unit and layers, such as basic-110 or bottleneck-164.")
    variants: tuple[str, ...] = option(
        ("original", "conv_1x1", "scale_0.5_0.5", "shortcut_gate_0", "full_preactivation"),
        "Kinds of shortcut and of activation.",
        choices=tuple(VARIANTS),
    )
    remat: bool = option(False, "Compute units again in the backward pass: less memory, more time.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(images.ImageCell):
    """One network to train."""

    variant: str
    unit: str
    depth: int
    remat: bool

    @property
    def name(self) -> str:
        name = f"{self.variant}-{self.unit}-{self.depth}-w{self.width}-seed{self.seed}"
        return name + precision.suffix(self)


def network_of(cell: Any, **options: Any) -> Any:
    """The network of a cell with `variant`, `unit`, `depth` and `width`; options go to `cifar_resnet`."""
    from research.models import cifar_resnet

    options |= VARIANTS[cell.variant].options | {"dtype": precision.dtype(cell)}
    return cifar_resnet(cell.depth, width=cell.width, unit=cell.unit, **options)


def cells(config: Config) -> list[Cell]:
    """The grid: networks x variants x seeds."""
    recipe = images.recipe(config, DEFAULTS) | {"remat": config.remat}
    grid = [
        Cell(**recipe, variant=variant, unit=unit, depth=depth, seed=seed)
        for unit, depth in map(parse_network, config.networks)
        for variant in config.variants
        for seed in config.seeds
    ]
    for cell in grid:
        network_of(cell)  # raises where there is no such network
    return grid


def parse_network(text: str) -> tuple[str, int]:
    """Unit and depth of a network's name.

    Raises:
      UsageError: the text is not of that form.
    """
    unit, _, depth = text.rpartition("-")
    if not unit or not depth.isdecimal() or depth != str(int(depth)):  # 0110 would be 110 again, counted twice
        raise UsageError(f"--networks={text}: write unit-layers, such as basic-110 or bottleneck-164")
    return unit, int(depth)


def run(cell: Cell, context: Any) -> Mapping[str, Any]:
    """Trains one network and measures how signals travel in it, before and after."""
    trained = images.train(cell, functools.partial(network_of, cell, remat=cell.remat), context)
    images.measure_signal(trained, network_of, cell, context)
    return trained.result


_RECIPE = {
    "dataset": "cifar10",
    "width": 16,
    "seeds": (0, 1, 2, 3, 4),
    "steps": 64_000,
    "batch_size": 128,
    "learning_rate": 0.1,
    "weight_decay": 1e-4,
    "warmup_steps": 400,
    "augmentation": "crop_and_flip",
    "evaluations": 64,
    "steps_per_call": 100,
}


EXPERIMENT = Experiment(
    name="identity_mappings",
    config=Config,
    cells=cells,
    run=run,
    report=report_of("identity_report"),
    presets={
        "shortcuts": _RECIPE | {"networks": ("basic-110",), "variants": TABLE1},
        "activations": _RECIPE | {"networks": TABLE2_NETWORKS, "variants": TABLE2},
        "depth": _RECIPE | {"networks": TABLE3_NETWORKS, "variants": TABLE3},
    },
    smoke={"width": 4, "steps": 4, "batch_size": 16, "steps_per_call": 2, "evaluations": 2, "seeds": (0,)},
    exclusive=(("epochs", "steps"),),
    divergence_is_a_result=True,
)

if __name__ == "__main__":
    main(EXPERIMENT)
