"""Tables and figures of the recurrence ablation, from its run folders alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import precision
from experiments.recurrence_tables import DIFFERENCES, PAPER
from experiments.sequence_tasks import TASKS
from experiments.sequences import LABELS, summary_rows
from research.analysis import figures, recurrence_figures, results, tables
from research.analysis.results import Run, spread

Setting = tuple[str, str, int | None]


def report(workdir: Path, names: list[str]) -> None:
    """Writes `summary.csv` and `figures/` into the working folder and prints the tables."""
    runs = results.read_runs(workdir / "runs" / name for name in names)
    tables.write_csv(workdir / "summary.csv", [row for run in runs for row in summary_rows(run)])
    settings = results.group(runs, lambda run: tuple(run.config[name] for name in ("recipe", "task", "length")))
    for setting, same in settings.items():
        _, task, _ = setting
        title = f"\n{title_of(setting)}, {TASKS[task].unit} after the last step"
        if same[0].config["select"] == "best":
            title = f"\n{title_of(setting)}, {TASKS[task].unit} where the validation loss was lowest"
        title += precision.title(same[0].config) + results.unfinished(names, runs)
        print(tables.render(title, [_row(setting, run) for run in same]))
        if baseline := _baseline(same):
            print(f"without memory: {_number(task, baseline)}")
    for paper in dict.fromkeys(recipe.split("_")[0] for recipe, *_ in settings):
        if paper in DIFFERENCES:
            print(f"\nDifferences from {paper}: {DIFFERENCES[paper]}.")
    written = _draw(runs, settings, workdir / "figures")
    print(f"\nwritten: {workdir / 'summary.csv'}, {', '.join(str(path) for path in written)}")


def title_of(setting: Setting) -> str:
    recipe, task, length = setting
    return TASKS[task].title + (f", T = {length}" if length else "") + ("" if recipe == "default" else f" ({recipe})")


def score_text(task: str, values: Sequence[float]) -> str:
    """Mean, standard deviation and n of a task's scores, in the unit in which it is read."""
    metric = TASKS[task].metric
    if metric == "error":
        return spread(values).percent()
    scores = scores_of(task, values)
    if math.inf in scores:  # of which there is neither mean nor spread
        return f"inf (n={len(scores)})"
    found = spread(scores)
    if not found.n:
        return "failed"
    return _number(task, found.mean) + (f" ± {_digits(found.std, 2)} (n={found.n})" if found.n > 1 else "")


def scores_of(task: str, losses: Sequence[float]) -> list[float]:
    """A task's evaluations in the unit in which they are read: perplexity and bits from nats."""
    from research.tasks.language import bits, perplexity  # late: it loads JAX, which --help does without

    convert = {"perplexity": perplexity, "bits per character": bits}.get(TASKS[task].unit, float)
    return [float(convert(loss)) for loss in losses]


def _baseline(runs: Sequence[Run]) -> float | None:
    """Of the task without memory, where one of the runs did not diverge."""
    return next((baseline for run in runs if (baseline := run.result.get("baseline"))), None)


def _number(task: str, value: float) -> str:
    if TASKS[task].metric == "error":
        return f"{value:.2%}"
    return _digits(value, 4) if value >= 0.001 else f"{value:.2e}"


def _digits(value: float, significant: int) -> str:
    # Not as 1.2e+02, which perplexities would be; nor an exploded loss of 1e+36 with all its places.
    plain = 10**significant - 0.5 <= value < 1e6
    return f"{value:.0f}" if plain else f"{value:.{significant}g}"


def _row(setting: Setting, run: Run) -> dict[str, Any]:
    task, config = setting[1], run.config
    metric = TASKS[task].metric
    paper = PAPER.get(setting, {})
    scores = {split: results.values([run], f"{split}_{metric}") for split in ("train", "validation", "test")}
    diverged = len(config["seed"]) - len(scores["test"])
    seconds = sum((run.result.get("seconds") or {}).values())
    return {
        "cell": LABELS[config["cell"]],
        "units": " + ".join(map(str, config["units"])),
        "parameters": run.result.get("params", "-"),
        **({"paper: test": _number(task, paper[config["cell"]]) if config["cell"] in paper else "-"} if paper else {}),
        **{("here: test" if paper and split == "test" else split): score_text(task, v) for split, v in scores.items()},
        "steps": run.result.get("steps", "-"),
        "seconds": f"{seconds:.0f}",
        "diverged": f"{diverged} of {len(config['seed'])}" if diverged else "",
    }


def _draw(runs: Sequence[Run], settings: Mapping[Setting, Sequence[Run]], folder: Path) -> list[Path]:
    drawn = {"loss_curves": recurrence_figures.loss_curves({title_of(s): _panel(s, r) for s, r in settings.items()})}
    for (recipe, task), by_length in _lengths(settings).items():
        drawn[f"{task}_against_length{_suffix(recipe)}"] = _against_length(task, by_length)
    for setting, same in settings.items():
        gradients = {LABELS[run.config["cell"]]: g for run in same if (g := run.read_json("gradients.json"))}
        if gradients:
            moments = {"before training": "initial", "after training": "final"}
            panels = {
                f"{title_of(setting)}\n{title}": {cell: norms[moment] for cell, norms in gradients.items()}
                for title, moment in moments.items()
            }
            recipe, task, length = setting
            name = f"gradient_{task}{length or ''}{_suffix(recipe)}"
            drawn[name] = recurrence_figures.gradient_against_distance(panels)
    made_from = figures.provenance(runs)
    return [path for name, figure in drawn.items() for path in figures.save(figure, folder / name, made_from)]


def _suffix(recipe: str) -> str:
    return "" if recipe == "default" else f"_{recipe}"


def _panel(setting: Setting, runs: Sequence[Run]) -> recurrence_figures.Panel:
    task = setting[1]
    metric = TASKS[task].metric
    groups = {LABELS[run.config["cell"]]: [run] for run in runs}
    error, log = metric == "error", task in ("adding", "copy")
    # Logged are nats, whatever the table makes of them.
    unit = "loss (nats per token)" if TASKS[task].network == "text" else TASKS[task].unit
    ylabel = f"validation {unit.replace('negative log-likelihood', 'NLL')}"
    return recurrence_figures.Panel(groups, f"validation_{metric}", ylabel, _baseline(runs), log, from_zero=error)


def _lengths(settings: Mapping[Setting, Sequence[Run]]) -> dict[tuple[str, str], dict[int, Sequence[Run]]]:
    """(recipe, task) -> length -> runs, where a task was learned at several lengths."""
    found: dict[tuple[str, str], dict[int, Sequence[Run]]] = {}
    for (recipe, task, length), runs in settings.items():
        if length:
            found.setdefault((recipe, task), {})[length] = runs
    return {key: by_length for key, by_length in found.items() if len(by_length) > 1}


def _against_length(task: str, by_length: Mapping[int, Sequence[Run]]):
    cells = dict.fromkeys(run.config["cell"] for runs in by_length.values() for run in runs)
    groups = {
        LABELS[cell]: {
            length: [v for run in runs if run.config["cell"] == cell for v in results.values([run], "test_loss")]
            for length, runs in by_length.items()
        }
        for cell in cells
    }
    baseline = {length: found for length, runs in by_length.items() if (found := _baseline(runs))}
    return recurrence_figures.score_against_length(groups, f"test {TASKS[task].unit}", baseline, log=True)
