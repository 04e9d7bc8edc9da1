"""Weight noise: the gradient is that at the noisy point, draws are fresh and their own, and evaluation sees none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.tasks.noise import with_weight_noise
from research.tasks.sequences import regression

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.standard_normal((5, 1, 200)), jnp.float32)
BATCH = {"inputs": X, "targets": jnp.asarray(RANDOM.standard_normal(5), jnp.float32), "mask": jnp.ones(5)}
VARIABLES = {
    "params": {"b": jnp.zeros((200, 1)), "w": jnp.asarray(RANDOM.standard_normal((200, 1)), jnp.float32)},
    "seen": {"count": jnp.float32(3)},
}
KEY, KEYS = jax.random.key(1), jax.random.split(jax.random.key(2), 5)
STD = 0.075


def apply(variables, x, *, train, key=None):
    """A linear model that tells as its collections what it was given."""
    outputs = x[:, 0] @ (variables["params"]["w"] + variables["params"]["b"])
    return outputs, {"variables": variables, "key": key}


TASK = regression(apply)


def noisy_gradient(std, key=KEY):
    """The gradient of the noisy task, the point that the model was at, and the key that it was given."""

    def of_params(params):
        return with_weight_noise(TASK, std).loss({**VARIABLES, "params": params}, BATCH, KEYS, key)

    gradient, (seen, _) = jax.grad(of_params, has_aux=True)(VARIABLES["params"])
    return gradient, seen["variables"], seen["key"]


def noise(key=KEY):
    point = noisy_gradient(STD, key)[1]["params"]
    return {name: np.asarray(point[name] - VARIABLES["params"][name]) for name in point}


def plain_gradient(params):
    return jax.grad(lambda params: TASK.loss({**VARIABLES, "params": params}, BATCH, KEYS, KEY)[0])(params)


def test_the_gradient_is_that_at_the_noisy_point():
    gradient, seen, key = noisy_gradient(STD)
    # By hand: of mean (x (w + b) - y)^2.
    rows = np.asarray(X[:, 0], np.float64)
    point = np.asarray(seen["params"]["w"] + seen["params"]["b"], np.float64)[:, 0]
    expected = 2 * rows.T @ (rows @ point - np.asarray(BATCH["targets"])) / 5
    for name in ("w", "b"):
        np.testing.assert_allclose(gradient[name][:, 0], expected, rtol=1e-4, atol=1e-3)
    assert not np.allclose(gradient["w"], plain_gradient(VARIABLES["params"])["w"], rtol=0.01)
    assert seen["seen"] == VARIABLES["seen"]  # other variables have no noise
    assert key == KEY  # dropout's


def test_the_noise_is_normal_and_of_every_parameter_its_own():
    drawn = noise()
    for values in drawn.values():
        assert values.std() == pytest.approx(STD, rel=0.15) and abs(values.mean()) < 0.02
    both = np.corrcoef(drawn["w"][:, 0], drawn["b"][:, 0])[0, 1]
    assert abs(both) < 0.25


def test_the_draw_is_the_steps_and_not_that_of_others():
    first, again, other = noise(), noise(), noise(jax.random.fold_in(KEY, 1))
    for name, values in first.items():
        np.testing.assert_array_equal(again[name], values)
        assert np.abs(other[name] - values).mean() > STD / 2
    for taken in (KEY, *jax.random.split(KEY, 2)):
        assert not np.allclose(first["b"], STD * jax.random.normal(taken, (200, 1)), atol=1e-3)


def test_no_noise_changes_nothing():
    gradient, seen, _ = noisy_gradient(0.0)
    expected = plain_gradient(VARIABLES["params"])
    for name in expected:
        np.testing.assert_array_equal(seen["params"][name], VARIABLES["params"][name])
        np.testing.assert_array_equal(gradient[name], expected[name])


def test_evaluation_and_the_rest_of_the_task_are_unchanged():
    noisy = with_weight_noise(TASK, 10.0)
    assert noisy.loss is not TASK.loss and dataclasses.replace(noisy, loss=TASK.loss) == TASK
    assert noisy.evaluate(VARIABLES, BATCH) == TASK.evaluate(VARIABLES, BATCH)
