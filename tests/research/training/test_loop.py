"""The trainer: it learns, stops, keeps the best, tells the time, and compiles once for any length of run."""

import functools
import io
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental.compilation_cache import compilation_cache

from research.data import digits
from research.errors import Interrupted, UsageError
from research.models import cifar_resnet
from research.tasks.classification import classification
from research.training import checkpoint, loop, optimizers, parallel, run_folder, state, step, timers
from research.training.progress import Reporter

DATA = digits.load()
PARTS = {"train": DATA.train, "validation": DATA.validation, "test": DATA.test}
SPLITS = loop.Splits(
    {name: np.concatenate([getattr(part, name) for part in PARTS.values()]) for name in ("images", "labels")},
    *map(len, PARTS.values()),
)
MEAN = DATA.train.images.mean(axis=0)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_kept(tmp_path_factory):
    """Most tests train the same few programs; what a cached program computes is what a new one would, to the bit."""
    values = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


class Net(nn.Module):
    """Small, with BatchNorm, so that every kind of variable is there and compiling takes no time."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(8)(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(x))
        return nn.Dense(10)(x)


def plan(steps=6, batch_size=16, steps_per_call=2, evaluate_every=2, **changes):
    return loop.Plan(0, steps, batch_size, steps_per_call, evaluate_every, **changes)


def train(folder, chosen, *, learning_rate=0.05, should_stop=lambda: False, log=None, splits=SPLITS, start=None):
    schedule = optimizers.step_decay(learning_rate, drops=(4_000,))
    task = functools.partial(classification, mean=MEAN)
    with run_folder.open_run(folder, {}) as run, Reporter(log or io.StringIO()) as reporter:
        context = loop.Context(run, "run", reporter, should_stop)
        outcome = loop.train(Net, task, optimizers.sgd(schedule), schedule, splits, chosen, context, start=start)
        run.finish({})
    return outcome


def stop_after(calls):
    """Asks to stop at the given number of questions."""
    left = iter([False] * calls)
    return lambda: next(left, True)


def records(folder):
    return run_folder.read_metrics(folder)


def logits(variables, images):
    return np.asarray(Net().apply(variables, (images.astype(np.float32) - MEAN) / 128, train=False))


def test_it_learns_and_the_final_evaluation_counts_every_example(tmp_path):
    outcome = train(tmp_path, plan(steps=160, batch_size=32, steps_per_call=40, evaluate_every=80))
    losses = [record["loss"] for record in records(tmp_path) if "loss" in record]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 2
    assert outcome.evaluations.keys() == PARTS.keys()
    for name, part in PARTS.items():
        scores = logits(outcome.final.variables, part.images).astype(np.float64)
        wrong = (scores.argmax(-1) != part.labels).sum()
        found = outcome.evaluations[name]
        assert found["error"] == wrong / len(part)
        picked = scores[np.arange(len(part)), part.labels]
        np.testing.assert_allclose(found["loss"], (np.log(np.exp(scores).sum(-1)) - picked).mean(), rtol=1e-5)
    assert outcome.evaluations["test"]["error"] < 0.2
    # What stands in the file is what was measured at the end.
    last = records(tmp_path)[-1]
    assert last["step"] == 160 and last["test_error"] == outcome.evaluations["test"]["error"]
    assert outcome.sha256 == state.sha256(outcome.final) and int(outcome.final.step) == 160
    assert outcome.examples_per_second == 160 * 32 / outcome.seconds["train"]


def test_the_final_training_error_can_be_that_of_the_first_examples(tmp_path):
    outcome = train(tmp_path, plan(train_evaluation_examples=100))
    part = PARTS["train"]
    scores = logits(outcome.final.variables, part.images[:100])
    assert outcome.evaluations["train"]["error"] == (scores.argmax(-1) != part.labels[:100]).mean()
    assert outcome.evaluations["test"].keys() == outcome.evaluations["train"].keys()


def test_a_run_stopped_after_its_last_step_still_ends_with_every_error(tmp_path):
    whole = train(tmp_path / "whole", plan())
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path / "stopped", plan(), log=DiesAtTheEnd())
    again = train(tmp_path / "stopped", plan())
    assert (again.evaluations, again.sha256) == (whole.evaluations, whole.sha256)


class DiesAtTheEnd(io.StringIO):
    """A terminal that fails when the run says that it is done: after the last checkpoint, before the result."""

    def write(self, text):
        if "done" in text:
            raise RuntimeError("killed")
        return super().write(text)


@pytest.mark.parametrize("mode", ["jit", "pmap", "shard_map"])
def test_the_initial_state_survives_the_donation_of_its_buffers(tmp_path, mode):
    outcome = train(tmp_path, plan(parallel=mode))
    schedule = optimizers.step_decay(0.05, drops=(4_000,))
    fresh = state.initialize(Net(), optimizers.sgd(schedule), 0, np.zeros((1, 8, 8, 1), np.float32))
    assert int(outcome.initial.step) == 0
    assert state.sha256(outcome.initial) == state.sha256(fresh) != outcome.sha256
    # The same where the first step was taken in an earlier sitting.
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", plan(parallel=mode), should_stop=stop_after(2))
    again = train(tmp_path / "stopped", plan(parallel=mode))
    assert state.sha256(again.initial) == state.sha256(fresh) and again.sha256 == outcome.sha256


def test_the_seed_decides_the_run(tmp_path):
    outcomes = [train(tmp_path / str(n), loop.Plan(seed, 2, 16, 2, 2)) for n, seed in enumerate((0, 0, 1))]
    assert outcomes[0].sha256 == outcomes[1].sha256 != outcomes[2].sha256
    assert state.sha256(outcomes[0].initial) != state.sha256(outcomes[2].initial)


def test_training_starts_from_the_variables_that_are_given(tmp_path):
    start = train(tmp_path / "earlier", plan()).final.variables
    chosen = plan(steps_per_call=1, evaluate_every=6)
    outcome = train(tmp_path / "whole", chosen, start=start)
    fresh = train(tmp_path / "fresh", chosen)
    jax.tree.map(np.testing.assert_array_equal, outcome.initial.variables, start)
    assert int(outcome.initial.step) == 0 and not any(map(np.any, jax.tree.leaves(outcome.initial.opt_state)))
    # The first batch is seen with them; the same examples come in the same order as without.
    first, second = (records(tmp_path / name)[0] for name in ("whole", "fresh"))
    rows = step.permutations(state.stream(0, "order"), 1280)(0)[:16]
    batch = {name: array[rows] for name, array in SPLITS.arrays.items()}
    for found, variables in ((first, start), (second, fresh.initial.variables)):
        expected, _ = classification(state.bind(Net()), mean=MEAN).loss(variables, batch, None)
        assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert first["loss"] < second["loss"] and outcome.sha256 != fresh.sha256
    # Stopped and started again with the same variables, it goes on from its checkpoint, to the same bits.
    with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
        train(tmp_path / "stopped", chosen, start=start, should_stop=stop_after(3))
    again = train(tmp_path / "stopped", chosen, start=start)
    assert (again.sha256, again.evaluations) == (outcome.sha256, outcome.evaluations)
    jax.tree.map(np.testing.assert_array_equal, again.initial.variables, start)
    assert (tmp_path / "stopped" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_variables_of_another_model_are_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(UsageError, match="the weights to start from are not this network's"):
        train(tmp_path, plan(), start={"params": {}})
    assert not list(tmp_path.glob("checkpoints/*")) and not records(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps, batch_size, steps_per_call and evaluate_every must be at least 1"),
        ({"steps_per_call": 0}, "must be at least 1"),
        ({"evaluate_every": 0}, "must be at least 1"),
        ({"batch_size": 1281}, "batch_size=1281 is larger than the training set.* 1280"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"parallel": "threads"}, "parallel=threads is unknown"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        train(tmp_path, plan(**changes))
    assert not list(tmp_path.glob("checkpoints/*")) and not records(tmp_path)


def test_steps_need_not_divide_by_anything(tmp_path, monkeypatch):
    lengths, compile_stretch = [], parallel.compile_stretch

    def counted(stretch, mode, mesh, arguments):
        lengths.append(arguments[2].shape[0])
        return compile_stretch(stretch, mode, mesh, arguments)

    monkeypatch.setattr(parallel, "compile_stretch", counted)
    outcome = train(tmp_path / "odd", plan(steps=11, steps_per_call=4, evaluate_every=6))
    assert [record["step"] for record in records(tmp_path / "odd")] == [4, 6, 6, 8, 11, 11]
    assert ["loss" in record for record in records(tmp_path / "odd")] == [True, True, False, True, True, False]
    assert lengths == [4, 2, 3]  # one program a length: 4, 6 - 4 = 8 - 6, 11 - 8
    assert int(outcome.final.step) == 11

    lengths.clear()
    even = train(tmp_path / "even", plan(steps=11, steps_per_call=1, evaluate_every=11))
    assert lengths == [1]
    for a, b in zip(jax.tree.leaves(outcome.final), jax.tree.leaves(even.final), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    # Records are means over the stretch; the learning rate is that of its last step.
    single = [record for record in records(tmp_path / "even") if "loss" in record]
    np.testing.assert_allclose(
        records(tmp_path / "odd")[0]["loss"], np.mean([record["loss"] for record in single[:4]]), rtol=1e-5
    )


def test_the_best_checkpoint_is_the_one_of_the_lowest_validation_error(tmp_path):
    # A rate so high that the error goes up and down.
    outcome = train(tmp_path, plan(steps=24), learning_rate=2.0)
    evaluated = {record["step"]: record["validation_error"] for record in records(tmp_path) if "test_error" in record}
    lowest = min(evaluated.values())
    first = min(step for step, error in evaluated.items() if error == lowest)
    assert lowest < evaluated[24], "the last is the best: this proves nothing"
    best = checkpoint.load(tmp_path / "checkpoints" / checkpoint.BEST)
    assert best.step == first and best.metadata == {"step": first, "error": lowest}
    variables = state.unflatten(best.arrays, outcome.final, "best").variables
    wrong = (logits(variables, DATA.validation.images).argmax(-1) != DATA.validation.labels).mean()
    assert wrong == lowest
    # A run that is stopped right after its best step remembers it.
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", plan(steps=24), learning_rate=2.0, should_stop=stop_after(first // 2))
    train(tmp_path / "stopped", plan(steps=24), learning_rate=2.0)
    kept = (tmp_path / "stopped" / "checkpoints" / checkpoint.BEST).read_bytes()
    assert kept == best.path.read_bytes()


# Divergence


def test_divergence_names_its_step_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(loop.Diverged, match="try a smaller --learning_rate") as single:
        train(tmp_path / "single", plan(steps=40, steps_per_call=1, evaluate_every=4), learning_rate=1e6)
    losses = [record for record in records(tmp_path / "single") if "loss" in record]
    # Step by step: all before it are finite and on record, it and those after are not.
    assert [record["step"] for record in losses] == list(range(1, single.value.step))
    assert all(np.isfinite(record["loss"]) for record in losses)
    assert f"not finite at step {single.value.step} (" in str(single.value)

    log = io.StringIO()
    with pytest.raises(loop.Diverged) as stretched:
        train(tmp_path / "runs", plan(steps=40, steps_per_call=2, evaluate_every=4), learning_rate=1e6, log=log)
    bad = stretched.value.step
    assert bad == single.value.step > 4
    kept = checkpoint.latest(tmp_path / "runs" / "checkpoints", pytest.fail)
    assert kept.step == (bad - 1) // 4 * 4
    assert f"the checkpoint of step {kept.step} is kept" in str(stretched.value)
    assert max(record["step"] for record in records(tmp_path / "runs")) < bad
    # It is no accident: from the checkpoint the same happens again.
    with pytest.raises(loop.Diverged) as again:
        train(tmp_path / "runs", plan(steps=40, steps_per_call=2, evaluate_every=4), learning_rate=1e6, log=log)
    assert str(again.value) == str(stretched.value)
    assert f"going on from step {kept.step}" in log.getvalue()


# Interruption and time


def test_a_stop_request_writes_a_checkpoint_between_evaluations(tmp_path):
    chosen = plan(steps=8, steps_per_call=1, evaluate_every=8)
    with pytest.raises(Interrupted, match="stopped at step 3 of 8; the same command goes on"):
        train(tmp_path, chosen, should_stop=stop_after(3))
    kept = checkpoint.latest(tmp_path / "checkpoints", pytest.fail)
    assert kept.step == 3 and kept.metadata["evaluated"] is None
    assert kept.metadata["metrics_bytes"] == (tmp_path / "metrics.jsonl").stat().st_size
    with pytest.raises(Interrupted, match="stopped at step 3 of 8"):  # asked at once: no step is taken
        train(tmp_path, chosen, should_stop=lambda: True)
    assert train(tmp_path, chosen).sha256 == train(tmp_path / "other", chosen).sha256
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "other" / "metrics.jsonl").read_bytes()


def test_a_checkpoint_a_minute_whatever_the_evaluations(tmp_path, monkeypatch):
    now = iter(range(0, 100_000, 25))  # seconds, each time the clock is read
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: next(now)))
    steps, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, at, *rest: steps.append(at) or save(folder, at, *rest))
    train(tmp_path, plan(steps=10, steps_per_call=1, evaluate_every=10))
    assert steps == [0, 3, 6, 9, 10]


def test_times_add_up_to_no_more_than_there_was(tmp_path):
    start = time.perf_counter()
    outcome = train(tmp_path, plan())
    wall = time.perf_counter() - start
    assert outcome.seconds.keys() == {"compile", "train", "evaluate", "checkpoint"}
    assert all(value > 0 for value in outcome.seconds.values())
    assert wall / 2 < sum(outcome.seconds.values()) <= wall


def test_times_of_all_sittings_are_added(tmp_path, monkeypatch):
    now = iter(range(100_000))  # a second each time the clock is read, so every lap takes one: times count laps
    clock = SimpleNamespace(perf_counter=lambda: next(now), monotonic=time.monotonic)
    monkeypatch.setattr(timers, "time", clock)
    chosen = plan(steps=6, steps_per_call=1, evaluate_every=2)
    whole = train(tmp_path / "whole", chosen).seconds
    # Compiled: the initial state, the evaluation, one stretch. Looked for and saved at 0, 2, 4 and 6.
    assert whole == {"compile": 3, "train": 6, "evaluate": 3 + 1, "checkpoint": 1 + 4}
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", chosen, should_stop=stop_after(3))
    again = train(tmp_path / "stopped", chosen).seconds
    # A sitting more compiles again and looks for the checkpoint; the lap of the save that ended the first is not in it.
    assert again == {"compile": 3 + 3, "train": 6, "evaluate": 3 + 1, "checkpoint": (1 + 2) + (1 + 2)}


# Depth


def programs(depth):
    """The jaxprs of everything that training a network of this depth compiles, by name."""
    schedule = optimizers.step_decay(0.1, drops=(2,))
    optimizer = optimizers.sgd(schedule)
    model = cifar_resnet(depth, "residual", 4, 10)
    task = classification(state.bind(model), mean=MEAN)
    arrays = {"images": DATA.train.images[:32], "labels": DATA.train.labels[:32]}
    key = state.stream(0, "augmentation")
    rows = np.zeros((1, 16), np.int32)
    initial = functools.partial(state.initialize, model, optimizer, 0, np.zeros((1, 8, 8, 1), np.float32))
    shapes = jax.eval_shape(initial)
    stretch = step.make_stretch(task.loss, optimizer, schedule, None)
    evaluation = step.make_evaluation(task.evaluate)
    return {
        "initialisation": (initial, ()),
        "stretch": (stretch, (shapes, arrays, rows, key)),
        "evaluation": (evaluation, (shapes.variables, arrays, rows[0], np.ones(16, np.float32))),
    }


def equations(jaxpr):
    """Equations of a jaxpr with those inside loops, calls and branches."""
    total = len(jaxpr.eqns)
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            total += equations(inner) if hasattr(inner, "eqns") else 0
    return total


def test_programs_do_not_grow_with_depth():
    sizes = {
        depth: {
            name: equations(jax.make_jaxpr(f)(*arguments).jaxpr) for name, (f, arguments) in programs(depth).items()
        }
        for depth in (20, 1202)
    }
    print(f"\nequations: {sizes}")
    for name, shallow in sizes[20].items():
        assert shallow > 50, "the counting is broken"
        assert sizes[1202][name] <= 1.2 * shallow, name


@pytest.mark.slow
def test_compile_time_does_not_grow_with_depth():
    seconds = {}
    for depth in (20, 1202):
        f, arguments = programs(depth)["stretch"]
        start = time.perf_counter()
        jax.jit(f).lower(*arguments).compile()
        seconds[depth] = time.perf_counter() - start
    print(f"\nseconds to trace and compile a step: {seconds}, ratio {seconds[1202] / seconds[20]:.2f}")
    assert seconds[1202] <= 3 * seconds[20]  # on a quiet machine about 1
