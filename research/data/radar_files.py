"""Folders of radar frames: finding the files, telling uninterrupted sequences apart, and decoding one 8-bit image.

What the pixels mean is told in `research/data/radar.py`; here they are numbers from 0 to 255. A file of another name
than `*.gif`, `*.png` or `*.pgm` (each also with `.gz` behind) is not a frame and is ignored, as are hidden files and
hidden folders.
"""

import datetime
import gzip
import io
import itertools
import os
import pathlib
import re
import statistics
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image  # matplotlib brings it

from research.data import files
from research.errors import CarouselError

KINDS = ("gif", "png", "pgm")
# What a file ends with. Pillow does without, and so takes one that lost its last bytes.
_ENDS = {"gif": b";", "png": b"\0\0\0\0IEND\xaeB`\x82"}
_DAY = datetime.timedelta(days=1)
# The header of a binary PGM: magic number, width, height and highest value, between them white space and comments; one
# white space behind.
_SPACE = rb"(?:\s|#[^\n]*\n)+"
_PGM_HEADER = re.compile(rb"P5" + _SPACE + rb"(\d+)" + _SPACE + rb"(\d+)" + _SPACE + rb"(\d+)\s")


def frame_folders(folder: pathlib.Path) -> Iterator[list[pathlib.Path]]:
    """The frames of each folder at or below `folder` that holds any, in the folders' order by name.

    Links to folders are not followed: they can lead in circles.

    Raises:
      CarouselError: there is no such folder, it cannot be listed, or no frame is in it or below.
    """

    def unreadable(error: OSError) -> None:
        raise CarouselError(f"cannot list {error.filename}: {error.strerror or error}") from error

    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else "does not exist"
        raise CarouselError(f"{folder} {reason}: give the folder of the radar frames")
    found = False
    for parent, children, names in os.walk(folder, onerror=unreadable):
        children[:] = sorted(name for name in children if not name.startswith("."))
        frames = [pathlib.Path(parent, name) for name in sorted(names) if not name.startswith(".") and _kind(name)]
        if frames:
            found = True
            yield frames
    if not found:
        raise CarouselError(f"{folder} holds no radar frames: expected .gif, .png or .pgm files, or these with .gz")


def _kind(name: str) -> str | None:
    ending = name.lower().removesuffix(".gz").rpartition(".")[2]
    return ending if ending in KINDS else None


def sequences(frames: Sequence[tuple[datetime.datetime, pathlib.Path]]) -> tuple[int, list[slice]]:
    """Cuts the frames of one folder into uninterrupted sequences.

    The step is the one that occurs most. Within a calendar day every step must be it. Where a longer step leads over
    midnight, a new sequence begins. An uninterrupted sequence runs on over midnight, so that an evening's rain which
    ends at 0000 stays whole, but while more than 24 hours are left of it, it is cut at its next midnight: a folder
    with months of frames gives a sequence a day.

    Args:
      frames: time (of any one time zone) and file of each, sorted.

    Returns:
      The minutes of a step, and the slice of `frames` of each sequence.

    Raises:
      CarouselError: two frames of one time, a gap within a day, a sequence of fewer than 2 frames.
    """
    times = [time for time, _ in frames]
    steps = [later - earlier for earlier, later in itertools.pairwise(times)]
    for (_, earlier), (time, later), step in zip(frames, frames[1:], steps, strict=False):
        if not step:
            raise CarouselError(f"{later} has the time of {earlier.name}, {time:%Y-%m-%d %H%M}: remove one of the two")
    # Of equally frequent steps, the shortest: mode() takes the first.
    usual = statistics.mode(sorted(steps)) if steps else _DAY
    starts = [0]
    for number, step in enumerate(steps, start=1):
        if step > usual and times[number].date() > times[number - 1].date():
            starts.append(number)
        elif step != usual:
            expected = times[number - 1] + usual
            raise CarouselError(
                f"{frames[number][1]} {'follows a gap' if step > usual else 'is out of step'}: expected the frame of "
                f"{expected:%Y-%m-%d %H%M}, found {times[number]:%Y-%m-%d %H%M}; complete the sequence, or move its "
                "parts into folders of their own"
            )
    cuts = []
    for start, stop in itertools.pairwise([*starts, len(frames)]):
        while times[stop - 1] - times[start] > _DAY:
            midnight = next(n for n in range(start, stop) if times[n].date() > times[start].date())
            cuts.append(slice(start, midnight))
            start = midnight
        cuts.append(slice(start, stop))
    for cut in cuts:
        if cut.stop - cut.start < 2:
            raise CarouselError(
                f"{frames[cut.start][1]} is alone: a sequence takes 2 frames; add the next or remove it"
            )
    return usual // datetime.timedelta(minutes=1), cuts


def read_frame(path: pathlib.Path) -> tuple[np.ndarray, str]:
    """The pixels of a frame, uint8 `[height, width]`, and the SHA-256 of the file as it lies there.

    Of an image with a palette the pixels are the indices, whatever the colours.

    Raises:
      CarouselError: the file cannot be read, is damaged or truncated, or does not hold one byte a pixel.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CarouselError(f"cannot read {path}: {error.strerror or error}") from error
    kind = _kind(path.name)
    try:
        content = gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw
        pixels = _pgm(content) if kind == "pgm" else _image(content, kind)
    except EOFError:
        raise CarouselError(f"{path} is truncated: the compressed data ends early; get it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise CarouselError(f"{path} is not a readable .gz ({error}): get it again") from error
    except ValueError as error:
        raise CarouselError(f"{path} is not a readable {kind.upper()} of a radar: {error}") from error
    return pixels, files.sha256(raw)


def _pgm(content: bytes) -> np.ndarray:
    # Not through Pillow, which stretches the values of a file whose highest one is not 255.
    if content[:2] in (b"P3", b"P6"):
        raise ValueError("it is in colour; expected 8-bit grey")
    if not (header := _PGM_HEADER.match(content)):
        raise ValueError("no header of a binary PGM (P5); get it again")
    width, height, highest = (int(number) for number in header.groups())
    if highest != 255:
        raise ValueError(f"the highest value is {highest}; expected 255, 8-bit grey")
    if not 0 < width * height == len(content) - header.end():
        raise ValueError(
            f"{len(content) - header.end():,} bytes of pixels, expected {width:,} x {height:,}: truncated or damaged; "
            "get it again"
        )
    return np.frombuffer(content, np.uint8, offset=header.end()).reshape(height, width)


def _image(content: bytes, kind: str) -> np.ndarray:
    if not content.endswith(_ENDS[kind]):
        raise ValueError("it does not end as one, so it is truncated or damaged; get it again")
    try:
        if kind == "png":
            with Image.open(io.BytesIO(content), formats=[kind]) as image:
                image.verify()  # the checksums, which load() passes over; the image is used up by it
        with Image.open(io.BytesIO(content), formats=[kind]) as image:
            image.load()
            mode, pixels = image.mode, np.array(image)
    except Image.UnidentifiedImageError:
        raise ValueError("it does not begin as one; get it again") from None
    except Exception as error:  # Pillow has no one error for a damaged file
        raise ValueError(f"{error}; get it again") from error
    if mode not in ("L", "P"):
        raise ValueError(f"it is an image of mode {mode}; expected 8-bit grey (L) or palette indices (P), no colour")
    return pixels
