"""Optimisers as the papers used them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax


def step_decay(learning_rate: float, *, drops: Sequence[int], warmup_steps: int = 0) -> optax.Schedule:
    """A learning rate divided by 10 at each drop, and during warm-up.

        lr(t) = learning_rate 10^-(number of drops <= t)        for t >= warmup_steps
        lr(t) = learning_rate / 10                              before

    Source: He et al. 2015, section 4.2: 0.1, divided by 10 at 32k and 48k iterations; 110 layers warm up at 0.01 for
    about 400 iterations (the paper: until the training error is below 80%).
    """

    def schedule(step: jax.Array) -> jax.Array:
        drops_passed = (jnp.asarray(step) >= jnp.asarray(drops, jnp.int32)).sum()
        # A table and not a power: the same bits on every backend.
        rates = jnp.asarray([learning_rate / 10**k for k in range(len(drops) + 1)], jnp.float32)
        return jnp.where(step < warmup_steps, jnp.float32(learning_rate / 10), rates[drops_passed])

    return schedule


def sgd(schedule: optax.Schedule, *, momentum: float = 0.9, weight_decay: float = 1e-4):
    """Stochastic gradient descent with momentum and L2 weight decay of every parameter.

        v <- momentum v + (g + weight_decay w)        w <- w - lr(t) v

    The order is PyTorch's. Caffe, which the ResNet authors used, keeps the learning rate inside v; the two differ only
    in the steps after a change of the rate. As there, BatchNorm's scale and shift decay too.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.trace(decay=momentum), optax.scale_by_learning_rate(schedule)
    )
