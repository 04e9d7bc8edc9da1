"""The state by name: nothing is lost, half restored or mixed up, and its digest sees one bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors as flax_errors
from flax import linen as nn

from research.errors import CarouselError, UsageError
from research.models import cifar_resnet
from research.training import optimizers, state
from research.training.state import TrainState


def small():
    return TrainState(
        step=jnp.int32(3),
        params={"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3)}},
        collections={"batch_stats": {"norm": {"mean": jnp.ones(3)}}},
        opt_state=(optimizers.sgd(lambda step: 0.1).init({"w": jnp.zeros(2)}), jnp.uint32(7)),
    )


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x.reshape(len(x), -1)))


def test_flatten_names_every_array():
    flat = state.flatten(small())
    assert {"step", "params/dense/kernel", "params/dense/bias", "collections/batch_stats/norm/mean"} <= flat.keys()
    assert all(isinstance(array, np.ndarray) for array in flat.values())
    assert len(flat) == len(jax.tree.leaves(small()))


def test_unflatten_is_the_inverse_whatever_the_order_of_the_names():
    flat = state.flatten(small())
    assert_equal(state.unflatten(flat, small(), "x"), small())
    assert_equal(state.unflatten(dict(sorted(flat.items(), reverse=True)), small(), "x"), small())


def test_the_names_of_a_real_state_are_pinned():
    # Checkpoints outlive refactors: a name that changes makes old ones unreadable.
    optimizer = optimizers.sgd(lambda step: 0.1)
    shapes = jax.eval_shape(lambda: state.initialize(cifar_resnet(20, width=4), optimizer, 0, jnp.zeros((1, 8, 8, 1))))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(shapes)]
    assert {path.split("/")[0] for path in paths} == {"step", "params", "collections", "opt_state"}
    assert {
        "params/stem_conv/kernel",
        "params/stage1_rest/conv2/kernel",
        "params/stage3_first/norm1/scale",
        "params/head/bias",
        "collections/batch_stats/stage2_rest/norm2/var",
        "opt_state/1/trace/stage2_first/conv1/kernel",
        "opt_state/2/count",
    } <= set(paths)


def without(name):
    return lambda flat: {key: array for key, array in flat.items() if key != name}


KERNEL = "params/dense/kernel"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (without(KERNEL), KERNEL),
        (without("step"), "step"),
        (lambda flat: flat | {"params/extra": np.zeros(1)}, "params/extra"),
        (lambda flat: flat | {KERNEL: flat[KERNEL].T}, KERNEL),
        (lambda flat: flat | {KERNEL: flat[KERNEL][None]}, KERNEL),
        (lambda flat: flat | {KERNEL: flat[KERNEL].astype(np.float16)}, KERNEL),
        (lambda flat: flat | {"step": flat["step"].astype(np.int64)}, "step"),
    ],
    ids=["missing", "no step", "extra", "transposed", "one axis more", "other type", "wider step"],
)
def test_another_state_is_refused_by_name(change, name):
    with pytest.raises(CarouselError, match=rf"^here/step_1 does not hold this run's state: {name} is missing, extra"):
        state.unflatten(change(state.flatten(small())), small(), "here/step_1")


def test_the_digest_sees_one_bit_a_name_a_type_and_a_shape():
    base = small()
    digests = [state.sha256(base), state.sha256(jax.device_get(base))]
    assert len(set(digests)) == 1 and len(digests[0]) == 64
    flipped = np.asarray(base.params["dense"]["kernel"]).copy()
    flipped.view(np.uint32)[1, 2] ^= 1
    dense = base.params["dense"]
    others = [
        base._replace(params={"dense": dense | {"kernel": flipped}}),
        base._replace(params={"dense": dense | {"bias": -dense["bias"]}}),  # 0 and -0 are equal, their bits are not
        base._replace(params={"dance": dense}),
        base._replace(params={"dense": dense | {"kernel": dense["kernel"].reshape(3, 2)}}),
        base._replace(step=jnp.uint32(3)),
        base._replace(step=jnp.int32(4)),
        base._replace(collections={}),
    ]
    assert len({digests[0], *map(state.sha256, others)}) == 1 + len(others)


def test_streams_differ_by_name_and_by_seed():
    # Seeds that share their low bits too: keys hold 32.
    keys = [
        state.stream(seed, name)
        for seed in (0, 1, 2**31, 2**32 - 1)
        for name in ("parameters", "order", "augmentation")
    ]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == len(keys)
    again = jax.random.key_data(state.stream(0, "order")).tobytes()
    assert again == jax.random.key_data(keys[1]).tobytes()


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_a_seed_that_would_repeat_another_is_refused(seed):
    with pytest.raises(UsageError, match=f"seed {seed}"):
        state.stream(seed, "order")


def test_initialisation_does_not_depend_on_the_batch_and_starts_at_zero():
    model, optimizer = Net(), optimizers.sgd(lambda step: 0.1)
    one, two = (state.initialize(model, optimizer, 0, jnp.zeros((batch, 8, 8, 1))) for batch in (1, 2))
    assert state.sha256(one) == state.sha256(two)
    assert int(one.step) == 0 and one.step.dtype == jnp.int32
    assert one.variables.keys() == {"params", "batch_stats"}


def test_binding_gives_updated_collections_in_training_only():
    model = Net()
    variables = state.initialize(model, optimizers.sgd(lambda step: 0.1), 0, jnp.zeros((1, 8, 8, 1))).variables
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    apply = state.bind(model)
    trained, collections = apply(variables, images, train=True)
    evaluated, none = apply(variables, images, train=False)
    assert none == {} and collections.keys() == {"batch_stats"}
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), collections["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(moved))
    assert not np.allclose(trained, evaluated)


# Other variables to start from


def started():
    return state.initialize(Net(), optimizers.sgd(lambda step: 0.1), 0, jnp.zeros((1, 8, 8, 1)))


def test_replacing_the_variables_keeps_the_rest():
    initial = started()._replace(step=jnp.int32(5))
    other = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, initial.variables)
    replaced = state.replace_variables(initial, other)
    assert_equal(replaced.variables, other)
    assert replaced.variables.keys() == {"params", "batch_stats"} == other.keys(), "the argument was changed"
    assert int(replaced.step) == 5
    assert_equal(replaced.opt_state, initial.opt_state)
    assert_equal(state.replace_variables(initial, initial.variables), initial)


def changed(*names, value=None):
    """A change of one leaf of the variables: to a value, or away with it."""

    def change(variables):
        *path, last = names
        inner = variables
        for name in path:
            inner = inner[name]
        inner.pop(last) if value is None else inner.update({last: value})
        return variables

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("params", "Dense_0", "bias"), r"params/Dense_0/bias is \(3,\) here and nothing there"),
        (changed("params", "Dense_0", "gain", value=np.ones(2)), r"Dense_0/gain is nothing here and \(2,\) there"),
        (
            changed("params", "Dense_0", "kernel", value=np.ones((3, 64))),
            r"kernel is \(64, 3\) here and \(3, 64\) there",
        ),
        (changed("batch_stats"), r"batch_stats/BatchNorm_0/mean is \(3,\) here and nothing there"),
        (changed("params", "Dense_0", "bias", value=np.float32(0)), r"bias is \(3,\) here and \(\) there"),
    ],
    ids=["missing", "extra", "transposed", "no statistics", "a scalar"],
)
def test_variables_of_another_network_are_refused_by_name(change, message):
    variables = change(jax.tree.map(np.asarray, started().variables))
    with pytest.raises(UsageError, match=f"the weights to start from are not this network's: .*{message}") as caught:
        state.replace_variables(started(), variables)
    assert "\n" not in str(caught.value)


# Randomness in the model


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dropout(0.5, deterministic=not train)(x) * self.param("scale", nn.initializers.ones, ())


def test_a_model_that_draws_draws_by_the_key_it_is_bound_with():
    apply, x = state.bind(Dropped()), jnp.ones((4, 100))
    variables = {"params": {"scale": jnp.float32(3)}}
    one, again, other = (apply(variables, x, train=True, key=jax.random.key(seed))[0] for seed in (0, 0, 1))
    assert set(np.unique(one)) == {0, 6} and 100 < int((one == 0).sum()) < 300
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    # Nothing is drawn in evaluation, whatever the key; without a key there is nothing to draw from in training.
    for key in (None, jax.random.key(0)):
        np.testing.assert_array_equal(apply(variables, x, train=False, key=key)[0], 3 * x)
    with pytest.raises(flax_errors.InvalidRngError):
        apply(variables, x, train=True)


def test_a_model_that_does_not_draw_does_not_see_the_key():
    variables, images = started().variables, jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    outputs = [state.bind(Net())(variables, images, train=True, key=key) for key in (None, jax.random.key(1))]
    assert_equal(*outputs)
