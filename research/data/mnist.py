"""MNIST in its original IDX files, compressed or not.

60,000 training and 10,000 test images of handwritten digits, 28x28 grey. Y. LeCun, L. Bottou, Y. Bengio, P. Haffner,
"Gradient-based learning applied to document recognition", Proc. IEEE 86(11), 1998. The format: a big-endian magic
number 0x0000TTDD (TT the data type, DD the number of dimensions), one 32-bit size for each dimension, then the data.

The uncompressed content is checked against the official MD5: compressing again changes the `.gz` and nothing else.
Splits: 55,000 train and 5,000 validation out of the official training set, 10,000 test.
"""

import dataclasses
import gzip
import io
import math
import pathlib
import zlib

import numpy as np

from research.data import files
from research.data.dataset import ImageDataset, Split, split_off

NAME = "mnist"
VALIDATION_EXAMPLES = 5_000
UNSIGNED_BYTE = 0x08
GZIP_MAGIC = b"\x1f\x8b"


@dataclasses.dataclass(frozen=True)
class IdxFile:
    """What an IDX file of unsigned bytes must hold.

    Attributes:
      shape: the sizes of its dimensions, `[n, height, width]` or `[n]`.
      md5: of the uncompressed content, hexadecimal.
    """

    shape: tuple[int, ...]
    md5: str


# Name without .gz -> content; MD5 of the files at http://yann.lecun.com/exdb/mnist/.
FILES = {
    "train-images-idx3-ubyte": IdxFile((60_000, 28, 28), "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": IdxFile((60_000,), "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": IdxFile((10_000, 28, 28), "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": IdxFile((10_000,), "27ae3e4e09519cfbb04c329615203637"),
}


def load(data_dir: str | None = None) -> ImageDataset:
    """Reads MNIST: 55,000 train, 5,000 validation and 10,000 test images of 28x28x1.

    Args:
      data_dir: the folder that holds `mnist/`, or the folder of the four files itself; `data` in the current directory
        when None. Where a file is there twice, `.gz` wins, since that is what the download repairs.

    Raises:
      CarouselError: a file is missing, truncated, corrupt or not the official one; the message says what to do.
    """
    parent = files.data_folder(data_dir)
    command = files.download_command(NAME, parent)
    names = [f"{name}{suffix}" for name in FILES for suffix in (".gz", "")]
    folder = (parent / NAME, parent)[files.fullest([(parent / NAME, names), (parent, names)])]
    arrays, checksums = [], {}
    for name, expected in FILES.items():
        path = folder / f"{name}.gz"
        if not path.exists() and (folder / name).exists():
            path = folder / name
        array, checksums[path.name] = read_idx(path, expected, command)
        arrays.append(array)
    train_images, train_labels, test_images, test_labels = arrays
    train, validation = split_off(_split(train_images, train_labels), VALIDATION_EXAMPLES)
    return ImageDataset(
        NAME, train, validation, _split(test_images, test_labels), tuple("0123456789"), checksums=checksums
    )


def read_idx(path: pathlib.Path, expected: IdxFile, command: str) -> tuple[np.ndarray, str]:
    """Reads one IDX file of unsigned bytes, gzip-compressed or plain (told apart by the first two bytes).

    Args:
      path: the file.
      expected: what it must hold.
      command: the command line that gets the file, for the messages.

    Returns:
      The array, uint8 of `expected.shape`, and the SHA-256 of the file.

    Raises:
      CarouselError: the file is missing, truncated, corrupt, of another shape, or its MD5 is not the expected one.
    """
    raw = files.read_file(path, command)
    try:
        content = _gunzip(raw, _length(expected)) if raw.startswith(GZIP_MAGIC) else raw
        array = _parse(content, expected)
        if (found := files.md5(content)) != expected.md5:
            raise ValueError(f"checksum mismatch (MD5 {found}, expected {expected.md5})")
    except ValueError as error:
        raise files.damaged(path, str(error), command) from error
    return array, files.sha256(raw)


def _length(expected: IdxFile) -> int:
    return 4 + 4 * len(expected.shape) + math.prod(expected.shape)


def _gunzip(raw: bytes, length: int) -> bytes:
    try:
        # One byte more than allowed: enough to see that there is too much, whatever the file would expand to.
        return gzip.GzipFile(fileobj=io.BytesIO(raw)).read(length + 1)
    except EOFError:
        raise ValueError(f"truncated: the compressed data ends early ({len(raw):,} bytes)") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"corrupt gzip data ({error})") from None


def _parse(content: bytes, expected: IdxFile) -> np.ndarray:
    rank = len(expected.shape)
    offset = 4 + 4 * rank
    if len(content) < offset:
        raise ValueError(f"truncated: {len(content)} bytes, the header alone has {offset}")
    if content[:2] != b"\0\0":
        raise ValueError(f"wrong magic number 0x{content[:4].hex()}: not an IDX file")
    if content[2] != UNSIGNED_BYTE:
        raise ValueError(f"data type code 0x{content[2]:02x}, expected 0x08 (unsigned byte)")
    if content[3] != rank:
        raise ValueError(f"{content[3]} dimensions, expected {rank}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=rank, offset=4))
    if shape != expected.shape:
        raise ValueError(f"dimensions {list(shape)}, expected {list(expected.shape)}")
    if len(content) < _length(expected):
        raise ValueError(f"truncated: {len(content):,} bytes, expected {_length(expected):,}")
    if len(content) > _length(expected):
        raise ValueError(f"data after the end: the content is longer than {_length(expected):,} bytes")
    return np.frombuffer(content, np.uint8, offset=offset).reshape(shape)


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(images[..., None], labels.astype(np.int32))
