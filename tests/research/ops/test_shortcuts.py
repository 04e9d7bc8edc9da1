"""Shortcuts: He et al. 2015, option A, pixel by pixel; the sums of He et al. 2016, section 3, by hand."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.shortcuts import exclusive_gating, scaled_sum, shortcut_only_gating, subsample_and_pad


def images(*shape):
    return np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)


def test_by_hand():
    x = jnp.asarray([[[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 10], [11, 12]]]], jnp.float32)  # 3x2 pixels, 2 channels
    y = subsample_and_pad(x, 4, (2, 2))
    np.testing.assert_array_equal(y, [[[[0, 1, 2, 0]], [[0, 9, 10, 0]]]])


@pytest.mark.parametrize(
    ("height", "width", "strides"), [(8, 8, (2, 2)), (7, 9, (2, 2)), (7, 7, (3, 3)), (5, 6, (2, 1)), (1, 1, (2, 2))]
)
@pytest.mark.parametrize("features", [3, 4, 6, 7])
def test_every_s_th_pixel_and_zeros_on_both_sides(height, width, strides, features):
    x = images(2, height, width, 3)
    y = np.asarray(subsample_and_pad(x, features, strides))
    before = (features - 3) // 2  # of an odd number the last zero is at the end
    assert y.shape == (2, -(-height // strides[0]), -(-width // strides[1]), features)
    for h, w in np.ndindex(y.shape[1:3]):
        np.testing.assert_array_equal(y[:, h, w, before : before + 3], x[:, strides[0] * h, strides[1] * w])
    assert not y[..., :before].any() and not y[..., before + 3 :].any()


def test_the_same_shape_is_the_identity():
    x = images(2, 4, 4, 3)
    np.testing.assert_array_equal(subsample_and_pad(x, 3, (1, 1)), x)


def test_the_gradient_is_one_at_the_pixels_read_and_zero_elsewhere():
    gradient = jax.grad(lambda x: subsample_and_pad(x, 6, (2, 2)).sum())(images(1, 5, 4, 3))
    expected = np.zeros((1, 5, 4, 3))
    expected[:, ::2, ::2] = 1
    np.testing.assert_array_equal(gradient, expected)


def test_it_has_no_parameters_and_keeps_the_type():
    assert list(inspect.signature(subsample_and_pad).parameters) == ["x", "features", "strides"]
    assert subsample_and_pad(jnp.ones((1, 4, 4, 2), jnp.bfloat16), 4, (2, 2)).dtype == jnp.bfloat16


def test_narrowing_and_other_ranks_are_refused():
    with pytest.raises(ValueError, match="cannot narrow 3 channels to 2"):
        subsample_and_pad(images(2, 4, 4, 3), 2, (1, 1))
    with pytest.raises(AssertionError):
        subsample_and_pad(images(4, 4, 3), 6, (2, 2))


# Joining a shortcut with its branch

SHORTCUT, BRANCH, GATE = (np.asarray(row, np.float32) for row in ([1, 2, -4, 8], [3, -5, 7, 1], [0, 0.25, 0.75, 1]))


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ((0.5, 0.5), [2, -1.5, 1.5, 4.5]),
        ((0.5, 1), [3.5, -4, 5, 5]),
        ((0, 1), BRANCH),  # the plain network
        ((1, 0), SHORTCUT),
        ((1, 1), [4, -3, 3, 9]),
    ],
)
def test_scaled_sums_by_hand(scales, expected):
    y = scaled_sum(SHORTCUT, BRANCH, shortcut_scale=scales[0], branch_scale=scales[1])
    np.testing.assert_array_equal(y, expected)


def test_gates_by_hand():
    """At g = 0 both are the shortcut's identity; at g = 1 both are F alone."""
    np.testing.assert_array_equal(exclusive_gating(SHORTCUT, BRANCH, GATE), [1, 0.25, 4.25, 1])
    np.testing.assert_array_equal(shortcut_only_gating(SHORTCUT, BRANCH, GATE), [4, -3.5, 6, 1])


@pytest.mark.parametrize(("function", "gates_branch"), [(exclusive_gating, True), (shortcut_only_gating, False)])
def test_gradients_of_the_gates_by_hand(function, gates_branch):
    """dy/dx = 1 - g, dy/dF = g or 1, dy/dg = F - x or -x."""
    got = jax.grad(lambda *arrays: function(*arrays).sum(), (0, 1, 2))(SHORTCUT, BRANCH, GATE)
    expected = [1 - GATE, GATE, BRANCH - SHORTCUT] if gates_branch else [1 - GATE, np.ones(4), -SHORTCUT]
    for ours, by_hand in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, by_hand)


@pytest.mark.parametrize(
    "join",
    [
        lambda shortcut, branch, gate: scaled_sum(shortcut, branch, shortcut_scale=1, branch_scale=1),
        exclusive_gating,
        shortcut_only_gating,
    ],
)
def test_nothing_is_broadcast_in_silence(join):
    """A gate of one channel, or a shortcut that was not brought into shape, is a mistake."""
    x = np.ones((2, 4, 4, 3), np.float32)
    join(x, x, x)
    with pytest.raises(AssertionError):
        join(x[..., :1], x, x)
    with pytest.raises(AssertionError):
        join(x, x[:1], x)
    if join in (exclusive_gating, shortcut_only_gating):
        with pytest.raises(AssertionError):
            join(x, x, x[..., :1])
