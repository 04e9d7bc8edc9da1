"""Forecast verification by hand on frames of a few pixels, and structural similarity against scikit-image."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops import verification
from research.ops.verification import Contingency, CorrelationSums


def frames(*sequences):
    """Frames written as nested lists, `[batch][time][height][width]`, with one channel."""
    return jnp.array(sequences, jnp.float32)[..., None]


def random_frames(shape=(2, 3, 9, 12, 2), seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


pytestmark = pytest.mark.usefixtures("quick_compilation")

# Two sequences of one frame of 2x2 pixels, mm/h.
RAIN = frames([[[0.5, 0.0], [2.0, 0.4]]], [[[0.0, 0.0], [0.0, 0.0]]])
FORECAST = frames([[[1.0, 0.5], [0.1, 0.0]]], [[[3.0, 0.0], [0.0, 4.0]]])


def test_cross_entropy_by_hand():
    logits = frames([[[0.0, math.log(3)], [-math.log(3), 0.0]], [[0.0, 0.0], [0.0, 0.0]]])  # P: 1/2 3/4, 1/4 1/2
    truth = frames([[[1.0, 1.0], [0.5, 0.3]], [[0.0, 1.0], [0.2, 0.7]]])
    expected = math.log(2) + math.log(4 / 3) + 0.5 * (math.log(4) + math.log(4 / 3)) + math.log(2)
    # At P = 1/2 every pixel costs one bit, whatever its grey.
    np.testing.assert_allclose(verification.cross_entropy(logits, truth), [[expected, 4 * math.log(2)]], rtol=1e-6)


def test_cross_entropy_sums_the_pixels_of_each_frame():
    logits, truth = 3 * random_frames() - 1, random_frames(seed=1)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = -(truth * np.log(p) + (1 - truth) * np.log(1 - p)).sum(axis=(2, 3, 4))
    np.testing.assert_allclose(verification.cross_entropy(logits, truth), expected, rtol=1e-6)


def test_cross_entropy_and_its_gradient_are_exact_however_sure_the_forecast():
    # z, T, loss, dloss/dz = sigmoid(z) - T
    table = np.array(
        [
            (100, 1, 0, 0),
            (100, 0, 100, 1),
            (-100, 1, 100, -1),
            (-100, 0, 0, 0),
            (100, 0.25, 75, 0.75),
            (-1000, 0.25, 250, -0.25),
            (0, 0.25, math.log(2), 0.25),  # where max(z, 0) and |z| have kinks
            (0, 1, math.log(2), -0.5),
            (16, 1, math.exp(-16), -math.exp(-16)),  # less than half of float32's last place beside 1
            (-16, 0, math.exp(-16), math.exp(-16)),
        ],
        np.float64,
    )
    z, t, losses, slopes = (column.reshape(-1, 1, 1, 1, 1) for column in table.T)
    z, t = jnp.float32(z), jnp.float32(t)
    np.testing.assert_allclose(verification.cross_entropy(z, t), losses[..., 0, 0, 0], rtol=1e-6, atol=1e-30)
    gradient = jax.grad(lambda z: verification.cross_entropy(z, t).sum())(z)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-30)


def test_squared_error_by_hand():
    # 0.5^2 + 0.5^2 + 1.9^2 + 0.4^2 and 3^2 + 4^2
    np.testing.assert_allclose(verification.squared_error(FORECAST, RAIN), [[4.27], [25.0]], rtol=1e-6)


def test_contingency_and_scores_by_hand():
    counts = verification.contingency(FORECAST, RAIN, threshold=0.5)
    # Rain is 0.5 or more: a hit, a false alarm, a miss and neither; then two false alarms.
    expected = Contingency(hits=[[1], [0]], misses=[[1], [0]], false_alarms=[[1], [2]])
    for name, count in counts._asdict().items():
        np.testing.assert_array_equal(count, getattr(expected, name), name)
        assert count.dtype == jnp.int32
    np.testing.assert_allclose(verification.csi(counts), [[1 / 3], [0]], rtol=1e-6)
    np.testing.assert_allclose(verification.far(counts), [[1 / 2], [1]], rtol=1e-6)
    np.testing.assert_allclose(verification.pod(counts), [[1 / 2], [np.nan]], rtol=1e-6)
    # Summed first, then divided, and not the mean of the ratios.
    total = jax.tree.map(lambda count: count.sum(axis=0), counts)
    np.testing.assert_allclose(verification.csi(total), [1 / 5], rtol=1e-6)
    np.testing.assert_allclose(verification.far(total), [3 / 4], rtol=1e-6)
    np.testing.assert_allclose(verification.pod(total), [1 / 2], rtol=1e-6)


def test_scores_of_different_counts():
    counts = Contingency(*map(jnp.int32, (6, 3, 2)))
    scores = [float(score(counts)) for score in (verification.csi, verification.far, verification.pod)]
    np.testing.assert_allclose(scores, [6 / 11, 2 / 8, 6 / 9], rtol=1e-6)


def test_scores_without_rain_are_not_numbers():
    dry = jnp.zeros_like(RAIN)
    counts = verification.contingency(dry, dry, threshold=0.5)
    for score in (verification.csi, verification.far, verification.pod):
        np.testing.assert_array_equal(score(counts), [[np.nan], [np.nan]])
    np.testing.assert_array_equal(verification.correlation(verification.correlation_sums(dry, dry)), [[0], [0]])


def test_a_perfect_forecast():
    counts = verification.contingency(RAIN[:1], RAIN[:1], threshold=0.5)
    assert [float(score(counts)[0, 0]) for score in (verification.csi, verification.far, verification.pod)] == [1, 0, 1]
    sums = verification.correlation_sums(RAIN[:1], RAIN[:1])
    np.testing.assert_allclose(verification.correlation(sums), [[1]], rtol=1e-6)
    np.testing.assert_array_equal(verification.squared_error(RAIN, RAIN), [[0], [0]])


def test_correlation_by_hand():
    sums = verification.correlation_sums(FORECAST, RAIN)
    np.testing.assert_allclose(sums.pt, [[0.7], [0]], rtol=1e-6)
    np.testing.assert_allclose(sums.pp, [[1.26], [25]], rtol=1e-6)
    np.testing.assert_allclose(sums.tt, [[4.41], [0]], rtol=1e-6)
    np.testing.assert_allclose(verification.correlation(sums), [[0.7 / math.sqrt(1.26 * 4.41)], [0]], rtol=1e-6)
    # Not centred: two different constant fields are alike.
    flat = jnp.ones_like(RAIN)
    np.testing.assert_allclose(
        verification.correlation(verification.correlation_sums(flat, 7 * flat)), [[1], [1]], rtol=1e-6
    )
    # The 1e-9 is the paper's, and sums whose product is more than float32 holds are no matter.
    small, large = (CorrelationSums(*[jnp.float32(x)] * 3) for x in (1e-9, 1e30))
    np.testing.assert_allclose([verification.correlation(small), verification.correlation(large)], [0.5, 1], rtol=1e-6)


VALID = jnp.array([[True, False], [True, True]])[..., None]  # [height, width, 1], for all frames


def test_pixels_that_no_radar_sees_do_not_count():
    counts = verification.contingency(FORECAST, RAIN, threshold=0.5, valid=VALID)
    np.testing.assert_array_equal(counts, [[[1], [0]], [[1], [0]], [[0], [2]]])
    np.testing.assert_allclose(verification.squared_error(FORECAST, RAIN, valid=VALID), [[4.02], [25]], rtol=1e-6)
    sums = verification.correlation_sums(FORECAST, RAIN, valid=VALID)
    np.testing.assert_allclose([x[0, 0] for x in sums], [0.7, 1.01, 4.41], rtol=1e-6)
    # One mask a frame.
    own = jnp.stack([VALID, jnp.zeros_like(VALID)])[:, None]
    np.testing.assert_allclose(verification.squared_error(FORECAST, RAIN, valid=own), [[4.02], [0]], rtol=1e-6)


def test_what_stands_where_no_radar_sees_is_no_matter():
    unseen = jnp.where(VALID, RAIN, jnp.nan)
    error = functools.partial(verification.squared_error, valid=VALID)
    np.testing.assert_array_equal(error(FORECAST, unseen), error(FORECAST, RAIN))
    gradient = jax.grad(lambda p: error(p, unseen).sum())(FORECAST)
    np.testing.assert_allclose(gradient, jnp.where(VALID, 2 * (FORECAST - RAIN), 0), rtol=1e-6)
    for name in ("contingency", "correlation_sums"):
        measure = getattr(verification, name)
        options = {"threshold": 0.5} if name == "contingency" else {}
        seen, blind = (measure(FORECAST, truth, valid=VALID, **options) for truth in (RAIN, unseen))
        np.testing.assert_array_equal(seen, blind)


def ssim_by_loop(prediction, truth, window, data_range):
    """Window by window in float64, for `[height, width]`."""
    values = []
    for top in range(prediction.shape[0] - window + 1):
        for left in range(prediction.shape[1] - window + 1):
            p, t = (x[top : top + window, left : left + window].astype(np.float64).ravel() for x in (prediction, truth))
            c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
            (pp, pt), (_, tt) = np.cov(p, t)  # divisor N - 1
            means = (2 * p.mean() * t.mean() + c1) / (p.mean() ** 2 + t.mean() ** 2 + c1)
            values.append(means * (2 * pt + c2) / (pp + tt + c2))
    return np.mean(values)


def pairs(data_range):
    """Frames that have to do with each other: a truth and the same with noise, flat in places."""
    truth = np.where(random_frames(seed=1) > 0.3, random_frames(seed=2), 0)
    noisy = np.clip(truth + 0.3 * random_frames(seed=3) * (random_frames(seed=4) > 0.5), 0, 1)
    return noisy * np.float32(data_range), truth * np.float32(data_range)


def test_ssim_by_hand():
    # One window of 3x3: means 4/9 and 5/9, variances (N - 1) 5/18 both, covariance -5/18.
    prediction = frames([[[0, 1, 0], [1, 0, 1], [0, 1, 0]]])
    c1, c2 = 1e-4, 9e-4
    means = (2 * 20 / 81 + c1) / (41 / 81 + c1)
    expected = means * (-2 * 5 / 18 + c2) / (2 * 5 / 18 + c2)
    np.testing.assert_allclose(verification.ssim(prediction, 1 - prediction, window=3), [[expected]], rtol=1e-5)


@pytest.mark.parametrize(("window", "data_range"), [(7, 1.0), (3, 1.0), (9, 255.0)])
def test_ssim_is_that_of_a_loop(window, data_range):
    prediction, truth = pairs(data_range)
    values = jax.jit(functools.partial(verification.ssim, window=window, data_range=data_range))(prediction, truth)
    assert values.shape == (2, 3)
    for n, t in np.ndindex(2, 3):
        channels = [ssim_by_loop(prediction[n, t, ..., c], truth[n, t, ..., c], window, data_range) for c in (0, 1)]
        np.testing.assert_allclose(values[n, t], np.mean(channels), rtol=2e-5)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_is_that_of_scikit_image(data_range):
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    prediction, truth = pairs(data_range)
    values = jax.jit(functools.partial(verification.ssim, data_range=data_range))(prediction, truth)
    for n, t in np.ndindex(2, 3):
        expected = metrics.structural_similarity(prediction[n, t], truth[n, t], data_range=data_range, channel_axis=-1)
        np.testing.assert_allclose(values[n, t], expected, rtol=2e-5)


def test_equal_frames_are_similar_to_one():
    for x in (random_frames(), np.zeros((2, 3, 9, 12, 2), np.float32), np.ones((2, 3, 9, 12, 2), np.float32)):
        np.testing.assert_allclose(verification.ssim(x, x), np.ones((2, 3)), rtol=1e-5)
    # Black for white: what is left are the constants.
    np.testing.assert_allclose(verification.ssim(x, 0 * x), np.full((2, 3), 1e-4 / (1 + 1e-4)), rtol=1e-3)


def test_windows_that_do_not_exist_are_refused():
    x = random_frames()
    for window in (1, 4, 11):
        with pytest.raises(ValueError, match=f"window {window} for frames of 9x12: give an odd number from 3"):
            verification.ssim(x, x, window=window)


def test_persistence_repeats_the_last_frame():
    last = random_frames((2, 4, 5, 1))
    forecast = verification.persistence(last, 3)
    assert forecast.shape == (2, 3, 4, 5, 1)
    for t in range(3):
        np.testing.assert_array_equal(forecast[:, t], last)


MEASURES = {
    "cross_entropy": verification.cross_entropy,
    "squared_error": verification.squared_error,
    "ssim": verification.ssim,
    "csi": lambda p, t: verification.csi(verification.contingency(p, t, threshold=0.5)),
    "correlation": lambda p, t: verification.correlation(verification.correlation_sums(p, t)),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())
def test_each_sequence_and_lead_time_for_itself_compiled_or_not(measure):
    prediction, truth = random_frames(), random_frames(seed=1)
    values = jax.jit(measure)(prediction, truth)
    assert values.shape == (2, 3) and len(np.unique(values)) > 3
    np.testing.assert_allclose(measure(prediction, truth), values, rtol=1e-6, atol=1e-6)
    one = jax.jit(jax.vmap(jax.vmap(lambda p, t: measure(p[None, None], t[None, None])[0, 0])))
    np.testing.assert_allclose(one(prediction, truth), values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())
def test_other_shapes_and_types_are_refused(measure):
    x = random_frames()
    for p, t in [(x[0], x[0]), (x, x[:, :1]), (x, np.uint8(255 * x))]:
        with pytest.raises(AssertionError):
            measure(p, t)


def test_a_mask_that_does_not_fit_is_refused():
    for valid in (jnp.ones((2, 2), bool), jnp.ones((2, 2, 1))):
        with pytest.raises(AssertionError):
            verification.squared_error(FORECAST, RAIN, valid=valid)
