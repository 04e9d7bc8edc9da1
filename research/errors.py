"""What a user can do something about: one clear line (what, where, what to do) and an exit code, never a traceback."""


class CarouselError(Exception):
    """The environment is not as the run needs it: a missing or damaged file, a full disk, a folder in use."""

    exit_code = 1


class UsageError(CarouselError):
    """The request itself is wrong: an unknown value, a contradiction between flags."""

    exit_code = 2


class Interrupted(CarouselError):
    """SIGTERM or SIGINT arrived; the checkpoint is written and the same command continues the run.

    The code is EX_TEMPFAIL of sysexits.h, by which a scheduler can tell 'start me again' from a failure.
    """

    exit_code = 75


class Lost(CarouselError):
    """Another process of a run over several is gone; all have to be started again, and go on from the checkpoint."""

    exit_code = 76


def one_line(error: object) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
