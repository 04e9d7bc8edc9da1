"""Plain text as words or characters: files in the layout of the Penn Treebank, or one file that is cut in three.

The vocabulary is that of the training text. Words are what blanks separate; every line ends with `<eos>`, so that a
line of n words is n + 1 tokens (the Penn Treebank's 929,589 / 73,760 / 82,430). Characters are the text's own, line
ends among them.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np

from research.data import files
from research.errors import CarouselError

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

    def text(self, tokens: np.ndarray, separator: str = "") -> str:
        """The tokens written out; `<eos>` is a line end."""
        words = (self.vocabulary[token] for token in tokens)
        return separator.join("\n" if word == END_OF_SENTENCE else word for word in words)


def load(path: str | pathlib.Path, *, characters: bool = False) -> Corpus:
    """Reads a corpus.

    Args:
      path: a folder with one `*train.txt`, `*valid.txt` and `*test.txt` each; or one text file, of which the first 90%
        are for training and 5% each for validation and test.
      characters: tokens are characters, not words.

    Raises:
      CarouselError: a file is missing, empty or not UTF-8; or validation or test have a token that training does not
        have, and there is no `<unk>` to stand for it.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        sources = [_part(path, part) for part in ("train", "valid", "test")]
        texts = [_read(source) for source in sources]
        names = [str(source) for source in sources]
    else:
        whole = _read(path)
        sources, names = [path], [f"{path} ({part})" for part in ("training", "validation", "test part")]
        first, second = (round(len(whole) * share) for share in (1 - _VALIDATION - _TEST, 1 - _TEST))
        texts = [whole[:first], whole[first:second], whole[second:]]
    tokens = [list(text) if characters else _words(text) for text in texts]
    if empty := [name for name, part in zip(names, tokens, strict=True) if not part]:
        raise CarouselError(f"{empty[0]} has no text: give a file with some, or another --data_dir")
    vocabulary = tuple(sorted(set(tokens[0]))) if characters else _by_frequency(tokens[0])
    numbers = {token: number for number, token in enumerate(vocabulary)}
    parts = [_numbered(part, numbers, name, characters) for part, name in zip(tokens, names, strict=True)]
    return Corpus(vocabulary, *parts, {source.name: files.sha256(source.read_bytes()) for source in sources})


def continuous(tokens: np.ndarray, batch: int) -> np.ndarray:
    """The text as `batch` streams side by side, for truncated backpropagation with a carried state.

    Args:
      tokens: `[tokens]`.
      batch: streams; the text is cut into that many equal parts, and at most batch - 1 last tokens are left out.

    Returns:
      `[batch, tokens // batch]`: row n goes on where it stops, from one window to the next.

    Raises:
      CarouselError: there are fewer than two tokens a stream.
    """
    length = len(tokens) // batch
    if length < 2:
        raise CarouselError(
            f"{len(tokens)} tokens do not make {batch} streams of at least 2: give a smaller batch size"
        )
    return tokens[: batch * length].reshape(batch, length)


def evaluation_streams(tokens: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The text as streams in which every token but the first is predicted exactly once.

    Returns:
      `(inputs, targets, mask)`, each `[batch, ceil((tokens - 1) / batch)]`; the mask is False where the last stream is
      padded. Every stream but the first begins without the state of the one before it.
    """
    predicted = len(tokens) - 1
    length = -(-predicted // batch)
    places = np.arange(batch * length).reshape(batch, length)
    mask = places < predicted
    places = np.minimum(places, predicted - 1)
    return tokens[places], tokens[places + 1], mask


def _part(folder: pathlib.Path, part: str) -> pathlib.Path:
    found = sorted(folder.glob(f"*{part}.txt"))
    if len(found) != 1:
        what = "no file" if not found else f"{len(found)} files"
        raise CarouselError(f"{folder} has {what} *{part}.txt: give a folder with one each for train, valid and test")
    return found[0]


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise CarouselError(f"{path} is missing: give a text file or a folder of them") from None
    except OSError as error:
        raise CarouselError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise CarouselError(f"{path}, line {line}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from None


def _words(text: str) -> list[str]:
    return [word for line in text.splitlines() for word in (*line.split(), END_OF_SENTENCE)] if text.strip() else []


def _by_frequency(words: list[str]) -> tuple[str, ...]:
    unique, counts = np.unique(np.asarray(words, dtype=object), return_counts=True)
    return tuple(unique[np.lexsort((unique, -counts))].tolist())


def _numbered(tokens: list[str], numbers: Mapping[str, int], name: str, characters: bool) -> np.ndarray:
    unknown = numbers.get(UNKNOWN) if not characters else None
    found = [numbers.get(token, unknown) for token in tokens]
    if None in found:
        place = found.index(None)
        end = "\n" if characters else END_OF_SENTENCE
        line = tokens[:place].count(end) + 1
        raise CarouselError(
            f"{name}, line {line} of it: {tokens[place]!r} does not stand in the training text"
            f"{'' if characters else f' and there is no {UNKNOWN}'}; take it out or add it to the training text"
        )
    return np.asarray(found, np.int32)
