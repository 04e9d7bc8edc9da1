"""Gradients at the hidden states: against a product of Jacobians by hand, vanishing where it must, and kept whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.analysis.time_signal import state_gradient_norms
from research.models.recurrent import CELLS, Recurrent

BATCH, TIME, INPUTS, N = 3, 9, 2, 4
X = np.random.default_rng(0).standard_normal((BATCH, TIME, INPUTS)).astype(np.float32)


def last_sum(outputs):
    return outputs[:, -1].sum()


def start(cell, **options):
    layer = Recurrent(CELLS[cell](**options), N)
    return layer, layer.init(jax.random.key(0), X)


def test_a_vanilla_networks_gradient_is_the_product_of_its_jacobians():
    layer, variables = start("tanh")
    kernel = np.asarray(variables["params"]["recurrent_kernel"], np.float64)
    states = np.asarray(layer.apply(variables, X)[1], np.float64)
    gradient = np.ones((BATCH, N))
    expected = [np.linalg.norm(gradient, axis=1).mean()]
    for t in range(TIME - 1, 0, -1):
        gradient = (gradient * (1 - states[:, t] ** 2)) @ kernel.T
        expected.insert(0, np.linalg.norm(gradient, axis=1).mean())
    np.testing.assert_allclose(state_gradient_norms(layer, variables, X, last_sum), expected, rtol=1e-4)


def test_small_weights_vanish_and_an_identity_of_relus_does_not():
    layer, variables = start("tanh")
    small = jax.tree.map(lambda leaf: 0.5 * leaf, variables)
    norms = state_gradient_norms(layer, small, X, last_sum)
    assert norms[0] < norms[-1] * 0.5 ** (TIME - 1)  # the kernel was orthogonal: at most a half a step
    layer, variables = start("irnn")
    norms = state_gradient_norms(layer, variables, np.abs(X), lambda outputs: outputs[:, -1].sum())
    positive = jax.tree.map(np.abs, variables)  # every unit stays on: the product is that of identities
    np.testing.assert_allclose(state_gradient_norms(layer, positive, np.abs(X), last_sum), 2.0, rtol=1e-6)
    assert norms[-1] == pytest.approx(2.0)


def test_gradients_go_backward_in_time_only():
    layer, variables = start("gru")
    norms = state_gradient_norms(layer, variables, X, lambda outputs: jnp.square(outputs[:, 4]).sum())
    assert all(norm > 0 for norm in norms[:5]) and norms[5:] == [0.0] * 4
