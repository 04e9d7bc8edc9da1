"""Tables: CSV that reads back, text that is aligned and complete, and the table of a network's layers."""

import csv

import pytest

from research.analysis import summary, tables
from research.models.layers import Layer

ROWS = [
    {"block": "plain", "error": "12.30% ± 0.40 (n=5)", "parameters": 1234567, "rate": 0.1, "note": ""},
    {"block": 'a, "quoted" name', "error": "9.00%", "parameters": 89, "rate": 2.5, "note": "[bold] x [1/2] :smile:"},
]


def test_csv_reads_back(tmp_path):
    path = tmp_path / "new" / "summary.csv"
    tables.write_csv(path, ROWS)
    content = path.read_bytes().decode()
    assert content.startswith("block,error,parameters,rate,note\n") and "\r" not in content
    with open(path, newline="") as file:
        assert list(csv.DictReader(file)) == [{name: str(value) for name, value in row.items()} for row in ROWS]
    tables.write_csv(path, ROWS[:1])
    assert len(path.read_text().splitlines()) == 2
    assert [item.name for item in path.parent.iterdir()] == ["summary.csv"]


def test_csv_leaves_missing_values_empty(tmp_path):
    tables.write_csv(tmp_path / "a.csv", [{"a": None, "b": 1}])
    assert (tmp_path / "a.csv").read_text() == "a,b\n,1\n"
    with pytest.raises(ValueError, match="other"):
        tables.write_csv(tmp_path / "a.csv", [{"a": 1}, {"other": 2}])


def test_text_is_aligned():
    lines = tables.render("errors", ROWS).splitlines()
    assert lines[0] == "errors"
    header, first, second = lines[1:]
    for name, left in (("block", True), ("parameters", False), ("error", False), ("rate", False)):
        values = [f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for row in ROWS]
        cells = [(header, name), (first, values[0]), (second, values[1])]
        places = [line.index(text) + (0 if left else len(text)) for line, text in cells]
        assert len(set(places)) == 1, name
    assert first.split() == ["plain", "12.30%", "±", "0.40", "(n=5)", "1,234,567", "0.1"]


def test_text_is_not_interpreted():
    rendered = tables.render("title [red] [1/2]", ROWS)
    assert "[bold] x [1/2] :smile:" in rendered
    assert rendered.splitlines()[0] == "title [red] [1/2]"


@pytest.mark.parametrize("columns", [3, 30])
def test_nothing_is_cut(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    row = {f"column{number}": f"value{number}" for number in range(columns)}
    rendered = tables.render("wide", [row])
    assert len(rendered.splitlines()) == 3
    assert rendered.split() == ["wide", *row.keys(), *row.values()]


def test_a_network_as_a_table():
    found = [
        Layer("stem", "Conv", (8, 8, 4), parameters=108, macs=6912, repeats=1),
        Layer("norm", "BatchNorm", (8, 8, 4), parameters=8, macs=0, repeats=1),
        Layer("blocks/conv", "Conv", (8, 8, 4), parameters=144, macs=9216, repeats=3),
        Layer("head", "Dense", (10,), parameters=50, macs=40, repeats=1),
    ]
    assert summary.totals(found) == {
        "parameters": 108 + 8 + 3 * 144 + 50,
        "macs": 6912 + 3 * 9216 + 40,
        "activations": 5 * 256 + 10,
        "weight_layers": 5,
    }
    lines = summary.describe("net", (8, 8, 3), found).splitlines()
    assert lines[0] == "net, input 8x8x3"
    assert lines[4].split() == ["blocks/conv", "Conv", "3", "8x8x4", "768", "432", "27,648"]
    assert lines[-3].split() == ["total", "5", "weight", "layers", "1,290", "598", "34,600"]
    assert lines[-1] == "float32, one example, forward: 0.0 MiB of parameters, 0.0 MiB of activations"
