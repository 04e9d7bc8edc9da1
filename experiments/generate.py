"""Continues a prompt with a language model that `language_model` has trained, from its run folder alone."""

import dataclasses
import sys
from pathlib import Path

from absl import app, flags, logging

from experiments.command_line import parse_flags
from research.errors import CarouselError, UsageError


def _define_flags() -> None:
    flags.DEFINE_string(
        "run", None, "The run folder of a trained model, in the runs folder of language_model's working folder."
    )
    flags.DEFINE_string("prompt", None, r"The text to go on from; \n is a line end (default: a new line).")
    flags.DEFINE_integer("length", 400, "Tokens to write.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.8, "Divides the logits: 0 takes the likeliest token, 1 draws as learned.")
    flags.DEFINE_integer("top_k", 40, "Draw from that many likeliest tokens; 0 for all.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0)
    flags.DEFINE_integer("model_seed", None, "Which of the seeds of the run (default: its first).", lower_bound=0)


def load(folder: Path, model_seed: int | None):
    """The cell of a run folder, its vocabulary, and the variables of one seed of the model that was chosen.

    Raises:
      CarouselError: the folder is not that of a finished language model.
      UsageError: the run has no such seed.
    """
    import jax
    import optax

    from experiments import sequences
    from experiments.language_model import VOCABULARY
    from research.files import read_json
    from research.training import checkpoint, state

    config = read_json(folder / "config.json")
    path, words = folder / "checkpoints" / checkpoint.BEST, folder / VOCABULARY
    # Other experiments train on text as well, and do not keep the words.
    if config.get("task") not in ("words", "characters") or (path.exists() and not words.exists()):
        raise CarouselError(f"{folder} is not the run of a language model: give one of launch/run language_model")
    known = {field.name for field in dataclasses.fields(sequences.SequenceCell)}
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in config.items() if name in known}
    cell = sequences.SequenceCell(**fields)
    if model_seed is not None and model_seed not in cell.seed:
        raise UsageError(f"--model_seed={model_seed}: the run has {', '.join(map(str, cell.seed))}")
    if not path.exists():
        raise CarouselError(f"{path} is missing: the run has not come to its first evaluation; start it again")
    vocabulary = tuple(read_json(words))
    arrays = {n: a for n, a in checkpoint.load(path).arrays.items() if not n.startswith("opt_state/")}
    model = sequences.network_of(cell, sequences.of_vocabulary(len(vocabulary)))
    inputs = {"tokens": jax.ShapeDtypeStruct((1, 1), "int32"), "first": jax.ShapeDtypeStruct((1,), "bool")}
    like = jax.eval_shape(lambda: state.initialize(model, optax.identity(), cell.seed, inputs))
    number = 0 if model_seed is None else cell.seed.index(model_seed)
    found = state.unflatten(arrays, like, str(path))
    return cell, vocabulary, jax.tree.map(lambda leaf: leaf[number], found.variables)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    logging.set_verbosity(logging.WARNING)  # JAX tells at INFO which kinds of device the machine does not have
    try:
        if values.run is None:
            raise UsageError("--run is missing: give the run folder of a trained language model")
        if not values.temperature >= 0:
            raise UsageError(f"--temperature={values.temperature}: give 0 or more")
        from experiments import precision
        from experiments.language_model import continued

        cell, vocabulary, variables = load(Path(values.run), values.model_seed)
        prompt = values.prompt and values.prompt.replace("\\n", "\n")
        options = {"steps": values.length, "temperature": values.temperature, "top_k": values.top_k or None}
        with precision.products(cell):  # of a model trained in TF32 also where there is none: float32 is closer still
            text = continued(cell, vocabulary, variables, prompt=prompt, seed=values.seed, **options)
    except CarouselError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    within_line = prompt and not prompt[-1].isspace() and not text.startswith("\n")
    print((prompt or "") + (" " if within_line and cell.task == "words" else "") + text)


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=parse_flags)
