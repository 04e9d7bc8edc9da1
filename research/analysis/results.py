"""Reads run folders into plain values; the only source of every table and figure.

A run is of one seed or of several trained at once. Of several, a metric or result is a list with a number a seed, null
for one that diverged; `values` and `curves` read both kinds alike.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.errors import CarouselError

# Of a training's result: how long it took, which no two runs agree on. (What a benchmark measures has other names.)
_OF_THE_MACHINE = ("seconds", "examples_per_second")


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run: the parsed files of its folder, and a SHA-256 of what it was, learned and resulted in.

    Equal runs have equal hashes wherever and whenever they were made: environment, times and speeds are left out.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    sha256: str

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was recorded; the values are lists where the run has several seeds."""
        points = [(record["step"], record[name]) for record in self.metrics if record.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def read_json(self, name: str) -> Any | None:
        """Another JSON file of the run folder, or None where there is none."""
        path = self.path / name
        return json.loads(path.read_bytes()) if path.exists() else None


def read_run(path: Path) -> Run:
    """Reads a finished run.

    Raises:
      CarouselError: a file is missing or cannot be parsed.
    """
    try:
        contents = []
        for name in ("config.json", "environment.json", "result.json", "metrics.jsonl"):
            text = (path / name).read_bytes()
            contents.append([json.loads(line) for line in text.splitlines()] if name[-1] == "l" else json.loads(text))
    except (OSError, ValueError) as error:
        raise CarouselError(
            f"{path / name}: not readable as part of a finished run ({error}); run its cell again"
        ) from None
    config, _, result, metrics = contents
    lasting = {name: value for name, value in result.items() if name not in _OF_THE_MACHINE}
    digest = hashlib.sha256(json.dumps([config, lasting, metrics], sort_keys=True).encode())
    return Run(path, *contents, sha256=digest.hexdigest())


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """The finished runs among `paths`.

    Raises:
      CarouselError: none of them is finished.
    """
    paths = list(paths)
    runs = [read_run(path) for path in paths if (path / "result.json").exists()]
    if not runs:
        such = f", such as {paths[0]}" if paths else ""
        raise CarouselError(f"no finished run among the {len(paths)} asked for{such}; run without --report_only")
    return runs


def group(runs: Sequence[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    """The runs by key, in the order in which the keys first appear."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def values(runs: Iterable[Run], name: str) -> list[float]:
    """A result of every run and seed, where it is there (of a diverged one it is not)."""
    return [value for run in runs for value in _seeds(run.result.get(name)) if value is not None]


def curves(runs: Iterable[Run], name: str) -> list[tuple[list[int], list[float]]]:
    """Steps and values of a metric, one pair a run and seed that has a value at all.

    The curve of one seed among several ends where its first null is: from there on it has diverged.
    """
    found = []
    for run in runs:
        steps, rows = run.series(name)
        for seed in zip(*map(_seeds, rows), strict=True):
            known = list(itertools.takewhile(lambda value: value is not None, seed))
            if known:
                found.append((steps[: len(known)], known))
    return found


def _seeds(value):
    return value if isinstance(value, list) else [value]


def growth(by_x: Mapping[float, float]) -> float:
    """p of y ~ x^p between the smallest and the largest x: log(y_last / y_first) / log(x_last / x_first)."""
    first, last = min(by_x), max(by_x)
    return math.log(by_x[last] / by_x[first]) / math.log(last / first)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1 in the denominator) of n values; std is NaN for one value."""

    mean: float
    std: float
    n: int

    def percent(self) -> str:
        """As an error rate: `12.34% ± 0.40 (n=5)`."""
        if math.isnan(self.mean):
            return "failed"
        return f"{self.mean:.2%}" if self.n == 1 else f"{self.mean:.2%} ± {100 * self.std:.2f} (n={self.n})"


def percent(runs: Iterable[Run], name: str) -> str:
    """Mean and spread of a result that is an error rate, as text."""
    return spread(values(runs, name)).percent()


def unfinished(names: Sequence[str], runs: Sequence[Run]) -> str:
    """What a table's title says of cells that were asked for and are not finished: nothing where all are."""
    missing = len(names) - len(runs)
    return f" ({missing} of {len(names)} cells are not finished)" if missing else ""


def spread(numbers: Iterable[float | None]) -> Spread:
    """Mean and spread of the numbers that are there (a diverged run has none)."""
    found = [number for number in numbers if number is not None]
    if not found:
        return Spread(math.nan, math.nan, 0)
    return Spread(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else math.nan, len(found))
