"""The table of cells, and the command that shows it."""

import io

import pytest
from rich.console import Console

from launch import table
from research.training import run_folder, status
from research.training.status import Status

CELLS = [
    Status("plain-8", "done", 40, 40),
    Status("plain-20", "running", 10, 40, 75.0, "loss 2.1 error 12.0% 300/s"),
    Status("plain-56", "failed", 5, 40, None, "the disk is full"),
    Status("residual-8[w4]", "pending"),
    Status("residual-20", "diverged", 7, None, None, "the loss is not finite"),
]


def shown(statuses, rows=None, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(table.table(statuses, rows))
    return [line.strip() for line in console.file.getvalue().splitlines() if line.strip()]


def test_every_cell_has_a_line():
    head, _, *rows, summary = shown(CELLS)
    assert head.split() == ["cell", "state", "step", "left"]
    assert [row.split() for row in rows] == [
        ["plain-8", "done", "40/40"],
        ["plain-20", "running", "10/40", "1:15", *["loss", "2.1", "error", "12.0%", "300/s"]],
        ["plain-56", "failed", "5/40", *["the", "disk", "is", "full"]],
        ["residual-8[w4]", "pending"],
        ["residual-20", "diverged", "7", *["the", "loss", "is", "not", "finite"]],
    ]
    assert summary == "5 cells: 1 running, 1 failed, 1 diverged, 1 pending, 1 done"


def test_what_matters_is_shown_where_not_all_fits():
    _, _, *rows, _ = shown(CELLS, rows=2)
    assert [row.split()[0] for row in rows] == ["plain-20", "plain-56", "and"] and rows[-1] == "and 3 more"


def test_a_narrow_screen_keeps_one_line_a_cell():
    rows = shown(CELLS, width=64)
    assert len(rows) == len(CELLS) + 3 and rows[4].split()[:3] == ["plain-56", "failed", "5/40"]
    assert rows[3].endswith("…")


def test_one_line():
    assert table.line(CELLS[:2]) == "2 cells: 1 running, 1 done; plain-20 10/40 (1:15 left)"
    assert table.line([Status("a", "running")]) == "1 cell: 1 running; a starting"


def test_the_command(launcher, tmp_path):
    for name in ("depth-20", "depth-8", "depth-56"):
        run_folder.reserve(tmp_path / "runs" / name, {"name": name})
    with run_folder.open_run(tmp_path / "runs" / "depth-8", {"name": "depth-8"}) as run:
        run.finish({"steps": 12})
    out, err = launcher("status", tmp_path).communicate(timeout=120)
    assert err == "" and [line.split() for line in out.splitlines() if "depth" in line] == [
        ["depth-8", "done", "12/12"],
        ["depth-20", "pending"],
        ["depth-56", "pending"],
    ]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "error: name one working folder: python -m launch.status WORKDIR\n"),
        (("{}", "{}"), 2, "error: name one working folder"),
        (("--watched", "{}"), 2, "error: Unknown command line flag 'watched'"),
        (("{}",), 1, "error: {}/runs has no run folders: give the --workdir of an experiment that was started\n"),
    ],
)
def test_a_wrong_line_is_refused_in_one(launcher, tmp_path, words, code, message):
    process = launcher("status", *(word.format(tmp_path) for word in words))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (code, "") and err.count("\n") == 1
    assert err.startswith(message.format(tmp_path))


def test_watching_ends_with_the_last_cell(launcher, tmp_path, wait_for):
    run_folder.reserve(tmp_path / "runs" / "a", {})
    process = launcher("status", "--watch", tmp_path)
    with run_folder.open_run(tmp_path / "runs" / "a", {}) as run, status.kept(tmp_path / "runs" / "a"):
        assert process.poll() is None
        run.finish({"steps": 12})
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "done" in out
