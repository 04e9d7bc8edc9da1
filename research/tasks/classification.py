"""Image classification: one label an image, softmax cross-entropy; error is the share of wrong labels."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.ops import augmentation
from research.tasks.task import Apply, Task

# prepare(images as they are stored, mean) -> images as the network sees them
Prepare = Callable[[jax.Array, np.ndarray], jax.Array]


def prepare(images: jax.Array, mean: np.ndarray) -> jax.Array:
    """Images as a network sees them: (image - mean) / 128, float32; the constant only chooses units."""
    return (images.astype(jnp.float32) - mean) * (1 / 128)


def classification(
    apply: Apply, *, mean: np.ndarray, crop: int = 0, flip: bool = False, prepare: Prepare = prepare
) -> Task:
    """Builds the task for a model and one way of preparing images.

        x = prepare(image, mean)        loss = mean_n -log softmax(f(x_n))[label_n]

    Args:
      apply: the model's pure application.
      mean: subtracted from every image, `[height, width, channels]` in pixel units (the per-pixel mean of the training
        set in He et al. 2015).
      crop: padding in pixels of the random crop, 0 for none; training only. The padding is zero after the mean is
        subtracted, as in the paper's code.
      flip: mirror half of the images; training only.
      prepare: does so, on whole batches and before augmentation; may do something else, and need not use the mean.
    """

    def augment(image, key):
        crop_key, flip_key = jax.random.split(key)
        if crop:
            image = augmentation.random_crop(image, crop_key, padding=crop)
        if flip:
            image = augmentation.random_flip(image, flip_key)
        return image

    def inputs(batch):
        return prepare(batch["images"], mean)

    def loss(variables, batch, keys, key=None):
        images = inputs(batch)
        if crop or flip:
            images = jax.vmap(augment)(images, keys)
        logits, collections = apply(variables, images, train=True, key=key)
        losses, errors = losses_and_errors(logits, batch["labels"])
        value = losses.mean()
        return value, (collections, {"loss": value, "error": errors.mean()})

    def evaluate(variables, batch):
        logits, _ = apply(variables, inputs(batch), train=False)
        losses, errors = losses_and_errors(logits, batch["labels"])
        mask = batch["mask"]
        return {"loss": (losses * mask).sum(), "error": (errors * mask).sum(), "count": mask.sum()}

    return Task(loss, evaluate, inputs)


def losses_and_errors(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy, and 1 where the label is wrong: `[n]` each, of logits `[n, classes]` and labels `[n]`."""
    chex.assert_rank([logits, labels], [2, 1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, (logits.argmax(-1) != labels).astype(jnp.float32)
