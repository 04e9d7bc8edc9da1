"""Rematerialisation: the same numbers as without it, for memory that grows with the square root of depth."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import cifar_resnet, imagenet_resnet, repeat, senet154
from research.models.convolution import Convolution
from research.models.joins import JOINS
from research.models.resnet import ResNet, Stage

X = np.random.default_rng(0).standard_normal((4, 8, 8, 3))


def network(units, remat, width=2, **options):
    """One stage of basic units: the first, and `units` under the scan."""
    stage = Stage(units + 1, (Convolution(width), Convolution(width)))
    return ResNet((Convolution(width),), False, (stage,), 10, remat=remat, **options)


def step(model, variables, x, train=True):
    """Logits, new running averages, gradients of parameters and images."""

    def loss(params, x):
        logits, updated = model.apply(
            {**variables, "params": params},
            x,
            train=train,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(5)},
        )
        return jnp.sin(logits).sum(), (logits, updated.get("batch_stats"))

    gradients, (logits, averages) = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
    return logits, averages, gradients


def test_segments_are_of_the_order_of_the_square_root():
    """Inputs of segments, the inside of one and what is left over: together a few sqrt(n) for any n."""
    assert repeat.segment_length(1) == 1
    for length in range(1, 1100):
        size = repeat.segment_length(length)
        assert 1 <= size <= length
        assert length // size + size + length % size <= 5 * math.sqrt(length), length


# Units under the scan, and units of a segment: one alone, segments of one, segments that divide them, one or two over.
LENGTHS = [(1, 1), (2, 1), (6, 3), (7, 3), (8, 3), (3, 3)]
VARIANTS = {
    "original": {},
    "gates": {"join": JOINS["exclusive_gate"], "placement": "full_preactivation"},
    "dropout": {"join": JOINS["dropout"], "placement": "relu_before_addition"},
}


@pytest.mark.parametrize(
    ("variant", "length", "size"), [("original", *pair) for pair in LENGTHS] + [("gates", 7, 3), ("dropout", 7, 3)]
)
def test_outputs_averages_and_gradients_are_those_without_it(
    variant, length, size, abstract_variables, lively, monkeypatch
):
    monkeypatch.setattr(repeat, "segment_length", lambda found: {length: size}[found])
    kept, again = (network(length, remat, **VARIANTS[variant]) for remat in (False, True))
    variables = lively(abstract_variables(kept, size=8))
    with jax.enable_x64(True):
        expected, got = (jax.device_get(jax.jit(partial(step, model))(variables, X)) for model in (kept, again))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, two in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert np.abs(two).max() > 0
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-11)


def test_evaluation_is_the_same_and_changes_no_average(abstract_variables, lively):
    kept, again = (network(5, remat) for remat in (False, True))
    variables = jax.tree.map(np.float32, lively(abstract_variables(kept, size=8)))

    @jax.jit
    def run(variables):
        logits = [model.apply(variables, X, train=False) for model in (kept, again)]
        return logits, again.apply(variables, X, train=False, mutable=["batch_stats"])[1]["batch_stats"]

    logits, averages = run(variables)
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, averages, variables["batch_stats"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_initial_parameters_are_the_same_bits(variant):
    kept, again = (
        jax.jit(partial(network(3, remat, **VARIANTS[variant]).init, train=False))(jax.random.key(0), X)
        for remat in (False, True)
    )
    assert jax.tree.structure(kept) == jax.tree.structure(again)
    jax.tree.map(np.testing.assert_array_equal, kept, again)
    kernels = kept["params"]["stage1_rest"]["conv1"]["kernel"]
    assert len(np.unique(kernels)) == kernels.size  # each unit is drawn apart


def test_the_constructors_pass_it_on():
    for constructor in (cifar_resnet, imagenet_resnet, senet154):
        assert constructor(remat=True).remat and not constructor().remat


# Memory


def temporary_bytes(units, remat):
    """What XLA sets aside for the activations of one training step."""
    model = network(units, remat)
    x = jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    return jax.jit(partial(step, model)).lower(variables, x).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_square_root_of_depth():
    """Chen et al. 2016, section 4; without rematerialisation it grows with depth."""
    shallow, deep = 64, 1024
    growth = {}
    for remat in (False, True):
        few, many = (temporary_bytes(units, remat) for units in (shallow, deep))
        growth[remat] = math.log(many / few) / math.log(deep / shallow), many
    assert 0.85 < growth[False][0] < 1.05
    assert 0.2 < growth[True][0] < 0.7
    assert growth[True][1] < growth[False][1] / 8
