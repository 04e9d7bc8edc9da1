"""The table of layers: a network counted by hand, the published totals, and no memory for parameters."""

import jax
import pytest
from flax import linen as nn

from research.analysis.summary import totals
from research.models import cifar_resnet
from research.models.layers import Layer, layers


class Small(nn.Module):
    """A convolution with biases, a norm, three scanned norms and convolutions, two dense layers, one inside another."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(6, (3, 5), strides=(2, 1), padding="VALID", name="first")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x, _ = nn.scan(Pair, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="pairs")(x, None)
        return Head(name="head")(nn.relu(x).mean(axis=(1, 2)))


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Conv(6, (1, 1), use_bias=False, name="conv")(nn.LayerNorm(name="norm")(x)), None


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(7, use_bias=False, name="top")(
            nn.Dropout(0.5, deterministic=True)(nn.Dense(5, name="hidden")(x))
        )


def test_a_network_counted_by_hand():
    assert layers(Small(), (9, 8, 3)) == [
        Layer("first", "Conv", (4, 4, 6), parameters=3 * 5 * 3 * 6 + 6, macs=3 * 5 * 3 * 6 * 16, repeats=1),
        Layer("norm", "BatchNorm", (4, 4, 6), parameters=12, macs=0, repeats=1),
        Layer("pairs/norm", "LayerNorm", (4, 4, 6), parameters=12, macs=0, repeats=3),
        Layer("pairs/conv", "Conv", (4, 4, 6), parameters=36, macs=36 * 16, repeats=3),
        Layer("head/hidden", "Dense", (5,), parameters=35, macs=30, repeats=1),
        Layer("head/top", "Dense", (7,), parameters=35, macs=35, repeats=1),
    ]
    assert Layer("", "Conv", (4, 3, 2), 0, 0, 5).activations == 24


@pytest.mark.parametrize(
    ("depth", "parameters", "macs"),
    [
        (8, 75_290, 12_239_488),
        (20, 269_722, 40_551_040),
        (32, 464_154, 68_862_592),
        (44, 658_586, 97_174_144),
        (56, 853_018, 125_485_696),
        (110, 1_727_962, 252_887_680),
        (1202, 19_421_274, 2_829_238_912),
    ],
)
def test_totals_are_the_published_ones(depth, parameters, macs):
    total = totals(layers(cifar_resnet(depth), (32, 32, 3)))
    assert totals(layers(cifar_resnet(depth, "plain"), (32, 32, 3))) == total
    n = (depth - 2) // 6
    assert total == {
        "parameters": parameters,
        "macs": macs,
        "weight_layers": depth,
        # Each convolution and each norm: 2n+1 at 32x32x16, 2n at 16x16x32 and at 8x8x64; then the classifier.
        "activations": 2 * ((2 * n + 1) * 32 * 32 * 16 + 2 * n * 16 * 16 * 32 + 2 * n * 8 * 8 * 64) + 10,
    }


def test_rows_stand_in_the_order_of_application():
    found = layers(cifar_resnet(20), (32, 32, 3))
    inside = ["conv1", "norm1", "conv2", "norm2"]
    blocks = [f"stage{stage}_{part}" for stage in (1, 2, 3) for part in ("first", "rest")]
    expected = ["stem_conv", "stem_norm", *(f"{block}/{name}" for block in blocks for name in inside), "head"]
    assert [layer.name for layer in found] == expected
    assert [layer.repeats for layer in found] == [1, 1, *([1] * 4 + [2] * 4) * 3, 1]
    assert {layer.output_shape for layer in found[-9:-1]} == {(8, 8, 64)}


def test_no_parameter_is_made():
    before = {id(array) for array in jax.live_arrays()}
    layers(cifar_resnet(1202), (32, 32, 3))
    assert sum(array.size for array in jax.live_arrays() if id(array) not in before) < 100  # keys and constants
