"""How good forecasts of frames are: sums and means per sequence and lead time, for the caller to mask and add up.

Predictions P and truths T are `[batch, time, height, width, channels]`, floating point, in the same units; results are
`[batch, time]`. `valid`, bool, says which pixels count (False where no radar sees); it has a shape that broadcasts to
that of P, and what stands at other pixels does not matter, not even NaN.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax


class Contingency(NamedTuple):
    """Counts of pixels, int32: rain forecast and seen, seen alone, forecast alone."""

    hits: jax.Array
    misses: jax.Array
    false_alarms: jax.Array


class CorrelationSums(NamedTuple):
    """Sums over pixels: of P T, of P^2 and of T^2."""

    pt: jax.Array
    pp: jax.Array
    tt: jax.Array


def cross_entropy(logits: jax.Array, truth: jax.Array) -> jax.Array:
    """Cross-entropy of a frame's pixels, each a coin that shows white with the probability of its grey value; in nats.

        sum over pixels of -[T log P + (1 - T) log(1 - P)]        P = sigmoid(z)

    At its least, P = T, it is the entropy of the greys and not 0. Neither it nor its gradient overflows or loses small
    values: -log P = log(1 + e^-z) and -log(1 - P) = log(1 + e^z), each by `softplus`.

    Args:
      logits: z `[batch, time, height, width, channels]`.
      truth: T, likewise, in [0, 1].

    Returns:
      `[batch, time]`. A sequence's loss in Shi et al. 2015 is its sum over time.

    Source: Shi et al. 2015, section 4.1.
    """
    _check(logits, truth)
    losses = truth * jax.nn.softplus(-logits) + (1 - truth) * jax.nn.softplus(logits)
    return _over_frame(losses)


def squared_error(prediction: jax.Array, truth: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
    """The sum of (P - T)^2 over the pixels of a frame, `[batch, time]`; arguments as the module says."""
    _check(prediction, truth)
    # Before the square: 0 times the gradient of a NaN would be NaN.
    return _over_frame(_only(valid, prediction - truth) ** 2)


def ssim(prediction: jax.Array, truth: jax.Array, *, window: int = 7, data_range: float = 1.0) -> jax.Array:
    """Structural similarity of two frames, the mean over all windows: 1 where they are equal, lower otherwise.

                (2 m_P m_T + C1) (2 s_PT + C2)
        ---------------------------------------------        C1 = (0.01 L)^2      C2 = (0.03 L)^2
        (m_P^2 + m_T^2 + C1) (s_P^2 + s_T^2 + C2)

    with the means m, variances s^2 and covariance s_PT in a window of N pixels, the latter two with divisor N - 1. The
    windows are those that lie inside the frame. It is what scikit-image's `structural_similarity` does unasked; Wang et
    al. weight the pixels of 11x11 windows by a Gaussian of 1.5 pixels, so numbers of theirs are others.

    Args:
      prediction: P `[batch, time, height, width, channels]`.
      truth: T, likewise.
      window: height and width of a window in pixels, odd, from 3 to those of a frame.
      data_range: L, the largest value less the smallest one that a pixel can have.

    Returns:
      `[batch, time]`, -1 to 1; channels are averaged.

    Raises:
      ValueError: such a window does not exist.

    Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity", equation 13.
    """
    _check(prediction, truth)
    height, width = prediction.shape[2:4]
    if window % 2 == 0 or not 3 <= window <= min(height, width):
        raise ValueError(f"window {window} for frames of {height}x{width}: give an odd number from 3 to their size")
    pixels = window * window

    def mean(x):
        # Rows and then columns: 2 window additions a pixel in place of window^2.
        x = lax.reduce_window(x, 0.0, lax.add, (1, 1, window, 1, 1), (1,) * 5, "valid")
        return lax.reduce_window(x, 0.0, lax.add, (1, 1, 1, window, 1), (1,) * 5, "valid") / pixels

    p, t = mean(prediction), mean(truth)
    bessel = pixels / (pixels - 1)
    pp = bessel * (mean(prediction * prediction) - p * p)
    tt = bessel * (mean(truth * truth) - t * t)
    pt = bessel * (mean(prediction * truth) - p * t)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = ((2 * p * t + c1) * (2 * pt + c2)) / ((p * p + t * t + c1) * (pp + tt + c2))
    return similarity.mean(axis=(2, 3, 4))


def contingency(
    prediction: jax.Array, truth: jax.Array, *, threshold: float, valid: jax.Array | None = None
) -> Contingency:
    """Counts the pixels where rain was forecast and where it fell; rain is `threshold` or more.

        hits: P >= c and T >= c      misses: P < c and T >= c      false alarms: P >= c and T < c

    Args:
      prediction: P `[batch, time, height, width, channels]`, mm/h.
      truth: T, likewise.
      threshold: c in mm/h; 0.5 in Shi et al. 2015.
      valid: as the module says.

    Returns:
      `[batch, time]` each. Scores come from counts that are summed over sequences first.

    Source: Shi et al. 2015, section 4.2; Wilks 2011, "Statistical Methods in the Atmospheric Sciences", section 8.2.
    """
    _check(prediction, truth)
    forecast, seen = prediction >= threshold, truth >= threshold

    def count(pixels):
        return _only(valid, pixels).sum(axis=(2, 3, 4), dtype=jnp.int32)

    return Contingency(count(forecast & seen), count(~forecast & seen), count(forecast & ~seen))


def csi(c: Contingency) -> jax.Array:
    """Critical success index: hits / (hits + misses + false alarms); NaN where rain was neither forecast nor seen."""
    return _share(c.hits, c.hits + c.misses + c.false_alarms)


def far(c: Contingency) -> jax.Array:
    """False alarm ratio: false alarms / (hits + false alarms); NaN where no rain was forecast."""
    return _share(c.false_alarms, c.hits + c.false_alarms)


def pod(c: Contingency) -> jax.Array:
    """Probability of detection: hits / (hits + misses); NaN where no rain was seen."""
    return _share(c.hits, c.hits + c.misses)


def correlation_sums(prediction: jax.Array, truth: jax.Array, *, valid: jax.Array | None = None) -> CorrelationSums:
    """Sums of P T, P^2 and T^2 over the pixels of a frame, `[batch, time]` each; arguments as the module says."""
    _check(prediction, truth)
    p, t = _only(valid, prediction), _only(valid, truth)
    return CorrelationSums(_over_frame(p * t), _over_frame(p * p), _over_frame(t * t))


def correlation(sums: CorrelationSums) -> jax.Array:
    """How alike patterns of rain are, whatever their strength: the cosine of the angle between P and T.

        sum P T / (sqrt(sum P^2 sum T^2) + 1e-9)

    Means are not subtracted. It is 0, and not NaN, where there is no rain. Of the sums of a frame it is that frame's;
    of sums over sequences, that of all their frames as one.

    Source: Shi et al. 2015, section 4.2.
    """
    # Two roots, since the product of large sums may overflow.
    return sums.pt / (jnp.sqrt(sums.pp) * jnp.sqrt(sums.tt) + 1e-9)


def persistence(last: jax.Array, time: int) -> jax.Array:
    """The forecast that nothing changes: the last frame `[batch, h, w, c]` again, `[batch, time, h, w, c]`."""
    chex.assert_rank(last, 4)
    batch, *frame = last.shape
    return jnp.broadcast_to(last[:, None], (batch, time, *frame))


def _check(prediction: jax.Array, truth: jax.Array) -> None:
    chex.assert_rank([prediction, truth], 5)
    chex.assert_equal_shape([prediction, truth])
    # Bytes would wrap in differences.
    chex.assert_type([prediction, truth], float)


def _only(valid: jax.Array | None, x: jax.Array) -> jax.Array:
    """x where it counts, 0 elsewhere."""
    if valid is None:
        return x
    chex.assert_type(valid, bool)
    chex.assert_is_broadcastable(valid.shape, x.shape)
    return jnp.where(valid, x, jnp.zeros_like(x))


def _over_frame(x: jax.Array) -> jax.Array:
    return x.sum(axis=(2, 3, 4))


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.where(whole == 0, jnp.nan, part / jnp.where(whole == 0, 1, whole))
