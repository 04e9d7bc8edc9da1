"""Recurrent cells: values against NumPy by hand, derivatives against finite differences, what gates keep exactly."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from research.ops import recurrent

BATCH, N = 3, 4
RANDOM = np.random.default_rng(0)
HOLES = recurrent.Peepholes(*RANDOM.standard_normal((3, N)))
BIAS = RANDOM.standard_normal(N)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def draw(*shape):
    return RANDOM.standard_normal(shape)


H, C = draw(BATCH, N), draw(BATCH, N)


def lstm(h, c, a, u, **options):
    return recurrent.lstm_step(recurrent.LSTMCarry(h, c), a, h @ u, **options)


def split(cell):
    """A cell that takes r, as one that takes U."""
    return lambda h, a, u, **options: cell(h, a, h @ u, **options)


# name -> (cell of (states..., a, U), number of states, gates, the same by hand)
CELLS = {
    "tanh": (split(recurrent.vanilla_step), 1, 1, lambda h, a, u: np.tanh(a + h @ u)),
    "relu": (
        split(partial(recurrent.vanilla_step, activation=jax.nn.relu)),
        1,
        1,
        lambda h, a, u: np.maximum(a + h @ u, 0),
    ),
    "leaky": (
        split(partial(recurrent.leaky_step, leak=0.8)),
        1,
        1,
        lambda h, a, u: 0.8 * h + 0.2 * np.tanh(a + h @ u),
    ),
    "gru after": (split(partial(recurrent.gru_reset_after_step, bias=BIAS)), 1, 3, None),
    "gru before": (recurrent.gru_reset_before_step, 1, 3, None),
    "mgu": (recurrent.minimal_gated_step, 1, 2, None),
    "lstm": (lstm, 2, 4, None),
    "lstm, forget bias": (partial(lstm, forget_bias=1.5), 2, 4, None),
    "lstm, peepholes": (partial(lstm, peepholes=HOLES), 2, 4, None),
    "lstm, sigmoid candidate": (partial(lstm, candidate=jax.nn.sigmoid), 2, 4, None),
}


def gru_by_hand(h, a, u, *, before):
    (a_z, a_s, a_g), (u_z, u_s, u_g) = np.split(a, 3, -1), np.split(u, 3, -1)
    z, s = sigmoid(a_z + h @ u_z), sigmoid(a_s + h @ u_s)
    g = np.tanh(a_g + ((s * h) @ u_g if before else s * (h @ u_g + BIAS)))
    return (1 - z) * h + z * g


def mgu_by_hand(h, a, u):
    (a_f, a_g), (u_f, u_g) = np.split(a, 2, -1), np.split(u, 2, -1)
    f = sigmoid(a_f + h @ u_f)
    return (1 - f) * h + f * np.tanh(a_g + (f * h) @ u_g)


def lstm_by_hand(h, c, a, u, *, forget_bias=0.0, peepholes=(0, 0, 0), candidate=np.tanh):
    i, f, g, o = np.split(a + h @ u, 4, -1)
    new = sigmoid(f + peepholes[1] * c + forget_bias) * c + sigmoid(i + peepholes[0] * c) * candidate(g)
    return sigmoid(o + peepholes[2] * new) * np.tanh(new), new


BY_HAND = {name: hand for name, (_, _, _, hand) in CELLS.items() if hand} | {
    "gru after": partial(gru_by_hand, before=False),
    "gru before": partial(gru_by_hand, before=True),
    "mgu": mgu_by_hand,
    "lstm": lstm_by_hand,
    "lstm, forget bias": partial(lstm_by_hand, forget_bias=1.5),
    "lstm, peepholes": partial(lstm_by_hand, peepholes=HOLES),
    "lstm, sigmoid candidate": partial(lstm_by_hand, candidate=sigmoid),
}
each = pytest.mark.parametrize("name", CELLS)


def arguments(name):
    _, states, gates, _ = CELLS[name]
    random = np.random.default_rng(1)
    return (H, C)[:states] + (random.standard_normal((BATCH, gates * N)), random.standard_normal((N, gates * N)))


@each
def test_values_equal_those_by_hand(name):
    with jax.enable_x64(True):
        found = jax.tree.leaves(CELLS[name][0](*arguments(name)))
    expected = BY_HAND[name](*arguments(name))
    for one, two in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-14)


@each
def test_derivatives_equal_finite_differences(name):
    with jax.enable_x64(True):
        check_grads(CELLS[name][0], arguments(name), order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)


def test_an_open_forget_gate_is_a_constant_error_carousel():
    """f = 1 and i = 0: dc_T/dc_0 is exactly 1, whatever the other weights are, and so over any number of steps."""
    u = draw(N, 4 * N)
    a = np.concatenate([np.full((BATCH, N), -1e3), np.full((BATCH, N), 1e3), draw(BATCH, 2 * N)], axis=-1)

    def last_cell(c):
        carry = recurrent.LSTMCarry(jnp.asarray(H), c)
        for _ in range(50):
            carry = recurrent.lstm_step(carry, a, carry.h @ u)
        return carry.c

    np.testing.assert_array_equal(last_cell(jnp.asarray(C)), jnp.asarray(C))
    jacobian = jax.jacobian(last_cell)(jnp.asarray(C)).reshape(BATCH * N, BATCH * N)
    np.testing.assert_array_equal(jacobian, np.eye(BATCH * N))


def test_a_closed_update_gate_copies_the_state():
    h = jnp.asarray(H)
    closed = np.full((BATCH, N), -1e3)
    u = draw(N, 3 * N)
    for name, gates in (("gru after", 3), ("gru before", 3), ("mgu", 2)):
        a = np.concatenate([closed, draw(BATCH, (gates - 1) * N)], axis=-1)
        np.testing.assert_array_equal(CELLS[name][0](h, a, u[:, : gates * N] * 0.01), h)


def test_the_closed_input_and_open_forget_gate_make_a_standard_unit_otherwise():
    """f = 0, i = 1, o = 1: h' = tanh(tanh(a_g + r_g)), a vanilla unit (lecture deck 004)."""
    ones = np.full((BATCH, N), 1e3)
    a_g, u = draw(BATCH, N), np.concatenate([np.zeros((N, 2 * N)), draw(N, N), np.zeros((N, N))], axis=-1)
    a = np.concatenate([ones, -ones, a_g, ones], axis=-1)
    with jax.enable_x64(True):
        found = lstm(H, C, a, u)
    np.testing.assert_allclose(found.c, np.tanh(a_g + H @ u[:, 2 * N : 3 * N]), rtol=1e-12)
    np.testing.assert_allclose(found.h, np.tanh(found.c), rtol=1e-12)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("lstm", "lstm, forget bias"),
        ("lstm", "lstm, peepholes"),
        ("lstm", "lstm, sigmoid candidate"),
        ("gru after", "gru before"),
        ("tanh", "relu"),
        ("tanh", "leaky"),
    ],
)
def test_every_option_changes_the_output(one, two):
    values = [jax.tree.leaves(CELLS[name][0](*arguments(name)))[0] for name in (one, two)]
    assert np.abs(values[0] - values[1]).max() > 0.01


@pytest.mark.parametrize("gate", ["i", "f", "o"])
def test_every_peephole_changes_the_output(gate):
    none = recurrent.Peepholes(*np.zeros((3, N)))
    with_one = none._replace(**{gate: HOLES[0]})
    h, c, a, u = arguments("lstm")
    assert np.abs(lstm(h, c, a, u, peepholes=with_one).h - lstm(h, c, a, u, peepholes=none).h).max() > 0.01
    np.testing.assert_array_equal(lstm(h, c, a, u, peepholes=none).h, lstm(h, c, a, u).h)


def test_a_leak_of_nothing_is_the_vanilla_unit_and_time_constants_hold():
    h, a, u = arguments("leaky")
    np.testing.assert_array_equal(recurrent.leaky_step(h, a, h @ u, leak=0.0), recurrent.vanilla_step(h, a, h @ u))
    leak, state = 0.9, jnp.ones((1, 1))
    for _ in range(round(1 / (1 - leak))):
        state = recurrent.leaky_step(state, jnp.zeros((1, 1)), jnp.zeros((1, 1)), leak=leak)
    assert float(state[0, 0]) == pytest.approx(leak**10, rel=1e-5)  # near 1/e after one time constant


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError):
        recurrent.lstm_step(recurrent.LSTMCarry(H, C), draw(BATCH, 3 * N), draw(BATCH, 3 * N))
    with pytest.raises(AssertionError):
        recurrent.gru_reset_after_step(H, draw(BATCH, 4 * N), draw(BATCH, 4 * N))
    with pytest.raises(AssertionError):
        recurrent.gru_reset_before_step(H, draw(BATCH, 3 * N), draw(N, 4 * N))
    with pytest.raises(AssertionError):
        recurrent.vanilla_step(H, draw(BATCH, N), draw(BATCH, 2 * N))


def test_the_fused_lstm_step_is_the_plain_one_and_so_are_its_gradients():
    carry, a, r = recurrent.LSTMCarry(H, C), draw(BATCH, 4 * N), draw(BATCH, 4 * N)
    with jax.enable_x64(True):

        def run(step):
            loss = lambda carry, a, r: sum(jnp.sin(x).sum() for x in step(carry, a, r, forget_bias=1.5))  # noqa: E731
            return step(carry, a, r, forget_bias=1.5), jax.grad(loss, (0, 1, 2))(carry, a, r)

        got, expected = run(recurrent.fused_lstm_step), run(recurrent.lstm_step)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-14), got, expected)
    with pytest.raises(AssertionError):
        recurrent.fused_lstm_step(carry, a[:, :-1], r[:, :-1])
