"""The last linear layer: float32 out of it, short operands in all its products where asked, Flax's layer where not."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.models.head import head

X = np.random.default_rng(0).standard_normal((6, 3, 300)).astype(np.float32)


class Net(nn.Module):
    """A head and nothing else."""

    dtype: type | None = None

    @nn.compact
    def __call__(self, x):
        return head(5, self.dtype, bias_init=nn.initializers.constant(0.1), name="head")(x)


def test_without_a_type_it_is_the_layer_of_flax():
    dense = nn.Dense(5, bias_init=nn.initializers.constant(0.1))
    variables = Net().init(jax.random.key(0), X)
    assert variables["params"]["head"]["kernel"].shape == (300, 5)
    expected = dense.apply({"params": variables["params"]["head"]}, X)
    np.testing.assert_array_equal(Net().apply(variables, X), expected)


def test_operands_are_rounded_and_the_sum_is_not():
    variables = Net(jnp.bfloat16).init(jax.random.key(0), X)
    kernel = variables["params"]["head"]["kernel"]
    assert kernel.dtype == variables["params"]["head"]["bias"].dtype == np.float32
    found = Net(jnp.bfloat16).apply(variables, X)
    assert found.dtype == np.float32
    short = [np.asarray(jnp.bfloat16(array), np.float64) for array in (X, kernel)]
    np.testing.assert_allclose(found, short[0] @ short[1] + np.float32(0.1), rtol=0, atol=1e-5)
    assert np.abs(found - Net().apply(variables, X)).max() > 1e-4  # float32 would be something else
    assert (np.asarray(found) != jnp.bfloat16(found)).mean() > 0.9


def test_every_product_of_the_gradient_reads_short_operands(operands):
    variables = Net(jnp.bfloat16).init(jax.random.key(0), X)

    def loss(variables, x):
        return jnp.square(Net(jnp.bfloat16).apply(variables, x)).sum()

    found = operands(jax.grad(loss, argnums=(0, 1)), variables, X)
    assert len(found) == 3 and set(found) == {("bfloat16", "bfloat16")}
    assert operands(Net().apply, variables, X) == [("float32", "float32")]
    gradients = jax.grad(loss, argnums=(0, 1))(variables, X)
    exact = jax.grad(lambda variables, x: jnp.square(Net().apply(variables, x)).sum(), argnums=(0, 1))(variables, X)
    for ours, theirs in zip(*map(jax.tree.leaves, (gradients, exact)), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.02 * np.abs(theirs).max())
