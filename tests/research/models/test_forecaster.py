"""The encoding-forecasting network: the six published parameter counts, what reads what, and in which order."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models.forecaster import EncoderForecaster
from research.models.recurrent import Recurrent, gru, lstm
from research.ops import patches

SMALL = {"cell": lstm(peepholes=True), "features": (3, 2), "horizon": 5, "patch": 2}
X = np.random.default_rng(0).random((2, 4, 6, 8, 1))

pytestmark = pytest.mark.usefixtures("quick_compilation")


def shapes_of(network, x):
    with jax.enable_x64(False):  # parameters are drawn in single precision
        return jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros(x)))["params"]


def variables_of(network):
    random = np.random.default_rng(1)
    return {"params": jax.tree.map(lambda leaf: 0.5 * random.standard_normal(leaf.shape), shapes_of(network, X.shape))}


@pytest.mark.parametrize(
    ("features", "kernels", "parameters"),
    [
        ((2048, 2048), None, 142_667_776),
        ((256,), (5, 5), 13_524_496),
        ((128, 128), (5, 5), 10_042_896),
        ((128, 64, 64), (5, 5), 7_585_296),
        ((128, 128), (9, 1), 11_550_224),
        ((128, 64, 64), (9, 1), 8_830_480),
    ],
)
def test_parameter_counts_of_moving_mnist(features, kernels, parameters):
    """Shi et al. 2015, Table 1."""
    network = EncoderForecaster(lstm(peepholes=True), features, horizon=10, kernels=kernels, patch=4)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(network, (1, 10, 64, 64, 1)))) == parameters


def test_parameter_count_of_radar():
    """The paper's two layers of 64 on 50 x 50 maps of 4 channels, by the conventions that its Table 1 gives."""
    network = EncoderForecaster(lstm(peepholes=True), (64, 64), horizon=15, kernels=(3, 3), patch=2)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(network, (1, 5, 100, 100, 1)))) == 896_260


def test_names_of_parameters():
    for kernels in (None, (3, 3)):
        found = shapes_of(EncoderForecaster(**SMALL, kernels=kernels), X.shape)
        assert set(found) == {"encoder1", "encoder2", "forecaster1", "forecaster2", "prediction"}
        assert "input_kernel" not in found["forecaster2"] and "input_kernel" in found["forecaster1"]


def test_it_is_its_layers_put_together_by_hand():
    network = EncoderForecaster(**SMALL, kernels=(3, 3))
    with jax.enable_x64(True):
        variables = variables_of(network)
        logits = network.apply(variables, X)
        weights = variables["params"]

        def layer(name, features, *arguments, **options):
            return Recurrent(SMALL["cell"], features, (3, 3)).apply({"params": weights[name]}, *arguments, **options)

        first, y = layer("encoder1", 3, patches.fold(X, 2))
        second, _ = layer("encoder2", 2, y)
        _, bottom = layer("forecaster2", 2, None, second, time=5)
        _, top = layer("forecaster1", 3, bottom, first)
        kernel, bias = weights["prediction"]["kernel"], weights["prediction"]["bias"]
        expected = jnp.concatenate([bottom, top], axis=-1) @ kernel + bias
    assert logits.shape == (2, 5, 6, 8, 1) and kernel.shape == (5, 4)
    np.testing.assert_allclose(logits, patches.unfold(expected, 2), rtol=1e-10)


def test_vectors_are_predicted_from_the_top_layer():
    network = EncoderForecaster(**SMALL | {"patch": 1})
    variables = variables_of(network)
    with jax.enable_x64(True):
        assert network.apply(variables, X).shape == (2, 5, 6, 8, 1)
    assert variables["params"]["prediction"]["kernel"].shape == (3, 48)


@pytest.mark.parametrize("kernels", [None, (3, 3)], ids=["vectors", "maps"])
@pytest.mark.parametrize("cell", [lstm(peepholes=True), gru(), gru("before")], ids=["lstm", "gru", "gru before"])
def test_every_parameter_learns(cell, kernels):
    network = EncoderForecaster(**SMALL | {"cell": cell}, kernels=kernels)
    with jax.enable_x64(True):
        variables = variables_of(network)
        weights = np.random.default_rng(2).standard_normal((2, 5, 6, 8, 1))
        gradients = jax.jit(jax.grad(lambda v: (network.apply(v, X) * weights).sum()))(variables)
    assert all(np.all(leaf) for leaf in jax.tree.leaves(jax.device_get(gradients)))


def test_segments_change_memory_only():
    network = EncoderForecaster(**SMALL, kernels=(3, 3))
    with jax.enable_x64(True):
        variables = variables_of(network)
        one, two = (np.asarray(n.apply(variables, X)) for n in (network, network.clone(segment=2)))
    np.testing.assert_allclose(one, two, rtol=1e-12)
