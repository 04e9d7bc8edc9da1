"""Polyphonic music as piano rolls: JSB Chorales, Nottingham, MuseData and Piano-midi.de, from `.mat` files.

Each file holds three cell arrays of sequences `[frames, 88]` of 0 and 1, with the split of Boulanger-Lewandowski et al.
2012: the form in which Bai et al. 2018 published them. (Chung et al. 2014 used 93 to 108 notes; their numbers compare
with these only approximately.)
"""

import dataclasses
import io
from collections.abc import Mapping

import numpy as np
import scipy.io

from research.data import files
from research.errors import CarouselError

NOTES = 88
# Name -> file.
FILES = {
    "jsb": "JSB_Chorales.mat",
    "nottingham": "Nottingham.mat",
    "muse": "MuseData.mat",
    "piano": "Piano_midi.mat",
}
_FOLDER = "polyphonic-music"
_PARTS = {"train": "traindata", "validation": "validdata", "test": "testdata"}


@dataclasses.dataclass(frozen=True)
class Music:
    """One set: sequences `[frames, 88]` uint8 of each part; lengths differ. Checksums: file name -> SHA-256."""

    train: list[np.ndarray]
    validation: list[np.ndarray]
    test: list[np.ndarray]
    checksums: Mapping[str, str]


def load(name: str, data_dir: str | None = None) -> Music:
    """Reads a set.

    Args:
      name: a key of `FILES`.
      data_dir: the folder of the file, or the one that holds `polyphonic-music/`; `data` when None.

    Raises:
      CarouselError: the file is missing, damaged, or does not hold piano rolls of 88 notes.
    """
    folder = files.data_folder(data_dir)
    inner = folder / _FOLDER
    path = (inner if (inner / FILES[name]).is_file() else folder) / FILES[name]
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise CarouselError(f"{path} {reason}: put the file of Bai et al. 2018 there, or give --data_dir") from error
    try:
        cells = scipy.io.loadmat(io.BytesIO(content))
        parts = [list(cells[part].reshape(-1)) for part in _PARTS.values()]
    except Exception as error:  # scipy has no one error for a damaged file
        raise CarouselError(f"{path} is not a readable .mat of piano rolls ({error}): get it again") from error
    for part, sequences in zip(_PARTS, parts, strict=True):
        for number, sequence in enumerate(sequences, start=1):
            _check(sequence, f"{path}, {part} sequence {number}")
    return Music(
        *([sequence.astype(np.uint8) for sequence in part] for part in parts), {path.name: files.sha256(content)}
    )


def _check(sequence: np.ndarray, where: str) -> None:
    if sequence.ndim != 2 or sequence.shape[1] != NOTES:
        raise CarouselError(f"{where} has shape {list(sequence.shape)}: expected [frames, {NOTES}]; get the file again")
    if len(sequence) < 2:
        raise CarouselError(f"{where} has {len(sequence)} frames: one predicts the next, so it takes 2; get it again")
    if not np.isin(sequence, (0, 1)).all():
        raise CarouselError(f"{where} has other values than 0 and 1: expected a piano roll; get the file again")


def padded(sequences: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of unequal lengths as one array `[sequences, longest, 88]` uint8, and their lengths `[sequences]`."""
    lengths = np.asarray([len(sequence) for sequence in sequences], np.int32)
    rolls = np.zeros((len(sequences), lengths.max(), NOTES), np.uint8)
    for roll, sequence in zip(rolls, sequences, strict=True):
        roll[: len(sequence)] = sequence
    return rolls, lengths
