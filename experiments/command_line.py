"""How a command begins and ends: its words read as flags, signals as a question, errors as one line and a code.

Exit codes: 0 done; 1 the environment (files, disk) or a failed cell; 2 the request; 75 interrupted, start it again.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

from absl import flags

from research.errors import CarouselError, Interrupted, UsageError, one_line


def parse_flags(argv: list[str]) -> list[str]:
    """Reads a command line into `flags.FLAGS`; exits with one line where it is no right one."""
    try:
        rest = flags.FLAGS(argv)
        if rest[1:]:
            raise flags.Error(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    except SystemExit:
        sys.exit(0)  # absl has printed the help that was asked for, and would exit with 1
    except flags.Error as error:
        _fail(f"{one_line(error)} (--help lists the flags)", UsageError.exit_code)
    return rest


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def guarded(command: Callable[[], int]) -> int:
    """The exit code of a command; what a user can do something about ends in one line."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # here, where it may fail
    except Interrupted as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        return stop.exit_code
    except CarouselError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted at once; the same command goes on from the last checkpoint", file=sys.stderr)
        return Interrupted.exit_code
    except BrokenPipeError:
        # Whoever read the output has left, such as `head`; what Python still holds of it would fail again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CarouselError.exit_code
    except OSError as error:
        if error.errno is None:
            raise
        place = error.filename or getattr(flags.FLAGS, "workdir", "output")  # a failed write does not say to which file
        print(f"error: {place}: {error.strerror}; free or choose another place (--workdir)", file=sys.stderr)
        return CarouselError.exit_code


class StopRequest:
    """Turns the first SIGTERM or SIGINT into a question that the trainer asks; a second SIGINT ends at once."""

    def __init__(self, announcement: str = "stopping: a checkpoint is written after the steps in flight"):
        self._asked, self._announcement = False, announcement
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._handle)

    def _handle(self, number, frame):
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._asked:
            print(f"\n{self._announcement}", file=sys.stderr)
        self._asked = True

    def __call__(self) -> bool:
        return self._asked


def without_flags(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """A command line's words without these flags and their values: what makes the same runs, wherever."""
    kept, skip = [], False
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        if skip:
            skip = False
        elif word.startswith("-") and name.removeprefix("no") in names and flags.FLAGS[name.removeprefix("no")].boolean:
            continue
        elif word.startswith("-") and name in names:
            skip = not equals
        else:
            kept.append(word)
    return kept


LAUNCHER = "CAROUSEL_LAUNCHER"
"""Variable with the number of the process that started this one and without which it is not wanted."""


def _end_with(parent: int) -> None:
    """Asks this process to stop, as SIGTERM does, when its parent is another: the launcher was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def end_with_launcher() -> None:
    """Has this process stop when its launcher, if it has one, is gone."""
    if LAUNCHER in os.environ:
        threading.Thread(target=_end_with, args=(int(os.environ[LAUNCHER]),), daemon=True).start()
