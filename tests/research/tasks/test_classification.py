"""The task: losses and errors by hand, what the mask leaves out, and images that only training changes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from research.tasks.classification import classification

LOGITS = np.array([[0, 0, 0], [math.log(2), 0, 0], [0, 5, 0], [1000, 0, 0]], np.float32)
LABELS = np.array([2, 0, 1, 1], np.int32)
# -log softmax: three equal classes; 2 of 4 parts; 5 ahead of two; 1000 behind one, without an overflow.
LOSSES = [math.log(3), math.log(2), math.log(1 + 2 * math.exp(-5)), 1000]
ERRORS = [1, 0, 0, 1]  # of equal logits the first class counts as the answer


def fixed_logits(variables, images, *, train):
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
    gradient = jax.grad(lambda params: task.loss(VARIABLES | {"params": params}, BATCH, keys(4))[0])(VARIABLES["params"])
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


def seen(images=IMAGES, seed=0, **options):
    """The images that the model gets in training and in evaluation."""
    got = {}

    def record(variables, images, *, train):
        got[train] = np.asarray(images)
        return jnp.zeros((len(images), 2)), {}

    task = classification(record, **{"mean": MEAN, **options})
    batch = {"images": images, "labels": np.zeros(len(images), np.int32), "mask": np.ones(len(images), np.float32)}
    task.loss({}, batch, keys(len(images), seed))
    task.evaluate({}, batch)
    return got[True], got[False]


def prepared(scale=1 / 128):
    return (IMAGES.astype(np.float64) - MEAN) * scale


@pytest.mark.parametrize("options", [{}, {"scale": 1.0}, {"scale": 1 / 255, "mean": np.float32(7)}])
def test_images_are_centred_and_scaled(options):
    expected = (IMAGES.astype(np.float64) - options.get("mean", MEAN)) * options.get("scale", 1 / 128)
    for images in seen(**options):
        assert images.dtype == np.float32
        np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"crop": 2}, {"flip": True}, {"crop": 2, "flip": True}])
def test_augmentation_changes_images_in_training_alone(options):
    trained, evaluated = seen(**options)
    np.testing.assert_allclose(evaluated, prepared(), rtol=1e-5, atol=1e-5)
    assert trained.shape == evaluated.shape
    changed = (trained != evaluated).any(axis=(1, 2, 3))
    assert 16 < changed.sum()
    np.testing.assert_array_equal(seen(**options)[0], trained)
    assert not np.array_equal(seen(**options, seed=1)[0], trained)


def test_crops_are_filled_with_zeros_after_the_mean_is_subtracted():
    trained, evaluated = seen(crop=2)
    padded = np.pad(evaluated, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for image, source in zip(trained, padded, strict=True):
        windows = [source[top : top + 5, left : left + 4] for top in range(5) for left in range(5)]
        assert sum(np.array_equal(image, window) for window in windows) == 1


def test_an_examples_key_is_all_that_its_image_depends_on():
    trained, _ = seen(crop=2, flip=True)
    task_keys, (labels, mask) = keys(64), (np.zeros(1, np.int32), np.ones(1, np.float32))
    got = []
    task = classification(
        lambda variables, images, *, train: (got.append(images), (jnp.zeros((1, 2)), {}))[1], mean=MEAN, crop=2, flip=True
    )
    for k in (0, 17, 63):
        task.loss({}, {"images": IMAGES[k : k + 1], "labels": labels, "mask": mask}, task_keys[k : k + 1])
        np.testing.assert_array_equal(got[-1][0], trained[k])


def test_crop_and_flip_are_drawn_apart():
    n = 1000
    ramp = np.arange(1, 13, dtype=np.uint8).reshape(3, 4, 1)
    trained, _ = seen(np.broadcast_to(ramp, (n, 3, 4, 1)), mean=np.zeros((3, 4, 1), np.float32), scale=1.0, crop=1, flip=True)
    padded = np.pad(ramp, ((1, 1), (1, 1), (0, 0)))
    windows = [padded[top : top + 3, left : left + 4] for top in range(3) for left in range(3)]
    both = np.array([windows, [window[:, ::-1] for window in windows]])
    equal = (trained[:, None, None] == both[None]).all(axis=(3, 4, 5))
    table = equal.sum(axis=0)
    assert table.sum() == n and (table > 0).all()
    assert scipy.stats.chi2_contingency(table).pvalue > 0.001


def test_wrong_ranks_are_refused():
    task = classification(fixed_logits, mean=np.zeros((2, 2, 1), np.float32))
    with pytest.raises(AssertionError):
        task.loss(VARIABLES, BATCH | {"labels": np.eye(3, dtype=np.float32)[LABELS]}, keys(4))
