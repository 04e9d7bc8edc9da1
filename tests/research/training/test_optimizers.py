"""The paper's schedule at its boundaries, and SGD's trajectory against PyTorch's and against NumPy by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.training.optimizers import sgd, step_decay


def rates(schedule, steps):
    return [float(schedule(jnp.int32(step))) for step in steps]


def test_the_papers_schedule():
    schedule = step_decay(0.1, drops=(32_000, 48_000), warmup_steps=400)
    steps = [0, 1, 399, 400, 31_999, 32_000, 47_999, 48_000, 63_999, 2**31 - 1]
    expected = [0.01, 0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.001]
    assert rates(schedule, steps) == [float(np.float32(rate)) for rate in expected]
    assert rates(jax.jit(schedule), steps) == rates(schedule, steps)


def test_without_warmup_and_without_drops():
    assert rates(step_decay(0.5, drops=(2,)), [0, 1, 2, 3]) == [0.5, 0.5, np.float32(0.05), np.float32(0.05)]
    assert rates(step_decay(0.5, drops=()), [0, 10**6]) == [0.5, 0.5]


def test_drops_in_one_place_count_each():
    """As happens where a run is so short that half and three quarters of it are the same step."""
    assert rates(step_decay(1.0, drops=(1, 1)), [0, 1]) == [1, np.float32(0.01)]


def test_a_drop_within_the_warmup_waits_for_its_end():
    schedule = step_decay(1.0, drops=(2,), warmup_steps=4)
    assert rates(schedule, [0, 2, 3, 4]) == [np.float32(0.1)] * 4


# SGD on a quadratic with a matrix, a vector and a scalar; the rate drops at 5 and 10.

SHAPES = {"w": (4, 3), "b": (3,), "s": ()}
RATE, DROPS, MOMENTUM, DECAY, STEPS = 0.1, (5, 10), 0.9, 0.05, 16


def draw(seed):
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


START, TARGET, CURVATURE = draw(0), draw(1), {name: np.abs(value) for name, value in draw(2).items()}


def gradient(params):
    return {name: CURVATURE[name] * (params[name] - TARGET[name]) for name in SHAPES}


def trajectory():
    optimizer = sgd(step_decay(RATE, drops=DROPS), momentum=MOMENTUM, weight_decay=DECAY)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(gradient(params), state, params)
        params = {name: params[name] + updates[name] for name in params}
        return (params, state), params

    params = jax.tree.map(jnp.asarray, START)
    return jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS)[1]


def rate_at(step):
    return RATE / 10 ** sum(drop <= step for drop in DROPS)


def test_the_trajectory_by_hand():
    found = trajectory()
    w = {name: value.astype(np.float64) for name, value in START.items()}
    v = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(STEPS):
        g = gradient(w)
        for name in SHAPES:
            v[name] = MOMENTUM * v[name] + g[name] + DECAY * w[name]
            w[name] = w[name] - rate_at(step) * v[name]
            np.testing.assert_allclose(found[name][step], w[name], rtol=1e-6, atol=1e-6)


def test_the_trajectory_is_pytorchs():
    torch = pytest.importorskip("torch", reason="torch is not installed (extra [bench])")
    found = trajectory()
    params = {name: torch.nn.Parameter(torch.from_numpy(np.array(value))) for name, value in START.items()}
    optimizer = torch.optim.SGD(params.values(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=DROPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        for name, param in params.items():
            target, curvature = (torch.from_numpy(np.array(tree[name])) for tree in (TARGET, CURVATURE))
            (curvature * (param - target) ** 2 / 2).sum().backward()
        optimizer.step()
        schedule.step()
        for name, param in params.items():
            np.testing.assert_allclose(found[name][step], param.detach().numpy(), rtol=1e-6, atol=1e-6)


def test_caffes_order_differs_after_a_drop_alone():
    """The docstring's claim: with the rate inside v the same numbers come out until the rate changes."""
    found = trajectory()["w"]
    w, v = START["w"].astype(np.float64), np.zeros(SHAPES["w"])
    difference = []
    for step in range(STEPS):
        v = MOMENTUM * v + rate_at(step) * (CURVATURE["w"] * (w - TARGET["w"]) + DECAY * w)
        w = w - v
        difference.append(np.abs(found[step] - w).max())
    assert max(difference[: DROPS[0]]) < 1e-6
    assert difference[DROPS[0]] > 1e-3


def test_the_defaults_are_the_papers():
    start = {"w": jnp.ones(3)}
    optimizer = sgd(lambda step: 0.1)
    state, params = optimizer.init(start), start
    for _ in range(2):
        updates, state = optimizer.update({"w": jnp.zeros(3)}, state, params)
        params = {"w": params["w"] + updates["w"]}
    first = 1 - 0.1 * 1e-4
    np.testing.assert_allclose(params["w"], first - 0.1 * (0.9 * 1e-4 + 1e-4 * first), rtol=1e-7)
