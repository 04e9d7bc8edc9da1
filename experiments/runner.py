"""What every experiment shares: flags from its Config, the grid of cells, progress, resume, exit codes, the report.

An experiment is three functions: `cells(config)` lists the grid, `run(cell, ...)` trains one cell, `report(workdir,
cells)` makes tables and figures from run folders alone. This file gives them a command line.

Exit codes: 0 done; 1 the environment (files, disk) or a failed cell; 2 the request; 75 interrupted, start it again.
"""

import dataclasses
import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from research.errors import CarouselError, Interrupted, UsageError


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    identity: bool = True,
    implied: bool = False,
    may_be_empty: bool = False,
) -> Any:
    """A field of a Config or a cell.

    Args:
      default: its type is the flag's (a tuple is a comma-separated list); None needs the annotation `int | None` etc.
      help: the flag's help text.
      choices: the values a string may take; for a tuple, each of its elements.
      minimum: the smallest value allowed; for a tuple, each of its elements.
      identity: False for what does not change a cell's result (where the data lies, how many devices).
      implied: left out of a cell's identity where it has its default: for a field that came later than runs without it,
        which are the same runs.
      may_be_empty: of a tuple, as `--name=`.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "identity": identity, "implied": implied}
    return dataclasses.field(default=default, metadata=metadata | {"may_be_empty": may_be_empty})


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
    _define_flags(experiment)
    logging.set_verbosity(logging.WARNING)  # JAX tells at INFO which kinds of device the machine does not have
    app.run(lambda _: sys.exit(_guarded(experiment)), flags_parser=parse_flags)


def _define_flags(experiment: Experiment) -> None:
    # absl's --help lists the flags of the script that was started; these are its flags, wherever they are defined.
    script = {"module_name": sys.argv[0]}
    for field in dataclasses.fields(experiment.config):
        _define_flag(field, script)
    workdir = f"runs/{experiment.name}"
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "carousel")
    flags.DEFINE_string("workdir", workdir, "Folder of the run folders, tables and figures.", **script)
    flags.DEFINE_bool("smoke", False, "Every cell, tiny: to try a command line, not for its numbers.", **script)
    flags.DEFINE_bool("report_only", False, "Tables and figures again, from finished run folders.", **script)
    flags.DEFINE_string("compilation_cache", cache, "Folder that keeps compiled programs; empty: off.", **script)
    if experiment.presets:
        recipes = sorted(experiment.presets)
        flags.DEFINE_enum("preset", None, recipes, "A published recipe; other flags override it.", **script)


def _define_flag(field: dataclasses.Field, script: Mapping[str, str]) -> None:
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    help_text, choices = field.metadata["help"], list(field.metadata["choices"])
    kind = kind.replace(" | None", "")
    if kind.startswith("tuple"):
        if choices:
            help_text += f" Any of: {', '.join(choices)}."
        default = None if field.default is None else [str(value) for value in field.default]
        flags.DEFINE_list(field.name, default, help_text, **script)
    elif choices:
        flags.DEFINE_enum(field.name, field.default, choices, help_text, **script)
    else:
        define = {"int": flags.DEFINE_integer, "float": flags.DEFINE_float, "bool": flags.DEFINE_bool}
        define.get(kind, flags.DEFINE_string)(field.name, field.default, help_text, **script)


def parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if rest[1:]:
            raise flags.Error(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    except SystemExit:
        sys.exit(0)  # absl has printed the help that was asked for, and would exit with 1
    except flags.Error as error:
        _fail(f"{' '.join(str(error).split())} (--help lists the flags)", UsageError.exit_code)
    return rest


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _guarded(experiment: Experiment) -> int:
    """Runs the experiment; what a user can do something about ends in one line."""
    try:
        return _launch(experiment, flags.FLAGS)
    except Interrupted as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        return stop.exit_code
    except CarouselError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted at once; the same command goes on from the last checkpoint", file=sys.stderr)
        return Interrupted.exit_code
    except OSError as error:
        if error.errno is None:
            raise
        place = error.filename or flags.FLAGS.workdir  # a failed write does not say to which file
        print(f"error: {place}: {error.strerror}; free or choose another place (--workdir)", file=sys.stderr)
        return CarouselError.exit_code


def parse_config(experiment: Experiment, values: flags.FlagValues) -> Any:
    """The Config that the flags ask for: defaults, then the preset, then what was given, and `--smoke` on top.

    Raises:
      UsageError: a value cannot be read, or two of an exclusive group were given.
    """
    given = {}
    for field in dataclasses.fields(experiment.config):
        if values[field.name].present:
            given[field.name] = _read(field, values[field.name].value)
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


def _read(field: dataclasses.Field, value: Any) -> Any:
    """The value of a field from that of its flag, within the field's choices and bounds."""
    shown = f"--{field.name}={','.join(value) if isinstance(value, list) else value}"
    choices, minimum = field.metadata["choices"], field.metadata["minimum"]
    read = value
    if isinstance(value, list):
        try:
            read = tuple((int if "int" in str(field.type) else str)(part) for part in value)
        except ValueError:
            raise UsageError(f"{shown} is not a list of whole numbers: write --{field.name}=1,2,3") from None
        if not read and not field.metadata["may_be_empty"]:
            raise UsageError(f"{shown} is empty: give at least one value")
        if len(set(read)) < len(read):
            raise UsageError(f"{shown} names a value twice: give each once")
    for part in read if isinstance(read, tuple) else (read,):
        if choices and part not in choices:
            raise UsageError(f"{shown}: {part!r} is unknown; choose from {', '.join(choices)}")
        if minimum is not None and part is not None and not part >= minimum:
            raise UsageError(f"{shown}: give at least {minimum}")
    return read


class _StopRequest:
    """Turns the first SIGTERM or SIGINT into a question that the trainer asks; a second SIGINT ends at once."""

    def __init__(self):
        self._asked = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._handle)

    def _handle(self, number, frame):
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        print("\nstopping: a checkpoint is written after the steps in flight", file=sys.stderr)

    def __call__(self) -> bool:
        return self._asked


def _launch(experiment: Experiment, values: flags.FlagValues) -> int:
    config = parse_config(experiment, values)
    cells = experiment.cells(config)
    workdir = Path(values.workdir)
    stop = _StopRequest()
    failures = []
    if not values.report_only:
        failures = _run_all(experiment, cells, workdir, stop, values, getattr(config, "devices", None))
    experiment.report(workdir, [cell.name for cell in cells])
    kind = "diverged" if experiment.divergence_is_a_result else "error"
    for failure in failures:
        print(f"{kind}: {failure}", file=sys.stderr)
    return CarouselError.exit_code if failures and not experiment.divergence_is_a_result else 0


def _run_all(experiment, cells, workdir, stop, values, devices) -> list[str]:
    # Imported late: --help and usage errors answer without loading JAX.
    import jax

    from experiments import precision
    from research.training import environment, loop, run_folder
    from research.training.progress import Reporter

    # As launch/run does, for those who call Python themselves; read when the first device is used.
    os.environ.setdefault(
        "NPROC", str(max(environment.usable_cores() or 1, 4 * devices if devices and devices > 1 else 1))
    )
    if devices:
        jax.config.update("jax_num_cpu_devices", devices)  # before the first use of a device
    if values.compilation_cache:
        cache = environment.compilation_cache_dir(Path(values.compilation_cache))
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    command = ("python", "-m", f"experiments.{experiment.name}", *sys.argv[1:])
    folders = [workdir / "runs" / cell.name for cell in cells]
    for cell, path in zip(cells, folders, strict=True):
        experiment.check(cell)
        precision.check(cell)
        run_folder.check_config(path, identity(cell))  # all of them before the first is trained
    failures = []
    with Reporter() as reporter:
        for number, (cell, path) in enumerate(zip(cells, folders, strict=True), start=1):
            label = f"[{number}/{len(cells)}] {cell.name}"
            if run_folder.finished(path):
                reporter.note(f"{label}: finished before")
                result = run_folder.read_result(path)
            else:
                if stop():
                    done = number - 1
                    raise Interrupted(f"{workdir}: {done} of {len(cells)} cells are finished; the same command goes on")
                with run_folder.open_run(path, identity(cell)) as folder, precision.products(cell):
                    try:
                        result = experiment.run(cell, loop.Context(folder, label, reporter, stop, command))
                    except loop.Diverged as failure:  # a result, not a crash: the other cells are still wanted
                        result = {"failure": str(failure), "failed_at_step": failure.step}
                    folder.finish(result)
            if result.get("failure"):
                failures.append(result["failure"])
    return failures
