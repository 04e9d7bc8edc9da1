"""Splits: what is refused, and that the fixed permutation neither loses, repeats nor reorders examples."""

import numpy as np
import pytest

from research.data.dataset import ImageDataset, Split, split_off


def numbered(n, shape=(2, 3, 1)):
    labels = np.arange(n, dtype=np.int32)
    return Split(np.broadcast_to(labels[:, None, None, None], (n, *shape)).astype(np.uint8), labels)


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (np.zeros((2, 3, 3, 1), np.float32), np.zeros(2, np.int32), "uint8"),
        (np.zeros((2, 3, 3), np.uint8), np.zeros(2, np.int32), r"\[2, 3, 3\]"),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(2, np.int64), "int32"),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros((2, 1), np.int32), r"\[2, 1\]"),
        (np.zeros((2, 3, 3, 1), np.uint8), np.zeros(3, np.int32), "2 images but 3 labels"),
        (np.zeros((2, 3, 3, 1), np.uint8), np.array([0, -1], np.int32), "negative"),
    ],
)
def test_split_refuses(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Split(images, labels)


def test_dataset_knows_its_sizes():
    dataset = ImageDataset("tiny", numbered(4), numbered(2), numbered(3), tuple("abcd"), {})
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (4, 2, 3)
    assert dataset.num_classes == 4
    assert dataset.image_shape == (2, 3, 1)


def test_dataset_refuses_other_shapes_and_unnamed_labels():
    with pytest.raises(ValueError, match="test images have shape"):
        ImageDataset("tiny", numbered(4), numbered(2), numbered(3, (2, 2, 1)), tuple("abcd"), {})
    with pytest.raises(ValueError, match="validation has label 4, classes: 4"):
        ImageDataset("tiny", numbered(4), numbered(5), numbered(3), tuple("abcd"), {})


def test_split_off_divides_in_order():
    rest, taken = split_off(numbered(100), 30)
    assert (len(rest), len(taken)) == (70, 30)
    assert sorted([*rest.labels, *taken.labels]) == list(range(100))
    for part in (rest, taken):
        assert (np.diff(part.labels) > 0).all()
        np.testing.assert_array_equal(part.images[:, 1, 2, 0], part.labels)


def test_split_off_is_the_one_that_published_numbers_used():
    _, taken = split_off(numbered(100), 10)
    assert taken.labels.tolist() == [9, 30, 32, 34, 41, 46, 72, 90, 94, 98]


@pytest.mark.parametrize("count", [-1, 101])
def test_split_off_refuses_other_counts(count):
    with pytest.raises(ValueError, match="examples off 100"):
        split_off(numbered(100), count)


def test_split_off_all_and_nothing():
    assert len(split_off(numbered(10), 0)[0]) == len(split_off(numbered(10), 10)[1]) == 10
