"""Generated text is what one long reading of it would have chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models.language import FeedForwardLanguageModel, RecurrentLanguageModel
from research.models.recurrent import vanilla
from research.tasks.generation import generate
from research.training.state import bind

VOCABULARY, STEPS = 9, 8
PROMPT = np.random.default_rng(1).permuted(np.tile(np.arange(VOCABULARY, dtype=np.int32), (6, 1)), axis=1)[:, :3]
KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def network(make, *architecture):
    """Its `apply` and random variables, of one stream more than the prompts."""
    model = make(VOCABULARY, *architecture)
    shapes = jax.eval_shape(lambda: model.init(KEY, PROMPT, np.ones(6, bool), train=False))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.float32(random.standard_normal(leaf.shape)), shapes["params"])
    # What is left of another text must not be read.
    carry = jax.tree.map(lambda leaf: np.full(leaf.shape, 5, leaf.dtype), shapes["carry"])
    return bind(model), {"params": params, "carry": carry}


@pytest.mark.parametrize(
    ("make", "architecture", "length"),
    [(RecurrentLanguageModel, (5, vanilla(), (6, 4), 7), 3), (FeedForwardLanguageModel, (5, 7, 7), 1)],
)
def test_the_likeliest_tokens_are_those_of_one_long_reading(make, architecture, length):
    apply, variables = network(make, *architecture)
    prompt = PROMPT[:, :length]
    found = generate(apply, variables, prompt, steps=STEPS, key=KEY, temperature=0)
    assert found.shape == (6, STEPS) and found.dtype == jnp.int32
    # The last stream stands idle: one long reading needs a batch of all streams.
    whole = np.concatenate([prompt, found], axis=1)[[0, 1, 2, 3, 4, 5, 5]]
    logits, _ = jax.jit(lambda: apply(variables, {"tokens": whole, "first": np.ones(7, bool)}, train=False))()
    np.testing.assert_array_equal(logits[:6, length - 1 : -1].argmax(-1), found)
    assert len(np.unique(found)) > 2  # not one token for ever
    assert found[0].tolist() != found[1].tolist()


def test_draws_differ_by_key_and_by_step_and_one_class_is_the_likeliest():
    apply, variables = network(RecurrentLanguageModel, 5, vanilla(), (4,), 7)
    # A model without any idea: only the key decides.
    blind = variables | {
        "params": variables["params"] | {"head": jax.tree.map(np.zeros_like, variables["params"]["head"])}
    }

    def draw(seed, variables=blind, **options):
        return generate(apply, variables, PROMPT, steps=200, key=jax.random.key(seed), **options)

    one, again, other = draw(0), draw(0), draw(1)
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.7 and (one[:, 1:] != one[:, :-1]).mean() > 0.7
    assert set(np.unique(one)) == set(range(VOCABULARY))
    np.testing.assert_array_equal(draw(0, variables, top_k=1), draw(1, variables, temperature=0))
