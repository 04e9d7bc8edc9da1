"""The nowcasting task: its loss by hand, which frames the model sees, the mask, and digits made from their index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data import moving
from research.models.forecaster import EncoderForecaster
from research.models.recurrent import lstm
from research.tasks.nowcasting import nowcasting

RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.random((4, 7, 5, 6, 1)).astype(np.float32)  # seven frames each, of which three are seen
LOGITS = RANDOM.standard_normal((4, 4, 5, 6, 1)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), 4)


def frames_of(batch):
    return jnp.asarray(FRAMES)[batch["index"]]


def losses(logits, frames):
    """Of each sequence, in nats: from probabilities, pixel by pixel."""
    p, truth = 1 / (1 + np.exp(-np.float64(logits))), np.float64(frames[:, 3:])
    return -(truth * np.log(p) + (1 - truth) * np.log(1 - p)).sum(axis=(1, 2, 3, 4))


def giving(outputs, calls):
    def apply(variables, inputs, *, train, key=None):
        calls.append((np.asarray(inputs), train, key))
        return jnp.asarray(outputs) * variables["scale"], {"statistics": 7}

    return apply


def test_the_loss_is_a_sum_over_what_is_to_come_and_a_mean_over_sequences():
    calls, order = [], np.array([2, 0, 3, 1])
    task = nowcasting(giving(LOGITS, calls), frames_of, observed=3)
    key = jax.random.key(1)
    value, (collections, metrics) = task.loss({"scale": 2.0}, {"index": order}, KEYS, key=key)
    each = losses(2 * LOGITS, FRAMES[order])
    assert float(value) == float(metrics["loss"]) == pytest.approx(each.mean(), rel=1e-5)
    assert collections == {"statistics": 7}
    ((seen, train, given),) = calls
    np.testing.assert_array_equal(seen, FRAMES[order, :3])
    np.testing.assert_array_equal(task.inputs({"index": order}), FRAMES[order, :3])
    assert train is True and given is key


def test_an_evaluation_adds_up_the_sequences_that_count():
    calls = []
    task = nowcasting(giving(LOGITS, calls), frames_of, observed=3)
    each = losses(LOGITS, FRAMES)
    for mask in ([1, 1, 1, 1], [1, 0, 1, 0]):
        found = task.evaluate({"scale": 1.0}, {"index": np.arange(4), "mask": np.float32(mask)})
        assert found.keys() == {"loss", "count"} and float(found["count"]) == sum(mask)
        assert float(found["loss"]) == pytest.approx((each * mask).sum(), rel=1e-5)
    assert [train for _, train, _ in calls] == [False, False]


def test_digits_are_made_from_their_index(quick_compilation):
    pool = RANDOM.integers(1, 256, (9, 8, 8), dtype=np.uint8)
    made = moving.Moving(frame=12, time=7)
    sequences = jax.jit(lambda index: moving.sequences(pool, index, seed=0, moving=made))
    network = EncoderForecaster(lstm(peepholes=True), (2,), horizon=4, kernels=(3, 3), patch=2)
    index = np.array([5, 0, 123_456])
    frames = np.asarray(sequences(index))
    logits, variables = jax.jit(network.init_with_output)(jax.random.key(0), frames[:, :3])

    def apply(variables, inputs, *, train, key=None):
        return network.apply(variables, inputs, train=train), {}

    task = nowcasting(apply, lambda batch: sequences(batch["index"]), observed=3)
    expected = losses(logits, frames)
    value, gradient = jax.jit(jax.value_and_grad(lambda v: task.loss(v, {"index": index}, KEYS[:3])[0]))(variables)
    assert float(value) == pytest.approx(expected.mean(), rel=1e-5)
    assert all(np.all(leaf) for leaf in jax.tree.leaves(gradient))
    found = jax.jit(task.evaluate)(variables, {"index": index, "mask": np.float32([0, 1, 1])})
    assert float(found["loss"]) == pytest.approx(expected[1:].sum(), rel=1e-5) and found["count"] == 2
