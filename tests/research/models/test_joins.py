"""Joins of shortcut and branch: gates of a known value, constant scales, and dropout equal on any device count.

That each is its formula in every placement is tested with the residual unit.
"""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import cifar_resnet
from research.models.convolution import Convolution
from research.models.joins import JOINS
from research.models.resnet import ResNet, Stage, unstack_blocks

X = np.random.default_rng(0).standard_normal((8, 8, 8, 3)).astype(np.float32)
BRANCH = np.random.default_rng(1).standard_normal(X.shape).astype(np.float32)
TRAIN = {"train": True, "mutable": ["batch_stats", "intermediates"]}
GATES = ["exclusive_gate", "shortcut_gate"]


# Gates


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("join", "of_branch"), [("exclusive_gate", 0.75), ("shortcut_gate", 1)])
def test_a_gate_of_three_quarters(join, of_branch, train):
    """W = 0 and b = log 3 make g = 3/4 everywhere: y = x/4 + 3F/4, or x/4 + F."""
    params = {"gate": {"kernel": jnp.zeros((1, 1, 3, 3)), "bias": jnp.full(3, math.log(3))}}
    y = JOINS[join](train=train).apply({"params": params}, X, X, BRANCH, None)
    np.testing.assert_allclose(y, X / 4 + of_branch * BRANCH, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("join", GATES)
def test_a_gate_reads_what_the_unit_reads(join):
    """Where a pixel of x is bright the gate opens; the strided gate reads every second pixel, from the first."""
    x = np.zeros((1, 5, 5, 2), np.float32)
    x[0, 2, 4, 1] = 50
    params = {"gate": {"kernel": jnp.ones((1, 1, 2, 3)), "bias": jnp.full(3, -25.0)}}
    shortcut, branch = np.full((1, 3, 3, 3), 2, np.float32), np.full((1, 3, 3, 3), 5, np.float32)
    y = JOINS[join](train=True).apply({"params": params}, x, shortcut, branch, None)
    expected = np.full((1, 3, 3, 3), 2 if join == "exclusive_gate" else 7)
    expected[0, 1, 2] = 5
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("join", GATES)
@pytest.mark.parametrize("bias", [0.0, -6.0])
def test_the_gates_bias_at_initialisation(join, bias):
    model = cifar_resnet(14, width=2, join=join, gate_bias=bias)
    params = jax.jit(lambda: model.init(jax.random.key(0), X, train=False))()["params"]
    blocks = unstack_blocks(params)
    assert len(blocks) == 6
    for block in blocks:
        gate = block["join"]["gate"]
        assert set(gate) == {"kernel", "bias"}
        assert gate["kernel"].shape == (1, 1, block["conv1"]["kernel"].shape[2], block["conv2"]["kernel"].shape[3])
        assert np.std(gate["kernel"]) > 0.3  # He's: sqrt(2 / 2) to sqrt(2 / 8)
        np.testing.assert_array_equal(gate["bias"], np.full(gate["bias"].shape, bias))
    assert cifar_resnet(14, join=join).join(train=True).bias == 0  # unless asked otherwise


# Scales


def test_scales_reach_the_network_and_none_on_the_shortcut_is_the_plain_one(abstract_variables, lively):
    variables = lively(abstract_variables(cifar_resnet(8, width=2), size=8))

    def logits(block="residual", **options):
        model = cifar_resnet(8, block, width=2, **options)
        assert jax.tree.structure(abstract_variables(model, size=8)) == jax.tree.structure(variables)
        return model.apply(variables, X, **TRAIN)[0]

    @jax.jit
    def run():
        scaled = partial(logits, join="scale")
        return {
            "plain": logits("plain"),
            "residual": logits(),
            "0, 1": scaled(shortcut_scale=0.0, branch_scale=1.0),
            "1, 1": scaled(shortcut_scale=1.0, branch_scale=1.0),
            "half": scaled(),
            "0.5, 1": scaled(shortcut_scale=0.5, branch_scale=1.0),
        }

    found = run()
    np.testing.assert_allclose(found["0, 1"], found["plain"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["1, 1"], found["residual"], rtol=1e-5, atol=1e-5)
    different = [found[name] for name in ("plain", "residual", "half", "0.5, 1")]
    for number, one in enumerate(different):
        assert all(np.abs(one - two).max() > 0.01 for two in different[number + 1 :])
    assert cifar_resnet(8, join="scale").join(train=True).shortcut_scale == 0.5


# Dropout on the shortcut


def test_dropout_keeps_or_drops_and_never_rescales():
    """He et al. 2016, section 3.1: the mask has the expectation 1 - rate, as if the shortcut were scaled by it."""
    x = np.random.default_rng(2).standard_normal((16, 8, 8, 8)).astype(np.float32)
    for rate in (0.5, 0.2):
        join = JOINS["dropout"](train=True, rate=rate)
        y = np.asarray(join.apply({}, x, x, np.zeros_like(x), jax.random.key(0)))
        kept = y == x
        np.testing.assert_array_equal(y, np.where(kept, x, 0))
        assert abs(kept.mean() - (1 - rate)) < 4 * math.sqrt(rate * (1 - rate) / x.size)
        evaluated = join.clone(train=False).apply({}, x, x, np.ones_like(x), None)
        np.testing.assert_array_equal(evaluated, np.float32(1 - rate) * x + 1)
    assert JOINS["dropout"](train=True).rate == 0.5


def with_dropout(units=(3, 2), **options):
    """Without a ReLU after the addition y = m h + F gives the mask away."""
    stages = tuple(Stage(n, (Convolution(2, 3, 2 if k else 1), Convolution(2))) for k, n in enumerate(units))
    options = {"join": JOINS["dropout"], "placement": "full_preactivation"} | options
    return ResNet((Convolution(2),), False, stages, 10, **options)


@pytest.fixture(scope="module")
def variables(abstract_variables, lively):
    values = lively(abstract_variables(with_dropout(), size=8))
    return jax.tree.map(np.float32, values)


def masks(updated):
    """0 or 1 (or unknown) for every element of every unit that keeps its shape, in order of depth."""
    blocks = jax.tree.map(lambda leaf: leaf[0], updated["intermediates"], is_leaf=lambda leaf: isinstance(leaf, tuple))
    found = []
    for block in unstack_blocks(blocks):
        if block["input"].shape == block["output"].shape:
            readable = jnp.abs(block["input"]) > 0.01  # not where the stem's ReLU is shut
            found.append(jnp.where(readable, (block["output"] - block["branch"]) / block["input"], jnp.nan))
    return found


def test_dropout_of_a_network_differs_by_unit_and_by_key(variables):
    model = with_dropout()

    @jax.jit
    def run(key):
        logits, updated = model.apply(variables, X, rngs={"dropout": key}, **TRAIN)
        return logits, masks(updated)

    (first, drawn), (again, _), (other, redrawn) = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    assert len(drawn) == 4  # all but the first unit of stage 2, which changes the shape
    drawn = [np.asarray(mask) for mask in [*drawn, *redrawn]]
    for mask in drawn:
        known = mask[~np.isnan(mask)]
        assert known.size > 0.3 * mask.size
        np.testing.assert_allclose(known, known > 0.5, atol=1e-3)
        assert abs(known.mean() - 0.5) < 5 * 0.5 / math.sqrt(known.size)
    for one, two in itertools.combinations(drawn, 2):
        if one.shape == two.shape:  # they agree by chance alone
            known = ~np.isnan(one + two)
            agree = (one > 0.5)[known] == (two > 0.5)[known]
            assert abs(agree.mean() - 0.5) < 5 * 0.5 / math.sqrt(agree.size)


def test_dropout_needs_no_key_at_initialisation_and_in_evaluation(variables, abstract_variables):
    model = with_dropout()
    evaluated = jax.jit(lambda **rngs: model.apply(variables, X, train=False, **rngs))
    without = evaluated()
    # Half the shortcut, so that it is what a network of constant scale puts out.
    scaled = with_dropout(join=partial(JOINS["scale"], shortcut_scale=0.5, branch_scale=1.0))
    np.testing.assert_allclose(
        without, jax.jit(lambda: scaled.apply(variables, X, train=False))(), rtol=1e-5, atol=1e-5
    )
    assert jax.tree.structure(abstract_variables(scaled, size=8)) == jax.tree.structure(variables)


def test_a_split_batch_drops_what_the_whole_one_drops(abstract_variables, lively):
    """One step on two halves under a named axis: logits, running averages and gradients are those of one device."""
    network = partial(with_dropout, (3,))
    variables = lively(abstract_variables(network(), size=8))

    def step(model, params, x):
        def loss(params):
            rngs = {"dropout": jax.random.key(3)}
            logits, updated = model.apply({**variables, "params": params}, x, rngs=rngs, **TRAIN)
            total = (logits**2).mean()
            if model.axis_name is not None:
                total = jax.lax.pmean(total, model.axis_name)
            return total, (logits, updated["batch_stats"])

        gradients, (logits, averages) = jax.grad(loss, has_aux=True)(params)
        return logits, averages, gradients

    def halves(model, params, x):
        return jax.vmap(partial(step, model, params), axis_name="batch")(x.reshape(2, 4, *x.shape[1:]))

    with jax.enable_x64(True):
        arguments = variables["params"], np.float64(X)
        expected = jax.device_get(jax.jit(partial(step, network()))(*arguments))
        split = [
            jax.device_get(jax.jit(partial(halves, network(axis_name="batch", remat=remat)))(*arguments))
            for remat in (False, True)
        ]
    for logits, averages, gradients in split:
        np.testing.assert_allclose(logits.reshape(8, 10), expected[0], rtol=1e-9, atol=1e-10)
        for one, two in zip(jax.tree.leaves(averages), jax.tree.leaves(expected[1]), strict=True):
            np.testing.assert_allclose(one, np.stack([two, two]), rtol=1e-9, atol=1e-10)
        for one, two in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected[2]), strict=True):
            np.testing.assert_allclose(one.mean(axis=0), two, rtol=1e-8, atol=1e-9)
