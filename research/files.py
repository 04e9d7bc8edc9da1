"""Files that are whole or not there: atomic writes, JSON, and operating system errors in one line."""

import contextlib
import errno
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from research.errors import CarouselError

TEMPORARY = ".tmp-"

_NO_PERMISSION = "make it writable or choose another --workdir"
_CURES = {
    errno.ENOSPC: "free some space and start the same command again",
    errno.EDQUOT: "free some of your quota and start the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) and start the same command again",
    errno.EROFS: _NO_PERMISSION,
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.EEXIST: "a file is in the way: choose another --workdir",
    errno.ENOTDIR: "a file is in the way: choose another --workdir",
}


def io_error(path: str | Path, error: OSError, *, action: str = "write", note: str = "") -> CarouselError:
    """Returns the one line for an operating system error: what, where, the reason, `note`, what to do."""
    cure = _CURES.get(error.errno, "check the file system and start the same command again")
    note = f"{note}; " if note else ""
    return CarouselError(f"cannot {action} {path}: {error.strerror or error}; {note}{cure}")


def write_atomic(path: str | Path, *chunks: bytes | memoryview) -> None:
    """Writes `chunks` to `path` so that a kill or a power cut at any moment leaves the old file or the new one.

    Raises:
        OSError: as the system gave it, with the temporary file removed and the old file untouched.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")  # the same folder: rename is atomic only there
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())  # before the rename: else a power cut can leave the new name on an empty file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def append_durably(file: BinaryIO, data: bytes) -> int:
    """Appends `data` to a file opened with `"ab"` and `buffering=0`; returns its size, on the disk now.

    Raises:
        OSError: as the system gave it; the file is then as it was before.
    """
    before = os.fstat(file.fileno()).st_size
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), before)
        raise
    return before + len(data)


def write_output(path: str | Path, content: bytes) -> None:
    """Writes a table or a figure, in one move, into a folder made if need be.

    Raises:
        CarouselError: the file cannot be written.
    """
    try:
        make_folder(Path(path).parent)
        write_atomic(path, content)
    except OSError as error:
        raise io_error(path, error) from error


def sync_folder(folder: str | Path) -> None:
    """Makes renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no such operation on folders
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: str | Path) -> None:
    """Makes `folder` durably where it is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)


def sweep_temporaries(folder: str | Path) -> None:
    """Removes what killed writers left in `folder`. Only for the process that holds the run's lock."""
    for leftover in Path(folder).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):  # untidy, not wrong: no reader looks at these names
            leftover.unlink()


def json_ready(value: Any) -> Any:
    """Returns `value` with NumPy and JAX numbers and arrays as Python ones, and NaN and infinities as None.

    JSON has no NaN, and a diverged run still has a result: null there means 'not a finite number'.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Writes `obj` as JSON with sorted keys, so that equal objects give equal bytes.

    Raises:
        ValueError: `obj` holds NaN or an infinity (see `json_ready`).
        CarouselError: the file cannot be written.
    """
    text = json.dumps(obj, sort_keys=True, indent=1, allow_nan=False) + "\n"
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise io_error(path, error) from error


def read_json(
    path: str | Path, *, cure: str = "restore it from a copy, or delete the run's folder and run again"
) -> Any:
    """Returns the content of a JSON file; `cure` is what to do where it is damaged.

    Raises:
        CarouselError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise CarouselError(f"cannot read {path}: {error.strerror}; is this the folder of a run?") from error
    except ValueError as error:
        raise CarouselError(f"{path} is not valid JSON ({error}); {cure}") from error
