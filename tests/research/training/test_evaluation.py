"""Evaluation counts every example exactly once, whatever the sizes, the batch and the number of devices."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from research.tasks.task import Task
from research.training import evaluation, parallel

EXAMPLES = 21


def count_each(variables, batch):
    """A metric for each example: how often it was seen. Padding that is not masked would count one twice."""
    seen = {f"example {n}": ((batch["number"] == n) * batch["mask"]).sum() for n in range(EXAMPLES)}
    return seen | {"scaled": (batch["number"] * variables * batch["mask"]).sum(), "count": batch["mask"].sum()}


def evaluator(evaluate=count_each, devices=1):
    mesh = parallel.make_mesh(devices)
    data = parallel.replicate({"number": np.arange(EXAMPLES)}, mesh)
    two = parallel.replicate(jnp.float32(2), mesh)
    return evaluation.Evaluator(Task(None, evaluate, None), mesh, two, data, batch_size=8)


RANGES = [(0, 1), (0, 7), (0, 8), (0, 9), (0, 16), (0, 21), (5, 6), (3, 19), (13, 21), (20, 21)]


@pytest.mark.parametrize(("first", "last"), RANGES)
def test_every_example_exactly_once(first, last):
    means = evaluator()(jnp.float32(3), first, last)
    size = last - first
    assert "count" not in means
    assert means.pop("scaled") == pytest.approx(3 * np.arange(first, last).mean())
    assert means == {f"example {n}": (1 / size if first <= n < last else 0) for n in range(EXAMPLES)}


def test_one_program_serves_every_range(monkeypatch):
    calls = []

    def traced(variables, batch):
        calls.append(batch["number"].shape)
        return count_each(variables, batch)

    one = evaluator(traced)
    for first, last in RANGES:
        one(jnp.float32(1), first, last)
    assert calls == [(8,)]


@pytest.mark.parametrize("size", [7, 9, 21])
def test_a_task_that_counts_the_padding_is_caught(size):
    def careless(variables, batch):
        return count_each(variables, batch) | {"count": jnp.float32(batch["mask"].size)}

    with pytest.raises(AssertionError, match=f"examples were evaluated, not {size}"):
        evaluator(careless)(jnp.float32(1), 0, size)


def test_a_wrong_mask_is_caught(monkeypatch):
    place = evaluation.Evaluator._place

    def unmasked(self, first, last):
        indices, mask = place(self, first, last)
        return indices, jnp.ones_like(mask)

    monkeypatch.setattr(evaluation.Evaluator, "_place", unmasked)
    assert evaluator()(jnp.float32(1), 0, 16)  # nothing to mask
    with pytest.raises(AssertionError, match=r"24\.0 examples were evaluated, not 17"):
        evaluator()(jnp.float32(1), 0, 17)


# The same on several devices, where the batch is a multiple of their number; and the real task against NumPy.
SEVERAL = """
import json

import jax

jax.config.update("jax_num_cpu_devices", 5)

import jax.numpy as jnp
import numpy as np

from research.data import digits
from research.models import cifar_resnet
from research.tasks.classification import classification
from research.tasks.task import Task
from research.training import evaluation, optimizers, parallel, state

found = {}
for devices in (1, 2, 5):
    mesh = parallel.make_mesh(devices)
    data = parallel.replicate({"number": np.arange(21)}, mesh)

    def count_each(variables, batch):
        seen = [((batch["number"] == n) * batch["mask"]).sum() for n in range(21)]
        shards.append(len(batch["number"]))
        return {str(n): value for n, value in enumerate(seen)} | {"count": batch["mask"].sum()}

    shards = []
    one = evaluation.Evaluator(Task(None, count_each, None), mesh, {}, data, batch_size=8)
    for first, last in ((0, 21), (4, 11), (19, 21)):
        means = one({}, first, last)
        assert means == {str(n): (1 / (last - first) if first <= n < last else 0) for n in range(21)}, (devices, means)
    found[devices] = shards
assert found == {1: [8], 2: [8], 5: [10]}, found

part = digits.load().test  # 300: not a multiple of 64
model = cifar_resnet(8, "residual", 4, 10)
mean = part.images.mean(axis=0)
variables = state.initialize(model, optimizers.sgd(lambda step: 0.1), 0, jnp.zeros((1, 8, 8, 1))).variables
task = classification(state.bind(model), mean=mean)
errors = {}
for devices in (1, 2, 5):
    mesh = parallel.make_mesh(devices)
    place = lambda tree: parallel.replicate(jax.device_get(tree), mesh)
    data, here = place({"images": part.images, "labels": part.labels}), place(variables)
    errors[devices] = evaluation.Evaluator(task, mesh, here, data, batch_size=64)(here, 0, len(part))
scores = np.asarray(model.apply(variables, (part.images.astype(np.float32) - mean) / 128, train=False), np.float64)
wrong = (scores.argmax(-1) != part.labels).mean()
loss = (np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(part)), part.labels]).mean()
for value in errors.values():
    assert value["error"] == wrong, (errors, wrong)
    np.testing.assert_allclose(value["loss"], loss, rtol=1e-5)
print(json.dumps(errors))
"""


def test_every_example_exactly_once_on_several_devices(commands):
    result = commands.script(SEVERAL, NPROC="20")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout).keys() == {"1", "2", "5"}
