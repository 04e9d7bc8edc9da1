"""Language modelling: the next token of a text, from what `research.data.text.windows` gives."""

import chex
import jax.numpy as jnp
import numpy as np
import optax

from research.tasks.task import Apply, Task


def next_token(apply: Apply) -> Task:
    """Every token from those before it: cross-entropy in nats, averaged over the predicted tokens.

        loss = -sum_t log softmax(f(w_1 ... w_t))[w_{t+1}] / number of t

    In evaluation the mean is over the whole split, in training over the batch.

    A batch has `inputs`, `targets` and `valid` `[batch, time]`, the last False where there is nothing to predict, and
    `first` `[batch]`; it goes on where the one before stopped. The model is called as `model(tokens, first, ...)` and
    puts out `[batch, time, vocabulary]`.
    """

    def inputs(batch):
        return {"tokens": batch["inputs"], "first": batch["first"]}

    def sums(logits, batch):
        chex.assert_shape(logits, (*batch["targets"].shape, None))
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.where(batch["valid"], each, 0).sum(axis=1), batch["valid"].sum(axis=1)

    def loss(variables, batch, keys, key=None):
        logits, collections = apply(variables, inputs(batch), train=True, key=key)
        losses, counts = sums(logits, batch)
        weight = counts.sum().astype(losses.dtype)
        value = losses.sum() / jnp.maximum(weight, 1)  # a device's share of the last windows can be padding alone
        return value, (collections, {"loss": value, "weight": weight})

    def evaluate(variables, batch):
        logits, collections = apply(variables, inputs(batch), train=False)
        losses, counts = sums(logits, batch)
        mask = batch["mask"]
        found = {"loss": (losses * mask).sum(), "weight": (counts * mask).sum(), "count": mask.sum()}
        return found, collections

    return Task(loss, evaluate, inputs, carries=True)


def perplexity(nats: float | np.ndarray) -> np.ndarray:
    """exp(nats): how many equally likely tokens would be as hard to predict; infinite where that overflows."""
    with np.errstate(over="ignore"):
        return np.exp(nats)


def bits(nats: float | np.ndarray) -> float | np.ndarray:
    """nats / ln 2: bits a token, of characters bits a character."""
    return nats / np.log(2)
