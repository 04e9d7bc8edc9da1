"""Scores of forecasts by lead time, over every sequence of a split once."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.data import radar
from research.ops import verification

# forecast(inputs [batch, time, h, w, c]) -> (grey [batch, lead, h, w, c], logits of it or None)
Forecast = Callable[[jax.Array], tuple[jax.Array, jax.Array | None]]
Sums = dict[str, np.ndarray]

_BATCH = 32


def of_grey(prediction: jax.Array, logits: jax.Array | None, truth: jax.Array) -> dict[str, jax.Array]:
    """Each sequence's cross-entropy (where there are logits), squared error and SSIM, `[batch, lead]` each."""
    found = {} if logits is None else {"cross_entropy": verification.cross_entropy(logits, truth)}
    found["squared_error"] = verification.squared_error(prediction, truth)
    return found | {"ssim": verification.ssim(prediction, truth)}


def of_rain(prediction: jax.Array, logits: jax.Array | None, truth: jax.Array) -> dict[str, jax.Array]:
    """Each sequence's sums `[batch, lead]` for the scores of rain, in mm/h, from grey as `radar.to_grey` makes it."""
    found = {} if logits is None else {"cross_entropy": verification.cross_entropy(logits, truth)}
    rain, fell = radar.to_rain_from_grey(prediction), radar.to_rain_from_grey(truth)
    pixels = np.prod(truth.shape[2:])
    found["rainfall_mse"] = verification.squared_error(rain, fell) / pixels
    found |= verification.contingency(rain, fell, threshold=radar.THRESHOLD)._asdict()
    return found | verification.correlation_sums(rain, fell)._asdict()


def summed(
    forecast: Forecast,
    frames_of: Callable[[dict[str, jax.Array]], jax.Array],
    data: Mapping[str, np.ndarray],
    first: int,
    last: int,
    *,
    observed: int,
    measure: Callable[..., dict[str, jax.Array]],
) -> Sums:
    """Sums of a measure over the sequences `first ... last - 1` of the data, `[lead]` each, and their `count`.

    Args:
      forecast: see `Forecast`.
      frames_of: whole sequences of a batch of the data.
      data: arrays `[examples, ...]`.
      first, last: the split.
      observed: frames that the forecast sees.
      measure: `of_grey` or `of_rain`.
    """
    drawn, measured = jax.jit(frames_of), jax.jit(measure)
    size = min(_BATCH, last - first)
    sums: Sums = {}
    for start in range(first, last, size):
        index = np.arange(start, start + size)
        counted = (index < last)[:, None]  # the last batch is padded, so that one program serves all
        frames = drawn({name: array[np.minimum(index, last - 1)] for name, array in data.items()})
        part = measured(*forecast(frames[:, :observed]), frames[:, observed:])
        for name, values in jax.device_get(part).items():
            sums[name] = sums.get(name, 0) + (values.astype(np.float64) * counted).sum(axis=0)
        sums["count"] = sums.get("count", 0) + counted.sum()
    return sums


def scores(sums: Sums) -> dict[str, dict[str, Any]]:
    """The scores `by_lead` time, a list each, and `overall`.

    Cross-entropy is the mean over sequences, overall of all their frames together (nats a sequence); squared error,
    SSIM and the rainfall's mean squared error are means over sequences, overall over frames too. CSI, FAR, POD and
    correlation come from sums over sequences, overall over lead times as well.
    """
    sums = dict(sums)
    count = sums.pop("count")
    by_lead, overall = {}, {}
    for name in ("cross_entropy", "squared_error", "ssim", "rainfall_mse"):
        if name in sums:
            means = sums.pop(name) / count
            by_lead[name], overall[name] = means.tolist(), (means.sum() if name == "cross_entropy" else means.mean())
    if sums:
        for found, given in ((by_lead, sums), (overall, {name: values.sum() for name, values in sums.items()})):
            found |= {name: np.asarray(value).tolist() for name, value in _of_sums(given).items()}
    return {"by_lead": by_lead, "overall": {name: float(value) for name, value in overall.items()}}


def _of_sums(sums: Sums) -> dict[str, jax.Array]:
    counts = verification.Contingency(*(jnp.asarray(sums[name]) for name in verification.Contingency._fields))
    found = {name: getattr(verification, name)(counts) for name in ("csi", "far", "pod")}
    products = verification.CorrelationSums(*(jnp.asarray(sums[n]) for n in verification.CorrelationSums._fields))
    return found | {"correlation": verification.correlation(products)}
