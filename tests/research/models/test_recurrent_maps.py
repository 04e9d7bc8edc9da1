"""Recurrent layers on maps: ConvLSTM and ConvGRU against a loop written with SciPy, receptive fields, FC-LSTM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from research.models.recurrent import CELLS, Recurrent, gru, irnn, lstm, mgu, vanilla

BATCH, TIME, HEIGHT, WIDTH, INPUTS, N = 2, 4, 5, 6, 3, 2
X = np.random.default_rng(0).standard_normal((BATCH, TIME, HEIGHT, WIDTH, INPUTS))
KINDS = {
    "tanh": vanilla(),
    "lstm": lstm(),
    "lstm, peepholes": lstm(peepholes=True),
    "lstm, peepholes by position": lstm(peepholes=True, by_position=True),
    "gru, after": gru(),
    "gru, before": gru("before"),
    "mgu": mgu(),
}
each = pytest.mark.parametrize("name", KINDS)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def variables_of(layer, x=X, scale=0.5):
    """Away from the start, where biases and peepholes are zero."""
    random = np.random.default_rng(1)
    with jax.enable_x64(False):  # parameters are drawn in single precision
        shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.zeros(x.shape)))
    return jax.tree.map(lambda leaf: scale * random.standard_normal(leaf.shape), shapes)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def convolved(x, kernel):
    """Same-size correlation with zeros outside, by SciPy: x `[batch, h, w, in]`, kernel `[k, k, in, out]`."""
    return np.stack(
        [
            np.stack(
                [
                    sum(scipy.signal.correlate2d(one[..., i], kernel[..., i, o], "same") for i in range(x.shape[-1]))
                    for o in range(kernel.shape[-1])
                ],
                axis=-1,
            )
            for one in x
        ]
    )


def by_hand(name, weights, x):
    """The equations of Shi et al. 2015 (3), Shi et al. 2017 and Ballas et al. 2016, a frame at a time."""
    kernel, inner, bias = (weights[key] for key in ("input_kernel", "recurrent_kernel", "bias"))
    h = c = np.zeros((*x.shape[:1], *x.shape[2:4], N))
    outputs = []
    for t in range(x.shape[1]):
        a = convolved(x[:, t], kernel) + bias
        if name == "tanh":
            h = np.tanh(a + convolved(h, inner))
        elif name.startswith("lstm"):
            i, f, g, o = np.split(a + convolved(h, inner), 4, axis=-1)
            holes = [weights.get(f"peephole_{gate}", 0) for gate in "ifo"]
            c_new = sigmoid(f + 1 + holes[1] * c) * c + sigmoid(i + holes[0] * c) * np.tanh(g)
            h, c = sigmoid(o + holes[2] * c_new) * np.tanh(c_new), c_new
        elif name == "gru, after":
            (a_z, a_s, a_g), (r_z, r_s, r_g) = (np.split(p, 3, axis=-1) for p in (a, convolved(h, inner)))
            z = sigmoid(a_z + r_z)
            h = (1 - z) * h + z * np.tanh(a_g + sigmoid(a_s + r_s) * (r_g + weights["reset_bias"]))
        elif name == "gru, before":
            z, s = np.split(sigmoid(a[..., : 2 * N] + convolved(h, inner[..., : 2 * N])), 2, axis=-1)
            h = (1 - z) * h + z * np.tanh(a[..., 2 * N :] + convolved(s * h, inner[..., 2 * N :]))
        else:
            f = sigmoid(a[..., :N] + convolved(h, inner[..., :N]))
            h = (1 - f) * h + f * np.tanh(a[..., N:] + convolved(f * h, inner[..., N:]))
        outputs.append(h)
    return np.stack(outputs, axis=1)


@each
def test_values_are_those_of_the_equations(name):
    layer = Recurrent(KINDS[name], N, kernels=(5, 3))
    variables = variables_of(layer)
    with jax.enable_x64(True):
        last, outputs = layer.apply(variables, X)
    np.testing.assert_allclose(outputs, by_hand(name, variables["params"], X), rtol=1e-9, atol=1e-10)
    np.testing.assert_array_equal(KINDS[name].hidden(last), outputs[:, -1])


@each
def test_gradients_are_finite_differences(name):
    layer = Recurrent(KINDS[name], N, kernels=(3, 3))
    x = X[:1, :3, :4, :3]
    weights = np.random.default_rng(2).standard_normal((1, 3, 4, 3, N))
    with jax.enable_x64(True):
        variables = variables_of(layer, x)
        value = jax.jit(lambda v, x: (layer.apply(v, x)[1] * weights).sum())
        gradients = jax.jit(jax.grad(value, (0, 1)))(variables, x)
        random = np.random.default_rng(3)
        for _ in range(3):
            way = jax.tree.map(lambda leaf: random.standard_normal(np.shape(leaf)), (variables, x))
            moved = [jax.tree.map(lambda p, d, s=s: p + s * d, (variables, x), way) for s in (1e-6, -1e-6)]
            slope = (value(*moved[0]) - value(*moved[1])) / 2e-6
            along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradients, way)))
            np.testing.assert_allclose(along, slope, rtol=1e-6)
    assert all(np.all(leaf) for leaf in jax.tree.leaves(jax.device_get(gradients)))


@each
@pytest.mark.parametrize("kernels", [(1, 1), (3, 5)])
def test_on_a_map_of_one_pixel_it_is_the_layer_of_vectors(name, kernels):
    """FC-LSTM is the ConvLSTM whose features all stand on one cell: there only the kernels' centres count."""
    on_map, on_vectors = Recurrent(KINDS[name], N, kernels=kernels), Recurrent(KINDS[name], N)
    variables = variables_of(on_map, X[:, :, :1, :1])
    centres = {
        key: value[value.shape[0] // 2, value.shape[1] // 2] if value.ndim == 4 else value.reshape(-1)
        for key, value in variables["params"].items()
    }
    x = np.pad(X[:, :, 0, 0], ((0, 0), (0, 0), (0, 3)))  # with few inputs vectors take another way
    variables["params"]["input_kernel"] = np.pad(
        variables["params"]["input_kernel"], ((0, 0), (0, 0), (0, 3), (0, 0)), constant_values=1
    )
    centres["input_kernel"] = np.pad(centres["input_kernel"], ((0, 3), (0, 0)), constant_values=1)
    _, one = on_map.apply(variables, x[:, :, None, None].astype(np.float32))
    _, two = on_vectors.apply({"params": centres}, x.astype(np.float32))
    np.testing.assert_allclose(one[:, :, 0, 0], two, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(("size", "grows"), [(1, 0), (3, 1), (5, 2)])
@pytest.mark.parametrize("name", ["lstm, peepholes", "gru, after", "gru, before"])
def test_the_receptive_field_grows_with_time_by_the_state_to_state_kernel(name, size, grows):
    """What reaches the state at the centre from the frame k steps ago: half the kernels, and k times that of U."""
    layer = Recurrent(KINDS[name], N, kernels=(3, size))
    x = np.random.default_rng(4).standard_normal((1, 5, 17, 17, INPUTS))  # at the first time there is no state yet
    variables = variables_of(layer, x)
    # Where the reset gate stands before the product, what it has seen around it is seen from one product further.
    each_step, at_once = (2 * grows, grows) if name == "gru, before" else (grows, 0)
    with jax.enable_x64(True):
        reach = np.asarray(jax.jit(jax.grad(lambda x: layer.apply(variables, x)[1][0, -1, 8, 8].sum()))(x))
    for ago in range(4):
        rows, columns = np.nonzero((reach[0, -1 - ago] != 0).any(axis=-1))
        expected = min(8, 1 + at_once + each_step * ago)
        assert max(abs(rows - 8)) == max(abs(columns - 8)) == expected, (ago, expected)


def test_peepholes_by_position_differ_from_pixel_to_pixel():
    layer = Recurrent(KINDS["lstm, peepholes by position"], N, kernels=(3, 3))
    variables = variables_of(layer)
    assert variables["params"]["peephole_i"].shape == (HEIGHT, WIDTH, N)
    with jax.enable_x64(True):
        outputs = layer.apply(variables, X)[1]
        moved = jax.tree.map(np.copy, variables)
        moved["params"]["peephole_i"][2, 3] += 1
        changed = np.asarray(layer.apply(moved, X[:, :2])[1] != outputs[:, :2]).any(axis=(0, -1))
    assert not changed[0].any()  # the cell was zero before the first step
    assert list(zip(*np.nonzero(changed[1]), strict=True)) == [(2, 3)]


def test_beyond_the_border_is_the_state_of_which_nothing_is_known():
    """Zero padding: a pixel at the border reads what it would if zero states and zero inputs stood outside."""
    layer = Recurrent(lstm(), N, kernels=(3, 3), use_bias=False)
    variables = variables_of(layer)
    wide = np.pad(X[:, :1], ((0, 0), (0, 0), (2, 2), (2, 2), (0, 0)))
    one, two = (layer.apply(variables, x.astype(np.float32))[1] for x in (X[:, :1], wide))
    np.testing.assert_allclose(one, two[:, :, 2:-2, 2:-2], rtol=1e-5, atol=1e-6)


@each
def test_masks_and_segments_and_reverse_are_those_of_single_sequences(name):
    layer = Recurrent(KINDS[name], N, kernels=(3, 3))
    with jax.enable_x64(True):
        variables = variables_of(layer)
        mask = jnp.asarray([[True] * 4, [True, True, False, False]])
        for options in ({}, {"segment": 2}, {"reverse": True}):
            other = layer.clone(**options)
            last, outputs = other.apply(variables, X, mask=mask)
            end, alone = other.apply(variables, X[1:, :2])
            np.testing.assert_allclose(outputs[1, :2], alone[0], rtol=1e-12)
            np.testing.assert_array_equal(outputs[1, 2:], 0)
            for one, two in zip(jax.tree.leaves(last), jax.tree.leaves(end), strict=True):
                np.testing.assert_allclose(one[1], two[0], rtol=1e-12)


@pytest.mark.parametrize("kernels", [None, (3, 3)], ids=["vectors", "maps"])
@each
def test_without_an_input_it_goes_on_as_with_zeros(name, kernels):
    layer = Recurrent(KINDS[name], N, kernels=kernels)
    x = X if kernels else X[:, :, 0, 0]
    with jax.enable_x64(True):
        variables = variables_of(layer, x)
        carry, _ = layer.apply(variables, x)
        expected = layer.apply(variables, np.zeros_like(x), carry)
        weights = {key: leaf for key, leaf in variables["params"].items() if key != "input_kernel"}
        found = layer.apply({"params": weights}, None, carry, time=TIME)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)
    carry = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), carry)
    made = jax.eval_shape(lambda: layer.init(jax.random.key(0), None, carry, time=TIME))["params"]
    assert {key: leaf.shape for key, leaf in made.items()} == {key: leaf.shape for key, leaf in weights.items()}


def test_the_recurrent_kernel_begins_as_on_vectors():
    kernel = Recurrent(irnn(), 4, kernels=(3, 3)).init(jax.random.key(0), X)["params"]["recurrent_kernel"]
    np.testing.assert_array_equal(kernel[1, 1], np.eye(4))
    assert np.abs(kernel).sum() == 4  # ReLU units that keep their pixel's state
    kernel = Recurrent(CELLS["lstm"](), 4, kernels=(3, 5)).init(jax.random.key(0), X)["params"]["recurrent_kernel"]
    for block in np.split(np.asarray(kernel), 4, axis=-1):
        columns = block.reshape(-1, 4)
        np.testing.assert_allclose(columns.T @ columns, np.eye(4), atol=1e-5)
