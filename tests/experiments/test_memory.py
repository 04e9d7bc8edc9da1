"""The memory experiment: its grid, one whole command, steps taken where asked for, and the report."""

import csv
import io
import json
import math
import re
from types import SimpleNamespace

import pytest

from experiments import memory
from experiments.memory import EXPERIMENT, Config, cells, report
from research.training import loop, run_folder

GIB = 2**30


def test_the_grid_is_networks_times_rematerialisation():
    grid = cells(Config())
    assert [(f"{cell.unit}-{cell.depth}", cell.remat) for cell in grid] == [
        (f"bottleneck-{depth}", remat) for depth in (56, 164, 326, 650, 1001) for remat in (False, True)
    ]
    changes = ({"width": 4}, {"batch_size": 32}, {"image_size": 8}, {"execute": 2}, {"variant": "original"})
    others = [cell for change in changes for cell in cells(Config(**change))]
    assert len({cell.name for cell in grid + others}) == 6 * len(grid)
    assert [cell.remat for cell in cells(Config(networks=("basic-8",), remat=("on",)))] == [True]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--networks=bottleneck-163", "depth 163 is not 9n+2"),
        ("--networks=164", "--networks=164: write unit-layers"),
        ("--networks=dense-164", "unit 'dense' is unknown"),
        ("--remat=sometimes", "'sometimes' is unknown; choose from off, on"),
        ("--variant=plain", "variant=plain"),
        ("--execute=-1", "--execute=-1: give at least 0"),
        ("--image_size=2", "--image_size=2: give at least 4"),
        ("--batch_size=0", "--batch_size=0: give at least 1"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(refusal, tmp_path, flag, message):
    assert message in refusal(EXPERIMENT, flag, f"--workdir={tmp_path / 'work'}")
    assert not (tmp_path / "work").exists()


# From a command to its files


def table(out):
    names, *rows = (re.split("  +", line.strip()) for line in out.split("memory of a training step\n")[1].splitlines())
    return [dict(zip(names, row, strict=True)) for row in rows[: [len(row) for row in rows].index(1)]]


def test_a_whole_command(commands, tmp_path):
    done = commands.run("--smoke", f"--workdir={tmp_path}", experiment="memory")
    assert done.returncode == 0, done.stderr
    pattern = r"\[[1-4]/4\] full_preactivation-\S+: \d\.\d\d GiB of temporaries"
    assert all(re.fullmatch(pattern, line) for line in done.stderr.splitlines())
    assert "full pre-activation, width 4, batch 4: memory of a training step" in done.stdout
    results = {}
    for depth in (20, 38):
        for kind in ("plain", "remat"):
            folder = tmp_path / "runs" / f"full_preactivation-bottleneck-{depth}-w4-s8-b4-x0-{kind}"
            result = results[depth, kind] = json.loads((folder / "result.json").read_text())
            assert result.keys() == {"params", "temporary_bytes", "argument_bytes"}  # nothing was run
            # Parameters, momenta and a batch of images at least.
            assert result["argument_bytes"] > 2 * 4 * result["params"] + 4 * 8 * 8 * 3
    assert results[20, "plain"]["params"] == results[20, "remat"]["params"] < results[38, "plain"]["params"]
    assert results[20, "plain"]["temporary_bytes"] < results[38, "plain"]["temporary_bytes"]
    assert results[38, "plain"]["temporary_bytes"] != results[38, "remat"]["temporary_bytes"]

    rows = table(done.stdout)
    assert [(row["network"], row["rematerialised"]) for row in rows] == [
        (f"bottleneck-{depth}", remat) for depth in (20, 38) for remat in ("no", "yes")
    ]
    for row, result in zip(rows, results.values(), strict=True):
        assert row["parameters"] == f"{result['params']:,}"
        assert row["temporaries (GiB)"] == f"{result['temporary_bytes'] / GIB:.3f}"
        assert row["s/step"] == row["process peak (GiB)"] == "-"
    for name, kind in (("everything kept", "plain"), ("rematerialised", "remat")):
        small, large = (results[depth, kind]["temporary_bytes"] for depth in (20, 38))
        power = math.log(large / small) / math.log(38 / 20)
        assert f"\n{name}: bytes grow as depth to the power {power:.2f}\n" in done.stdout

    found = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert {"variant", "unit", "depth", "remat", "params", "temporary_bytes", "argument_bytes"} <= found[0].keys()
    assert [row["temporary_bytes"] for row in found] == [str(r["temporary_bytes"]) for r in results.values()]
    assert {row["step_seconds"] for row in found} == {row["peak_resident_bytes"] for row in found} == {""}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"memory.png", "memory.svg"}


def test_steps_are_taken_where_asked_for(quick_compilation, tmp_path):
    config = Config(networks=("bottleneck-11",), remat=("off",), width=2, image_size=4, batch_size=2, execute=1)
    (cell,) = cells(config)
    notes = []
    reporter = SimpleNamespace(note=notes.append)
    with run_folder.open_run(tmp_path / "run", {}) as folder:
        result = memory.run(cell, loop.Context(folder, "[1/1]", reporter, command=("memory",)))
    assert result.keys() == {
        *("temporary_bytes", "argument_bytes", "params", "step_seconds", "peak_resident_bytes", "loss")
    }
    assert 0 < result["step_seconds"] < 10
    assert 100 * 2**20 < result["peak_resident_bytes"] < 1024 * GIB  # a process with JAX, in bytes and not in KiB
    assert 0.1 < result["loss"] < 20 and (tmp_path / "run" / "environment.json").exists()
    assert re.search(r"0\.00 GiB of temporaries, \d\.\d s a step, process peak \d+\.\d GiB, loss \d", notes[-1])


# The report, from run folders made by hand


def by_hand(finished, workdir, remat, networks=("bottleneck-20", "bottleneck-83")):
    chosen = cells(Config(networks=networks, remat=remat, execute=3))
    for cell in chosen:
        size = GIB * (1 if cell.remat else cell.depth // 20) // 4
        times = {"step_seconds": 1.234, "peak_resident_bytes": 3 * GIB, "loss": 2.3}
        finished(workdir, cell, {"temporary_bytes": size, "argument_bytes": 10, "params": 12_345} | times)
    return [cell.name for cell in chosen]


def test_a_table_by_hand_and_the_same_figures_twice(finished, tmp_path, capsys):
    names = by_hand(finished, tmp_path, ("off", "on"))
    report(tmp_path, names)
    out = capsys.readouterr().out
    rows = table(out)
    assert [row["temporaries (GiB)"] for row in rows] == ["0.250", "0.250", "1.000", "0.250"]
    assert {(row["s/step"], row["process peak (GiB)"], row["parameters"]) for row in rows} == {
        ("1.23", "3.00", "12,345")
    }
    power = math.log(4) / math.log(83 / 20)
    assert f"everything kept: bytes grow as depth to the power {power:.2f}\n" in out
    assert "rematerialised: bytes grow as depth to the power 0.00\n" in out
    files = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    report(tmp_path, names)
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == files


def test_one_network_has_no_growth(finished, tmp_path, capsys):
    report(tmp_path, by_hand(finished, tmp_path, ("on",), ("bottleneck-20",)))
    out = capsys.readouterr().out
    assert "to the power" not in out and [row["rematerialised"] for row in table(out)] == ["yes"]
