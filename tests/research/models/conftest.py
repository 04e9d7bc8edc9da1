"""What the tests of networks share: abstract variables, variables without zeros and ones, and counts of operations."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from research.analysis import operations


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
            some, groups = operations.groups_of(equation)  # a part of one convolution
            yield from _equations(body, times * equation.params.get("length", 1) * Fraction(some, groups))


def _operations(model, size=32):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = _abstract_variables(model, size)

    def evaluate(variables, x):
        return model.apply(variables, x, train=False)

    counts = {}
    for equation, times in _equations(jax.make_jaxpr(evaluate)(variables, x).jaxpr):
        counts[equation.primitive.name] = counts.get(equation.primitive.name, 0) + times
    return counts, operations.multiply_adds(evaluate, variables, x)


@pytest.fixture(scope="session")
def abstract_variables():
    """`(model, size=32)` -> shapes of the variables of a network of square images."""
    return _abstract_variables


@pytest.fixture(scope="session")
def lively():
    """`(abstract variables, seed=0)` -> float64 values of the size of He et al.'s, scales and shifts random too."""
    return _lively


@pytest.fixture(scope="session", name="operations")
def operations_fixture():
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


def _operands(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield tuple(variable.aval.dtype.name for variable in equation.invars[:2])
        for value in equation.params.values():
            for one in value if isinstance(value, tuple | list) else (value,):
                if isinstance(one, ClosedJaxpr | Jaxpr):
                    yield from _operands(getattr(one, "jaxpr", one))


@pytest.fixture
def operands():
    """`(function, *arguments) -> names of the types of both operands`, of each product and convolution in it."""
    return lambda function, *arguments: list(_operands(jax.make_jaxpr(function)(*arguments).jaxpr))
