"""Initialisers: the law they promise, within bounds computed from n, and the bits of the plain way of drawing them."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from research.ops.initializers import he_normal

SHAPES = [((3, 3, 16, 32), 144), ((7, 7, 3, 64), 147), ((1, 1, 64, 128), 64), ((64, 100), 64)]


@pytest.mark.parametrize(("shape", "fan_in"), SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_weights_are_normal_with_variance_2_over_fan_in(shape, fan_in, seed):
    w = np.asarray(he_normal(jax.random.key(seed), shape), np.float64)
    assert w.shape == shape
    n, variance = w.size, 2 / fan_in
    # Standard errors of the mean and of the variance of n normal numbers; 4 of them are passed once in 16,000 times.
    assert abs(w.mean()) < 4 * math.sqrt(variance / n)
    assert abs(w.var() - variance) < 4 * variance * math.sqrt(2 / n)
    assert scipy.stats.kstest(w.ravel() / math.sqrt(variance), "norm").pvalue > 0.001
    # The same along every axis: each slice's variance, the smallest n of them.
    for axis in range(w.ndim):
        slices = np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
        assert np.abs(slices.var(axis=1) / variance - 1).max() < 5.5 * math.sqrt(2 / slices.shape[1])


# Whole vectors of 8 numbers: in what is left over, XLA may round the last bit in another way.
@pytest.mark.parametrize(("shape", "fan_in"), [((3, 3, 3, 16), 27), ((64, 10), 64)])
def test_the_bits_are_those_of_drawing_in_the_shape_itself(shape, fan_in):
    def drawn_in_its_shape(key):
        return jax.random.normal(key, shape) * jnp.sqrt(jnp.float32(2 / fan_in))

    key = jax.random.key(3)
    np.testing.assert_array_equal(he_normal(key, shape), drawn_in_its_shape(key))
    # Compiled, both have the constants of the two products folded into one.
    np.testing.assert_array_equal(jax.jit(partial(he_normal, shape=shape))(key), jax.jit(drawn_in_its_shape)(key))


def test_the_key_decides():
    first, again, other = (he_normal(jax.random.key(seed), (3, 3, 4, 4)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.isin(first, other).any()


def test_the_type_is_the_one_asked_for():
    for dtype in (jnp.float32, jnp.bfloat16):
        assert he_normal(jax.random.key(0), (3, 3, 2, 2), dtype).dtype == dtype
