"""The last linear layer of every network: it puts out float32, whatever its products are made of."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def head(features: int, dtype: Any = None, *, name: str, **options: Any) -> nn.Dense:
    """The layer `[..., inputs] -> [..., features]`; kernel and bias are float32.

    Args:
      features: numbers it puts out.
      dtype: to which the operands of its products are rounded, those of the gradient too; None for not.
      name: of the layer.
      **options: of `nn.Dense`.
    """

    def rounded(x, kernel, dimensions, **unused):
        return _product(x.astype(dtype), kernel.astype(dtype))

    return nn.Dense(features, dot_general=None if dtype is None else rounded, name=name, **options)


@jax.custom_jvp
def _product(x, kernel):
    """x kernel, of short operands, summed and put out in float32."""
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


@_product.defjvp
def _product_jvp(primals, tangents):
    # A derivative through short results: in its transpose the float32 gradient of the output is rounded before it is
    # multiplied. Of the product itself the transpose would multiply in float32, at many times the cost on a GPU.
    (x, kernel), (dx, dkernel) = primals, tangents
    return _product(x, kernel), (jnp.matmul(dx, kernel) + jnp.matmul(x, dkernel)).astype(jnp.float32)
