"""Peak memory of a training step against depth, with and without rematerialisation.

A backward pass keeps what the forward pass computed: without rematerialisation that grows with depth, with it (Chen et
al. 2016) with the square root of depth, for one more forward pass. The trainer's own step is compiled for each depth,
and XLA's buffer assignment says how much memory its temporaries take; nothing is run unless `--execute` asks for steps
on random images, which measures the time of a step and the process's peak resident memory as well.

By default: pre-activation bottleneck networks of 56 to 1,001 layers (He et al. 2016), batch 64, in about a minute.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.identity_mappings import network_of, parse_network
from experiments.identity_tables import VARIANTS
from experiments.options import option
from experiments.runner import Experiment, main


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    networks: tuple[str, ...] = option(
        ("bottleneck-56", "bottleneck-164", "bottleneck-326", "bottleneck-650", "bottleneck-1001"),
        "Unit and layers, such as basic-110 or bottleneck-164.",
    )
    variant: str = option("full_preactivation", "Kind of unit.", choices=tuple(VARIANTS))
    remat: tuple[str, ...] = option(("off", "on"), "Rematerialisation.", choices=("off", "on"))
    width: int = option(16, "Channels of the first stage.", minimum=1)
    image_size: int = option(32, "Height and width of an image in pixels.", minimum=4)
    batch_size: int = option(64, "Images a step.", minimum=1)
    execute: int = option(0, "Take that many steps on random images as well, after one to warm up.", minimum=0)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training step to compile."""

    variant: str
    unit: str
    depth: int
    width: int
    image_size: int
    batch_size: int
    remat: bool
    execute: int

    @property
    def name(self) -> str:
        remat = "remat" if self.remat else "plain"
        shape = f"w{self.width}-s{self.image_size}-b{self.batch_size}-x{self.execute}"
        return f"{self.variant}-{self.unit}-{self.depth}-{shape}-{remat}"


def cells(config: Config) -> list[Cell]:
    """The grid: networks x rematerialisation."""
    same = {name: getattr(config, name) for name in ("variant", "width", "image_size", "batch_size", "execute")}
    grid = [
        Cell(**same, unit=unit, depth=depth, remat=remat == "on")
        for unit, depth in map(parse_network, config.networks)
        for remat in config.remat
    ]
    for cell in grid:
        network_of(cell)  # raises where there is no such network
    return grid


def run(cell: Cell, context: Any) -> Mapping[str, Any]:
    """Compiles one training step and reads how much memory it takes; takes steps where asked to."""
    import jax
    import numpy as np

    from research.tasks import classification
    from research.training import environment, optimizers, parallel, state, step

    environment.record(context.folder.path, context.command, {}, context.reporter.note)
    shape = (cell.batch_size, cell.image_size, cell.image_size, 3)
    inputs = jax.ShapeDtypeStruct(shape, np.float32)
    model = network_of(cell, remat=cell.remat)
    schedule = optimizers.step_decay(0.1, drops=())
    optimizer = optimizers.sgd(schedule)
    task = classification.classification(state.bind(model), mean=np.full(shape[1:], 128, np.float32))
    stretch = step.make_stretch(task.loss, optimizer, schedule, None)
    random = np.random.default_rng(0)
    data = {"images": random.integers(0, 256, shape, np.uint8), "labels": random.integers(0, 10, cell.batch_size)}
    mesh = parallel.make_mesh(1)
    initial = jax.eval_shape(lambda: state.initialize(model, optimizer, 0, inputs))
    arguments = parallel.replicate((data, jax.random.key(0)), mesh)
    rows = np.arange(cell.batch_size, dtype=np.int32)[None]
    compiled = parallel.compile_stretch(stretch, "jit", mesh, (initial, arguments[0], rows, arguments[1]))
    result = compiled.memory | {"params": sum(leaf.size for leaf in jax.tree.leaves(initial.params))}
    if cell.execute:
        current = parallel.replicate(state.initialize(model, optimizer, 0, inputs), mesh)
        result |= _execute(compiled, current, arguments, rows, cell.execute)
    gib = result["temporary_bytes"] / 2**30
    context.reporter.note(f"{context.label}: {gib:.2f} GiB of temporaries{_executed(result)}")
    return result


def _execute(compiled, current, arguments, rows, steps) -> dict[str, float]:
    import resource
    import statistics
    import time

    import jax

    seconds, losses = [], []
    for _ in range(1 + steps):
        start = time.perf_counter()
        current, metrics = compiled(current, arguments[0], rows, arguments[1])
        losses.append(float(jax.device_get(metrics["loss"])[0]))
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    return {"step_seconds": statistics.median(seconds[1:]), "peak_resident_bytes": peak, "loss": losses[-1]}


def _executed(result: Mapping[str, Any]) -> str:
    if "step_seconds" not in result:
        return ""
    peak = result["peak_resident_bytes"] / 2**30
    return f", {result['step_seconds']:.1f} s a step, process peak {peak:.1f} GiB, loss {result['loss']:.3f}"


def report(workdir: Path, names: list[str]) -> None:
    """Writes `summary.csv` and the figure; prints bytes and the exponent of their growth with depth."""
    from research.analysis import figures, results, signal_figures, tables

    runs = results.read_runs(workdir / "runs" / name for name in names)
    tables.write_csv(workdir / "summary.csv", [run.config | _all_columns(run.result) for run in runs])
    config = runs[0].config
    title = f"{VARIANTS[config['variant']].label}, width {config['width']}, batch {config['batch_size']}"
    print(tables.render(f"\n{title}: memory of a training step", [_row(run) for run in runs]))
    groups = {
        ("rematerialised" if remat else "everything kept"): {run.config["depth"]: run for run in same}
        for remat, same in results.group(runs, lambda run: run.config["remat"]).items()
    }
    for name, by_depth in groups.items():
        if len(by_depth) > 1:
            power = results.growth({depth: run.result["temporary_bytes"] for depth, run in by_depth.items()})
            print(f"{name}: bytes grow as depth to the power {power:.2f}")
    size = config["image_size"]
    powers = {"everything kept": 1.0, "rematerialised": 0.5}
    figure = signal_figures.memory_against_depth(groups, powers, f"{title}, {size}x{size} images")
    written = figures.save(figure, workdir / "figures" / "memory", figures.provenance(runs))
    print(f"\nwritten: {workdir / 'summary.csv'}, {', '.join(map(str, written))}")


_MEASURED = ("params", "temporary_bytes", "argument_bytes", "step_seconds", "peak_resident_bytes")


def _all_columns(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: result.get(name) for name in _MEASURED}


def _row(run: Any) -> dict[str, Any]:
    result = run.result
    return {
        "network": f"{run.config['unit']}-{run.config['depth']}",
        "rematerialised": "yes" if run.config["remat"] else "no",
        "parameters": result["params"],
        "temporaries (GiB)": f"{result['temporary_bytes'] / 2**30:.3f}",
        "s/step": f"{result['step_seconds']:.2f}" if "step_seconds" in result else "-",
        "process peak (GiB)": f"{result['peak_resident_bytes'] / 2**30:.2f}" if "step_seconds" in result else "-",
    }


EXPERIMENT = Experiment(
    name="memory",
    config=Config,
    cells=cells,
    run=run,
    report=report,
    alone=True,
    smoke={"width": 4, "image_size": 8, "batch_size": 4, "networks": ("bottleneck-20", "bottleneck-38")},
)

if __name__ == "__main__":
    main(EXPERIMENT)
