"""What the readers of original files share: where the files lie, and what to say when one is missing or damaged."""

import hashlib
import pathlib
import shlex
from collections.abc import Iterable, Sequence

from research.errors import CarouselError

# Relative to the current directory, which is the repository root when experiments run; git ignores it there.
DEFAULT_DATA_DIR = "data"


def data_folder(data_dir: str | None) -> pathlib.Path:
    """The folder of the data sets: `data_dir` with `~` expanded, `data` in the current directory when None."""
    # The shell does not expand the ~ of --data_dir=~/data.
    return pathlib.Path(data_dir or DEFAULT_DATA_DIR).expanduser()


def download_command(name: str, folder: pathlib.Path) -> str:
    """The command line that puts data set `name` into `folder`."""
    return f"python -m research.data.download {name} --data_dir={shlex.quote(str(folder))}"


def fullest(candidates: Sequence[tuple[pathlib.Path, Iterable[str]]]) -> int:
    """Index of the `(folder, file names)` of which most files exist; the first one of equals.

    A half-filled folder thus never hides a complete one, and when nothing is there the message about the missing file
    names the first candidate, which is where the download goes.
    """
    counts = [sum((folder / name).is_file() for name in names) for folder, names in candidates]
    return counts.index(max(counts))


def read_file(path: pathlib.Path, command: str) -> bytes:
    """The bytes of a data file.

    Args:
      path: the file.
      command: the command line that gets it, for the message.

    Raises:
      CarouselError: the file is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CarouselError(f"{path.name} is missing in {path.parent}: get it with `{command}`") from None
    except OSError as error:
        raise CarouselError(f"cannot read {path}: {error.strerror or error}") from error


def damaged(path: pathlib.Path, reason: str, command: str) -> CarouselError:
    """The error for a file that is there but not as it should be."""
    return CarouselError(f"{path}: {reason}; delete the file and run `{command}`")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def md5(content: bytes) -> str:
    """For comparison with published checksums only: it finds accidents, not attacks."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
