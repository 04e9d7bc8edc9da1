"""The synthetic long-range tasks: what they say they are, their baselines, and the same again from the same key."""

import jax
import numpy as np
import pytest

from research.data import sequences

KEY = jax.random.key(0)


@pytest.mark.parametrize("halves", [False, True])
def test_the_sum_of_two_marked_values(halves):
    time = 9
    drawn = jax.device_get(sequences.adding(KEY, examples=4000, time=time, halves=halves))
    values, markers = drawn["inputs"][..., 0], drawn["inputs"][..., 1]
    assert drawn["inputs"].shape == (4000, time, 2)
    assert set(np.unique(markers)) == {0.0, 1.0}
    np.testing.assert_array_equal(markers.sum(axis=1), 2)
    np.testing.assert_allclose(drawn["targets"], (values * markers).sum(axis=1), rtol=1e-6)
    assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.01
    # Predicting 1 always: 1/6, here to 4 standard errors (the squared error has a standard deviation of 0.195).
    error = ((drawn["targets"] - 1) ** 2).mean()
    assert abs(error - sequences.ADDING_BASELINE) < 4 * 0.195 / np.sqrt(4000)
    pairs = [tuple(np.flatnonzero(row)) for row in markers]
    if halves:
        assert all(i < time // 2 <= j for i, j in pairs)
        assert len(set(pairs)) == (time // 2) * (time - time // 2)
    else:  # every pair equally often: 4,000 over 36, to 5 standard deviations
        _, counts = np.unique(pairs, axis=0, return_counts=True)
        assert len(counts) == time * (time - 1) // 2
        assert np.abs(counts - 4000 / 36).max() < 5 * np.sqrt(4000 / 36)


@pytest.mark.parametrize("blanks", [1, 2, 30])
def test_ten_symbols_come_again_after_the_blanks(blanks):
    drawn = jax.device_get(sequences.copy_memory(KEY, examples=500, blanks=blanks))
    inputs, targets = drawn["inputs"], drawn["targets"]
    assert inputs.shape == targets.shape == (500, blanks + 20)
    symbols = inputs[:, :10]
    assert set(np.unique(symbols)) == set(range(1, 9))
    np.testing.assert_array_equal(inputs[:, 10 : 10 + blanks - 1], 0)
    np.testing.assert_array_equal(inputs[:, 10 + blanks - 1 :], 9)
    np.testing.assert_array_equal(targets[:, :-10], 0)
    np.testing.assert_array_equal(targets[:, -10:], symbols)
    assert inputs[0, -10:].tolist() == [9] * 10  # while it answers it is only asked


@pytest.mark.parametrize(("blanks", "loss"), [(500, 0.03999), (1000, 0.02039), (2000, 0.01029)])
def test_the_loss_without_memory_is_that_of_the_published_tables(blanks, loss):
    assert sequences.copy_memory_baseline(blanks) == pytest.approx(loss, abs=5e-6)


@pytest.mark.parametrize(
    "draw",
    [
        lambda key: sequences.adding(key, examples=3, time=5),
        lambda key: sequences.copy_memory(key, examples=3, blanks=4),
    ],
)
def test_the_key_decides(draw):
    one, again, other = (jax.device_get(jax.jit(draw)(jax.random.key(seed))) for seed in (0, 0, 1))
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
        assert (one[name] != other[name]).any()


def test_impossible_lengths_are_refused():
    with pytest.raises(ValueError, match="time is 1"):
        sequences.adding(KEY, examples=1, time=1)
    with pytest.raises(ValueError, match="blanks is 0"):
        sequences.copy_memory(KEY, examples=1, blanks=0)
