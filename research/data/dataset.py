"""Images and labels in memory: what every reader of this room returns."""

import dataclasses

import numpy as np

# The seed of every fixed split. It is not the seed of a run: all seeds of a comparison see the same validation set, so
# that their spread is that of the training and not of the split.
SPLIT_SEED = 20_151_210


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set.

    Attributes:
      images: uint8 `[n, height, width, channels]`, 0 (black) to 255.
      labels: int32 `[n]`, class indices from 0.

    Raises:
      ValueError: a wrong type, a wrong rank, lengths that differ or a negative label.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self):
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"images must be uint8 [n, height, width, channels], got {self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.dtype != np.int32 or self.labels.ndim != 1:
            raise ValueError(f"labels must be int32 [n], got {self.labels.dtype} {list(self.labels.shape)}")
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")
        if self.labels.size and self.labels.min() < 0:
            raise ValueError(f"labels must not be negative, got {self.labels.min()}")

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDataset:
    """A labelled image data set in its three parts.

    Attributes:
      name: the name that `images.load` knows it by.
      train: the examples to learn from.
      validation: held out of the official training set, for every choice that is made by looking at results.
      test: the official test set, to be touched once.
      class_names: the name of class `i` at index `i`.
      checksums: file name -> SHA-256 of the file as it was read, to be recorded with the run.

    Raises:
      ValueError: parts whose image shapes differ, or a label without a class name.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    checksums: dict[str, str]

    def __post_init__(self):
        for part in ("train", "validation", "test"):
            split = getattr(self, part)
            if split.images.shape[1:] != self.train.images.shape[1:]:
                raise ValueError(
                    f"{self.name}: {part} images have shape {list(split.images.shape[1:])}, "
                    f"train images {list(self.train.images.shape[1:])}"
                )
            if len(split) and split.labels.max() >= self.num_classes:
                raise ValueError(f"{self.name}: {part} has label {split.labels.max()}, classes: {self.num_classes}")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(height, width, channels)`."""
        return self.train.images.shape[1:]


def split_off(split: Split, count: int) -> tuple[Split, Split]:
    """Takes `count` examples off, chosen by a fixed seeded permutation; both parts keep the original order.

    The permutation depends on `SPLIT_SEED` and `len(split)` alone.

    Args:
      split: the examples to divide.
      count: how many examples to take off, 0 to `len(split)`.

    Returns:
      `(rest, taken)` of `len(split) - count` and `count` examples.

    Raises:
      ValueError: `count` out of range.
    """
    if not 0 <= count <= len(split):
        raise ValueError(f"cannot take {count} examples off {len(split)}")
    # RandomState and not default_rng: NEP 19 freezes the former's streams, so that the split outlives NumPy versions.
    order = np.random.RandomState(SPLIT_SEED).permutation(len(split))
    taken, rest = np.sort(order[:count]), np.sort(order[count:])
    return Split(split.images[rest], split.labels[rest]), Split(split.images[taken], split.labels[taken])
