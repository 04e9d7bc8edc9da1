"""Masks of dropout: their rate, and that they belong to places in the global batch and to nothing else."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.dropout import keep_mask

KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_elements_are_kept_independently_with_the_asked_probability(rate):
    keep = np.asarray(keep_mask(KEY, (200, 5, 5, 8), rate=rate))
    assert keep.shape == (200, 5, 5, 8) and keep.dtype == bool
    sigma = math.sqrt(rate * (1 - rate) / keep.size)
    assert abs(keep.mean() - (1 - rate)) < 4 * sigma
    # So is every place within an example, and every example; and neighbours along each axis agree by chance alone.
    assert np.abs(keep.mean(axis=0) - (1 - rate)).max() < 5 * math.sqrt(rate * (1 - rate) / 200)
    assert np.abs(keep.mean(axis=(1, 2, 3)) - (1 - rate)).max() < 5 * math.sqrt(rate * (1 - rate) / 200)
    by_chance = rate**2 + (1 - rate) ** 2
    for axis in range(4):
        agreement = np.diff(keep.astype(int), axis=axis) == 0
        assert abs(agreement.mean() - by_chance) < 5 / math.sqrt(agreement.size)


def test_no_rate_keeps_everything():
    assert keep_mask(KEY, (3, 4), rate=0.0).all()


def test_masks_differ_by_key_and_by_example():
    masks = [np.asarray(keep_mask(jax.random.key(seed), (4, 50), rate=0.5)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(masks[0], masks[1])
    rows = np.concatenate([masks[0], masks[2]])
    assert len(np.unique(rows, axis=0)) == 8


def test_an_examples_mask_does_not_depend_on_the_size_of_the_batch():
    whole = keep_mask(KEY, (8, 3, 5), rate=0.5)
    np.testing.assert_array_equal(keep_mask(KEY, (5, 3, 5), rate=0.5), whole[:5])


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_a_split_batch_has_the_masks_of_the_whole_one(parts):
    whole = np.asarray(keep_mask(KEY, (8, 3, 5), rate=0.5))

    def share(key, axis_name):
        return keep_mask(key, (8 // parts, 3, 5), rate=0.5, axis_name=axis_name)

    def mapped(axis_name):
        place = jnp.arange(parts)
        return np.asarray(jax.vmap(lambda _: share(KEY, axis_name), axis_name="batch")(place)).reshape(-1, 3, 5)

    np.testing.assert_array_equal(mapped("batch"), whole)
    if parts > 1:  # the name of the axis is what does it
        assert not np.array_equal(np.broadcast_to(mapped(None), whole.shape), whole)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
def test_what_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match=f"rate {rate} is not a probability below 1"):
        keep_mask(KEY, (2, 2), rate=rate)
