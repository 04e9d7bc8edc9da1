"""Wall time by what it was spent on."""

import contextlib
import dataclasses
import math
import time


class Timers:
    """Seconds of `compile`, `train`, `evaluate` and `checkpoint`, each the body of `with timers(name)`.

    Bodies must end with the device idle, or they measure nothing.
    """

    def __init__(self):
        self.seconds = dict.fromkeys(("compile", "train", "evaluate", "checkpoint"), 0.0)

    @contextlib.contextmanager
    def __call__(self, name: str):
        lap = Lap()
        start = time.perf_counter()
        yield lap
        lap.seconds = time.perf_counter() - start
        self.seconds[name] += lap.seconds


@dataclasses.dataclass
class Lap:
    """One body's time, once it has ended."""

    seconds: float = math.nan
