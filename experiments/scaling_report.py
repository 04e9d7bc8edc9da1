"""What the rounds of a scaling curve say: points, a table, `summary.csv`, a figure a curve."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments import benchmark_timing as timing

_PASSES = 3  # a training step in forward passes: one forward, and the gradients at inputs and at weights


class Axis(NamedTuple):
    """What a curve varies.

    Attributes:
      label: of the x axis.
      examples: what one of a batch is called.
      speed_guide: what the reference of speed is called.
      memory_guide: what the reference of memory is called.
      memory_power: of the reference of memory, in what varies.
    """

    label: str
    examples: str
    speed_guide: str
    memory_guide: str
    memory_power: int


AXES = {
    "devices": Axis("virtual CPU devices", "images", "proportional to devices", "proportional to 1 / devices", -1),
    "depth": Axis("layers", "images", "as many GFLOP/s as the first", "proportional to depth", 1),
    "width": Axis("channels of the first stage", "images", "as many GFLOP/s as the first", "proportional to width", 1),
    "time": Axis("steps of a sequence, T", "sequences", "as many GFLOP/s as the first", "proportional to T", 1),
}


class Point(NamedTuple):
    """One point of a curve.

    Attributes:
      value: of what varies.
      devices: of its process.
      threads: of its process, NPROC.
      batch: examples a step, over all devices.
      params: parameters.
      seconds_a_step: median over rounds.
      examples_a_second: at the median.
      least: examples a second in the slowest round.
      most: in the fastest.
      reference: examples a second in proportion to devices or to 1 / multiply-adds, from the first point on.
      gigaflops_a_second: two operations a multiply-add of convolutions and matrix products, three passes.
      temporary_bytes: of a device.
      argument_bytes: of a device.
    """

    value: int
    devices: int
    threads: int
    batch: int
    params: int
    seconds_a_step: float
    examples_a_second: float
    least: float
    most: float
    reference: float
    gigaflops_a_second: float
    temporary_bytes: int
    argument_bytes: int

    @property
    def bytes(self) -> int:
        """Of a device, in all."""
        return self.temporary_bytes + self.argument_bytes


def points(axis: str, result: Mapping[str, Any]) -> list[Point]:
    """The points of a cell's result, ascending; where no round counts, all are taken."""
    rounds = timing.counted(result["rounds"]) or result["rounds"]
    found: list[Point] = []
    first = None
    for name, facts in sorted(result["points"].items(), key=lambda item: int(item[0])):
        seconds = [each[name] for each in rounds]
        median, batch = statistics.median(seconds), facts["batch"]
        # What speed is in proportion to, were every device, or every operation, as fast as the first point's.
        ideal = facts["devices"] if axis == "devices" else 1 / facts["multiply_adds"]
        first = first or (batch / median, ideal)
        kept = {field: facts[field] for field in Point._fields if field in facts}
        found.append(
            Point(
                value=int(name),
                seconds_a_step=median,
                examples_a_second=batch / median,
                least=batch / max(seconds),
                most=batch / min(seconds),
                reference=first[0] * (ideal / first[1]),
                gigaflops_a_second=2e-9 * _PASSES * facts["multiply_adds"] / median,
                **kept,
            )
        )
    return found


def title(axis: str, config: Mapping[str, Any]) -> str:
    """The network of a curve, without what varies."""
    sizes = config["sizes"]
    if config["network"] == "adding":
        return f"LSTM of {sizes['units']} units, batch {sizes['batch']}"
    depth = f"-{sizes['depth']}" if "depth" in sizes else ""
    width = f", width {sizes['width']}" if "width" in sizes else ""
    return f"CIFAR ResNet{depth}{width}, {sizes['size']}x{sizes['size']}, batch {sizes['batch']}"


def report(workdir: Path, names: list[str]) -> None:
    """Writes `summary.csv` and a figure a curve; prints a table each, and the powers with which it grows."""
    from research.analysis import figures, results, scaling_figures, tables

    runs = results.read_runs(workdir / "runs" / name for name in names)
    written, rows = [workdir / "summary.csv"], []
    for run in runs:
        axis = run.config["axis"]
        found, about = points(axis, run.result), AXES[axis]
        counted = len(timing.counted(run.result["rounds"]))
        rounds = {"rounds": len(run.result["rounds"]), "rounds_counted": counted}
        rows += [
            {"axis": axis, "network": title(axis, run.config)} | point._asdict() | {"bytes": point.bytes} | rounds
            for point in found
        ]
        print(tables.render(f"\n{title(axis, run.config)}: {about.label}", [_row(about, point) for point in found]))
        print(f"rounds that count: {counted} of {rounds['rounds']}{'' if counted else ', so all were taken'}")
        if len(found) > 1:
            speed, reference, memory = (
                results.growth({point.value: getattr(point, name) for point in found})
                for name in ("examples_a_second", "reference", "bytes")
            )
            print(
                f"{about.examples}/s grow as {axis} to the power {speed:.2f} (reference {reference:.2f}), "
                f"memory per device as {axis} to the power {memory:.2f}"
            )
        figure = scaling_figures.scaling(found, about, title(axis, run.config), run.result["cores"])
        written += figures.save(figure, workdir / "figures" / f"scaling_{axis}", figures.provenance([run]))
    tables.write_csv(workdir / "summary.csv", rows)
    print(f"\nwritten: {', '.join(map(str, written))}{results.unfinished(names, runs)}")


def _row(axis: Axis, point: Point) -> dict[str, Any]:
    def number(value):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    def mebibytes(size):
        return number(size / 2**20)

    return {
        axis.label: point.value,
        "parameters": point.params,
        "ms/step": number(1e3 * point.seconds_a_step),
        f"{axis.examples}/s": number(point.examples_a_second),
        "least to most": f"{number(point.least)} to {number(point.most)}",
        "GFLOP/s": f"{point.gigaflops_a_second:.3g}",
        "of reference": f"{point.examples_a_second / point.reference:.0%}",
        "MiB per device": mebibytes(point.bytes),
        "temporaries": mebibytes(point.temporary_bytes),
        "arguments": mebibytes(point.argument_bytes),
    }
