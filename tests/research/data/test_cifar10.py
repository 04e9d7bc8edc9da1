"""Both versions of CIFAR-10 on files made here, pickles that attack, and the real images where present."""

import functools
import logging
import os
import pathlib
import pickle
import runpy
import struct

import numpy as np
import pytest

from research.data import cifar10
from research.errors import CarouselError

SHARED = pathlib.Path(os.environ.get("CAROUSEL_DATA", pathlib.Path(__file__).parents[4] / "shared/data"))
RECORD = 3073


@functools.cache
def records():
    """One batch of random pixels whose labels are 0, 1, ..., 9, 0, ..."""
    rows = np.random.default_rng(0).integers(0, 256, (10_000, RECORD), np.uint8)
    rows[:, 0] = np.arange(10_000) % 10
    return rows


def write_sparse(folder, names, size=10_000 * RECORD):
    """Files of zeros, which cost no disk: black images of class 0; the first byte of file i is the label i."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        with open(folder / name, "wb") as file:
            file.write(bytes([number]))
            file.truncate(size)


def python2_pickle(rows):
    """The opcodes that cPickle of Python 2 wrote: byte strings, and NumPy 1's module names."""
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R(K\1"
    array += b"M" + struct.pack("<H", len(rows)) + b"M" + struct.pack("<H", 3072) + b"\x86"
    array += b"cnumpy\ndtype\nU\2u1K\0K\1\x87R(K\3U\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89"
    pixels = rows[:, 1:].tobytes()
    array += b"T" + struct.pack("<i", len(pixels)) + pixels + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in rows[:, 0]) + b"e"
    return b"\x80\2}(U\13batch_labelU\1xU\4data" + array + b"U\6labels" + labels + b"u."


def as_dict(rows):
    return {"data": rows[:, 1:].copy(), "labels": rows[:, 0].tolist(), "filenames": [b"a.png"]}


def check_records(split):
    np.testing.assert_array_equal(split.labels, records()[:, 0])
    assert split.images.shape == (10_000, 32, 32, 3)
    # Written out by hand: the byte of image n, row y, column x, channel c.
    for n, y, x, c in ((0, 0, 0, 0), (17, 3, 30, 1), (9_999, 31, 31, 2), (5_000, 31, 0, 2)):
        assert split.images[n, y, x, c] == records()[n, 1 + 1024 * c + 32 * y + x]


def test_binary_batch():
    check_records(cifar10.parse_binary(records().tobytes()))


@pytest.mark.parametrize(
    "change, message", [(-1, "truncated: 30,729,999 bytes, expected 30,730,000"), (1, "^30,730,001")]
)
def test_binary_batch_of_another_length(change, message):
    with pytest.raises(ValueError, match=message):
        cifar10.parse_binary(bytes(30_730_000 + change))


def test_label_out_of_range():
    rows = records().copy()
    rows[4_321, 0] = 10
    with pytest.raises(ValueError, match="labels from 0 to 10, expected 0 to 9"):
        cifar10.parse_binary(rows.tobytes())
    with pytest.raises(ValueError, match="labels from -1 to 9"):
        cifar10.parse_python(pickle.dumps(as_dict(records()) | {"labels": [-1, *records()[1:, 0].tolist()]}))


def test_python2_batch():
    check_records(cifar10.parse_python(python2_pickle(records())))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_python3_batch(protocol):
    rows = records() if protocol > 2 else np.resize(records()[:1] & 127, (10_000, RECORD))
    rows = rows.copy()
    rows[:, 0] = records()[:, 0]
    split = cifar10.parse_python(pickle.dumps(as_dict(rows), protocol))
    np.testing.assert_array_equal(split.labels, rows[:, 0])
    np.testing.assert_array_equal(split.images[7, :, :, 1].ravel(), rows[7, 1025:2049])


class Call:
    """Pickles as a call of `function(*arguments)`, which is how pickles attack."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda marker: pickle.dumps(Call(os.system, f"touch {marker}")), "posix.system"),
        (
            lambda marker: pickle.dumps({"data": Call(eval, f"open({str(marker)!r}, 'w')")}, 0),
            "(__builtin__|builtins).eval",
        ),
        (lambda marker: f"cos\nsystem\n(Vtouch {marker}\ntR.".encode(), "os.system"),
        (lambda marker: b"\x80\4\x8c\5numpy\x8c\4load\x93.", "numpy.load"),
        (lambda marker: b"\x80\4\x8c\5numpy\x8c\x0endarray.tofile\x93.", "numpy.ndarray.tofile"),
        (lambda marker: b"cnumpy.core.multiarray\nfromfile\n.", "numpy.core.multiarray.fromfile"),
        (lambda marker: b"cbuiltins\ngetattr\n.", "builtins.getattr"),
    ],
    ids=["system", "eval", "os", "load", "attribute", "fromfile", "getattr"],
)
def test_malicious_pickle_does_not_run(tmp_path, make, named):
    marker = tmp_path / "marker"
    content = make(marker)
    with pytest.raises(ValueError, match=f"the pickle asks for {named}, .*refused"):
        cifar10.parse_python(content)
    assert not marker.exists()


def test_the_attack_of_the_test_above_works_where_nothing_stops_it(tmp_path):
    pickle.loads(pickle.dumps(Call(os.system, f"touch {tmp_path / 'marker'}")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a readable pickle .EOFError"),
        (b"garbage", "not a readable pickle"),
        (b"c_codecs\nencode\n(Vabc\nVhex\ntR.", "unexpected encoding 'hex'"),
        (pickle.dumps([1, 2]), "holds a list, expected a dict"),
        (pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "labels": [0] * 3}, 4), "'data' is not a uint8 array"),
        (pickle.dumps({"data": b"bytes", "labels": [0]}), "'data' is not a uint8 array"),
    ],
)
def test_other_pickles(content, message):
    with pytest.raises(ValueError, match=message):
        cifar10.parse_python(content)


@pytest.mark.parametrize("labels", [None, [0] * 9_999, [0.0] * 10_000, ["0"] * 10_000, [True] * 10_000])
def test_pickles_with_other_labels(labels):
    with pytest.raises(ValueError, match="'labels' is not a list of 10,000 integers"):
        cifar10.parse_python(pickle.dumps({"data": np.zeros((10_000, 3072), np.uint8), "labels": labels}, 4))


@pytest.mark.parametrize("cut", [0.0001, 0.5, 0.9999])
def test_truncated_pickle(cut):
    content = python2_pickle(records())
    with pytest.raises(ValueError, match="not a readable pickle"):
        cifar10.parse_python(content[: int(len(content) * cut)])


def test_load_binary(tmp_path, caplog):
    folder = tmp_path / "cifar-10-batches-bin"
    write_sparse(folder, cifar10.BINARY_SHA1)
    with caplog.at_level(logging.WARNING):
        dataset = cifar10.load(str(tmp_path))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (45_000, 5_000, 10_000)
    assert dataset.image_shape == (32, 32, 3)
    # The labels that mark each file's first image: five files for training, in their order, and one for the test.
    marks = np.concatenate([dataset.train.labels, dataset.validation.labels])
    assert sorted(marks[marks > 0]) == [1, 2, 3, 4]
    assert dataset.test.labels[0] == 5
    assert list(dataset.checksums) == list(cifar10.BINARY_SHA1)
    # One line for six files that differ.
    assert len(caplog.records) == 1
    assert "data_batch_1.bin, data_batch_2.bin" in caplog.text and "differ from the official CIFAR-10" in caplog.text


def test_load_python_beside_an_incomplete_binary_version(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    zeros = {"data": np.zeros((10_000, 3072), np.uint8), "labels": [3] * 10_000}
    (tmp_path / "batch").write_bytes(pickle.dumps(zeros, 4))
    for name in cifar10.PYTHON_MD5:
        (folder / name).symlink_to(tmp_path / "batch")
    write_sparse(tmp_path / "cifar-10-batches-bin", ["data_batch_1.bin"])
    dataset = cifar10.load(str(tmp_path))
    assert set(dataset.test.labels) == {3}
    assert list(dataset.checksums) == list(cifar10.PYTHON_MD5)


def test_missing_and_damaged_files_say_what_to_do(tmp_path):
    command = f"`python -m research.data.download cifar10 --data_dir={tmp_path}`"
    folder = tmp_path / "cifar-10-batches-bin"
    with pytest.raises(CarouselError) as caught:
        cifar10.load(str(tmp_path))
    assert str(caught.value) == f"data_batch_1.bin is missing in {folder}: get it with {command}"
    write_sparse(folder, cifar10.BINARY_SHA1, size=999)
    with pytest.raises(CarouselError) as caught:
        cifar10.load(str(tmp_path))
    assert str(caught.value) == (
        f"{folder}/data_batch_1.bin: truncated: 999 bytes, expected 30,730,000; delete the file and run {command}"
    )
    # The folder itself is found too.
    with pytest.raises(CarouselError, match=f"^{folder}/data_batch_1.bin: truncated.*--data_dir={folder}`$"):
        cifar10.load(str(folder))


def test_malicious_file_names_itself(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Call(os.system, f"touch {tmp_path / 'marker'}")))
    with pytest.raises(CarouselError, match=r"data_batch_1: the pickle asks for posix.system"):
        cifar10.load(str(tmp_path))
    assert not (tmp_path / "marker").exists()


@pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason=f"no real CIFAR-10 in {SHARED}: set CAROUSEL_DATA")
def test_real_images(tmp_path, caplog):
    pytest.importorskip("PIL", reason="the packed CIFAR-10 needs Pillow")
    runpy.run_path(str(SHARED / "cifar10/unpack.py"))["main"](tmp_path)
    with caplog.at_level(logging.WARNING):
        dataset = cifar10.load(str(tmp_path))
    # Balanced by construction of the data set.
    assert np.bincount(dataset.test.labels).tolist() == [1_000] * 10
    train, validation = (np.bincount(split.labels) for split in (dataset.train, dataset.validation))
    assert (train + validation).tolist() == [5_000] * 10
    assert validation.min() > 400
    # The channel means that everyone's normalisation constants (0.4914, 0.4822, 0.4465) come from.
    total = dataset.train.images.sum((0, 1, 2), dtype=np.int64) + dataset.validation.images.sum(
        (0, 1, 2), dtype=np.int64
    )
    np.testing.assert_allclose(total / (50_000 * 1024 * 255), [0.4914, 0.4822, 0.4465], atol=1e-4)
    # test_batch begins with a cat, two ships and an aeroplane.
    assert [dataset.class_names[label] for label in dataset.test.labels[:4]] == ["cat", "ship", "ship", "airplane"]
    assert len(caplog.records) == 1
