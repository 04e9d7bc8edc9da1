"""Receptive fields of recurrent networks on maps: how fast they grow, against derivatives by another way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.analysis.receptive import diameters, of_encoder
from research.models.forecaster import EncoderForecaster
from research.models.recurrent import gru, lstm

pytestmark = pytest.mark.usefixtures("quick_compilation")


def drawn(kernels, cell=None, features=(3, 2), patch=1):
    """A network with random weights."""
    network = EncoderForecaster(cell or lstm(peepholes=True), features, horizon=1, kernels=kernels, patch=patch)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 2, 4, 4, 1))))["params"]
    random = np.random.default_rng(1)
    return network, jax.tree.map(lambda leaf: np.float32(0.3 * random.standard_normal(leaf.shape)), shapes)


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        ((3, 3), [5, 7, 9, 11]),  # input kernels of two layers, then one state kernel a step
        ((3, 1), [5, 5, 5, 5]),  # what moves is out of sight
        ((5, 3), [9, 11, 13, 15]),
    ],
    ids=str,
)
def test_an_lstm_sees_a_state_kernel_further_with_every_step_back(kernels, expected):
    network, params = drawn(kernels)
    maps = of_encoder(network, params, time=4, size=21)
    assert maps.shape == (4, 21, 21) and diameters(maps) == expected
    # All of it, and not only up to there.
    for found, width in zip(maps, expected, strict=True):
        inside = slice(10 - width // 2, 11 + width // 2)
        assert np.all(found[inside, inside]) and np.count_nonzero(found) == width**2


@pytest.mark.parametrize(
    ("reset", "expected"),
    [
        ("after", [3, 5, 7]),
        # Inputs come by way of the reset gate as well, one state kernel further; at the first step it resets nothing.
        ("before", [5, 9, 11]),
    ],
)
def test_a_gru_that_resets_before_the_product_sees_further(reset, expected):
    network, params = drawn((3, 3), gru(reset), features=(2,))
    assert diameters(of_encoder(network, params, time=3, size=13)) == expected


def test_maps_are_derivatives_of_the_state_by_earlier_inputs():
    """Against differences, by way of the network's own forward pass; folded pixels are channels."""
    network, params = drawn((3, 3), patch=2)
    maps = of_encoder(network, params, time=3, size=7, seed=5)

    @jax.jit
    def centre(folded):
        """The sum of the encoder's last top state at the centre, of what the network itself computes."""
        x = folded.reshape(3, 7, 7, 2, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(1, 3, 14, 14, 1)
        _, states = network.apply({"params": params}, x, capture_intermediates=True)
        carry, outputs = states["intermediates"]["encoder2"]["__call__"][0]
        return outputs[0, -1, 3, 3].sum(), carry.h[0, 3, 3].sum()

    noise = jax.random.uniform(jax.random.key(5), (3, 7, 7, 4))
    value, same = centre(noise)
    assert value == same
    for d, i, j in ((0, 3, 3), (0, 2, 5), (1, 3, 4), (2, 0, 3)):
        nudges = np.zeros((4, 3, 7, 7, 4), np.float32)
        nudges[range(4), 2 - d, i, j, range(4)] = 0.05
        differences = [(centre(noise + nudge)[0] - centre(noise - nudge)[0]) / 0.1 for nudge in nudges]
        assert maps[d, i, j] == pytest.approx(np.linalg.norm(differences), rel=0.02), (d, i, j)


def test_diameters_of_maps_by_hand():
    maps = np.zeros((5, 7, 7))
    maps[1, 3, 3] = -1e-30
    maps[2, 3, 4] = 1
    maps[3, 1, 3] = maps[3, 3, 4] = 1
    maps[4, 6, 6] = np.nan  # not a zero
    found = diameters(maps)
    assert found == [0, 1, 3, 5, 7] and all(type(diameter) is int for diameter in found)


def test_weights_of_one_size_of_map_have_no_field_on_another():
    for kernels, cell in ((None, lstm()), ((3, 3), lstm(peepholes=True, by_position=True))):
        network = EncoderForecaster(cell, (2,), horizon=1, kernels=kernels)
        with pytest.raises(ValueError, match="only weights that all positions share"):
            of_encoder(network, {}, time=2, size=5)
