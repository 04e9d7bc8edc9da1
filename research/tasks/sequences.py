"""Tasks on sequences: a number for each, a class for each, a symbol a step, the next frame of music.

Each is a loss and an evaluation, pure functions as in `research.tasks.classification`: `apply(variables, inputs, ...)`
is the model, inputs an array or a dictionary of its named arguments; batches are dictionaries, and evaluation sums
over the examples whose `mask` is 1.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.tasks.classification import losses_and_errors
from research.tasks.task import Apply, Task


def _task(apply: Apply, inputs: Callable, measures: Callable) -> Task:
    """A task from what the network reads of a batch, and from each example's metrics `name -> [batch]`."""

    def loss(variables, batch, keys, key=None):
        outputs, collections = apply(variables, inputs(batch), train=True, key=key)
        metrics = {name: values.mean() for name, values in measures(outputs, batch).items()}
        return metrics["loss"], (collections, metrics)

    def evaluate(variables, batch):
        outputs, _ = apply(variables, inputs(batch), train=False)
        mask = batch["mask"]
        sums = {name: (values * mask).sum() for name, values in measures(outputs, batch).items()}
        return sums | {"count": mask.sum()}

    return Task(loss, evaluate, inputs)


def regression(apply: Apply) -> Task:
    """One number a sequence, such as the adding problem: mean squared error.

        loss = mean_n (f(x_n) - y_n)^2

    A batch has `inputs` `[batch, time, features]` and `targets` `[batch]`; the model puts out `[batch, 1]`.
    """

    def measures(outputs, batch):
        chex.assert_shape(outputs, (*batch["targets"].shape, 1))
        return {"loss": jnp.square(outputs[:, 0] - batch["targets"])}

    return _task(apply, lambda batch: batch["inputs"], measures)


def pixel_classification(apply: Apply, *, permutation: np.ndarray | None = None) -> Task:
    """Images read pixel by pixel, row after row, one class each: softmax cross-entropy and the share of wrong classes.

        x_t = pixel_{p(t)} / 255        loss = mean_n -log softmax(f(x_n))[label_n]

    A batch has `images` `[batch, height, width, channels]` in 0 to 255 and `labels` `[batch]`; the model reads
    `[batch, height width, channels]` and puts out `[batch, classes]`.

    Args:
      apply: the model's pure application.
      permutation: p `[height width]`, one order for all images (Le et al. 2015's permuted task); None for none.
    """

    def inputs(batch):
        images = batch["images"]
        chex.assert_rank(images, 4)
        pixels = images.reshape(images.shape[0], -1, images.shape[-1]).astype(jnp.float32) / 255
        return pixels if permutation is None else pixels[:, permutation]

    def measures(logits, batch):
        return dict(zip(("loss", "error"), losses_and_errors(logits, batch["labels"]), strict=True))

    return _task(apply, inputs, measures)


def symbols(apply: Apply, *, classes: int) -> Task:
    """A symbol for every step, such as copy memory: cross-entropy a step, and the share of wrong symbols.

    A batch has `inputs` and `targets` `[batch, time]`, whole numbers below `classes`; the model reads them one-hot,
    `[batch, time, classes]`, and puts out `[batch, time, classes]`.
    """

    def measures(logits, batch):
        losses, errors = jax.vmap(losses_and_errors)(logits, batch["targets"])
        return {"loss": losses.mean(axis=1), "error": errors.mean(axis=1)}

    return _task(apply, lambda batch: jax.nn.one_hot(batch["inputs"], classes), measures)


def next_frame(apply: Apply) -> Task:
    """Polyphonic music: each frame's notes from the frames before, as independent yes-or-no questions.

        NLL_t = -sum_notes [y log p + (1 - y) log(1 - p)]        y = frame_{t+1}, p = sigmoid(f(frame_1 ... frame_t))

    The loss is summed over notes and averaged over all predicted frames, as the published tables do: in evaluation over
    those of the whole split, in training over those of the batch.

    A batch has `rolls` `[batch, time, notes]` of 0 and 1, `starts` and `valid` `[batch, time]` bool, as
    `research.data.music.packed` gives them: frame t is asked for the next one where that is of the same sequence. The
    model reads named arguments, x `[batch, time, notes]` and starts and mask `[batch, time]`.
    """

    def inputs(batch):
        return {"x": batch["rolls"].astype(jnp.float32), "starts": batch["starts"], "mask": batch["valid"]}

    def losses(logits, batch):
        chex.assert_equal_shape([logits, batch["rolls"]])
        each = optax.sigmoid_binary_cross_entropy(logits[:, :-1], batch["rolls"][:, 1:]).sum(axis=-1)
        predicted = (batch["valid"] & ~batch["starts"])[:, 1:]
        return (each * predicted).sum(axis=1), predicted.sum(axis=1).astype(jnp.float32)

    def loss(variables, batch, keys, key=None):
        logits, collections = apply(variables, inputs(batch), train=True, key=key)
        sums, counts = losses(logits, batch)
        value = sums.sum() / jnp.maximum(counts.sum(), 1)
        return value, (collections, {"loss": value, "weight": counts.sum()})

    def evaluate(variables, batch):
        logits, _ = apply(variables, inputs(batch), train=False)
        sums, counts = losses(logits, batch)
        mask = batch["mask"]
        return {"loss": (sums * mask).sum(), "weight": (counts * mask).sum(), "count": mask.sum()}

    return Task(loss, evaluate, inputs)
