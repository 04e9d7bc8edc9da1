"""Text as tokens: the layouts that are read, every token counted once, and one line for a file that cannot be used."""

import os
import pathlib

import numpy as np
import pytest

from research.data import text
from research.errors import CarouselError, UsageError

SHARED = pathlib.Path(os.environ.get("CAROUSEL_DATA", pathlib.Path(__file__).parents[4] / "shared/data"))


@pytest.fixture
def folder(tmp_path):
    """A tiny Penn Treebank."""
    for part, content in {
        "train": " the cat sat \n the <unk> ran \n",
        "valid": " the dog sat \n",
        "test": " the cat \n",
    }.items():
        (tmp_path / f"tiny.{part}.txt").write_text(content)
    return tmp_path


def one_line(error):
    return "\n" not in str(error.value)


def test_words_of_a_folder(folder):
    corpus = text.load(folder)
    assert corpus.vocabulary[:2] == ("<eos>", "the") and set(corpus.vocabulary[2:]) == {"cat", "sat", "<unk>", "ran"}
    words = [corpus.vocabulary[token] for token in corpus.train]
    assert words == ["the", "cat", "sat", "<eos>", "the", "<unk>", "ran", "<eos>"]
    assert [corpus.vocabulary[token] for token in corpus.validation] == ["the", "<unk>", "sat", "<eos>"]  # dog
    assert corpus.train.dtype == np.int32
    assert text.written_out(corpus.test, corpus.vocabulary, characters=False) == "the cat\n"
    assert set(corpus.checksums) == {"tiny.train.txt", "tiny.valid.txt", "tiny.test.txt"}


def test_characters_of_one_file(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text("ab\nc" * 50)
    corpus = text.load(path, characters=True)
    assert corpus.vocabulary == ("\n", "a", "b", "c")
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [180, 10, 10]
    whole = np.concatenate([corpus.train, corpus.validation, corpus.test])
    assert text.written_out(whole, corpus.vocabulary, characters=True) == path.read_text()


@pytest.mark.parametrize("end", ["\n", " "])
def test_one_file_of_words_is_not_cut_within_a_word(tmp_path, end):
    """The halves would be words that training does not have."""
    path = tmp_path / "play.txt"
    for lines in range(20, 30):
        path.write_text(f"romeo juliet{end}" * lines)
        corpus = text.load(path)
        assert set(corpus.vocabulary) == {"romeo", "juliet", "<eos>"}
        whole = [corpus.vocabulary[n] for part in (corpus.train, corpus.validation, corpus.test) for n in part]
        assert [word for word in whole if word != "<eos>"] == path.read_text().split()
        assert 0 <= whole.count("<eos>") - len(path.read_text().splitlines()) <= 2  # a line may be cut


def test_text_to_numbers_and_back():
    words, characters = ("<eos>", "cat", "the", "<unk>"), ("\n", " ", "c", "t")

    def there_and_back(written, vocabulary):
        options = {"characters": vocabulary is characters}
        numbers = text.numbered(written, vocabulary, **options, name="it")
        assert numbers.dtype == np.int32
        return numbers.tolist(), text.written_out(numbers, vocabulary, **options)

    # A line ends where that is written, and not behind the last word.
    for written, numbers in {
        "the": [2],
        "the cat\ncat": [2, 1, 0, 1],
        "\n": [0],
        "\nthe\n\n\ncat\n": [0, 2, 0, 0, 0, 1, 0],
    }.items():
        assert there_and_back(written, words) == (numbers, written)
    assert there_and_back("  the\t cat \n the dog", words) == ([2, 1, 0, 2, 3], "the cat\nthe <unk>")
    for written, numbers in {"tc": [3, 2], " t\n\n c\n": [1, 3, 0, 0, 1, 2, 0]}.items():
        assert there_and_back(written, characters) == (numbers, written)


@pytest.mark.parametrize(
    ("written", "characters", "message"),
    [
        ("", True, "the prompt is empty"),
        ("", False, "the prompt is empty"),
        (" \t", False, "the prompt is empty"),
        ("a\nb<unk>", True, "the prompt, line 2 of it: 'b' does not stand in the training text; "),
        ("a\n\na b", False, "the prompt, line 3 of it: 'b' does not stand in the training text and there is no <unk>"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_a_wrong_request(written, characters, message):
    vocabulary = ("\n", "<unk>", "a") if characters else ("<eos>", "a")  # of characters it stands for nothing
    with pytest.raises(UsageError, match=message) as caught:
        text.numbered(written, vocabulary, characters=characters, name="the prompt")
    assert one_line(caught)


def test_windows_of_two_streams_by_hand():
    # Ten tokens, nine to predict: streams 0 1 2 3 4 | 5 6 7 8, windows of three.
    found = text.windows(np.arange(10, 20), streams=2, time=3)
    np.testing.assert_array_equal(found["valid"], [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]])
    valid = found["valid"]
    np.testing.assert_array_equal(found["inputs"][:2], [[10, 11, 12], [15, 16, 17]])
    np.testing.assert_array_equal(found["targets"][:2], [[11, 12, 13], [16, 17, 18]])
    assert found["inputs"][2:][valid[2:]].tolist() == [13, 14, 18]
    assert found["targets"][2:][valid[2:]].tolist() == [14, 15, 19]
    assert found["first"].tolist() == [True, True, False, False]
    assert {name: array.dtype.name for name, array in found.items()} == {
        "inputs": "int32",
        "targets": "int32",
        "valid": "bool",
        "first": "bool",
    }


@pytest.mark.parametrize(
    ("tokens", "streams", "time"), [(23, 3, 4), (2, 1, 4), (17, 1, 16), (17, 16, 5), (17, 5, 2), (16, 4, 1), (8, 5, 1)]
)
def test_every_token_but_the_first_is_predicted_once(tokens, streams, time):
    found = text.windows(np.arange(tokens), streams=streams, time=time)
    valid = found["valid"]
    assert found["inputs"].shape == found["targets"].shape == valid.shape
    assert valid.shape[1] == time and len(valid) == len(found["first"]) and len(valid) % streams == 0
    assert sorted(found["targets"][valid].tolist()) == list(range(1, tokens))
    np.testing.assert_array_equal(found["inputs"][valid] + 1, found["targets"][valid])
    assert found["first"].sum() == streams
    # A place of a batch goes on where it was in the batch before.
    before, after = found["inputs"][:-streams], found["inputs"][streams:]
    go_on = valid[streams:, 0]
    np.testing.assert_array_equal(after[go_on, 0], before[go_on, -1] + 1)


def test_too_little_text_for_the_streams_is_one_line():
    with pytest.raises(CarouselError, match="5 tokens do not make 5 streams") as caught:
        text.windows(np.arange(5), streams=5, time=2)
    assert one_line(caught)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tiny.test.txt").unlink(), r"has no file \*test.txt"),
        (lambda folder: (folder / "more.test.txt").write_text("the"), r"has 2 files \*test.txt"),
        (lambda folder: (folder / "tiny.valid.txt").write_text(" \n\n"), "tiny.valid.txt has no text"),
        (lambda folder: (folder / "tiny.train.txt").write_bytes(b"the\ncat \xff\n"), "line 2: not UTF-8"),
        (lambda folder: (folder / "tiny.train.txt").write_text("the cat sat\n"), "line 1 of it: 'dog' does not stand"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(folder, change, message):
    change(folder)
    with pytest.raises(CarouselError, match=message) as caught:
        text.load(folder)
    assert one_line(caught)


def test_a_file_that_is_missing_or_has_an_unknown_character_is_one_line(tmp_path):
    with pytest.raises(CarouselError, match=r"no.txt is missing") as caught:
        text.load(tmp_path / "no.txt")
    assert one_line(caught)
    path = tmp_path / "play.txt"
    path.write_text("a\nb" * 60 + "z")
    with pytest.raises(CarouselError, match=r"test part.*'z' does not stand in the training text") as caught:
        text.load(path, characters=True)
    assert one_line(caught)


def test_the_penn_treebank_has_its_published_counts():
    if not (SHARED / "ptb").is_dir():
        pytest.skip("no Penn Treebank to read, set CAROUSEL_DATA")
    corpus = text.load(SHARED / "ptb")
    assert len(corpus.vocabulary) == 10_000
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [929_589, 73_760, 82_430]
