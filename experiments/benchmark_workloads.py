"""What is benchmarked: networks with random data, our side of each, and the one in stock Flax layers.

Our side is what a user gets: the trainer's own compiled stretch of steps, data resident. The Flax side is the loop of
Flax's examples: one jitted step a call. Both look up their batch, prepare it and take the task's loss, as the PyTorch
side (`experiments.benchmark_torch`) does; all update by SGD with momentum 0.9 and weight decay.

Stock Flax has no ConvLSTM with peepholes, and so no convlstm here.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from experiments.benchmark_timing import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Side
from research.analysis import operations
from research.models import forecaster, language, lenet, recurrent, resnet_tables, sequence, stock
from research.models.resnet import Stage
from research.tasks import classification, nowcasting, sequences
from research.tasks import language as language_task
from research.training import optimizers, parallel, state, step


@dataclasses.dataclass(frozen=True)
class Workload:
    """One network and what it is trained on.

    Attributes:
      kind: of network, for the PyTorch side.
      batch: examples a step.
      arrays: random data as they are stored, `[2 batch, ...]`.
      model: `axis_name=None -> our module`.
      make_task: `apply -> Task`.
      stock: the same in stock Flax layers, None where there is none.
    """

    kind: str
    batch: int
    arrays: Mapping[str, np.ndarray]
    model: Callable[..., Any]
    make_task: Callable[..., Any]
    stock: Any = None

    def rows(self, steps: int) -> np.ndarray:
        """Examples of each step, `[steps, batch]`: the same for every side."""
        random = np.random.default_rng(1)
        return random.integers(0, 2 * self.batch, (steps, self.batch), dtype=np.int32)

    def initial(self, model: Any, optimizer: optax.GradientTransformation | None = None) -> state.TrainState:
        """The state before the first step, seed 0."""
        task = self.make_task(state.bind(model))
        inputs = jax.eval_shape(task.inputs, {name: array[:1] for name, array in self.arrays.items()})
        return state.initialize(model, optimizer or optax.identity(), 0, inputs)

    def variables(self) -> dict[str, Any]:
        """Our variables before the first step, on the host."""
        return jax.device_get(self.initial(self.model()).variables)

    def shapes(self, model: Any = None) -> dict[str, Any]:
        """Shapes of our variables, or those of `model`: nothing is computed."""
        return jax.eval_shape(lambda: self.initial(model or self.model()).variables)

    def multiply_adds(self) -> int:
        """Of one forward pass of a batch, all convolutions and matrix products counted."""
        apply = state.bind(self.model())
        batch = {name: array[: self.batch] for name, array in self.arrays.items()}
        inputs = jax.eval_shape(self.make_task(apply).inputs, batch)
        return operations.multiply_adds(lambda variables, x: apply(variables, x, train=False)[0], self.shapes(), inputs)


def _images(batch: int, size: int, channels: int, classes: int) -> dict[str, Any]:
    random, shape = np.random.default_rng(0), (size, size, channels)
    images = random.integers(0, 256, (2 * batch, *shape), dtype=np.uint8)
    return {
        "batch": batch,
        "arrays": {"images": images, "labels": random.integers(0, classes, 2 * batch, dtype=np.int32)},
        "make_task": functools.partial(classification.classification, mean=np.full(shape, 128, np.float32)),
    }


def cifar(batch: int, size: int, **architecture: Any) -> Workload:
    """Images of `size x size` and a CIFAR ResNet (`resnet_tables.cifar_resnet`: depth, width, ...)."""
    model = functools.partial(resnet_tables.cifar_resnet, **architecture)
    return Workload("resnet", model=model, stock=stock.StockResNet(model()), **_images(batch, size, 3, 10))


def _imagenet(batch: int, size: int, depth: int, narrower: int = 1, units: int | None = None) -> Workload:
    def thin(row):
        return row._replace(features=row.features // narrower)

    def model(axis_name=None):
        table = resnet_tables.imagenet_resnet(depth, axis_name=axis_name)
        stages = (Stage(units or s.units, tuple(map(thin, s.convolutions))) for s in table.stages)
        return table.clone(stem=tuple(map(thin, table.stem)), stages=tuple(stages))

    return Workload("resnet", model=model, stock=stock.StockResNet(model()), **_images(batch, size, 3, 1000))


def _lenet(batch: int) -> Workload:
    same = _images(batch, 28, 1, 10)
    return Workload("lenet", model=lambda axis_name=None: lenet.LeNet5(), stock=lenet.LeNet5(convolve=None), **same)


def _language(batch: int, time: int, units: int, vocabulary: int) -> Workload:
    # Every window begins a text, since the peers' begin with zeros; no dropout.
    random, features = np.random.default_rng(0), (units, units)
    tokens = random.integers(0, vocabulary, (2 * batch, time + 1), dtype=np.int32)
    every = {"valid": np.ones((2 * batch, time), bool), "first": np.ones(2 * batch, bool)}
    return Workload(
        "language",
        batch,
        {"inputs": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy()} | every,
        lambda axis_name=None: language.RecurrentLanguageModel(
            vocabulary, units, recurrent.lstm(), features, streams=batch, axis_name=axis_name
        ),
        language_task.next_token,
        stock.StockLanguageModel(vocabulary, features),
    )


def _to_one(cell: str, units: int, outputs: int) -> dict[str, Any]:
    stack = sequence.Stack(recurrent.CELLS[cell](), (units,))
    model = sequence.SequenceToOne(stack, outputs)
    return {"model": lambda axis_name=None: model, "stock": stock.StockSequenceToOne(cell, (units,), outputs)}


def _pixels(batch: int, size: int, units: int, cell: str) -> Workload:
    images = _images(batch, size, 1, 10) | {"make_task": sequences.pixel_classification}
    return Workload(f"pixel_{cell}", **images, **_to_one(cell, units, 10))


def adding(batch: int, time: int, units: int) -> Workload:
    """Sequences of `time` steps, of which an LSTM tells one number, as in the adding problem."""
    random = np.random.default_rng(0)
    inputs = random.random((2 * batch, time, 2), dtype=np.float32)
    arrays = {"inputs": inputs, "targets": random.random(2 * batch, dtype=np.float32)}
    return Workload("adding_lstm", batch, arrays, make_task=sequences.regression, **_to_one("lstm", units, 1))


def _convlstm(batch: int, frame: int, patch: int, features: tuple[int, ...], observed: int, horizon: int) -> Workload:
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (2 * batch, observed + horizon, frame, frame, 1), dtype=np.uint8)
    model = forecaster.EncoderForecaster(recurrent.lstm(peepholes=True), features, horizon, (5, 5), patch)
    frames_of = lambda batch: batch["frames"].astype(np.float32) / 255  # noqa: E731 (a row of this table)
    make_task = functools.partial(nowcasting.nowcasting, frames_of=frames_of, observed=observed)
    return Workload("convlstm", batch, {"frames": frames}, lambda axis_name=None: model, make_task)


_CIFAR, _SMALL = {"batch": 128, "size": 32, "width": 16}, {"batch": 4, "size": 8, "width": 4}
_TINY_TEXT = {"batch": 3, "time": 4, "units": 5, "vocabulary": 11}
_TINY_PIXELS = {"batch": 3, "size": 3, "units": 4}
# Name -> constructor, its sizes, and which are other ones where it is to be tiny.
_TABLE: dict[str, tuple[Callable[..., Workload], dict[str, Any], dict[str, Any]]] = {
    "resnet20": (cifar, _CIFAR | {"depth": 20}, _SMALL | {"depth": 8}),
    "resnet56": (cifar, _CIFAR | {"depth": 56}, _SMALL | {"depth": 14}),
    "preact110": (
        cifar,
        _CIFAR | {"depth": 110, "placement": "full_preactivation"},
        _SMALL | {"depth": 14},
    ),
    "resnet50": (
        _imagenet,
        {"batch": 8, "size": 224, "depth": 50},
        {"batch": 2, "size": 32, "narrower": 16, "units": 2},
    ),
    "lstm_ptb_small": (_language, {"batch": 20, "time": 20, "units": 200, "vocabulary": 10_000}, _TINY_TEXT),
    "lstm_ptb_medium": (_language, {"batch": 20, "time": 35, "units": 650, "vocabulary": 10_000}, _TINY_TEXT),
    "pixel_lstm": (_pixels, {"batch": 64, "size": 28, "units": 130, "cell": "lstm"}, _TINY_PIXELS),
    "pixel_gru": (_pixels, {"batch": 64, "size": 28, "units": 130, "cell": "gru"}, _TINY_PIXELS),
    "adding_lstm": (adding, {"batch": 50, "time": 400, "units": 77}, {"batch": 3, "time": 5, "units": 4}),
    "convlstm": (
        _convlstm,
        {"batch": 8, "frame": 64, "patch": 4, "features": (128, 64, 64), "observed": 10, "horizon": 10},
        {"batch": 2, "frame": 8, "patch": 2, "features": (4, 3), "observed": 2, "horizon": 2},
    ),
    "lenet5": (_lenet, {"batch": 128}, {"batch": 4}),
}
NAMES = tuple(_TABLE)


def workload(name: str, tiny: bool = False) -> Workload:
    """A row of the table; `tiny` for one of the same kind in milliseconds."""
    make, sizes, smaller = _TABLE[name]
    return make(**sizes | (smaller if tiny else {}))


def _optimizer(learning_rate):
    schedule = optimizers.constant(learning_rate)
    return optimizers.sgd(schedule, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY), schedule


def ours(
    work: Workload, mode: str, *, steps: int, devices: int | None = None, learning_rate: float = LEARNING_RATE
) -> Side:
    """Our side: in training the trainer's compiled stretch of `steps` steps a call, in inference one batch a call."""
    if mode == "train":
        return training(work, steps=steps, devices=devices, learning_rate=learning_rate)[0]
    mesh = parallel.make_mesh(devices or 1)
    variables, data = parallel.replicate((work.initial(work.model()).variables, dict(work.arrays)), mesh)
    rows = parallel.shard_batch(work.rows(steps)[0], mesh)
    # As the trainer's evaluation compiles it.
    forward = parallel.compile_for(mesh, _forward(work, work.model()).lower(variables, data, rows))
    return Side(lambda: jax.block_until_ready(forward(variables, data, rows)), 1)


def training(
    work: Workload, *, steps: int, devices: int | None = None, learning_rate: float = LEARNING_RATE
) -> tuple[Side, parallel.Stretch]:
    """Our side in training, and the compiled stretch that it calls."""
    mesh = parallel.make_mesh(devices or 1)
    optimizer, schedule = _optimizer(learning_rate)
    current = parallel.replicate(work.initial(work.model(), optimizer), mesh)
    data, rows = parallel.replicate(dict(work.arrays), mesh), work.rows(steps)
    how = parallel.choose_mode("auto", mesh.size)
    axis = parallel.axis_name(how)
    task = work.make_task(state.bind(work.model(axis_name=axis)))
    stretch = step.make_stretch(task.loss, optimizer, schedule, axis)
    key = parallel.replicate(state.stream(0, "augmentation"), mesh)
    compiled = parallel.compile_stretch(stretch, how, mesh, (current, data, rows, key))

    def call():
        nonlocal current
        current, metrics = compiled(current, data, rows, key)
        return jax.device_get(metrics["loss"])

    return Side(call, steps), compiled


def flax(work: Workload, mode: str, *, steps: int, learning_rate: float = LEARNING_RATE) -> Side | None:
    """The side in stock Flax layers, one step a call; None where there is none."""
    if work.stock is None:
        return None
    optimizer, _ = _optimizer(learning_rate)
    current = work.initial(work.stock, optimizer)
    data, rows = jax.device_put(dict(work.arrays)), list(work.rows(steps))
    if mode == "inference":
        forward = _forward(work, work.stock)
        return Side(lambda: jax.block_until_ready(forward(current.variables, data, rows[0])), 1)
    task = work.make_task(state.bind(work.stock))

    @functools.partial(jax.jit, donate_argnums=0)
    def train(current, data, rows):
        batch = {name: array[rows] for name, array in data.items()}

        def loss(params):
            return task.loss({**current.variables, "params": params}, batch, None)

        (value, (collections, _)), gradients = jax.value_and_grad(loss, has_aux=True)(current.params)
        updates, opt_state = optimizer.update(gradients, current.opt_state, current.params)
        params = optax.apply_updates(current.params, updates)
        return state.TrainState(current.step + 1, params, collections, opt_state), value

    taken = 0

    def call():
        nonlocal current, taken
        current, value = train(current, data, rows[taken % steps])
        taken += 1
        return jax.device_get(value)

    return Side(call, 1)


def _forward(work, model):
    apply = state.bind(model)
    task = work.make_task(apply)

    @jax.jit
    def forward(variables, data, rows):
        batch = {name: array[rows] for name, array in data.items()}
        return apply(variables, task.inputs(batch), train=False)[0]

    return forward
