"""Checkpoints of a run that one process can hold: one safetensors file each, covered to the last bit by a SHA-256.

The file is plain safetensors (any tool opens it). Its metadata holds `step`, `carousel` (the caller's metadata as JSON)
and `sha256`. The digest is taken over the whole file with 64 zeros in its own place, so lengths, names, shapes,
metadata, padding and data are all covered. It always stands at the same offset: `safetensors` writes metadata in random
order, so we write the header again with the digest first and the rest sorted. Equal states give equal files that way,
and reading needs no search through bytes that may be damaged.

Saving never touches an older file before the new one is durable, so a process killed at any moment leaves the old
state or the new one. `latest` takes the newest file whose digest matches.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from research.errors import CarouselError
from research.files import io_error, make_folder, sweep_temporaries, sync_folder, write_atomic

BEST = "best.safetensors"

_NAME = re.compile(r"step_(\d{8,})\.safetensors")
_LENGTH = 8  # bytes that hold the length of the header, little-endian
_PREFIX = b'{"__metadata__":{"sha256":"'
_PLACEHOLDER = b"0" * 64
_DIGEST = slice(_LENGTH + len(_PREFIX), _LENGTH + len(_PREFIX) + len(_PLACEHOLDER))

# What a state is made of. safetensors.numpy writes all of these but reads no bfloat16.
_DTYPES = {
    "BOOL": np.dtype(bool),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


class DamagedCheckpoint(CarouselError):
    """The bytes of a checkpoint are not those that were written under its name."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"checkpoint {path} is damaged ({reason}): restore it from a copy, or delete it")
        self.reason = reason


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds: `arrays` are writable and own their memory."""

    step: int
    arrays: dict[str, np.ndarray]
    metadata: Any
    path: Path


def save(directory: str | Path, step: int, arrays: Mapping[str, np.ndarray], metadata: Any, keep: int = 2) -> Path:
    """Writes the checkpoint of `step`, then deletes all but the newest `keep` up to that step.

    Files of later steps stay: they are there only when the run was taken back behind them, which will reach them again.

    Args:
        directory: Where checkpoints are; made if need be.
        step: Steps done, not negative.
        arrays: The state by name.
        metadata: Anything that JSON holds.
        keep: How many checkpoints stay, this one included.

    Returns:
        The path of the file.

    Raises:
        CarouselError: the file cannot be written; the checkpoints that were there are intact.
        TypeError: an array has a dtype that is not stored.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step must be 0 or more and keep 1 or more, got {step} and {keep}")
    path = Path(directory) / f"step_{step:08d}.safetensors"
    _write(path, step, arrays, metadata)
    for _, old in [item for item in _steps(path.parent) if item[0] <= step][:-keep]:
        with contextlib.suppress(OSError):  # an old file too many does no harm; the next save tries again
            old.unlink()
    return path


def save_best(directory: str | Path, step: int, arrays: Mapping[str, np.ndarray], metadata: Any) -> Path:
    """Writes best.safetensors in place of the one before; arguments and errors as for `save`."""
    path = Path(directory) / BEST
    _write(path, step, arrays, metadata)
    return path


def load(path: str | Path) -> Checkpoint:
    """Reads a checkpoint and verifies every byte of it.

    Raises:
        DamagedCheckpoint: the content is not what was written, or was written for another step than the name says.
        CarouselError: the file cannot be read.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        cure = "check the path and the file system"
        raise CarouselError(f"cannot read checkpoint {path}: {error.strerror}; {cure}") from error
    if len(data) < _DIGEST.stop or data[_LENGTH : _DIGEST.start] != _PREFIX:
        raise DamagedCheckpoint(path, "no SHA-256 where one belongs")
    if _digest(data) != data[_DIGEST]:
        raise DamagedCheckpoint(path, "its SHA-256 does not match its content")
    strings = _header(data)["__metadata__"]
    step = int(strings["step"])
    name = _NAME.fullmatch(path.name)
    if name and int(name[1]) != step:
        raise DamagedCheckpoint(path, f"it holds step {step}")
    arrays = {
        name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in sorted(safetensors.deserialize(data), key=lambda item: item[0])
    }
    return Checkpoint(step, arrays, json.loads(strings["carousel"]), path)


def latest(directory: str | Path, log: Callable[[str], None] = print, before: int | None = None) -> Checkpoint | None:
    """Returns the newest valid checkpoint, or None where there is none. Only for the process that holds the run's lock.

    What killed writers left is removed. A damaged file is renamed to `*.corrupt`, never deleted, and one line given to
    `log` says so and what is used instead.

    Args:
        directory: Where checkpoints are; it need not exist.
        log: Takes the line about damaged files.
        before: Look only at checkpoints of earlier steps than this one.

    Raises:
        CarouselError: a file cannot be read at all, which may pass: it is left as it is.
    """
    directory = Path(directory)
    try:
        if not directory.is_dir():
            return None
        sweep_temporaries(directory)
        candidates = _steps(directory)
    except OSError as error:
        raise io_error(directory, error, action="read") from error
    found, damaged = None, []
    for step, path in reversed(candidates):
        if before is not None and step >= before:
            continue
        try:
            found = load(path)
            break
        except DamagedCheckpoint as error:
            damaged.append(f"{path} ({error.reason}; {_set_aside(path)})")
    if damaged:
        instead = "the run starts from the beginning" if found is None else f"the run goes on from step {found.step}"
        log(f"damaged checkpoint {', '.join(damaged)}: {instead}")
    return found


def _steps(directory: Path) -> list[tuple[int, Path]]:
    matches = ((_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _set_aside(path: Path) -> str:
    aside, count = path.with_name(f"{path.name}.corrupt"), 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}.{count}.corrupt")
    try:
        path.rename(aside)
        sync_folder(path.parent)
    except OSError as error:
        return f"it could not be renamed: {error.strerror}"
    return f"renamed to {aside.name}"


def _write(path: Path, step: int, arrays: Mapping[str, np.ndarray], metadata: Any) -> None:
    head, body = _encode(step, arrays, metadata)
    try:
        make_folder(path.parent)
        write_atomic(path, head, body)
    except OSError as error:
        older = _newest_valid_step(path.parent)
        intact = "there is no older checkpoint" if older is None else f"the checkpoint of step {older} is intact"
        raise io_error(path, error, note=intact) from error


def _newest_valid_step(directory: Path) -> int | None:
    with contextlib.suppress(OSError):
        for step, path in reversed(_steps(directory)):
            with contextlib.suppress(CarouselError):
                load(path)
                return step
    return None


def _encode(step: int, arrays: Mapping[str, np.ndarray], metadata: Any) -> tuple[bytes, memoryview]:
    data = safetensors.numpy.save({name: _plain(name, array) for name, array in arrays.items()})
    tensors = _header(data)
    strings = {"sha256": _PLACEHOLDER.decode(), "carousel": json.dumps(metadata), "step": str(step)}
    header = json.dumps({"__metadata__": strings, **tensors}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data stay aligned
    head = len(header).to_bytes(_LENGTH, "little") + header
    body = memoryview(data)[_LENGTH + int.from_bytes(data[:_LENGTH], "little") :]
    return head[: _DIGEST.start] + _digest(head, body) + head[_DIGEST.stop :], body


def _plain(name: str, array: np.ndarray) -> np.ndarray:
    # safetensors takes the memory as it lies, so a transposed array would come back wrong without a word.
    array = np.asarray(array, order="C")
    if name == "__metadata__" or array.dtype.newbyteorder("=") not in _DTYPES.values():
        raise TypeError(f"array {name!r} of dtype {array.dtype} cannot be stored in a safetensors file")
    return array


def _header(data: bytes) -> dict[str, Any]:
    return json.loads(data[_LENGTH : _LENGTH + int.from_bytes(data[:_LENGTH], "little")])


def _digest(*chunks: bytes | memoryview) -> bytes:
    first = memoryview(chunks[0])
    digest = hashlib.sha256(first[: _DIGEST.start])
    for chunk in (_PLACEHOLDER, first[_DIGEST.stop :], *chunks[1:]):
        digest.update(chunk)
    return digest.hexdigest().encode()
