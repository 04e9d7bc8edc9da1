"""The 1,797 optical digits, 8x8 grey, that come with the package: a real data set without a download.

They are the test part (`optdigits.tes`, 13 writers) of "Optical Recognition of Handwritten Digits" by E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, licence CC BY 4.0. Each image is a
32x32 bitmap counted over 4x4 blocks, so a pixel is 0 to 16.

`optdigits.csv.gz` holds 1,797 lines of 64 pixels, row by row, and the label. It was made from scikit-learn's
`load_digits` by gzip level 9 with mtime 0 and is the UCI file line by line (compared; that one ends with an empty line
more). 53,392 bytes, SHA-256
e31b7ccbf8cc2b158de948b1bb7a67bf39a856fb064b3aa8ef489f12a2dc4b63, verified on every load.

Pixels are scaled to uint8 by `255 v // 16`: 0 -> 0, 8 -> 127, 16 -> 255, increasing, so nothing is lost.

Splits: 1,280 train (ten batches of 128, so that an epoch leaves no remainder), 217 validation, 300 test, by the fixed
permutation of `dataset.split_off`. UCI's file comes ordered by writer and does not say who wrote what, so the split
mixes writers: every writer of the test set is also in the training set. An error measured here is that on known
writers and must not be compared with results on UCI's own division (30 writers to train, 13 others to test).
"""

import gzip
import importlib.resources

import numpy as np

from research.data import files
from research.data.dataset import ImageDataset, Split, split_off
from research.errors import CarouselError

FILE = "optdigits.csv.gz"
SHA256 = "e31b7ccbf8cc2b158de948b1bb7a67bf39a856fb064b3aa8ef489f12a2dc4b63"
VALIDATION_EXAMPLES = 217
TEST_EXAMPLES = 300


def load(data_dir: str | None = None) -> ImageDataset:
    """Reads the embedded digits: 1,280 train, 217 validation and 300 test images of 8x8x1.

    Args:
      data_dir: ignored; here so that all loaders are called alike.

    Raises:
      CarouselError: the package file is missing or altered.
    """
    del data_dir
    examples = parse(_read_package_file())
    rest, test = split_off(examples, TEST_EXAMPLES)
    train, validation = split_off(rest, VALIDATION_EXAMPLES)
    return ImageDataset("digits", train, validation, test, tuple("0123456789"), {FILE: SHA256})


def parse(content: bytes) -> Split:
    """The examples of the package file in their original order.

    Args:
      content: the bytes of `optdigits.csv.gz`.

    Raises:
      CarouselError: the SHA-256 of `content` is not the one in this file.
    """
    if (found := files.sha256(content)) != SHA256:
        raise CarouselError(
            f"{FILE} in research/data is altered (SHA-256 {found[:12]}..., expected {SHA256[:12]}...): reinstall the "
            f"package, or `git checkout -- research/data/{FILE}`"
        )
    rows = np.loadtxt(gzip.decompress(content).decode("ascii").splitlines(), delimiter=",", dtype=np.int32)
    images = (rows[:, :64] * 255 // 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    return Split(images, np.ascontiguousarray(rows[:, 64]))


def _read_package_file() -> bytes:
    try:
        return importlib.resources.files("research.data").joinpath(FILE).read_bytes()
    except OSError as error:
        raise CarouselError(f"{FILE} is missing in research/data: reinstall the package ({error})") from error
