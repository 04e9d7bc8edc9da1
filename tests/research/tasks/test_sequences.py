"""Tasks on sequences: losses by hand, what the network is given, masks, and the adding problem by the trainer."""

import functools
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data import music
from research.data import sequences as data
from research.models.recurrent import CELLS
from research.models.sequence import SequenceToOne, SequenceToSequence, Stack
from research.tasks import sequences
from research.training import loop, optimizers, run_folder
from research.training.progress import Reporter

RANDOM = np.random.default_rng(0)
KEYS = jax.random.split(jax.random.key(0), 4)


def giving(outputs):
    """A model that puts out the same whatever it is given; tells what that was as its collections."""

    def apply(variables, inputs, *, train, key=None):
        return jnp.asarray(outputs), {"seen": inputs}

    return apply


def evaluated(task, batch, mask):
    sums = jax.device_get(task.evaluate({}, batch | {"mask": np.float32(mask)}))
    count = sums.pop("count")
    assert count == sum(mask)
    return {name: value / count for name, value in sums.items()}


def test_regression():
    outputs, targets = RANDOM.standard_normal((4, 1)), RANDOM.standard_normal(4)
    task = sequences.regression(giving(outputs))
    batch = {"inputs": np.zeros((4, 3, 2)), "targets": targets}
    value, (collections, metrics) = task.loss({}, batch, KEYS)
    squares = (outputs[:, 0] - targets) ** 2
    assert float(value) == pytest.approx(squares.mean(), rel=1e-6) and float(metrics["loss"]) == float(value)
    assert collections["seen"].shape == (4, 3, 2)
    assert evaluated(task, batch, [1, 0, 1, 0])["loss"] == pytest.approx(squares[[0, 2]].mean(), rel=1e-6)
    with pytest.raises(AssertionError):  # (4, 4) differences would be no error otherwise
        sequences.regression(giving(outputs[:, 0])).loss({}, batch, KEYS)


@pytest.mark.parametrize("permuted", [False, True])
def test_pixels_one_after_another(permuted):
    images = RANDOM.integers(0, 256, (4, 2, 3, 1)).astype(np.uint8)
    labels = np.array([0, 1, 2, 0])
    logits = RANDOM.standard_normal((4, 3))
    permutation = RANDOM.permutation(6) if permuted else None
    task = sequences.pixel_classification(giving(logits), permutation=permutation)
    value, (collections, metrics) = task.loss({}, {"images": images, "labels": labels}, KEYS)
    expected = images.reshape(4, 6, 1) / 255
    np.testing.assert_allclose(
        collections["seen"], expected[:, permutation] if permuted else expected, rtol=1e-6, atol=1e-7
    )
    losses = [math.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, labels, strict=True)]
    wrong = logits.argmax(1) != labels
    assert float(value) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(metrics["error"]) == pytest.approx(wrong.mean())
    found = evaluated(task, {"images": images, "labels": labels}, [0, 1, 1, 1])
    assert found == pytest.approx({"loss": np.mean(losses[1:]), "error": wrong[1:].mean()}, rel=1e-5)


def test_guessing_gives_the_baseline_of_copy_memory():
    blanks = 30
    batch = jax.device_get(data.copy_memory(jax.random.key(1), examples=50, blanks=blanks))
    guess = np.full((50, blanks + 20, 10), -50.0)
    guess[:, : blanks + 10, 0] = 0  # sure of the blank, then one of eight
    guess[:, blanks + 10 :, 1:9] = 0
    task = sequences.symbols(giving(guess), classes=10)
    value, (collections, _) = task.loss({}, batch, KEYS)
    assert float(value) == pytest.approx(data.copy_memory_baseline(blanks), rel=1e-5)
    np.testing.assert_array_equal(collections["seen"].argmax(-1), batch["inputs"])
    assert evaluated(task, batch, [1] * 20 + [0] * 30)["loss"] == pytest.approx(float(value), rel=1e-5)


def test_music_predicts_within_each_sequence_as_if_it_were_alone():
    rolls = [RANDOM.integers(0, 2, (frames, music.NOTES)).astype(np.uint8) for frames in (2, 5, 3, 2, 4)]
    batch = music.packed(rolls, 7)
    rows = [[1, 0], [4, 2], [3]]  # of those sequences
    model = SequenceToSequence(Stack(CELLS["gru"](), (3,)), music.NOTES)
    padded = np.stack([np.pad(roll, ((0, 7 - len(roll)), (0, 0))) for roll in rolls])
    logits, variables = jax.jit(model.init_with_output)(jax.random.key(0), padded.astype(np.float32))

    def by_hand(rows):
        """From the logits of each sequence in a row of its own."""
        frames = [(n, t) for row in rows for n in row for t in range(len(rolls[n]) - 1)]
        p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
        terms = [np.where(rolls[n][t + 1], p[n, t], 1 - p[n, t]) for n, t in frames]
        return -np.log(terms).sum() / len(frames)

    def apply(variables, inputs, *, train, key=None):
        return model.apply(variables, **inputs, train=train), {}

    task = sequences.next_frame(apply)
    value, (_, metrics) = jax.jit(task.loss)(variables, batch, KEYS)
    assert float(value) == float(metrics["loss"]) == pytest.approx(by_hand(rows), rel=1e-5)
    evaluate = jax.jit(task.evaluate)
    for mask in ([1, 1, 1], [1, 0, 1]):
        sums = evaluate(variables, batch | {"mask": np.float32(mask)})
        chosen = [row for row, counts in zip(rows, mask, strict=True) if counts]
        assert sums["weight"] == sum(len(rolls[n]) - 1 for row in chosen for n in row) and sums["count"] == sum(mask)
        assert float(sums["loss"] / sums["weight"]) == pytest.approx(by_hand(chosen), rel=1e-5)


def test_a_gated_network_learns_to_add_through_the_trainer(tmp_path):
    """T = 10: below half of the loss without memory after 300 steps; and a task with no error rate is trained."""
    drawn = jax.device_get(data.adding(jax.random.key(0), examples=2_400, time=10))
    splits = loop.Splits(drawn, 2_000, 200, 200)

    def make_model(axis_name=None):
        return SequenceToOne(Stack(CELLS["gru"](), (16,)), 1)

    schedule = optimizers.step_decay(0.1, drops=(250,))
    optimizer = optimizers.sgd(schedule, weight_decay=0.0)
    plan = loop.Plan(0, 300, 50, steps_per_call=100, evaluate_every=300)
    with run_folder.open_run(tmp_path, {}) as folder, Reporter(io.StringIO()) as reporter:
        context = loop.Context(folder, "adding", reporter)
        outcome = loop.train(
            make_model, functools.partial(sequences.regression), optimizer, schedule, splits, plan, context
        )
    assert outcome.evaluations["test"].keys() == {"loss"}
    assert outcome.evaluations["test"]["loss"] < data.ADDING_BASELINE / 2
    assert (folder.checkpoints / "best.safetensors").exists()
