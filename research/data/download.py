"""Fetches data sets: `python -m research.data.download NAME [--data_dir=data]`.

MNIST comes from the mirrors that PyTorch and TensorFlow Datasets use, since the original host refuses downloads;
CIFAR-10 from its author. A file is written under a name ending in `.part`, goes on where an earlier download stopped
(HTTP Range), is verified, and only then gets its name. Nothing is unpickled and nothing written outside the data
folder. Exit code 0 when everything is there and verified, 1 when it could not be had, 2 for a wrong command line.
"""

import argparse
import dataclasses
import gzip
import hashlib
import http.client
import os
import pathlib
import sys
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from research.data import cifar10, files, mnist
from research.errors import CarouselError, Interrupted, UsageError, one_line

CHUNK = 1 << 20  # bytes
REPORT_EVERY = 16 << 20  # bytes; a line of progress each
TIMEOUT = 30  # seconds without a byte
# Bytes of any download and of any unpacked content; the largest legitimate one is CIFAR-10 unpacked, 184 MB.
SIZE_LIMIT = 256 << 20

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Remote:
    """A file to fetch.

    Attributes:
      path: its name below the data folder.
      urls: where it can be had, tried in order.
      md5: of the file, hexadecimal; of its uncompressed content if `gunzip`, since mirrors may compress anew.
      gunzip: see `md5`.
      members: if it is a tar archive to unpack: name below the data folder -> SHA-1.
    """

    path: str
    urls: tuple[str, ...]
    md5: str
    gunzip: bool = False
    members: Mapping[str, str] = dataclasses.field(default_factory=dict)


MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)

SOURCES: dict[str, tuple[Remote, ...]] = {
    "digits": (),
    "mnist": tuple(
        Remote(f"{mnist.NAME}/{name}.gz", tuple(f"{url}{name}.gz" for url in MNIST_MIRRORS), file.md5, gunzip=True)
        for name, file in mnist.FILES.items()
    ),
    "cifar10": (
        Remote(
            "cifar-10-binary.tar.gz",
            ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
            "c32a1d4ab5d03f1284b67883e8d87530",
            members={f"{cifar10.BINARY_FOLDER}/{name}": sha1 for name, sha1 in cifar10.BINARY_SHA1.items()},
        ),
    ),
}


def download(
    name: str,
    data_dir: str | None = None,
    *,
    sources: Mapping[str, Sequence[Remote]] = SOURCES,
    say: Say = print,
) -> None:
    """Makes sure that the files of a data set are in the data folder, fetching those that are not there and verified.

    Args:
      name: a key of `sources`.
      data_dir: the data folder; `data` in the current directory when None. Made if missing.
      sources: data set -> its files; none means that it comes with the package.
      say: receives one line at a time.

    Raises:
      UsageError: an unknown name.
      CarouselError: no source could be reached, a checksum is wrong or the folder cannot be written.
    """
    if name not in sources:
        raise UsageError(f"unknown data set {name!r}: one of {', '.join(sources)}")
    if not sources[name]:
        say(f"{name} is embedded in the package: nothing to download")
        return
    folder = files.data_folder(data_dir)
    try:
        for remote in sources[name]:
            _obtain(remote, folder, say)
    except OSError as error:
        raise CarouselError(f"cannot download into {error.filename or folder}: {error.strerror or error}") from error
    say(f"{name} is ready: --data_dir={folder}")


def _obtain(remote: Remote, folder: pathlib.Path, say: Say) -> None:
    if remote.members and all(_sha1(folder / member) == sha1 for member, sha1 in remote.members.items()):
        say(f"{remote.path}: already unpacked in {folder}, verified")
        return
    path = folder / remote.path
    if path.exists() and _md5(path, remote.gunzip) == remote.md5:
        say(f"{path}: already here, verified")
    else:
        if path.exists():
            say(f"{path}: damaged, fetching it again")
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(remote, path, say)
    if remote.members:
        unpack(path, folder, remote.members, say=say)
        say(f"{path}: no longer needed, may be deleted")


def _fetch(remote: Remote, path: pathlib.Path, say: Say) -> None:
    part = path.with_name(path.name + ".part")
    failures = []
    urls = list(remote.urls)
    while urls:
        url = urls.pop(0)
        resumed = part.exists()
        try:
            _transfer(url, part, say)
        except _Unreachable as error:
            failures.append(f"{url}: {error}")
            say(f"failed: {error}")
            continue
        if _md5(part, remote.gunzip) == remote.md5:
            os.replace(part, path)
            say(f"{path}: verified")
            return
        part.unlink()
        if resumed:  # the beginning may have been of another file: this source gets a clean try
            say("checksum mismatch after resuming: starting over")
            urls.insert(0, url)
        else:
            say("checksum mismatch")
            failures.append(f"{url}: checksum mismatch")
    raise CarouselError(
        f"cannot download {path.name} ({'; '.join(failures)}): check the network and run the same command again, it "
        "goes on where it stopped"
    )


class _Unreachable(Exception):
    """A source did not deliver: its fault or the network's, so that the next one is worth a try."""


def _transfer(url: str, part: pathlib.Path, say: Say) -> None:
    """Appends to `part` what it lacks of `url`, or writes it anew where the host does not resume."""
    have = part.stat().st_size if part.exists() else 0
    say(f"fetching {url}" + (f", from byte {have:,} on" if have else ""))
    request = urllib.request.Request(url, headers={"User-Agent": "carousel"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if have and error.code == 416:  # nothing lies beyond: complete or wrong, which the checksum tells
                return
            raise _Unreachable(f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Unreachable(one_line(getattr(error, "reason", error))) from error
    with response:
        if have and not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else None
        with open(part, "ab" if have else "wb") as file:
            for chunk in _chunks(response):
                before, have = have, have + len(chunk)
                if have > SIZE_LIMIT:
                    part.unlink()  # resuming it could never succeed
                    raise _Unreachable(f"more than {SIZE_LIMIT:,} bytes")
                file.write(chunk)
                if before // REPORT_EVERY != have // REPORT_EVERY:
                    say(f"  {have >> 20} MiB" + (f" of {total >> 20}" if total else ""))
            _sync(file)
    if total is not None and have < total:
        raise _Unreachable(f"the connection ended after {have:,} of {total:,} bytes")


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            # read1 and not read: what came before a connection breaks is kept.
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _Unreachable(one_line(error)) from error
        if not chunk:
            return
        yield chunk


def unpack(
    archive: pathlib.Path,
    folder: pathlib.Path,
    members: Mapping[str, str],
    *,
    size_limit: int = SIZE_LIMIT,
    say: Say = print,
) -> None:
    """Unpacks named regular files of a gzip-compressed tar archive; all names are looked at before anything is written.

    Args:
      archive: the archive.
      folder: where to unpack.
      members: name in the archive and below `folder` -> SHA-1 of the file. Other files are left in the archive.
      size_limit: bytes that the wanted files may have together.
      say: receives one line at a time.

    Raises:
      CarouselError: a member that is absolute, leads outside, is a link or a device, comes twice, is missing, too large
        or has another checksum; or a damaged archive. No file then has its final name with other content.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            found = _wanted_members(tar, members, size_limit)
            for name, sha1 in members.items():
                path = folder / name
                part = path.with_name(path.name + ".part")
                path.parent.mkdir(parents=True, exist_ok=True)
                digest = hashlib.sha1(usedforsecurity=False)
                with open(part, "wb") as file, tar.extractfile(found[name]) as source:
                    while chunk := source.read(CHUNK):
                        digest.update(chunk)
                        file.write(chunk)
                    _sync(file)
                if digest.hexdigest() != sha1:
                    part.unlink()
                    raise ValueError(f"checksum mismatch in {name}")
                os.replace(part, path)
                say(f"{path}: unpacked, verified")
    except (ValueError, tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CarouselError(f"{archive}: {one_line(error)}; delete the file and run the same command again") from error


def _wanted_members(tar: tarfile.TarFile, members: Mapping[str, str], size_limit: int) -> dict[str, tarfile.TarInfo]:
    found: dict[str, tarfile.TarInfo] = {}
    for info in tar:
        path = pathlib.PurePosixPath(info.name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"unsafe archive: {info.name!r} leads outside the folder")
        if not (info.isreg() or info.isdir()):
            raise ValueError(f"unsafe archive: {info.name!r} is neither a file nor a folder")
        if str(path) not in members or info.isdir():
            continue
        if str(path) in found:
            raise ValueError(f"unsafe archive: {info.name!r} comes twice")
        found[str(path)] = info
        if sum(member.size for member in found.values()) > size_limit:
            raise ValueError(f"unsafe archive: more than {size_limit:,} bytes")
    if missing := [name for name in members if name not in found]:
        raise ValueError(f"{', '.join(missing)} not in the archive")
    return found


def _md5(path: pathlib.Path, gunzip: bool) -> str | None:
    """The MD5 of a file or of what it expands to; None where it does not expand, or to more than `SIZE_LIMIT` bytes."""
    digest = hashlib.md5(usedforsecurity=False)
    size = 0
    try:
        with gzip.open(path) if gunzip else open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                if size > SIZE_LIMIT:
                    return None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return None
    return digest.hexdigest()


def _sha1(path: pathlib.Path) -> str | None:
    """The SHA-1 of a file, None where there is none."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.sha1(usedforsecurity=False)).hexdigest()
    except FileNotFoundError:
        return None


def _sync(file) -> None:
    """The data before the name: a rename must not outlive a crash that the content does not."""
    file.flush()
    os.fsync(file.fileno())


def main(argv: Sequence[str] | None = None, *, sources: Mapping[str, Sequence[Remote]] = SOURCES) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m research.data.download", description="Fetches a data set.")
    parser.add_argument("name", help=f"one of {', '.join(sources)}")
    parser.add_argument(
        "--data_dir", default=files.DEFAULT_DATA_DIR, help="the data folder, made if missing (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        download(arguments.name, arguments.data_dir, sources=sources, say=lambda line: print(line, flush=True))
    except CarouselError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return Interrupted.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
