"""What experiments on image classification share: the recipe's flags, a cell's common fields, one training.

The recipe is that of He et al. 2015, section 4.2: SGD with momentum, the learning rate divided by 10 after 1/2 and 3/4
of the steps, weight decay, the per-pixel mean subtracted, random crops and mirror images on CIFAR-10.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments import precision, training
from experiments.options import option
from research.data.images import TRAIN_EXAMPLES
from research.errors import UsageError

DATASETS = ("digits", "mnist", "cifar10")
_AUGMENTATIONS = ("auto", "none", "crop", "crop_and_flip")
_PARALLEL = ("auto", "pmap", "jit", "shard_map")


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """The flags of the recipe; an experiment adds its grid."""

    dataset: str = option(
        "digits", "What to classify; digits are embedded, the others are read from --data_dir.", choices=DATASETS
    )
    data_dir: str | None = option(None, "Folder of the data set's original files (default: ./data).")
    seeds: tuple[int, ...] = option((0,), "One run of every network per seed.", minimum=0)
    width: int | None = option(
        None, "Channels of the first stage (default: by data set; 16 is the paper's).", minimum=1
    )
    epochs: int | None = option(None, "Passes over the training set (default: by data set).", minimum=1)
    steps: int | None = option(None, "Optimiser steps, instead of --epochs.", minimum=1)
    batch_size: int = option(128, "Examples a step, over all devices.", minimum=1)
    learning_rate: float = option(0.1, "Divided by 10 after 1/2 and 3/4 of the steps.")
    weight_decay: float = option(1e-4, "L2 penalty of every parameter.", minimum=0)
    warmup_steps: int = option(10, "First steps at a tenth of the learning rate.", minimum=0)
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
    precision: str = precision.field()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageCell:
    """The recipe of one network to train; an experiment adds the architecture."""

    dataset: str
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
    precision: str = precision.field()


def check_batch_size(config: Any) -> int:
    """The training images of the config's data set, where a batch is not larger.

    Raises:
      UsageError: it is.
    """
    examples = TRAIN_EXAMPLES[config.dataset]
    if config.batch_size > examples:
        raise UsageError(
            f"--batch_size={config.batch_size}: {config.dataset} has {examples} training images, give fewer"
        )
    return examples


def recipe(config: ImageConfig, defaults: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """The fields of `ImageCell` but for the seed.

    Args:
      config: the flags.
      defaults: data set -> `width` and `epochs` where the flags say nothing.

    Raises:
      UsageError: nothing can be trained so.
    """
    if not (math.isfinite(config.learning_rate) and config.learning_rate > 0):
        raise UsageError(f"--learning_rate={config.learning_rate}: give a positive number")
    size, examples = config.batch_size, check_batch_size(config)
    if config.devices and size % config.devices:
        raise UsageError(f"--batch_size={size} does not divide by {config.devices} devices: give a multiple of that")
    steps, stretch = config.steps, config.steps_per_call
    if not steps:
        # Whole stretches: a shorter one at the end would be a second program to compile.
        steps = (config.epochs or defaults[config.dataset]["epochs"]) * examples / size
        steps = round(steps / stretch) * stretch or max(1, round(steps))
    augmentation = config.augmentation
    if augmentation == "auto":
        augmentation = "crop_and_flip" if config.dataset == "cifar10" else "none"
    same = ("dataset", "batch_size", "learning_rate", "weight_decay", "warmup_steps", "steps_per_call")
    same += ("train_evaluation_examples", "data_dir", "parallel", "devices", "precision")
    return {name: getattr(config, name) for name in same} | {
        "width": config.width or defaults[config.dataset]["width"],
        "steps": steps,
        "augmentation": augmentation,
        "evaluate_every": training.evaluate_every(steps, config.evaluations, stretch),
    }


@functools.lru_cache(maxsize=1)
def load(dataset: str, data_dir: str | None) -> Any:
    """The data set; the last one stays in memory."""
    from research.data import images

    return images.load(dataset, data_dir)


def mean_image(data: Any) -> Any:
    """The per-pixel mean of the training images, float32."""
    return data.train.images.mean(axis=0, dtype="float64").astype("float32")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
      outcome: the trainer's.
      probe_batch: the first 128 training images, prepared, and their labels, for analyses.
      result: what every result.json holds.
    """

    outcome: Any
    probe_batch: tuple[Any, Any]
    result: dict[str, Any]


def train(
    cell: ImageCell,
    make_model: Callable[..., Any],
    context: Any,
    start: Any = None,
    prepare: Callable[..., Any] | None = None,
    checksums: Mapping[str, str] | None = None,
) -> Trained:
    """Trains one network by the cell's recipe.

    Args:
      cell: see `ImageCell`.
      make_model: `(num_classes=..., axis_name=...) -> Flax module`.
      context: of the run.
      start: variables to start from in place of random ones.
      prepare: `(images, mean) -> what the network sees`, in place of `research.tasks.classification.prepare`.
      checksums: file name -> SHA-256 of what was read besides the data set, for the run's record.
    """
    import numpy as np

    from research.tasks import classification
    from research.training import loop, optimizers

    data = load(cell.dataset, cell.data_dir)
    parts = (data.train, data.validation, data.test)
    splits = loop.Splits(
        {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels")},
        *map(len, parts),
        checksums={**data.checksums, **(checksums or {})},
    )
    prepare = prepare or classification.prepare
    mean = mean_image(data)
    crop, flip = (4 if "crop" in cell.augmentation else 0), "flip" in cell.augmentation
    schedule = optimizers.step_decay(
        cell.learning_rate, drops=(cell.steps // 2, cell.steps * 3 // 4), warmup_steps=cell.warmup_steps
    )
    plan = loop.plan_of(cell)
    outcome = loop.train(
        functools.partial(make_model, num_classes=data.num_classes),
        functools.partial(classification.classification, mean=mean, crop=crop, flip=flip, prepare=prepare),
        optimizers.sgd(schedule, weight_decay=cell.weight_decay),
        schedule,
        splits,
        plan,
        context,
        start=start,
    )
    batch = prepare(data.train.images[:128], mean), data.train.labels[:128]
    return Trained(outcome, batch, training.result_of(outcome, plan))


def measure_signal(trained: Trained, network_of: Callable[[Any], Any], cell: ImageCell, context: Any) -> None:
    """Writes `signal.json`: how signals travel in the network before training and after."""
    from research.files import write_json_atomic

    measure = _propagation(network_of, dataclasses.replace(cell, seed=0))
    moments = {"initial": trained.outcome.initial, "final": trained.outcome.final}
    signals = {moment: measure(state.variables, *trained.probe_batch) for moment, state in moments.items()}
    write_json_atomic(context.folder.path / "signal.json", signals)


@functools.lru_cache(maxsize=1)
def _propagation(network_of, cell):
    """Compiled once for all seeds of a network, which follow each other in a grid."""
    from research.analysis import signal

    return signal.propagation(network_of(cell))


_CONFIG = ("width", "seed", "steps", "batch_size", "learning_rate", "augmentation")
_RESULT = ("params", "train_error", "validation_error", "test_error", "train_loss", "validation_loss", "test_loss")
_SECONDS = ("compile", "train", "evaluate", "checkpoint")


def summary_row(run: Any, architecture: Sequence[str]) -> dict[str, Any]:
    """A row of `summary.csv`: data set, architecture, recipe, results, times; a diverged run has `failure` instead."""
    seconds = run.result.get("seconds") or dict.fromkeys(_SECONDS)
    return {
        **{name: run.config[name] for name in ("dataset", *architecture, *_CONFIG)},
        **precision.column(run.config),
        **{name: run.result.get(name) for name in _RESULT},
        "seconds": sum(value for value in seconds.values() if value),
        **{f"{name}_seconds": seconds[name] for name in _SECONDS},
        "examples_per_second": run.result.get("examples_per_second"),
        "failure": run.result.get("failure", ""),
        "final_state_sha256": run.result.get("final_state_sha256", ""),
    }
