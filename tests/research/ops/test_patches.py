"""Patches as channels: the order of pixels, there and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from research.ops import patches


def test_a_patch_becomes_a_pixel():
    frame = jnp.arange(16).reshape(1, 4, 4, 1)
    folded = patches.fold(frame, 2)
    assert folded.shape == (1, 2, 2, 4)
    np.testing.assert_array_equal(folded[0, 0, 1], [2, 3, 6, 7])
    np.testing.assert_array_equal(folded[0, 1, 0], [8, 9, 12, 13])


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_unfolding_gives_the_frames_back(size):
    frames = np.random.default_rng(0).standard_normal((2, 3, 6, 12, 2))
    folded = patches.fold(frames, size)
    assert folded.shape == (2, 3, 6 // size, 12 // size, 2 * size**2)
    np.testing.assert_array_equal(patches.unfold(folded, size), frames)


def test_what_does_not_divide_is_refused():
    with pytest.raises(AssertionError):
        patches.fold(np.zeros((1, 6, 8, 1)), 4)
    with pytest.raises(AssertionError):
        patches.unfold(np.zeros((1, 6, 8, 3)), 2)
