"""The trainer: compiled stretches of steps, checkpoints, resume, timers. One loop for every experiment."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from research.errors import CarouselError, Interrupted, UsageError
from research.tasks.task import Task
from research.training import best, checkpoint, distributed, environment, parallel, state, step
from research.training.evaluation import Evaluator
from research.training.profile import Profile
from research.training.progress import Reporter
from research.training.run_folder import RunFolder
from research.training.state import TrainState
from research.training.timers import Timers

# A checkpoint at least this often, in seconds of wall time; when one is written changes no result.
_CHECKPOINT_SECONDS = 60.0


class Diverged(CarouselError):
    """The loss is not a finite number any more."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long and how to train.

    Attributes:
      seed: of every stream of randomness of the run. With several, as many small networks are trained side by side in
        one program: every leaf of the state has them as leading axis, and every metric is a list.
      steps: optimiser updates.
      batch_size: examples a step, over all devices.
      steps_per_call: steps of one compiled stretch; also the interval of the training metrics.
      evaluate_every: steps between evaluations on the validation and test splits.
      select: the network of which the final evaluation is: the `last`, or with `best` the one of the lowest error (or
        loss, for a task without) on the validation split; of several seeds each its own.
      evaluation_batch_size: examples of an evaluation call at most: one compiled program serves every split.
      train_evaluation_examples: of how many of the training examples (the first) the final evaluation is; None for all.
      parallel: `auto`, `pmap`, `jit` or `shard_map`.
      devices: how many; None for all that there are.
    """

    seed: int | tuple[int, ...]
    steps: int
    batch_size: int
    steps_per_call: int
    evaluate_every: int
    select: str = "last"
    evaluation_batch_size: int = 256
    train_evaluation_examples: int | None = None
    parallel: str = "auto"
    devices: int | None = None


def plan_of(cell: Any) -> Plan:
    """The plan that a cell of an experiment asks for, by the names of its fields."""
    return Plan(**{f.name: getattr(cell, f.name) for f in dataclasses.fields(Plan) if hasattr(cell, f.name)})


@dataclasses.dataclass(frozen=True)
class Splits:
    """One data set on the host with its parts in a row: arrays `[examples, ...]`, training examples first.

    `checksums` (file name -> SHA-256) of the files that it was read from go into the run's record.
    """

    arrays: Mapping[str, np.ndarray]
    train: int
    validation: int
    test: int
    checksums: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def range(self, name: str) -> tuple[int, int]:
        first = {"train": 0, "validation": self.train, "test": self.train + self.validation}[name]
        return first, first + getattr(self, name)


@dataclasses.dataclass(frozen=True)
class Context:
    """The surroundings of a run, which change nothing in its result.

    Attributes:
      folder: the open run folder.
      label: what to call the run on the screen.
      reporter: shows progress.
      should_stop: asked between stretches; True writes a checkpoint and raises `Interrupted`. Of several processes all
        have to get the same answer (`distributed.any_of`).
      command: the words of the command line that started it, for the record.
      profile: takes a trace of some steps.
    """

    folder: RunFolder
    label: str
    reporter: Reporter
    should_stop: Callable[[], bool] = lambda: False
    command: tuple[str, ...] = ()
    profile: Profile = dataclasses.field(default_factory=Profile)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is left of a finished run: the first and the last state, final evaluations, and times.

    Attributes:
      initial: the state before the first step, on the host.
      final: the state after the last step, or the one that `Plan.select` asks for, on the host.
      evaluations: split name -> metric -> mean over the split; of several seeds a list, NaN for one that diverged.
      seconds: `compile`, `train`, `evaluate`, `checkpoint`: wall time, over all the sittings that the run took.
      examples_per_second: of training, all seeds together, compilation and evaluation excluded.
      sha256: of the final state, names and bits.
    """

    initial: TrainState
    final: TrainState
    evaluations: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    examples_per_second: float
    sha256: str


def train(
    make_model: Callable[..., Any],
    make_task: Callable[[Callable], Task],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    splits: Splits,
    plan: Plan,
    context: Context,
    start: Mapping[str, Any] | None = None,
) -> Outcome:
    """Trains one model, from the beginning or from where the run folder's newest checkpoint left off.

    Killed at any moment and called again, it ends with bitwise the parameters and the metrics file of an uninterrupted
    run (same versions, thread count, devices and instruction set).

    Several processes (`distributed`) call it alike, each with a run folder of its own; only the writer's matters.

    Args:
      make_model: gives the Flax module; `axis_name=` names the axis over which to take BatchNorm's means.
      make_task: the bound module `apply` -> a task.
      optimizer: an optax transformation.
      schedule: its learning rate, for the record.
      splits: the data set; it is copied to every device.
      plan: see `Plan`.
      context: where to write, what to show, and whether to stop.
      start: variables to start from in place of random ones, such as imported weights.

    Raises:
      UsageError: the plan contradicts itself or the data, or `start` is of another model.
      Diverged: a loss was not finite; the last checkpoint before it is kept.
      Interrupted: as `context.should_stop` asked.
    """
    folder, reporter = context.folder, context.reporter
    mesh = parallel.make_mesh(plan.devices)
    _check(plan, splits, mesh.size)
    mode = parallel.choose_mode(plan.parallel, mesh.size)
    timers = Timers()
    environment.record(folder.path, context.command, splits.checksums, reporter.note)

    with timers("compile"):
        axis = parallel.axis_name(mode)
        task = make_task(state.bind(make_model(axis_name=axis)))
        # The evaluation network needs no axis: its arrays are global and BatchNorm uses its running averages.
        evaluated_task = make_task(state.bind(make_model()))
        _check_order(plan, splits, task)
        inputs = jax.eval_shape(task.inputs, {name: array[:1] for name, array in splits.arrays.items()})
        initial = jax.device_get(state.initialize(make_model(), optimizer, plan.seed, inputs))
        if start is not None:
            initial = state.replace_variables(initial, start)
    current, evaluated = _restore(plan, context, initial, timers)
    current = distributed.arrays_from_writer(current)
    current = parallel.replicate(current, mesh)
    data = parallel.replicate(dict(splits.arrays), mesh)
    key = parallel.replicate(state.stream(plan.seed, "augmentation"), mesh)

    stretch = state.over_seeds(
        step.make_stretch(task.loss, optimizer, schedule, axis), plan.seed, in_axes=(0, None, 0, 0)
    )
    examples_of = _examples_of(plan, splits, task)
    compiled: dict[int, Callable] = {}
    at = int(np.ravel(current.step)[0])
    context.profile.check(at, plan.steps)
    reporter.start(context.label, plan.steps, at)

    with timers("compile"):
        at_once = min(plan.evaluation_batch_size, max(1, splits.validation, splits.test))
        options = {"batch_size": plan.batch_size if task.carries else at_once, "seed": plan.seed}
        evaluator = Evaluator(evaluated_task, mesh, current.variables, data, **options)

    def evaluate(variables, *names):
        ranges = {name: splits.range(name) for name in names}
        if "train" in ranges and plan.train_evaluation_examples:
            ranges["train"] = (0, min(plan.train_evaluation_examples, splits.train))
        with timers("evaluate"):
            return {name: evaluator(variables, *places) for name, places in ranges.items()}

    def save():
        if not distributed.is_writer():
            return time.monotonic()
        with timers("checkpoint"):
            written = {"metrics_bytes": folder.metrics.flush(), "metrics_sha256": folder.metrics.sha256}
            metadata = {**written, "seconds": timers.seconds, "evaluated": evaluated}
            checkpoint.save(folder.checkpoints, at, state.flatten(current), metadata)
            return time.monotonic()

    saved = save() if at == 0 else time.monotonic()
    held_out, failed = {}, np.zeros(np.shape(plan.seed), bool)
    while at < plan.steps:
        if context.should_stop():
            save()
            raise Interrupted(
                f"{folder.path}: stopped at step {at} of {plan.steps}; the same command goes on from there"
            )
        # The grid of stretches is fixed by absolute steps, so an interrupted run takes the same ones.
        end = min(plan.steps, *((at // n + 1) * n for n in (plan.steps_per_call, plan.evaluate_every)))
        rows = examples_of(at, end)
        if end - at not in compiled:
            with timers("compile"):
                compiled[end - at] = parallel.compile_stretch(stretch, mode, mesh, (current, data, rows, key))
        with context.profile.stretch(at, end), timers("train") as lap:
            current, metrics = compiled[end - at](current, data, rows, key)
            metrics = jax.device_get(metrics)
        now_failed = _check_finite(metrics["loss"], at, context)
        if (now_failed & ~failed).any():
            reporter.note(f"{context.label}: {now_failed.sum()} of {now_failed.size} seeds diverged before step {end}")
        failed |= now_failed
        record = {name: values.mean(axis=-1).tolist() for name, values in metrics.items()}
        record["learning_rate"] = float(np.ravel(metrics["learning_rate"])[-1])
        folder.metrics.append({"step": end, **record})
        taken = (end - at) * plan.batch_size * np.size(plan.seed)
        reporter.update(end, {name: _over_seeds(v) for name, v in record.items()}, lap.seconds, taken / lap.seconds)
        at = end
        if at % plan.evaluate_every == 0 or at == plan.steps:
            held_out = evaluate(current.variables, "validation", "test")
            folder.metrics.append({"step": at, **{f"{s}_{m}": v for s, ms in held_out.items() for m, v in ms.items()}})
            if distributed.is_writer():
                evaluated = best.keep(folder.checkpoints, at, current, held_out["validation"], evaluated)
            saved = save()
        elif time.monotonic() - saved >= _CHECKPOINT_SECONDS:
            saved = save()

    if plan.select == "best":
        chosen = best.restore(folder.checkpoints, initial) if distributed.is_writer() else initial
        current, held_out = parallel.replicate(distributed.arrays_from_writer(chosen), mesh), {}
    # A run that was stopped after its last step comes here without having evaluated.
    evaluations = evaluate(current.variables, "train")
    evaluations |= held_out or evaluate(current.variables, "validation", "test")
    shown = ", ".join(
        f"{split} {metric} {_over_seeds(evaluations[split][metric]):.4g}"
        for split in evaluations
        for metric in evaluations[split]
    )
    reporter.note(f"{context.label}: done; {shown}")
    final = jax.device_get(current)
    return Outcome(
        initial=initial,
        final=final,
        evaluations=evaluations,
        seconds=timers.seconds,
        examples_per_second=plan.steps * plan.batch_size * np.size(plan.seed) / timers.seconds["train"],
        sha256=state.sha256(final),
    )


def _examples_of(plan: Plan, splits: Splits, task: Task) -> Callable[[int, int], np.ndarray]:
    """`(at, end) -> the examples of steps at to end - 1`: `[steps, batch]`, or `[seeds, steps, batch]`."""
    same = {"batch_size": plan.batch_size, "examples": splits.train}
    if not task.carries:
        permutation = step.permutations(state.stream(plan.seed, "order"), splits.train)
        return lambda at, end: step.shuffled_indices(permutation, at, steps=end - at, **same)

    def in_order(at, end):
        rows = step.indices_in_order(at, steps=end - at, **same)
        return np.broadcast_to(rows, (len(plan.seed), *rows.shape)) if isinstance(plan.seed, tuple) else rows

    return in_order


def _over_seeds(value: Any) -> float:
    """One number to show: the mean over the seeds that have one."""
    finite = [each for each in np.ravel(value) if math.isfinite(each)]
    return sum(finite) / len(finite) if finite else math.nan


def _check(plan: Plan, splits: Splits, devices: int) -> None:
    if min(plan.steps, plan.batch_size, plan.steps_per_call, plan.evaluate_every) < 1:
        raise UsageError("steps, batch_size, steps_per_call and evaluate_every must be at least 1")
    if plan.batch_size > splits.train:
        raise UsageError(f"--batch_size={plan.batch_size} is larger than the training set: give at most {splits.train}")
    if plan.batch_size % devices:
        raise UsageError(
            f"--batch_size={plan.batch_size} does not divide by {devices} devices: give a multiple, or --devices=1"
        )


def _check_order(plan: Plan, splits: Splits, task: Task) -> None:
    parts = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    if task.carries and (odd := [name for name, examples in parts.items() if examples % plan.batch_size]):
        raise UsageError(
            f"--batch_size={plan.batch_size} does not divide the {parts[odd[0]]} {odd[0]} examples, which go on from "
            "batch to batch: cut the data for this batch size"
        )


def _check_finite(losses: np.ndarray, at: int, context: Context) -> np.ndarray:
    """Which seeds' losses are no numbers any more, `[]` or `[seeds]`; raises where that is all of them."""
    finite = np.isfinite(losses)
    failed = ~finite.all(axis=-1)
    if not failed.all():
        return failed
    bad = at + int(np.argmin(finite.reshape(-1, finite.shape[-1]).any(axis=0))) + 1
    kept = checkpoint.latest(context.folder.checkpoints)
    raise Diverged(
        f"{context.folder.path}: the loss is not finite at step {bad} ({np.ravel(losses[..., bad - at - 1])[0]}); the "
        f"checkpoint of step {kept.step if kept else 0} is kept; try a smaller --learning_rate",
        bad,
    )


def _restore(plan: Plan, context: Context, initial: TrainState, timers: Timers):
    """The newest usable state and best evaluation of the run folder, its metrics file cut back to that moment."""
    folder, reporter = context.folder, context.reporter
    with timers("checkpoint"):
        newest = checkpoint.latest(folder.checkpoints, log=reporter.note)
    while newest is not None and not folder.metrics.truncate(
        newest.metadata["metrics_bytes"], newest.metadata.get("metrics_sha256")
    ):
        reporter.note(
            f"{folder.path}: records in metrics.jsonl that the checkpoint of step {newest.step} counts on are lost or "
            "changed; an older one is used"
        )
        newest = checkpoint.latest(folder.checkpoints, log=reporter.note, before=newest.step)
    if newest is None:
        if folder.metrics.path.stat().st_size:
            reporter.note(f"{context.label}: starts from the beginning, for there is no checkpoint to go on from")
        folder.metrics.truncate(0)
        return initial, None
    best.check(folder.checkpoints, newest, plan.select == "best" or np.ndim(plan.seed) > 0, reporter.note)
    for name, spent in newest.metadata["seconds"].items():
        timers.seconds[name] += spent
    restored = state.unflatten(newest.arrays, initial, str(newest.path))
    reporter.note(f"{context.label}: going on from step {newest.step}")
    return restored, newest.metadata["evaluated"]
