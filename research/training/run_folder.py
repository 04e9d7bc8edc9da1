"""A run folder: everything one run leaves behind, and the only thing that reports read.

    config.json        what was asked for; a folder never holds two different configurations
    environment.json   where it ran (research/training/environment.py)
    metrics.jsonl      one line per logged step, bitwise the same however often the run was killed
    checkpoints/       research/training/checkpoint.py
    result.json        written last and atomically: the mark of a finished run
    status.json        of a run that is not finished: how far it is (research/training/status.py)
    lock               held while a process writes here; its content names that process

Every file except metrics.jsonl appears under its name complete or not at all: it is written under a temporary name,
flushed to the disk and renamed. metrics.jsonl grows; a checkpoint records its size and SHA-256, and a resumed run cuts
it back to that first.

Formats. `FORMAT` counts the changes after which an unfinished run cannot be gone on with; environment.json holds the
number with which a run was begun. Such a run is refused with the commit that can finish it; a finished one can be read.

    1  what stands above; folders without a number, which are older than the numbers, are of this format too
"""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.errors import CarouselError, UsageError
from research.files import (
    append_durably,
    io_error,
    json_ready,
    make_folder,
    read_json,
    sweep_temporaries,
    sync_folder,
    write_json_atomic,
)

CONFIG, ENVIRONMENT, METRICS, RESULT = "config.json", "environment.json", "metrics.jsonl", "result.json"
CHECKPOINTS, LOCK = "checkpoints", "lock"
FORMAT = 1


def differing_fields(old: dict, new: dict, prefix: str = "") -> list[tuple[str, str, str]]:
    """Returns (dotted name, old value, new value) of every field that differs; 'absent' where it is missing."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            found += differing_fields(was, now, f"{prefix}{key}.")
        elif was != now or (key in old) != (key in new):
            shown = [json.dumps(side[key]) if key in side else "absent" for side in (old, new)]
            found.append((prefix + key, *shown))
    return found


# The metrics file


class Metrics:
    """The writer of metrics.jsonl: records wait in memory until `flush`, then are on the disk or nowhere.

    Records must not hold wall-clock times: a resumed run must write the same bytes again.

    Attributes:
        changed: called when the file has grown or was cut back, for what follows it; must not raise.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.changed: Callable[[], None] = lambda: None
        self._waiting: list[bytes] = []
        try:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
            sync_folder(self.path.parent)
            self._digest = hashlib.sha256(self.path.read_bytes())
        except OSError as error:
            raise io_error(self.path, error) from error

    def append(self, record: dict[str, Any]) -> None:
        """Adds one line: keys in the order given, floats by `repr` (their bits round-trip), non-finite ones as null."""
        self._waiting.append(json.dumps(json_ready(record), allow_nan=False).encode() + b"\n")

    def flush(self) -> int:
        """Puts every record on the disk; returns the size of the file in bytes, which checkpoints record.

        Raises:
            CarouselError: the file cannot be written; it is then as it was before, and the records still wait.
        """
        content = b"".join(self._waiting)
        try:
            size = append_durably(self._file, content)
        except OSError as error:
            raise io_error(self.path, error) from error
        self._digest.update(content)
        self._waiting.clear()
        self.changed()
        return size

    @property
    def sha256(self) -> str:
        """Of what `flush` put on the disk, all in all; checkpoints record it."""
        return self._digest.hexdigest()

    def truncate(self, size: int, sha256: str | None = None) -> bool:
        """Cuts the file back to what the checkpoint to resume from recorded: `size` bytes with that digest; 0 to start
        over, None for a checkpoint that recorded no digest.

        Returns False, and changes nothing, when the file does not begin so: records were lost or changed, and the run
        must go back to an older checkpoint (`checkpoint.latest(..., before=step)`) to write them again.
        """
        try:
            content = self.path.read_bytes()[:size]
            digest = hashlib.sha256(content)
            if len(content) < size or sha256 not in (None, digest.hexdigest()):
                return False
            os.ftruncate(self._file.fileno(), size)
        except OSError as error:
            raise io_error(self.path, error) from error
        self._waiting.clear()
        self._digest = digest
        self.changed()
        return True

    def close(self) -> None:
        """Closes the file; records that were not flushed are dropped, as a resumed run writes them again."""
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Returns the records of the run folder `path`; a last line that is still being written is left out.

    Raises:
        CarouselError: the file is missing, unreadable or a line of it is not JSON.
    """
    path = Path(path) / METRICS
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise CarouselError(f"cannot read {path}: {error.strerror}; is this the folder of a run?") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            cure = "delete result.json and start the same command again"
            raise CarouselError(f"{path} line {number} is not valid JSON ({error}); {cure}") from error
    return records


# The folder


@dataclass(frozen=True)
class RunFolder:
    """A run folder that this process may write, as `open_run` gives it."""

    path: Path
    metrics: Metrics

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def finish(self, result: dict[str, Any]) -> None:
        """Marks the run as finished: the metrics first, then result.json (non-finite numbers as null)."""
        self.metrics.flush()
        write_json_atomic(self.path / RESULT, json_ready(result))


@contextlib.contextmanager
def open_run(path: str | Path, config: dict[str, Any]) -> Iterator[RunFolder]:
    """Opens the run folder `path` for writing, makes it if need be, and keeps other processes out until the end.

    Args:
        path: The folder.
        config: What the run is asked to do, as JSON values; stored in a new folder, compared with an old one.

    Raises:
        UsageError: the folder belongs to another configuration, or `config` holds NaN or an infinity.
        CarouselError: another process writes to the folder, or it cannot be written.
    """
    path = Path(path)
    check_config(path, config)  # before anything is made; again under the lock, since another may have come first
    try:
        make_folder(path)
    except OSError as error:
        raise io_error(path, error, action="make the run folder") from error
    with locked(path):
        sweep_temporaries(path)
        check_config(path, config)
        if not (path / CONFIG).exists():
            write_json_atomic(path / CONFIG, config)
        metrics = Metrics(path / METRICS)
        try:
            yield RunFolder(path, metrics)
        finally:
            metrics.close()


def reserve(path: str | Path, config: dict[str, Any]) -> None:
    """Makes the run folder `path` of a run to come, with its config.json, where there is none; errors as `open_run`."""
    if not (Path(path) / CONFIG).exists():
        with open_run(path, config):
            pass


@contextlib.contextmanager
def locked(folder: str | Path, what: str = "run folder") -> Iterator[None]:
    """Keeps other processes out of `folder` until the end, or until this process dies in whatever way.

    Raises:
        CarouselError: another process holds it, or the lock cannot be written.
    """
    folder = Path(folder)
    # flock and not the mere existence of a file: the system frees it when the process dies, however it dies. The file
    # stays, since deleting it would let a third process lock a new one while the second still waits for the old.
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise io_error(folder / LOCK, error) from error
    try:
        _take_lock(descriptor, folder, what)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a forked child has the file open too
        os.close(descriptor)


def _take_lock(descriptor: int, folder: Path, what: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except BlockingIOError as error:
        owner = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
        cure = "wait for it or choose another --workdir"
        raise CarouselError(f"{what} {folder} is being written by {owner}; {cure}") from error
    except OSError as error:
        raise io_error(folder / LOCK, error, action="lock") from error


def check_config(folder: str | Path, config: dict[str, Any]) -> None:
    """Raises where the run folder holds something else than this configuration; writes nothing, needs no lock.

    Raises:
        UsageError: the folder belongs to another configuration, or `config` holds NaN or an infinity.
        CarouselError: it holds a run, but not of which configuration, or an unfinished one in another format.
    """
    folder = Path(folder)
    try:
        config = json.loads(json.dumps(config, allow_nan=False))  # as it will be read back: tuples are lists there
    except ValueError as error:
        raise UsageError(f"the configuration of {folder} cannot be stored: {error}; give finite numbers") from error
    cure = "choose another --workdir, or delete the folder"
    try:
        found = [name for name in (CONFIG, METRICS, CHECKPOINTS, RESULT) if (folder / name).exists()]
    except OSError as error:
        raise io_error(folder, error, action="read") from error
    if not found:
        return
    if CONFIG not in found:
        raise CarouselError(f"{folder} has {found[0]} but no {CONFIG}: {cure}")
    if CHECKPOINTS in found and RESULT not in found:
        _check_format(folder)
    fields = differing_fields(read_json(folder / CONFIG), config)
    if fields:
        shown = ", ".join(f"{name} is {old} there and {new} here" for name, old, new in fields)
        raise UsageError(f"run folder {folder} belongs to another configuration: {shown}; {cure}")


def _check_format(folder: Path) -> None:
    """Raises where an unfinished run was begun in another format than this code goes on with."""
    environment = read_environment(folder) or {}
    begun = environment.get("format", 1)
    if begun != FORMAT:
        source = environment.get("source") or {}
        commit = f"commit {source.get('commit') or 'unknown'}{' with changes' if source.get('dirty') else ''}"
        raise CarouselError(
            f"the unfinished run in {folder} was begun in format {begun} by {commit}, and this code goes on with "
            f"format {FORMAT}: check out that commit to finish it, or choose another --workdir"
        )


def read_environment(path: str | Path) -> dict[str, Any] | None:
    """Returns what environment.json of the run folder `path` holds; None where it is missing or damaged.

    No run is refused for that, since nothing is computed from it.
    """
    try:
        found = read_json(Path(path) / ENVIRONMENT)
    except CarouselError:
        return None
    return found if isinstance(found, dict) else None


def finished(path: str | Path) -> bool:
    """Whether the run folder `path` holds the result of a finished run."""
    return (Path(path) / RESULT).is_file()


def read_result(path: str | Path) -> dict[str, Any]:
    """Returns the result of the finished run in folder `path`.

    Raises:
        CarouselError: the run is not finished, or its result is unreadable.
    """
    if not finished(path):
        raise CarouselError(f"the run in {path} is not finished: start its command again to go on with it")
    cure = "delete it and start the same command again, which goes on from the last checkpoint"
    return read_json(Path(path) / RESULT, cure=cure)
