"""The order of examples, and stretches of steps: cut anywhere, they give the same bits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import CarouselError
from research.models.convolution import Convolution
from research.models.resnet import ResNet
from research.tasks.classification import classification
from research.training import state as states
from research.training import step as step_module
from research.training.optimizers import sgd, step_decay
from research.training.step import make_evaluation, make_stretch, permutations, shuffled_indices

KEY = jax.random.key(5)


def indices(first_step, steps, batch_size, examples, key=KEY):
    permutation = permutations(key, examples)
    found = shuffled_indices(permutation, first_step, steps=steps, batch_size=batch_size, examples=examples)
    assert found.shape == (*key.shape, steps, batch_size) and found.dtype == np.int32
    return found


# The order of examples


@pytest.mark.parametrize(("batch_size", "examples"), [(4, 12), (7, 12), (30, 12), (3, 1)])
def test_every_epoch_is_a_permutation_of_all_examples(batch_size, examples):
    epochs = 5
    steps = -(-epochs * examples // batch_size)
    stream = indices(0, steps, batch_size, examples).ravel()[: epochs * examples].reshape(epochs, examples)
    np.testing.assert_array_equal(np.sort(stream, axis=1), np.tile(np.arange(examples), (epochs, 1)))
    if examples > 3:
        assert len({tuple(epoch) for epoch in stream}) == epochs
        assert not (np.diff(stream, axis=1) == 1).all(axis=1).any()  # shuffled


def test_the_permutation_of_an_epoch_is_drawn_from_its_number():
    stream = indices(0, 9, 4, 12).reshape(3, 12)
    for epoch in range(3):
        expected = jax.random.permutation(jax.random.fold_in(KEY, epoch), 12)
        np.testing.assert_array_equal(stream[epoch], expected)
    assert not np.array_equal(stream, indices(0, 9, 4, 12, jax.random.key(6)).reshape(3, 12))


@pytest.mark.parametrize(("batch_size", "examples", "cut"), [(5, 12, 1), (5, 12, 8), (30, 12, 3)])
def test_stretch_by_stretch_is_all_at_once(batch_size, examples, cut):
    whole = indices(0, 24, batch_size, examples)
    parts = [indices(first, cut, batch_size, examples) for first in range(0, 24, cut)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(("batch_size", "examples"), [(32, 100), (25, 6)])
def test_late_steps_do_not_overflow(batch_size, examples):
    """Where step * batch_size passes 2**31, and at the last steps and epochs of int32; places in Python's integers."""
    permutation = jax.jit(lambda epoch: jax.random.permutation(jax.random.fold_in(KEY, epoch), examples))
    for first in (2**31 // batch_size - 2, min(2**31, 2**31 * examples // batch_size) - 100):
        found = indices(first, 4, batch_size, examples).ravel()
        places = [first * batch_size + k for k in range(4 * batch_size)]
        permutations = {epoch: np.asarray(permutation(epoch)) for epoch in {place // examples for place in places}}
        np.testing.assert_array_equal(found, [permutations[p // examples][p % examples] for p in places])


def test_seeds_have_orders_of_their_own():
    keys = jnp.stack([KEY, jax.random.key(6)])
    expected = [indices(5, 4, 7, 12, key) for key in keys]
    np.testing.assert_array_equal(indices(5, 4, 7, 12, keys), expected)


def test_an_order_is_drawn_once_an_epoch(monkeypatch):
    drawn, original = [], step_module._permutation
    monkeypatch.setattr(step_module, "_permutation", lambda *a: drawn.append(a[1]) or original(*a))
    permutation = permutations(KEY, 12)
    for first in range(0, 24, 3):  # 5 examples a step: epochs of 2.4 steps, stretches over two or three of them
        shuffled_indices(permutation, first, steps=3, batch_size=5, examples=12)
    assert drawn == list(range(10))


# Stretches


def least_squares(variables, batch, keys, key):
    """A linear model with noise from the keys, and a collection that counts its calls."""
    noise = jax.vmap(jax.random.normal)(keys)
    residual = batch["x"] @ variables["params"]["w"] - batch["y"] + 0.1 * noise
    value = (residual**2).mean()
    return value, ({"calls": variables["calls"] + 1}, {"loss": value, "noise": noise.mean()})


RANDOM = np.random.default_rng(0)
DATA = {name: RANDOM.standard_normal(shape).astype(np.float32) for name, shape in {"x": (12, 3), "y": (12,)}.items()}
SCHEDULE = step_decay(0.1, drops=(4, 8))
OPTIMIZER = sgd(SCHEDULE, weight_decay=0.01)


def start():
    params = {"w": jnp.asarray([1.0, -2.0, 0.5])}
    return states.TrainState(jnp.int32(0), params, {"calls": jnp.int32(0)}, OPTIMIZER.init(params))


def test_a_stretch_by_hand():
    order = indices(0, 10, 5, 12)
    after, metrics = jax.jit(make_stretch(least_squares, OPTIMIZER, SCHEDULE, None))(start(), DATA, order, KEY)
    assert {name: value.shape for name, value in metrics.items()} == dict.fromkeys(
        ("loss", "noise", "gradient_norm", "learning_rate"), (10,)
    )
    w, v = np.asarray(start().params["w"], np.float64), np.zeros(3)
    for step in range(10):
        x, y = DATA["x"][order[step]], DATA["y"][order[step]]
        step_key = jax.random.fold_in(KEY, step)
        noise = np.array([jax.random.normal(jax.random.fold_in(step_key, place)) for place in range(5)])
        residual = x @ w - y + 0.1 * noise
        gradient = 2 * x.T @ residual / 5
        rate = 0.1 / 10 ** ((step >= 4) + (step >= 8))
        np.testing.assert_allclose(metrics["loss"][step], (residual**2).mean(), rtol=1e-4)
        np.testing.assert_allclose(metrics["noise"][step], noise.mean(), rtol=1e-4)
        # Of the loss alone: the weight decay is not in it.
        np.testing.assert_allclose(metrics["gradient_norm"][step], np.linalg.norm(gradient), rtol=1e-4)
        np.testing.assert_allclose(metrics["learning_rate"][step], rate, rtol=1e-6)
        v = 0.9 * v + gradient + 0.01 * w
        w = w - rate * v
    np.testing.assert_allclose(after.params["w"], w, rtol=1e-4)
    assert (int(after.step), int(after.collections["calls"])) == (10, 10)


def test_a_named_axis_averages_shares_into_the_whole_batch():
    order = indices(0, 10, 6, 12)
    whole, metrics = jax.jit(make_stretch(least_squares, OPTIMIZER, SCHEDULE, None))(start(), DATA, order, KEY)
    shares = jax.vmap(
        make_stretch(least_squares, OPTIMIZER, SCHEDULE, "batch"), (None, None, 1, None), axis_name="batch"
    )
    after, metrics_of_shares = jax.jit(shares)(start(), DATA, order.reshape(10, 3, 2), KEY)
    for device in range(3):
        np.testing.assert_allclose(after.params["w"][device], whole.params["w"], rtol=1e-5)
        for name, value in metrics.items():
            np.testing.assert_allclose(metrics_of_shares[name][device], value, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def network():
    """A stretch of the real thing: a ResNet without blocks, crops and mirror images; and its first state and data."""
    model = ResNet((Convolution(4),), False, (), num_classes=10)
    random = np.random.default_rng(0)
    data = {
        "images": random.integers(0, 256, (24, 8, 8, 1)).astype(np.uint8),
        "labels": random.integers(0, 10, 24).astype(np.int32),
    }
    task = classification(states.bind(model), mean=np.float32(128), crop=1, flip=True)
    stretch = jax.jit(make_stretch(task.loss, OPTIMIZER, SCHEDULE, None))
    return model, task, stretch, states.initialize(model, OPTIMIZER, 0, jnp.zeros((1, 8, 8, 1))), data


def train(network, cuts, key=KEY):
    _, _, stretch, state, data = network
    metrics = []
    for steps in cuts:
        order = indices(int(state.step), steps, 10, 24)
        state, found = stretch(state, data, order, key)
        metrics.append(jax.device_get(found))
    return state, jax.tree.map(lambda *parts: np.concatenate(parts), *metrics)


def test_a_stretch_of_ten_is_two_of_five_and_ten_of_one(network):
    whole, metrics = train(network, [10])
    for cuts in ([5, 5], [1] * 10):
        state, found = train(network, cuts)
        assert states.sha256(state) == states.sha256(whole)
        jax.tree.map(np.testing.assert_array_equal, found, metrics)
    assert states.sha256(train(network, [10], jax.random.key(6))[0]) != states.sha256(whole)  # augmentation is on


def test_the_state_moves_as_a_whole(network):
    before = network[3]
    after, metrics = train(network, [10])
    old, new = states.flatten(before), states.flatten(after)
    assert old.keys() == new.keys()
    for name in old:
        assert not np.array_equal(old[name], new[name]), name
    assert metrics["loss"][-3:].mean() < metrics["loss"][:3].mean()


def test_evaluation_takes_the_examples_asked_for(network):
    model, task, _, state, data = network
    chosen, mask = np.array([3, 20, 7, 7]), np.array([1, 1, 1, 0], np.float32)
    sums, carried = jax.jit(make_evaluation(task.evaluate))(state.variables, data, chosen, mask)
    assert carried == {}
    images = (data["images"][chosen[:3]].astype(np.float32) - 128) / 128
    logits = np.float64(jax.jit(partial(model.apply, train=False))(state.variables, images))
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    labels = data["labels"][chosen[:3]]
    assert float(sums["loss"]) == pytest.approx(-log_softmax[range(3), labels].sum(), rel=1e-5)
    assert float(sums["error"]) == (logits.argmax(axis=1) != labels).sum()
    assert float(sums["count"]) == 3


# The state


def test_streams_of_randomness_differ_by_seed_and_name():
    keys = {tuple(jax.random.key_data(states.stream(seed, name)).tolist()) for seed in (0, 1) for name in ("a", "b")}
    assert len(keys) == 4
    assert jnp.array_equal(jax.random.key_data(states.stream(0, "a")), jax.random.key_data(states.stream(0, "a")))


def test_the_first_state_is_the_seeds(network):
    model, *_, state, _ = network
    other = states.initialize(model, OPTIMIZER, 1, jnp.zeros((1, 8, 8, 1)))
    for name, array in states.flatten(state).items():
        drawn = name.endswith("kernel") and name.startswith("params")
        assert np.array_equal(array, states.flatten(other)[name]) != drawn, name
    assert int(state.step) == 0 and state.variables.keys() == {"params", "batch_stats"}


def test_a_state_returns_from_its_arrays(network):
    state = train(network, [1])[0]
    arrays = states.flatten(state)
    assert "params/stem_conv/kernel" in arrays and arrays["step"].dtype == np.int32
    again = states.unflatten(arrays, network[3], "a.safetensors")
    assert states.sha256(again) == states.sha256(state)
    assert jax.tree.structure(again) == jax.tree.structure(state)


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("step"),
        lambda arrays: arrays.update(extra=np.zeros(3)),
        lambda arrays: arrays.update(step=np.zeros((), np.int64)),
        lambda arrays: arrays.update({"params/head/bias": np.zeros(11, np.float32)}),
    ],
)
def test_arrays_of_another_state_are_refused(network, change):
    arrays = states.flatten(network[3])
    change(arrays)
    with pytest.raises(CarouselError, match=r"^a.safetensors does not hold this run's state: .* \(1 such arrays\)"):
        states.unflatten(arrays, network[3], "a.safetensors")


def test_every_bit_and_name_counts_in_the_digest(network):
    state = network[3]
    flipped = jax.tree.map(np.array, state)
    flipped.params["head"]["kernel"].view(np.uint32)[0, 0] ^= 1
    renamed = state._replace(params={("Head" if n == "head" else n): v for n, v in state.params.items()})
    assert len({states.sha256(s) for s in (state, flipped, renamed, state._replace(step=jnp.int32(1)))}) == 4
