"""The task: losses and errors by hand, what the mask leaves out, and images that only training changes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from research.tasks.classification import classification, prepare

LOGITS = np.array([[0, 0, 0], [math.log(2), 0, 0], [0, 5, 0], [1000, 0, 0]], np.float32)
LABELS = np.array([2, 0, 1, 1], np.int32)
# -log softmax: three equal classes; 2 of 4 parts; 5 ahead of two; 1000 behind one, without an overflow.
LOSSES = [math.log(3), math.log(2), math.log(1 + 2 * math.exp(-5)), 1000]
ERRORS = [1, 0, 0, 1]  # of equal logits the first class counts as the answer


def fixed_logits(variables, images, *, train, key=None):
    """A model that answers LOGITS whatever it sees."""
    return variables["params"]["shift"] + LOGITS, {"calls": variables["calls"] + 1} if train else {}


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


VARIABLES = {"params": {"shift": jnp.zeros(3)}, "calls": jnp.int32(4)}
BATCH = {"images": np.zeros((4, 2, 2, 1), np.uint8), "labels": LABELS}


def test_loss_and_error_by_hand():
    task = classification(fixed_logits, mean=np.zeros((2, 2, 1), np.float32))
    value, (collections, metrics) = jax.jit(task.loss)(VARIABLES, BATCH, keys(4))
    assert float(value) == pytest.approx(np.mean(LOSSES), rel=1e-6)
    assert {name: float(v) for name, v in metrics.items()} == {"loss": float(value), "error": np.mean(ERRORS)}
    assert collections == {"calls": 5}


def test_the_gradient_is_softmax_less_one_hot():
    task = classification(fixed_logits, mean=np.zeros((2, 2, 1), np.float32))
    gradient = jax.grad(lambda params: task.loss(VARIABLES | {"params": params}, BATCH, keys(4))[0])(
        VARIABLES["params"]
    )
    softmax = np.exp(LOGITS - LOGITS.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(gradient["shift"], (softmax - np.eye(3)[LABELS]).mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("mask", [[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
def test_evaluation_sums_over_the_unmasked(mask):
    task = classification(fixed_logits, mean=np.zeros((2, 2, 1), np.float32), crop=1, flip=True)
    sums = jax.jit(task.evaluate)(VARIABLES, BATCH | {"mask": np.array(mask, np.float32)})
    assert sums.keys() == {"loss", "error", "count"}
    assert float(sums["loss"]) == pytest.approx(np.dot(LOSSES, mask), rel=1e-6)
    assert float(sums["error"]) == np.dot(ERRORS, mask)
    assert float(sums["count"]) == sum(mask)


# What the model sees

IMAGES = np.random.default_rng(0).integers(1, 256, (64, 5, 4, 3)).astype(np.uint8)
MEAN = np.random.default_rng(1).uniform(100, 150, (5, 4, 3)).astype(np.float32)


def showing(variables, images, *, train, key=None):
    """A model that hands out the images that it gets."""
    if not train:
        return images.reshape(len(images), -1), {}
    return jnp.zeros((len(images), 2)), {"seen": images}


@functools.cache
def training_images(crop, flip):
    task = classification(showing, mean=MEAN, crop=crop, flip=flip)
    loss = jax.jit(task.loss)

    def see(images, image_keys):
        return np.asarray(
            loss({}, {"images": images, "labels": np.zeros(len(images), np.int32)}, image_keys)[1][0]["seen"]
        )

    return see


EVALUATED = (IMAGES.astype(np.float64) - MEAN) / 128
augmented = pytest.mark.parametrize(("crop", "flip"), [(2, False), (0, True), (2, True)])


def test_images_are_centred_by_the_mean_and_scaled_by_a_constant():
    for images in (prepare(IMAGES, MEAN), training_images(0, False)(IMAGES, keys(64))):
        assert images.dtype == np.float32
        np.testing.assert_allclose(images, EVALUATED, rtol=1e-5, atol=1e-6)
    assert prepare(np.uint8([0, 255]), np.float32(128)).tolist() == [-1, 127 / 128]


@augmented
def test_augmentation_changes_images_in_training(crop, flip):
    see = training_images(crop, flip)
    trained = see(IMAGES, keys(64))
    assert trained.shape == IMAGES.shape
    assert np.any(np.abs(trained - EVALUATED) > 1e-3, axis=(1, 2, 3)).sum() > 16
    np.testing.assert_array_equal(see(IMAGES, keys(64)), trained)
    assert not np.array_equal(see(IMAGES, keys(64, seed=1)), trained)
    # An example's key is all that its image depends on.
    np.testing.assert_array_equal(see(IMAGES[::-1], keys(64)[::-1]), trained[::-1])


@augmented
def test_augmentation_leaves_evaluation_alone(crop, flip):
    batch = {"images": IMAGES, "labels": np.arange(64, dtype=np.int32) % 60, "mask": np.ones(64, np.float32)}
    with_it, without = (
        classification(showing, mean=MEAN, **o).evaluate({}, batch) for o in ({"crop": crop, "flip": flip}, {})
    )
    assert with_it == without
    logits = EVALUATED.reshape(64, -1)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(64), batch["labels"]]
    assert float(without["loss"]) == pytest.approx(losses.sum(), rel=1e-5)


def test_crops_are_filled_with_zeros_after_the_mean_is_subtracted():
    trained, image = training_images(2, False)(IMAGES, keys(64)), np.asarray(prepare(IMAGES, MEAN))
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for crop, source in zip(trained, padded, strict=True):
        windows = [source[top : top + 5, left : left + 4] for top in range(5) for left in range(5)]
        assert sum(np.allclose(crop, window, rtol=1e-6) for window in windows) == 1


def test_crop_and_flip_are_drawn_apart():
    n = 1000
    trained = training_images(1, True)(np.broadcast_to(IMAGES[0], (n, *IMAGES[0].shape)), keys(n))
    padded = np.pad(prepare(IMAGES[0], MEAN), ((1, 1), (1, 1), (0, 0)))
    windows = [padded[top : top + 5, left : left + 4] for top in range(3) for left in range(3)]
    both = np.array([windows, [window[:, ::-1] for window in windows]])
    table = np.isclose(trained[:, None, None], both[None], rtol=1e-6).all(axis=(3, 4, 5)).sum(axis=0)  # flips x windows
    assert table.sum() == n and (table > 0).all()
    assert scipy.stats.chi2_contingency(table).pvalue > 0.001


def test_another_preparation_is_that_of_training_and_of_evaluation():
    def doubled_rows(images, mean):
        assert mean is MEAN
        return jnp.repeat(images.astype(jnp.float32), 2, axis=1)

    doubled, labels = np.repeat(IMAGES.astype(np.float32), 2, axis=1), np.zeros(64, np.int32)
    tasks = {crop: classification(showing, mean=MEAN, crop=crop, prepare=doubled_rows) for crop in (0, 1)}
    seen = {
        crop: np.asarray(jax.jit(task.loss)({}, {"images": IMAGES, "labels": labels}, keys(64))[1][0]["seen"])
        for crop, task in tasks.items()
    }
    np.testing.assert_array_equal(seen[0], doubled)
    # Crops are of what was prepared.
    assert seen[1].shape == doubled.shape
    padded = np.pad(doubled, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for crop, source in zip(seen[1], padded, strict=True):
        windows = [source[top : top + 10, left : left + 4] for top in range(3) for left in range(3)]
        assert any(np.array_equal(crop, window) for window in windows)
    sums = tasks[1].evaluate({}, {"images": IMAGES, "labels": labels, "mask": np.ones(64, np.float32)})
    logits = doubled.reshape(64, -1).astype(np.float64)
    losses = np.log(np.exp(logits - 255).sum(axis=1)) + 255 - logits[:, 0]
    assert float(sums["loss"]) == pytest.approx(losses.sum(), rel=1e-5)


def test_wrong_ranks_are_refused():
    task = classification(fixed_logits, mean=np.zeros((2, 2, 1), np.float32))
    with pytest.raises(AssertionError):
        task.loss(VARIABLES, BATCH | {"labels": np.eye(3, dtype=np.float32)[LABELS]}, keys(4))
