"""Plain text as words or characters: files in the layout of the Penn Treebank, or one file that is cut in three.

The vocabulary is that of the training text. Words are what blanks separate; every line ends with `<eos>`, so that a
line of n words is n + 1 tokens (the Penn Treebank's 929,589 / 73,760 / 82,430). Characters are the text's own, line
ends among them.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from research.data import files
from research.errors import CarouselError, UsageError

END_OF_SENTENCE = "<eos>"
UNKNOWN = "<unk>"
# Of one file: the first 90% train, then 5% validation and 5% test, as is usual for tiny Shakespeare.
_VALIDATION = _TEST = 0.05


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text in three parts.

    Attributes:
      vocabulary: the tokens; their places are their numbers. Words by falling frequency, characters in order.
      train, validation, test: token numbers `[tokens]`, int32.
      checksums: file name -> SHA-256.
    """

    vocabulary: tuple[str, ...]
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    checksums: Mapping[str, str]


def load(path: str | pathlib.Path, *, characters: bool = False) -> Corpus:
    """Reads a corpus.

    Args:
      path: a folder with one `*train.txt`, `*valid.txt` and `*test.txt` each; or one text file, of which the first 90%
        are for training and 5% each for validation and test; words are left whole.
      characters: tokens are characters, not words.

    Raises:
      CarouselError: a file is missing, empty or not UTF-8; or validation or test have a token that training does not
        have, and there is no `<unk>` to stand for it.
    """
    path, sources = pathlib.Path(path).expanduser(), _sources(path)
    texts = [_read(source) for source in sources]
    names = [str(source) for source in sources]
    if len(sources) == 1:
        (whole,) = texts
        names = [f"{path} ({part})" for part in ("training", "validation", "test part")]
        first, second = (_cut(whole, share, characters) for share in (1 - _VALIDATION - _TEST, 1 - _TEST))
        texts = [whole[:first], whole[first:second], whole[second:]]
    tokens = [list(text) if characters else _words(text) for text in texts]
    if empty := [name for name, part in zip(names, tokens, strict=True) if not part]:
        raise CarouselError(f"{empty[0]} has no text: give a file with some, or another --text")
    vocabulary = tuple(sorted(set(tokens[0]))) if characters else _by_frequency(tokens[0])
    numbers = {token: number for number, token in enumerate(vocabulary)}
    parts = [_numbered(part, numbers, name, characters) for part, name in zip(tokens, names, strict=True)]
    return Corpus(vocabulary, *parts, checksums(path))


def checksums(path: str | pathlib.Path) -> dict[str, str]:
    """File name -> SHA-256 of the files that `load` reads.

    Raises:
      CarouselError: one is missing.
    """
    return {source.name: files.sha256(_bytes(source)) for source in _sources(path)}


def _sources(path: str | pathlib.Path) -> list[pathlib.Path]:
    path = pathlib.Path(path).expanduser()
    return [_part(path, part) for part in ("train", "valid", "test")] if path.is_dir() else [path]


def written_out(tokens: np.ndarray, vocabulary: Sequence[str], *, characters: bool) -> str:
    """The text of token numbers; `<eos>` is a line end."""
    words = (vocabulary[token] for token in tokens)
    if characters:
        return "".join(words)
    return re.sub(" ?\n ?", "\n", " ".join("\n" if word == END_OF_SENTENCE else word for word in words))


def numbered(text: str, vocabulary: Sequence[str], *, characters: bool, name: str) -> np.ndarray:
    """The token numbers of a text `[tokens]`, in which a line has an end only where it is written.

    Args:
      text: such as a prompt.
      vocabulary: of a corpus.
      characters: tokens are characters, not words.
      name: of the text, for the message.

    Raises:
      UsageError: there is no token, or one that is not in the vocabulary without an `<unk>` to stand for it.
    """
    numbers = {token: number for number, token in enumerate(vocabulary)}
    words = [word for line in text.split("\n") for word in (*line.split(), END_OF_SENTENCE)][:-1]
    tokens = list(text) if characters else words
    if not tokens:
        raise UsageError(f"{name} is empty: give some text or leave it out")
    return _numbered(tokens, numbers, name, characters, UsageError)


def windows(tokens: np.ndarray, *, streams: int, time: int) -> dict[str, np.ndarray]:
    """The text as windows of parallel streams, for truncated backpropagation with a carried state.

    The text is cut into `streams` equal streams, so that every token but the first is predicted exactly once, and each
    stream into windows. Example w streams + s is window w of stream s: a batch of `streams` examples goes on where the
    batch before it stopped. Every stream but the first begins without the state of the one before it.

    Args:
      tokens: `[tokens]`.
      streams: how many; the last ones are shorter, or empty, where they do not divide the text.
      time: tokens of a window; where it does not divide a stream, the last window is padded.

    Returns:
      `inputs` and `targets` `[examples, time]`, int32, the token at a place and the one behind it; `valid`
      `[examples, time]`, False in the padding; `first` `[examples]`, True where a stream begins.

    Raises:
      CarouselError: there is less than one token to predict a stream.
    """
    predicted = len(tokens) - 1
    if predicted < streams:
        raise CarouselError(
            f"{len(tokens)} tokens do not make {streams} streams of at least one prediction: "
            "give a smaller --batch_size or more text"
        )
    length = -(-predicted // streams)
    number = -(-length // time)
    window, stream, step = np.ix_(np.arange(number), np.arange(streams), np.arange(time))
    within = window * time + step
    places = stream * length + within
    valid = (within < length) & (places < predicted)
    places = np.minimum(places, predicted - 1)
    arrays = {"inputs": tokens[places].astype(np.int32), "targets": tokens[places + 1].astype(np.int32), "valid": valid}
    arrays = {name: array.reshape(-1, time) for name, array in arrays.items()}
    return arrays | {"first": np.arange(number * streams) < streams}


def _part(folder: pathlib.Path, part: str) -> pathlib.Path:
    found = sorted(folder.glob(f"*{part}.txt"))
    if len(found) != 1:
        what = "no file" if not found else f"{len(found)} files"
        raise CarouselError(f"{folder} has {what} *{part}.txt: give a folder with one each for train, valid and test")
    return found[0]


def _bytes(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CarouselError(f"{path} is missing: give --text=FILE_OR_FOLDER, or --data_dir with a folder ptb") from None
    except OSError as error:
        raise CarouselError(f"cannot read {path}: {error.strerror or error}") from error


def _read(path: pathlib.Path) -> str:
    content = _bytes(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise CarouselError(f"{path}, line {line}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from None


def _cut(text: str, share: float, characters: bool) -> int:
    """Where the first share of a text ends, not within a word."""
    place = round(len(text) * share)
    while not characters and 0 < place < len(text) and not text[place - 1].isspace():
        place += 1
    return place


def _words(text: str) -> list[str]:
    return [word for line in text.splitlines() for word in (*line.split(), END_OF_SENTENCE)] if text.strip() else []


def _by_frequency(words: list[str]) -> tuple[str, ...]:
    unique, counts = np.unique(np.asarray(words, dtype=object), return_counts=True)
    return tuple(unique[np.lexsort((unique, -counts))].tolist())


def _numbered(
    tokens: list[str],
    numbers: Mapping[str, int],
    name: str,
    characters: bool,
    error: type[CarouselError] = CarouselError,
) -> np.ndarray:
    unknown = numbers.get(UNKNOWN) if not characters else None
    found = [numbers.get(token, unknown) for token in tokens]
    if None in found:
        place = found.index(None)
        end = "\n" if characters else END_OF_SENTENCE
        line = tokens[:place].count(end) + 1
        raise error(
            f"{name}, line {line} of it: {tokens[place]!r} does not stand in the training text"
            f"{'' if characters else f' and there is no {UNKNOWN}'}; take it out or add it to the training text"
        )
    return np.asarray(found, np.int32)
