"""Sampling: frequencies against the softmax, what temperature and top-k do to them, and what is refused."""

import functools

import jax
import numpy as np
import pytest

from research.ops.sampling import sample

LOGITS = np.float32([1.0, -1.0, 2.0, 0.5, 0.0])
DRAWS = 20_000
# temperature, top_k, which classes stay
KINDS = [
    (1.0, None, range(5)),
    (0.5, None, range(5)),
    (2.0, 2, (0, 2)),
    (0.5, 3, (0, 2, 3)),
    (1.0, 1, (2,)),
    (0.0, None, (2,)),
    (0.0, 3, (2,)),
]


@functools.cache
def drawn():
    """Of every kind `[DRAWS]`; of two of six equal logits. One program, since compiling it is what takes time."""

    @jax.jit
    def run(key):
        logits = np.broadcast_to(LOGITS, (DRAWS, 5))
        kinds = [sample(key, logits, temperature=temperature, top_k=top_k) for temperature, top_k, _ in KINDS]
        return kinds, sample(key, np.zeros((2, 100, 6), np.float32), top_k=2)

    return jax.device_get(run(jax.random.key(0)))


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_frequencies_are_the_softmax_of_what_is_kept(number):
    temperature, _, kept = KINDS[number]
    found = drawn()[0][number]
    assert found.shape == (DRAWS,) and found.dtype == np.int32
    found = np.bincount(found, minlength=5) / DRAWS
    p = np.where(np.isin(np.arange(5), list(kept)), np.exp(LOGITS / (temperature or 1)), 0)
    p /= p.sum()
    assert (np.abs(found - p) <= 4.5 * np.sqrt(p * (1 - p) / DRAWS)).all()


def test_of_equal_logits_no_more_than_k_are_kept():
    found = drawn()[1]
    assert found.shape == (2, 100) and set(found.ravel().tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1 is negative"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 0}, "top_k 0 is not between 1 and the 5 classes"),
        ({"top_k": 6}, "top_k 6 is not"),
    ],
)
def test_what_cannot_be_sampled_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(jax.random.key(0), LOGITS, **options)
