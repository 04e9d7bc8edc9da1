"""What nowcasting is done on: moving digits that are made as they are needed, and radar frames from a folder."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from research.errors import CarouselError, UsageError


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Sequences with their splits.

    Attributes:
      splits: of the trainer.
      frames_of: `batch -> [batch, time, height, width, 1]`, grey in [0, 1].
      minutes: between two frames, None where time has no unit.
      shown: the test sequence that figures show, its place in `splits`.
    """

    splits: Any
    frames_of: Callable[[dict[str, Any]], Any]
    minutes: int | None
    shown: int


def load(cell: Any) -> Loaded:
    """The data of a cell; the last one stays in memory."""
    if cell.dataset == "radar":
        return _radar(
            radar_folder(cell.data_dir),
            cell.frame,
            cell.observed + cell.horizon,
            cell.scale,
            cell.wet,
            cell.validation_days,
            cell.test_days,
        )
    sizes = (cell.train_examples, cell.validation_examples, cell.test_examples)
    return _moving(cell.dataset, cell.data_dir, cell.pool, cell.frame, cell.digits, cell.observed + cell.horizon, sizes)


@functools.lru_cache(maxsize=1)
def _moving(
    dataset: str, data_dir: str | None, pool: int, frame: int, digits: int, time: int, sizes: tuple[int, ...]
) -> Loaded:
    import numpy as np

    from research.data import images, moving
    from research.data.dataset import SPLIT_SEED
    from research.training import loop

    data = images.load({"moving_digits": "digits", "moving_mnist": "mnist"}[dataset], data_dir)
    chosen = moving.pool(data.train.images[..., 0], pool)
    made = moving.Moving(frame=frame, digits=digits, time=time)

    def frames_of(batch):
        return moving.sequences(chosen, batch["index"], seed=SPLIT_SEED, moving=made)

    index = np.arange(sum(sizes), dtype=np.int32)
    splits = loop.Splits({"index": index}, *sizes, checksums=data.checksums)
    return Loaded(splits, frames_of, minutes=None, shown=splits.range("test")[0])


@functools.lru_cache(maxsize=1)
def _radar(
    folder: Path,
    size: int,
    time: int,
    scale: int,
    wet: float,
    validation: tuple[str, ...] | None,
    test: tuple[str, ...] | None,
) -> Loaded:
    import numpy as np

    from research.data import radar
    from research.training import loop

    events = radar.load(folder, scale=scale)
    parts = []
    # Windows to learn from overlap as much as they can; those that are counted, less.
    for days, stride in zip(radar.split_days(events, validation=validation, test=test), (1, 5, 5), strict=True):
        for event in days:
            if len(event.rain) < time:
                raise CarouselError(
                    f"{folder}: an event of {event.name} has {len(event.rain)} frames, fewer than --observed and "
                    f"--horizon together, {time}: give less, or take its frames away"
                )
        tiles = [tile for event in days for tile in radar.tiles(event.rain, size=size)]
        tiles = [tile for tile in tiles if (tile >= radar.THRESHOLD).mean() >= wet]
        if not tiles:
            names = ", ".join(event.name for event in days)
            raise CarouselError(
                f"{folder}: no square of {size} x {size} pixels within the radars' reach has rain on {wet:.0%} of its "
                f"pixels on {names}: give a smaller --frame or --wet"
            )
        windows = [radar.windows(_bytes(tile), length=time, stride=stride) for tile in tiles]
        parts.append(np.concatenate(windows)[..., None])
    minutes = sorted({event.minutes for event in events})
    if len(minutes) > 1:
        steps = ", ".join(map(str, minutes))
        raise CarouselError(f"{folder}: events with {steps} minutes between frames: put each kind into its own folder")
    checksums = {f"{event.name}/{name}": digest for event in events for name, digest in event.checksums.items()}
    splits = loop.Splits({"frames": np.concatenate(parts)}, *map(len, parts), checksums=checksums)
    wettest = parts[2].astype(np.float32).mean(axis=(1, 2, 3, 4)).argmax()
    return Loaded(
        splits,
        from_bytes,
        minutes=minutes[0],
        shown=splits.range("test")[0] + int(wettest),
    )


def published(cell: Any) -> Any:
    """The sequences of `--published`, uint8 `[sequences, time, height, width, 1]`, cut to the time of the cell's.

    Raises:
      CarouselError: the file is missing or damaged, or its frames are not those that the cell asks for.
    """
    from research.data import moving

    sequences, time = moving.load_published(cell.published), cell.observed + cell.horizon
    _, found, height, width, _ = sequences.shape
    if found < time or (height, width) != (cell.frame, cell.frame):
        raise UsageError(
            f"{cell.published} holds {found} frames of {height}x{width}: give --frame={height} and not more than that "
            "many frames as --observed and --horizon together"
        )
    return sequences[:, :time]


def from_bytes(batch: dict[str, Any]) -> Any:
    """Frames that are stored as bytes, grey in [0, 1]."""
    import jax.numpy as jnp
    import numpy as np

    return batch["frames"].astype(jnp.float32) * np.float32(1 / 255)


def _bytes(rain: Any) -> Any:
    """Grey in steps of 1/255, 0.2 dBZ."""
    import numpy as np

    from research.data import radar

    return np.round(255 * radar.to_grey(rain)).astype(np.uint8)


def fingerprint(data_dir: str | None) -> str | None:
    """Of names and sizes of the radar's frames; None where there are none, which a report does not need."""
    from research.data import radar_files

    try:
        paths = sorted(path for paths in radar_files.frame_folders(radar_folder(data_dir)) for path in paths)
    except CarouselError:
        return None
    names = "\n".join(f"{path.parent.name}/{path.name} {path.stat().st_size}" for path in paths)
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def radar_folder(data_dir: str | None) -> Path:
    """The folder of radar frames: `radar` in the data folder where there is one, else the data folder itself."""
    from research.data import files

    folder = files.data_folder(data_dir)
    return folder / "radar" if (folder / "radar").is_dir() else folder
