"""How far the cells of a working folder are, from their run folders alone: `python -m launch.status WORKDIR [--watch]`.

States: pending, running (step, time left), stopped (begun, and no process is at it), failed, diverged, done. On the
machine where a cell runs a killed process is seen at once, from another after two minutes.
"""

import sys
import time
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.live import Live

from experiments import command_line
from launch.table import table
from research.errors import UsageError, one_line
from research.training import status

_EVERY = 2.0


def main(argv: list[str] | None = None) -> int:
    """Shows the table; returns the exit code."""
    own = flags.FlagValues()
    flags.DEFINE_bool("watch", False, "Show it again every two seconds until all cells are finished.", flag_values=own)
    flags.DEFINE_bool("help", False, "Show this.", short_name="h", flag_values=own)
    try:
        _, *words = own(argv or sys.argv)
    except flags.Error as error:
        raise UsageError(f"{one_line(error)} (--help lists the flags)") from None
    if own.help:
        print(f"{__doc__}\n{own.main_module_help()}")
        return 0
    if len(words) != 1:
        raise UsageError("name one working folder: python -m launch.status WORKDIR")
    show(Path(words[0]), own.watch)
    return 0


def show(workdir: Path, watch: bool) -> None:
    """Prints the table; with `watch` until every cell is finished or somebody presses Ctrl-C."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file has no width
    if not watch:
        console.print(table(status.read_all(workdir)))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            statuses = status.read_all(workdir)
            live.update(table(statuses, rows=max(1, console.height - 6)), refresh=True)
            if all(each.finished for each in statuses):
                return
            time.sleep(_EVERY)


if __name__ == "__main__":
    sys.exit(command_line.guarded(main))
