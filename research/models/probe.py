"""One look inside a model during a training step: what its probes read, and the gradients there and at the weights.

A block that calls its `_probe(name, x)` can be read (collection `intermediates`) and differentiated (`perturbations`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


def observe(
    model: nn.Module,
    variables: dict[str, Any],
    inputs: jax.Array,
    loss: Callable[[jax.Array], jax.Array],
    gradients_at: frozenset[str] = frozenset({"input"}),
) -> tuple[Any, Any, Any]:
    """Forward and backward pass in training mode with the probes on; nothing is updated, dropout draws from key 0.

    Args:
      model: called as `model(x, train=True)`.
      variables: parameters and other collections.
      inputs: of the model, `[batch, ...]`.
      loss: of the model's output, a scalar.
      gradients_at: names of the probes whose gradient is wanted.

    Returns:
      `(activations, activation_gradients, weight_gradients)`: trees by module; blocks under `nn.scan` have a leading
      axis of blocks. The gradient at a probe is dL/dx for the x that the probe reads.
    """
    mutable = [name for name in variables if name != "params"] + ["intermediates"]

    def forward(params, perturbations):
        output, updated = model.apply(
            {**variables, "params": params, "perturbations": perturbations},
            inputs,
            train=True,
            mutable=mutable,
            rngs={"dropout": jax.random.key(0)},
        )
        # sow() keeps a tuple, one entry a call; each probe is called once.
        activations = jax.tree.map(lambda x: x[0], updated["intermediates"], is_leaf=lambda x: isinstance(x, tuple))
        return loss(output), activations

    _, shapes = jax.eval_shape(forward, variables["params"], {})
    zeros = {module: _zeros_at(gradients_at, probes) for module, probes in shapes.items()}
    (weight_gradients, activation_gradients), activations = jax.grad(forward, argnums=(0, 1), has_aux=True)(
        variables["params"], zeros
    )
    return activations, activation_gradients, weight_gradients


def shortcuts_alone():
    """A context within which no gradient passes a residual unit's branch: its first convolution reads a constant."""

    def cut(next_call, args, kwargs, context):
        if context.module.name == "conv1" and context.method_name == "__call__":
            args = lax.stop_gradient(args)
        return next_call(*args, **kwargs)

    return nn.intercept_methods(cut)


def _zeros_at(names, probes):
    return {name: jnp.zeros(x.shape, x.dtype) for name, x in probes.items() if name in names}
