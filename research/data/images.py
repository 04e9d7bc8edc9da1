"""The image data sets by name."""

from collections.abc import Callable

from research.data import cifar10, digits, mnist
from research.data.dataset import ImageDataset
from research.errors import UsageError

LOADERS: dict[str, Callable[[str | None], ImageDataset]] = {
    "digits": digits.load,
    "mnist": mnist.load,
    "cifar10": cifar10.load,
}

# Training images of each, so that a grid of runs can be listed without reading a file.
TRAIN_EXAMPLES = {"digits": 1_280, "mnist": 55_000, "cifar10": 45_000}


def load(name: str, data_dir: str | None = None) -> ImageDataset:
    """Reads an image data set from its original files.

    Args:
      name: `digits` (embedded, no files needed), `mnist` or `cifar10`.
      data_dir: where the files lie; `data` in the current directory when None. `python -m research.data.download NAME
        --data_dir=DIR` puts them there.

    Raises:
      UsageError: an unknown name.
      CarouselError: a file is missing or damaged; the message names it and the command that gets it.
    """
    if name not in LOADERS:
        raise UsageError(f"unknown data set {name!r}: one of {', '.join(LOADERS)}")
    return LOADERS[name](data_dir)
