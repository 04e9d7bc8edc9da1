"""Gradients at the hidden states: against a product of Jacobians by hand, vanishing where it must, and kept whole."""

import jax
import jax.numpy as jnp
import numpy as np

from research.analysis.time_signal import state_gradient_norms
from research.models.recurrent import CELLS, Recurrent

BATCH, TIME, INPUTS, N = 3, 9, 2, 4
X = np.random.default_rng(0).standard_normal((BATCH, TIME, INPUTS)).astype(np.float32)


def last_sum(params, outputs):
    return outputs[:, -1].sum()


def start(cell, *seeds):
    """A layer, and its parameters for each seed."""
    layer = Recurrent(CELLS[cell](), N)
    init = jax.jit(jax.vmap(lambda key: layer.init(key, X)["params"]))
    return layer, init(jnp.stack([jax.random.key(seed) for seed in seeds]))


def by_hand(params, gradient):
    """Norms of a tanh layer by the product of its Jacobians, from the gradient at the last outputs."""
    kernel = np.asarray(params["recurrent_kernel"], np.float64)
    states = np.asarray(Recurrent(CELLS["tanh"](), N).apply({"params": params}, X)[1], np.float64)
    expected = [np.linalg.norm(gradient, axis=1).mean()]
    for t in range(TIME - 1, 0, -1):
        gradient = (gradient * (1 - states[:, t] ** 2)) @ kernel.T
        expected.insert(0, np.linalg.norm(gradient, axis=1).mean())
    return expected


def of_seed(params, seed):
    return jax.tree.map(lambda leaf: leaf[seed], params)


def test_a_vanilla_networks_gradient_is_the_product_of_its_jacobians():
    layer, params = start("tanh", 0, 1)
    found = state_gradient_norms(layer, params, X, last_sum)
    expected = [by_hand(of_seed(params, seed), np.ones((BATCH, N))) for seed in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert not np.allclose(*found, rtol=0.01)  # seeds differ


def test_the_loss_may_be_that_of_a_head_of_each_seed():
    layer, params = start("tanh", 0, 1)
    heads = np.random.default_rng(1).standard_normal((2, N)).astype(np.float32)
    model = {"stack": {"layer1": params}, "head": {"kernel": heads}}
    found = state_gradient_norms(
        layer,
        model,
        X,
        lambda params, outputs: (outputs[:, -1] @ params["head"]["kernel"]).sum(),
        of_layer=lambda params: params["stack"]["layer1"],
    )
    expected = [by_hand(of_seed(params, seed), np.tile(heads[seed], (BATCH, 1))) for seed in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_small_weights_vanish_and_an_identity_of_relus_does_not():
    layer, params = start("tanh", 0)
    small = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    (norms,) = state_gradient_norms(layer, small, X, last_sum)
    assert norms[0] < norms[-1] * 0.5 ** (TIME - 1)  # the kernel was orthogonal: at most a half a step
    layer, params = start("irnn", 0)
    positive = jax.tree.map(np.abs, params)  # every unit stays on: the product is that of identities
    np.testing.assert_allclose(state_gradient_norms(layer, positive, np.abs(X), last_sum), 2.0, rtol=1e-6)


def test_gradients_go_backward_in_time_only():
    layer, params = start("gru", 0)
    (norms,) = state_gradient_norms(layer, params, X, lambda params, outputs: jnp.square(outputs[:, 4]).sum())
    assert all(norm > 0 for norm in norms[:5]) and norms[5:] == [0.0] * 4
