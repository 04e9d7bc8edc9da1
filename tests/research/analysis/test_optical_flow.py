"""The nowcast by optical flow: what moves is moved on, what stands still stays, what leaves does not come back."""

import subprocess
import sys

import numpy as np
import pytest

from research.analysis import optical_flow
from research.errors import CarouselError


@pytest.fixture
def flow():
    pytest.importorskip("skimage", reason="the flow needs scikit-image (the extra 'radar')")


def blob(y, x, size=64, width=4.0):
    """A Gaussian hill of height 1 at (y, x)."""
    rows, columns = np.indices((size, size))
    return np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * width**2)).astype(np.float32)


def moving(times, velocity=(1.5, -1.0), start=(20.0, 40.0)):
    return np.stack([blob(start[0] + velocity[0] * t, start[1] + velocity[1] * t) for t in times])


def test_a_moving_blob_is_forecast(flow):
    frames = moving(range(20))
    forecast = optical_flow.advect(frames[:10], 10)
    assert forecast.shape == (10, 64, 64) and forecast.dtype == np.float32
    errors = np.abs(forecast - frames[10:]).max(axis=(1, 2))
    assert errors.max() < 0.05  # of a height of 1, where persistence is wrong by 0.27 to 1
    persistence = np.square(frames[9] - frames[10:]).mean(axis=(1, 2))
    assert (np.square(forecast - frames[10:]).mean(axis=(1, 2)) < persistence / 100).all()
    # Where to, by the centre of mass: rows and columns are not confused, nor the sign.
    rows, columns = np.indices((64, 64))
    centres = [((rows * frame).sum() / frame.sum(), (columns * frame).sum() / frame.sum()) for frame in forecast]
    expected = [(20 + 1.5 * t, 40 - t) for t in range(10, 20)]
    np.testing.assert_allclose(centres, expected, atol=0.3)


def test_the_motion_is_that_of_the_last_two_frames(flow):
    turned = np.concatenate([moving(range(-6, -1), (0, 2.5), (20, 20)), moving((0, 1), (1.5, -1), (30, 30))])
    np.testing.assert_array_equal(optical_flow.advect(turned, 3), optical_flow.advect(turned[-2:], 3))


def test_two_blobs_move_each_in_its_way(flow):
    frames = moving(range(6), (1, 0), (14, 14)) + moving(range(6), (0, -1), (48, 48))
    forecast = optical_flow.advect(frames[:3].clip(0, 1), 3)
    assert np.abs(forecast - frames[3:]).max() < 0.1


def test_each_step_takes_the_motion_at_the_place_reached(monkeypatch):
    """Column 7 moves by 2 pixels, all others by 1: seen from there the way back is 5, 4, 3 and not 5, 3, 1."""
    motion = np.zeros((2, 3, 12))
    motion[1] = np.where(np.arange(12) == 7, 2, 1)
    monkeypatch.setattr(optical_flow, "_motion", lambda before, last: motion)
    frame = np.broadcast_to(np.arange(12, dtype=np.float32) / 12, (3, 12))
    one, two, three = optical_flow.advect(np.stack([frame] * 2), 3)[:, 1, 7] * 12
    assert (one, two, three) == pytest.approx((5, 4, 3))


def test_without_motion_it_is_persistence(flow):
    frame = np.random.default_rng(0).random((24, 24), np.float32)
    forecast = optical_flow.advect(np.stack([frame, frame]), 4)
    np.testing.assert_array_equal(forecast, np.broadcast_to(frame, (4, 24, 24)))
    assert not optical_flow.advect(np.zeros((3, 24, 24)), 2).any()  # nor does nothing move


def test_what_comes_from_outside_of_the_frame_is_0(monkeypatch):
    motion = np.stack([np.full((8, 8), 2.0), np.full((8, 8), -1.0)])
    monkeypatch.setattr(optical_flow, "_motion", lambda before, last: motion)
    first, *_, fourth = optical_flow.advect(np.ones((2, 8, 8)), 4)
    inside = np.zeros((8, 8))
    inside[2:, :7] = 1
    np.testing.assert_array_equal(first, inside)
    assert not fourth.any()  # four times two rows: all has left


def test_what_has_left_the_frame_does_not_come_back(monkeypatch):
    """The motion of the edge goes on outside, and not that of the opposite edge."""
    motion = np.zeros((2, 8, 8))
    motion[1] = np.where(np.arange(8) < 4, 1, -1)  # away from the middle, seen back in time
    monkeypatch.setattr(optical_flow, "_motion", lambda before, last: motion)
    for frame in optical_flow.advect(np.ones((2, 8, 8)), 3):
        assert not frame[:, [0, 7]].any()


def test_values_are_those_of_the_last_frame(flow):
    """Linear interpolation overshoots nowhere, and the caller's array stays as it is."""
    frames = np.random.default_rng(1).random((3, 32, 32)) * 0.5
    before = frames.copy()
    forecast = optical_flow.advect(frames, 5)
    assert forecast.min() >= 0 and forecast.max() <= frames[-1].max() + 1e-6
    np.testing.assert_array_equal(frames, before)
    np.testing.assert_array_equal(forecast, optical_flow.advect(frames, 5))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((1, 8, 8)), "two times or more"),
        (np.zeros((8, 8)), "two times or more"),
        (np.full((2, 8, 8), 255, np.uint8), "grey values"),
        (np.full((2, 8, 8), -0.1), "grey values"),
        (np.full((2, 8, 8), np.nan), "without NaN"),
    ],
)
def test_frames_that_it_cannot_read(frames, message):
    with pytest.raises(ValueError, match=message):
        optical_flow.advect(frames, 1)


def test_without_the_library_one_line_says_how_to_get_it(monkeypatch):
    for name in ("skimage", "skimage.registration"):
        monkeypatch.setitem(sys.modules, name, None)  # what Python itself does not find
    assert not optical_flow.available()
    with pytest.raises(CarouselError, match="CAROUSEL_EXTRAS=test,dev,radar launch/run install") as raised:
        optical_flow.advect(np.zeros((2, 8, 8)), 1)
    assert "scikit-image" in str(raised.value) and "\n" not in str(raised.value)


def test_with_the_library_it_is_available(flow):
    assert optical_flow.available()


def test_importing_the_module_does_not_load_the_library():
    source = "import sys, research.analysis.optical_flow as o; o.available(); sys.exit('skimage' in sys.modules)"
    subprocess.run([sys.executable, "-c", source], check=True)
