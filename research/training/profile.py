"""A profiler's trace of some steps of a run, for Perfetto, XProf or TensorBoard; it changes no bit of the training."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from research.errors import UsageError
from research.files import make_folder

FOLDER = "profile"


class Profile:
    """Traces the stretches that hold the asked steps, all of each: how steps are compiled stays as it is.

    A context manager around the training, so that what was traced is written where it ends early.

    Args:
      folder: the run folder; a trace lies in its subfolder `profile`.
      steps: `(start, stop)`: the steps after the first `start` up to the first `stop`; None for no trace.
      note: takes lines about what was traced and what not.
    """

    def __init__(
        self,
        folder: Path = Path(),
        steps: tuple[int, int] | None = None,
        note: Callable[[str], None] = lambda text: None,
    ):
        self._folder, self._steps, self._note = folder / FOLDER, steps, note
        self._begun = False
        self._first: int | None = None  # of the trace being taken
        self._last: int | None = None

    def check(self, at: int, steps: int) -> None:
        """A run of `steps` steps goes on at step `at`; says so where the range lies before that.

        Raises:
          UsageError: the range is not within the run.
        """
        self._begun = True
        if self._steps is None:
            return
        start, stop = self._steps
        if stop > steps:
            raise UsageError(f"--profile={start}:{stop} goes beyond the end of the training, which has {steps} steps")
        if at >= stop:
            self._note(f"{self._folder}: no new trace, steps {start} to {stop} were trained in an earlier sitting")

    @contextlib.contextmanager
    def stretch(self, at: int, end: int) -> Iterator[None]:
        """Around the steps `at` to `end`, which are one call; what the host does between two of them is traced too."""
        if self._steps and self._first is None and at < self._steps[1] and self._steps[0] < end:
            self._start(at)
        yield
        if self._first is not None:
            self._last = end
            if end >= self._steps[1]:
                self._write()

    def _start(self, at: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow down, and fill the trace with bookkeeping
        try:
            make_folder(self._folder)
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._first = at
        # JAX refuses a second trace after one that could not be written.
        except (OSError, RuntimeError) as error:
            self._steps = None
            self._note(f"warning: {self._folder}: no trace is taken ({error}); the training goes on")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind, *exception) -> None:
        if self._first is not None:
            self._write()  # stopped or failed within the range
        elif self._steps and not self._begun and kind is None:
            self._note(f"{self._folder}: no trace, for there were no steps of training")

    def _write(self) -> None:
        first, self._first = self._first, None
        before = set(self._folder.rglob("*.trace.json.gz"))
        try:
            jax.profiler.stop_trace()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            self._note(f"warning: {self._folder}: the trace cannot be written ({reason}); the training goes on")
            return
        path = next(iter(set(self._folder.rglob("*.trace.json.gz")) - before), self._folder)
        what = f"steps {first} to {self._last}" if self._last is not None else "a stretch that failed"
        self._note(f"profile of {what}: open {path} at ui.perfetto.dev, or {self._folder} in XProf or TensorBoard")
