"""The papers' schedules at their boundaries, and trajectories against PyTorch's and against NumPy by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.training.optimizers import OPTIMIZERS, adam, constant, exponential_epochs, rmsprop, sgd, step_decay


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


def test_a_constant_is_an_array_of_the_device():
    rate = jax.jit(constant(0.1))(jnp.int32(7))
    assert (rate.dtype, float(rate)) == (jnp.float32, float(np.float32(0.1)))


@pytest.mark.parametrize(("hold", "factor", "epochs"), [(4, 2.0, 13), (6, 1.2, 39), (14, 1.15, 55)])
def test_zarembas_schedules(hold, factor, epochs):
    schedule = jax.jit(exponential_epochs(1.0, hold_epochs=hold, factor=factor, epochs=epochs, steps_per_epoch=3))
    by_epoch = [[float(schedule(jnp.int32(3 * epoch + step))) for step in range(3)] for epoch in range(epochs)]
    assert all(len(set(rates)) == 1 for rates in by_epoch)
    found = [rates[0] for rates in by_epoch]
    assert found[:hold] == [1.0] * hold
    expected = np.float32([factor**-k for k in range(1, epochs - hold + 1)])
    np.testing.assert_allclose(found[hold:], expected, rtol=1e-7)
    assert float(schedule(jnp.int32(2**31 - 1))) == found[-1]  # after the last epoch nothing changes


# SGD on a quadratic with a matrix, a vector and a scalar; the rate drops at 5 and 10.

SHAPES = {"w": (4, 3), "b": (3,), "s": ()}
RATE, DROPS, MOMENTUM, DECAY, STEPS = 0.1, (5, 10), 0.9, 0.05, 16
SCHEDULE = step_decay(RATE, drops=DROPS)


def draw(seed):
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


START, TARGET, CURVATURE = draw(0), draw(1), {name: np.abs(value) for name, value in draw(2).items()}


def gradient(params):
    return {name: CURVATURE[name] * (params[name] - TARGET[name]) for name in SHAPES}


def trajectory(optimizer=None):
    """Parameters after each step, by default of SGD."""
    optimizer = optimizer or sgd(SCHEDULE, momentum=MOMENTUM, weight_decay=DECAY)

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


# All three, clipped and not. The norm of the gradient is above CLIP in some of the steps.

CLIP = 3.0


def clipped(gradients, clip):
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    return {name: g * min(1, clip / norm) for name, g in gradients.items()}, norm > clip


def by_hand(kind, clip):
    """Yields the parameters after each step and whether its gradient was clipped, in float64."""
    w = {name: value.astype(np.float64) for name, value in START.items()}
    m, v = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    for step in range(STEPS):
        gradients, was_clipped = clipped(gradient(w), clip)
        for name, g in gradients.items():
            if kind == "sgd":
                update = g
            elif kind == "adam":
                m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g**2
                update = m[name] / (1 - 0.9 ** (step + 1)) / (np.sqrt(v[name] / (1 - 0.999 ** (step + 1))) + 1e-8)
            elif kind == "rmsprop":
                v[name] = 0.99 * v[name] + 0.01 * g**2
                update = g / (np.sqrt(v[name]) + 1e-8)
            w[name] = w[name] - rate_at(step) * update
        yield dict(w), was_clipped


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_trajectories_by_hand(kind, clip):
    found = trajectory(OPTIMIZERS[kind](SCHEDULE, clip_norm=clip))
    clips = 0
    for step, (w, was_clipped) in enumerate(by_hand(kind, clip or np.inf)):
        clips += was_clipped
        for name in SHAPES:
            np.testing.assert_allclose(found[name][step], w[name], rtol=2e-5, atol=2e-5)
    assert 0 < clips < STEPS if clip else clips == 0
    if clip:
        *_, (free, _) = by_hand(kind, np.inf)
        assert max(np.abs(free[name] - w[name]).max() for name in SHAPES) > 1e-3


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_trajectories_are_pytorchs(kind):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra [bench])")
    found = trajectory(OPTIMIZERS[kind](SCHEDULE, clip_norm=CLIP))
    params = {name: torch.nn.Parameter(torch.from_numpy(np.array(value))) for name, value in START.items()}
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}
    optimizer = kinds[kind](params.values(), lr=RATE)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=DROPS)
    for step in range(STEPS):
        now = gradient({name: param.detach().numpy() for name, param in params.items()})
        for name, param in params.items():
            param.grad = torch.from_numpy(np.array(now[name]))
        torch.nn.utils.clip_grad_norm_(params.values(), CLIP)
        optimizer.step()
        schedule.step()
        for name, param in params.items():
            np.testing.assert_allclose(found[name][step], param.detach().numpy(), rtol=2e-5, atol=2e-5)


def first_update(optimizer, g):
    return optimizer.update(g, optimizer.init(g), g)[0]


def test_epsilon_is_beside_the_root():
    """Where it counts, with gradients as small as it is: inside the root it would be 1e-4 there."""
    g = {"w": jnp.full(3, 1e-7)}
    np.testing.assert_allclose(first_update(adam(constant(1.0)), g)["w"], -1e-7 / (1e-7 + 1e-8), rtol=1e-5)
    expected = -1e-7 / (1e-8 + 1e-8)  # the root of v is a tenth
    np.testing.assert_allclose(first_update(rmsprop(constant(1.0)), g)["w"], expected, rtol=1e-5)
    expected = -1e-7 / (np.sqrt(0.1) * 1e-7 + 1e-8)
    np.testing.assert_allclose(first_update(rmsprop(constant(1.0), decay=0.9), g)["w"], expected, rtol=1e-5)


def test_clipping_is_of_the_whole_gradient_before_the_decay():
    g, w = {"a": jnp.full(3, 4.0), "b": jnp.full(1, 4.0)}, {"a": jnp.full(3, 10.0), "b": jnp.zeros(1)}
    optimizer = sgd(constant(1.0), weight_decay=0.5, clip_norm=2.0)
    updates, _ = optimizer.update(g, optimizer.init(w), w)  # the norm is 8: a quarter is left
    np.testing.assert_allclose(updates["a"], -6.0)
    np.testing.assert_allclose(updates["b"], -1.0)


def test_each_seed_is_clipped_by_its_own_norm():
    optimizer = OPTIMIZERS["sgd"](constant(1.0), clip_norm=1.0)
    g = {"w": jnp.array([[3.0, 4.0], [0.3, 0.4]])}
    updates, _ = jax.vmap(lambda g: optimizer.update(g, optimizer.init(g), g))(g)
    np.testing.assert_allclose(updates["w"], [[-0.6, -0.8], [-0.3, -0.4]], rtol=1e-6)


def test_names_in_checkpoints_are_kept():
    """Runs on disk have these; clipping puts two stages in front."""
    like = {"w": jnp.ones(3)}

    def names(optimizer):
        leaves = jax.tree_util.tree_leaves_with_path(optimizer.init(like))
        return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]

    assert names(sgd(SCHEDULE)) == names(OPTIMIZERS["sgd"](SCHEDULE)) == ["1/trace/w", "2/count"]
    assert names(sgd(SCHEDULE, clip_norm=1.0)) == ["3/trace/w", "4/count"]
    assert names(adam(SCHEDULE)) == ["0/count", "0/mu/w", "0/nu/w", "1/count"]
    assert names(rmsprop(SCHEDULE)) == ["0/nu/w", "1/count"]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("size", [np.inf, np.nan, 1e30])
def test_a_gradient_beyond_the_largest_number_moves_nothing(kind, size):
    optimizer = OPTIMIZERS[kind](constant(0.1), clip_norm=1.0)
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    exploded = {"a": jnp.float32([size, 1.0]), "b": jnp.full(3, 1e-3)}
    updates, opt_state = optimizer.update(exploded, optimizer.init(params), params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
    assert all(jnp.isfinite(leaf).all() and (leaf < 0).all() for leaf in jax.tree.leaves(updates))
