"""Piano rolls: the published counts where the files are, and one line for a file that is not what it should be."""

import os
import pathlib

import numpy as np
import pytest
import scipy.io

from research.data import music
from research.errors import CarouselError

SHARED = pathlib.Path(os.environ.get("CAROUSEL_DATA", pathlib.Path(__file__).parents[4] / "shared/data"))
# Sequences and frames of train, validation and test, counted in the files of Bai et al. 2018.
COUNTS = {
    "jsb": ((229, 13_807), (76, 4_602), (77, 4_725)),
    "nottingham": ((694, 176_561), (173, 45_513), (170, 44_463)),
    "muse": ((524, 245_202), (135, 82_755), (124, 64_339)),
    "piano": ((87, 75_911), (12, 8_540), (25, 19_036)),
}


def cells(*sequences):
    array = np.empty((1, len(sequences)), object)
    for number, sequence in enumerate(sequences):
        array[0, number] = sequence
    return array


def rolls(*lengths, notes=music.NOTES, top=2):
    random = np.random.default_rng(sum(lengths))
    return cells(*(random.integers(0, top, (length, notes)).astype(np.uint8) for length in lengths))


def written(folder, **parts):
    content = {"traindata": rolls(5, 3), "validdata": rolls(2), "testdata": rolls(4)} | parts
    scipy.io.savemat(folder / "JSB_Chorales.mat", content)
    return content


@pytest.mark.parametrize("inner", [".", "polyphonic-music"])
def test_a_file_is_read_as_it_was_written(tmp_path, inner):
    (tmp_path / inner).mkdir(exist_ok=True)
    content = written(tmp_path / inner)
    found = music.load("jsb", str(tmp_path))
    for part, name in (("train", "traindata"), ("validation", "validdata"), ("test", "testdata")):
        for one, two in zip(getattr(found, part), content[name][0], strict=True):
            np.testing.assert_array_equal(one, two)
            assert one.dtype == np.uint8
    assert list(found.checksums) == ["JSB_Chorales.mat"]


def test_sequences_are_packed_the_longest_first():
    sequences = list(rolls(2, 5, 3, 2, 4)[0])
    packed = music.packed(sequences, 7)
    for row, members in enumerate(([1, 0], [4, 2], [3])):
        content = np.concatenate([sequences[member] for member in members])
        lengths = [len(sequences[member]) for member in members]
        np.testing.assert_array_equal(packed["rolls"][row, : sum(lengths)], content)
        assert not packed["rolls"][row, sum(lengths) :].any()
        assert packed["starts"][row].nonzero()[0].tolist() == [0, *np.cumsum(lengths)[:-1]]
        assert packed["valid"][row].tolist() == [time < sum(lengths) for time in range(7)]
    assert {name: (array.shape, str(array.dtype)) for name, array in packed.items()} == {
        "rolls": ((3, 7, 88), "uint8"),
        "starts": ((3, 7), "bool"),
        "valid": ((3, 7), "bool"),
    }
    with pytest.raises(CarouselError, match="a sequence of 5 frames does not fit a row of 4"):
        music.packed(sequences, 4)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"testdata": rolls(4, notes=87)}, r"test sequence 1 has shape \[4, 87\]: expected \[frames, 88\]"),
        ({"validdata": rolls(2, 1)}, "validation sequence 2 has 1 frames"),
        ({"traindata": rolls(9, top=3)}, "train sequence 1 has other values than 0 and 1"),
    ],
)
def test_what_is_no_piano_roll_is_one_line(tmp_path, parts, message):
    written(tmp_path, **parts)
    with pytest.raises(CarouselError, match=message) as caught:
        music.load("jsb", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_missing_a_truncated_and_another_file_are_one_line(tmp_path):
    with pytest.raises(CarouselError, match=r"JSB_Chorales.mat is missing") as missing:
        music.load("jsb", str(tmp_path))
    written(tmp_path)
    path = tmp_path / "JSB_Chorales.mat"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CarouselError, match=r"is not a readable .mat") as truncated:
        music.load("jsb", str(tmp_path))
    scipy.io.savemat(path, {"other": np.zeros(3)})
    with pytest.raises(CarouselError, match=r"is not a readable .mat of piano rolls.*'traindata'") as other:
        music.load("jsb", str(tmp_path))
    assert all("\n" not in str(caught.value) for caught in (missing, truncated, other))


@pytest.mark.parametrize("name", music.FILES)
def test_the_published_counts(name):
    if not (SHARED / "polyphonic-music").is_dir():
        pytest.skip("no music to read, set CAROUSEL_DATA")
    found = music.load(name, str(SHARED))
    parts = (found.train, found.validation, found.test)
    assert tuple((len(part), sum(map(len, part))) for part in parts) == COUNTS[name]
    rows = music.packed(found.train, max(map(len, found.train)))
    assert (rows["starts"].sum(), rows["valid"].sum()) == COUNTS[name][0]
    assert rows["valid"].mean() > 0.9  # in a row each it is 0.47 and less
