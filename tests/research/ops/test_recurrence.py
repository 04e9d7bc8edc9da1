"""The scan over time: equal to a loop in Python, by every option; masks, packing, segments, memory; PyTorch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops import recurrence, recurrent

TIME, BATCH, N, INPUTS = 11, 3, 4, 5
LENGTHS = np.array([11, 5, 8])
MASK = np.arange(TIME)[:, None] < LENGTHS

pytestmark = pytest.mark.usefixtures("quick_compilation")


def hidden(carry):
    return carry.h if isinstance(carry, recurrent.LSTMCarry) else carry


def lstm(carry, a, r, holes):
    return recurrent.lstm_step(carry, a, r, forget_bias=1.0, peepholes=holes)


# name -> (step, gates, own weights, does the step multiply by U itself)
CELLS = {
    "tanh": (lambda h, a, r, _: recurrent.vanilla_step(h, a, r), 1, None, False),
    "lstm": (lstm, 4, recurrent.Peepholes(*np.random.default_rng(3).standard_normal((3, N))), False),
    "gru after": (
        lambda h, a, r, bias: recurrent.gru_reset_after_step(h, a, r, bias=bias),
        3,
        np.random.default_rng(4).standard_normal(N),
        False,
    ),
    "gru before": (lambda h, a, u, _: recurrent.gru_reset_before_step(h, a, u), 3, None, True),
    "mgu": (lambda h, a, u, _: recurrent.minimal_gated_step(h, a, u), 2, None, True),
}
each = pytest.mark.parametrize("name", CELLS)


def arguments(name, time=TIME, batch=BATCH, seed=0):
    """U, own weights, carry, a."""
    _, gates, own, _ = CELLS[name]
    random = np.random.default_rng(seed)
    carry = random.standard_normal((BATCH, N))
    if name == "lstm":
        carry = recurrent.LSTMCarry(carry, random.standard_normal((BATCH, N)))
    return random.standard_normal((N, gates * N)), own, carry, random.standard_normal((time, batch, gates * N))


def scanned(name, kernel, own, carry, a, **options):
    step, _, _, inside = CELLS[name]
    return recurrence.recur(step, kernel, own, carry, a, hidden=hidden, kernel_inside=inside, **options)


def looped(name, kernel, own, carry, a, mask=None, reverse=False):
    """The same, in Python."""
    step, _, _, inside = CELLS[name]
    outputs = [None] * len(a)
    for t in reversed(range(len(a))) if reverse else range(len(a)):
        new = step(carry, a[t], kernel if inside else hidden(carry) @ kernel, own)
        valid = np.ones((BATCH, 1), bool) if mask is None else mask[t][:, None]
        carry = jax.tree.map(lambda n, o, valid=valid: jnp.where(valid, n, o), new, carry)
        outputs[t] = jnp.where(valid, hidden(carry), 0)
    return carry, jnp.stack(outputs)


WEIGHTS = np.random.default_rng(9).standard_normal((TIME, BATCH, N))


def value_and_gradients(run, name):
    def loss(kernel, own, carry, a):
        last, outputs = run(name, kernel, own, carry, a)
        return (outputs * WEIGHTS).sum() + sum((leaf**2).sum() for leaf in jax.tree.leaves(last)), (last, outputs)

    given = arguments(name)
    places = tuple(k for k, argument in enumerate(given) if argument is not None)
    with jax.enable_x64(True):
        return jax.jit(jax.value_and_grad(loss, places, has_aux=True))(*given)


def assert_equal(one, two, tolerance=1e-11):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@each
@pytest.mark.parametrize(
    "options",
    [{}, {"mask": MASK}, {"reverse": True}, {"mask": MASK, "reverse": True}],
    ids=["whole", "masked", "reverse", "masked reverse"],
)
def test_values_and_gradients_equal_those_of_a_loop(name, options):
    one, two = (value_and_gradients(partial(run, **options), name) for run in (scanned, looped))
    assert_equal(one, two)


@pytest.mark.parametrize(("name", "segment"), [*((name, 4) for name in CELLS), ("lstm", 1), ("lstm", 20)])
def test_segments_change_nothing(name, segment):
    one, two = (value_and_gradients(partial(scanned, mask=MASK, **o), name) for o in ({}, {"segment": segment}))
    assert_equal(one, two, 1e-12)


@each
def test_a_masked_batch_equals_its_sequences_one_by_one(name):
    kernel, own, carry, a = arguments(name)
    with jax.enable_x64(True):
        last, outputs = scanned(name, kernel, own, carry, a, mask=MASK)
        for n, length in enumerate(LENGTHS):
            alone = jax.tree.map(lambda x, n=n: x[n : n + 1], carry)
            end, expected = scanned(name, kernel, own, alone, a[:length, n : n + 1])
            np.testing.assert_allclose(outputs[:length, n], expected[:, 0], rtol=1e-12)
            np.testing.assert_array_equal(outputs[length:, n], 0)
            assert_equal(jax.tree.map(lambda x, n=n: x[n : n + 1], last), end, 1e-12)


# Sequences in a row: (row, first time, length). The first one begins in an earlier piece; row 1 has a gap and an end.
PACKED = ((0, 0, 3), (0, 3, 1), (0, 4, 7), (1, 0, 4), (1, 5, 3), (2, 0, 4), (2, 4, 7))
FIRST, LAST = [0, 3, 5], [2, 4, 6]  # of each row


@pytest.mark.parametrize("name", ["tanh", "lstm", "gru after", "gru before"])
@pytest.mark.parametrize("options", [{"segment": 4}, {"reverse": True}], ids=["segments", "reverse"])
def test_a_packed_batch_equals_its_sequences_one_by_one(name, options):
    rows, begins, lengths = np.array(PACKED).T
    valid = np.arange(TIME)[:, None] < lengths
    times = np.minimum(np.arange(TIME)[:, None] + begins, TIME - 1)  # of each sequence, where it is valid
    places = times[valid], np.broadcast_to(rows, valid.shape)[valid]
    mask, starts = np.zeros((2, TIME, BATCH), bool)
    mask[places] = True
    starts[begins[1:], rows[1:]] = True
    reverse = "reverse" in options
    continuing = np.isin(np.arange(len(PACKED)), LAST if reverse else 0)[:, None]

    def apart(name, kernel, own, carry, a):
        carry = jax.tree.map(lambda leaf: jnp.where(continuing, leaf[rows], 0), carry)
        last, outputs = scanned(name, kernel, own, carry, a[times, rows], mask=valid, reverse=reverse)
        ends = jax.tree.map(lambda leaf: leaf[np.array(FIRST if reverse else LAST)], last)
        return ends, jnp.zeros((TIME, BATCH, N), a.dtype).at[places].set(outputs[valid])

    packed = partial(scanned, mask=mask, starts=starts, **options)
    assert_equal(*(value_and_gradients(run, name) for run in (packed, apart)))


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in CELLS]
    + [(name, options) for name in ("lstm", "gru before") for options in ({"reverse": True}, {"segment": 4})],
)
def test_a_nudge_is_added_to_the_state_and_its_gradient_is_that_of_the_state(name, options):
    kernel, own, carry, a = arguments(name)
    random = np.random.default_rng(5)
    nudge = 0.1 * random.standard_normal((TIME, BATCH, N))
    weight = random.standard_normal((BATCH, N))

    def loss(nudge):
        last, outputs = scanned(name, kernel, own, carry, a, nudge=nudge, **options)
        return (hidden(last) * weight).sum(), outputs

    def by_hand(nudge):
        step, _, _, inside = CELLS[name]
        state, outputs = carry, [None] * TIME
        for t in range(TIME)[:: -1 if "reverse" in options else 1]:
            state = step(state, a[t], kernel if inside else hidden(state) @ kernel, own)
            h = hidden(state) + nudge[t]
            state = state._replace(h=h) if name == "lstm" else h
            outputs[t] = h
        return (hidden(state) * weight).sum(), jnp.stack(outputs)

    with jax.enable_x64(True):
        for given in (nudge, np.zeros_like(nudge)):
            one, two = (jax.jit(jax.value_and_grad(f, has_aux=True))(given) for f in (loss, by_hand))
            assert_equal(one, two)
        np.testing.assert_array_equal(loss(np.zeros_like(nudge))[1], scanned(name, kernel, own, carry, a, **options)[1])
    last = 0 if "reverse" in options else -1
    np.testing.assert_allclose(one[1][last], weight, rtol=1e-12)  # dL/dh_T itself


def test_a_carried_state_continues_a_sequence():
    kernel, own, carry, a = arguments("lstm")
    with jax.enable_x64(True):
        whole = scanned("lstm", kernel, own, carry, a)
        middle, first = scanned("lstm", kernel, own, carry, a[:6])
        last, second = scanned("lstm", kernel, own, middle, a[6:])
    assert_equal(whole, (last, jnp.concatenate([first, second])), 1e-12)


def test_second_derivatives_and_forward_mode():
    def gradient_norm(run, name, kernel, own, carry, a):
        gradient = jax.grad(lambda a: (run(name, kernel, own, carry, a)[1] * WEIGHTS).sum())(a)
        return (gradient**2).sum()

    with jax.enable_x64(True):
        one, two = (
            jax.grad(partial(gradient_norm, run, "lstm"), argnums=3)(*arguments("lstm")) for run in (scanned, looped)
        )
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-10)
        kernel, own, carry, a = arguments("gru before")
        tangents = [
            jax.jvp(lambda a, run=run: run("gru before", kernel, own, carry, a)[1], (a,), (a,))[1]
            for run in (scanned, looped)
        ]
    np.testing.assert_allclose(*tangents, rtol=1e-11)


def test_memory_grows_with_the_square_root_of_time_in_segments():
    jax.config.update("jax_disable_most_optimizations", False)  # as a training has it

    def temporaries(time, segment):
        kernel, own, carry, a = jax.tree.map(np.float32, arguments("lstm", time=time))

        def loss(kernel, a):
            return scanned("lstm", kernel, own, carry, a, segment=segment)[0].h.sum()

        # Of the kernel alone: the gradient of a is as long as time however little is kept.
        compiled = jax.jit(jax.grad(loss)).lower(kernel, a).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain, segmented = ([temporaries(t, s(t)) for t in (256, 4096)] for s in (lambda t: None, lambda t: round(t**0.5)))
    assert plain[1] / plain[0] > 12  # sixteen times the time
    assert segmented[1] / segmented[0] < 6
    assert segmented[1] < plain[1] / 10


def torch_arrays(torch, module):
    """Input kernel, recurrent kernel and the two biases of a one-layer module, in our orientation."""
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    return [getattr(module, name).detach().numpy().T for name in names]


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_outputs_and_gradients_equal_pytorchs(kind):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra [bench])")
    torch.manual_seed(0)
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind](INPUTS, N).double()
    x = np.random.default_rng(0).standard_normal((TIME, BATCH, INPUTS))
    w, u, b_w, b_u = torch_arrays(torch, module)
    if kind == "gru":  # blocks r, z, n there and z, s, g here; and there z weighs the old state: sigmoid(-x) = 1 - z
        order = np.r_[N : 2 * N, :N, 2 * N : 3 * N]
        sign = np.repeat([-1.0, 1.0, 1.0], N)
        w, u, b_w, b_u = (array[..., order] * sign for array in (w, u, b_w, b_u))

    def run(x, w, u, b_w, b_u):
        if kind == "lstm":
            carry = recurrent.LSTMCarry(jnp.zeros((BATCH, N)), jnp.zeros((BATCH, N)))

            def step(c, a, r, _):
                return recurrent.lstm_step(c, a, r)

            return recurrence.recur(step, u, None, carry, x @ w + b_w + b_u, hidden=hidden)[1]
        bias = jnp.concatenate([b_u[: 2 * N], jnp.zeros(N)])

        def step(h, a, r, bias):
            return recurrent.gru_reset_after_step(h, a, r, bias=bias)

        return recurrence.recur(step, u, b_u[2 * N :], jnp.zeros((BATCH, N)), x @ w + b_w + bias)[1]

    with jax.enable_x64(True):
        outputs = jax.jit(run)(x, w, u, b_w, b_u)
        gradients = jax.grad(lambda *given: (run(*given) * WEIGHTS).sum(), argnums=range(5))(x, w, u, b_w, b_u)
    torch_x = torch.from_numpy(x).requires_grad_(True)
    torch_outputs, _ = module(torch_x)
    (torch_outputs * torch.from_numpy(WEIGHTS)).sum().backward()
    np.testing.assert_allclose(outputs, torch_outputs.detach().numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(gradients[0], torch_x.grad.numpy(), rtol=1e-9, atol=1e-12)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    for gradient, name in zip(gradients[1:], names, strict=True):
        expected = getattr(module, name).grad.numpy().T
        if kind == "gru":
            expected = expected[..., order] * sign
        np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_wrong_shapes_are_refused():
    kernel, own, carry, a = arguments("tanh")
    with pytest.raises(AssertionError):
        scanned("tanh", kernel, own, carry, a[0])
    with pytest.raises(AssertionError):
        scanned("tanh", kernel, own, carry, a, mask=MASK.T)
