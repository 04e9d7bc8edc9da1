"""How far a run is, told by its folder alone: `status.json`, kept by the process that trains.

    {"state": "running" | "stopped" | "failed", "step", "steps", "seconds_left", "message", "host", "pid", "started"}

It is there to be looked at while a run is not finished; nothing depends on it, `result.json` takes its place, and that
it cannot be written stops no run. The process touches it every few seconds, whatever it is doing, so that from another
machine a process that is gone can be told from one that compiles for minutes.
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from research.errors import CarouselError, Interrupted
from research.files import TEMPORARY, json_ready
from research.training import run_folder

STATUS = "status.json"
_WRITE_EVERY = 1.0
_TOUCH_EVERY = 10.0
# Seconds without a touch after which a process on another machine is taken for gone; several, since clocks differ.
_SILENT = 120.0


class Keeper:
    """Writes the status of one run; `progress` is called as often as one likes."""

    def __init__(self, folder: Path):
        self._path = folder / STATUS
        self._told: dict[str, Any] = {"step": None, "steps": None, "seconds_left": None, "message": None}
        self._last = -float("inf")

    def progress(self, step: int, steps: int, seconds_left: float | None, message: str = "") -> None:
        """The run has taken `step` of `steps` steps, and needs about `seconds_left` more."""
        self._told |= {"step": step, "steps": steps, "seconds_left": seconds_left, "message": message}
        if time.monotonic() - self._last >= _WRITE_EVERY:
            self.write("running")

    def write(self, state: str, **told: Any) -> None:
        self._last = time.monotonic()
        self._told |= told
        process = {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_of(os.getpid())}
        temporary = self._path.with_name(f"{TEMPORARY}{os.getpid()}-{STATUS}")
        # Not flushed to the disk: after a power cut it is worth nothing anyway.
        try:
            temporary.write_text(json.dumps(json_ready({"state": state, **self._told, **process})))
            os.replace(temporary, self._path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()  # on a full disk it would take what is left

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()

    def touch(self) -> None:
        with contextlib.suppress(OSError):
            os.utime(self._path)


@contextlib.contextmanager
def kept(folder: str | Path) -> Iterator[Keeper]:
    """Keeps the status of the run in `folder`, which exists and is locked, while the body runs.

    A body that ends leaves no status, one that raises `Interrupted` leaves `stopped`, any other exception `failed`.
    """
    keeper, done = Keeper(Path(folder)), threading.Event()

    def touch():
        while not done.wait(_TOUCH_EVERY):
            keeper.touch()

    keeper.write("running")
    thread = threading.Thread(target=touch, name="status", daemon=True)
    thread.start()
    try:
        yield keeper
    except (Interrupted, KeyboardInterrupt):
        keeper.write("stopped", seconds_left=None, message="interrupted")
        raise
    except BaseException as error:
        lines = str(error).splitlines() if isinstance(error, CarouselError) else [f"{type(error).__name__}: {error}"]
        keeper.write("failed", seconds_left=None, message=" ".join(" ".join(lines).split())[:500])
        raise
    else:
        keeper.remove()
    finally:
        done.set()
        thread.join()


@dataclasses.dataclass(frozen=True)
class Status:
    """What a run folder says.

    Attributes:
      name: of the folder.
      state: `pending` (not begun), `running`, `stopped` (begun, and no process is at it: interrupted or killed),
        `failed` (ended with an error), `diverged` (finished, with a failure for a result) or `done`.
      step: optimiser steps taken, as far as it is known.
      steps: of how many.
      seconds_left: of a running one, about how long it still needs.
      message: the loss, or why it failed.
    """

    name: str
    state: str
    step: int | None = None
    steps: int | None = None
    seconds_left: float | None = None
    message: str = ""

    @property
    def finished(self) -> bool:
        return self.state in ("done", "diverged")


def read(folder: str | Path) -> Status:
    """The status of the run in `folder`, which a process may be writing to.

    Raises:
      CarouselError: it is not the folder of a run, or its result is unreadable.
    """
    folder = Path(folder)
    if run_folder.finished(folder):
        result = run_folder.read_result(folder)
        steps, failure = result.get("steps"), result.get("failure")
        if failure:
            return Status(folder.name, "diverged", result.get("failed_at_step"), None, message=str(failure))
        return Status(folder.name, "done", steps, steps)
    if not (folder / run_folder.CONFIG).exists():
        raise CarouselError(f"{folder} has no {run_folder.CONFIG}: give the --workdir of an experiment")
    try:
        told = json.loads((folder / STATUS).read_bytes())
        age = time.time() - (folder / STATUS).stat().st_mtime
    except (OSError, ValueError):
        begun = any((folder / run_folder.CHECKPOINTS).glob("step_*"))
        return Status(folder.name, "stopped" if begun else "pending")
    state, message = told["state"], told["message"] or ""
    if state == "running" and not _alive(told, age):
        state, message = "stopped", "its process has ended without a word (killed?)"
    left = told["seconds_left"] if state == "running" else None
    return Status(folder.name, state, told["step"], told["steps"], left, message)


def read_all(workdir: str | Path) -> list[Status]:
    """The status of every run of a working folder, by name.

    Raises:
      CarouselError: there is none.
    """
    runs = Path(workdir) / "runs"
    folders = sorted((path.parent for path in runs.glob(f"*/{run_folder.CONFIG}")), key=_natural)
    if not folders:
        raise CarouselError(f"{runs} has no run folders: give the --workdir of an experiment that was started")
    return [read(folder) for folder in folders]


def _natural(path: Path) -> list[Any]:
    """Sorts depth-8 before depth-20."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _alive(told: dict[str, Any], age: float) -> bool:
    if told["host"] != socket.gethostname():
        return age < _SILENT
    try:
        os.kill(told["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user
    # The number may belong to a later process by now.
    return _start_of(told["pid"]) == told["started"]


def _start_of(pid: int) -> str | None:
    """When a process was started, in clock ticks since boot; None where the system does not tell so."""
    try:
        # The name of the program, in parentheses, may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
