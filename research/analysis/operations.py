"""How many multiply-adds a function takes, counted in its own jaxpr: convolutions and matrix products."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from research.ops import conv


def multiply_adds(function: Callable, *arguments: Any) -> int:
    """Multiply-adds of all convolutions and matrix products of a function, those on padding included.

        convolution    output elements x kernel height x width x channels of a group (also where `research.ops.conv`
                       computes it by more of them)
        product        output elements x length of the contracted axes

    The body of a scan counts as often as it runs (XLA's own cost analysis counts it once). Elementwise operations do
    not count, as is usual.

    Args:
      function: to be traced; nothing is computed.
      *arguments: its arguments, or their shapes and types.

    Raises:
      ValueError: products stand in a loop of unknown length or behind a condition.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        kind, options = equation.primitive.name, equation.params
        shapes = [variable.aval.shape for variable in equation.invars[:2]]
        if kind == "dot_general":
            ((contracted, _), _) = options["dimension_numbers"]
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[0][axis] for axis in contracted)
        elif kind == "conv_general_dilated":
            features = shapes[1][options["dimension_numbers"].rhs_spec[0]]
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[1]) // features
        else:
            inside = sum(map(_count, _jaxprs(options))) // groups_of(equation)[0]
            if inside and kind in ("while", "cond"):
                raise ValueError(f"products stand inside {kind}: how often they run is not known")
            total += inside * (options["length"] if kind == "scan" else 1)
    return total


def groups_of(equation: Any) -> tuple[int, int]:
    """Of how many groups of how many an equation is the bundle of `research.ops.conv`; one of one if of none."""
    pattern = conv.BUNDLE.format(*[r"(\d+)"] * 2)
    found = re.fullmatch(pattern, str(equation.params.get("name")))
    return (int(found[1]), int(found[2])) if found else (1, 1)


def _jaxprs(options):
    """The jaxprs among an equation's parameters."""
    for value in options.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one
