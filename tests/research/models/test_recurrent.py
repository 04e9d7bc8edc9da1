"""Recurrent layers: published parameter counts, initial values, masks and directions in batch-major order."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models.recurrent import CELLS, Recurrent, gru, lstm, vanilla
from research.ops import recurrent

BATCH, TIME, INPUTS, N = 3, 7, 5, 4
X = np.random.default_rng(0).standard_normal((BATCH, TIME, INPUTS)).astype(np.float32)
LENGTHS = np.array([7, 3, 5])
MASK = np.arange(TIME) < LENGTHS[:, None]
KINDS = {name: constructor() for name, constructor in CELLS.items()} | {
    "lstm, peepholes": lstm(peepholes=True),
    "lstm, Goodfellow": lstm(candidate="sigmoid"),
    "gru, before": gru("before"),
}
each = pytest.mark.parametrize("name", KINDS)


def count(cell, units, inputs, use_bias):
    layer = Recurrent(cell, units, use_bias=use_bias)
    shapes = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x), jnp.zeros((1, 1, inputs)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("cell", "units", "speech"),
    [(lstm(peepholes=True), 195, 169_065), (gru("before"), 227, 168_888), (vanilla(), 400, 168_400)],
    ids=["lstm", "gru", "tanh"],
)
def test_parameter_counts_of_the_speech_networks(cell, units, speech):
    """Chung et al. 2014, Table 1: 169.1, 168.9 and 168.4 thousand, of 20 inputs, with biases."""
    assert count(cell, units, 20, use_bias=True) == speech


@pytest.mark.parametrize(
    ("cell", "units", "music"),
    [(lstm(peepholes=True), 36, 19_764), (gru("before"), 46, 20_217), (vanilla(), 100, 20_050)],
    ids=["lstm", "gru", "tanh"],
)
def test_parameter_counts_of_the_music_networks(cell, units, music):
    """Table 1: 19.8, 20.2 and 20.1 thousand, without biases; of 100.5 inputs, the mean over the four sets."""
    assert (count(cell, units, 100, use_bias=False) + count(cell, units, 101, use_bias=False)) / 2 == music


@each
def test_every_parameter_has_a_gradient_and_its_own_start(name):
    layer = Recurrent(KINDS[name], N)
    variables = layer.init(jax.random.key(0), X)
    # Away from the start, where biases and peepholes are zero and states too.
    random = np.random.default_rng(1)
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * random.standard_normal(leaf.shape), variables)
    weights = random.standard_normal((BATCH, TIME, N))
    gradients = jax.grad(lambda v: (layer.apply(v, X)[1] * weights).sum())(moved)["params"]
    for leaf in jax.tree.leaves(gradients):
        assert (leaf != 0).mean() > 0.9
    kernel = variables["params"]["recurrent_kernel"]
    for block in np.split(np.asarray(kernel), KINDS[name].gates, axis=-1):
        np.testing.assert_allclose(block @ block.T, np.eye(N), atol=1e-5)  # orthogonal, each gate's
        if name == "irnn":
            np.testing.assert_array_equal(block, np.eye(N))
    np.testing.assert_array_equal(variables["params"]["bias"], 0)


@each
def test_a_mask_ends_a_sequence(name):
    layer = Recurrent(KINDS[name], N)
    variables = layer.init(jax.random.key(0), X)
    last, outputs = layer.apply(variables, X, mask=jnp.asarray(MASK))
    assert outputs.shape == (BATCH, TIME, N)
    for n, length in enumerate(LENGTHS):
        end, alone = layer.apply(variables, X[n : n + 1, :length])
        np.testing.assert_allclose(outputs[n, :length], alone[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(outputs[n, length:], 0)
        for one, two in zip(jax.tree.leaves(last), jax.tree.leaves(end), strict=True):
            np.testing.assert_allclose(one[n], two[0], rtol=1e-5, atol=1e-6)


def test_reverse_reads_the_flipped_sequence_and_a_carry_goes_on():
    forward, backward = (Recurrent(KINDS["lstm"], N, reverse=reverse) for reverse in (False, True))
    variables = forward.init(jax.random.key(0), X)
    _, outputs = backward.apply(variables, X)
    _, flipped = forward.apply(variables, X[:, ::-1])
    np.testing.assert_array_equal(outputs, flipped[:, ::-1])
    carry, first = forward.apply(variables, X[:, :4])
    _, second = forward.apply(variables, X[:, 4:], carry)
    _, whole = forward.apply(variables, X)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-5, atol=1e-6)


def test_a_layer_is_its_cell_step_by_step():
    layer = Recurrent(KINDS["lstm, peepholes"], N)
    variables = layer.init(jax.random.key(0), X)
    params = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])
    carry = recurrent.LSTMCarry(jnp.zeros((BATCH, N)), jnp.zeros((BATCH, N)))
    holes = recurrent.Peepholes(*(params[f"peephole_{gate}"] for gate in "ifo"))
    expected = []
    for t in range(TIME):
        a = X[:, t] @ params["input_kernel"] + params["bias"]
        r = carry.h @ params["recurrent_kernel"]
        carry = recurrent.lstm_step(carry, a, r, forget_bias=1.0, peepholes=holes)
        expected.append(carry.h)
    last, outputs = layer.apply({"params": params}, X)
    np.testing.assert_allclose(outputs, jnp.stack(expected, axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last.c, carry.c, rtol=1e-5, atol=1e-6)


@each
def test_few_inputs_are_as_many_inputs_of_which_most_are_zero(name):
    """The product with few inputs is made inside the loop."""
    layer = Recurrent(KINDS[name], N, reverse=name == "tanh")
    padding = ((0, 0), (0, 0), (0, INPUTS - 2))
    random = np.random.default_rng(2)
    starts, nudge = random.random((BATCH, TIME)) < 0.3, random.standard_normal((BATCH, TIME, N)).astype(np.float32)
    params = layer.init(jax.random.key(0), X[..., :2])["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)

    def loss(params, x, nudge):
        _, outputs = layer.apply({"params": params}, x, mask=jnp.asarray(MASK), starts=starts, nudge=nudge)
        return (outputs * random_weights).sum(), outputs

    random_weights = random.standard_normal((BATCH, TIME, N)).astype(np.float32)
    few = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, X[..., :2], nudge)
    params["input_kernel"] = jnp.pad(params["input_kernel"], ((0, INPUTS - 2), (0, 0)))
    many = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, np.pad(X[..., :2], padding), nudge)
    many[0][0]["input_kernel"] = many[0][0]["input_kernel"][:2]
    many = ((many[0][0], many[0][1][..., :2], many[0][2]), many[1])
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5), few, many)
