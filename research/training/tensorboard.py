"""TensorBoard's event files beside metrics.jsonl, made of tensorboardX's protocol buffers; no TensorFlow.

metrics.jsonl on the disk is the truth, and the events are a copy of it: they are written after it, from it. A run that
goes on, whose metrics were cut back to the checkpoint, begins one new event file with all that is left and removes the
old one. So no step stands there twice, and a run that began without events gets all of them. The price: after that the
wall time of an event is when it was copied.

Tags are the names in metrics.jsonl; of several seeds `loss/seed0`, .... Values are float32, NaN where metrics.jsonl has
null; `config` is a text.
"""

import json
import math
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from research.errors import CarouselError
from research.files import append_durably, io_error, make_folder, read_json
from research.training.run_folder import CONFIG, METRICS

FOLDER = "tensorboard"
_FILES = "events.out.tfevents."  # TensorBoard finds files by this name


def check() -> None:
    """Raises CarouselError where tensorboardX is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        cure = "CAROUSEL_EXTRAS=test,dev,tensorboard launch/run install"
        raise CarouselError(f"--tensorboard needs the package tensorboardX ({error}): {cure}") from error


class Mirror:
    """Copies metrics.jsonl of a run into its event file whenever it is called; only for the process that writes both.

    What cannot be written is told once and tried again at the next call: the training is worth more than the copy.

    Args:
      folder: the run folder.
      log: takes the line about a failure.
    """

    def __init__(self, folder: Path, log: Callable[[str], None]):
        self._run, self._folder, self._log = folder, folder / FOLDER, log
        self._file: Path | None = None
        self._read = 0  # bytes of metrics.jsonl that are in the file
        self._told = False

    def __call__(self) -> None:
        try:
            self._follow()
        except (OSError, CarouselError) as error:
            if not self._told:
                line = io_error(self._folder, error) if isinstance(error, OSError) else error
                self._log(f"warning: {line}; the training goes on, and so do its own files")
            self._told = True

    def _follow(self) -> None:
        path = self._run / METRICS
        size = path.stat().st_size
        if self._file is None or size < self._read:
            self._file, self._read = None, 0
            for old in self._folder.glob(f"{_FILES}*"):
                old.unlink(missing_ok=True)
            if size == 0:
                return
            self._begin()
        with open(path, "rb") as file:
            file.seek(self._read)
            lines = file.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        events = [event for line in whole for event in self._events(json.loads(line))]
        if events:
            _append(self._file, events)
        self._read += sum(map(len, whole))

    def _begin(self) -> None:
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        make_folder(self._folder)
        config = read_json(self._run / CONFIG)
        seed = config.get("seed")
        self._seeds = seed if isinstance(seed, list) else None
        table = ["| name | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in sorted(config.items()))]
        now = time.time()
        first = [
            Event(wall_time=now, file_version="brain.Event:2"),
            # A TensorBoard that shows the removed file forgets what it read there.
            Event(wall_time=now, session_log=SessionLog(status=SessionLog.START)),
            Event(wall_time=now, summary=summary.text("config", "\n".join(table))),
        ]
        path = self._folder / f"{_FILES}{time.time_ns()}.{socket.gethostname()}"
        _append(path, first)
        self._file = path

    def _events(self, record: dict[str, Any]) -> Iterator[Any]:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in self._scalars(record)]
        yield Event(wall_time=time.time(), step=record["step"], summary=Summary(value=scalars))

    def _scalars(self, record: dict[str, Any]) -> Iterator[tuple[str, float]]:
        for name, value in record.items():
            if name == "step":
                continue
            if isinstance(value, list):
                seeds = self._seeds if self._seeds and len(self._seeds) == len(value) else range(len(value))
                yield from ((f"{name}/seed{seed}", _number(each)) for seed, each in zip(seeds, value, strict=True))
            else:
                yield name, _number(value)


def complete(folder: Path, log: Callable[[str], None]) -> None:
    """Makes the event file of a finished run that was trained without."""
    if not any((folder / FOLDER).glob(f"{_FILES}*")):
        Mirror(folder, log)()


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _append(path: Path, events: list[Any]) -> None:
    with open(path, "ab", buffering=0) as file:
        append_durably(file, b"".join(map(_record, events)))


def _record(event: Any) -> bytes:
    """An event as a TFRecord: length, its checksum, content, its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
    return length + checksums[0] + content + checksums[1]
