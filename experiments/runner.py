"""What every experiment shares: flags from its Config, the grid of cells, progress, resume, the report.

An experiment is three functions: `cells(config)` lists the grid, `run(cell, ...)` trains one cell, `report(workdir,
cells)` makes tables and figures from run folders alone. This file gives them a command.
"""

import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from experiments import command_line, options, surroundings
from research.errors import CarouselError, Interrupted, UsageError


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One published comparison.

    Attributes:
      name: of its module in `experiments`, and of the default working folder.
      config: frozen dataclass of `option` fields, the flags.
      cells: `config -> list of cells`, frozen dataclasses with a `name`, unique in the grid; raises UsageError.
      run: `(cell, context) -> result` as JSON-able values, with a `research.training.loop.Context`; may write further
        files into the run folder. A diverged run is a result too, with a `failure`.
      report: `(workdir, names of the cells) -> None`; writes tables and figures, prints.
      presets: name -> fields of the config that differ from the defaults.
      smoke: fields that make every cell tiny.
      exclusive: groups of fields of which at most one may be given; giving one drops a preset's others.
      check: asked of every cell before the first is trained; raises where one cannot be.
      divergence_is_a_result: a diverged cell does not make the exit code 1, since the paper's table has such rows.
      alone: its cells measure time or memory, and must not run side by side.
    """

    name: str
    config: type
    cells: Callable[[Any], list[Any]]
    run: Callable[[Any, Any], Mapping[str, Any]]
    report: Callable[[Path, list[str]], None]
    presets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    smoke: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    exclusive: Sequence[Sequence[str]] = ()
    check: Callable[[Any], None] = lambda cell: None
    divergence_is_a_result: bool = False
    alone: bool = False


def report_of(module: str) -> Callable[[Path, list[str]], None]:
    """`report` of a module of `experiments`, imported when it is called: a training need not wait for drawing."""

    def report(workdir: Path, names: list[str]) -> None:
        importlib.import_module(f"experiments.{module}").report(workdir, names)

    return report


def identity(cell: Any) -> dict[str, Any]:
    """The fields of a cell that determine its result; what `config.json` holds."""
    fields = [f for f in dataclasses.fields(cell) if f.metadata.get("identity", True)]
    values = [(f, getattr(cell, f.name)) for f in fields]
    return {f.name: value for f, value in values if not (f.metadata.get("implied") and value == f.default)}


def main(experiment: Experiment) -> None:
    """Parses the command line, runs the experiment, exits with its code."""
    define_flags(experiment)
    logging.set_verbosity(logging.WARNING)  # JAX tells at INFO which kinds of device the machine does not have
    code = functools.partial(command_line.guarded, lambda: _launch(experiment, flags.FLAGS))
    app.run(lambda _: sys.exit(code()), flags_parser=command_line.parse_flags)


def names() -> list[str]:
    """The experiments that there are."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\nEXPERIMENT = " in path.read_text())


def load(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
      UsageError: there is none.
    """
    if name not in names():
        raise UsageError(f"there is no experiment {name!r}; there are {', '.join(names())}")
    return importlib.import_module(f"experiments.{name}").EXPERIMENT


def define_flags(experiment: Experiment) -> None:
    """Defines the flags of an experiment: those of its Config, and those that all have."""
    # absl's --help lists the flags of the script that was started; these are its flags, wherever they are defined.
    script = {"module_name": sys.argv[0]}
    for field in dataclasses.fields(experiment.config):
        options.define(field, script)
    workdir = f"runs/{experiment.name}"
    flags.DEFINE_string("workdir", workdir, "Folder of the run folders, tables and figures.", **script)
    flags.DEFINE_bool("smoke", False, "Every cell, tiny: to try a command line, not for its numbers.", **script)
    flags.DEFINE_string("only_cell", None, "Train the cell of this name alone, without a report.", **script)
    flags.DEFINE_bool("report_only", False, "Tables and figures again, from finished run folders.", **script)
    surroundings.define(script)
    if experiment.presets:
        recipes = sorted(experiment.presets)
        flags.DEFINE_enum("preset", None, recipes, "A published recipe; other flags override it.", **script)


def parse_config(experiment: Experiment, values: flags.FlagValues) -> Any:
    """The Config that the flags ask for: defaults, then the preset, then what was given, and `--smoke` on top.

    Raises:
      UsageError: a value cannot be read, or two of an exclusive group were given.
    """
    given = {}
    for field in dataclasses.fields(experiment.config):
        if values[field.name].present:
            given[field.name] = options.read(field, values[field.name].value)
    chosen = dict(experiment.presets[values.preset]) if experiment.presets and values.preset else {}
    smoke = dict(experiment.smoke) if values.smoke else {}
    for group in experiment.exclusive:
        both = [name for name in group if given.get(name) is not None]
        if len(both) > 1:
            raise UsageError(f"{' and '.join(f'--{name}={given[name]}' for name in both)}: give exactly one of them")
        if both:
            for layer in (chosen, smoke):
                for name in group:
                    layer.pop(name, None)
    if smoke and chosen:
        # A preset keeps its grid; smoke makes each cell small.
        chosen = {name: value for name, value in chosen.items() if name not in _exclusive_of(experiment, smoke)}
    return experiment.config(**{**chosen, **smoke, **given})


def _exclusive_of(experiment: Experiment, names: Mapping[str, Any]) -> set[str]:
    return {name for group in experiment.exclusive if set(group) & set(names) for name in group}


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a command line asks for: the cells, and where their runs go."""

    config: Any
    cells: list[Any]
    workdir: Path

    @property
    def names(self) -> list[str]:
        return [cell.name for cell in self.cells]

    @property
    def folders(self) -> list[Path]:
        return [self.workdir / "runs" / name for name in self.names]


def grid_of(experiment: Experiment, values: flags.FlagValues) -> Grid:
    """The grid that the flags ask for.

    Raises:
      UsageError: there is no such grid.
      CarouselError: what is wanted around its runs is not there.
    """
    config = parse_config(experiment, values)
    cells = experiment.cells(config)
    if not values.report_only:
        surroundings.check(values, cells)
    return Grid(config, cells, Path(values.workdir))


def prepare(experiment: Experiment, grid: Grid) -> None:
    """Checks all cells before the first is trained, then makes their run folders: what is pending can be seen there.

    Raises:
      CarouselError: a cell cannot be trained, or a folder holds something else.
    """
    from research.training import run_folder

    for cell, path in zip(grid.cells, grid.folders, strict=True):
        experiment.check(cell)
        run_folder.check_config(path, identity(cell))
    for cell, path in zip(grid.cells, grid.folders, strict=True):
        run_folder.reserve(path, identity(cell))


def threads(devices: int | None) -> int:
    """Threads for XLA, as launch/run has it: the usable cores, and at least four for each of several CPU devices."""
    from research.training import environment

    return max(environment.usable_cores() or 1, 4 * devices if devices and devices > 1 else 1)


# Flags that say where and how much of an experiment runs here, and nothing of what it is.
_OF_THE_PLACE = ("workdir", "only_cell", "report_only", *surroundings.FLAGS)


def _launch(experiment: Experiment, values: flags.FlagValues) -> int:
    grid = grid_of(experiment, values)
    if values.only_cell is not None:
        chosen = [cell for cell in grid.cells if cell.name == values.only_cell]
        if not chosen:
            raise UsageError(f"--only_cell={values.only_cell}: the cells are {', '.join(grid.names)}")
        grid = dataclasses.replace(grid, cells=chosen)
    if values.report_only:
        experiment.report(grid.workdir, grid.names)
        return 0
    stop = command_line.StopRequest()
    command_line.end_with_launcher()
    run_cells(experiment, grid, stop, values)
    return conclude(experiment, grid, report=values.only_cell is None)


def conclude(experiment: Experiment, grid: Grid, report: bool = True) -> int:
    """Makes the report of the finished cells, tells of those that diverged; returns the exit code."""
    if report:
        experiment.report(grid.workdir, grid.names)
    found = failures(grid)
    for failure in found:
        print(f"{'diverged' if experiment.divergence_is_a_result else 'error'}: {failure}", file=sys.stderr)
    return CarouselError.exit_code if found and not experiment.divergence_is_a_result else 0


def failures(grid: Grid) -> list[str]:
    """Of the finished cells those of which the result is a failure."""
    from research.training import run_folder

    results = [run_folder.read_result(folder) for folder in grid.folders if run_folder.finished(folder)]
    return [result["failure"] for result in results if result.get("failure")]


def run_cells(
    experiment: Experiment, grid: Grid, stop: Callable[[], bool], values: flags.FlagValues, stream: Any = None
) -> None:
    """Trains the cells that are not finished, one after another; several processes (`launch.hosts`) call it alike.

    Args:
      experiment, grid, values: what is asked for.
      stop: as `should_stop` of `research.training.loop.Context`.
      stream: where progress is shown; standard error by default.

    Raises:
      CarouselError: a cell cannot be trained; `Interrupted`, as `stop` asked.
    """
    # Imported late: --help and usage errors answer without loading JAX.
    import jax

    from experiments import precision
    from research.training import distributed, loop, run_folder, status
    from research.training.progress import Reporter

    devices = getattr(grid.config, "devices", None)
    os.environ.setdefault("NPROC", str(threads(devices)))  # for those who call Python themselves; read at first use
    if devices and not jax.distributed.is_initialized():  # else each process has its share of them by now
        jax.config.update("jax_num_cpu_devices", devices)  # before the first use of a device
    command = (
        "python",
        "-m",
        f"experiments.{experiment.name}",
        *command_line.without_flags(sys.argv[1:], _OF_THE_PLACE),
    )
    for cell in grid.cells:
        precision.check(cell)
    prepare(experiment, grid)
    with Reporter(stream) as reporter:
        surroundings.keep_compiled(values, reporter.note)
        for number, (cell, path) in enumerate(zip(grid.cells, grid.folders, strict=True), start=1):
            label = f"[{number}/{len(grid.cells)}] {cell.name}"
            if distributed.from_writer(functools.partial(run_folder.finished, path)):
                reporter.note(f"{label}: finished before")
                surroundings.after(values, path, reporter.note)
                continue
            if stop():
                done = f"{number - 1} of {len(grid.cells)} cells are finished"
                raise Interrupted(f"{grid.workdir}: {done}; the same command goes on")
            with (
                run_folder.open_run(path, identity(cell)) as folder,
                status.kept(path) as keeper,
                precision.products(cell),
                surroundings.around(values, folder, reporter.note) as profile,
            ):
                reporter.listener = keeper.progress
                try:
                    context = loop.Context(folder, label, reporter, stop, command, profile)
                    result = experiment.run(cell, context)
                except loop.Diverged as failure:  # a result, not a crash: the other cells are still wanted
                    result = {"failure": str(failure), "failed_at_step": failure.step}
                folder.finish(result)
