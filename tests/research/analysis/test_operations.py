"""Multiply-adds counted in jaxprs: grouped and strided convolutions, batched products, loops."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from research.analysis.operations import multiply_adds
from research.ops import conv


def test_products_count_their_contracted_axes():
    assert multiply_adds(jnp.matmul, jnp.ones((3, 4)), jnp.ones((4, 5))) == 3 * 4 * 5
    assert multiply_adds(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), jnp.ones((2, 3, 4)), jnp.ones((2, 5, 4))) == 120
    assert multiply_adds(lambda x: jnp.tanh(x) + x, jnp.ones(9)) == 0


def test_convolutions_count_kernel_elements_at_every_output():
    def conv(x, kernel, groups=1):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=dimensions, feature_group_count=groups
        )

    x = jnp.ones((2, 8, 8, 6))
    assert multiply_adds(conv, x, jnp.ones((3, 3, 6, 10))) == 2 * 4 * 4 * 10 * 9 * 6
    assert multiply_adds(lambda x, k: conv(x, k, 2), x, jnp.ones((3, 3, 3, 10))) == 2 * 4 * 4 * 10 * 9 * 3


def test_groups_count_their_own_channels_however_they_are_computed():
    x, kernel = jnp.ones((2, 8, 8, 64)), jnp.ones((3, 3, 2, 64))
    grouped = partial(conv.conv2d, strides=(2, 2), groups=32)
    assert multiply_adds(grouped, x, kernel) == 2 * 4 * 4 * 64 * 9 * 2
    loop = lambda x, kernels: lax.scan(lambda x, k: (conv.conv2d(x, k, groups=32), None), x, kernels)[0]  # noqa: E731
    assert multiply_adds(loop, x, jnp.ones((3, *kernel.shape))) == 3 * 2 * 8 * 8 * 64 * 9 * 2


def test_loops_count_as_often_as_they_run_and_calls_once():
    w = jnp.ones((4, 4))

    def loop(h):
        return lax.scan(lambda h, _: (jax.jit(jnp.matmul)(h, w), None), h, None, length=7)[0]

    assert multiply_adds(loop, jnp.ones((3, 4))) == 7 * 3 * 4 * 4
    assert multiply_adds(jax.checkpoint(loop), jnp.ones((3, 4))) == 7 * 3 * 4 * 4
    with pytest.raises(ValueError, match="inside while"):
        multiply_adds(lambda h: lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ w, h), jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="inside cond"):
        multiply_adds(lambda h: lax.cond(h.sum() > 0, lambda: h @ w, lambda: h), jnp.ones((3, 4)))
