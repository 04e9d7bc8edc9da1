"""Animated GIFs: the same bytes each time they are made from the same pictures, with their provenance inside."""

import io
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from research.files import write_output


def write(
    path: Path,
    pictures: Sequence[Image.Image],
    made_from: Mapping[str, str],
    *,
    milliseconds: int,
    colours: Collection[tuple[int, int, int]] = (),
) -> Path:
    """Writes `path.gif` in one move; it loops for ever.

    All pictures have one palette, of the given colours and else of greys, and every pixel becomes the nearest of them;
    a palette of its own for each picture would let still parts flicker.

    Args:
      path: of the file; its suffix becomes .gif.
      pictures: of mode RGB and one size.
      made_from: what made it, kept as JSON in the file's comment: `research.analysis.figures.provenance`.
      milliseconds: of a picture.
      colours: to be shown as they are, at most 255.

    Raises:
      ValueError: a duration that is not in whole hundredths of a second, which is all that a GIF can say.
      CarouselError: the file cannot be written.
    """
    if milliseconds < 10 or milliseconds % 10:
        raise ValueError(f"a GIF counts in 10 ms: {milliseconds} ms is no duration for it")
    greys = np.linspace(0, 255, 256 - len(set(colours))).round()
    palette = np.array(sorted(set(colours)) + [(grey, grey, grey) for grey in greys]).astype(np.uint8)
    first, *rest = (_indexed(np.asarray(picture), palette) for picture in pictures)
    content = io.BytesIO()
    comment = json.dumps(dict(made_from), sort_keys=True).encode()
    first.save(content, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0, comment=comment)
    path = path.with_suffix(".gif")
    write_output(path, content.getvalue())
    return path


def _indexed(picture: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Each pixel as the number of its nearest colour; of Pillow's own search exact colours come out as neighbours."""
    packed = picture.astype(np.int64) @ (1 << 16, 1 << 8, 1)
    present, where = np.unique(packed, return_inverse=True)
    present = np.stack([present >> 16, present >> 8 & 255, present & 255], axis=1)
    nearest = np.abs(present[:, None] - palette.astype(np.int64)).sum(axis=2).argmin(axis=1).astype(np.uint8)
    indexed = Image.fromarray(nearest[where].reshape(packed.shape))
    indexed.putpalette(palette.tobytes())
    return indexed
