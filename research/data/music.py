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
from research.errors import CarouselError, UsageError

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


def packed(sequences: list[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Sequences of unequal lengths behind each other in rows: each whole in one row, padding at the rows' ends alone.

    First-fit decreasing: the longest first, each into the first row that has room for it.

    Args:
      sequences: `[frames, 88]` each.
      length: frames of a row.

    Returns:
      `rolls` uint8 `[rows, length, 88]`; `starts` bool `[rows, length]`, True at the first frame of each sequence;
      `valid` bool `[rows, length]`, True at frames of a sequence.

    Raises:
      UsageError: a sequence is longer than a row.
    """
    longest = max(map(len, sequences))
    if longest > length:
        raise UsageError(
            f"a sequence of {longest} frames does not fit a row of {length}: give rows of {longest} or more"
        )
    used, places = [], []
    for sequence in sorted(sequences, key=len, reverse=True):
        row = next((n for n, frames in enumerate(used) if frames + len(sequence) <= length), len(used))
        if row == len(used):
            used.append(0)
        places.append((row, used[row], sequence))
        used[row] += len(sequence)
    rolls = np.zeros((len(used), length, NOTES), np.uint8)
    starts = np.zeros((len(used), length), bool)
    for row, first, sequence in places:
        rolls[row, first : first + len(sequence)] = sequence
        starts[row, first] = True
    return {"rolls": rolls, "starts": starts, "valid": np.arange(length) < np.asarray(used)[:, None]}
