"""The IDX reader on tiny files made here, each damage giving its own message, and on the real files where present."""

import gzip
import hashlib
import os
import pathlib
import struct

import numpy as np
import pytest

from research.data import mnist
from research.errors import CarouselError

SHARED = pathlib.Path(os.environ.get("CAROUSEL_DATA", pathlib.Path(__file__).parents[4] / "shared/data"))
real = pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason=f"no real MNIST in {SHARED}: set CAROUSEL_DATA")

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
CONTENT = struct.pack(">4B3I", 0, 0, 8, 3, 2, 3, 4) + PIXELS.tobytes()
PACKED = gzip.compress(CONTENT, mtime=0)
EXPECTED = mnist.IdxFile((2, 3, 4), hashlib.md5(CONTENT).hexdigest())


def read(folder, raw, expected=EXPECTED):
    path = folder / "images"
    path.write_bytes(raw)
    return mnist.read_idx(path, expected, "get it")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_reads_plain_and_compressed(tmp_path, pack):
    array, checksum = read(tmp_path, pack(CONTENT))
    np.testing.assert_array_equal(array, PIXELS)
    assert checksum == hashlib.sha256((tmp_path / "images").read_bytes()).hexdigest()


def test_reads_labels(tmp_path):
    content = struct.pack(">4BI", 0, 0, 8, 1, 3) + bytes([7, 2, 1])
    array, _ = read(tmp_path, content, mnist.IdxFile((3,), hashlib.md5(content).hexdigest()))
    assert array.tolist() == [7, 2, 1]


def flip(raw, position):
    return raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "truncated: 0 bytes"),
        (CONTENT[:15], "truncated: 15 bytes, the header alone has 16"),
        (CONTENT[:-1], "truncated: 39 bytes, expected 40"),
        (CONTENT + b"\0", "data after the end"),
        (b"<html><body>moved</body></html>", "wrong magic number 0x3c68746d"),
        (b"\0\0\x0d" + CONTENT[3:], "data type code 0x0d, expected 0x08"),
        (b"\0\0\x08\x01" + CONTENT[4:], "1 dimensions, expected 3"),
        (CONTENT[:4] + struct.pack(">3I", 1, 6, 4) + CONTENT[16:], r"dimensions \[1, 6, 4\], expected \[2, 3, 4\]"),
        (CONTENT[:4] + b"\xff" * 12 + CONTENT[16:], r"dimensions \[4294967295, "),
        (flip(CONTENT, 20), "checksum mismatch"),
        (gzip.compress(flip(CONTENT, 20), mtime=0), "checksum mismatch"),
        (PACKED[:-9], "truncated: the compressed data ends early"),
        (flip(PACKED, len(PACKED) - 8), "corrupt gzip data .CRC check failed"),
        (PACKED[:10] + b"\xff" * 30, "corrupt gzip data"),
        (PACKED + b"garbage", "corrupt gzip data"),
        (gzip.compress(CONTENT + bytes(10_000_000), mtime=0), "data after the end"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}bytes",
)
def test_damage_gives_one_clear_error(tmp_path, raw, message):
    with pytest.raises(CarouselError, match=message) as caught:
        read(tmp_path, raw)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "images"))
    assert text.endswith("delete the file and run `get it`")
    assert "\n" not in text


def test_every_flipped_bit_is_found(tmp_path):
    for position in range(len(PACKED)):
        try:
            array, _ = read(tmp_path, flip(PACKED, position))
        except CarouselError:
            continue
        # Bits of the gzip header (time, system, flags) may flip without a change of the content; nothing else may.
        assert position < 10
        np.testing.assert_array_equal(array, PIXELS)


def test_missing_file_names_file_folder_and_command(tmp_path):
    with pytest.raises(CarouselError) as caught:
        mnist.load(str(tmp_path))
    assert str(caught.value) == (
        f"train-images-idx3-ubyte.gz is missing in {tmp_path / 'mnist'}: get it with "
        f"`python -m research.data.download mnist --data_dir={tmp_path}`"
    )


def test_unreadable_file_is_one_line(tmp_path):
    (tmp_path / "mnist/train-images-idx3-ubyte.gz").mkdir(parents=True)
    (tmp_path / "mnist/train-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(CarouselError, match=r"^cannot read .*train-images-idx3-ubyte.gz: Is a directory$"):
        mnist.load(str(tmp_path))


@real
def test_real_files():
    dataset = mnist.load(str(SHARED))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (55_000, 5_000, 10_000)
    assert dataset.image_shape == (28, 28, 1)
    assert np.bincount(dataset.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    counts = np.bincount(np.concatenate([dataset.train.labels, dataset.validation.labels]))
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    # The mean that everyone's normalisation constant 0.1307 comes from.
    mean = (dataset.train.images.mean() * 55 + dataset.validation.images.mean() * 5) / 60 / 255
    assert mean == pytest.approx(0.1307, abs=5e-5)
    assert len(dataset.checksums) == 4


@real
def test_real_folder_itself_and_plain_files(tmp_path):
    for path in (SHARED / "mnist").glob("*.gz"):
        if "labels" in path.name:
            (tmp_path / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        else:
            (tmp_path / path.name).symlink_to(path)
    dataset = mnist.load(str(tmp_path))
    assert dataset.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert "train-labels-idx1-ubyte" in dataset.checksums and "train-images-idx3-ubyte.gz" in dataset.checksums


@real
def test_real_files_under_each_others_names(tmp_path):
    for mine, yours in (("train", "t10k"), ("t10k", "train")):
        for kind in ("images-idx3", "labels-idx1"):
            (tmp_path / f"{mine}-{kind}-ubyte.gz").symlink_to(SHARED / "mnist" / f"{yours}-{kind}-ubyte.gz")
    with pytest.raises(CarouselError, match=r"dimensions \[10000, 28, 28\], expected \[60000, 28, 28\]"):
        mnist.load(str(tmp_path))
