"""The benchmark's jobs: their grid, processes (of a package of our own, that wait for nothing), clocks, the report."""

import csv
import io
import json
import os
import re
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import benchmark_job_report, benchmark_jobs, benchmark_worker
from experiments.benchmark import EXPERIMENT, Config, cells, check, report
from experiments.benchmark_jobs import JOBS, Job, Starter, run
from research.data import images
from research.errors import CarouselError, Interrupted
from research.models import cifar_resnet
from research.training import loop, parallel, progress, run_folder

# The command line


def test_jobs_come_after_workloads_and_either_can_be_left_out():
    grid = cells(Config(workloads=("lenet5",), modes=("train",), peers=("torch",), job_rounds=2, tiny=True))
    assert [cell.name for cell in grid] == ["tiny-lenet5-train", *(f"tiny-{job}" for job in JOBS)]
    assert [cell.torch for cell in grid[1:]] == [True, False, False, False]
    assert {cell.rounds for cell in grid[1:]} == {2}
    assert [cell.name for cell in cells(Config(workloads=(), jobs=("host",), peers=("flax",)))] == ["host"]
    assert not cells(Config(workloads=(), jobs=("startup",), peers=("flax",)))[0].torch


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--jobs=start"], "'start' is unknown; choose from startup, whole_job, compile, host"),
        (["--jobs=", "--workloads="], "leaves nothing to measure"),
        (["--jobs=host,host"], "names a value twice"),
        (["--job_rounds=0"], "--job_rounds=0: give at least 1"),
        (["--modes="], "--modes= is empty"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(refusal, tmp_path, flags, message):
    assert message in refusal(EXPERIMENT, *flags, f"--workdir={tmp_path / 'work'}")


def test_a_start_of_a_pytorch_that_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr("experiments.benchmark.has_torch", lambda: False)
    check(Job("startup", 1, 0, torch=False, tiny=True))
    with pytest.raises(CarouselError, match="--peers=torch needs PyTorch"):
        check(Job("startup", 1, 0, torch=True, tiny=True))


# Processes


@pytest.fixture
def modules(monkeypatch, tmp_path):
    """`name -> source`: modules of a package `experiments` that takes the place of ours."""
    folder = tmp_path / "root" / "experiments"
    folder.mkdir(parents=True)
    monkeypatch.setattr(benchmark_jobs, "_ROOT", folder.parent)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return lambda name, source: (folder / f"{name}.py").write_text(source)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


WAITING = "import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(0.3)\n"


def test_a_process_is_timed_until_it_says_so_and_then_killed(modules, tmp_path):
    modules("late", WAITING + "print('... there ...', flush=True)\ntime.sleep(60)")
    begin = time.monotonic()
    seconds, output = Starter(tmp_path).seconds("late", until="there")
    assert 0.3 <= seconds <= time.monotonic() - begin < 30 and not alive(int(output.split()[1]))


def test_a_process_is_timed_to_its_end_both_streams_read(modules, tmp_path):
    modules("ends", WAITING + "import sys\nprint('of', sys.argv[1:], file=sys.stderr)")
    seconds, output = Starter(tmp_path).seconds("ends", "a", 2)
    assert 0.3 <= seconds < 30 and output.endswith("of ['a', '2']\n")


@pytest.mark.parametrize("source", ["print('why')\nraise SystemExit(3)", "print('why')"])
def test_a_process_that_fails_or_never_says_so_is_one_line(modules, tmp_path, source):
    modules("fails", source)
    with pytest.raises(CarouselError, match=r"failed \(-m experiments.fails first\): why$"):
        Starter(tmp_path).seconds("fails", "first", until="there")
    if "raise" in source:
        with pytest.raises(CarouselError, match="why"):
            Starter(tmp_path).seconds("fails", "first")


def test_a_request_to_stop_ends_the_process(modules, tmp_path):
    modules(
        "waits", f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()))\n{WAITING}time.sleep(60)"
    )
    begin = time.monotonic()
    with pytest.raises(Interrupted, match="the same command measures it again"):
        Starter(tmp_path, lambda: (tmp_path / "pid").exists()).seconds("waits")
    assert time.monotonic() - begin < 30 and not alive(int((tmp_path / "pid").read_text()))


def test_processes_see_neither_the_users_cache_nor_a_terminal(modules, tmp_path, monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "FORCE_COLOR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NPROC", "7")
    modules(
        "tells", "import os\nprint([os.environ.get(n) for n in ('JAX_COMPILATION_CACHE_DIR', 'FORCE_COLOR', 'NPROC')])"
    )
    assert Starter(tmp_path).seconds("tells")[1] == "[None, None, '7']\n"


def run_job(tmp_path, job):
    """The result of `run` and the notes."""
    notes = []
    reporter = SimpleNamespace(note=notes.append)
    with run_folder.open_run(tmp_path / "run", {}) as folder:
        result = run(job, loop.Context(folder, "[1/1]", reporter, lambda: False, ("bench",)))
    assert (tmp_path / "run" / "environment.json").exists() and not (tmp_path / "run" / "scratch").exists()
    return result, notes


# Tells of its folders before it trains, compiles something, and says what the reporter says of the first step.
TRAINING = """
import json, pathlib, sys
flags = dict(word.removeprefix("--").split("=") for word in sys.argv[1:] if "=" in word)
work, cache = pathlib.Path(flags["workdir"]), pathlib.Path(flags["compilation_cache"])
with open({log!r}, "a") as log:
    log.write(json.dumps([flags.get("depths"), work.exists(), cache.exists()]) + chr(10))
work.mkdir()
cache.mkdir(exist_ok=True)
print("[1/1] x  step 1/1  loss 1", flush=True)
"""


@pytest.mark.parametrize(
    ("job", "processes", "depth"),
    [("startup", ["cold", "second", "baseline", "torch"], "20"), ("whole_job", ["cold", "second"], None)],
)
def test_every_round_begins_with_nothing_compiled(modules, tmp_path, job, processes, depth):
    log = tmp_path / "log"
    modules("depth_ablation", TRAINING.format(log=str(log)))
    for name in ("benchmark_worker", "benchmark_torch_start"):
        modules(name, "import time\nprint('carousel: ready', flush=True)\ntime.sleep(60)")
    (tmp_path / "run" / "scratch" / "compiled").mkdir(parents=True)  # left by one that was killed
    result, notes = run_job(tmp_path, Job(job, 2, 0, torch=True, tiny=False))
    assert [list(each) for each in result["rounds"]] == [processes] * 2
    assert all(0 < seconds < 30 for each in result["rounds"] for seconds in each.values())
    # Depth, whether the working folder was there (never), whether the cache was (for the second start of a round).
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        [depth, False, False],
        [depth, False, True],
    ] * 2
    assert "s cold, " in notes[-1] and " of 2 rounds count" in notes[-1]


def test_the_line_that_startup_waits_for_is_the_reporters():
    stream = io.StringIO()
    with progress.Reporter(stream) as reporter:
        reporter.start("[1/1] residual-20", 1, 0)
        assert benchmark_jobs.FIRST_STEP not in stream.getvalue()
        reporter.update(1, {"loss": 2.0, "error": 0.9}, 0.5, 256.0)
    assert benchmark_jobs.FIRST_STEP in stream.getvalue()


def test_startup_is_of_a_command_that_the_depth_ablation_takes():
    from experiments import depth_ablation, runner

    flags = dict(flag.removeprefix("--").split("=") for flag in benchmark_jobs.ONE_STEP)
    assert set(flags) <= {field.name for field in runner.dataclasses.fields(depth_ablation.Config)}
    (cell,) = depth_ablation.cells(depth_ablation.Config(depths=(20,), blocks=("residual",), steps=1, steps_per_call=1))
    assert (flags["blocks"], flags["steps"], flags["steps_per_call"]) == ("residual", "1", "1")
    assert (cell.depth, cell.width) == (20, 8)  # as the PyTorch side is told


# What the workers do


def test_the_step_that_is_compiled_is_the_trainers(monkeypatch):
    asked = []
    monkeypatch.setattr(parallel, "compile_stretch", lambda *arguments: asked.append(arguments))
    for depth, tiny in ((1202, False), (8, True)):
        assert benchmark_worker.compile_step(depth, tiny)["seconds"] > 0
    for (_, mode, mesh, (start, data, rows, _)), parameters, shape in zip(
        asked, (19_421_274, None), ((10, 128), (10, 4)), strict=True
    ):
        assert (mode, mesh.size, rows.shape) == ("jit", 1, shape)
        assert parameters in (None, sum(leaf.size for leaf in jax.tree.leaves(start.params)))
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(start))
        assert len(data["images"]) == 2 * shape[1]


def test_sums_by_hand():
    laps = [(0.0, 5.0, 9.0), (10.0, 10.5, 12.0), (14.0, 15.0, 19.0)]
    assert benchmark_worker.sums(laps) == {"wall": 10.0, "called": 7.0, "handed": 5.5}


def test_the_trainer_trains_with_a_clock_around_its_stretches(monkeypatch, quick_compilation):
    original, plans, seen = parallel.compile_stretch, [], []
    train, sums = loop.train, benchmark_worker.sums
    monkeypatch.setattr(loop, "train", lambda *arguments: plans.append(arguments[5]) or train(*arguments))
    monkeypatch.setattr(benchmark_worker, "sums", lambda laps: seen.extend(laps) or sums(laps))
    found = benchmark_worker.host(3, tiny=True)
    assert parallel.compile_stretch is original
    assert [(plan.steps, plan.steps_per_call, plan.evaluate_every) for plan in plans] == [(30, 10, 30)]
    assert len(seen) == 3 and all(called <= handed <= done for called, handed, done in seen)
    assert found["wall"] > found["called"] >= found["handed"] > 0


def test_the_clock_waits_for_results(monkeypatch):
    now = iter(range(10))
    waited = []
    monkeypatch.setattr(parallel, "compile_stretch", lambda *arguments: lambda x: x + 1)
    monkeypatch.setattr(jax, "block_until_ready", lambda result: waited.append((result, next(now))))
    with benchmark_worker.clocked_stretches(lambda: next(now)) as laps:
        assert parallel.compile_stretch("stretch")(5) == 6
    assert laps == [(0, 1, 3)] and waited == [(6, 2)]


def test_pytorchs_network_is_ours(commands):
    pytest.importorskip("torch", reason="torch is not installed (extra [bench])")
    from experiments import benchmark_torch_start

    data = images.load("digits", None)
    for depth, width in ((20, 8), (8, 4)):
        ours = jax.eval_shape(
            lambda depth=depth, width=width: cifar_resnet(depth, "residual", width).init(
                jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32), train=False
            )
        )
        theirs = benchmark_torch_start.network(depth, width, data)
        count = sum(leaf.size for leaf in jax.tree.leaves(ours["params"]))
        assert sum(each.numel() for each in theirs.parameters()) == count
    assert 0 < benchmark_torch_start.first_step(8, 4, 2) < 20
    loaded = "import sys, experiments.benchmark_torch_start\nprint('torch' in sys.modules, 'jax' in sys.modules)"
    assert commands.script(loaded).stdout == "True False\n"


# The report, from run folders made by hand


def by_hand(finished, workdir, jobs=JOBS):
    quiet = {"cold": 10.0, "second": 2.5, "baseline": 2.0, "torch": 5.0}
    rounds = {
        "startup": [quiet, quiet | {"second": 2.0}, quiet | {"second": 3.0}, quiet | {"baseline": 9.0}],
        "whole_job": [{"cold": 90.0, "second": 45.0}],
        "compile": [{"shallow": 3.0, "deep": 7.5}, {"shallow": 3.0, "deep": 6.0}],
        "host": [{"wall": 10.0, "called": 9.96, "handed": 9.8}],
    }
    chosen = cells(Config(workloads=(), peers=("torch",)))
    for cell in chosen:
        if cell.job in jobs:
            finished(workdir, cell, {"rounds": rounds[cell.job]})
    return [cell.name for cell in chosen]


def test_a_table_by_hand(finished, tmp_path, capsys):
    report(tmp_path, by_hand(finished, tmp_path))
    out = capsys.readouterr().out
    lines = out.split("every process its own\n")[1].split("\n\nwritten: ")[0].splitlines()
    found = [re.split("  +", line.strip())[1:] for line in lines]
    assert found == [
        ["seconds", "least to most", "compared", "target", "rounds"],
        ["10", "10 to 10", "-", "-", "3 of 4"],
        ["2.5", "2 to 3", "1.25 x the import", "at most 1.3: kept", "3 of 4"],
        ["2", "2 to 2", "-", "-", "3 of 4"],
        ["5", "5 to 5", "2.00 x our second start", "-", "3 of 4"],
        ["90", "90 to 90", "-", "-", "1 of 1"],
        ["45", "45 to 45", "0.50 x the first", "-", "1 of 1"],
        ["3", "3 to 3", "-", "-", "2 of 2"],
        ["6.75", "6 to 7.5", "2.25 x 20 layers", "at most 2: missed", "2 of 2"],
        ["0.04", "0.04 to 0.04", "0.40% of the time", "at most 1%: kept", "1 of 1"],
        ["0.2", "0.2 to 0.2", "at most 2.00% of the time", "at most 1%: missed", "1 of 1"],
    ]
    assert "not finished" not in out and not (tmp_path / "summary.csv").exists()
    second = list(csv.DictReader(io.StringIO((tmp_path / "jobs.csv").read_text())))[1]
    assert (second["job"], second["process"], second["ratio"], second["target"]) == ("startup", "second", "1.25", "1.3")


def test_unfinished_jobs_and_workloads_are_told_apart(finished, tmp_path, capsys):
    jobs = by_hand(finished, tmp_path, jobs=("compile",))
    (cell,) = cells(Config(workloads=("lenet5",), modes=("train",), peers=("flax",), jobs=()))
    rounds = {"rounds": [{"ours": 0.004}]}
    same = {"batch": 8, "peak_gigaflops_a_second": 1.0, "gigaflops_a_step": 0.001, "steps_per_call": 5}
    finished(tmp_path, cell, rounds | same)
    report(tmp_path, [cell.name, *jobs])
    out = capsys.readouterr().out
    assert "\nSpeed; ratios" in out and "\nWaiting (3 of 4 cells are not finished); every" in out
    written = [tmp_path / name for name in ("summary.csv", "jobs.csv", "benchmark.json")]
    assert out.endswith(f"\nwritten: {', '.join(map(str, written))}\n")
    measured = json.loads(written[-1].read_bytes())
    assert all(set(run) == {"config", "environment", "result"} for run in measured.values()) and len(measured) == 2


def test_every_job_has_its_lines():
    assert tuple(benchmark_job_report.LINES) == JOBS == tuple(benchmark_jobs._TAKE)


# From a command to its files


def test_a_whole_command(command, tmp_path, capsys):
    work = tmp_path / "work"
    assert command(EXPERIMENT, "--smoke", "--workloads=", "--jobs=host", f"--workdir={work}") == 0
    out, err = capsys.readouterr()
    assert "[1/1] tiny-host: " in err and "1 of 1 rounds count" in err
    (taken,) = json.loads((work / "runs" / "tiny-host" / "result.json").read_text())["rounds"]
    assert taken["wall"] > taken["called"] > 0
    assert out.count("(tiny)") == 2
