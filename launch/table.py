"""The cells of a sweep on the screen: a table of all of them, and one line."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from research.training.progress import clock
from research.training.status import Status

# What one looks at first comes first; finished cells are the ones that give way where the screen is too small.
_STYLES = {"running": "cyan", "failed": "bold red", "diverged": "red", "stopped": "yellow", "pending": "dim"}
_STYLES |= {"done": "green"}


def table(statuses: Sequence[Status], rows: int | None = None) -> Table:
    """All cells in order, or, where there are more than `rows`, those of most interest and how many more there are."""
    too_many = rows is not None and len(statuses) > rows
    shown = sorted(statuses, key=lambda each: list(_STYLES).index(each.state))[:rows] if too_many else statuses
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left", caption=summary(statuses))
    for name, justify in {"cell": "left", "state": "left", "step": "right", "left": "right"}.items():
        found.add_column(name, justify=justify, no_wrap=True)
    found.add_column("")  # it gives way where the screen is narrow, each text within its line
    for each in shown:
        state = Text(each.state, _STYLES[each.state])
        left = "" if each.seconds_left is None else clock(each.seconds_left)
        found.add_row(Text(each.name), state, steps(each), left, Text(each.message, no_wrap=True, overflow="ellipsis"))
    if too_many:
        found.add_row(f"and {len(statuses) - rows} more", "", "", "", "")
    return found


def summary(statuses: Sequence[Status]) -> str:
    """Such as '12 cells: 2 running, 3 pending, 7 done'."""
    counts = {state: sum(each.state == state for each in statuses) for state in _STYLES}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"{len(statuses)} cell{'s' if len(statuses) != 1 else ''}: {told}"


def line(statuses: Sequence[Status]) -> str:
    """The summary, and how far the running cells are."""
    running = [each for each in statuses if each.state == "running"]
    told = [f"{each.name} {steps(each) or 'starting'}" + _left(each) for each in running]
    return "; ".join([summary(statuses), *told])


def steps(status: Status) -> str:
    """Such as '120/500'; nothing where there are no steps to count."""
    if status.steps is None:
        return "" if status.step is None else str(status.step)
    return f"{status.step}/{status.steps}"


def _left(status):
    return "" if status.seconds_left is None else f" ({clock(status.seconds_left)} left)"
