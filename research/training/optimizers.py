"""Optimisers as the papers used them."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax


def constant(learning_rate: float) -> optax.Schedule:
    """One learning rate for all steps."""
    return lambda step: jnp.float32(learning_rate)


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


def exponential_epochs(
    learning_rate: float, *, hold_epochs: int, factor: float, epochs: int, steps_per_epoch: int
) -> optax.Schedule:
    """A constant learning rate for the first epochs, then divided by a factor with every further one.

        lr(t) = learning_rate / factor^max(0, e + 1 - hold_epochs)        e = floor(t / steps_per_epoch) < epochs

    Source: Zaremba et al. 2014, section 4.1, word models of the Penn Treebank from a rate of 1:

        small     hold 4, factor 2, 13 epochs
        medium    hold 6, factor 1.2, 39 epochs
        large     hold 14, factor 1.15, 55 epochs

    This is the paper's text and TensorFlow's port: the small network's fifth epoch has 1/2. The authors' Lua asks after
    each epoch whether its number is above `hold_epochs`, which holds the first rate for one epoch more.
    """
    rates = [learning_rate / factor ** max(0, epoch + 1 - hold_epochs) for epoch in range(epochs)]

    def schedule(step: jax.Array) -> jax.Array:
        epoch = jnp.minimum(jnp.asarray(step) // steps_per_epoch, epochs - 1)
        return jnp.asarray(rates, jnp.float32)[epoch]  # a table, as above

    return schedule


def sgd(
    schedule: optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum and L2 weight decay of every parameter.

        g <- g clip_norm / ||g|| if ||g|| > clip_norm
        v <- momentum v + (g + weight_decay w)        w <- w - lr(t) v

    The order is PyTorch's. Caffe, which the ResNet authors used, keeps the learning rate inside v; the two differ only
    in the steps after a change of the rate. As there, BatchNorm's scale and shift decay too.

    Clipping is of the norm over all parameters together, before anything else, here and below: Pascanu et al. 2013,
    algorithm 1; Goodfellow et al. 2016, equation 10.48. A gradient that has exploded beyond the largest number has no
    direction left, and counts as zero.
    """
    return _clipped(
        clip_norm,
        optax.add_decayed_weights(weight_decay),
        optax.trace(decay=momentum),
        optax.scale_by_learning_rate(schedule),
    )


def adam(schedule: optax.Schedule, *, clip_norm: float | None = None) -> optax.GradientTransformation:
    """Adam, by the gradient g clipped as in `sgd`.

        m <- 0.9 m + 0.1 g        v <- 0.999 v + 0.001 g^2
        w <- w - lr(t) m^ / (sqrt(v^) + 1e-8)        m^ = m / (1 - 0.9^t), v^ = v / (1 - 0.999^t), t from 1

    Source: Kingma and Ba 2015, algorithm 1, which is PyTorch's. TensorFlow's is the reordered one of the paper's
    section 2, with 1e-7 (Keras) or 1e-8 beside the root of v that is not corrected: more while t is small.
    """
    return _clipped(clip_norm, optax.scale_by_adam(), optax.scale_by_learning_rate(schedule))


def rmsprop(
    schedule: optax.Schedule, *, decay: float = 0.99, clip_norm: float | None = None
) -> optax.GradientTransformation:
    """RMSProp, by the gradient g clipped as in `sgd`.

        v <- decay v + (1 - decay) g^2, from 0        w <- w - lr(t) g / (sqrt(v) + 1e-8)

    The place of epsilon, the start and the decay are PyTorch's. TensorFlow 1 has sqrt(v + 1e-10), v from 1 and decay
    0.9, which is also that of the source: Hinton's lecture 6e, 2012. The first step is lr / sqrt(1 - decay) for every
    parameter, whatever the gradient's size.
    """
    rms = optax.scale_by_rms(decay=decay, eps=1e-8, eps_in_sqrt=False)
    return _clipped(clip_norm, rms, optax.scale_by_learning_rate(schedule))


def _clipped(clip_norm, *transformations):
    # Without clipping no stage, not an idle one: names in checkpoints have the number of the stage.
    if clip_norm is None:
        return optax.chain(*transformations)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.stateless(_without_nan), *transformations)


def _without_nan(gradients, params=None):
    """After clipping, an infinite gradient is zero where it was finite and no number elsewhere."""
    return jax.tree.map(lambda g: jnp.where(jnp.isnan(g), 0, g), gradients)


# Called as `OPTIMIZERS[name](schedule, clip_norm=...)`. SGD is plain here: momentum and decay where they are asked for.
OPTIMIZERS = {"sgd": partial(sgd, momentum=0.0, weight_decay=0.0), "adam": adam, "rmsprop": rmsprop}
