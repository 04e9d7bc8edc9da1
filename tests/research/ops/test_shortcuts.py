"""The shortcut without parameters: He et al. 2015, option A, pixel by pixel."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.shortcuts import subsample_and_pad


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
