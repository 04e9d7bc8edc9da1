"""Signal propagation: how large activations and gradients are, layer by layer.

With a shortcut, x_{l+1} = x_l + F(x_l) before the last ReLU, and

    dL/dx_l = dL/dx_{l+1} (1 + dF/dx_l),

so the gradient has a path that no layer attenuates; without it only the product of the dF/dx is left. Source: He et al.
2016, "Identity Mappings in Deep Residual Networks", equations 1 to 5; He et al. 2015, Figure 7 (layer responses).
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research.models import probe
from research.models.resnet import unstack_blocks


def propagation(model: Any) -> Callable[[Any, jax.Array, jax.Array], dict[str, list[float]]]:
    """Measures one training-mode pass (batch statistics in BatchNorm) from the first layer to the last.

    Args:
      model: a `ResNet`, plain or residual, not mapped over an axis.

    Returns:
      A function `(variables, images, labels) -> statistics` of a prepared batch `[batch, height, width, channels]` and
      its labels `[batch]`. One number a block: `output_variance`, of its activations, and `block_input_gradient_norm`,
      the L2 norm over the batch of dL/dx, L the batch's mean cross-entropy and x what enters the block. One number a
      convolution in the blocks: `response_std`, after BatchNorm and before the sum and the ReLU (the 'layer response'
      of He et al. 2015, Figure 7; with full pre-activation the convolution's own output), and `weight_gradient_norm`,
      of dL/dW.
    """

    @jax.jit
    def reduced(variables, images, labels):
        def loss(logits):
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        activations, activation_gradients, weight_gradients = probe.observe(model, variables, images, loss)
        kernels = {stage: grads for stage, grads in weight_gradients.items() if stage.startswith("stage")}
        return {
            "variance": _by_block(activations, jnp.var),
            "std": _by_block(activations, jnp.std),
            "gradient": _by_block(activation_gradients, jnp.linalg.norm),
            "weights": _by_block(kernels, jnp.linalg.norm),
        }

    def measure(variables, images, labels):
        found = jax.device_get(reduced(variables, images, labels))
        blocks = {name: unstack_blocks(tree) for name, tree in found.items()}
        return {
            "output_variance": _floats(b["output"] for b in blocks["variance"]),
            "response_std": _floats(b[name] for b in blocks["std"] for name in _numbered("response", b)),
            "weight_gradient_norm": _floats(
                b[name]["kernel"] for b in blocks["weights"] for name in _numbered("conv", b)
            ),
            "block_input_gradient_norm": _floats(b["input"] for b in blocks["gradient"]),
        }

    return measure


def _by_block(tree, reduce):
    """`reduce` of every leaf; of leaves stacked over blocks, of each block's part."""

    def in_float32(x):
        return reduce(x.astype(jnp.promote_types(x.dtype, jnp.float32)).ravel())

    def of_stage(name, leaves):
        if name.endswith("_rest"):
            return jax.tree.map(jax.vmap(in_float32), leaves)
        return jax.tree.map(in_float32, leaves)

    return {name: of_stage(name, leaves) for name, leaves in tree.items()}


def _numbered(kind, names) -> list[str]:
    """`kind1`, `kind2`, ... as far as they are among the names: one a convolution of the block."""
    return list(itertools.takewhile(lambda name: name in names, (f"{kind}{k}" for k in itertools.count(1))))


def _floats(values) -> list[float]:
    return [float(value) for value in values]
