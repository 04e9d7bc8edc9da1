"""Scores of forecasts: every sequence once, which means and sums of what, and rain in mm/h."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.analysis import nowcast_scores
from research.analysis.nowcast_scores import of_grey, of_rain, scores, summed
from research.data import radar
from research.ops import verification

# Seven sequences of two frames that are seen and three to come.
FRAMES = np.random.default_rng(0).random((7, 5, 8, 9, 1)).astype(np.float32)


def frames_of(batch):
    return batch["frames"] * 1.0


def with_logits(inputs):
    """Something of the frames that are seen: each later one is fainter than the last of them."""
    logits = inputs[:, -1:] * jnp.arange(3.0, 0, -1)[:, None, None, None] - inputs[:, :1]
    return jax.nn.sigmoid(logits), logits


def persistence(inputs):
    return verification.persistence(inputs[:, -1], 3), None


def measured(forecast, measure=of_grey, frames=FRAMES, first=0, last=None):
    last = len(frames) if last is None else last
    return summed(forecast, frames_of, {"frames": frames}, first, last, observed=2, measure=measure)


def by_hand(frames):
    """Sums over sequences in double precision, `[lead]`."""
    truth, seen = np.float64(frames[:, 2:]), np.float64(frames[:, :2])
    logits = seen[:, -1:] * np.arange(3, 0, -1)[:, None, None, None] - seen[:, :1]
    p = 1 / (1 + np.exp(-logits))
    pixels = -(truth * np.log(p) + (1 - truth) * np.log(1 - p)), (p - truth) ** 2
    return [each.sum(axis=(0, 2, 3, 4)) for each in pixels]


# With and without a remainder, and more than there are.
@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize(("first", "last"), [(0, 7), (2, 6)])
def test_every_sequence_of_a_split_counts_once(monkeypatch, batch, first, last):
    monkeypatch.setattr(nowcast_scores, "_BATCH", batch)
    sizes = []

    def forecast(inputs):
        sizes.append(inputs.shape)
        return with_logits(inputs)

    found = measured(forecast, first=first, last=last)
    cross_entropy, squared_error = by_hand(FRAMES[first:last])
    assert found["count"] == last - first
    np.testing.assert_allclose(found["cross_entropy"], cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(found["squared_error"], squared_error, rtol=1e-5)
    # One shape, hence one program; and no more batches than there must be.
    size = min(batch, last - first)
    assert sizes == [(size, 2, 8, 9, 1)] * -(-(last - first) // size)


def test_cross_entropy_is_of_all_frames_together_and_the_rest_of_one():
    found = scores(measured(with_logits))
    cross_entropy, squared_error = (each / 7 for each in by_hand(FRAMES))
    assert found.keys() == {"by_lead", "overall"}
    assert list(found["by_lead"]) == list(found["overall"]) == ["cross_entropy", "squared_error", "ssim"]
    assert found["by_lead"]["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)
    assert found["by_lead"]["squared_error"] == pytest.approx(squared_error, rel=1e-5)
    assert found["overall"]["cross_entropy"] == pytest.approx(cross_entropy.sum(), rel=1e-5)
    assert found["overall"]["squared_error"] == pytest.approx(squared_error.mean(), rel=1e-5)
    ssim = verification.ssim(with_logits(FRAMES[:, :2])[0], FRAMES[:, 2:]).mean(axis=0)
    assert found["by_lead"]["ssim"] == pytest.approx(np.asarray(ssim), rel=1e-4)
    assert found["overall"]["ssim"] == pytest.approx(float(ssim.mean()), rel=1e-4)
    assert all(type(value) is float for value in found["overall"].values())
    assert all(type(value) is float for values in found["by_lead"].values() for value in values)


def test_persistence_is_the_last_frame_and_has_no_cross_entropy():
    found = scores(measured(persistence))
    assert list(found["overall"]) == ["squared_error", "ssim"]
    errors = [((FRAMES[:, 1 + lead] - FRAMES[:, 1]) ** 2).sum(axis=(1, 2, 3)).mean() for lead in (1, 2, 3)]
    assert found["by_lead"]["squared_error"] == pytest.approx(errors, rel=1e-5)
    still = np.repeat(FRAMES[:, :1], 5, axis=1)
    assert scores(measured(persistence, frames=still))["by_lead"] == {
        "squared_error": [0, 0, 0],
        "ssim": pytest.approx([1, 1, 1], abs=1e-4),
    }


# Rain

RAIN = np.zeros((3, 5, 8, 8, 1), np.float32)
"""Of 64 pixels, in mm/h: what is not said is dry."""
RAIN[0, 1, 0, :4, 0] = 2  # the last frame that is seen
RAIN[0, 2, 0, :4, 0] = (2, 2, 0.4, 4)  # a false alarm, since 0.4 is no rain
RAIN[0, 2, 5, :3, 0] = 10  # misses
RAIN[1, 1, 3, 0, 0] = 1
RAIN[1, 3, 3, 0, 0] = 8
RAIN[1, 3, 3, 1, 0] = 0.6


def test_scores_of_rain_by_hand():
    found = scores(measured(persistence, of_rain, radar.to_grey(RAIN)))
    assert list(found["overall"]) == ["rainfall_mse", "csi", "far", "pod", "correlation"] == list(found["by_lead"])
    # Lead 1: 3 hits, 1 false alarm, 3 misses of sequence 0; 1 false alarm of sequence 1. Lead 2: 4 false alarms, and
    # of sequence 1 a hit and a miss. Lead 3: no rain is seen, 5 false alarms.
    by_lead = found["by_lead"]
    assert by_lead["csi"] == pytest.approx([3 / 8, 1 / 6, 0])
    assert by_lead["far"] == pytest.approx([2 / 5, 4 / 5, 1])
    assert by_lead["pod"] == pytest.approx([3 / 6, 1 / 2, np.nan], nan_ok=True)
    squares = [(1.6**2 + 2**2 + 3 * 10**2) + 1, 4 * 2**2 + 7**2 + 0.6**2, 4 * 2**2 + 1]
    assert by_lead["rainfall_mse"] == pytest.approx([each / 64 / 3 for each in squares], rel=1e-4)
    forecast = 4 * 2**2 + 1  # the sum of its squares, at every lead
    products, seen = (2 * (2 + 2 + 0.4 + 4), 8), (4 + 4 + 0.16 + 16 + 300, 64 + 0.36)
    correlations = [pt / np.sqrt(forecast * tt) for pt, tt in zip(products, seen, strict=True)]
    assert by_lead["correlation"] == pytest.approx([*correlations, 0], rel=1e-4)

    # Of counts that are added up over lead times too, and not the mean of their scores.
    overall = found["overall"]
    assert overall["csi"] == pytest.approx(4 / (4 + 4 + 11))
    assert (overall["far"], overall["pod"]) == pytest.approx((11 / 15, 4 / 8))
    assert overall["rainfall_mse"] == pytest.approx(sum(squares) / 64 / 9, rel=1e-4)
    assert overall["correlation"] == pytest.approx(sum(products) / np.sqrt(3 * forecast * sum(seen)), rel=1e-4)


def test_padding_adds_no_rain(monkeypatch):
    frames = radar.to_grey(RAIN[[2, 1, 0]])  # the last one, which pads, has the most
    whole = scores(measured(persistence, of_rain, frames))
    monkeypatch.setattr(nowcast_scores, "_BATCH", 2)
    padded = scores(measured(persistence, of_rain, frames))
    for name in ("by_lead", "overall"):
        for score, value in whole[name].items():
            assert padded[name][score] == pytest.approx(value, rel=1e-6, nan_ok=True), score


def test_networks_have_a_cross_entropy_of_greys_beside_the_scores_of_rain():
    found = scores(measured(with_logits, of_rain))
    assert list(found["overall"]) == ["cross_entropy", "rainfall_mse", "csi", "far", "pod", "correlation"]
    assert found["overall"]["cross_entropy"] == pytest.approx(by_hand(FRAMES)[0].sum() / 7, rel=1e-5)


def test_where_it_never_rains_scores_of_rain_are_not_a_number():
    found = scores(measured(persistence, of_rain, np.zeros_like(RAIN)))
    assert found["overall"] == pytest.approx(
        {"rainfall_mse": 0, "csi": np.nan, "far": np.nan, "pod": np.nan, "correlation": 0}, nan_ok=True
    )
