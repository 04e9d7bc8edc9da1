"""A nowcast without learning: the motion between the last two frames, and the last frame moved on by it.

ConvLSTM's baseline, ROVER, is of this kind: variational optical flow, then semi-Lagrangian advection. It knows neither
growth nor decay, and its motion does not change with time. Source: Shi et al. 2015, sections 1 and 4.2.

Differences from ROVER (Woo and Wong 2017): the flow is the TV-L1 of Zach et al. 2007 in scikit-image, an optional
extra, and of the last pair of frames alone. Means over the last three or four pairs gained nothing on 12 radar
sequences of MeteoSwiss and lost on 25 of moving digits, which bounce.
"""

import importlib.util

import numpy as np
from scipy.ndimage import map_coordinates

from research.errors import CarouselError

_MISSING = "optical flow needs scikit-image, which is not installed; CAROUSEL_EXTRAS=test,dev,radar launch/run install"
# With the library's 5 a smooth blob that moves by 1.8 pixels is found to move by 0.95 of that, and ten frames add up
# what is missing; with 10 nothing is. All else is the library's: no data were used to tune it.
_WARPS = 10


def available() -> bool:
    """Whether scikit-image, which `advect` needs, is installed."""
    return importlib.util.find_spec("skimage") is not None


def advect(frames: np.ndarray, steps: int) -> np.ndarray:
    """Forecasts by moving the last frame along the optical flow between the last two.

    v minimises sum |I_T(x) - I_{T-1}(x - v(x))| + smoothness of v, in total variation;
    x_0 = x, x_k = x_{k-1} - v(x_{k-1}): back in time, each step by the motion at the place reached;
    forecast_k(x) = I_T(x_k), interpolated linearly, 0 where x_k lies outside of the frame.

    Args:
      frames: `[time, height, width]` grey values in 0..1 and at least two times; the flow's balance of data against
        smoothness is made for that range. Rain goes in on the logarithmic scale that the networks see.
      steps: frames to forecast.

    Returns:
      `[steps, height, width]` float32 grey values.

    Raises:
      ValueError: frames of another shape or with values that are not in 0..1, NaN among them.
      CarouselError: scikit-image is not installed.

    Source: Zach, Pock and Bischof 2007 (TV-L1); Germann and Zawadzki 2002 (semi-Lagrangian advection of rain).
    """
    frames = np.asarray(frames, np.float32)
    if frames.ndim != 3 or len(frames) < 2:
        raise ValueError(f"frames must be [time, height, width] with two times or more, not {frames.shape}")
    if not ((frames >= 0) & (frames <= 1)).all():
        raise ValueError("frames must be grey values in 0..1 without NaN")
    motion = _motion(*frames[-2:])
    places = np.indices(frames.shape[1:], dtype=np.float64)
    forecast = np.empty((steps, *frames.shape[1:]), np.float32)
    for frame in forecast:
        # The motion goes on beyond the edge: what has left the frame does not come back.
        places -= [map_coordinates(part, places, order=1, mode="nearest") for part in motion]
        map_coordinates(frames[-1], places, order=1, cval=0, output=frame)
    return forecast


def _motion(before: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Pixels a frame (v_y, v_x) at every pixel of the last frame: `[2, height, width]`."""
    try:
        from skimage.registration import optical_flow_tvl1
    except ImportError as error:
        raise CarouselError(_MISSING) from error
    # The library's flow points from its first image to where that is found in the second: here, back in time.
    return -optical_flow_tvl1(last, before, num_warp=_WARPS)
