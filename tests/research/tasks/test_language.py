"""The next token: losses by hand, what is padded or masked, what is carried, and a text learnt by the trainer."""

import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data import text
from research.models.language import RecurrentLanguageModel
from research.models.recurrent import vanilla
from research.tasks import language
from research.training import loop, optimizers, run_folder
from research.training.progress import Reporter

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.standard_normal((3, 4, 5)).astype(np.float32)
BATCH = {
    "inputs": RANDOM.integers(0, 5, (3, 4)).astype(np.int32),
    "targets": RANDOM.integers(0, 5, (3, 4)).astype(np.int32),
    "valid": np.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], bool),
    "first": np.array([True, False, False]),
}

pytestmark = pytest.mark.usefixtures("quick_compilation")


def giving(logits):
    """A model that puts out the same whatever it is given; tells what that was as its collections."""

    def apply(variables, inputs, *, train, key=None):
        return jnp.asarray(logits), {"carry": inputs, "train": train}

    return apply


def by_hand(rows):
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=-1, keepdims=True)
    places = [(n, t) for n in rows for t in range(4) if BATCH["valid"][n, t]]
    return -sum(math.log(p[n, t, BATCH["targets"][n, t]]) for n, t in places), len(places)


def test_the_loss_is_the_mean_over_the_valid_tokens():
    task = language.next_token(giving(LOGITS))
    assert task.carries
    value, (collections, metrics) = jax.jit(task.loss)({}, BATCH, None)
    total, count = by_hand([0, 1, 2])
    assert count == 7 and float(value) == pytest.approx(total / count, rel=1e-5) == float(metrics["loss"])
    assert collections["train"] and collections["carry"].keys() == task.inputs(BATCH).keys()
    np.testing.assert_array_equal(collections["carry"]["tokens"], BATCH["inputs"])
    np.testing.assert_array_equal(collections["carry"]["first"], BATCH["first"])
    padding = {name: array[2:] for name, array in BATCH.items()}
    assert float(jax.jit(language.next_token(giving(LOGITS[2:])).loss)({}, padding, None)[0]) == 0
    with pytest.raises(AssertionError):
        language.next_token(giving(LOGITS[:, :3])).loss({}, BATCH, None)


def test_evaluation_counts_tokens_of_the_examples_that_are_there_and_hands_the_carry_on():
    mask = np.float32([0, 1, 1])
    sums, collections = jax.jit(language.next_token(giving(LOGITS)).evaluate)({}, BATCH | {"mask": mask})
    total, count = by_hand([1, 2])
    assert sums.keys() == {"loss", "weight", "count"}
    assert (float(sums["weight"]), float(sums["count"])) == (count, 2) == (3, 2)
    assert float(sums["loss"]) == pytest.approx(total, rel=1e-5)
    assert not collections["train"] and "carry" in collections


def test_no_idea_is_the_logarithm_of_the_vocabulary():
    windows = text.windows(RANDOM.integers(0, 50, 1_003), streams=4, time=16)
    examples = len(windows["first"])
    task = language.next_token(giving(np.zeros((examples, 16, 50), np.float32)))
    sums, _ = jax.jit(task.evaluate)({}, windows | {"mask": np.ones(examples, np.float32)})
    assert float(sums["weight"]) == 1_002 and float(sums["count"]) == examples
    nats = float(sums["loss"] / sums["weight"])
    assert nats == pytest.approx(math.log(50), rel=1e-6)
    assert language.perplexity(nats) == pytest.approx(50, rel=1e-5)
    assert language.bits(math.log(50)) == pytest.approx(math.log2(50), rel=1e-12)
    assert language.perplexity(1e4) == math.inf
    np.testing.assert_allclose(language.perplexity(np.array([0, math.log(2)])), [1, 2])


def test_a_network_that_carries_learns_across_windows_through_the_trainer(tmp_path):
    """The text repeats 0 0 1: in windows of one token, only what is carried tells the first 0 from the second."""
    tokens, streams = np.tile([0, 0, 1], 100).astype(np.int32), 2
    parts = [text.windows(tokens[:length], streams=streams, time=1) for length in (300, 60, 60)]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    splits = loop.Splits(arrays, *(len(part["first"]) for part in parts))

    def make_model(axis_name=None):
        return RecurrentLanguageModel(2, 4, vanilla(), (8,), streams, axis_name=axis_name)

    schedule = optimizers.step_decay(0.05, drops=(1_000,))
    optimizer = optimizers.sgd(schedule, weight_decay=0.0)
    plan = loop.Plan(0, 400, streams, steps_per_call=200, evaluate_every=400, devices=1)
    with run_folder.open_run(tmp_path, {}) as folder, Reporter(io.StringIO()) as reporter:
        context = loop.Context(folder, "text", reporter)
        outcome = loop.train(make_model, language.next_token, optimizer, schedule, splits, plan, context)
    without = 2 / 3 * math.log(2)  # the best loss of who sees one token
    assert outcome.evaluations["test"]["loss"] < 0.2 * without
    assert jax.tree.leaves(outcome.final.collections)[0].shape == (streams, 8)
