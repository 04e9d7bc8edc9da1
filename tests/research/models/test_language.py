"""Language models: published counts, windows that join, what is carried and dropped, split batches, initial values."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models.language import FeedForwardLanguageModel, RecurrentLanguageModel
from research.models.recurrent import Cell, lstm, vanilla
from research.ops.recurrent import vanilla_step

VOCABULARY, STREAMS, TIME = 11, 4, 6
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (STREAMS, TIME)).astype(np.int32)
ALL, NONE = np.ones(STREAMS, bool), np.zeros(STREAMS, bool)
KEY = jax.random.key(0)
LAYERS = [("layer1", 5, 4), ("layer2", 4, 3)]  # inputs and units
SIGMOID = vanilla("sigmoid")  # deck 004's units

recurrent = functools.partial(
    RecurrentLanguageModel, vocabulary=VOCABULARY, embedding=5, cell=lstm(), features=(4, 3), streams=STREAMS
)
sigmoid = functools.partial(recurrent, cell=SIGMOID, features=(4,))
feed_forward = functools.partial(
    FeedForwardLanguageModel, vocabulary=VOCABULARY, embedding=5, hidden=7, streams=STREAMS
)
both = pytest.mark.parametrize("make", [recurrent, feed_forward], ids=["recurrent", "n-gram"])


def init(make):
    return make().init(KEY, jnp.zeros((1, TIME), jnp.int32), jnp.zeros(1, bool), train=True)


@functools.cache
def variables(make):
    """Random parameters, biases too, and the carry as it is initialised."""
    random = np.random.default_rng(1)
    params = jax.eval_shape(lambda: init(make))["params"]
    params = jax.tree.map(lambda leaf: np.float32(0.6 * random.standard_normal(leaf.shape)), params)
    return {"params": params, "carry": jax.jit(lambda: init(make)["carry"])()}


@functools.cache
def program(make, train, **options):
    model = make(**options)

    @jax.jit
    def run(variables, tokens, first, key):
        return model.apply(variables, tokens, first, train=train, mutable=["carry"], rngs={"dropout": key})

    return run


def run(make, variables, tokens, first, train=False, key=KEY, **options):
    return program(make, train, **options)(variables, tokens, first, key)


def close(one, two):
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def count(model):
    shapes = jax.eval_shape(lambda: model.init(KEY, jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, bool), train=True))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


def test_parameter_counts():
    """Zaremba et al. 2014: 2 layers of 200, 650 and 1500; here with one bias vector a layer, and a bias in the head."""
    for n, expected in ((200, 4_651_600), (650, 19_775_200), (1500, 66_022_000)):
        assert count(RecurrentLanguageModel(10_000, n, lstm(), (n, n), 20)) == expected
        assert 2 * 10_000 * n + 10_000 + 2 * (4 * n * 2 * n + 4 * n) == expected
    assert count(FeedForwardLanguageModel(10_000, 30, 100, 20)) == 300_000 + 90 * 100 + 100 + 100 * 10_000 + 10_000


@both
def test_the_carry_is_of_all_streams_whatever_the_batch_at_initialisation(make):
    carry = variables(make)["carry"]["text"]["state"]
    assert [leaf.shape for leaf in jax.tree.leaves(carry)] == {
        recurrent: [(STREAMS, 4)] * 2 + [(STREAMS, 3)] * 2,
        feed_forward: [(STREAMS, 2)],
    }[make]
    for leaf in jax.tree.leaves(carry):  # untouched by what initialisation read
        np.testing.assert_array_equal(leaf, 0 if make is recurrent else -1)


@both
def test_windows_are_one_long_text_and_a_new_text_forgets(make):
    start = variables(make)
    whole, _ = run(make, start, TOKENS, ALL)
    first, carried = run(make, start, TOKENS[:, :3], ALL)
    second, after = run(make, start | carried, TOKENS[:, 3:], NONE)
    close(np.concatenate([first, second], axis=1), whole)
    # Two of the streams begin anew, whatever is carried for them.
    anew = np.array([True, False, True, False])
    mixed, _ = run(make, start | after, TOKENS[:, :3], anew)
    close(mixed[anew], first[anew])
    assert (np.abs(mixed - first).max(axis=(1, 2)) > 1e-3).tolist() == (~anew).tolist()


@both
def test_windows_of_one_token_join_as_well(make):
    whole, _ = run(make, variables(make), TOKENS, ALL)
    state, found = variables(make), []
    for t in range(TIME):
        logits, carried = run(make, state, TOKENS[:, t : t + 1], ALL if t == 0 else NONE)
        state = state | carried
        found.append(logits)
    close(np.concatenate(found, axis=1), whole)


@pytest.mark.parametrize(
    "make", [functools.partial(recurrent, cell=SIGMOID), feed_forward], ids=["recurrent", "n-gram"]
)
def test_every_parameter_has_a_gradient_and_the_carry_none(make):
    weights = np.random.default_rng(2).standard_normal((STREAMS, TIME, VOCABULARY))
    _, carried = run(make, variables(make), TOKENS, ALL)

    @jax.jit
    def gradients(params, carry):
        def loss(params, carry):
            return (run(make, {"params": params, **carry}, TOKENS, NONE)[0] * weights).sum()

        floats = jax.tree.leaves(carry)[0].dtype == jnp.float32
        return jax.grad(loss, (0, 1) if floats else 0)(params, carry)

    found = gradients(variables(make)["params"], carried)
    if isinstance(found, tuple):
        found, zero = found
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(zero))
    found["embedding"] = found["embedding"]["embedding"][np.unique(TOKENS)]  # of tokens that are there
    assert all((leaf != 0).mean() > 0.9 for leaf in jax.tree.leaves(found))


@both
def test_a_batch_that_is_not_the_streams_is_refused(make):
    with pytest.raises(ValueError, match="a batch of 3 on each of 1 devices does not continue 4 streams"):
        run(make, variables(make), TOKENS[:3], ALL[:3])


def test_dropout_is_for_training_and_not_in_the_recurrence():
    start = variables(recurrent)
    plain, carried = run(recurrent, start, TOKENS, ALL)
    dropped = functools.partial(run, recurrent, dropout=0.5)
    np.testing.assert_array_equal(dropped(start, TOKENS, ALL)[0], plain)
    drawn = [dropped(start, TOKENS, ALL, train=True, key=jax.random.key(seed))[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert all(np.abs(one - two).max() > 0.05 for one, two in ((drawn[0], drawn[2]), (drawn[0], plain)))
    # Where nothing comes from below, the states are what they are without dropout.
    closed = {name: start["params"][name] | {"input_kernel": np.zeros((m, 4 * n), np.float32)} for name, m, n in LAYERS}
    closed = {**carried, "params": start["params"] | closed}
    _, one = dropped(closed, TOKENS, NONE, train=True)
    _, two = dropped(closed, TOKENS, NONE)
    jax.tree.map(close, one, two)


def test_dropout_stands_before_every_layer_and_the_head_and_scales_what_it_keeps():
    """Layers that put out what they read make the masks visible."""
    n = 400
    linear = Cell(1, lambda h, a, r, _: vanilla_step(h, a, r, activation=lambda x: x))
    make = functools.partial(recurrent, embedding=n, cell=linear, features=(n, n), dropout=0.25)
    start = jax.eval_shape(lambda: make().init(KEY, TOKENS, ALL, train=True))
    start = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), start)
    params = start["params"]
    params["embedding"]["embedding"] += 1
    params["layer1"]["input_kernel"] += np.eye(n, dtype=np.float32)
    params["layer2"]["input_kernel"] += np.eye(n, dtype=np.float32)
    params["head"]["kernel"] += 1 / n  # the mean of what the head is given
    logits, carried = run(make, start, TOKENS, ALL, train=True)
    one, two = (np.asarray(state) for state in carried["carry"]["text"]["state"])
    for values, places in ((one, 1), (two, 2)):
        scaled = (4 / 3) ** places
        np.testing.assert_allclose(np.unique(values), [0, scaled], rtol=1e-6)
        p = 0.75**places
        assert abs((values > 0).mean() - p) < 5 * math.sqrt(p * (1 - p) / values.size)
    p = 0.75**3
    sigma = (4 / 3) ** 3 * math.sqrt(p * (1 - p) / n)
    assert np.ptp(logits, axis=-1).max() < 1e-5 and np.abs(logits - 1).max() < 5 * sigma
    assert np.abs(logits[:, -1, 0] - two.mean(axis=-1)).min() > 1e-3  # the head's own mask
    assert len(np.unique(logits[..., 0])) > TIME  # another mask at every step


@both
def test_a_split_batch_is_the_whole_one(make):
    options = {"dropout": 0.5} if make is recurrent else {}
    start = variables(make)
    _, carried = run(make, start, TOKENS, ALL, train=True, **options)
    first = np.array([True, False, False, True])
    whole, after = run(make, start | carried, TOKENS[:, ::-1], first, train=True, **options)
    split = make(**options, axis_name="batch")

    @jax.jit
    def halves(variables):
        def share(tokens, first):
            return split.apply(variables, tokens, first, train=True, mutable=["carry"], rngs={"dropout": KEY})

        tokens, begins = TOKENS[:, ::-1].reshape(2, 2, TIME), first.reshape(2, 2)
        return jax.vmap(share, axis_name="batch")(tokens, begins)

    logits, gathered = halves(start | carried)
    close(logits.reshape(whole.shape), whole)
    jax.tree.map(lambda both, one: close(both, np.stack([one, one])), gathered, after)


def test_initial_values():
    options = {"vocabulary": 500, "embedding": 40, "cell": lstm(peepholes=True), "features": (30,)}
    scale = 0.05

    @jax.jit
    def drawn():
        uniform, own = (init(functools.partial(recurrent, **options, init_scale=s))["params"] for s in (scale, None))
        assert jax.tree.map(jnp.shape, uniform) == jax.tree.map(jnp.shape, own)
        return uniform, own["embedding"]["embedding"], own["head"]

    uniform, embedding, head = drawn()
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(uniform)]
    assert len(leaves) == 9
    for leaf in leaves:
        assert 0.5 * scale < np.abs(leaf).max() <= scale and leaf.min() < 0 < leaf.max()
        assert abs(leaf.std() - scale / math.sqrt(3)) < 2 * scale / math.sqrt(leaf.size)
    assert len(np.unique(np.concatenate([leaf[:30] for leaf in leaves]))) == 30 * len(leaves)
    assert np.std(embedding) == pytest.approx(1 / math.sqrt(40), rel=0.03)
    assert np.std(head["kernel"]) == pytest.approx(1 / math.sqrt(30), rel=0.03)
    np.testing.assert_array_equal(head["bias"], 0)


def test_the_decks_recurrent_model():
    """h_t = sigmoid(W e_t + U h_{t-1} + b)."""
    params = variables(sigmoid)["params"]
    layer, head, h, expected = params["layer1"], params["head"], np.zeros((STREAMS, 4)), []
    for t in range(TIME):
        e = params["embedding"]["embedding"][TOKENS[:, t]]
        h = 1 / (1 + np.exp(-(e @ layer["input_kernel"] + h @ layer["recurrent_kernel"] + layer["bias"])))
        expected.append(h @ head["kernel"] + head["bias"])
    close(run(sigmoid, variables(sigmoid), TOKENS, ALL)[0], np.stack(expected, axis=1))


def test_the_n_gram_network_by_hand_sees_its_last_three_words():
    start = variables(feed_forward)
    params = start["params"]
    logits, _ = run(feed_forward, start, TOKENS, ALL)
    e = np.concatenate([np.zeros((STREAMS, 2, 5)), params["embedding"]["embedding"][TOKENS]], axis=1)
    window = np.concatenate([e[:, 2:], e[:, 1:-1], e[:, :-2]], axis=-1)
    h = 1 / (1 + np.exp(-(window @ params["hidden"]["kernel"] + params["hidden"]["bias"])))
    close(logits, h @ params["head"]["kernel"] + params["head"]["bias"])
    for place in range(TIME):
        other = TOKENS.copy()
        other[:, place] = (other[:, place] + 1) % VOCABULARY
        changed = np.abs(run(feed_forward, start, other, ALL)[0] - logits).max(axis=(0, 2)) > 1e-4
        assert changed.tolist() == [place <= t < place + 3 for t in range(TIME)]
    with pytest.raises(ValueError, match="context 0"):
        count(feed_forward(context=0))
