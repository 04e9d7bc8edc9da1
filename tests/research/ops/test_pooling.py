"""Max-pooling: values against a loop, values and gradients against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.pooling import max_pool

# height, width, window, stride, padding
CASES = [
    (8, 8, 3, 2, 1),  # after the stem of the ImageNet networks
    (7, 9, 3, 2, 1),
    (7, 8, 3, 2, 0),
    (6, 6, 2, 2, 0),
    (5, 7, 3, 1, 1),
    (9, 9, 2, 3, 0),  # pixels between the windows are not read
    (5, 4, 5, 4, 2),
    (3, 3, 3, 1, 0),  # one output pixel
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def images(height, width, dtype=np.float32):
    """Negative, so that a zero outside the image would win."""
    return np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(dtype) - 10


def by_loop(x, window, stride, padding):
    batch, height, width, channels = x.shape
    sizes = [(size + 2 * padding - window) // stride + 1 for size in (height, width)]
    y = np.full((batch, *sizes, channels), -np.inf)
    for h, w, i, j in np.ndindex(*sizes, window, window):
        row, column = stride * h + i - padding, stride * w + j - padding
        if 0 <= row < height and 0 <= column < width:
            y[:, h, w] = np.maximum(y[:, h, w], x[:, row, column])
    return y


@cases
def test_values_equal_a_loop(case):
    height, width, window, stride, padding = case
    x = images(height, width)
    y = max_pool(x, window=window, stride=stride, padding=padding)
    np.testing.assert_array_equal(y, by_loop(x, window, stride, padding))


@cases
def test_values_and_gradients_equal_pytorchs(case):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra [bench])")
    height, width, window, stride, padding = case
    x = images(height, width)
    torch_x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_(True)
    torch_y = torch.nn.functional.max_pool2d(torch_x, window, stride, padding)
    weights = np.random.default_rng(1).standard_normal(torch_y.shape).astype(np.float32)
    (torch_y * torch.from_numpy(weights)).sum().backward()

    def loss(x):
        y = max_pool(x, window=window, stride=stride, padding=padding)
        return (y * weights.transpose(0, 2, 3, 1)).sum(), y

    gradient, y = jax.grad(loss, has_aux=True)(x)
    np.testing.assert_array_equal(y, torch_y.detach().numpy().transpose(0, 2, 3, 1))
    # A pixel may win several windows: sums of up to nine weights, in another order.
    np.testing.assert_allclose(gradient, torch_x.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


def test_the_gradient_is_at_the_largest_pixel_alone():
    x = jnp.asarray([[1, 2, 5, 6], [3, 4, 8, 7]], jnp.float32).reshape(1, 2, 4, 1)
    gradient = jax.grad(lambda x: (max_pool(x, window=2, stride=2) * jnp.asarray([10, 20]).reshape(1, 1, 2, 1)).sum())(
        x
    )
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[0, 0, 0, 0], [0, 10, 20, 0]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_keeps_the_type(dtype):
    assert max_pool(jnp.ones((1, 4, 4, 2), dtype), window=3, stride=2, padding=1).dtype == dtype


def test_other_ranks_are_refused():
    with pytest.raises(AssertionError):
        max_pool(jnp.ones((4, 4, 3)), window=2, stride=2)


@cases
def test_of_equal_values_the_first_takes_the_gradient_as_in_xla(case):
    height, width, window, stride, padding = case
    x = np.random.default_rng(0).integers(-1, 1, (2, height, width, 3)).astype(np.float32)

    def by_xla(x):
        sides, once = (padding, padding), (1, window, window, 1)
        pads = ((0, 0), sides, sides, (0, 0))
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, once, (1, stride, stride, 1), pads)

    def gradient(function):
        y, pull_back = jax.vjp(function, x)
        return pull_back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))[0]

    ours = gradient(lambda x: max_pool(x, window=window, stride=stride, padding=padding))
    np.testing.assert_allclose(ours, gradient(by_xla), rtol=1e-6)


def test_nan_wins_wherever_it_stands():
    for place in np.ndindex(2, 2):
        x = np.ones((1, 2, 2, 1), np.float32)
        x[0, *place, 0] = np.nan
        assert np.isnan(max_pool(x, window=2, stride=2))
