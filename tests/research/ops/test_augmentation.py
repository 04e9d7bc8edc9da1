"""Random crops and mirror images: what comes out is one of the windows that may, and each of them equally often."""

from functools import partial

import jax
import numpy as np
import pytest
import scipy.stats

from research.ops.augmentation import random_crop, random_flip

IMAGE = np.arange(1, 4 * 5 * 2 + 1, dtype=np.float32).reshape(4, 5, 2)  # no zeros: those of the padding show


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def windows(image, padding):
    """Every window of the image's size in the zero-padded image, row by row."""
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), image.dtype)
    padded[padding : padding + height, padding : padding + width] = image
    offsets = np.ndindex(2 * padding + 1, 2 * padding + 1)
    return np.stack([padded[top : top + height, left : left + width] for top, left in offsets])


def which(found, candidates):
    """Index of the candidate that each found image is; fails where it is none of them or more than one."""
    equal = (found[:, None] == candidates[None]).all(axis=(2, 3, 4))
    assert (equal.sum(axis=1) == 1).all()
    return equal.argmax(axis=1)


@pytest.mark.parametrize("padding", [1, 2])
def test_every_window_of_the_padded_image_is_equally_likely(padding):
    n = 20_000
    crops = jax.jit(jax.vmap(partial(random_crop, IMAGE, padding=padding)))(keys(n))
    candidates = windows(IMAGE, padding)
    counts = np.bincount(which(np.asarray(crops), candidates), minlength=len(candidates))
    assert (counts > 0).all()
    assert scipy.stats.chisquare(counts).pvalue > 0.001


def test_no_padding_is_no_crop():
    np.testing.assert_array_equal(random_crop(IMAGE, keys(1)[0], padding=0), IMAGE)


def test_half_of_the_images_are_mirrored():
    n = 20_000
    flips = jax.jit(jax.vmap(partial(random_flip, IMAGE)))(keys(n))
    mirrored = which(np.asarray(flips), np.stack([IMAGE, IMAGE[:, ::-1]]))
    assert abs(mirrored.sum() - n / 2) < 4 * np.sqrt(n / 4)  # 4 standard deviations of a fair coin


@pytest.mark.parametrize("augment", [partial(random_crop, padding=2), random_flip])
def test_the_key_alone_decides_and_vmap_is_one_by_one(augment):
    images = np.random.default_rng(0).standard_normal((24, *IMAGE.shape)).astype(np.float32)
    batch = jax.vmap(augment)(images, keys(24))
    np.testing.assert_array_equal(batch, jax.vmap(augment)(images, keys(24)))
    np.testing.assert_array_equal(batch, [augment(*pair) for pair in zip(images, keys(24), strict=True)])
    assert not np.array_equal(batch, jax.vmap(augment)(images, keys(24, seed=1)))
    # The same key does the same to another image.
    np.testing.assert_array_equal(jax.vmap(augment)(-images, keys(24)), -np.asarray(batch))


@pytest.mark.parametrize("augment", [partial(random_crop, padding=1), random_flip])
def test_types_stay_and_batches_are_refused(augment):
    assert augment(IMAGE.astype(np.uint8), keys(1)[0]).dtype == np.uint8
    with pytest.raises(AssertionError):
        augment(IMAGE[None], keys(1)[0])
