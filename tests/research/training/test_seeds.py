"""Several seeds in one program are what they are one by one; each keeps its own best; a carried state goes on."""

import functools
import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from research.errors import Interrupted, UsageError
from research.tasks.task import Task
from research.training import best, checkpoint, loop, optimizers, run_folder, state
from research.training.progress import Reporter

RANDOM = np.random.RandomState(0)
X = RANDOM.normal(size=(80, 3)).astype(np.float32)
ARRAYS = {"x": X, "y": X @ np.float32([1.0, -2.0, 0.5])}
SPLITS = loop.Splits(ARRAYS, 48, 16, 16)


class Line(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(1)(x)[:, 0]


def regression(apply):
    def loss(variables, batch, keys, key):
        y, collections = apply(variables, batch["x"], train=True)
        value = jnp.square(y - batch["y"]).mean()
        return value, (collections, {"loss": value})

    def evaluate(variables, batch):
        losses = jnp.square(apply(variables, batch["x"], train=False)[0] - batch["y"])
        return {"loss": (losses * batch["mask"]).sum(), "count": batch["mask"].sum()}

    return Task(loss, evaluate, lambda batch: batch["x"])


def train(folder, seed, *, model=Line, task=regression, splits=SPLITS, rate=0.05, stop=lambda: False, **plan):
    plan = {"steps": 12, "batch_size": 8, "steps_per_call": 3, "evaluate_every": 6} | plan
    schedule = optimizers.step_decay(rate, drops=())
    with run_folder.open_run(folder, {}) as run, Reporter(io.StringIO()) as reporter:
        context = loop.Context(run, "run", reporter, stop)
        return loop.train(model, task, optimizers.sgd(schedule), schedule, splits, loop.Plan(seed, **plan), context)


def slices(tree, number):
    return jax.tree.map(lambda x: x[number], tree)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_seeds_side_by_side_are_the_seeds_one_by_one(tmp_path, mode):
    seeds = (3, 0)
    together = train(tmp_path / "all", seeds, parallel=mode)
    records = run_folder.read_metrics(tmp_path / "all")
    for number, seed in enumerate(seeds):
        alone = train(tmp_path / str(seed), seed, parallel=mode)
        chex_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(chex_close, slices(together.initial, number), alone.initial)
        jax.tree.map(chex_close, slices(together.final, number), alone.final)
        for split, metrics in alone.evaluations.items():
            chex_close(together.evaluations[split]["loss"][number], metrics["loss"])
        for mine, theirs in zip(records, run_folder.read_metrics(tmp_path / str(seed)), strict=True):
            assert mine.keys() == theirs.keys() and mine["step"] == theirs["step"]
            for name in mine.keys() - {"step", "learning_rate"}:
                chex_close(mine[name][number], theirs[name])
    assert len({tuple(np.ravel(slices(together.final, n).params["Dense_0"]["kernel"])) for n in range(2)}) == 2


def test_seeds_side_by_side_go_on_to_the_bit(tmp_path):
    whole = train(tmp_path / "whole", (0, 1), select="best")
    asked = iter([False, False, False, True])
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", (0, 1), select="best", stop=lambda: next(asked))
    again = train(tmp_path / "cut", (0, 1), select="best")
    assert (again.sha256, again.evaluations) == (whole.sha256, whole.evaluations)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_diverged_seed_ends_nothing_unless_all_do(tmp_path):
    def fails(apply):
        task = regression(apply)

        def loss(variables, batch, keys, key):
            value, (collections, metrics) = task.loss(variables, batch, keys, key)
            bad = jnp.where(variables["params"]["Dense_0"]["kernel"][0, 0] > 0, jnp.nan, 1.0)
            return value * bad, (collections, {"loss": value * bad})

        return Task(loss, task.evaluate, task.inputs)

    models = {seed: state.initialize(Line(), optimizers.sgd(lambda _: 0.1), seed, X[:1]) for seed in range(9)}
    signs = {seed: bool(s.params["Dense_0"]["kernel"][0, 0] > 0) for seed, s in models.items()}
    bad, good = (next(seed for seed, sign in signs.items() if sign == wanted) for wanted in (True, False))
    # The target's slope is turned so that a good seed stays good.
    splits = loop.Splits({"x": X, "y": -np.abs(X[:, 0]) * np.sign(X[:, 0])}, 48, 16, 16)
    outcome = train(tmp_path / "some", (good, bad), task=fails, splits=splits)
    assert np.isfinite(outcome.evaluations["test"]["loss"]).tolist() == [True, False]
    assert [record["loss"][1] for record in run_folder.read_metrics(tmp_path / "some") if "loss" in record] == [
        None
    ] * 4
    with pytest.raises(loop.Diverged, match="step 1 "):
        train(tmp_path / "all", (bad,), task=fails, splits=splits)


def states(*values):
    """A state of as many seeds, told apart by its parameter."""
    params = jnp.asarray(values, jnp.float32)
    return state.TrainState(jnp.zeros(params.shape[:1], jnp.int32), {"w": params}, {}, ())


def test_each_seed_keeps_its_own_best(tmp_path):
    def kept(step, values, losses, before):
        return best.keep(tmp_path, step, states(*values), {"loss": losses}, before)

    evaluated = kept(1, [[10.0], [20.0], [30.0]], [3.0, 3.0, np.nan], None)
    evaluated = kept(2, [[11.0], [21.0], [31.0]], [2.0, 4.0, np.nan], evaluated)
    assert evaluated["step"] == [2, 1, 1]
    evaluated = kept(3, [[12.0], [22.0], [32.0]], [2.0, np.nan, 9.0], evaluated)
    assert evaluated == {"step": [2, 1, 3], "loss": [2.0, 3.0, 9.0]}
    found = best.restore(tmp_path, states([0.0], [0.0], [0.0]))
    assert np.ravel(found.params["w"]).tolist() == [11.0, 20.0, 32.0]
    assert kept(4, [[0.0]] * 3, [5.0, 5.0, 9.0], evaluated) == evaluated


def test_one_seed_keeps_its_best_and_error_goes_before_loss(tmp_path):
    one = states([1.0])._replace(step=jnp.int32(0))
    evaluated = best.keep(tmp_path, 1, one, {"loss": 1.0, "error": 0.5}, None)
    assert best.keep(tmp_path, 2, one, {"loss": 0.1, "error": 0.5}, evaluated) == {"step": 1, "error": 0.5}
    assert best.keep(tmp_path, 3, one, {"loss": 9.0, "error": 0.4}, evaluated) == {"step": 3, "error": 0.4}
    assert checkpoint.load(tmp_path / checkpoint.BEST).step == 3


def test_the_final_evaluation_is_of_the_network_that_was_asked_for(tmp_path):
    """A learning rate too large: every evaluation is worse than the one before."""
    options = {"rate": 1.0, "evaluate_every": 1, "steps_per_call": 1, "steps": 5}
    last, first = (train(tmp_path / select, 0, select=select, **options) for select in ("last", "best"))
    curve = [r["test_loss"] for r in run_folder.read_metrics(tmp_path / "best") if "test_loss" in r]
    losses = [r["validation_loss"] for r in run_folder.read_metrics(tmp_path / "best") if "validation_loss" in r]
    assert int(np.argmin(losses)) < 4 and int(first.final.step) == 1 + int(np.argmin(losses))
    assert first.evaluations["test"]["loss"] == curve[int(np.argmin(losses))]
    assert last.evaluations["test"]["loss"] == curve[-1] and int(last.final.step) == 5


# State that goes from batch to batch


class Sum(nn.Module):
    """Puts out the running sum of each stream; the sum is carried, the factor is learned."""

    streams: int = 4
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, first, *, train):
        scale = self.param("scale", nn.initializers.ones, ())
        total = self.variable(state.CARRY, "total", jnp.zeros, (self.streams,))
        if self.is_initializing():
            return x * scale
        before = jnp.where(first, 0, total.value)
        total.value = before + x.sum(axis=1)
        return (before[:, None] + jnp.cumsum(x, axis=1)) * scale


def running_sum(apply):
    def output(variables, batch, train):
        return apply(variables, {"x": batch["x"], "first": batch["first"]}, train=train)

    def loss(variables, batch, keys, key):
        y, collections = output(variables, batch, True)
        value = jnp.square(y - batch["y"]).mean()
        return value, (collections, {"loss": value, "first": batch["first"].mean()})

    def evaluate(variables, batch):
        y, collections = output(variables, batch, False)
        losses = jnp.square(y - batch["y"]).mean(axis=1)
        return {"loss": (losses * batch["mask"]).sum(), "count": batch["mask"].sum()}, collections

    return Task(loss, evaluate, lambda batch: {"x": batch["x"], "first": batch["first"]}, carries=True)


def windows(count, time, streams=4):
    """Streams cut into windows, with their true running sums."""
    x = RANDOM.normal(size=(streams, count * time)).astype(np.float32)
    arrays = {"x": x, "y": np.cumsum(x, axis=1)}
    cut = {n: a.reshape(streams, count, time).swapaxes(0, 1).reshape(-1, time) for n, a in arrays.items()}
    return cut | {"first": np.repeat(np.arange(count) == 0, streams)}


@pytest.mark.parametrize("seed", [0, (0, 1)])
def test_a_carried_state_goes_on_in_training_and_in_evaluation(tmp_path, seed):
    parts = [windows(count, 5) for count in (3, 2, 4)]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    splits = loop.Splits(arrays, 12, 8, 16)
    plan = {"batch_size": 4, "steps": 7, "steps_per_call": 7, "evaluate_every": 7}
    outcome = train(tmp_path, seed, model=Sum, task=running_sum, splits=splits, **plan)
    # With the right state before every window the network is right from the beginning, and does not move.
    for metrics in outcome.evaluations.values():
        np.testing.assert_allclose(metrics["loss"], np.zeros(np.shape(seed)), atol=1e-7)
    records = run_folder.read_metrics(tmp_path)
    np.testing.assert_allclose(records[0]["loss"], np.zeros(np.shape(seed)), atol=1e-7)
    # Seven steps over three windows: the beginning was seen three times, and the last sum is that of one window.
    np.testing.assert_allclose(records[0]["first"], np.full(np.shape(seed), 3 / 7), rtol=1e-6)
    carried = np.broadcast_to(parts[0]["x"][:4].sum(axis=1), (*np.shape(seed), 4))
    np.testing.assert_allclose(outcome.final.collections[state.CARRY]["total"], carried, rtol=1e-5)


def test_streams_that_the_batch_does_not_divide_are_refused(tmp_path):
    splits = loop.Splits(windows(5, 5), 12, 4, 4)
    with pytest.raises(UsageError, match="--batch_size=8 does not divide the 12 training examples"):
        train(tmp_path, 0, model=Sum, task=running_sum, splits=splits, batch_size=8, steps=1)


def test_named_inputs_reach_the_network_by_name():
    apply = state.bind(SimpleNamespace(apply=lambda variables, **given: (variables, given)))
    assert apply({}, {"x": 1, "mask": 2}, train=False)[0] == ({}, {"x": 1, "mask": 2, "train": False})
