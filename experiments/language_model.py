"""Language models on plain text: the 4-gram network against recurrence, and vanilla against gated recurrence.

A 4-gram network forgets what is more than three tokens back; a recurrent one could remember it, if its error signal
came that far. All read the text in continuous streams with the state carried from window to window, and every token of
validation and test but the first is predicted exactly once. Scores are bits per character, or perplexity of words.

By default characters of one text file, four kinds of model of 128 units, two passes, in some minutes on two cores:

    launch/run language_model --text=FILE

`--text` may also be a folder of three files in the layout of the Penn Treebank (`*train.txt`, `*valid.txt`,
`*test.txt`). `launch/run generate --run=RUN_FOLDER` continues a prompt with a trained model.

Differences from Bengio et al. 2003 and the lecture's slides: the 4-gram network reads the newest three tokens (the
slides' window, as printed, leaves the newest out); Adam in place of plain gradient descent; validation and test are
read as as many streams as training, each but the first beginning without a state.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import sequences
from experiments.options import option
from experiments.runner import Experiment, main
from experiments.sequences import KINDS, NGRAM, SequenceCell

VOCABULARY = "vocabulary.json"
# Tokens of the sample that every run writes, and how they are drawn.
_LENGTHS = {"characters": 400, "words": 100}
_SAMPLE = {"temperature": 0.8, "top_k": 40}


@dataclasses.dataclass(frozen=True)
class Config(sequences.SequenceConfig):
    """The flags."""

    tokens: str = option("characters", "What the text is cut into.", choices=("characters", "words"))
    cells: tuple[str, ...] = option(
        (NGRAM, "tanh", "lstm", "gru"), "Kinds of model.", choices=(NGRAM, *(kind for kind in KINDS))
    )
    seeds: tuple[int, ...] = option((0,), "Trained side by side in one program.", minimum=0)


def cells(config: Config) -> list[SequenceCell]:
    """The grid: recipes x cells; seeds are inside of a cell."""
    pairs = [(recipe, cell) for recipe in config.recipes for cell in config.cells]
    return [sequences.cell_of(config, config.tokens, cell, recipe) for recipe, cell in pairs]


def run(cell: SequenceCell, context: Any) -> Mapping[str, Any]:
    """Trains the models of all seeds, and writes what the first one makes up."""
    import jax

    from research.files import write_json_atomic

    data = sequences.load(cell)
    folder = context.folder.path
    write_json_atomic(folder / VOCABULARY, list(data.vocabulary))
    outcome, result = sequences.train(cell, data, context)
    variables = jax.tree.map(lambda leaf: leaf[0], outcome.final.variables)
    options = {"seed": cell.seed[0], "steps": _LENGTHS[cell.task], **_SAMPLE}
    sample = continued(cell, data.vocabulary, variables, prompt=None, **options)
    return result | {"sample": sample, "predicted": data.predicted}


def continued(
    cell: SequenceCell,
    vocabulary: tuple[str, ...],
    variables: Mapping[str, Any],
    *,
    prompt: str | None,
    seed: int,
    steps: int,
    temperature: float,
    top_k: int | None,
) -> str:
    """What a trained model of the cell writes after a prompt; None for the beginning of a line.

    Raises:
      UsageError: the prompt is empty, or has a token that the text had not.
    """
    import jax

    from research.data import text
    from research.tasks.generation import generate
    from research.training import state

    characters = cell.task == "characters"
    line_end = "\n" if "\n" in vocabulary or not characters else vocabulary[0]
    prompt = line_end if prompt is None else prompt
    given = text.numbered(prompt, vocabulary, characters=characters, name="the prompt")
    apply = state.bind(sequences.network_of(cell, sequences.of_vocabulary(len(vocabulary)), streams=1))
    tokens = generate(
        apply,
        variables,
        given[None],
        steps=steps,
        key=state.stream(seed, "sample"),
        temperature=temperature,
        top_k=min(top_k, len(vocabulary)) if top_k else None,
    )
    return text.written_out(jax.device_get(tokens)[0], vocabulary, characters=characters)


def report(workdir: Path, names: list[str]) -> None:
    """Writes `summary.csv` and `figures/`, prints the table and the samples."""
    from experiments import recurrence_report
    from experiments.sequence_tasks import TASKS
    from experiments.sequences import LABELS
    from research.analysis import results

    recurrence_report.report(workdir, names)
    for run in results.read_runs(workdir / "runs" / name for name in names):
        if run.result.get("sample"):
            counts = {split: f"{n:,}" for split, n in run.result["predicted"].items()}
            kind = f"{LABELS[run.config['cell']]}, {TASKS[run.config['task']].title}"
            print(f"\n--- {kind}: predicted once each {counts['validation']} of validation, {counts['test']} of test")
            print(run.result["sample"])


EXPERIMENT = Experiment(
    name="language_model",
    config=Config,
    cells=cells,
    run=run,
    report=report,
    smoke={"units": (8,), "time": 8, "steps": 4, "batch_size": 4, "steps_per_call": 2, "evaluations": 2},
    exclusive=(("epochs", "steps"),),
    check=sequences.check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
