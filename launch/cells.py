"""What the launchers share: an experiment's command line, the command of each of its cells, and one launcher a workdir.

A launcher is called as `EXPERIMENT [its own flags] [the experiment's flags]`. It reads its own flags, the experiment
reads all others, and each cell is trained by a process of its own: `python -m experiments.EXPERIMENT ...
--only_cell=NAME`.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import flags, logging

from experiments import command_line, runner
from research.errors import UsageError, one_line
from research.files import io_error, make_folder
from research.training import run_folder

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Launch:
    """An experiment to be launched.

    Attributes:
      experiment: the experiment.
      grid: its cells, and where their runs go.
      words: the experiment's flags as they were given.
    """

    experiment: runner.Experiment
    grid: runner.Grid
    words: tuple[str, ...]

    @property
    def workdir(self) -> Path:
        return self.grid.workdir.absolute()

    def unfinished(self) -> list[str]:
        """Names of the cells without a result."""
        return [name for name in self.grid.names if not run_folder.finished(self.folder(name))]

    def folder(self, name: str) -> Path:
        """The run folder of a cell."""
        return self.workdir / "runs" / name

    def command(self, name: str) -> list[str]:
        """Trains one cell; the same from any folder but for relative paths among the experiment's flags."""
        return [*self._start(), f"--only_cell={name}"]

    def report_command(self) -> list[str]:
        """Makes the tables and figures of the finished cells."""
        return [*self._start(), "--report_only"]

    def _start(self) -> list[str]:
        words = command_line.without_flags(self.words, ("workdir", "only_cell", "report_only"))
        return [sys.executable, "-m", f"experiments.{self.experiment.name}", *words, f"--workdir={self.workdir}"]

    def environment(self) -> dict[str, str]:
        """Variables for the processes of cells: the code that is found, and the threads of a run by itself.

        The number of threads decides the last bits of convolutions; it stays as it would be without a launcher, on
        however few cores a process is kept.
        """
        threads = os.environ.get("NPROC") or str(runner.threads(getattr(self.grid.config, "devices", None)))
        return {"NPROC": threads, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}


def main(description: str, own: flags.FlagValues, launch: Callable[[Launch], int]) -> None:
    """The command line of a launcher: reads it, launches, exits with the code.

    Args:
      description: what `--help` says first.
      own: the launcher's flags, defined; they are set when `launch` is called. One that the experiment has too is
        taken out: the experiment's counts.
      launch: does it; raises CarouselError.
    """
    logging.set_verbosity(logging.WARNING)
    sys.exit(command_line.guarded(lambda: launch(parse(sys.argv, own, description))))


def parse(argv: list[str], own: flags.FlagValues, description: str = "") -> Launch:
    """Reads a launcher's command line; exits after `--help`.

    Raises:
      UsageError: it is no right one.
    """
    module = f"python -m launch.{Path(argv[0]).stem}"
    name = argv[1] if len(argv) > 1 else ""
    if name in ("--help", "-h", "-help", "--helpfull", "help"):
        usage = f"usage: {module} EXPERIMENT [flags of {module}] [flags of EXPERIMENT]"
        print(f"{description}\n\n{usage}\n{own.main_module_help()}")
        print(f"\n{module} EXPERIMENT --help lists an experiment's flags.")
        sys.exit(0)
    if not name or name.startswith("-"):
        raise UsageError(
            f"name an experiment first: {module} EXPERIMENT [flags]; it is one of {', '.join(runner.names())}"
        )
    experiment = runner.load(name)
    runner.define_flags(experiment)
    for flag in set(own) & set(flags.FLAGS):
        delattr(own, flag)  # the experiment's flag of that name counts
    try:
        _, *words = own([argv[0], *argv[2:]], known_only=True)
    except flags.Error as error:
        raise UsageError(f"{one_line(error)} ({module} --help lists the flags)") from None
    command_line.parse_flags([argv[0], *words])
    values = flags.FLAGS
    for flag in ("only_cell", "report_only"):
        if values[flag].value:
            raise UsageError(f"--{flag} is not for a launcher: give it to `python -m experiments.{name}`")
    return Launch(experiment, runner.grid_of(experiment, values), tuple(words))


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Keeps other launchers out of a working folder.

    Raises:
      CarouselError: one is at work there, or the folder cannot be written.
    """
    try:
        make_folder(workdir)
    except OSError as error:
        raise io_error(workdir, error, action="make the working folder") from error
    with run_folder.locked(workdir, "working folder"):
        yield
