"""The benchmark: its grid, whose turn it is and what is repeated (no time is measured here), equal work, the report."""

import csv
import functools
import io
import json
import re
import zlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import benchmark, benchmark_timing
from experiments import benchmark_workloads as workloads
from experiments.benchmark import EXPERIMENT, WORKLOADS, Config, cells, check, report, run, summary
from experiments.benchmark_timing import Side, counted, measure, ratios
from research.errors import CarouselError, Interrupted
from research.models.resnet import unstack_blocks
from research.training import loop, run_folder


@pytest.fixture(scope="module")
def torch_side():
    pytest.importorskip("torch", reason="torch is not installed (extra [bench])")
    from experiments import benchmark_torch

    return benchmark_torch


# The command line


def test_the_grid_is_workloads_times_modes():
    assert tuple(WORKLOADS) == workloads.NAMES
    grid = cells(Config(jobs=(), peers=("flax",)))
    assert [cell.name for cell in grid] == [f"{name}-{mode}" for name in WORKLOADS for mode in ("train", "inference")]
    (cell,) = cells(Config(jobs=(), workloads=("lenet5",), modes=("train",), peers=("flax",), tiny=True, rounds=3))
    assert (cell.name, cell.rounds, cell.peers) == ("tiny-lenet5-train", 3, ("flax",))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--workloads=resnet21", "'resnet21' is unknown; choose from resnet20"),
        ("--modes=test", "'test' is unknown; choose from train, inference"),
        ("--peers=keras", "'keras' is unknown; choose from torch, flax"),
        ("--rounds=0", "--rounds=0: give at least 1"),
        ("--repeats=-1", "--repeats=-1: give at least 0"),
        ("--seconds=-1", "--seconds=-1.0: give at least 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(refusal, tmp_path, flag, message):
    assert message in refusal(EXPERIMENT, flag, f"--workdir={tmp_path / 'work'}")
    assert not (tmp_path / "work").exists()


def test_a_missing_pytorch_is_left_out_with_a_note_unless_it_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "has_torch", lambda: True)
    (cell,) = cells(Config(jobs=(), workloads=("lenet5",), modes=("train",)))
    assert cell.peers == ("torch", "flax") and capsys.readouterr().err == ""
    check(cell)
    monkeypatch.setattr(benchmark, "has_torch", lambda: False)
    with pytest.raises(CarouselError, match="CAROUSEL_EXTRAS=test,dev,bench launch/run install"):
        check(cell)
    found = cells(Config(jobs=()))
    assert {cell.peers for cell in found} == {("flax",)}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: PyTorch is not installed") and "bench launch/run install" in line
    check(found[0])


def test_compiling_needs_a_compiler(monkeypatch):
    (cell,) = cells(Config(jobs=(), workloads=("lenet5",), modes=("train",), peers=("flax",), compile=True))
    monkeypatch.setattr(benchmark.shutil, "which", lambda name: None)
    with pytest.raises(CarouselError, match=r"needs a C\+\+ compiler"):
        check(cell)
    monkeypatch.setattr(benchmark.shutil, "which", lambda name: "/usr/bin/g++")
    check(cell)


# Whose turn it is, and what is repeated: on a clock of our own


class Machine:
    """Sides whose calls take the seconds that are said, in turn and then the last ones for ever."""

    def __init__(self, **seconds):
        self.now, self.order, self.seconds = 0.0, [], seconds

    def sides(self, steps=1):
        return {name: Side(lambda name=name: self.call(name), steps) for name in self.seconds}

    def call(self, name):
        self.order.append(name)
        script = self.seconds[name]
        self.now += script.pop(0) if len(script) > 1 else script[0]

    def measure(self, steps=1, **options):
        return measure(self.sides(steps), clock=lambda: self.now, **{"seconds": 0.0, "repeats": 0} | options)


def test_sides_take_turns():
    machine = Machine(ours=[2.0], torch=[3.0], flax=[8.0])
    found = machine.measure(rounds=2)
    assert found == [{"ours": 2.0, "torch": 3.0, "flax": 8.0}] * 2
    # Before each time a call that is not counted.
    assert machine.order == ["ours", "ours", "torch", "torch", "flax", "flax"] * 2


def test_a_side_runs_for_the_seconds_asked_for_and_counts_per_step():
    machine = Machine(ours=[0.5], torch=[3.0])
    found = machine.measure(steps=5, rounds=1, seconds=2.0)
    assert found == [{"ours": 0.1, "torch": 0.6}]
    assert machine.order == ["ours"] * (1 + 4) + ["torch"] * 2


def test_a_round_below_half_of_the_best_is_repeated():
    # Calls come in pairs, the first of which is not counted: torch takes 1, then 2.5 (disturbed), then 1.25.
    machine = Machine(ours=[1.0], torch=[1.0, 1.0, 1.0, 2.5, 1.25])
    found = machine.measure(rounds=3, repeats=4)
    assert [each["torch"] for each in found] == [1.0, 2.5, 1.25, 1.25]
    assert [each["torch"] for each in counted(found)] == [1.0, 1.25, 1.25]
    assert Machine(ours=[1.0], torch=[1.0, 1.0, 1.0, 2.0]).measure(rounds=2, repeats=9)[1]["torch"] == 2.0  # just half


def test_repeats_are_bounded_and_the_first_round_may_be_the_disturbed_one():
    slowing = [1.0, 1.0, *[5.0] * 100]
    found = Machine(ours=[1.0], torch=slowing).measure(rounds=3, repeats=2)
    assert len(found) == 5 and len(counted(found)) == 1
    found = Machine(ours=[9.0, 9.0, 1.0], torch=[1.0]).measure(rounds=2, repeats=2)
    assert [each["ours"] for each in found] == [9.0, 1.0, 1.0]
    assert counted([]) == []
    assert counted([{"a": 1.0, "b": 9.0}, {"a": 9.0, "b": 1.0}]) == []


def test_a_request_to_stop_is_heard_between_rounds():
    def stop():
        raise Interrupted("stopped")

    machine = Machine(ours=[1.0])
    with pytest.raises(Interrupted):
        machine.measure(rounds=3, between=stop)
    assert len(machine.order) == 2


def test_medians_and_ratios_are_of_rounds():
    rounds = [{"ours": 1.0, "flax": 3.0}, {"ours": 2.0, "flax": 2.0}, {"ours": 1.5, "flax": 3.0}]
    assert benchmark_timing.median_seconds(rounds, "ours") == 1.5
    assert ratios(rounds, "flax") == [3.0, 1.0, 2.0]


def test_the_faster_pytorch_counts_and_disturbed_rounds_do_not():
    rounds = [{"ours": 1.0, "torch": 3.0, "torch.compile": 2.0}] * 3 + [{"ours": 9.0, "torch": 3.0, "torch.compile": 2}]
    numbers = summary({"rounds": rounds})
    assert numbers["torch"] == "torch.compile" and numbers["counted"] == 3
    assert numbers["ratios"] == {"torch": [2.0] * 3} and numbers["seconds"]["ours"] == 1.0
    numbers = summary({"rounds": [{"ours": 1.0, "flax": 9.0}, {"ours": 9.0, "flax": 1.0}]})
    assert numbers["torch"] is None and numbers["counted"] == 0 and numbers["ratios"] == {"flax": [9.0, 1 / 9]}


# Equal work


# Parameters of our side at full size; published are those of ResNet-50, ConvLSTM and LeNet-5.
PARAMETERS = {
    "resnet20": 269_722,
    "resnet56": 853_018,
    "preact110": 1_727_962,
    "resnet50": 25_557_032,
    "lstm_ptb_small": 4_651_600,
    "lstm_ptb_medium": 19_775_200,
    "pixel_lstm": 69_950,
    "pixel_gru": 52_920,
    "adding_lstm": 24_718,
    "convlstm": 7_585_296,
    "lenet5": 61_706,
}
# Units of recurrent layers, for which PyTorch has a second bias: of 4 gates, of GRU 2 that ours has not.
TWO_BIASES = {
    "lstm_ptb_small": 2 * 4 * 200,
    "lstm_ptb_medium": 2 * 4 * 650,
    "pixel_lstm": 4 * 130,
    "pixel_gru": 2 * 130,
    "adding_lstm": 4 * 77,
}


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("name", WORKLOADS)
def test_our_parameters_and_flaxs_are_as_many(name):
    work = workloads.workload(name)
    assert count(work.shapes()) == PARAMETERS[name]
    assert work.stock is None or count(work.shapes(work.stock)) == PARAMETERS[name]
    assert (work.stock is None) == (name == "convlstm")


@pytest.mark.parametrize("name", WORKLOADS)
def test_pytorchs_parameters_are_as_many(name, torch_side):
    assert torch_side.parameters(workloads.workload(name)) == PARAMETERS[name] + TWO_BIASES.get(name, 0)


@pytest.mark.parametrize(
    ("name", "multiply_adds"),
    [
        ("resnet20", 128 * 40_551_040),
        ("resnet50", 8 * 4_089_184_256),
        ("lstm_ptb_medium", 20 * 35 * (2 * 8 * 650**2 + 650 * 10_000)),
        ("pixel_gru", 64 * (784 * 3 * 130 * (1 + 130) + 10 * 130)),
        ("lenet5", 128 * (28 * 28 * 25 * 6 + 100 * 25 * 6 * 16 + 400 * 120 + 120 * 84 + 840)),
    ],
)
def test_multiply_adds_are_the_published_ones(name, multiply_adds):
    assert workloads.workload(name).multiply_adds() == multiply_adds


@pytest.fixture
def drawn(monkeypatch):
    """Parameters none of which is zero, peepholes and biases included, and nothing to compile for them."""
    original = workloads.Workload.initial

    def draw(path, shape):
        name = jax.tree_util.keystr(path)
        if ".params" in name:
            random = np.random.default_rng(zlib.crc32(name.encode()))
            return np.float32(0.3 * random.standard_normal(shape.shape) + ("scale" in name))
        return np.full(shape.shape, "var" in name, shape.dtype)  # averages of BatchNorm, momenta, the step

    def initial(self, *arguments):
        return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: original(self, *arguments)))

    monkeypatch.setattr(workloads.Workload, "initial", initial)


@pytest.mark.parametrize("name", ["resnet20", "pixel_lstm", "pixel_gru", "lstm_ptb_small", "convlstm"])
def test_our_step_and_pytorchs_have_the_same_losses(name, torch_side, drawn, quick_compilation):
    work = workloads.workload(name, tiny=True)
    options = {"steps": 3, "learning_rate": 1e-3 if name == "convlstm" else 0.05}
    ours = workloads.ours(work, "train", **options)
    theirs = torch_side.side(work, "train", threads=2, **options)
    losses = np.ravel(ours.call())
    expected = [theirs.call() for _ in range(ours.steps)]
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-5)
    if name not in TWO_BIASES:  # two biases learn twice as fast as one
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert np.ptp(losses) > 1e-3  # other batches
    assert ours.steps == 3 and theirs.steps == 1


@pytest.mark.parametrize("name", ["preact110", "resnet50", "lenet5", "adding_lstm"])
def test_our_outputs_are_pytorchs(name, torch_side, drawn, quick_compilation):
    work = workloads.workload(name, tiny=True)
    ours = workloads.ours(work, "inference", steps=2).call()
    theirs = torch_side.side(work, "inference", steps=2, threads=2).call()
    assert ours.shape == theirs.shape
    assert benchmark.relative_difference(theirs, ours) < 1e-5


def test_stock_layers_compute_the_same_network(drawn, quick_compilation):
    """With our weights, unit by unit: projections, pooling and pre-activation are in these two."""
    for name in ("resnet50", "preact110"):
        work = workloads.workload(name, tiny=True)
        variables, theirs = work.variables(), {}
        for collection, values in variables.items():
            units = {f"unit{number}": unit for number, unit in enumerate(unstack_blocks(values), start=1)}
            theirs[collection] = {key: v for key, v in values.items() if not key.startswith("stage")} | units
        x = np.random.default_rng(0).standard_normal((2, *work.arrays["images"].shape[1:])).astype(np.float32)
        stock = jax.jit(functools.partial(work.stock.apply, train=False))(theirs, x)
        ours = jax.jit(functools.partial(work.model().apply, train=False))(variables, x)
        assert benchmark.relative_difference(stock, ours) < 1e-5


def test_stock_and_our_lenet_take_the_same_steps(drawn, quick_compilation):
    work = workloads.workload("lenet5", tiny=True)
    ours, flax = (make(work, "train", steps=3, learning_rate=0.05) for make in (workloads.ours, workloads.flax))
    np.testing.assert_allclose(ours.call(), [flax.call() for _ in range(3)], rtol=1e-4)


# From a command to its files


def table(out):
    lines = out.split("how many times as fast ours is\n")[1].split("\npeak: ")[0].splitlines()
    names, *rows = (re.split("  +", line.strip()) for line in lines)
    return [dict(zip(range(len(row)), row, strict=True)) for row in rows], names


def test_a_whole_command(command, tmp_path, capsys, quick_compilation):
    work = tmp_path / "work"
    assert command(EXPERIMENT, "--smoke", "--jobs=", "--workloads=pixel_gru", "--modes=train", f"--workdir={work}") == 0
    out, err = capsys.readouterr()
    assert "[1/1] tiny-pixel_gru-train: " in err and " of 2 rounds count" in err
    result = json.loads((work / "runs" / "tiny-pixel_gru-train" / "result.json").read_text())
    sides = ["ours", "torch", "flax"] if benchmark.has_torch() else ["ours", "flax"]
    assert result["sides"] == sides and [set(each) for each in result["rounds"]] == [set(sides)] * 2
    assert all(seconds > 0 for each in result["rounds"] for seconds in each.values())
    assert set(result["first_call_seconds"]) == set(sides) and result["batch"] == 3
    assert result["gigaflops_a_step"] == pytest.approx(6e-9 * 3 * (9 * 3 * 4 * 5 + 40))
    assert result["peak_gigaflops_a_second"] > 0
    assert all(difference < 1e-5 for difference in result["first_result_difference"].values())
    (row,), _ = table(out)
    assert row[0] == f"{WORKLOADS['pixel_gru']} (tiny)" and row[1] == "train"
    assert {path.name for path in (work / "figures").iterdir()} == {"benchmark.png", "benchmark.svg"}
    assert (work / "runs" / "tiny-pixel_gru-train" / "environment.json").exists()


def run_with(monkeypatch, tmp_path, first, stop=lambda: False):
    """`benchmark.run` with sides of our own, by their results, and a work of which only the count is asked."""

    def result(value):
        if isinstance(value, Exception):
            raise value
        return np.array(value)

    (cell,) = cells(
        Config(jobs=(), workloads=("lenet5",), modes=("inference",), peers=("flax",), rounds=1, seconds=0.0)
    )
    fakes = {name: Side(lambda value=value: result(value), 1) for name, value in first.items()}
    made = {name: (lambda side=side: side) for name, side in fakes.items()} | {"flax": lambda: None}
    monkeypatch.setattr(benchmark, "builders", lambda cell, work, steps: made)
    monkeypatch.setattr(benchmark, "matmul_peak", lambda size: 100.0)
    monkeypatch.setattr(
        workloads, "workload", lambda name, tiny: SimpleNamespace(batch=4, multiply_adds=lambda: 500_000_000)
    )
    with run_folder.open_run(tmp_path / "run", {}) as folder:
        return run(cell, loop.Context(folder, "[1/1]", SimpleNamespace(note=lambda text: None), stop, ("bench",)))


def test_unequal_work_is_not_compared(monkeypatch, tmp_path):
    result = run_with(monkeypatch, tmp_path, {"ours": [1.0, 2.0], "torch": [1.001, 2.0], "torch.compile": [1.0, 2.0]})
    assert result["first_result_difference"] == {"torch": pytest.approx(0.001 / 5**0.5), "torch.compile": 0}
    assert result["gigaflops_a_step"] == 1.0 and "flax" not in result["rounds"][0]  # there is none of it
    for wrong in ([1.1, 2.0], [float("nan"), 2.0]):
        with pytest.raises(CarouselError, match="unequal work is not compared"):
            run_with(monkeypatch, tmp_path, {"ours": [1.0, 2.0], "torch": wrong})


def test_a_failure_of_torchs_compiler_is_one_line_and_of_another_side_is_not(monkeypatch, tmp_path):
    failure = RuntimeError("g++ says no\nand more")
    with pytest.raises(CarouselError, match=r"^torch.compile failed \(g\+\+ says no\): leave --compile out$"):
        run_with(monkeypatch, tmp_path, {"ours": [1.0], "torch": [1.0], "torch.compile": failure})
    with pytest.raises(RuntimeError, match="says no"):
        run_with(monkeypatch, tmp_path, {"ours": [1.0], "torch": failure})
    asked = iter([False, False, True])  # before each side is built, and then by its failure
    with pytest.raises(Interrupted):
        run_with(monkeypatch, tmp_path, {"ours": [1.0], "torch.compile": failure}, stop=lambda: next(asked))


# The report, from run folders made by hand


def by_hand(finished, workdir):
    """ResNet-20: ours twice as fast as PyTorch, compiled; a ConvLSTM without Flax, of which no round counts."""
    sides = {"ours": 0.25, "torch": 0.75, "torch.compile": 0.5, "flax": 1.0}
    quiet = [{name: seconds * factor for name, seconds in sides.items()} for factor in (1.0, 1.2, 1.1)]
    noisy = [{"ours": 1.0, "torch": 9.0}, {"ours": 9.0, "torch": 1.0}]
    same = {"batch": 128, "peak_gigaflops_a_second": 160.0, "gigaflops_a_step": 22.0, "steps_per_call": 5}
    chosen = cells(Config(jobs=(), workloads=("resnet20", "convlstm"), modes=("train",), peers=("torch", "flax")))
    for cell, rounds in zip(chosen, (quiet + [sides | {"flax": 3.0}], noisy), strict=True):
        finished(workdir, cell, {"rounds": rounds} | same)
    return [cell.name for cell in chosen]


def test_a_table_by_hand_and_the_same_figure_twice(finished, tmp_path, capsys):
    names = by_hand(finished, tmp_path)
    report(tmp_path, names)
    out = capsys.readouterr().out
    rows, heads = table(out)
    assert heads[:3] == ["workload", "mode", "ours (ms)"]
    assert list(rows[0].values()) == [
        *("ResNet-20, CIFAR, batch 128", "train", "275", "465", "80", "50%"),
        *("550 compiled", "2.00", "1.1e+03", "4.00", "3 of 4"),
    ]
    assert list(rows[1].values())[6:] == ["5e+03", "4.56", "-", "-", "0 of 2"]
    assert "peak: 160.0 GFLOP/s" in out and "no quiet round, so all were taken: convlstm-train\n" in out
    first, second = csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text()))
    assert float(first["torch_compile_seconds"]) == pytest.approx(0.55) and first["rounds_counted"] == "3"
    assert second["flax_seconds"] == second["flax_ratio"] == second["torch_compile_seconds"] == ""
    files = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    report(tmp_path, names)
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == files


def test_without_peers_there_is_no_figure(finished, tmp_path, capsys):
    (cell,) = cells(Config(jobs=(), workloads=("lenet5",), modes=("train",), peers=("flax",)))
    rounds = {"rounds": [{"ours": 0.004}]}
    finished(
        tmp_path,
        cell,
        rounds | {"batch": 8, "peak_gigaflops_a_second": 1.0, "gigaflops_a_step": 0.001, "steps_per_call": 5},
    )
    report(tmp_path, [cell.name])
    rows, _ = table(capsys.readouterr().out)
    assert list(rows[0].values())[2:] == ["4", "2,000", "0.25", "25%", "-", "-", "-", "-", "1 of 1"]
    assert not (tmp_path / "figures").exists()
