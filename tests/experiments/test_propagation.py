"""The propagation experiment: its grid, one whole command, and what its table says."""

import csv
import io
import itertools
import json
import math
import re
import shlex

import pytest

from experiments.identity_tables import VARIANTS
from experiments.propagation import EXPERIMENT, Config, cells, report

STATISTICS = ("gradient_norm", "shortcut_gradient_norm", "jacobian_gain", "shortcut_jacobian_gain", "forward_residue")
LAST_STAGE, THROUGH_SHORTCUTS = "|dE/dx_l| / |dE/dx_L|, last stage", "through shortcuts alone"
RESIDUE = "largest |x_L - x_l - sum F| / |x_L|"


def test_the_grid_is_variants_times_seeds():
    config = Config(variants=tuple(VARIANTS), seeds=(0, 5))
    grid = cells(config)
    assert [(cell.variant, cell.seed) for cell in grid] == list(itertools.product(VARIANTS, (0, 5)))
    assert {(cell.unit, cell.depth, cell.width, cell.batch_size) for cell in grid} == {("basic", 110, 8, 64)}
    changes = ({"width": 4}, {"batch_size": 32}, {"network": "bottleneck-110"}, {"dataset": "mnist"})
    others = [cell for change in changes for cell in cells(Config(**change))]
    assert len({cell.name for cell in grid + others}) == len(grid) + 4 * len(Config().variants) * 3


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--network=basic-109", "depth 109 is not 6n+2"),
        ("--network=basic", "=basic: write unit-layers, such as basic-110"),
        ("--network=dense-110", "unit 'dense' is unknown: choose from basic, bottleneck, single"),
        ("--variants=plain", "'plain' is unknown; choose from original, scale_0_1"),
        ("--batch_size=1", "--batch_size=1: give at least 2"),
        ("--batch_size=1281", "--batch_size=1281: digits has 1280 training images, give fewer"),
        ("--seeds=-1", "--seeds=-1: give at least 0"),
        ("--width=0", "--width=0: give at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(refusal, tmp_path, flag, message):
    assert message in refusal(EXPERIMENT, flag, f"--workdir={tmp_path / 'work'}")
    assert not (tmp_path / "work").exists()


# From a command to its files


def table(out):
    """The rows of the printed table by kind of unit, the cells by column."""
    names, *rows = (re.split("  +", line) for line in out.strip().split("\n\n")[0].splitlines()[1:])
    return {row[0]: dict(zip(names[1:], row[1:], strict=True)) for row in rows}


def test_a_whole_command(commands, tmp_path):
    flags = ("--smoke", "--variants=full_preactivation,scale_0.5_0.5")
    done = commands.run(*flags, f"--workdir={tmp_path}", experiment="propagation")
    assert done.returncode == 0, done.stderr
    assert all(re.match(r"\[[12]/2\] .*: done$", line) for line in done.stderr.splitlines())
    results = {}
    for variant in ("full_preactivation", "scale_0.5_0.5"):
        folder = tmp_path / "runs" / f"{variant}-basic-20-w4-b4-digits-seed0"
        result = results[variant] = json.loads((folder / "result.json").read_text())
        assert {len(result[name]) for name in STATISTICS} == {9} and result["params"] > 10_000
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["command"] == f"python -m experiments.propagation {shlex.join(flags)}"  # wherever it ran
        assert environment["argv"].endswith(f" {shlex.join(flags)} --workdir={tmp_path}")
    # The point of the experiment, in single precision.
    identity, scaled = results.values()
    assert max(identity["forward_residue"]) < 1e-5 < 0.1 < max(scaled["forward_residue"])
    assert len(set(identity["shortcut_gradient_norm"][-2:])) == 1
    assert identity["shortcut_jacobian_gain"][-1] == pytest.approx(1)
    assert scaled["shortcut_gradient_norm"][-2] < 0.5 * scaled["shortcut_gradient_norm"][-1]

    assert "basic-20 at initialisation, means over seeds (n=1)" in done.stdout
    rows = table(done.stdout)
    for label, result in (("full pre-activation", identity), ("scaling 0.5, 0.5", scaled)):
        for column, name in ((LAST_STAGE, "gradient_norm"), (THROUGH_SHORTCUTS, "shortcut_gradient_norm")):
            assert rows[label][column] == f"{result[name][7] / result[name][8]:.3g}"
        assert rows[label]["gain of a unit's Jacobian"] == f"{sum(result['jacobian_gain']) / 9:.3f}"
        assert rows[label]["of its shortcut's"] == f"{sum(result['shortcut_jacobian_gain']) / 9:.3f}"
        assert rows[label][RESIDUE] == f"{max(result['forward_residue']):.2g}"
    assert rows["full pre-activation"][THROUGH_SHORTCUTS] == "1"

    found = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert list(found[0]) == ["dataset", "variant", "unit", "depth", "width", "seed", "number", *STATISTICS]
    assert [(row["variant"], int(row["number"])) for row in found] == list(itertools.product(results, range(1, 10)))
    assert [row["gradient_norm"] for row in found[:9]] == list(map(str, identity["gradient_norm"]))
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert files == {"identities_basic-20.png", "identities_basic-20.svg"}


def result(units, shortcut):
    return {
        "gradient_norm": [2.0**-k for k in range(units)],
        "shortcut_gradient_norm": [shortcut**k for k in reversed(range(units))] if shortcut else [0.0] * units,
        "jacobian_gain": [1.5] * units,
        "shortcut_jacobian_gain": [shortcut] * units,
        "forward_residue": [None] * units if units == 3 else [1e-7 * k for k in range(units)],
        "params": 10,
    }


def test_a_table_by_hand_and_the_same_figures_twice(finished, tmp_path, capsys):
    chosen = cells(Config(network="basic-38", variants=("original",), seeds=(0, 1)))
    for cell, shortcut in zip(chosen, (0.5, 0.25), strict=True):
        finished(tmp_path, cell, result(18, shortcut))
    names = [cell.name for cell in chosen]
    report(tmp_path, names)
    out = capsys.readouterr().out
    assert "means over seeds (n=2)" in out
    row = table(out)["original"]
    # The last stage: units 13 to 18, of which 14 to 18 keep the shape.
    assert row[LAST_STAGE] == "16"
    assert row[THROUGH_SHORTCUTS] == f"{(0.5**4 + 0.25**4) / 2:.3g}"
    assert (row["of its shortcut's"], row[RESIDUE]) == ("0.375", "1.7e-06")
    files = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    report(tmp_path, names)
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == files


@pytest.mark.parametrize(("network", "variant", "units"), [("basic-8", "original", 3), ("basic-20", "scale_0_1", 9)])
def test_where_there_is_nothing_to_compare(finished, tmp_path, capsys, network, variant, units):
    """A stage of one unit has no two of one shape; a shortcut scaled by 0 passes no gradient."""
    (cell,) = cells(Config(network=network, variants=(variant,), seeds=(0,)))
    finished(tmp_path, cell, result(units, 0.0))
    report(tmp_path, [cell.name])
    (row,) = table(capsys.readouterr().out).values()
    assert row[THROUGH_SHORTCUTS] == "nan"
    assert math.isnan(float(row[LAST_STAGE])) == math.isnan(float(row[RESIDUE])) == (units == 3)
