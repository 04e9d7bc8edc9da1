"""What a person sees while a run trains: a live bar on a terminal, plain lines elsewhere. Goes to standard error."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

# A line at most this often where the output is a file, in seconds.
_LINE_EVERY = 10.0


class Reporter:
    """Shows the progress of one run after another; a context manager, since a live bar must be taken down."""

    def __init__(self, stream=None):
        self._console = Console(file=stream or sys.stderr, highlight=False, emoji=False, soft_wrap=True)
        self._live = self._console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            transient=True,
            refresh_per_second=4,
            disable=not self._live,
        )
        self._task = None
        self.listener: Callable[[int, int, float | None, str], None] = lambda *progress: None
        """Told of step, steps, seconds left and a line about the last stretch, as often as the screen is."""

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *exception):
        self._bar.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False)

    def start(self, label: str, steps: int, at: int) -> None:
        """A run begins, or goes on, at step `at` of `steps`."""
        self._label, self._steps, self._at = label, steps, at
        self._seconds, self._last_line = 0.0, time.monotonic()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(label, total=steps, completed=at, status="compiling")
        self.listener(at, steps, None, "compiling")

    def update(self, step: int, metrics: dict[str, float], seconds: float, examples_per_second: float) -> None:
        """The run reached `step`; the last stretch took `seconds` of training."""
        taken = step - self._at
        self._seconds += seconds
        remaining = self._seconds / taken * (self._steps - step) if taken else 0.0
        rate, left = f"{examples_per_second:,.0f}", clock(remaining)
        loss, error = f"loss {metrics['loss']:.3g}", ""
        short = f"{loss} {rate}/s {left} left"
        if "error" in metrics:  # not every task has one
            error = f"error {metrics['error']:.1%}"
            short = f"{loss} {metrics['error']:.1%} {rate}/s {left} left"
        self._bar.update(self._task, completed=step, status=short)  # so that label, bar and status fit 80 columns
        told = "  ".join(part for part in (loss, error, f"{rate} examples/s") if part)
        self.listener(step, self._steps, remaining, told)
        if not self._live and (time.monotonic() - self._last_line >= _LINE_EVERY or step == self._steps):
            self._last_line = time.monotonic()
            self.note(f"{self._label}  step {step}/{self._steps}  {told}  {left} left")


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
