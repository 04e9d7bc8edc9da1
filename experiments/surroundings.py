"""What every experiment can have around its runs without a bit of a result being another: kept programs, TensorBoard's
events, a profile. Flags, what they need, and how they are set up.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from research.errors import UsageError

FLAGS = ("compilation_cache", "tensorboard", "profile")


def define(script: Mapping[str, str]) -> None:
    """Defines the flags; `script` are arguments of every definition."""
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "Folder that keeps compiled programs; empty: none are kept. Default: `compiled` in the working folder.",
        **script,
    )
    flags.DEFINE_bool(
        "tensorboard", False, "Metrics as TensorBoard's events too, in `tensorboard` in the run folder.", **script
    )
    flags.DEFINE_string(
        "profile",
        None,
        "START:STOP: a profiler's trace of these steps, such as 100:120, in `profile` in each run folder.",
        **script,
    )


def check(values: flags.FlagValues, cells: Sequence[Any]) -> None:
    """Whether what was asked for can be done, before anything is trained.

    Raises:
      UsageError: `--profile` is no range of steps, or not of those that a cell has.
      CarouselError: a package is missing.
    """
    profiled = parse_profile(values.profile)
    for cell in cells if profiled else ():
        steps = getattr(cell, "steps", None)  # of epochs the trainer knows how many steps they are
        if isinstance(steps, int) and profiled[1] > steps:
            raise UsageError(f"--profile={values.profile} goes beyond the end of {cell.name}, which has {steps} steps")
    if values.tensorboard:
        from research.training import tensorboard

        tensorboard.check()


def parse_profile(text: str | None) -> tuple[int, int] | None:
    """`START:STOP` as numbers: the steps after the first START up to the first STOP.

    Raises:
      UsageError: it is something else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UsageError(f"--profile={text}: give START:STOP, such as 100:120 for the 20 steps after the first 100")
    return int(match[1]), int(match[2])


def keep_compiled(values: flags.FlagValues, note: Callable[[str], None]) -> None:
    """Has JAX keep its programs where the flags say."""
    from research.training import environment

    if values.compilation_cache != "":
        environment.keep_compiled(Path(values.compilation_cache or Path(values.workdir) / "compiled"), note)


@contextlib.contextmanager
def around(values: flags.FlagValues, folder: Any, note: Callable[[str], None]) -> Iterator[Any]:
    """Around the training of the run in an open run folder; gives its `research.training.profile.Profile`."""
    from research.training import profile

    if values.tensorboard:
        from research.training import tensorboard

        folder.metrics.changed = tensorboard.Mirror(folder.path, note)
    with profile.Profile(folder.path, parse_profile(values.profile), note) as traced:
        yield traced


def after(values: flags.FlagValues, path: Path, note: Callable[[str], None]) -> None:
    """For a run that was finished before: its events, where it has none."""
    if values.tensorboard:
        from research.training import tensorboard

        tensorboard.complete(path, note)
