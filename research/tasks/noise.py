"""Noise on the weights, for any task."""

import dataclasses
import zlib

import jax

from research.tasks.task import Task

_STREAM = zlib.crc32(b"weight noise")


def with_weight_noise(task: Task, std: float) -> Task:
    """The task with noise on every parameter in training: the loss and its gradient are those at the noisy point.

        loss~(w) = loss(w + std e)        e ~ N(0, 1), drawn anew each step, one draw for the whole batch

    Evaluation sees the parameters themselves. The draw comes from the step's key, from which dropout and augmentation
    draw other numbers, and so is the same on every device.

    Source: Graves 2011; Chung et al. 2014, section 4.2, with std 0.075.

    Args:
      task: to be regularised.
      std: standard deviation of the noise.
    """

    def loss(variables, batch, keys, key):
        leaves, structure = jax.tree.flatten(variables["params"])
        noise_keys = jax.random.split(jax.random.fold_in(key, _STREAM), len(leaves))
        noisy = [
            leaf + std * jax.random.normal(noise_key, leaf.shape, leaf.dtype)
            for leaf, noise_key in zip(leaves, noise_keys, strict=True)
        ]
        return task.loss({**variables, "params": structure.unflatten(noisy)}, batch, keys, key)

    return dataclasses.replace(task, loss=loss)
