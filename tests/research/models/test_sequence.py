"""Networks over sequences: each against its layers one by one, masks, both directions, the three ways of depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import sequence
from research.models.recurrent import CELLS, Recurrent
from research.models.sequence import OneToSequence, OutputRecurrence, SequenceToOne, SequenceToSequence, Stack

BATCH, TIME, INPUTS, OUTPUTS = 3, 7, 5, 2
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((BATCH, TIME, INPUTS)).astype(np.float32)
TARGETS = RANDOM.standard_normal((BATCH, TIME, OUTPUTS)).astype(np.float32)
LENGTHS = np.array([7, 3, 5])
MASK = jnp.asarray(np.arange(TIME) < LENGTHS[:, None])
KEY = jax.random.key(0)


def stack(features=(4, 3), **options):
    return Stack(CELLS["lstm"](), features, **options)


def close(one, two):
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def run_layer(params, x, units, **options):
    return Recurrent(CELLS["lstm"](), units, **options).apply({"params": params}, x)[1]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("depth", sequence.DEPTHS)
def test_a_stack_is_its_layers_one_after_another(depth, bidirectional):
    model = stack(depth=depth, bidirectional=bidirectional)
    variables = model.init(KEY, X)
    params = variables["params"]
    x = X
    for number, units in enumerate((4, 3), start=1):
        if depth == "skip" and number == 2:
            x = jnp.concatenate([x, X], axis=-1)
        if depth == "transition":
            dense = params[f"transition{number}"]
            x = jnp.tanh(x @ dense["kernel"] + dense["bias"])
        directions = [run_layer(params[f"layer{number}"], x, units)]
        if bidirectional:
            directions.append(run_layer(params[f"layer{number}_reverse"], x, units, reverse=True))
        x = jnp.concatenate(directions, axis=-1)
    carries, found = model.apply(variables, X)
    close(found, x)
    assert len(carries) == 2 * (1 + bidirectional)


def test_the_ways_of_depth_are_different_networks():
    shapes = [jax.tree.map(jnp.shape, stack(depth=depth).init(KEY, X)) for depth in sequence.DEPTHS]
    assert all(one != two for one, two in zip(shapes, shapes[1:] + shapes[:1], strict=True))
    with pytest.raises(ValueError, match="depth 'deep' is unknown"):
        stack(depth="deep").init(KEY, X)


def test_a_carried_state_continues_the_sequence():
    model = stack()
    variables = model.init(KEY, X)
    _, whole = model.apply(variables, X)
    carries, first = model.apply(variables, X[:, :3])
    _, second = model.apply(variables, X[:, 3:], carries)
    close(jnp.concatenate([first, second], axis=1), whole)
    with pytest.raises(ValueError, match="has seen the end"):
        stack(bidirectional=True).init(KEY, X, carries)


def test_a_packed_row_is_its_sequences_alone():
    model = SequenceToSequence(Stack(CELLS["tanh"](), (4,), bidirectional=True), OUTPUTS)

    @jax.jit
    def packed_and_alone(mask, starts):
        variables = model.init(KEY, X)
        alone = [model.apply(variables, piece) for piece in (X[:, :3], X[:, 3:-1])]
        return model.apply(variables, X, mask, starts)[:, :-1], jnp.concatenate(alone, axis=1)

    times = jnp.arange(TIME)
    close(*packed_and_alone(*(jnp.broadcast_to(row, (BATCH, TIME)) for row in (times < TIME - 1, times == 3))))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_one_output_is_that_of_each_sequence_alone(bidirectional):
    model = SequenceToOne(stack(bidirectional=bidirectional), OUTPUTS)
    variables = model.init(KEY, X)
    together = model.apply(variables, X, MASK)
    assert together.shape == (BATCH, OUTPUTS)
    for n, length in enumerate(LENGTHS):
        close(together[n], model.apply(variables, X[n : n + 1, :length])[0])
    assert np.abs(together - model.apply(variables, X)).max() > 1e-3  # the mask does something


def test_a_bidirectional_output_sees_past_and_future_and_a_forward_one_the_past():
    for bidirectional in (False, True):
        model = SequenceToSequence(stack(bidirectional=bidirectional), OUTPUTS)
        variables = model.init(KEY, X)
        seen = jax.jacobian(lambda x, m=model, v=variables: m.apply(v, x)[0, 3].sum())(X)[0]
        reached = np.abs(seen).max(axis=-1) > 0
        assert reached.tolist() == [True] * 4 + [bidirectional] * 3


def test_one_vector_becomes_a_sequence():
    model = OneToSequence(stack(), OUTPUTS)
    variables = model.init(KEY, X[:, 0], TARGETS)
    found = model.apply(variables, X[:, 0], TARGETS)
    assert found.shape == (BATCH, TIME, OUTPUTS)
    # Output t reads the vector and the targets before t.
    by_target = jax.jacobian(lambda y: model.apply(variables, X[:, 0], y)[0, 3].sum())(TARGETS)[0]
    assert (np.abs(by_target).max(axis=-1) > 0).tolist() == [True] * 3 + [False] * 4
    assert np.abs(jax.jacobian(lambda x: model.apply(variables, x, TARGETS)[0, 0].sum())(X[:, 0])[0]).max() > 0


def test_teacher_forcing_with_the_own_outputs_is_running_free():
    model = OutputRecurrence(6, OUTPUTS)
    variables = jax.tree.map(lambda leaf: leaf + 0.1, model.init(KEY, X))
    free = model.apply(variables, X)
    close(model.apply(variables, X, free), free)
    forced = model.apply(variables, X, TARGETS)
    assert np.abs(forced - free).max() > 0.01
    # With the outputs given, steps do not wait for each other: output t reads input t alone.
    by_input = jax.jacobian(lambda x: model.apply(variables, x, TARGETS)[0, 3].sum())(X)[0]
    assert (np.abs(by_input).max(axis=-1) > 0).tolist() == [t == 3 for t in range(TIME)]
    by_hand = jnp.tanh(X[:, 0] @ variables["params"]["input_kernel"] + variables["params"]["bias"])
    close(free[:, 0], by_hand @ variables["params"]["head_kernel"] + variables["params"]["head_bias"])


@pytest.mark.parametrize(
    "model",
    [
        SequenceToSequence(stack(bidirectional=True, depth="skip"), OUTPUTS),
        SequenceToSequence(stack(depth="transition"), OUTPUTS),
        OneToSequence(stack(), OUTPUTS),
        OutputRecurrence(6, OUTPUTS),
    ],
)
def test_every_parameter_has_a_gradient(model):
    given = {SequenceToSequence: (X,), OneToSequence: (X[:, 0], TARGETS), OutputRecurrence: (X,)}[type(model)]
    variables = jax.tree.map(lambda leaf: leaf + 0.1, model.init(KEY, *given))
    weights = np.random.default_rng(1).standard_normal((BATCH, TIME, OUTPUTS))

    gradients = jax.grad(lambda variables: (model.apply(variables, *given) * weights).sum())(variables)
    for leaf in jax.tree.leaves(gradients):
        assert (leaf != 0).mean() > 0.9
