"""The layers of any model, found by abstract evaluation: shapes and counts without any memory for parameters."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a network, or `repeats` layers alike.

    Attributes:
      name: path of module names.
      kind: class of the module.
      output_shape: without the batch axis.
      parameters: of one of the layers.
      macs: multiply-adds of one of the layers for one example: kernel elements times output positions.
      repeats: how many layers in a row this row stands for.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    repeats: int

    @property
    def activations(self) -> int:
        """Numbers that one of the layers puts out for one example."""
        return math.prod(self.output_shape)


def layers(model: nn.Module, input_shape: tuple[int, ...]) -> list[Layer]:
    """The layers with parameters of a model, in the order in which they are applied.

    Args:
      model: called as `model(x, train=False)`.
      input_shape: of one example, `[...]`.
    """
    found: list[Layer] = []
    x = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)

    def record(next_call, args, kwargs, context):
        output = next_call(*args, **kwargs)
        own = _own_parameters(context.module)
        if own and context.method_name == "__call__":
            whole = _at(variables["params"], context.module.path)
            shape = output.shape[1:]
            kernel = own.get("kernel")
            found.append(
                Layer(
                    name="/".join(context.module.path),
                    kind=type(context.module).__name__,
                    output_shape=shape,
                    parameters=sum(math.prod(array.shape) for array in own.values()),
                    macs=math.prod(kernel.shape) * math.prod(shape[:-1]) if kernel is not None else 0,
                    # Under nn.scan the body is traced once, and the model's array has an axis of blocks in front.
                    repeats=_size(whole) // sum(math.prod(array.shape) for array in own.values()),
                )
            )
        return output

    with nn.intercept_methods(record):
        jax.eval_shape(lambda variables, x: model.apply(variables, x, train=False), variables, x)
    return list(dict.fromkeys(found))


def _own_parameters(module: nn.Module) -> dict[str, Any]:
    """The parameter arrays that belong to the module itself and not to a module inside it."""
    params = module.variables.get("params", {})
    return {name: value for name, value in params.items() if not isinstance(value, dict)}


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def _size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
