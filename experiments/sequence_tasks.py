"""What sequence experiments train on: each task's data, loss, network shape, score, and the loss without memory."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

# Examples of the synthetic tasks: training, validation, test. Bai et al. 2018 train on 50,000 as well.
SYNTHETIC = (50_000, 1_000, 1_000)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A task with its data.

    Attributes:
      splits: of the trainer.
      make_task: `apply -> Task`.
      inputs: features that the network reads a step; of text the vocabulary.
      outputs: numbers that it puts out.
      baseline: the score of a model without memory, None where none is known.
      vocabulary: of a text.
      predicted: of a text, split name -> tokens that are predicted, each once.
    """

    splits: Any
    make_task: Callable[..., Any]
    inputs: int
    outputs: int
    baseline: float | None = None
    vocabulary: tuple[str, ...] = ()
    predicted: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SequenceTask:
    """A row of `TASKS`.

    Attributes:
      title: for people.
      load: `cell -> Loaded`; the last one stays in memory.
      network: an output after the last step (`one`), at every step (`each`), or of a language model (`text`).
      metric: of the evaluations, by which networks are compared.
      unit: what the metric is called on axes and in tables.
      has_length: whether sequences are as long as is asked for.
    """

    title: str
    load: Callable[[Any], Loaded]
    network: str
    metric: str
    unit: str
    has_length: bool = False


def _synthetic(draw: Callable[..., Any], make_task: Callable[..., Any], **shape: Any) -> Loaded:
    import jax
    import numpy as np

    from research.data.dataset import SPLIT_SEED
    from research.training import loop

    # The same examples for all cells and seeds, so that a spread is that of the training.
    drawn = jax.jit(functools.partial(draw, examples=sum(SYNTHETIC)))(jax.random.key(SPLIT_SEED))
    arrays = {name: np.asarray(array) for name, array in drawn.items()}
    return Loaded(loop.Splits(arrays, *SYNTHETIC), make_task, **shape)


@functools.lru_cache(maxsize=1)
def _adding(length: int) -> Loaded:
    from research.data import sequences
    from research.tasks.sequences import regression

    draw = functools.partial(sequences.adding, time=length)
    return _synthetic(draw, regression, inputs=2, outputs=1, baseline=sequences.ADDING_BASELINE)


@functools.lru_cache(maxsize=1)
def _copy(length: int) -> Loaded:
    from research.data import sequences
    from research.tasks.sequences import symbols

    classes = sequences.SYMBOLS + 2
    draw = functools.partial(sequences.copy_memory, blanks=length)
    make_task = functools.partial(symbols, classes=classes)
    return _synthetic(draw, make_task, inputs=classes, outputs=classes, baseline=sequences.copy_memory_baseline(length))


@functools.lru_cache(maxsize=1)
def _pixels(dataset: str, permuted: bool, data_dir: str | None) -> Loaded:
    import numpy as np

    from research.data import images
    from research.data.dataset import SPLIT_SEED
    from research.tasks.sequences import pixel_classification
    from research.training import loop

    data = images.load(dataset, data_dir)
    height, width, channels = data.image_shape
    permutation = np.random.RandomState(SPLIT_SEED).permutation(height * width) if permuted else None
    parts = (data.train, data.validation, data.test)
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels")}
    splits = loop.Splits(arrays, *map(len, parts), checksums=data.checksums)
    make_task = functools.partial(pixel_classification, permutation=permutation)
    return Loaded(splits, make_task, channels, data.num_classes, baseline=1 - 1 / data.num_classes)


@functools.lru_cache(maxsize=1)
def _music(name: str, data_dir: str | None) -> Loaded:
    import numpy as np

    from research.data import music
    from research.tasks.sequences import next_frame
    from research.training import loop

    data = music.load(name, data_dir)
    parts = (data.train, data.validation, data.test)
    longest = max(len(sequence) for part in parts for sequence in part)
    rows = [music.packed(part, longest) for part in parts]
    arrays = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
    counts = [len(part["valid"]) for part in rows]
    return Loaded(
        loop.Splits(arrays, *counts, checksums=data.checksums), next_frame, inputs=music.NOTES, outputs=music.NOTES
    )


@functools.lru_cache(maxsize=1)
def load_corpus(path: str, characters: bool) -> Any:
    """The text; the last one stays in memory."""
    from research.data import text

    return text.load(path, characters=characters)


@functools.lru_cache(maxsize=1)
def _text(path: str, characters: bool, streams: int, time: int) -> Loaded:
    import numpy as np

    from research.data import text
    from research.tasks.language import next_token
    from research.training import loop

    corpus = load_corpus(path, characters)
    parts = [text.windows(part, streams=streams, time=time) for part in (corpus.train, corpus.validation, corpus.test)]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    splits = loop.Splits(arrays, *(len(part["first"]) for part in parts), checksums=corpus.checksums)
    size = len(corpus.vocabulary)
    counts = {n: int(part["valid"].sum()) for n, part in zip(("train", "validation", "test"), parts, strict=True)}
    return Loaded(splits, next_token, size, size, vocabulary=corpus.vocabulary, predicted=counts)


def _image_task(dataset: str, permuted: bool) -> SequenceTask:
    order = "in a fixed random order" if permuted else "pixel by pixel"
    sizes = {"digits": "8x8 digits", "mnist": "MNIST"}
    return SequenceTask(
        f"{sizes[dataset]} {order}", lambda cell: _pixels(dataset, permuted, cell.data_dir), "one", "error", "error"
    )


def _music_task(name: str, title: str) -> SequenceTask:
    return SequenceTask(
        title, lambda cell: _music(name, cell.data_dir), "each", "loss", "negative log-likelihood (nats per frame)"
    )


def text_path(cell: Any) -> str:
    """The file or folder of the text: what was asked for, or the Penn Treebank in the data folder."""
    from research.data import files

    return cell.text or str(files.data_folder(cell.data_dir) / "ptb")


def _text_task(title: str, characters: bool, unit: str) -> SequenceTask:
    return SequenceTask(
        title,
        lambda cell: _text(text_path(cell), characters, cell.batch_size, cell.time),
        "text",
        "loss",
        unit,
    )


TASKS = {
    "adding": SequenceTask(
        "adding problem", lambda cell: _adding(cell.length), "one", "loss", "mean squared error", has_length=True
    ),
    "copy": SequenceTask(
        "copy memory",
        lambda cell: _copy(cell.length),
        "each",
        "loss",
        "cross-entropy (nats per step)",
        has_length=True,
    ),
    "digits": _image_task("digits", False),
    "permuted_digits": _image_task("digits", True),
    "mnist": _image_task("mnist", False),
    "permuted_mnist": _image_task("mnist", True),
    "jsb": _music_task("jsb", "JSB Chorales"),
    "nottingham": _music_task("nottingham", "Nottingham"),
    "muse": _music_task("muse", "MuseData"),
    "piano": _music_task("piano", "Piano-midi.de"),
    "words": _text_task("words", False, "perplexity"),
    "characters": _text_task("characters", True, "bits per character"),
}
