"""Reading run folders: what is read, what is refused, and the arithmetic of spreads."""

import json
import math

import pytest

from research.analysis import results
from research.errors import CarouselError
from research.training import run_folder


def test_a_run_is_read_back(make_run):
    run = make_run("a", {"depth": 8, "seeds": (1, 2)}, [0.5, 0.25], {"test_error": math.nan, "params": 10})
    assert run.path.name == "a"
    assert run.config == {"depth": 8, "seeds": [1, 2]}
    assert run.environment["command"].startswith("launch/run")
    assert run.result == {"test_error": None, "params": 10}
    assert [record["step"] for record in run.metrics] == [10, 20, 20]


def test_a_series_is_where_the_metric_was_recorded(make_run):
    run = make_run("a", {}, [0.5, 0.25, math.nan, 0.125])
    assert run.series("error") == ([10, 20, 40], [0.5, 0.25, 0.125])  # no NaN: JSON has none, a null is left out
    assert run.series("test_error") == ([20, 40], [0.3, 0.175])
    assert run.series("nothing") == ([], [])


def test_another_file_of_the_folder(make_run):
    run = make_run("a", {}, [0.5], signal={"initial": [1, 2]})
    assert run.read_json("signal.json") == {"initial": [1, 2]}
    assert run.read_json("other.json") is None


def test_the_hash_is_of_what_a_run_was_and_not_of_where(make_run):
    of_the_machine = {"seconds": {"train": 1.5}, "examples_per_second": 100.0}
    run = make_run("a", {"depth": 8}, [0.5], {"params": 10} | of_the_machine)
    assert results.read_run(run.path) == run
    elsewhere = make_run("b", {"depth": 8}, [0.5], {"params": 10, "seconds": {"train": 9.5}})
    assert elsewhere.sha256 == run.sha256 and elsewhere.path != run.path
    for number, other in enumerate(
        (
            ({"depth": 20}, [0.5], {"params": 10}),
            ({"depth": 8}, [0.25], {"params": 10}),
            ({"depth": 8}, [0.5], {"params": 11}),
            ({"depth": 8}, [0.5], {"params": 10, "step_seconds": 1.5}),  # what a benchmark measures
        )
    ):
        assert make_run(f"c{number}", *other).sha256 != run.sha256


@pytest.mark.parametrize("name", ["config.json", "environment.json", "result.json", "metrics.jsonl"])
def test_every_file_is_needed(make_run, name):
    run = make_run("a", {"depth": 8}, [0.5])
    path = run.path / name
    content = path.read_bytes()
    for damage in (lambda: path.write_bytes(content[:-3]), path.unlink):
        damage()
        with pytest.raises(CarouselError) as caught:
            results.read_run(run.path)
        assert str(path) in str(caught.value) and "run its cell again" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_unfinished_runs_are_left_out(make_run, tmp_path):
    done = [make_run(name, {"name": name}, [0.5]) for name in ("b", "a")]
    with run_folder.open_run(tmp_path / "runs" / "c", {}):
        pass
    paths = [tmp_path / "runs" / name for name in ("c", "b", "missing", "a")]
    assert results.read_runs(iter(paths)) == done  # in the order asked for
    with pytest.raises(CarouselError, match=r"no finished run among the 2 asked for, such as .*/c; .*--report_only"):
        results.read_runs([paths[0], paths[2]])


def test_groups_keep_the_order_of_appearance(grid):
    groups = results.group(grid[::-1], lambda run: run.config["depth"])
    assert list(groups) == [20, 8]
    assert groups[20] == [run for run in grid[::-1] if run.config["depth"] == 20]
    assert sum(map(len, groups.values())) == len(grid)


# Runs of several seeds


@pytest.fixture
def several(make_run):
    """Three seeds at once: the second diverges after a while (and comes back), the third at once."""
    run = make_run("several", {}, [], {"error": [0.5, math.nan, math.nan], "test_error": [0.1, 0.3, math.nan]})
    records = [{"step": 1, "loss": [4.0, 5.0, None]}, {"step": 1, "test_loss": [1.0, 2.0, 3.0]}]
    records += [{"step": 2, "loss": [2.0, None, None]}, {"step": 3, "loss": [1.0, 7.0, None]}]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return results.read_run(run.path)


def test_values_are_of_every_run_and_seed_that_has_one(several, make_run):
    single, failed = make_run("single", {}, [0.75]), make_run("failed", {}, [], {"failure": "diverged"})
    runs = [several, failed, single]
    assert results.values(iter(runs), "test_error") == [0.1, 0.3, 0.8]
    assert results.values(runs, "error") == [0.5]
    assert results.values(runs, "nothing") == results.values([], "test_error") == []
    assert results.percent(runs, "test_error") == "40.00% ± 36.06 (n=3)"
    assert results.percent([several], "error") == "50.00%"
    assert results.percent([failed], "error") == "failed"


def test_a_curve_ends_where_its_seed_diverged(several, make_run):
    single = make_run("single", {}, [0.5, math.nan, 0.25])
    assert results.curves([several], "loss") == [([1, 2, 3], [4.0, 2.0, 1.0]), ([1], [5.0])]
    assert results.curves([several], "test_loss") == [([1], [value]) for value in (1.0, 2.0, 3.0)]
    assert results.curves([single, several], "error") == [single.series("error")] == [([10, 30], [0.5, 0.25])]
    assert results.curves([several], "nothing") == []


def test_spreads_by_hand():
    spread = results.spread(iter([0.1, None, 0.2, 0.6]))
    assert spread.mean == pytest.approx(0.3) and spread.n == 3
    assert spread.std == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
    assert spread.percent() == "30.00% ± 26.46 (n=3)"
    one = results.spread([0.12345])
    assert (one.mean, one.n, math.isnan(one.std)) == (0.12345, 1, True)
    assert one.percent() == "12.35%" or one.percent() == "12.34%"
    for values in ([], [None, None]):
        none = results.spread(values)
        assert (none.n, none.percent()) == (0, "failed") and math.isnan(none.mean)


def test_growth_is_the_slope_between_the_ends():
    assert results.growth({10: 100, 40: 800}) == pytest.approx(1.5)  # log 8 / log 4
    assert results.growth({1000: 7_000, 20: 140, 300: 1}) == pytest.approx(1)  # in whatever order; ends alone
    assert results.growth({9: 5, 36: 10}) == pytest.approx(0.5)


def test_results_are_json_values(make_run):
    run = make_run("a", {}, [0.5])
    json.dumps([run.config, run.environment, run.result, run.metrics])
