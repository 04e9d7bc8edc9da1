"""Animated GIFs: every picture as it was given, for as long as was asked, with what made it."""

import json

import numpy as np
import pytest
from PIL import Image

from research.analysis import gif
from research.errors import CarouselError

COLOURS = ((0, 114, 178), (213, 94, 0), (213, 94, 1))


def pictures(count=3):
    """Greys that change from picture to picture, and three colours of which two are nearly the same."""
    found = []
    for number in range(count):
        pixels = np.repeat((np.arange(12, dtype=np.uint8) * 20 + number)[None, :, None], 6, axis=0).repeat(3, axis=2)
        pixels[0, :3] = COLOURS
        found.append(Image.fromarray(pixels))
    return found


def read(path):
    """Every picture's pixels and duration, and what the file says of itself."""
    with Image.open(path) as image:
        found = []
        for number in range(image.n_frames):
            image.seek(number)
            found.append((np.asarray(image.convert("RGB")).astype(int), image.info["duration"]))
        image.seek(0)
        return found, dict(image.info)


def test_pictures_come_back(tmp_path):
    given = pictures()
    path = gif.write(tmp_path / "deep" / "a.png", given, {"b": "1", "a": "2"}, milliseconds=120, colours=COLOURS)
    assert path == tmp_path / "deep" / "a.gif"
    found, info = read(path)
    assert [duration for _, duration in found] == [120] * 3 and info["loop"] == 0
    for (pixels, _), picture in zip(found, given, strict=True):
        expected = np.asarray(picture).astype(int)
        np.testing.assert_array_equal(pixels[0, :3], COLOURS)
        assert np.abs(pixels - expected).max() <= 1  # 253 greys for 256
    assert len({pixels[3, 5, 0] for pixels, _ in found}) == 3  # neighbouring greys stay apart


def test_the_comment_is_the_provenance_however_long(tmp_path):
    made_from = {"runs": "x" * 1000, "commands": "launch/run nowcast", "place": "Zürich"}
    _, info = read(gif.write(tmp_path / "a", pictures(), made_from, milliseconds=100))
    assert json.loads(info["comment"]) == made_from
    assert info["comment"] == json.dumps(made_from, sort_keys=True).encode()


def test_the_same_pictures_give_the_same_bytes(tmp_path):
    written = [gif.write(tmp_path / name, pictures(), {}, milliseconds=100, colours=COLOURS) for name in "ab"]
    assert written[0].read_bytes() == written[1].read_bytes()
    assert not [path for path in tmp_path.iterdir() if path not in written]  # nothing temporary is left


@pytest.mark.parametrize("milliseconds", [0, -10, 125])
def test_a_duration_that_a_gif_cannot_say(tmp_path, milliseconds):
    with pytest.raises(ValueError, match=f"{milliseconds} ms"):
        gif.write(tmp_path / "a", pictures(), {}, milliseconds=milliseconds)


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "a.gif").mkdir()
    with pytest.raises(CarouselError, match="cannot write"):
        gif.write(tmp_path / "a", pictures(), {}, milliseconds=100)
