"""The table of the benchmark's jobs: seconds, what they are compared with, and the target."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import benchmark_timing as timing


class Line(NamedTuple):
    """One row of the table.

    Attributes:
      label: what the table calls it.
      process: whose seconds it shows.
      against: the process it is compared with.
      comparison: how, with the ratio as `{0}`.
      target: what the ratio should not exceed.
      missing: shown and compared are not the process's seconds, but those that are missing to the other's.
    """

    label: str
    process: str
    against: str | None = None
    comparison: str = ""
    target: float | None = None
    missing: bool = False

    def seconds(self, rounds: Sequence[timing.Round]) -> list[float]:
        """One a round."""
        return [each[self.against] - each[self.process] if self.missing else each[self.process] for each in rounds]

    def ratio(self, rounds: Sequence[timing.Round]) -> float | None:
        """Median of the rounds' own; None where it is not compared."""
        if self.against is None:
            return None
        pairs = zip(self.seconds(rounds), rounds, strict=True)
        return statistics.median(seconds / each[self.against] for seconds, each in pairs)


_START = "start to first step, ResNet-20 on digits"
LINES = {
    "startup": (
        Line(f"{_START}: nothing compiled", "cold"),
        Line(f"{_START}: second start", "second", "baseline", "{0:.2f} x the import", 1.3),
        Line("import JAX, read the digits", "baseline"),
        Line(f"{_START}: PyTorch", "torch", "second", "{0:.2f} x our second start"),
    ),
    "whole_job": (
        Line("depth ablation by its defaults: nothing compiled", "cold"),
        Line("depth ablation by its defaults: second time", "second", "cold", "{0:.2f} x the first"),
    ),
    "compile": (
        Line("training step traced and compiled: 20 layers", "shallow"),
        Line("training step traced and compiled: 1,202 layers", "deep", "shallow", "{0:.2f} x 20 layers", 2.0),
    ),
    "host": (
        Line(
            "ResNet-20, CIFAR: waiting between stretches of steps",
            "called",
            "wall",
            "{0:.2%} of the time",
            0.01,
            True,
        ),
        Line("... and while they are handed over", "handed", "wall", "at most {0:.2%} of the time", 0.01, True),
    ),
}
_TINY = " (tiny)"


def rows(runs: Sequence[Any]) -> list[dict[str, Any]]:
    """The table as values: a row a line of every job, seconds and ratios as medians over the rounds that count."""
    return [row for run in runs for row in _rows(run)]


def _rows(run):
    taken = run.result["rounds"]
    good = timing.counted(taken)
    rounds = good or taken
    for line in LINES[run.config["job"]]:
        if line.process not in rounds[0]:
            continue  # PyTorch was not there
        seconds, ratio = line.seconds(rounds), line.ratio(rounds)
        yield {
            "job": run.config["job"],
            "process": line.process,
            "label": line.label + (_TINY if run.config["tiny"] else ""),
            "tiny": run.config["tiny"],
            "seconds": statistics.median(seconds),
            "least_seconds": min(seconds),
            "most_seconds": max(seconds),
            "ratio": ratio,
            "ratio_to": line.against,
            "comparison": line.comparison.format(ratio),
            "target": line.target,
            "rounds": len(taken),
            "rounds_counted": len(good),
        }


def report(workdir: Path, runs: Sequence[Any], unfinished: str) -> list[Path]:
    """Writes `jobs.csv`, prints the table; returns the path of the file.

    Args:
      workdir: where the file goes.
      runs: of jobs.
      unfinished: what the title says of jobs that are not finished.
    """
    from research.analysis import tables

    found = rows(runs)
    tables.write_csv(workdir / "jobs.csv", found)
    print(tables.render(f"\nWaiting{unfinished}; every process its own", [_shown(row) for row in found]))
    return [workdir / "jobs.csv"]


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    target = "-"
    if row["target"] is not None:
        kept = "kept" if row["ratio"] <= row["target"] else "missed"
        target = f"at most {row['target']:g}: {kept}" if row["target"] >= 1 else f"at most {row['target']:.0%}: {kept}"
    return {
        "what": row["label"],
        "seconds": f"{row['seconds']:.3g}",
        "least to most": f"{row['least_seconds']:.3g} to {row['most_seconds']:.3g}",
        "compared": row["comparison"] or "-",
        "target": target,
        "rounds": f"{row['rounds_counted']} of {row['rounds']}",
    }
