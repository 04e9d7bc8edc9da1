"""The embedded digits against their checksum, the class counts that UCI publishes and pixels known by eye."""

import gzip
import importlib.resources

import numpy as np
import pytest

from research.data import digits
from research.errors import CarouselError


@pytest.fixture(scope="module")
def content():
    return importlib.resources.files("research.data").joinpath(digits.FILE).read_bytes()


def test_class_counts_are_those_of_optdigits_names(content):
    examples = digits.parse(content)
    # "Class: No of examples in testing set" of optdigits.names.
    assert np.bincount(examples.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert examples.labels[:20].tolist() == [*range(10), *range(10)]


def test_pixels_of_the_first_digit(content):
    zero = digits.parse(content).images[0, :, :, 0]
    raw = "0 0 5 13 9 1 0 0, 0 0 13 15 10 15 5 0, 0 3 15 2 0 11 8 0, 0 4 12 0 0 8 8 0, 0 5 8 0 0 9 8 0, "
    raw += "0 4 11 0 1 12 7 0, 0 2 14 5 10 12 0 0, 0 0 6 13 10 0 0 0"
    expected = [[255 * int(value) // 16 for value in row.split()] for row in raw.split(",")]
    assert zero.tolist() == expected


def test_scaling_loses_nothing(content):
    images = digits.parse(content).images
    raw = np.loadtxt(gzip.decompress(content).decode().splitlines(), delimiter=",")[:, :64].reshape(-1, 8, 8, 1)
    assert (images.min(), images.max()) == (0, 255)
    np.testing.assert_array_equal(np.ceil(images * (16 / 255) - 1e-9), raw)


def test_load(content):
    dataset = digits.load("/nowhere")
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (1280, 217, 300)
    assert dataset.image_shape == (8, 8, 1)
    assert dataset.class_names == tuple("0123456789")
    assert dataset.checksums == {"optdigits.csv.gz": digits.SHA256}
    splits = (dataset.train, dataset.validation, dataset.test)
    together = np.concatenate([split.images.reshape(-1, 64) for split in splits])
    everything = digits.parse(content).images.reshape(-1, 64)
    # The parts are the whole: no example lost, none in two parts.
    np.testing.assert_array_equal(np.sort(together.view("S64"), axis=0), np.sort(everything.view("S64"), axis=0))
    for split in splits:
        assert np.bincount(split.labels).min() >= len(split) / 10 * 0.6


def test_altered_file_is_refused(content):
    altered = bytearray(content)
    altered[1000] ^= 1
    with pytest.raises(CarouselError, match=r"optdigits.csv.gz in research/data is altered.*git checkout"):
        digits.parse(bytes(altered))


def test_package_file_was_written_without_a_time(content):
    assert content[4:8] == bytes(4)
