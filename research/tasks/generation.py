"""Text from a language model, token by token."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from research.ops.sampling import sample
from research.tasks.task import Apply


@partial(jax.jit, static_argnames=("apply", "steps", "temperature", "top_k"))
def generate(
    apply: Apply,
    variables: Mapping[str, Any],
    prompt: jax.Array,
    *,
    steps: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> jax.Array:
    """Continues prompts: each token is drawn from what the model gives for it, and read next.

        w_{t+1} ~ softmax(f(w_1 ... w_t) / T) over the k likeliest

    Args:
      apply: of a language model that carries its state in the collection `carry`.
      variables: its parameters, and `carry` of any number of streams: only its form matters, a prompt begins a text.
      prompt: `[streams, length]`, length at least 1.
      steps: tokens to draw for each.
      key: a PRNG key; step t draws from `fold_in(key, t)`.
      temperature, top_k: see `research.ops.sampling.sample`.

    Returns:
      `[streams, steps]`, int32, without the prompts.
    """
    streams = prompt.shape[0]
    fixed = {name: value for name, value in variables.items() if name != "carry"}
    carry = jax.tree.map(lambda leaf: jnp.zeros((streams, *leaf.shape[1:]), leaf.dtype), variables["carry"])

    def read(carry, tokens, first):
        x = {"tokens": tokens, "first": jnp.full(streams, first)}
        logits, updated = apply({**fixed, "carry": carry}, x, train=False)
        return updated["carry"], logits[:, -1]

    def step(state, number):
        carry, logits = state
        tokens = sample(jax.random.fold_in(key, number), logits, temperature=temperature, top_k=top_k)
        return read(carry, tokens[:, None], False), tokens

    _, tokens = lax.scan(step, read(carry, prompt, True), jnp.arange(steps))
    return tokens.T
