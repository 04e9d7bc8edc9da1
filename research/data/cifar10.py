"""CIFAR-10 in its binary version, or in its Python version without trusting the pickles.

50,000 training and 10,000 test images, 32x32 colour, 10 classes. A. Krizhevsky, "Learning Multiple Layers of Features
from Tiny Images", 2009, https://www.cs.toronto.edu/~kriz/cifar.html; no licence is stated, the author asks for the
citation. Binary version: six files of 10,000 records, each a label byte and 3,072 pixel bytes in R, G, B planes, row by
row. Python version: six pickles of a dict with `data` uint8 `[10000, 3072]` in the same planes and a list `labels`.

Files that differ from the official ones but have their form are used with a warning, since repacks are in circulation
whose images are almost all exact; a number measured on one should say so. Splits: 45,000 train and 5,000 validation
(the sizes of He et al. 2016, section 4.2) out of the official training set, 10,000 test.
"""

import hashlib
import io
import logging
import pickle
from typing import Any

import numpy as np

from research.data import files
from research.data.dataset import ImageDataset, Split, split_off

NAME = "cifar10"
VALIDATION_EXAMPLES = 5_000
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORDS = 10_000
PIXELS = 3 * 32 * 32
BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
BINARY_FOLDER = "cifar-10-batches-bin"
PYTHON_FOLDER = "cifar-10-batches-py"

# SHA-1 of the unpacked binary files as MXNet's gluon.data.vision.CIFAR10 lists them: the author publishes the MD5 of
# the archive alone.
BINARY_SHA1 = {
    "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
}
# MD5 of the unpacked Python files as torchvision.datasets.CIFAR10 lists them.
PYTHON_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}

_log = logging.getLogger(__name__)


def load(data_dir: str | None = None) -> ImageDataset:
    """Reads CIFAR-10: 45,000 train, 5,000 validation and 10,000 test images of 32x32x3.

    Args:
      data_dir: the folder that holds `cifar-10-batches-bin/` or `cifar-10-batches-py/`, or either folder itself; `data`
        in the current directory when None. Of equally complete versions the binary one is read.

    Raises:
      CarouselError: a file is missing or has not the form of the format; the message says what to do.
    """
    parent = files.data_folder(data_dir)
    command = files.download_command(NAME, parent)
    binary, python = (BINARY_SHA1, "sha1", parse_binary), (PYTHON_MD5, "md5", parse_python)
    candidates = [
        (parent / BINARY_FOLDER, *binary),
        (parent, *binary),
        (parent / PYTHON_FOLDER, *python),
        (parent, *python),
    ]
    chosen = files.fullest([(folder, official) for folder, official, _, _ in candidates])
    folder, official, algorithm, parse = candidates[chosen]
    splits, checksums, different = [], {}, []
    for name, digest in official.items():
        content = files.read_file(folder / name, command)
        try:
            splits.append(parse(content))
        except ValueError as error:
            raise files.damaged(folder / name, str(error), command) from error
        checksums[name] = files.sha256(content)
        if hashlib.new(algorithm, content, usedforsecurity=False).hexdigest() != digest:
            different.append(name)
    if different:
        _log.warning(
            "%s: %s differ from the official CIFAR-10 files; say so beside results (`%s` gets the originals)",
            folder,
            ", ".join(different),
            command,
        )
    official_train = Split(
        np.concatenate([split.images for split in splits[:-1]]), np.concatenate([split.labels for split in splits[:-1]])
    )
    train, validation = split_off(official_train, VALIDATION_EXAMPLES)
    return ImageDataset(NAME, train, validation, splits[-1], CLASS_NAMES, checksums)


def parse_binary(content: bytes) -> Split:
    """The 10,000 examples of one file of the binary version.

    Raises:
      ValueError: a length other than 30,730,000 bytes or a label above 9.
    """
    length = RECORDS * (1 + PIXELS)
    if len(content) != length:
        state = "truncated: " if len(content) < length else ""
        raise ValueError(f"{state}{len(content):,} bytes, expected {length:,}")
    records = np.frombuffer(content, np.uint8).reshape(RECORDS, 1 + PIXELS)
    return _examples(records[:, 1:], records[:, 0])


def parse_python(content: bytes) -> Split:
    """The 10,000 examples of one pickle of the Python version, written by Python 2 or 3.

    Raises:
      ValueError: not a pickle, a pickle of something else, or one that asks for anything but plain arrays.
    """
    try:
        # bytes: the originals are Python 2 pickles, whose str is bytes of no encoding (the pixels among them).
        batch = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    except _ForbiddenGlobal as error:
        raise ValueError(str(error)) from None
    # A damaged pickle raises nearly anything (EOFError, KeyError, TypeError, MemoryError...), as the standard library
    # warns; all of it means the same here.
    except Exception as error:
        raise ValueError(f"not a readable pickle ({type(error).__name__}: {error})") from error
    if not isinstance(batch, dict):
        raise ValueError(f"holds a {type(batch).__name__}, expected a dict")
    pixels, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (RECORDS, PIXELS):
        raise ValueError(f"'data' is not a uint8 array of {RECORDS:,} x {PIXELS:,}")
    if not isinstance(labels, list) or len(labels) != RECORDS or not all(type(label) is int for label in labels):
        raise ValueError(f"'labels' is not a list of {RECORDS:,} integers")
    return _examples(pixels, labels)


def _examples(pixels: np.ndarray, labels: Any) -> Split:
    """`pixels` uint8 `[n, 3072]` in colour planes -> images `[n, 32, 32, 3]`."""
    labels = np.asarray(labels)
    if labels.min() < 0 or labels.max() >= len(CLASS_NAMES):
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, expected 0 to {len(CLASS_NAMES) - 1}")
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Split(images, labels.astype(np.int32))


class _ForbiddenGlobal(Exception):
    """A pickle asks for something that no array needs."""


def _latin1(text: str, encoding: str) -> bytes:
    """What `_codecs.encode` does in pickles of bytes by Python 3, protocol 2, and nothing else that it can do."""
    if encoding not in ("latin1", b"latin1"):
        raise ValueError(f"unexpected encoding {encoding!r}")
    return text.encode("latin1")


# NumPy keeps the function that rebuilds arrays in a private module, whose name changed with NumPy 2; an array says
# which it is.
_rebuild = np.empty(0, np.uint8).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _rebuild,
    ("numpy._core.multiarray", "_reconstruct"): _rebuild,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


class _PlainUnpickler(pickle.Unpickler):
    """Builds numbers, strings, containers and arrays; a pickle can otherwise run any program."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _ForbiddenGlobal(f"the pickle asks for {module}.{name}, which no array needs: refused") from None
