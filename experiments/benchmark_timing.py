"""How sides are timed against each other: in turn, round after round, and again where the machine was disturbed."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Round = Mapping[str, float]
"""Side -> seconds a step."""

MOMENTUM, WEIGHT_DECAY, LEARNING_RATE = 0.9, 1e-4, 1e-4  # a rate at which hundreds of steps on noise stay finite

READY = "carousel: ready"
"""What a process says that has come as far as it is timed."""

_VOID = 2.0  # a side that takes that many times its least time was disturbed


class Side(NamedTuple):
    """One implementation of a workload.

    Attributes:
      call: takes steps, waits for their end, returns their losses (training) or logits (inference).
      steps: how many a call takes.
    """

    call: Callable[[], Any]
    steps: int


def python_path(root: Path) -> str:
    """PYTHONPATH of a process that is to find `experiments` in `root`, first.

    Also under PYTHONSAFEPATH, which the launcher sets and with which `python -m` does not look in the working folder.
    """
    return os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))


def measure(
    sides: Mapping[str, Side],
    *,
    rounds: int,
    seconds: float,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    between: Callable[[], None] = lambda: None,
) -> list[Round]:
    """Times every side once a round, A B C A B C ..., until `rounds` rounds count.

    A round in which a side falls below half of its own best speed does not count and is made up for by another, at most
    `repeats` times. What one side leaves behind (caches, threads that still spin) is taken by a call before its time.

    Args:
      sides: name -> side, warmed up.
      rounds: that are to count.
      seconds: each side runs for at least so long a round, and one call.
      repeats: further rounds at most.
      clock: in seconds.
      between: called after each round; may raise to stop.

    Returns:
      All rounds, also those that do not count.
    """

    def take():
        found = {name: _lap(side, seconds, clock) for name, side in sides.items()}
        between()
        return found

    return until_counted(take, rounds, repeats)


def until_counted(take: Callable[[], Round], rounds: int, repeats: int) -> list[Round]:
    """Takes rounds until `rounds` of them count, at most `repeats` more; returns all."""
    found: list[Round] = []
    while len(counted(found)) < rounds and len(found) < rounds + repeats:
        found.append(take())
    return found


def _lap(side, seconds, clock):
    side.call()
    start, calls = clock(), 0
    while True:
        side.call()
        calls += 1
        elapsed = clock() - start
        if elapsed >= seconds:
            return elapsed / (calls * side.steps)


def counted(rounds: Sequence[Round]) -> list[Round]:
    """The rounds in which no side was slower than twice its least time; there may be none."""
    least = {name: min(each[name] for each in rounds) for name in (rounds[0] if rounds else ())}
    return [each for each in rounds if all(each[name] <= _VOID * least[name] for name in least)]


def median_seconds(rounds: Sequence[Round], side: str) -> float:
    """Of a step, over the rounds given."""
    return statistics.median(each[side] for each in rounds)


def ratios(rounds: Sequence[Round], side: str, ours: str = "ours") -> list[float]:
    """How many times as fast ours is as another side, round by round: both ran within seconds of each other."""
    return [each[side] / each[ours] for each in rounds]
