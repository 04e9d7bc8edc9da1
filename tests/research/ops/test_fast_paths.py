"""The fast paths equal the plain ones on shapes that hypothesis draws: odd sizes, batch 1, one channel, any stride."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax import lax

from research.models import recurrent as layers
from research.ops import conv, recurrent

pytestmark = pytest.mark.usefixtures("quick_compilation")
# The same examples every time, and none made smaller: compiling one takes a second.
drawn = partial(
    settings,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def convolutions(draw):
    small = st.integers(1, 4)
    groups, channels, features = draw(st.sampled_from([1, 1, 2, 3, 8])), draw(small), draw(small)
    window = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (7, 7), (1, 3), (4, 2)]))
    strides = draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 3)]))
    size = [draw(st.integers(k, k + 6)) for k in window]
    half = [(k // 2, k // 2) for k in window]
    padding = draw(st.sampled_from(["SAME", "VALID", half]))
    x = (draw(st.sampled_from([1, 2, 3, 4, 6])), *size, groups * channels)
    return x, (*window, channels, groups * features), strides, padding, groups


@drawn(max_examples=40)
@given(convolutions(), st.sampled_from([0, 1 << 10, 1 << 22]), st.booleans())
def test_convolution_and_its_gradients_are_xlas(case, block_bytes, wide):
    x_shape, kernel_shape, strides, padding, groups = case
    random = np.random.default_rng(0)
    x, kernel = (random.standard_normal(shape).astype(np.float32) for shape in (x_shape, kernel_shape))

    def by_xla(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    def pulled(function, x, kernel):
        y, pull_back = jax.vjp(function, x, kernel)
        return y, *pull_back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "_BLOCK_BYTES", block_bytes)
        patch.setattr(conv, "_WIDE", 0 if wide else 1 << 30)
        ours = partial(conv.conv2d, strides=strides, padding=padding, groups=groups)
        got = jax.jit(lambda x, kernel: pulled(ours, x, kernel))(x, kernel)
    with jax.enable_x64(True):
        expected = jax.device_get(pulled(by_xla, x.astype(np.float64), kernel.astype(np.float64)))
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(np.asarray(a) - b).max() <= 1e-5 * max(np.abs(b).max(), 1e-3)


@drawn(max_examples=12)
@given(*[st.integers(1, 6)] * 4, st.sampled_from(["lstm", "gru"]), st.booleans())
def test_recurrent_layers_and_their_gradients_are_those_of_steps_in_a_python_loop(time, batch, inputs, n, kind, masked):
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        cell = layers.CELLS[kind]()
        layer = layers.Recurrent(cell, n)
        x = jnp.asarray(random.standard_normal((batch, time, inputs)))
        mask = jnp.asarray(np.arange(time) < random.integers(1, time + 1, (batch, 1))) if masked else None
        params = layer.init(jax.random.key(0), x)["params"]
        params = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape)), params)

        def plain_step(params, carry, a, r):
            if kind == "lstm":
                return recurrent.lstm_step(carry, a, r, forget_bias=1.0)
            return recurrent.gru_reset_after_step(carry, a, r, bias=params["reset_bias"])

        def loop(params, x):
            carry, outputs = cell.initial(batch, n), []
            for t in range(time):
                a = x[:, t] @ params["input_kernel"] + params["bias"]
                r = cell.hidden(carry) @ params["recurrent_kernel"]
                new = plain_step(params, carry, a, r)
                keep = jnp.ones((batch, 1), bool) if mask is None else mask[:, t, None]
                carry = jax.tree.map(lambda new, old, keep=keep: jnp.where(keep, new, old), new, carry)
                outputs.append(jnp.where(keep, cell.hidden(new), 0))
            return carry, jnp.stack(outputs, axis=1)

        def total(function, params, x):
            return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(function(params, x)))

        def ours(params, x):
            return layer.apply({"params": params}, x, mask=mask)

        for function in (lambda f: f(params, x), lambda f: jax.grad(partial(total, f), (0, 1))(params, x)):
            got, expected = function(jax.jit(ours)), function(loop)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), got, expected)
