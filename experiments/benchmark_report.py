"""What the benchmark's rounds say: a table, `summary.csv`, a figure; of jobs a table, `jobs.csv`; all in JSON."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import benchmark_job_report
from experiments import benchmark_timing as timing
from experiments.benchmark_jobs import JOBS

# Names of `experiments.benchmark_workloads`, which imports JAX, and what tables call them; a test holds them together.
WORKLOADS = {
    "resnet20": "ResNet-20, CIFAR, batch 128",
    "resnet56": "ResNet-56, CIFAR, batch 128",
    "preact110": "ResNet-110 pre-activation, CIFAR, batch 128",
    "resnet50": "ResNet-50, 224x224, batch 8",
    "lstm_ptb_small": "LSTM 2x200, T=20, batch 20, 10,000 words",
    "lstm_ptb_medium": "LSTM 2x650, T=35, batch 20, 10,000 words",
    "pixel_lstm": "LSTM 130, T=784, batch 64",
    "pixel_gru": "GRU 130, T=784, batch 64",
    "adding_lstm": "LSTM 77, T=400, batch 50",
    "convlstm": "ConvLSTM 5x5 128-64-64, Moving MNIST, batch 8",
    "lenet5": "LeNet-5, MNIST, batch 128",
}
MODES = ("train", "inference")


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell's rounds say.

    Returns:
      `seconds` a step, medians by side; `torch`, the faster of PyTorch's sides, None without; `ratios`, peer -> how
      many times as fast ours is, one a round; `counted`, the number of rounds that count. Where none does, all are
      taken, and `counted` is 0.
    """
    good = timing.counted(result["rounds"])
    rounds = good or result["rounds"]
    seconds = {name: timing.median_seconds(rounds, name) for name in rounds[0]}
    torch = min((name for name in seconds if name.startswith("torch")), key=seconds.get, default=None)
    peers = {"torch": torch, "flax": "flax" if "flax" in seconds else None}
    ratios = {peer: timing.ratios(rounds, name) for peer, name in peers.items() if name}
    return {"seconds": seconds, "torch": torch, "ratios": ratios, "counted": len(good)}


def report(workdir: Path, names: list[str]) -> None:
    """Prints the tables of workloads and of jobs, writes what they show, and in `benchmark.json` all it is made of."""
    from research.analysis import results
    from research.files import write_json_atomic

    runs, written = results.read_runs(workdir / "runs" / name for name in names), []
    for is_job, write in ((False, _report_speed), (True, benchmark_job_report.report)):
        asked = [name for name in names if (name.removeprefix("tiny-") in JOBS) == is_job]
        if finished := [run for run in runs if ("job" in run.config) == is_job]:
            written += write(workdir, finished, results.unfinished(asked, finished))
    parts = ("config", "environment", "result")
    measured = {run.path.name: {part: getattr(run, part) for part in parts} for run in runs}
    write_json_atomic(workdir / "benchmark.json", measured)
    written.append(workdir / "benchmark.json")
    print(f"\nwritten: {', '.join(map(str, written))}")


def _report_speed(workdir: Path, runs: Sequence[Any], unfinished: str) -> list[Path]:
    """Writes `summary.csv` and the figure of ratios; prints the table."""
    from research.analysis import benchmark_figures, figures, tables

    found = [(run, summary(run.result)) for run in runs]
    tables.write_csv(workdir / "summary.csv", [_columns(run, numbers) for run, numbers in found])
    title = f"\nSpeed{unfinished}; ratios: how many times as fast ours is"
    print(tables.render(title, [_row(run, numbers) for run, numbers in found]))
    peaks = [run.result["peak_gigaflops_a_second"] for run in runs]
    print(f"peak: {statistics.median(peaks):.1f} GFLOP/s (a float32 matrix product in the same process)")
    disturbed = [run.path.name for run, numbers in found if not numbers["counted"]]
    if disturbed:
        print(f"no quiet round, so all were taken: {', '.join(disturbed)}")
    panels = {
        mode: {run.config["workload"]: numbers["ratios"] for run, numbers in found if run.config["mode"] == mode}
        for mode in MODES
    }
    panels = {mode: by_workload for mode, by_workload in panels.items() if any(by_workload.values())}
    written = [workdir / "summary.csv"]
    if panels:
        figure = benchmark_figures.speed_ratios(panels, {"torch": "PyTorch", "flax": "stock Flax layers"})
        written += figures.save(figure, workdir / "figures" / "benchmark", figures.provenance(runs))
    return written


def _numbers(run, numbers):
    speed = run.result["gigaflops_a_step"] / numbers["seconds"]["ours"]
    return {
        "ours": numbers["seconds"]["ours"],
        "torch": numbers["seconds"].get(numbers["torch"]),
        "flax": numbers["seconds"].get("flax"),
        "speed": speed,
        "share": speed / run.result["peak_gigaflops_a_second"],
        "ratios": {peer: statistics.median(values) for peer, values in numbers["ratios"].items()},
    }


def _row(run: Any, numbers: Mapping[str, Any]) -> dict[str, Any]:
    values = _numbers(run, numbers)

    def milliseconds(seconds):
        return "-" if seconds is None else f"{1e3 * seconds:.3g}"

    def ratio(peer):
        return f"{values['ratios'][peer]:.2f}" if peer in values["ratios"] else "-"

    tiny = " (tiny)" if run.config["tiny"] else ""
    return {
        "workload": WORKLOADS[run.config["workload"]] + tiny,
        "mode": run.config["mode"],
        "ours (ms)": milliseconds(values["ours"]),
        "examples/s": f"{run.result['batch'] / values['ours']:,.0f}",
        "GFLOP/s": f"{values['speed']:.3g}",
        "of peak": f"{values['share']:.0%}",
        "PyTorch (ms)": milliseconds(values["torch"]) + (" compiled" if numbers["torch"] == "torch.compile" else ""),
        "ratio": ratio("torch"),
        "Flax (ms)": milliseconds(values["flax"]),
        "ratio ": ratio("flax"),
        "rounds": f"{numbers['counted']} of {len(run.result['rounds'])}",
    }


def _columns(run: Any, numbers: Mapping[str, Any]) -> dict[str, Any]:
    values = _numbers(run, numbers)
    kept = ("workload", "mode", "tiny", "devices")
    return {name: run.config[name] for name in kept} | {
        "steps_per_call": run.result["steps_per_call"],
        "batch": run.result["batch"],
        "ours_seconds": values["ours"],
        "torch_seconds": numbers["seconds"].get("torch"),
        "torch_compile_seconds": numbers["seconds"].get("torch.compile"),
        "flax_seconds": values["flax"],
        "torch_ratio": values["ratios"].get("torch"),
        "flax_ratio": values["ratios"].get("flax"),
        "gigaflops_a_second": values["speed"],
        "share_of_peak": values["share"],
        "rounds": len(run.result["rounds"]),
        "rounds_counted": numbers["counted"],
    }
