"""Moving MNIST: digits that fly through a frame and bounce off its walls, drawn inside the compiled program.

`sequences` makes any number of them from a pool of digits; the sequence of an index is the same to the bit, whatever
the batch, the compilation or the devices. `load_published` reads the 10,000 sequences that papers compare on.

Shi et al. 2015 move two digits of a pool of 500 MNIST digits over 20 frames of 64x64, and make 10,000 sequences to
train, 2,000 to validate and 3,000 to test: here those are ranges of the index.
"""

import dataclasses
import math
import os
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from research.data.dataset import SPLIT_SEED
from research.errors import CarouselError, UsageError

# What the published file is called, and where it lies (819,200,128 bytes, MD5 be083ec986bfe91a449d63653c411eb2).
PUBLISHED = "mnist_test_seq.npy"
URL = f"http://www.cs.toronto.edu/~nitish/unsupervised_video/{PUBLISHED}"

# Motion is computed in integers: rounding of floats differs between compiled programs, and a digit could come to lie
# one pixel off. The unit of length is the room of a digit, the way from one wall to the other.
_ROOM_BITS = 30
_ROOM = 1 << _ROOM_BITS
_SPEED_BITS = 16
_HEADING_BITS = _ROOM_BITS - _SPEED_BITS
_PIXEL_BITS = 20
_LARGEST_FRAME = 1 << (31 - _PIXEL_BITS)
_PAPER_ROOM = 64 - 28  # pixels

_ANGLES = np.arange(4096) * (2 * np.pi / 4096)
_HEADINGS = np.round(np.stack([np.sin(_ANGLES), np.cos(_ANGLES)], axis=-1) * 2**_HEADING_BITS).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Moving:
    """How sequences are made; as it stands, as in Shi et al. 2015.

    Attributes:
      frame: height and width of a frame in pixels, at most 2,048.
      digits: digits in a frame.
      time: frames of a sequence.
      speed: the lowest speed and the one that all stay below, in pixels a frame for 28-pixel digits in a 64-pixel
        frame; a digit crosses as much of its room in a frame whatever the sizes are.

    Raises:
      UsageError: a number out of range.
    """

    frame: int = 64
    digits: int = 2
    time: int = 20
    speed: tuple[float, float] = (3.0, 5.0)

    def __post_init__(self):
        for name in ("frame", "digits", "time"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.frame > _LARGEST_FRAME:
            raise UsageError(f"frame is {self.frame} pixels: give at most {_LARGEST_FRAME}")
        low, high = self.speed
        if not 0 <= low <= high <= _PAPER_ROOM:
            raise UsageError(f"speed is {low} to {high} pixels a frame: give two from 0 to {_PAPER_ROOM}, lowest first")


def sequences(pool: jax.Array, index: jax.Array, *, seed: int, moving: Moving) -> jax.Array:
    """Sequences of digits that move straight ahead and are reflected by the walls.

        start ~ U[0, R]^2      velocity = s (sin a, cos a)      s ~ U[3, 5) (F - d) / (64 - 28)      a ~ U[0, 2 pi)
        p_t = R - |(start + t velocity) mod 2 R - R|            R = F - d
        frame_t[y, x] = max over digits of digit[y - [p_t]_y, x - [p_t]_x] / 255

    with F the frame's size, d the digit's and [p] rounded to whole pixels, halves up; frame 0 shows the start. Angles
    are multiples of 2 pi / 4096. Digits are drawn from the pool with replacement. A digit that is higher than wide has
    less room in height, and a speed that is less in proportion.

    Every number comes from `fold_in(key(seed), index)`, so an index has the same sequence in any batch.

    The reflection is elastic: what is left of a step at the wall is gone on the way back. The generator of Srivastava
    et al. 2015, of which the published file comes, is another: there a digit stops at the wall for the rest of that
    frame, takes a step before the first frame, moves by 3.6 pixels always, and positions are truncated.

    Args:
      pool: uint8 `[n, d, d]`, 0 (nothing) to 255.
      index: `[examples]`, integers from 0; a validation set takes others than its training set.
      seed: 32 bits.
      moving: how to make them.

    Returns:
      float32 `[examples, time, frame, frame, 1]`, 0 to 1.

    Raises:
      UsageError: the digits are larger than the frame.

    Source: Shi et al. 2015, section 4.1.
    """
    pool = jnp.asarray(pool)
    chex.assert_rank([pool, index], [3, 1])
    chex.assert_type([pool, index], [jnp.uint8, int])
    frame, (height, width) = moving.frame, pool.shape[1:]
    room = np.array([frame - height, frame - width], np.int32)
    if room.min() < 0:
        raise UsageError(f"digits of {height}x{width} pixels do not fit frames of {frame}x{frame}: give larger frames")
    # Threefry whatever the default is: the numbers of other generators depend on the batch under vmap.
    key = jax.random.key(seed, impl="threefry2x32")

    def sequence(index):
        numbers = jax.random.bits(jax.random.fold_in(key, index), (moving.digits, 5), jnp.uint32)
        digits = pool[numbers[:, 0] % len(pool)]
        start, velocity = _motion(numbers[:, 1:], moving)
        at = _reflected(start + jnp.arange(moving.time, dtype=jnp.int32)[:, None, None] * velocity)
        at = ((at >> (_ROOM_BITS - _PIXEL_BITS)) * room + (1 << (_PIXEL_BITS - 1))) >> _PIXEL_BITS
        # A frame is a window of the digit with its room around it. Of a batch of 16 as in the paper, on two CPU cores:
        # 0.5 ms in bytes, 1.6 in floats; 0.9 where each pixel looks up its own, 6.5 by products with one-hot matrices.
        around = jnp.pad(digits, ((0, 0), (room[0], room[0]), (room[1], room[1])))
        window = jax.vmap(lambda image, corner: lax.dynamic_slice(image, corner, (frame, frame)))
        return jax.vmap(lambda corners: window(around, corners).max(axis=0))(room - at)

    # A product: of a quotient by a constant XLA makes one at times, and the last bit may change.
    return jax.vmap(sequence)(index)[..., None].astype(jnp.float32) * np.float32(1 / 255)


def _motion(numbers: jax.Array, moving: Moving) -> tuple[jax.Array, jax.Array]:
    """Start and velocity a frame of digits, (y, x), int32 `[digits, 2]`, where R is 2^30; of uint32 `[digits, 4]`."""
    # Remainders prefer small numbers, by less than one in 2^32 / n: not to be seen.
    start = (numbers[:, :2] % (_ROOM + 1)).astype(jnp.int32)
    # Rounded up, both: from the lowest on, and below the highest.
    low, high = (math.ceil(speed / _PAPER_ROOM * 2**_SPEED_BITS) for speed in moving.speed)
    speed = low + (numbers[:, 2] % max(high - low, 1)).astype(jnp.int32)
    heading = jnp.asarray(_HEADINGS)[numbers[:, 3] % len(_HEADINGS)]
    return start, speed[:, None] * heading


def _reflected(distance: jax.Array) -> jax.Array:
    """R - |x mod 2 R - R|: where something is after going so far between walls at 0 and R."""
    # int32 arithmetic wraps at 2^32, a multiple of 2 R, so the longest way ends at the right place as well.
    return _ROOM - jnp.abs((distance & (2 * _ROOM - 1)) - _ROOM)


def pool(images: np.ndarray, size: int) -> np.ndarray:
    """The digits that move: `size` of the images by a fixed seeded permutation, in their original order.

    Args:
      images: uint8 `[n, height, width]` or `[n, height, width, 1]`, such as the training images of MNIST.
      size: 1 to n; 500 in Shi et al. 2015.

    Returns:
      uint8 `[size, height, width]`.

    Raises:
      UsageError: `size` out of range.
    """
    images = images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images
    chex.assert_rank(images, 3)
    if not 1 <= size <= len(images):
        raise UsageError(f"a pool of {size} of {len(images)} images: give 1 to {len(images)}")
    # As in `dataset.split_off`: one choice for all seeds of a comparison and all versions of NumPy.
    return images[np.sort(np.random.RandomState(SPLIT_SEED).permutation(len(images))[:size])]


def load_published(path: str | os.PathLike) -> np.ndarray:
    """Reads `mnist_test_seq.npy`: 10,000 sequences of 20 frames of 64x64, two digits each.

    It comes without a split; later papers test on all of it.

    Args:
      path: the file, an uncompressed `.npy` of uint8 `[time, sequences, height, width]` of any sizes.

    Returns:
      uint8 `[sequences, time, height, width, 1]`, 0 to 255: a read-only view of the file, of which only what is used
      comes into memory.

    Raises:
      CarouselError: the file is missing, truncated, not an `.npy` file, or holds something else.

    Source: Srivastava et al. 2015, "Unsupervised Learning of Video Representations using LSTMs".
    """
    path = pathlib.Path(path).expanduser()
    advice = f"get {URL}"
    try:
        # Unlike np.load, it reads nothing but .npy and never unpickles.
        frames = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise CarouselError(f"{path} is missing: {advice}") from None
    except OSError as error:
        raise CarouselError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # NumPy has no one error for a damaged header
        reason = " ".join(str(error).split())[:100]
        raise CarouselError(f"{path} is truncated or not an .npy file ({reason}): {advice}") from error
    if frames.dtype != np.uint8 or frames.ndim != 4:
        raise CarouselError(
            f"{path} holds {frames.dtype} {list(frames.shape)}, expected uint8 [time, n, height, width]: {advice}"
        )
    return np.asarray(frames).transpose(1, 0, 2, 3)[..., None]
