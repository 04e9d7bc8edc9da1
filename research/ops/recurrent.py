"""Recurrent cells as single-step pure functions: what one step computes, and nothing about time.

A step takes the carry, the input's share `a` of the pre-activations and the hidden state's share `r`,

    a = x W + b  [batch, gates n]        r = h U  [batch, gates n]

and gives the new carry. Both products are made outside (`research.ops.recurrence`): the first for all times at once,
the second step by step, so that its weight gradient is one product. Cells that multiply by U inside the step (the reset
gate before the product) take `h` and U instead. Gate blocks lie beside each other along the last axis, in the order
that each docstring gives.

Everything that a step does itself is elementwise, so `[batch, n]` may be `[batch, height, width, n]` everywhere: with
convolutions for the products, `a = W * x + b` and `r = U * h`, the LSTM is the ConvLSTM of Shi et al. 2015 and the GRU
the ConvGRU of Ballas et al. 2016 (reset before) and Shi et al. 2017 (reset after). What reaches the cell state through
a 1 x 1 map stays there, as in the LSTM; a state-to-state kernel above 1 x 1 lets it wander.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

Activation = Callable[[jax.Array], jax.Array]
Product = Callable[[jax.Array, jax.Array], jax.Array]


class LSTMCarry(NamedTuple):
    """Hidden state and cell state, `[batch, n]` each."""

    h: jax.Array
    c: jax.Array


class Peepholes(NamedTuple):
    """Diagonal weights from the cell to the input, forget and output gates: `[n]`, or `[height, width, n]` on a map."""

    i: jax.Array
    f: jax.Array
    o: jax.Array


def vanilla_step(h: jax.Array, a: jax.Array, r: jax.Array, *, activation: Activation = jnp.tanh) -> jax.Array:
    """Elman's unit: h' = act(a + r); with ReLU and U = I at initialisation it is the IRNN.

    Args:
      h: hidden state `[batch, n]` (its value is in r already).
      a, r: `[batch, n]`.
      activation: tanh, or ReLU.

    Source: Goodfellow et al. 2016, equations 10.8 and 10.9; Le et al. 2015 (IRNN).
    """
    chex.assert_equal_shape([h, a, r])
    return activation(a + r)


def leaky_step(
    h: jax.Array, a: jax.Array, r: jax.Array, *, leak: float, activation: Activation = jnp.tanh
) -> jax.Array:
    """Leaky unit: h' = alpha h + (1 - alpha) act(a + r), of time constant 1 / (1 - alpha) steps.

    Args:
      h: hidden state `[batch, n]`.
      a, r: `[batch, n]`.
      leak: alpha in [0, 1): 0 is the vanilla unit, near 1 the state is almost kept.
      activation: of the candidate.

    Source: Goodfellow et al. 2016, section 10.9.2; Jaeger et al. 2007.
    """
    chex.assert_equal_shape([h, a, r])
    return leak * h + (1 - leak) * activation(a + r)


def lstm_step(
    carry: LSTMCarry,
    a: jax.Array,
    r: jax.Array,
    *,
    forget_bias: float = 0.0,
    peepholes: Peepholes | None = None,
    candidate: Activation = jnp.tanh,
) -> LSTMCarry:
    """Long short-term memory; gate blocks i, f, g, o.

        i = sigmoid(a_i + r_i + p_i c)        f = sigmoid(a_f + r_f + p_f c + forget_bias)
        g = candidate(a_g + r_g)              c' = f c + i g
        o = sigmoid(a_o + r_o + p_o c')       h' = o tanh(c')

    With f = 1 and i = 0 the cell is a constant error carousel: dc'/dc is exactly 1.

    Args:
      carry: h and c, `[batch, n]` each.
      a, r: `[batch, 4 n]`.
      forget_bias: added to the forget gate, on top of any bias in a.
      peepholes: the terms p c; None for none (Graves 2013 and FC-LSTM have them, Zaremba et al. 2014 and PyTorch not).
      candidate: tanh as usual; sigmoid is the form of Goodfellow et al. 2016, equation 10.41.

    Source: Hochreiter and Schmidhuber 1997; Gers et al. 2000 (forget gate), 2002 (peepholes); Shi et al. 2015, equation
    3, on maps. That equation writes the peepholes as a Hadamard product, which reads as a weight for every position;
    the parameter counts of the paper's Table 1 are met by one for every channel.
    """
    chex.assert_equal_shape([a, r])
    chex.assert_shape([a], (*carry.c.shape[:-1], 4 * carry.c.shape[-1]))
    i, f, g, o = jnp.split(a + r, 4, axis=-1)
    if peepholes is not None:
        i, f = i + peepholes.i * carry.c, f + peepholes.f * carry.c
    c = jax.nn.sigmoid(f + forget_bias) * carry.c + jax.nn.sigmoid(i) * candidate(g)
    if peepholes is not None:
        o = o + peepholes.o * c
    return LSTMCarry(jax.nn.sigmoid(o) * jnp.tanh(c), c)


def fused_lstm_step(carry: LSTMCarry, a: jax.Array, r: jax.Array, *, forget_bias: float = 0.0) -> LSTMCarry:
    """`lstm_step` without peepholes, all gates as one; to be differentiated in reverse mode alone.

    The backward pass keeps the gates `[batch, 4 n]` and both cell states, where that of `lstm_step` keeps each factor
    of each product (`SPEED.md` beside this file).
    """
    chex.assert_equal_shape([a, r])
    chex.assert_shape([a], (*carry.c.shape[:-1], 4 * carry.c.shape[-1]))
    return LSTMCarry(*_fused_lstm(a + r + forget_bias * _gate(1, carry.c), carry.c))


def _gate(k, c):
    """`[4 n]`: one in the block of gate k, zero elsewhere."""
    return np.repeat(np.arange(4) == k, c.shape[-1]).astype(c.dtype)


@jax.custom_vjp
def _fused_lstm(z, c):
    return _fused_lstm_forward(z, c)[0]


def _fused_lstm_forward(z, c):
    # sigmoid(z) = (1 + tanh(z / 2)) / 2: one tanh for all gates beside each other.
    scale = 0.5 + 0.5 * _gate(2, c)
    gates = scale * jnp.tanh(scale * z) + (1 - scale)
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    new = f * c + i * g
    return (o * jnp.tanh(new), new), (gates, c, new)


def _fused_lstm_backward(saved, gradients):
    """With t = tanh(c') and dc = dL/dc' + dL/dh' o (1 - t^2), the gradient of c is f dc, and those of z

    dc g i (1 - i)        dc c f (1 - f)        dc i (1 - g^2)        dL/dh' t o (1 - o)
    """
    (gates, c, new), (dh, dc) = saved, gradients
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    t = jnp.tanh(new)
    dc = dc + dh * o * (1 - t * t)
    dz = [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * t * o * (1 - o)]
    return jnp.concatenate(dz, axis=-1), dc * f


_fused_lstm.defvjp(_fused_lstm_forward, _fused_lstm_backward)


def gru_reset_after_step(h: jax.Array, a: jax.Array, r: jax.Array, *, bias: jax.Array | float = 0.0) -> jax.Array:
    """Gated recurrent unit with the reset gate after the product, as cuDNN, PyTorch and Keras; gate blocks z, s, g.

        z = sigmoid(a_z + r_z)        s = sigmoid(a_s + r_s)
        g = tanh(a_g + s (r_g + bias))        h' = (1 - z) h + z g

    z = 0 copies the state (the convention of Cho et al. 2014b and Chung et al. 2014; in PyTorch's, 1 - z stands for z).

    Args:
      h: hidden state `[batch, n]`.
      a, r: `[batch, 3 n]`.
      bias: of r_g, `[n]`; it cannot be moved into a, since the reset gate multiplies it.
    """
    chex.assert_equal_shape([a, r])
    chex.assert_shape([a], (*h.shape[:-1], 3 * h.shape[-1]))
    (a_z, a_s, a_g), (r_z, r_s, r_g) = (jnp.split(x, 3, axis=-1) for x in (a, r))
    z, s = jax.nn.sigmoid(a_z + r_z), jax.nn.sigmoid(a_s + r_s)
    return (1 - z) * h + z * jnp.tanh(a_g + s * (r_g + bias))


def gru_reset_before_step(h: jax.Array, a: jax.Array, kernel: jax.Array, *, product: Product = jnp.matmul) -> jax.Array:
    """Gated recurrent unit with the reset gate before the product; gate blocks z, s, g.

        z = sigmoid(a_z + h U_z)        s = sigmoid(a_s + h U_s)
        g = tanh(a_g + (s h) U_g)       h' = (1 - z) h + z g

    Args:
      h: hidden state `[batch, n]`.
      a: `[batch, 3 n]`.
      kernel: U `[n, 3 n]`.
      product: `(h, U) -> h U`.

    Source: Cho et al. 2014; Chung et al. 2014, equations 5 to 8; Ballas et al. 2016 (GRU-RCN), on maps.
    """
    n = h.shape[-1]
    chex.assert_shape([a, kernel], [(*h.shape[:-1], 3 * n), (..., n, 3 * n)])
    z, s = jnp.split(jax.nn.sigmoid(a[..., : 2 * n] + product(h, kernel[..., : 2 * n])), 2, axis=-1)
    g = jnp.tanh(a[..., 2 * n :] + product(s * h, kernel[..., 2 * n :]))
    return (1 - z) * h + z * g


def minimal_gated_step(h: jax.Array, a: jax.Array, kernel: jax.Array, *, product: Product = jnp.matmul) -> jax.Array:
    """Minimal gated unit, one gate for both reset and update; gate blocks f, g.

        f = sigmoid(a_f + h U_f)        g = tanh(a_g + (f h) U_g)        h' = (1 - f) h + f g

    Args:
      h: hidden state `[batch, n]`.
      a: `[batch, 2 n]`.
      kernel: U `[n, 2 n]`.
      product: `(h, U) -> h U`.

    Source: Zhou et al. 2016, "Minimal Gated Unit for Recurrent Neural Networks", equations 10 to 12.
    """
    n = h.shape[-1]
    chex.assert_shape([a, kernel], [(*h.shape[:-1], 2 * n), (..., n, 2 * n)])
    f = jax.nn.sigmoid(a[..., :n] + product(h, kernel[..., :n]))
    g = jnp.tanh(a[..., n:] + product(f * h, kernel[..., n:]))
    return (1 - f) * h + f * g
