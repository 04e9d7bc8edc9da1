"""Radar precipitation sequences from folders of frames, for precipitation nowcasting.

X. Shi, Z. Chen, H. Wang, D.-Y. Yeung, W.-k. Wong, W.-c. Woo, "Convolutional LSTM Network: A Machine Learning Approach
for Precipitation Nowcasting", NIPS 2015. A frame is one 8-bit image of a radar network (GIF, PNG or PGM, each also
with `.gz` behind); its name tells the time, in UTC as the services write it, and through `SOURCES` how its pixels
become rain. Reflectivity Z and rain rate R are tied by a Z-R relation Z = a R^b, whose a and b each service chooses:

  dBZ = 10 log10 Z = 10 log10 a + 10 b log10 R,   R in mm/h.
"""

import dataclasses
import datetime
import math
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from research.data import radar_files
from research.errors import CarouselError, UsageError

# Rain of less than this many mm/h is no rain to the metrics of Shi et al. 2015, section 4.2. The reader keeps it.
THRESHOLD = 0.5
# The Z-R relation between grey and rain, and that of a source which does not tell its own: Shi et al. 2015.
A, B = 118.239, 1.5241
# The dBZ that are grey 0 and grey 1: 0.198 mm/h, safely below THRESHOLD (16.1 dBZ), and 377 mm/h, above the 116 mm/h
# of the strongest rain in MeteoSwiss's frames and the 167 in FMI's. A lower LOW would spend grey on drizzle which no
# metric sees.
LOW, HIGH = 10.0, 60.0


@dataclasses.dataclass(frozen=True, eq=False)
class Event:
    """An uninterrupted sequence of frames.

    Attributes:
      name: the calendar day of its first frame, `20150515`.
      minutes: between frames.
      rain: float32 `[frames, height, width]`, mm/h; 0 where it is below what the format tells, NaN out of reach of the
        radars.
      checksums: file name -> SHA-256.
    """

    name: str
    minutes: int
    rain: np.ndarray
    checksums: Mapping[str, str]


def to_dbz(rain, *, a: float = A, b: float = B):
    """Rain rate -> reflectivity: dBZ = 10 log10 a + 10 b log10 R; -inf of 0 mm/h (no warning), NaN of NaN.

    Args:
      rain: mm/h, NumPy or JAX array of any shape; negative counts as 0.
      a: factor of the Z-R relation.
      b: its exponent.
    """
    xp, rain = _namespace(rain)
    dry = rain <= 0  # False of NaN, which stays
    return xp.where(dry, -math.inf, 10 * math.log10(a) + 10 * b * xp.log10(xp.where(dry, 1, rain)))


def to_rain(dbz, *, a: float = A, b: float = B):
    """Reflectivity -> rain rate in mm/h, the inverse of `to_dbz`: R = 10^((dBZ - 10 log10 a) / (10 b)); 0 of -inf."""
    _, dbz = _namespace(dbz)
    return 10.0 ** ((dbz - 10 * math.log10(a)) / (10 * b))


def to_grey(rain, *, low: float = LOW, high: float = HIGH):
    """Rain rate -> grey in [0, 1]: (dBZ - low) / (high - low), clipped; NaN becomes 0.

    Differs from the paper, which stretches between the smallest and the largest value of its data: fixed ends mean the
    same rain in every data set.

    Args:
      rain: mm/h, NumPy or JAX array of any shape.
      low: dBZ that is grey 0; weaker rain is 0 too.
      high: dBZ that is grey 1; stronger rain is 1 too.
    """
    xp, dbz = _namespace(to_dbz(rain))
    grey = (dbz - low) / (high - low)
    return xp.where(grey > 0, xp.minimum(grey, 1), 0)  # grey > 0 is False of NaN


def to_rain_from_grey(grey, *, low: float = LOW, high: float = HIGH):
    """Grey -> rain rate in mm/h, the inverse of `to_grey` where that does not clip; 0 mm/h of grey 0 and below."""
    xp, grey = _namespace(grey)
    return xp.where(grey > 0, to_rain(low + grey * (high - low)), 0)


def _namespace(array):
    """The array's own module, NumPy or jax.numpy, so that JAX is imported only by those who use it; and the array."""
    if not hasattr(array, "__array_namespace__"):
        array = np.asarray(array)
    return array.__array_namespace__(), array


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A service's frames.

    Attributes:
      pattern: finds in a file name the digits of the time, as group 1.
      time: their form, of `datetime.strptime`.
      table: float32 `[256]`, pixel -> mm/h; NaN out of reach of the radars.
    """

    pattern: re.Pattern[str]
    time: str
    table: np.ndarray


def _reflectivities(gain: float, offset: float, *, a: float, b: float, missing: Collection[int] = ()) -> np.ndarray:
    """The table of dBZ = gain * pixel + offset; pixel 0 is "nothing or less", hence 0 mm/h."""
    table = to_rain(gain * np.arange(256) + offset, a=a, b=b)
    table[0] = 0
    table[list(missing)] = np.nan
    return table.astype(np.float32)


def _accumulations() -> np.ndarray:
    # The formula gives the mm that fell in 5 minutes, hence 60 / 5 for mm/h.
    pixels = np.arange(256)
    table = (10 ** ((pixels - 71.5) / 20) / 316) ** (1 / 1.5) * (60 / 5)
    table[(pixels < 2) | (pixels > 250)] = 0
    table[255] = np.nan
    return table.astype(np.float32)


# The first row whose pattern is found in a name.
SOURCES = {
    # AQC <year> <day of the year> <hour> <minute> <quality> _ <minutes of accumulation>; pysteps' import_mch_gif, whose
    # test reads these files as mm in 5 minutes, the unit that the files' comment tells too (ACCUm=000005).
    "MeteoSwiss AQC": Source(re.compile(r"^AQC(\d{9})\w_00005\."), "%y%j%H%M", _accumulations()),
    # pysteps' import_fmi_pgm.
    "FMI": Source(
        re.compile(r"^(\d{12})_fmi\."), "%Y%m%d%H%M", _reflectivities(1 / 2, -32, a=223, b=1.53, missing=[255])
    ),
    # Shi et al. 2017, "Deep learning for precipitation nowcasting", and its code. Ahead of the last row, which would
    # read year, month and day of two digits as a year of four. Out of reach is 0 here; the masks are files apart.
    "HKO-7": Source(re.compile(r"^RAD(\d{10})00\."), "%y%m%d%H%M", _reflectivities(70 / 255, -10, a=58.53, b=1.56)),
    # Frames of anyone: the time YYYYMMDDHHMM, with or without seconds 00, anywhere in the name; HKO-7's pixels.
    "any": Source(
        re.compile(r"(?<!\d)((?:19|20)\d{10})(?:00)?(?!\d)"), "%Y%m%d%H%M", _reflectivities(70 / 255, -10, a=A, b=B)
    ),
}


def load(folder: str | pathlib.Path, *, scale: int = 1) -> list[Event]:
    """Reads every sequence in a folder and the folders below.

    Each folder that holds frames is one event if they are uninterrupted; where an interruption leads over midnight a
    new event begins, one within a day is an error, and what is longer than 24 hours is cut at midnights
    (`radar_files.sequences`). An event that runs past midnight has the day of its first frame.

    Args:
      folder: where the frames lie; `~` is expanded.
      scale: frames become means over blocks of scale x scale pixels, in mm/h; NaN where any pixel is, so that no mean
        is over a part of the block. Last rows and columns that do not fill a block are dropped.

    Returns:
      The events by day, those of one day in the order of their folders. Events from one folder share memory.

    Raises:
      UsageError: scale is below 1 or above the size of the frames.
      CarouselError: there is no frame, a frame is damaged, of another size than the first of its folder, of no or of
        an impossible time, or the frames of a folder are no sequence.
    """
    if scale < 1:
        raise UsageError(f"scale {scale} is not a size of blocks: give 1 or more")
    events = []
    for paths in radar_files.frame_folders(pathlib.Path(folder).expanduser()):
        found = {path: _source(path) for path in paths}
        frames = sorted((time, path) for path, (_, time) in found.items())
        minutes, cuts = radar_files.sequences(frames)
        first, shape, rain, checksums = frames[0][1], None, None, []
        for number, (_, path) in enumerate(frames):
            pixels, checksum = radar_files.read_frame(path)
            if shape is None:
                shape = pixels.shape
                if scale > min(shape):
                    raise UsageError(f"scale {scale} is above the size of {path}, {_size(shape)}: give less")
                rain = np.empty((len(frames), shape[0] // scale, shape[1] // scale), np.float32)
            if pixels.shape != shape:
                raise CarouselError(
                    f"{path} is {_size(pixels.shape)} but {first.name} is {_size(shape)}: put each size into a folder "
                    "of its own"
                )
            rain[number] = _block_means(found[path][0].table[pixels], scale)
            checksums.append((path.name, checksum))
        for cut in cuts:
            events.append(Event(f"{frames[cut.start][0]:%Y%m%d}", minutes, rain[cut], dict(checksums[cut])))
    return sorted(events, key=lambda event: event.name)


def _source(path: pathlib.Path) -> tuple[Source, datetime.datetime]:
    for source in SOURCES.values():
        if match := source.pattern.search(path.name):
            try:
                return source, datetime.datetime.strptime(match[1], source.time)
            except ValueError:
                raise CarouselError(f"{path}: {match[1]} in its name is no time ({source.time}): rename it") from None
    raise CarouselError(f"{path} has no time in its name: expected YYYYMMDDHHMM, as in 201505151545.png; rename it")


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]} x {shape[1]} pixels (height x width)"


def _block_means(frame: np.ndarray, scale: int) -> np.ndarray:
    if scale == 1:
        return frame
    height, width = (size // scale for size in frame.shape)
    blocks = frame[: height * scale, : width * scale].reshape(height, scale, width, scale)
    return blocks.mean(axis=(1, 3))


def tiles(rain: np.ndarray, *, size: int) -> np.ndarray:
    """Cuts `[frames, height, width]` into squares side by side, without those that hold a NaN in any frame.

    Returns:
      `[tiles, frames, size, size]`, row by row from the upper left; rows and columns that fill no tile are dropped.

    Raises:
      UsageError: a tile is below 1 pixel or larger than a frame.
    """
    frames, height, width = rain.shape
    if not 1 <= size <= min(height, width):
        raise UsageError(f"tiles of {size} pixels do not fit frames of {_size((height, width))}: give less, at least 1")
    rows, columns = height // size, width // size
    blocks = rain[:, : rows * size, : columns * size].reshape(frames, rows, size, columns, size)
    blocks = blocks.transpose(1, 3, 0, 2, 4).reshape(rows * columns, frames, size, size)
    return blocks[~np.isnan(blocks).any(axis=(1, 2, 3))]


def windows(event_frames: np.ndarray, *, length: int, stride: int = 1) -> np.ndarray:
    """All stretches of `length` frames, the first frames of two being `stride` apart.

    Args:
      event_frames: `[frames, height, width]`, of one event, so that no window joins two.
      length: frames of a window.
      stride: in frames.

    Returns:
      `[windows, length, height, width]`, floor((frames - length) / stride) + 1 of them: a read-only view, no copy.

    Raises:
      UsageError: length or stride is below 1, or the event is shorter than a window.
    """
    if not (1 <= length <= len(event_frames) and stride >= 1):
        raise UsageError(
            f"no windows of {length} frames every {stride} in {len(event_frames)} frames: give a length from 1 to "
            f"{len(event_frames)} and a stride of 1 or more"
        )
    views = np.lib.stride_tricks.sliding_window_view(event_frames, length, axis=0)[::stride]
    return np.moveaxis(views, -1, 1)


def split_days(
    events: Sequence[Event], *, validation: Sequence[str] | None = None, test: Sequence[str] | None = None
) -> tuple[list[Event], list[Event], list[Event]]:
    """Splits by whole days, since frames of one day show the same rain: train, validation, test.

    Args:
      events: as `load` returns them; several of one day stay together.
      validation: days, `20150515`; the last one that is not for testing when None.
      test: days; the last one that is not for validation when None.

    Raises:
      UsageError: fewer than 3 days, an unknown day, a day named twice, or no day left to train on.
    """
    days = sorted({event.name for event in events})
    if len(days) < 3:
        raise UsageError(f"{len(days)} days ({', '.join(days)}) cannot be split in 3 parts: give events of 3 or more")
    for number, day in enumerate(named := [*(validation or ()), *(test or ())]):
        if day not in days:
            raise UsageError(f"no event is of day {day!r}: one of {', '.join(days)}")
        if day in named[:number]:
            raise UsageError(f"day {day} is named twice: give each day to validation or test, once")
    free = [day for day in days if day not in named]
    if test is None:
        test = [free.pop()] if free else []
    if validation is None:
        validation = [free.pop()] if free else []
    if not free:
        raise UsageError(f"no day of {', '.join(days)} is left to train on: give fewer days to validation and test")
    parts = (free, validation, test)
    return tuple([event for event in events if event.name in part] for part in parts)
