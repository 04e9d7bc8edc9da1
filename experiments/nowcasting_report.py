"""Tables and figures of the nowcasting experiment, from its run folders alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from experiments import precision
from experiments.nowcasting_cells import BASELINES, label_of
from research.analysis import figures, nowcast_figures, recurrence_figures, results, tables
from research.analysis.results import Run, spread
from research.data import radar

TITLES = {"moving_digits": "Moving digits", "moving_mnist": "Moving MNIST", "radar": "Radar"}

# Shi et al. 2015, Table 1: cross-entropy in nats a sequence; and Table 2, on radar frames of Hong Kong.
PAPER_CROSS_ENTROPY = {
    "fc-2048-2048": 4832.49,
    "5x5-5x5-256": 3887.94,
    "5x5-5x5-128-128": 3733.56,
    "5x5-5x5-128-64-64": 3670.85,
    "9x9-1x1-128-128": 4782.84,
    "9x9-1x1-128-64-64": 4231.50,
}
_PAPER_RADAR = ("rainfall_mse", "csi", "far", "pod", "correlation")
PAPER_RADAR = {
    network: dict(zip(_PAPER_RADAR, values, strict=True))
    for network, values in {
        "3x3-3x3-64-64": (1.420, 0.577, 0.195, 0.660, 0.908),
        "fc-2000-2000": (1.865, 0.286, 0.335, 0.351, 0.774),
        "optical_flow": (1.684, 0.522, 0.301, 0.642, 0.850),  # ROVER2
    }.items()
}
# name in the scores -> (column and axis, significant places, is less better)
SCORES = {
    "cross_entropy": ("cross-entropy (nats per sequence)", "cross-entropy (nats per frame)", 4),
    "squared_error": ("squared error per frame", "squared error per frame", 3),
    "ssim": ("SSIM", "SSIM", 3),
    "rainfall_mse": ("rainfall MSE (mm²/h²)", "rainfall MSE (mm²/h²)", 3),
    "csi": ("CSI", "CSI", 3),
    "far": ("FAR", "FAR", 3),
    "pod": ("POD", "POD", 3),
    "correlation": ("correlation", "correlation", 3),
}


def report(workdir: Path, names: list[str]) -> None:
    """Writes `summary.csv`, `scores_by_lead.csv` and `figures/` into the working folder and prints the tables."""
    runs = results.read_runs(workdir / "runs" / name for name in names)
    rows = {
        "summary": [_summary(run) for run in runs],
        "scores_by_lead": [r for run in runs for r in _by_lead_rows(run)],
    }
    rows = {name: found for name, found in rows.items() if found}  # where all diverged there are no scores
    for name, found in rows.items():
        tables.write_csv(workdir / f"{name}.csv", found)
    groups = results.group(runs, lambda run: (run.config["network"], run.config["cell"]))
    groups = {label_of(*key): same for key, same in groups.items()}
    title = f"\n{_title(runs)}; test scores{precision.title(runs[0].config)}{results.unfinished(names, runs)}"
    print(_table(title, [_row(name, same) for name, same in groups.items()]))
    shown = [score for score in SCORES if any(_overall(run).get(score) is not None for run in runs)]
    if "csi" in shown:
        print(f"rain is {radar.THRESHOLD} mm/h or more; CSI, FAR, POD and correlation of sums over all frames")
        print(_table("\nShi et al. 2015, Table 2: radar of Hong Kong, other data than these", _paper_rows()))
    if any(map(_in_table_1, runs)):
        print("paper: Shi et al. 2015, Table 1; differences: experiments/nowcasting.py")
    if any("published_scores" in run.result for run in runs):
        count = next(run.result["examples"]["published"] for run in runs if "published_scores" in run.result)
        scored = [_row(name, same, "published_scores") for name, same in groups.items()]
        print(_table(f"\nThe {count:,} published sequences", scored))
    written = _draw(runs, groups, shown, workdir / "figures")
    written = [*(workdir / f"{name}.csv" for name in rows), *written]
    print(f"\nwritten: {', '.join(map(str, written))}")


def _title(runs: Sequence[Run]) -> str:
    config = runs[0].config
    examples = next((run.result["examples"] for run in runs if "examples" in run.result), {})  # not of what diverged
    sizes = (
        f"{config['frame']}x{config['frame']} pixels, {config['observed']} frames seen, {config['horizon']} forecast"
    )
    counts = f"{examples.get('train', 0):,} training, {examples.get('test', 0):,} test sequences"
    return f"{TITLES[config['dataset']]}, {sizes}; {counts}"


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = dict.fromkeys(column for row in rows for column in row)
    return tables.render(title, [{column: row.get(column, "-") for column in columns} for row in rows])


def _paper_rows() -> list[dict[str, str]]:
    titles = {network: label_of(network, "lstm") for network in PAPER_RADAR} | {"optical_flow": "ROVER2"}
    return [
        {"forecast": titles[network]} | {SCORES[score][0]: f"{value:g}" for score, value in scores.items()}
        for network, scores in PAPER_RADAR.items()
    ]


def _overall(run: Run, kind: str = "scores") -> Mapping[str, float]:
    """Scores over all lead times; of a diverged run none."""
    return run.result.get(kind, {}).get("overall", {})


def _summary(run: Run) -> dict[str, Any]:
    """A row of `summary.csv`: what was run, scores, times."""
    config, result = run.config, run.result
    overall = _overall(run)
    names = ("dataset", "network", "cell", "seed", "frame", "observed", "horizon", "patch", "batch_size", "optimizer")
    losses = [f"{split}_loss" for split in ("train", "validation", "test")]
    return (
        {name: config[name] for name in (*names, "learning_rate")}
        | precision.column(config)
        | {name: result.get(name) for name in ("params", "steps", *losses)}
        | {name: overall.get(name) for name in SCORES}
        | {"seconds": sum((result.get("seconds") or {}).values())}
        | {"failure": result.get("failure", ""), "final_state_sha256": result.get("final_state_sha256", "")}
    )


def _by_lead_rows(run: Run) -> list[dict[str, Any]]:
    """Rows of `scores_by_lead.csv`, one a lead time; of a diverged run none."""
    by_lead = run.result.get("scores", {}).get("by_lead", {})
    minutes = run.result.get("minutes")
    return [
        {name: run.config[name] for name in ("dataset", "network", "cell", "seed")}
        | {"lead": lead, "minutes": minutes and lead * minutes}
        | {name: by_lead[name][lead - 1] if name in by_lead else None for name in SCORES}
        for lead in range(1, max(map(len, by_lead.values()), default=0) + 1)
    ]


_TABLE_1 = {"dataset": "moving_mnist", "cell": "lstm", "frame": 64, "digits": 2, "observed": 10, "horizon": 10}


def _in_table_1(run: Run) -> bool:
    return run.config["network"] in PAPER_CROSS_ENTROPY and all(run.config[n] == v for n, v in _TABLE_1.items())


def _row(name: str, runs: Sequence[Run], kind: str = "scores") -> dict[str, Any]:
    finished = [run for run in runs if _overall(run, kind)]
    params, steps = (finished[0].result.get(name) if finished else None for name in ("params", "steps"))
    row = {"forecast": name, "parameters": f"{params:,}" if params else "-"}
    if kind == "scores" and _in_table_1(runs[0]):
        row["paper: cross-entropy"] = f"{PAPER_CROSS_ENTROPY[runs[0].config['network']]:g}"
    for score, (title, _, digits) in SCORES.items():
        values = [found[score] for found in (_overall(run, kind) for run in finished) if found.get(score) is not None]
        if values:
            row[title] = _text(values, digits)
    seconds = sum(sum((run.result.get("seconds") or {}).values()) for run in runs)
    if runs[0].config["network"] not in BASELINES:
        row |= {"steps": steps or "-", "seconds": f"{seconds:.0f}"}
    if len(finished) < len(runs):
        row["diverged"] = f"{len(runs) - len(finished)} of {len(runs)}"
    return row


def _text(values: Sequence[float], digits: int) -> str:
    """Mean, and of several standard deviation and n."""
    found = spread(values)
    mean = f"{found.mean:.0f}" if abs(found.mean) >= 10**digits else f"{found.mean:.{digits}g}"
    if found.n == 1:
        return mean
    return f"{mean} ± {found.std:.0f} (n={found.n})" if found.std >= 10 else f"{mean} ± {found.std:.2g} (n={found.n})"


def _draw(runs: Sequence[Run], groups: Mapping[str, Sequence[Run]], shown: Sequence[str], folder: Path) -> list[Path]:
    made_from = figures.provenance(runs)
    minutes = next((run.result["minutes"] for run in runs if run.result.get("minutes")), None)
    learned = {name: same for name, same in groups.items() if same[0].config["network"] not in BASELINES}
    baselines = [name for name in groups if name not in learned]
    drawn = {}
    if learned:
        ylabel = "validation cross-entropy\n(nats per sequence)"
        panel = recurrence_figures.Panel(learned, "validation_loss", ylabel, from_zero=False)
        drawn["loss_curves"] = recurrence_figures.loss_curves({_title(runs).split(",")[0]: panel})
    panels = {score: _by_lead(groups, score) for score in shown}
    panels = {SCORES[score][0].split(" (")[0]: found for score, found in panels.items() if found}
    axes = {SCORES[score][0].split(" (")[0]: SCORES[score][1] for score in shown}
    if panels:
        options = {"minutes": minutes, "baselines": baselines}
        drawn["scores_against_lead"] = nowcast_figures.score_against_lead(panels, axes, **options)
    if on_maps := _firsts(learned, "receptive_field"):
        fields = {name: _arrays(run, "receptive_field")["maps"] for name, run in on_maps.items()}
        sizes = {name: run.result["receptive_field"] for name, run in on_maps.items()}
        drawn["receptive_field"] = nowcast_figures.receptive_field(_of_one_size(fields), sizes)
    written = [path for name, figure in drawn.items() for path in figures.save(figure, folder / name, made_from)]
    return written + _draw_example(groups, minutes, folder, made_from)


def _firsts(groups: Mapping[str, Sequence[Run]], name: str) -> dict[str, Run]:
    """Of each forecast the first seed that has this file: not one that diverged."""
    found = {label: [run for run in runs if _file(run, name).exists()] for label, runs in groups.items()}
    return {label: runs[0] for label, runs in found.items() if runs}


def _file(run: Run, name: str) -> Path:
    return run.path / f"{name}.safetensors"


def _arrays(run: Run, name: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load(_file(run, name).read_bytes())


def _of_one_size(fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Maps of one size around their centres, that of the largest."""
    size = max(maps.shape[-1] for maps in fields.values())
    edges = {name: (size - maps.shape[-1]) // 2 for name, maps in fields.items()}
    return {name: np.pad(maps, ((0, 0), *[(edges[name],) * 2] * 2)) for name, maps in fields.items()}


def _by_lead(groups: Mapping[str, Sequence[Run]], score: str) -> dict[str, np.ndarray]:
    """Forecast -> `[seeds, lead]`, of those that have the score."""
    found = {}
    for name, runs in groups.items():
        rows = [run.result["scores"]["by_lead"].get(score) for run in runs if "scores" in run.result]
        rows = [[math.nan if value is None else value for value in row] for row in rows if row]
        if rows:
            found[name] = np.array(rows)
    return found


def _draw_example(
    groups: Mapping[str, Sequence[Run]], minutes: int | None, folder: Path, made_from: Mapping[str, str]
) -> list[Path]:
    """One test sequence with every forecast of it, as a strip and in motion."""
    firsts = _firsts(groups, "example")
    if not firsts:
        return []
    found = {name: _arrays(run, "example") for name, run in firsts.items()}
    config = next(iter(firsts.values())).config
    rain = config["dataset"] == "radar"
    unit = radar.to_rain_from_grey if rain else lambda grey: grey
    frames = unit(next(iter(found.values()))["frames"])
    inputs, truth = frames[: config["observed"]], frames[config["observed"] :]
    predictions = {name: unit(arrays["prediction"]) for name, arrays in found.items()}
    options = {"scale": "rain" if rain else "grey", "minutes": minutes}
    every = -(-len(truth) // 10)
    strip = nowcast_figures.strip(inputs, truth, predictions, every=every, **options)
    zoom = max(2, round(192 / config["frame"]))
    moving = nowcast_figures.animation(inputs, truth, predictions, folder / "forecast", made_from, zoom=zoom, **options)
    return [*figures.save(strip, folder / "strip", made_from), moving]
