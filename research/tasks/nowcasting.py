"""Nowcasting: the frames to come from the frames that were, each pixel the probability of a light one."""

from collections.abc import Callable

import jax

from research.ops import verification
from research.tasks.task import Apply, Task

# frames_of(batch) -> [batch, time, height, width, channels], grey in [0, 1]
Frames = Callable[[dict[str, jax.Array]], jax.Array]


def nowcasting(apply: Apply, frames_of: Frames, *, observed: int) -> Task:
    """Predicts all frames after the first ones, at once.

        P = sigmoid(f(T_1 ... T_observed))
        loss = mean_n -sum_{t > observed} sum_pixels [T_t log P_t + (1 - T_t) log(1 - P_t)]

    It is in nats a sequence, as in Shi et al. 2015, Table 1.

    Args:
      apply: the model's pure application; logits `[batch, time - observed, height, width, channels]`.
      frames_of: whole sequences of a batch, generated or looked up.
      observed: frames that the model sees.
    """

    def losses(variables, batch, **options):
        frames = frames_of(batch)
        logits, collections = apply(variables, frames[:, :observed], **options)
        return verification.cross_entropy(logits, frames[:, observed:]).sum(axis=1), collections

    def loss(variables, batch, keys, key=None):
        each, collections = losses(variables, batch, train=True, key=key)
        value = each.mean()
        return value, (collections, {"loss": value})

    def evaluate(variables, batch):
        each, _ = losses(variables, batch, train=False)
        return {"loss": (each * batch["mask"]).sum(), "count": batch["mask"].sum()}

    return Task(loss, evaluate, lambda batch: frames_of(batch)[:, :observed])
