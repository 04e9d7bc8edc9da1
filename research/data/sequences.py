"""Synthetic long-range tasks, drawn inside the compiled program: the adding problem and copy memory.

Both have a loss that a model without memory reaches; what is above it has learned nothing across time.
"""

import math

import jax
import jax.numpy as jnp

COPIED = 10  # symbols to remember
SYMBOLS = 8  # 1 to 8; 0 is the blank, 9 asks for the copy


def adding(key: jax.Array, *, examples: int, time: int, halves: bool = False) -> dict[str, jax.Array]:
    """The adding problem: the sum of the two values that are marked.

        x_t = (value_t, marker_t)     value ~ U[0, 1)     y = value_i + value_j, i and j the marked times

    Args:
      key: a PRNG key.
      examples: how many.
      time: steps of a sequence, at least 2.
      halves: one marker in each half of the sequence (Le et al. 2015, Arjovsky et al. 2016); otherwise two different
        times at random, as in Bai et al. 2018.

    Returns:
      `inputs` `[examples, time, 2]` and `targets` `[examples]`, float32.

    Source: Hochreiter and Schmidhuber 1997, experiment 4, in the form of the papers above.
    """
    if time < 2:
        raise ValueError(f"time is {time}: two values are marked, give at least 2")
    value_key, marker_key = jax.random.split(key)
    values = jax.random.uniform(value_key, (examples, time))
    if halves:
        first_key, second_key = jax.random.split(marker_key)
        first = jax.random.randint(first_key, (examples,), 0, time // 2)
        second = jax.random.randint(second_key, (examples,), time // 2, time)
    else:
        first_key, second_key = jax.random.split(marker_key)
        first = jax.random.randint(first_key, (examples,), 0, time)
        # Any of the other times: those behind the first move up by one.
        second = jax.random.randint(second_key, (examples,), 0, time - 1)
        second = second + (second >= first)
    markers = jax.nn.one_hot(first, time) + jax.nn.one_hot(second, time)
    return {"inputs": jnp.stack([values, markers], axis=-1), "targets": (values * markers).sum(axis=1)}


ADDING_BASELINE = 1 / 6
"""Mean squared error of always predicting 1: the variance of the sum of two uniform numbers."""


def copy_memory(key: jax.Array, *, examples: int, blanks: int) -> dict[str, jax.Array]:
    """Copy memory: ten symbols, a long blank, and then the ten again.

        inputs   s_1 ... s_10   0 (blanks - 1 times)   9 (11 times)
        targets  0 (blanks + 10 times)   s_1 ... s_10

    Args:
      key: a PRNG key.
      examples: how many.
      blanks: T, from the last symbol to the first that is asked for, at least 1; a sequence has T + 20 steps.

    Returns:
      `inputs` and `targets` `[examples, blanks + 20]`, int32 in 0 to 9.

    Source: Hochreiter and Schmidhuber 1997; this form is that of Arjovsky et al. 2016 and Bai et al. 2018.
    """
    if blanks < 1:
        raise ValueError(f"blanks is {blanks}: give at least 1")
    symbols = jax.random.randint(key, (examples, COPIED), 1, SYMBOLS + 1, jnp.int32)
    quiet = jnp.zeros((examples, blanks - 1), jnp.int32)
    asking = jnp.full((examples, COPIED + 1), SYMBOLS + 1, jnp.int32)
    nothing = jnp.zeros((examples, blanks + COPIED), jnp.int32)
    return {
        "inputs": jnp.concatenate([symbols, quiet, asking], axis=1),
        "targets": jnp.concatenate([nothing, symbols], axis=1),
    }


def copy_memory_baseline(blanks: int) -> float:
    """Cross-entropy per step, in nats, of blanks where there are blanks and a guess among 8 symbols at the end.

    10 ln 8 / (T + 20): 0.0204 at T = 1000, which published tables show as the score of recurrent networks.
    """
    return COPIED * math.log(SYMBOLS) / (blanks + 2 * COPIED)
