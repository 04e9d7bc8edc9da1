"""What the tests of networks share: abstract variables, variables without zeros and ones, and counts of operations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def compiled_quickly(quick_compilation):
    """All tests of models."""


@functools.cache
def _abstract_variables(model, size=32):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)


def _lively(variables, seed=0):
    random = np.random.default_rng(seed)

    def value(path, leaf):
        if path[-1].key == "kernel":
            fan_in = math.prod(leaf.shape[-4:-1]) if leaf.ndim > 3 else leaf.shape[-2]
            return random.standard_normal(leaf.shape) * math.sqrt(2 / fan_in)
        positive = path[-1].key in ("scale", "var")
        return random.uniform(0.5, 1.5, leaf.shape) - (0 if positive else 1)

    return jax.tree_util.tree_map_with_path(value, variables)


def _equations(jaxpr, times=1):
    for equation in jaxpr.eqns:
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        inner = [value for value in inner if hasattr(value, "eqns")]
        if not inner:
            yield equation, times
        for body in inner:
            yield from _equations(body, times * equation.params.get("length", 1))


def _operations(model, size=32):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = _abstract_variables(model, size)
    jaxpr = jax.make_jaxpr(lambda variables, x: model.apply(variables, x, train=False))(variables, x)
    counts, macs = {}, 0
    for equation, times in _equations(jaxpr.jaxpr):
        name = equation.primitive.name
        counts[name] = counts.get(name, 0) + times
        if name in ("conv_general_dilated", "dot_general"):
            # Each output adds one product per kernel element of its feature (the last axis of kernel and result).
            kernel, result = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
            macs += times * math.prod(result) * math.prod(kernel) // kernel[-1]
    return counts, macs


@pytest.fixture(scope="session")
def abstract_variables():
    """`(model, size=32)` -> shapes of the variables of a network of square images."""
    return _abstract_variables


@pytest.fixture(scope="session")
def lively():
    """`(abstract variables, seed=0)` -> float64 values of the size of He et al.'s, scales and shifts random too."""
    return _lively


@pytest.fixture(scope="session")
def operations():
    """`(model, size=32)` -> how often each primitive runs in evaluation of one image, and the multiply-adds."""
    return _operations


@pytest.fixture(scope="session")
def relative():
    """`(got, expected)` -> the largest difference over the largest value."""

    def error(got, expected):
        got, expected = np.asarray(got), np.asarray(expected)
        assert got.shape == expected.shape
        assert np.abs(expected).max() > 0
        return np.abs(got - expected).max() / np.abs(expected).max()

    return error
