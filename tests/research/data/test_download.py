"""The downloader against a local host that resumes, breaks off, lies and attacks."""

import errno
import gzip
import hashlib
import http.server
import io
import os
import pathlib
import socket
import tarfile
import threading

import pytest

from research.data import cifar10, download, mnist
from research.data.download import Remote
from research.errors import CarouselError, UsageError

CONTENT = bytes(range(256)) * 700
PACKED = gzip.compress(CONTENT, mtime=0)


class Host(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> bytes); honours Range if `resumes`; breaks off once, after `breaks_after` bytes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.resumes, self.breaks_after, self.requests = {}, True, None, []

    def url(self, name):
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        host, wanted = self.server, self.headers.get("Range")
        host.requests.append((self.path[1:], wanted))
        content = host.files.get(self.path[1:])
        if content is None:
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and host.resumes else 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop, host.breaks_after = host.breaks_after, None
        self.wfile.write(content[start:] if stop is None else content[start:][:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Host() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def remote(*urls, content=CONTENT, **options):
    return {"toy": (Remote("toy/file", urls, hashlib.md5(content).hexdigest(), **options),)}


def fetch(folder, sources, name="toy"):
    lines = []
    download.download(name, str(folder), sources=sources, say=lines.append)
    return "\n".join(lines)


def test_fetches_verifies_and_does_not_fetch_again(tmp_path, host):
    host.files["a"] = CONTENT
    said = fetch(tmp_path / "new", remote(host.url("a")))
    assert (tmp_path / "new/toy/file").read_bytes() == CONTENT
    assert f"fetching {host.url('a')}" in said and "file: verified" in said
    assert "already here, verified" in fetch(tmp_path / "new", remote(host.url("a")))
    assert host.requests == [("a", None)]
    assert os.listdir(tmp_path / "new/toy") == ["file"]


def test_damaged_file_is_fetched_again(tmp_path, host):
    host.files["a"] = CONTENT
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/file").write_bytes(CONTENT[:-1] + b"x")
    assert "damaged, fetching it again" in fetch(tmp_path, remote(host.url("a")))
    assert (tmp_path / "toy/file").read_bytes() == CONTENT


def test_broken_connection_keeps_what_came_and_the_next_run_resumes(tmp_path, host):
    host.files["a"] = CONTENT
    host.breaks_after = 100_000
    with pytest.raises(CarouselError, match=r"cannot download file .*ended after 100,000 of 179,200 bytes.*goes on"):
        fetch(tmp_path, remote(host.url("a")))
    assert not (tmp_path / "toy/file").exists()
    assert (tmp_path / "toy/file.part").stat().st_size == 100_000
    assert "from byte 100,000 on" in fetch(tmp_path, remote(host.url("a")))
    assert (tmp_path / "toy/file").read_bytes() == CONTENT
    assert host.requests == [("a", None), ("a", "bytes=100000-")]


def test_second_mirror_goes_on_where_the_first_broke_off(tmp_path, host):
    host.files["a"] = host.files["b"] = CONTENT
    host.breaks_after = 5
    fetch(tmp_path, remote(host.url("missing"), host.url("a"), host.url("b")))
    assert host.requests == [("missing", None), ("a", None), ("b", "bytes=5-")]
    assert (tmp_path / "toy/file").read_bytes() == CONTENT


def part(folder, content):
    (folder / "toy").mkdir()
    (folder / "toy/file.part").write_bytes(content)


def test_host_that_ignores_range(tmp_path, host):
    host.files["a"], host.resumes = CONTENT, False
    part(tmp_path, CONTENT[:1000])
    fetch(tmp_path, remote(host.url("a")))
    assert (tmp_path / "toy/file").read_bytes() == CONTENT


def test_part_that_is_already_whole(tmp_path, host):
    host.files["a"] = CONTENT
    part(tmp_path, CONTENT)
    fetch(tmp_path, remote(host.url("a")))
    assert (tmp_path / "toy/file").read_bytes() == CONTENT
    assert host.requests == [("a", f"bytes={len(CONTENT)}-")]


@pytest.mark.parametrize("start", [b"of another file", CONTENT + b"too long"])
def test_part_of_another_file_is_dropped(tmp_path, host, start):
    host.files["a"] = CONTENT
    part(tmp_path, start)
    assert "checksum mismatch after resuming: starting over" in fetch(tmp_path, remote(host.url("a")))
    assert (tmp_path / "toy/file").read_bytes() == CONTENT


def test_wrong_checksum_never_gets_the_name(tmp_path, host):
    host.files["a"] = b"not found, but politely"
    with pytest.raises(CarouselError, match=r"/a: checksum mismatch"):
        fetch(tmp_path, remote(host.url("a")))
    assert os.listdir(tmp_path / "toy") == []


def test_wrong_checksum_then_a_good_mirror(tmp_path, host):
    host.files |= {"a": b"wrong", "b": CONTENT}
    fetch(tmp_path, remote(host.url("a"), host.url("b")))
    assert (tmp_path / "toy/file").read_bytes() == CONTENT


def test_checksum_of_uncompressed_content(tmp_path, host):
    host.files["a"] = PACKED
    fetch(tmp_path, remote(host.url("a"), gunzip=True))
    assert (tmp_path / "toy/file").read_bytes() == PACKED
    (tmp_path / "toy/file").write_bytes(gzip.compress(CONTENT, 1, mtime=7))
    assert "already here, verified" in fetch(tmp_path, remote(host.url("a"), gunzip=True))
    for damaged in (PACKED[:-20], b"plain", PACKED[:50] + b"\xff" + PACKED[51:]):
        (tmp_path / "toy/file").write_bytes(damaged)
        assert "damaged, fetching it again" in fetch(tmp_path, remote(host.url("a"), gunzip=True))
        assert (tmp_path / "toy/file").read_bytes() == PACKED


MEMBERS = {"box/one.bin": b"1" * 3000, "box/two.bin": b"2" * 5000}
SHA1 = {name: hashlib.sha1(content).hexdigest() for name, content in MEMBERS.items()}


def member(name, content=b"", kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(content)
    return info, content


def archive(*extra, members=MEMBERS):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info, content in [
            member("box", kind=tarfile.DIRTYPE),
            *(member(*pair) for pair in members.items()),
            *extra,
        ]:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def unpack(folder, content, **options):
    (folder / "data").mkdir()
    (folder / "box.tar.gz").write_bytes(content)
    download.unpack(folder / "box.tar.gz", folder / "data", SHA1, say=[].append, **options)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_archive_is_fetched_unpacked_and_then_known(tmp_path, host):
    host.files["a"] = archive(member("box/readme.html", b"hello"))
    sources = remote(host.url("a"), content=host.files["a"], members=SHA1)
    assert "one.bin: unpacked, verified" in fetch(tmp_path, sources)
    assert files_in(tmp_path) == ["box/one.bin", "box/two.bin", "toy/file"]
    assert {name: (tmp_path / name).read_bytes() for name in MEMBERS} == MEMBERS
    (tmp_path / "toy/file").unlink()
    assert "already unpacked" in fetch(tmp_path, sources)
    (tmp_path / "box/two.bin").write_bytes(b"2" * 4999 + b"3")
    fetch(tmp_path, sources)
    assert (tmp_path / "box/two.bin").read_bytes() == MEMBERS["box/two.bin"]
    assert len(host.requests) == 2
    (tmp_path / "box/two.bin").unlink()
    assert "file: already here, verified" in fetch(tmp_path, sources)
    assert len(host.requests) == 2 and (tmp_path / "box/two.bin").exists()


@pytest.mark.parametrize(
    "extra, message",
    [
        (member("../evil", b"x"), "'../evil' leads outside"),
        (member("box/../../evil", b"x"), "leads outside"),
        (member("/tmp/evil", b"x"), "leads outside"),
        (member("box/link", kind=tarfile.SYMTYPE, target="/etc"), "'box/link' is neither a file nor a folder"),
        (member("box/hard", kind=tarfile.LNKTYPE, target="box/one.bin"), "neither a file nor a folder"),
        (member("box/device", kind=tarfile.CHRTYPE), "neither a file nor a folder"),
        (member("box/pipe", kind=tarfile.FIFOTYPE), "neither a file nor a folder"),
        (member("./box/one.bin", b"other"), "comes twice"),
    ],
    ids=["parent", "inner parent", "absolute", "symlink", "hard link", "device", "pipe", "twice"],
)
def test_malicious_archive_writes_nothing(tmp_path, extra, message):
    with pytest.raises(CarouselError, match=f"box.tar.gz: unsafe archive: .*{message}"):
        unpack(tmp_path, archive(extra))
    assert files_in(tmp_path) == ["box.tar.gz"]


def test_symlink_in_place_of_a_wanted_file(tmp_path):
    content = archive(member("box/two.bin", kind=tarfile.SYMTYPE, target="/etc/passwd"), members={"box/one.bin": b"1"})
    with pytest.raises(CarouselError, match=r"'box/two.bin' is neither"):
        unpack(tmp_path, content)


def test_archive_too_large(tmp_path):
    with pytest.raises(CarouselError, match="more than 7,999 bytes"):
        unpack(tmp_path, archive(), size_limit=7_999)
    assert files_in(tmp_path) == ["box.tar.gz"]


def test_archive_without_a_file(tmp_path):
    with pytest.raises(CarouselError, match=r"box/two.bin not in the archive"):
        unpack(tmp_path, archive(members={"box/one.bin": b"1"}))


def test_archive_with_another_file_content(tmp_path):
    with pytest.raises(CarouselError, match=r"checksum mismatch in box/two.bin"):
        unpack(tmp_path, archive(members=MEMBERS | {"box/two.bin": b"x" * 5000}))
    assert files_in(tmp_path / "data") == ["box/one.bin"]


@pytest.mark.parametrize("damage", [lambda raw: raw[:100], lambda raw: b"no archive", lambda raw: b""])
def test_damaged_archive(tmp_path, damage):
    with pytest.raises(
        CarouselError, match=r"box.tar.gz: .*; delete the file and run the same command again"
    ) as caught:
        unpack(tmp_path, damage(archive()))
    assert "\n" not in str(caught.value)


def run(capsys, *argv, sources=download.SOURCES):
    code = download.main(argv, sources=sources)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_line_fetches(tmp_path, host, capsys):
    host.files["a"] = CONTENT
    code, out, err = run(capsys, "toy", f"--data_dir={tmp_path}", sources=remote(host.url("a")))
    assert (code, err) == (0, "")
    assert out.endswith(f"toy is ready: --data_dir={tmp_path}\n")


def test_digits_are_embedded(capsys):
    assert run(capsys, "digits") == (0, "digits is embedded in the package: nothing to download\n", "")


def test_unknown_name(capsys):
    code, out, err = run(capsys, "minst")
    assert (code, out, err) == (2, "", "error: unknown data set 'minst': one of digits, mnist, cifar10\n")
    with pytest.raises(UsageError):
        download.download("minst")


def test_no_network_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed_at_once:
        url = f"http://127.0.0.1:{closed_at_once.getsockname()[1]}/a"
    code, _, err = run(capsys, "toy", f"--data_dir={tmp_path}", sources=remote(url))
    assert code == 1
    assert err.startswith(f"error: cannot download file ({url}: ") and os.strerror(errno.ECONNREFUSED) in err
    assert err.count("\n") == 1


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_is_one_line(tmp_path, host, capsys):
    host.files["a"] = CONTENT
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/file.part").symlink_to("/dev/full")
    code, _, err = run(capsys, "toy", f"--data_dir={tmp_path}", sources=remote(host.url("a"), host.url("a")))
    assert (code, err) == (1, f"error: cannot download into {tmp_path}: No space left on device\n")
    assert len(host.requests) == 1  # another mirror would not help


def test_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "toy", f"--data_dir={tmp_path / 'file'}", sources=remote("http://127.0.0.1:9/a"))
    assert code == 1 and err.count("\n") == 1 and "Not a directory" in err


def test_sources_put_files_where_the_readers_look(tmp_path):
    paths = {name: [remote.path for remote in remotes] for name, remotes in download.SOURCES.items()}
    with pytest.raises(
        CarouselError, match=f"{pathlib.PurePath(paths['mnist'][0]).name} is missing in {tmp_path}/mnist:"
    ):
        mnist.load(str(tmp_path))
    unpacked = next(iter(download.SOURCES["cifar10"][0].members))
    with pytest.raises(CarouselError, match=f"is missing in {(tmp_path / unpacked).parent}:"):
        cifar10.load(str(tmp_path))
    for remotes in download.SOURCES.values():
        assert all(url.startswith("https://") for remote in remotes for url in remote.urls)
