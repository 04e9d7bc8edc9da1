"""The state of the lowest error on the validation split, kept beside the newest ones; of several seeds each its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from research.errors import CarouselError
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


def check(folder: Path, newest: checkpoint.Checkpoint, needed: bool, log: Callable[[str], None]) -> None:
    """Looks, before a run goes on, whether the best state is there on which its newest checkpoint counts.

    Where it is not, but is that checkpoint's own state, it is written again.

    Args:
      folder: of the checkpoints.
      newest: from which the run goes on.
      needed: whether the run cannot end well without.
      log: takes a line where something was wrong.

    Raises:
      CarouselError: the state is needed and lost.
    """
    evaluated, path = newest.metadata["evaluated"], folder / checkpoint.BEST
    if evaluated is None:
        return
    steps = np.ravel(evaluated["step"])
    try:
        if checkpoint.load(path).step >= steps.max():  # later: killed before the checkpoint that would tell of it
            return
        problem = f"{path} is older than the run's best state, of step {steps.max()}"
    except checkpoint.DamagedCheckpoint as error:
        problem = f"{path} is damaged ({error.reason})"
    except CarouselError:
        if path.exists():
            raise
        problem = f"{path} is missing"
    if (steps == newest.step).all():
        checkpoint.save_best(folder, newest.step, newest.arrays, evaluated)
        log(f"{problem}: written again from the checkpoint of step {newest.step}")
    elif needed:
        cure = f"restore it from a copy, or delete {folder} to start the run from the beginning"
        raise CarouselError(f"{problem}, and the run's result needs it: {cure}")
    else:
        log(f"{problem}: the run goes on without, since its result is of the last state; a better one replaces it")


def restore(folder: Path, like: TrainState) -> TrainState:
    """The best state, on the host, with the structure of `like`."""
    path = folder / checkpoint.BEST
    return state.unflatten(checkpoint.load(path).arrays, like, str(path))


def _along(seeds: np.ndarray, array: np.ndarray) -> np.ndarray:
    return seeds.reshape(-1, *[1] * (array.ndim - 1))
