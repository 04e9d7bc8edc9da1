"""Scaling curves: the grid, the processes and their devices, one whole command, the report from folders by hand."""

import csv
import io
import json
import os
import re
import signal
from types import SimpleNamespace

import pytest

from experiments import benchmark_workloads as workloads
from experiments import scaling, scaling_worker
from experiments.scaling import EXPERIMENT, Cell, Config, cells, check_equal_work
from experiments.scaling_report import points, report
from research.errors import CarouselError, Interrupted
from research.training import loop, run_folder

MIB = 2**20


# The command line


def test_the_grid_is_a_cell_a_curve():
    grid = cells(Config())
    assert [(cell.axis, cell.values) for cell in grid] == [
        ("devices", (1, 2, 4, 8)),
        ("depth", (20, 56, 110)),
        ("width", (8, 16, 32, 64)),
        ("time", (100, 200, 400, 800, 1600)),
    ]
    images = {"depth": 20, "width": 16, "size": 32, "batch": 128}
    devices, depth, width, time = grid
    assert [cell.point(cell.values[1])["sizes"] for cell in grid] == [
        images,
        images | {"depth": 56},
        images | {"width": 16},
        {"units": 77, "batch": 50, "time": 200},
    ]
    assert devices.point(4) == {"network": "cifar", "sizes": images, "devices": 4, "steps": 2}
    assert {cell.point(8)["devices"] for cell in (depth, width, time)} == {1}
    assert {cell.point(8)["network"] for cell in (depth, width)} == {"cifar"}
    assert time.point(8)["network"] == "adding"
    assert devices.name == "devices-1.2.4.8-depth20-width16-size32-batch128"
    (turned,) = cells(Config(axes=("time",), lengths=(8, 4)))
    assert turned.values == (4, 8)
    changes = ({"base_depth": 8}, {"base_width": 8}, {"batch_size": 64}, {"image_size": 8}, {"device_counts": (1, 2)})
    names = {cells(Config(**change))[0].name for change in changes}
    assert len(names | {devices.name}) == 6


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--axes=height", "'height' is unknown; choose from devices, depth, width, time"),
        ("--depths=20,21", "depth 21 is not 6n+2 (three stages of n blocks of two layers): try 20 or 26"),
        ("--base_depth=9", "depth 9 is not 6n+2"),
        ("--device_counts=1,3", "--batch_size=128 does not divide by 3 devices: give a multiple"),
        ("--device_counts=0", "--device_counts=0: give at least 1"),
        ("--widths=0", "--widths=0: give at least 1"),
        ("--lengths=4,4", "--lengths=4,4 names a value twice"),
        ("--rounds=0", "--rounds=0: give at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(refusal, tmp_path, flag, message):
    assert message in refusal(EXPERIMENT, flag, f"--workdir={tmp_path / 'work'}")
    assert not (tmp_path / "work").exists()


# The processes


@pytest.mark.parametrize(
    ("given", "devices", "threads"), [("2", 1, "2"), ("2", 2, "8"), ("2", 8, "32"), ("64", 8, "64"), ("1", 1, "1")]
)
def test_a_process_is_told_its_devices_and_threads(monkeypatch, given, devices, threads):
    monkeypatch.setenv("NPROC", given)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    found = scaling_worker.environment(devices, "/cache")
    assert (found["JAX_NUM_CPU_DEVICES"], found["NPROC"]) == (str(devices), threads)
    assert found["JAX_PLATFORMS"] == "cpu" and found["JAX_COMPILATION_CACHE_DIR"] == "/cache"
    assert found["PYTHONPATH"].endswith(f"{os.pathsep}/elsewhere")
    assert "JAX_COMPILATION_CACHE_DIR" not in scaling_worker.environment(1, None).keys() - os.environ.keys()


TINY = {"network": "cifar", "sizes": {"depth": 8, "width": 2, "size": 8, "batch": 4}, "steps": 2}


@pytest.fixture
def process(commands, monkeypatch):
    """`(**of the point) -> the context of its process`, in the surroundings that tests start processes in."""
    for name, value in commands.environment.items():
        monkeypatch.setenv(name, value)
    return lambda **point: scaling_worker.start("this point", TINY | point, str(commands.cache))


def test_devices_reach_the_process_and_share_the_batch(process):
    with process(devices=1) as one, process(devices=2) as two:
        alone, shared = one.found(), two.found()
        two.call()
        two.call()
    assert (alone["devices"], shared["devices"]) == (1, 2)
    assert (alone["threads"], shared["threads"]) == (2, 8)
    assert shared["temporary_bytes"] < 0.8 * alone["temporary_bytes"]  # each has half of the images
    assert shared["first_losses"] == pytest.approx(alone["first_losses"], rel=1e-5)  # BatchNorm is synchronised
    same = ("batch", "params", "multiply_adds")
    assert [alone[name] for name in same] == [shared[name] for name in same]
    assert alone["batch"] == 4 and alone["params"] == 1_356 and len(alone["first_losses"]) == 2


def test_a_process_that_ends_is_one_line_and_one_that_is_left_is_ended(process):
    with (
        pytest.raises(
            CarouselError, match=r"^this point: its process ended with 1 \(.*depth 9 is not 6n\+2.*value out$"
        ),
        process(devices=1, sizes=TINY["sizes"] | {"depth": 9}) as worker,
    ):
        worker.found()
    with process(devices=1) as worker:
        pid = worker._process.pid
        worker.found()
        os.kill(pid, signal.SIGKILL)
        worker._process.wait()  # so that writing to it fails too
        with pytest.raises(CarouselError, match=r"ended with -9 \(.*\); too little memory\?: leave that value out"):
            worker.call()
    with process(devices=1) as worker:
        pid = worker._process.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_step_of_longer_sequences_needs_more_memory(quick_compilation):
    found = {}
    for time in (20, 40, 80):
        work = workloads.adding(batch=3, time=time, units=8)
        _, compiled = workloads.training(work, steps=1)
        found[time] = compiled.memory
        # Of every sequence the data hold a pair of numbers a step, besides weights and momenta.
        weights = 2 * 4 * (4 * 8 * (2 + 8) + 4 * 8 + 8 + 1)
        assert found[time]["argument_bytes"] == pytest.approx(weights + 4 * 2 * 3 * (2 * time + 1), abs=100)
        assert work.multiply_adds() == 3 * (time * 4 * 8 * (2 + 8) + 8)
    growth = [found[2 * time]["temporary_bytes"] - found[time]["temporary_bytes"] for time in (20, 40)]
    assert growth[1] == pytest.approx(2 * growth[0], rel=0.1)
    # The backward pass needs at least the state and the four gates of every step.
    assert growth[0] > 20 * 3 * 4 * (5 * 8)


# From a command to its files


def test_a_whole_command(commands, tmp_path):
    flags = ("--smoke", "--axes=devices,time", "--lengths=4", f"--workdir={tmp_path}")
    done = commands.run(*flags, experiment="scaling")
    assert done.returncode == 0, done.stderr
    names = ["devices-1.2-depth8-width2-size8-batch4", "time-4-units4-batch3"]
    for number, (name, line) in enumerate(zip(names, done.stderr.splitlines(), strict=True), start=1):
        assert re.fullmatch(rf"\[{number}/2\] {name}: [\d.,]+(, [\d.,]+)? examples/s; \d of 2 rounds count", line)
    result = json.loads((tmp_path / "runs" / names[0] / "result.json").read_text())
    assert {name: point["devices"] for name, point in result["points"].items()} == {"1": 1, "2": 2}
    assert [set(each) for each in result["rounds"]] == [{"1", "2"}] * 2
    assert all(seconds > 0 for each in result["rounds"] for seconds in each.values())
    environment = json.loads((tmp_path / "runs" / names[0] / "environment.json").read_text())
    assert environment["devices"]["platform"] == "cpu" and result["cores"] == environment["cpu"]["usable_cores"]
    figures = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert figures.keys() == {f"scaling_{axis}.{kind}" for axis in ("devices", "time") for kind in ("png", "svg")}
    again = commands.run(*flags, "--report_only", experiment="scaling")
    assert again.returncode == 0 and again.stdout == done.stdout and again.stderr == ""
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == figures


def run_with(monkeypatch, tmp_path, found, stop=lambda: False):
    """`scaling.run` of a devices curve over processes that are none; says what they were told to be."""
    started, calls = [], []

    class Fake:
        def __init__(self, name, point, cache):
            self.name, self.point = name, point

        def __enter__(self):
            started.append((self.name, self.point["devices"]))
            return self

        def __exit__(self, *exception):
            started.remove((self.name, self.point["devices"]))

        def found(self):
            return found[self.point["devices"]]

        def call(self):
            assert len(started) == 2  # all of them wait for their turn
            calls.append(self.point["devices"])

    monkeypatch.setattr(scaling_worker, "start", Fake)
    (cell,) = cells(Config(axes=("devices",), device_counts=(1, 2), rounds=2, seconds=0.0, repeats=0))
    with run_folder.open_run(tmp_path / "run", {}) as folder:
        try:
            context = loop.Context(folder, "[1/1]", SimpleNamespace(note=lambda text: None), stop, ("scaling",))
            return scaling.run(cell, context), calls
        finally:
            assert not started


def facts(**changes):
    return {"devices": 1, "threads": 2, "batch": 8, "params": 5, "multiply_adds": 10, "first_losses": [2.0, 1.0]} | {
        "temporary_bytes": 3 * MIB,
        "argument_bytes": MIB,
        **changes,
    }


def test_points_take_turns(monkeypatch, tmp_path):
    result, calls = run_with(monkeypatch, tmp_path, {1: facts(), 2: facts(devices=2)})
    assert calls == [1, 1, 2, 2] * 2  # before each time a call that is not counted
    assert result["points"]["2"]["devices"] == 2 and len(result["rounds"]) == 2 and result["cores"] >= 1


def test_other_losses_are_not_compared_and_a_request_to_stop_is_heard(monkeypatch, tmp_path):
    with pytest.raises(CarouselError, match=r"losses on 2 devices differ from those on 1 by 0.01 .*--device_counts"):
        run_with(monkeypatch, tmp_path, {1: facts(), 2: facts(first_losses=[2.0, 1.01])})
    with pytest.raises(CarouselError, match="by nan"):
        check_equal_work({"1": facts(), "4": facts(first_losses=[float("nan"), 1.0])})
    check_equal_work({"1": facts(), "4": facts(first_losses=[2.0001, 1.0])})
    with pytest.raises(Interrupted, match="the same command measures it again"):
        run_with(monkeypatch, tmp_path, {1: facts(), 2: facts()}, stop=lambda: True)
    asked = iter([False, False, True])  # when each process has been built, and after the first round
    with pytest.raises(Interrupted):
        run_with(monkeypatch, tmp_path, {1: facts(), 2: facts()}, stop=lambda: next(asked))


# The report, from run folders made by hand


def depth_result(slow=1.0):
    """Depth 20 and 56, batch 8: 0.5 s and 2 s a step in the middle; one round is disturbed."""
    rounds = [{"20": 0.5 * slow, "56": 2.0}, {"20": 0.4 * slow, "56": 1.6}, {"20": 0.8 * slow, "56": 2.5}]
    disturbed = {"20": 0.5 * slow, "56": 99.0}
    shallow = facts(multiply_adds=10**9, params=1_000)
    deep = facts(multiply_adds=3 * 10**9, params=2_000, temporary_bytes=10 * MIB, argument_bytes=2 * MIB)
    return {"rounds": [*rounds, disturbed], "points": {"56": deep, "20": shallow}, "cores": 2}


def test_points_by_hand():
    shallow, deep = points("depth", depth_result())
    assert (shallow.value, deep.value) == (20, 56)
    assert (shallow.seconds_a_step, deep.seconds_a_step) == (0.5, 2.0)
    assert (shallow.examples_a_second, shallow.least, shallow.most) == (16.0, 10.0, 20.0)
    assert (deep.examples_a_second, deep.least, deep.most) == (4.0, 3.2, 5.0)
    assert (shallow.reference, deep.reference) == (16.0, pytest.approx(16 / 3))  # three times the work
    assert (shallow.gigaflops_a_second, deep.gigaflops_a_second) == (pytest.approx(12.0), pytest.approx(9.0))
    assert (shallow.bytes, deep.bytes) == (4 * MIB, 12 * MIB)
    # As result.json has them, sorted by name.
    two, many = points(
        "devices",
        {"rounds": [{"16": 0.5, "2": 1.0}], "points": {"16": facts(devices=16), "2": facts(devices=2, threads=8)}},
    )
    assert (two.examples_a_second, two.reference, many.examples_a_second, many.reference) == (8.0, 8.0, 16.0, 64.0)
    assert (two.threads, many.devices) == (8, 16)
    # Where no round counts, all do.
    noisy = {"rounds": [{"1": 1.0, "2": 9.0}, {"1": 9.0, "2": 1.0}], "points": {"1": facts(), "2": facts(devices=2)}}
    assert [point.seconds_a_step for point in points("devices", noisy)] == [5.0, 5.0]


def by_hand(finished, workdir):
    depth, devices = cells(Config(axes=("depth", "devices"), depths=(20, 56), device_counts=(1,), batch_size=8))
    finished(workdir, depth, depth_result())
    finished(workdir, devices, {"rounds": [{"1": 0.004}], "points": {"1": facts()}, "cores": None})
    return [depth.name, devices.name]


def table(out, title):
    lines = out.split(f"\n{title}\n")[1].split("\nrounds that count: ")[0].splitlines()
    names, *rows = (re.split("  +", line.strip()) for line in lines)
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_a_table_by_hand_and_the_same_files_twice(finished, tmp_path, capsys):
    names = by_hand(finished, tmp_path)
    report(tmp_path, names)
    out = capsys.readouterr().out
    first, second = table(out, "CIFAR ResNet, width 16, 32x32, batch 8: layers")
    assert first == {
        "layers": "20",
        "parameters": "1,000",
        "ms/step": "500",
        "images/s": "16",
        "least to most": "10 to 20",
        "GFLOP/s": "12",
        "of reference": "100%",
        "MiB per device": "4",
        "temporaries": "3",
        "arguments": "1",
    }
    assert list(second.values()) == ["56", "2,000", "2,000", "4", "3.2 to 5", "9", "75%", "12", "10", "2"]
    assert "\nrounds that count: 3 of 4\n" in out
    # log(1/4), log(1/3) and log 3 over log(56/20)
    powers = "images/s grow as depth to the power -1.35 (reference -1.07), memory per device as depth to the power 1.07"
    assert f"\n{powers}\n" in out and out.count("to the power") == 2  # one point has no growth
    (alone,) = table(out, "CIFAR ResNet-20, width 16, 32x32, batch 8: virtual CPU devices")
    assert (alone["ms/step"], alone["images/s"]) == ("4", "2,000")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert [(row["axis"], row["value"], row["devices"]) for row in rows] == [
        ("depth", "20", "1"),
        ("depth", "56", "1"),
        ("devices", "1", "1"),
    ]
    assert rows[1]["bytes"] == str(12 * MIB) and float(rows[1]["least"]) == 3.2 and rows[1]["rounds_counted"] == "3"
    files = {path: path.read_bytes() for path in [*(tmp_path / "figures").iterdir(), tmp_path / "summary.csv"]}
    assert len(files) == 5
    assert b"launch/run by hand" in files[tmp_path / "figures" / "scaling_depth.svg"]  # provenance
    report(tmp_path, names)
    assert {path: path.read_bytes() for path in files} == files


def test_sequences_and_unfinished_curves_are_named(finished, tmp_path, capsys):
    (cell,) = cells(Config(axes=("time",), lengths=(4, 8), units=3, sequence_batch_size=8))
    rounds = [{"4": 1.0, "8": 9.0}, {"4": 9.0, "8": 1.0}]
    finished(tmp_path, cell, {"rounds": rounds, "points": {"4": facts(), "8": facts(multiply_adds=20)}, "cores": 2})
    report(tmp_path, [cell.name, "devices-1"])
    out = capsys.readouterr().out
    found = table(out, "LSTM of 3 units, batch 8: steps of a sequence, T")
    assert [row["sequences/s"] for row in found] == ["1.6", "1.6"]
    assert "rounds that count: 0 of 2, so all were taken\n" in out
    assert out.endswith("(1 of 2 cells are not finished)\n")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"scaling_time.png", "scaling_time.svg"}


def test_cells_are_what_folders_hold():
    (cell,) = cells(Config(axes=("width",), widths=(4,)))
    assert isinstance(cell, Cell) and json.loads(json.dumps(cell.sizes)) == {"depth": 20, "size": 32, "batch": 128}
