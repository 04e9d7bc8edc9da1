"""Text as tokens: the layouts that are read, every token counted once, and one line for a file that cannot be used."""

import os
import pathlib

import numpy as np
import pytest

from research.data import text
from research.errors import CarouselError

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
    assert corpus.text(corpus.test, " ") == "the cat \n"
    assert set(corpus.checksums) == {"tiny.train.txt", "tiny.valid.txt", "tiny.test.txt"}


def test_characters_of_one_file(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text("ab\nc" * 50)
    corpus = text.load(path, characters=True)
    assert corpus.vocabulary == ("\n", "a", "b", "c")
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [180, 10, 10]
    whole = np.concatenate([corpus.train, corpus.validation, corpus.test])
    assert corpus.text(whole) == path.read_text()


def test_streams_go_on_from_window_to_window():
    streams = text.continuous(np.arange(23), 3)
    np.testing.assert_array_equal(streams, np.arange(21).reshape(3, 7))
    with pytest.raises(CarouselError, match="5 tokens do not make 3 streams") as caught:
        text.continuous(np.arange(5), 3)
    assert one_line(caught)


@pytest.mark.parametrize(("tokens", "batch"), [(23, 3), (2, 4), (17, 1), (17, 16), (17, 5)])
def test_every_token_but_the_first_is_predicted_once(tokens, batch):
    inputs, targets, mask = text.evaluation_streams(np.arange(tokens), batch)
    assert inputs.shape == targets.shape == mask.shape and len(inputs) == batch
    assert sorted(targets[mask].tolist()) == list(range(1, tokens))
    np.testing.assert_array_equal(inputs[mask] + 1, targets[mask])


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
