"""The state of the lowest error on the validation split, kept beside the newest ones; of several seeds each its own."""

from pathlib import Path
from typing import Any

import numpy as np

from research.training import checkpoint, state
from research.training.state import TrainState


def keep(folder: Path, step: int, current: TrainState, found: dict[str, Any], before: dict[str, Any] | None) -> Any:
    """Writes the state where it is better than any before, by error or, for a task without, by loss.

    Written again after an interruption, the file is the same.

    Args:
      folder: of the checkpoints.
      step: now.
      current: the state.
      found: means over the validation split; numbers, or a list over seeds each.
      before: what this function gave last, None at the first evaluation.

    Returns:
      `step` and score of the best state so far: numbers, or a list over seeds each.
    """
    score = "error" if "error" in found else "loss"
    if before is None:
        evaluated = {"step": np.full_like(found[score], step, dtype=int).tolist(), score: found[score]}
        checkpoint.save_best(folder, step, state.flatten(current), evaluated)
        return evaluated
    # Not `found < before`: a first evaluation that was no number is beaten by any.
    better = np.isfinite(found[score]) & ~(np.asarray(found[score]) >= np.asarray(before[score]))
    if not better.any():
        return before
    arrays = state.flatten(current)
    if not better.all():  # only of several seeds: the others keep what they have
        kept = checkpoint.load(folder / checkpoint.BEST).arrays
        arrays = {name: np.where(_along(better, now), now, kept[name]) for name, now in arrays.items()}
    evaluated = {
        "step": np.where(better, step, before["step"]).tolist(),
        score: np.where(better, found[score], before[score]).tolist(),
    }
    checkpoint.save_best(folder, step, arrays, evaluated)
    return evaluated


def restore(folder: Path, like: TrainState) -> TrainState:
    """The best state, on the host, with the structure of `like`."""
    path = folder / checkpoint.BEST
    return state.unflatten(checkpoint.load(path).arrays, like, str(path))


def _along(seeds: np.ndarray, array: np.ndarray) -> np.ndarray:
    return seeds.reshape(-1, *[1] * (array.ndim - 1))
