"""The nowcasting experiment: its grid and networks, what is refused, whole commands on digits and radar."""

import contextlib
import csv
import dataclasses
import datetime
import io
import itertools
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from experiments import nowcasting, nowcasting_data
from experiments.nowcasting import EXPERIMENT
from experiments.nowcasting_cells import BASELINES, CELLS, DEFAULTS, Config, cells, label_of, layers_of, network_of
from experiments.nowcasting_data import Loaded
from research.analysis import optical_flow
from research.data import radar
from research.training import loop

TINY = ("--smoke", "--frame=12", "--patch=2", "--observed=2", "--horizon=3")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling is most of the time of these tests."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# The grid


def test_the_grid_is_seeds_times_networks_times_cells_and_baselines_once():
    config = Config(networks=("fc-3", "persistence", "3x3-1x1-4-2"), cells=("gru", "lstm"), seeds=(2, 0))
    grid = cells(config)
    trained = [(cell.seed, cell.network, cell.cell) for cell in grid if cell.network not in BASELINES]
    assert trained == list(itertools.product((2, 0), ("fc-3", "3x3-1x1-4-2"), ("gru", "lstm")))
    assert [cell.network for cell in grid].count("persistence") == 1 and len(grid) == 9
    others = cells(dataclasses.replace(config, cells=("lstm",), seeds=(5,)))
    assert {cell for cell in grid if cell in others} == {cell for cell in grid if cell.network == "persistence"}
    assert {cell.name for cell in grid} == {
        "moving_digits-persistence",
        *(
            f"moving_digits-{network}{kind}-seed{seed}"
            for network in ("fc-3", "3x3-1x1-4-2")
            for kind in ("-gru", "")
            for seed in (0, 2)
        ),
    }


@pytest.mark.parametrize("dataset", DEFAULTS)
def test_every_data_set_has_a_grid_that_flags_override(dataset):
    grid = cells(Config(dataset=dataset))
    assert {cell.dataset for cell in grid} == {dataset} and "persistence" in {cell.network for cell in grid}
    assert any(layers_of(cell.network)[0] for cell in grid) and len({cell.name for cell in grid}) == len(grid)
    assert all((cell.steps is None) != (cell.epochs is None) for cell in grid)
    flags = {"frame": 48, "patch": 3, "observed": 2, "horizon": 9, "batch_size": 7, "segment": 2, "clip_norm": 0.5}
    for cell in cells(Config(dataset=dataset, epochs=2, **flags)):
        assert {name: getattr(cell, name) for name in flags} == flags and (cell.steps, cell.epochs) == (None, 2)
    assert {(cell.steps, cell.epochs) for cell in cells(Config(dataset=dataset, steps=9))} == {(9, None)}


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        ("5x5-3x3-128-64-64", ((5, 3), (128, 64, 64))),
        ("1x1-11x11-1", ((1, 11), (1,))),
        ("fc-2048", (None, (2048,))),
        ("fc-3-2", (None, (3, 2))),
        ("persistence", (None, ())),
        ("optical_flow", (None, ())),
    ],
)
def test_what_the_name_of_a_network_tells(network, layers):
    assert layers_of(network) == layers


NO_NETWORKS = ("4x4-3x3-8", "3x3-2x2-8", "0x0-3x3-8", "3x3-3x3", "3x3-3x3-0", "3x3-3x3-08", "3x3-3x3-8-", "3x5-3x3-8")
NO_NETWORKS += ("3x3-8", "fc", "fc-", "fc-0", "fc-3.5", "xfc-3", "Persistence", "lstm")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *((f"--networks={name}", f"--networks: {name!r} is no network; write (input ") for name in NO_NETWORKS),
        ("--networks=fc-3,fc-3", "--networks=fc-3,fc-3 names a value twice"),
        ("--networks=optical_flow", "optical_flow is a forecast of rain: give --dataset=radar or leave it out"),
        ("--networks=fc-3,persistence,optical_flow", "optical_flow is a forecast of rain: give --dataset=radar or"),
        ("--frame=21 --patch=2", "--frame=21 does not divide by --patch=2: give a multiple"),
        ("--learning_rate=0", "--learning_rate=0.0: give a positive number"),
        ("--learning_rate=nan", "--learning_rate=nan: give a positive number"),
        ("--learning_rate=inf", "--learning_rate=inf: give a positive number"),
        ("--forget_bias=nan", "--forget_bias=nan: give a finite number"),
        ("--batch_size=9 --devices=2", "--batch_size=9 does not divide by 2 devices: give a multiple"),
        ("--dataset=radar --digits=3", "--digits=3: radar frames have none"),
        *(
            (flag, "--validation_days, --test_days and --scale are for --dataset=radar")
            for flag in ("--validation_days=20160711", "--test_days=20160711", "--scale=2")
        ),
        ("--steps=3 --epochs=3", "--epochs=3 and --steps=3: give exactly one of them"),
        ("--cells=lstm,tanh", "--cells=lstm,tanh: 'tanh' is unknown; choose from lstm, "),
        ("--observed=1", "--observed=1: give at least 2"),
        ("--horizon=0", "--horizon=0: give at least 1"),
        ("--frame=7", "--frame=7: give at least 8"),
        ("--wet=nan", "--wet=nan: give at least 0"),
        ("--clip_norm=-1", "--clip_norm=-1.0: give at least 0"),
    ],
)
def test_what_cannot_be_forecast_is_refused_in_one_line(refusal, tmp_path, flags, message):
    arguments = re.split(" (?=--)", flags)
    assert refusal(EXPERIMENT, *arguments, f"--workdir={tmp_path / 'work'}").startswith(message)
    assert not (tmp_path / "work").exists()


# The networks


def count(cell):
    x = jnp.zeros((1, cell.observed, cell.frame, cell.frame, 1))
    made = jax.eval_shape(lambda: network_of(cell).init(jax.random.key(0), x))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made))


def test_shi2015_is_table_1():
    grid = cells(Config(**EXPERIMENT.presets["shi2015"]))
    sizes = {cell.network: count(cell) for cell in grid if cell.network not in BASELINES}
    assert sizes == {
        "fc-2048-2048": 142_667_776,
        "5x5-5x5-256": 13_524_496,
        "5x5-5x5-128-128": 10_042_896,
        "5x5-5x5-128-64-64": 7_585_296,
        "9x9-1x1-128-128": 11_550_224,
        "9x9-1x1-128-64-64": 8_830_480,
    }
    for cell in grid:
        assert (cell.dataset, cell.cell, cell.optimizer, cell.learning_rate) == (
            "moving_mnist",
            "lstm",
            "rmsprop",
            1e-3,
        )
        assert (cell.frame, cell.patch, cell.observed, cell.horizon, cell.digits) == (64, 4, 10, 10, 2)
        assert (cell.train_examples, cell.validation_examples, cell.test_examples) == (10_000, 2_000, 3_000)
        assert cell.pool == 500


def test_radar_is_section_4_2():
    grid = cells(Config(**EXPERIMENT.presets["radar"]))
    assert [cell.network for cell in grid] == ["3x3-3x3-64-64", "fc-2000-2000", "optical_flow", "persistence"]
    assert count(grid[0]) == 896_260
    assert {(c.dataset, c.frame, c.patch, c.observed, c.horizon) for c in grid} == {("radar", 100, 2, 5, 15)}


def test_flags_reach_the_network():
    options = {"networks": ("5x5-3x3-4-2",), "horizon": 7, "patch": 4, "frame": 16, "segment": 3, "forget_bias": 2.0}
    grid = cells(Config(**options, cells=tuple(CELLS)))
    lstm, by_position, after, before = (network_of(cell) for cell in grid)
    for network in (lstm, by_position, after, before):
        assert (network.kernels, network.features) == ((5, 3), (4, 2))
        assert (network.horizon, network.patch, network.segment) == (7, 4, 3)
    sizes = [count(cell) for cell in grid]
    # Three peepholes of every layer, the same ones of both stacks' 4 x 4 positions or each its own.
    assert sizes[1] - sizes[0] == 2 * 3 * (4 + 2) * (4 * 4 - 1)
    assert sizes[2] < sizes[0] and after.cell.own.keys() == {"reset_bias"} and before.cell.kernel_inside
    kept = lstm.cell.step(
        lstm.cell.initial(1, 1)._replace(c=jnp.ones((1, 1))),
        jnp.zeros((1, 4)),
        jnp.zeros((1, 4)),
        dict.fromkeys(lstm.cell.own, jnp.zeros(1)),
    )
    assert float(kept.c[0, 0]) == pytest.approx(1 / (1 + math.exp(-2)))
    assert len({label_of(cell.network, cell.cell) for cell in grid}) == 4
    assert layers_of("fc-3")[0] is None and network_of(cells(Config(networks=("fc-3",)))[0]).kernels is None


class Handed(Exception):
    """What reached the trainer."""


def handed(monkeypatch, data, **flags):
    def stop(*arguments):
        raise Handed(*arguments)

    (cell,) = cells(Config(networks=("fc-3",), observed=2, **flags))
    monkeypatch.setattr(loop, "train", stop)
    with pytest.raises(Handed) as caught:
        nowcasting._train(cell, data, loop.Context(None, "", None))
    return caught.value.args


def test_flags_reach_the_trainer(monkeypatch):
    frames = np.zeros((1, 5, 8, 8, 1))
    data = Loaded(loop.Splits({}, 1_000, 100, 50), lambda batch: frames, None, 0)
    flags = {"seeds": (4,), "batch_size": 10, "epochs": 3, "evaluations": 4, "steps_per_call": 7, "devices": 2}
    make_model, make_task, optimizer, schedule, splits, plan, _ = handed(
        monkeypatch, data, **flags, parallel="jit", learning_rate=0.5, clip_norm=2.0
    )
    # 300 steps and 4 evaluations, in whole stretches of 7.
    assert (plan.seed, plan.steps, plan.batch_size, plan.steps_per_call) == (4, 294, 10, 7)
    assert (plan.evaluate_every, plan.train_evaluation_examples, splits) == (70, 100, data.splits)
    assert (plan.select, plan.devices, plan.parallel) == ("best", 2, "jit")
    assert make_model().features == (3,) and float(schedule(10**6)) == 0.5
    assert make_task(None).inputs({}).shape == (1, 2, 8, 8, 1)
    # RMSProp of decay 0.9, by hand: gradients of 1000 each are clipped to norm 2, so to 1 as those of the second step.
    ones = jnp.ones(4)
    update, state = optimizer.update(1e3 * ones, optimizer.init(ones), ones)
    np.testing.assert_allclose(update, -0.5 / math.sqrt(0.1), rtol=1e-3)
    update, _ = optimizer.update(ones, state, ones)
    np.testing.assert_allclose(update, -0.5 / math.sqrt(0.9 * 0.1 + 0.1), rtol=1e-3)
    *_, plan, _ = handed(monkeypatch, data, steps=9, steps_per_call=50)
    assert (plan.steps, plan.steps_per_call) == (9, 9)
    _, _, adam, *_ = handed(monkeypatch, data, optimizer="adam", learning_rate=0.5)
    update, _ = adam.update(1e3 * ones, adam.init(ones), ones)
    np.testing.assert_allclose(update, -0.5, rtol=1e-3)


# Whole commands


def run(command, workdir, *arguments):
    """A command that must succeed, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert command(EXPERIMENT, *arguments, f"--workdir={workdir}") == 0
    results = {path.parent.name: json.loads(path.read_text()) for path in (workdir / "runs").glob("*/result.json")}
    return types.SimpleNamespace(
        workdir=workdir, arguments=arguments, out=out.getvalue(), err=err.getvalue(), results=results
    )


def table(out):
    """First column -> the others, by name."""
    title, *lines = out.removeprefix("\n").splitlines()
    names, *rows = (re.split("  +", line.strip()) for line in lines[: lines.index("")])
    return title, {row[0]: dict(zip(names[1:], row[1:], strict=True)) for row in rows if len(row) == len(names)}


def files_of(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "figures").iterdir()}


STEMS = ("loss_curves", "scores_against_lead", "receptive_field", "strip")
FIGURES = {"forecast.gif"} | {f"{stem}.{suffix}" for stem in STEMS for suffix in ("png", "svg")}
NETWORKS = ("3x3-3x3-2", "fc-3", "persistence")


@pytest.fixture(scope="module")
def digits(command, tmp_path_factory):
    """Of 32 training, 8 validation and 8 test sequences. Not to be written to."""
    return run(command, tmp_path_factory.mktemp("digits"), *TINY, f"--networks={','.join(NETWORKS)}")


def test_digits_from_training_to_figures(digits):
    conv, fc, still = (digits.results[cell.name] for cell in cells(Config(networks=NETWORKS)))
    assert [result["params"] for result in (conv, fc, still)] == [616, 2_418, 0]
    (cell,) = cells(Config(**EXPERIMENT.smoke, networks=("fc-3",), frame=12, observed=2, horizon=3))
    frames = np.asarray(nowcasting_data.load(cell).frames_of({"index": np.arange(40, 48)}))  # of the test split
    squares = ((frames[:, 2:] - frames[:, 1:2]) ** 2).sum(axis=(2, 3, 4)).mean(axis=0)
    assert still["scores"]["by_lead"]["squared_error"] == pytest.approx(squares, rel=1e-4)
    assert still["scores"]["overall"]["squared_error"] == pytest.approx(squares.mean(), rel=1e-4)
    for result in (conv, fc):
        # The trainer's loss of the network that was best, by another way and in other batches.
        assert result["scores"]["overall"]["cross_entropy"] == pytest.approx(result["test_loss"], rel=1e-5)
        assert len({result[f"{split}_loss"] for split in ("train", "validation", "test")}) == 3
        assert result["steps"] == 4
    assert conv["receptive_field"] == [3, 5] and not {"receptive_field", "steps"} & still.keys()
    for result in (conv, fc, still):
        assert result["examples"] == {"train": 32, "validation": 8, "test": 8} and result["minutes"] is None
        assert {len(scores) for scores in result["scores"]["by_lead"].values()} == {3}

    for name in digits.results:
        folder = digits.workdir / "runs" / name
        example = safetensors.numpy.load((folder / "example.safetensors").read_bytes())
        np.testing.assert_array_equal(example["frames"], frames[0, ..., 0])
        assert example["prediction"].shape == (3, 12, 12) and (folder / "environment.json").exists()
        maps = folder / "receptive_field.safetensors"
        assert maps.exists() == ("3x3" in name)
        if "persistence" in name:
            np.testing.assert_array_equal(example["prediction"], [frames[0, 1, ..., 0]] * 3)

    title, rows = table(digits.out)
    assert title.endswith("12x12 pixels, 2 frames seen, 3 forecast; 32 training, 8 test sequences; test scores")
    assert list(rows) == [label_of(network, "lstm") for network in NETWORKS]
    columns = ("parameters", "cross-entropy (nats per sequence)", "squared error per frame", "SSIM", "steps", "seconds")
    for row, result in zip(rows.values(), (conv, fc, still), strict=True):
        assert tuple(row) == columns
        overall = result["scores"]["overall"]
        shown = [float(row[column]) if row[column] != "-" else None for column in columns[1:4]]
        assert shown == [
            pytest.approx(overall[score], rel=5e-3) if score in overall else None
            for score in ("cross_entropy", "squared_error", "ssim")
        ]
        assert row["steps"] == ("-" if result is still else "4")
    found = list(csv.DictReader(io.StringIO((digits.workdir / "summary.csv").read_text())))
    assert [row["network"] for row in found] == list(NETWORKS)
    for row, result in zip(found, (conv, fc, still), strict=True):
        assert row["squared_error"] == str(result["scores"]["overall"]["squared_error"])
        assert row["test_loss"] == str(result.get("test_loss", "")) and row["rainfall_mse"] == row["failure"] == ""
    found = list(csv.DictReader(io.StringIO((digits.workdir / "scores_by_lead.csv").read_text())))
    leads = [(network, str(lead)) for network in NETWORKS for lead in (1, 2, 3)]
    assert [(row["network"], row["lead"]) for row in found] == leads
    expected = [str(value) for result in (conv, fc, still) for value in result["scores"]["by_lead"]["squared_error"]]
    assert [row["squared_error"] for row in found] == expected and {row["csi"] for row in found} == {""}


def test_figures_are_made_again_to_the_byte_and_nothing_is_trained_twice(digits, command, monkeypatch):
    made, summary = files_of(digits.workdir), (digits.workdir / "summary.csv").read_bytes()
    assert made.keys() == FIGURES and all(f"figures/{name}" in digits.out for name in FIGURES)
    with Image.open(io.BytesIO(made["forecast.gif"])) as animation:
        assert animation.n_frames == 5
    monkeypatch.setattr(nowcasting_data, "load", None)
    for further in (("--report_only",), ()):
        again = run(command, digits.workdir, *digits.arguments, *further)
        assert again.out == digits.out and again.err.count("finished before") == (0 if further else 3)
        assert files_of(digits.workdir) == made and (digits.workdir / "summary.csv").read_bytes() == summary


def test_an_interrupted_run_goes_on_to_the_bit(digits, command, capsys, tmp_path):
    arguments = (*TINY, "--networks=fc-3", f"--workdir={tmp_path}")
    asked = iter([False, False, True])  # before the cell, before its first step, after two steps
    assert command(EXPERIMENT, *arguments, stop=lambda: next(asked)) == 75
    name = "moving_digits-fc-3-seed0"
    assert f"interrupted: {tmp_path / 'runs' / name}: stopped at step 2 of 4; the same" in capsys.readouterr().err
    assert command(EXPERIMENT, *arguments) == 0
    one, other = (json.loads((w / "runs" / name / "result.json").read_text()) for w in (tmp_path, digits.workdir))
    for result in (one, other):
        del result["seconds"], result["examples_per_second"]
    assert one == other and one["final_state_sha256"]
    example = f"runs/{name}/example.safetensors"
    assert (tmp_path / example).read_bytes() == (digits.workdir / example).read_bytes()


# Radar

DAYS = {"20160711": (10, 10), "20160712": (6, 6), "20160713": (5, 5)}
"""Where the middle of the rain is at first; it moves by half a pixel a frame, down and to the right."""


def pixels_of(day):
    """Ten frames of 24x24: on the first day there is rain in all quarters, on the others in few."""
    y, x = np.indices((24, 24))
    places = [np.add(DAYS[day], 0.5 * t) for t in range(10)]
    return np.stack([np.round(170 * np.exp(-((y - j) ** 2 + (x - i) ** 2) / 50)) for j, i in places]).astype(np.uint8)


@pytest.fixture(scope="module")
def rainy(tmp_path_factory):
    """In a data folder beside pictures that are no radar's."""
    folder = tmp_path_factory.mktemp("data")
    Image.new("L", (24, 24)).save(folder / "photo.png")
    return write_radar(folder / "radar", dict.fromkeys(DAYS, 5))


def write_radar(folder, minutes):
    for day, step in minutes.items():
        (folder / day).mkdir(parents=True)
        for t, frame in enumerate(pixels_of(day)):
            time = datetime.datetime.strptime(f"{day}1155", "%Y%m%d%H%M") + datetime.timedelta(minutes=step * t)
            Image.fromarray(frame).save(folder / day / f"{time:%Y%m%d%H%M}.png")
    return folder


def windows_of(day, stride):
    """Squares of 12x12 with some rain, and of each the windows of five frames, in grey; by hand."""
    rain = radar.SOURCES["any"].table[pixels_of(day)]
    squares = [rain[:, i : i + 12, j : j + 12] for i in (0, 12) for j in (0, 12)]
    wet = [square for square in squares if np.mean(square >= 0.5) >= 0.05]
    grey = np.round(255 * radar.to_grey(np.array(wet))) / 255
    return np.array([square[start : start + 5] for square in grey for start in range(0, 6, stride)])


RADAR = ("--dataset=radar", "--scale=1", *TINY)


def test_radar_from_frames_to_figures(rainy, command, tmp_path):
    networks = ("fc-3", "persistence")
    done = run(command, tmp_path, *RADAR, f"--data_dir={rainy.parent}", f"--networks={','.join(networks)}")
    trained, still = (done.results[cell.name] for cell in cells(Config(dataset="radar", networks=networks)))
    sizes = [len(windows_of(day, stride)) for day, stride in zip(DAYS, (1, 5, 5), strict=True)]
    assert sizes[0] == 4 * 6 and 2 <= sizes[2] < 4 * 2  # the dry quarters are left out
    for result in (trained, still):
        assert result["examples"] == dict(zip(("train", "validation", "test"), sizes, strict=True))
        assert result["minutes"] == 5
    assert trained["scores"]["overall"]["cross_entropy"] == pytest.approx(trained["test_loss"], rel=1e-5)

    frames = windows_of("20160713", 5)
    rain = radar.to_rain_from_grey(frames)
    forecast, fell = np.repeat(rain[:, 1:2], 3, axis=1), rain[:, 2:]
    overall = still["scores"]["overall"]
    assert overall["rainfall_mse"] == pytest.approx(np.mean((forecast - fell) ** 2), rel=1e-3)
    hits = np.sum((forecast >= 0.5) & (fell >= 0.5))
    assert overall["csi"] == pytest.approx(hits / np.sum((forecast >= 0.5) | (fell >= 0.5)), rel=1e-5)
    assert overall["far"] == pytest.approx(1 - hits / np.sum(forecast >= 0.5), rel=1e-5)
    assert overall["pod"] == pytest.approx(hits / np.sum(fell >= 0.5), rel=1e-5)
    cosine = np.sum(forecast * fell) / np.sqrt(np.sum(forecast**2) * np.sum(fell**2))
    assert overall["correlation"] == pytest.approx(cosine, rel=1e-4)

    # What figures show is the sequence with the most rain.
    found = list(csv.DictReader(io.StringIO((tmp_path / "scores_by_lead.csv").read_text())))
    assert [row["minutes"] for row in found] == ["5", "10", "15"] * 2 and found[-1]["csi"]
    folder = tmp_path / "runs" / "radar-persistence"
    example = safetensors.numpy.load((folder / "example.safetensors").read_bytes())
    np.testing.assert_allclose(example["frames"], frames[frames.sum(axis=(1, 2, 3)).argmax()], rtol=1e-6)
    environment = json.loads((folder / "environment.json").read_text())
    assert len(json.dumps(environment).split(".png")) == 31  # the frames' checksums

    _, rows = table(done.out)
    row = rows[label_of("persistence", "lstm")]
    columns = ("rainfall MSE (mm²/h²)", "CSI", "FAR", "POD", "correlation")
    assert tuple(row) == ("parameters", "cross-entropy (nats per sequence)", *columns, "steps", "seconds")
    shown = [overall[score] for score in ("rainfall_mse", "csi", "far", "pod", "correlation")]
    assert [float(row[column]) for column in columns] == pytest.approx(shown, rel=5e-3)
    assert "rain is 0.5 mm/h or more" in done.out
    assert files_of(tmp_path).keys() == {name for name in FIGURES if "receptive_field" not in name}


def test_optical_flow_beats_persistence_where_rain_only_moves(rainy, command, tmp_path):
    pytest.importorskip("skimage")
    networks = "--networks=optical_flow,persistence"
    # The folder of the frames itself does as well.
    done = run(command, tmp_path, *RADAR, f"--data_dir={rainy}", networks, "--frame=24")
    flow, still = (done.results[f"radar-{name}"]["scores"] for name in ("optical_flow", "persistence"))
    assert flow["overall"]["rainfall_mse"] < 0.5 * still["overall"]["rainfall_mse"]
    assert flow["overall"]["csi"] > still["overall"]["csi"]
    assert files_of(tmp_path).keys() == {n for n in FIGURES if not re.match("loss_curves|receptive_field", n)}


def test_optical_flow_without_its_library_is_one_line_before_anything_is_trained(
    command, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(optical_flow, "available", lambda: False)
    arguments = ("--dataset=radar", "--networks=fc-3,optical_flow", f"--workdir={tmp_path / 'work'}")
    assert command(EXPERIMENT, *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: optical_flow needs scikit-image: ") and not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--data_dir={}/none"], 1, "{}/none does not exist"),
        (
            ["--data_dir={}", "--wet=0.9"],
            1,
            "{}: no square of 12 x 12 pixels .* has rain on 90% of .* 20160711: give a",
        ),
        (["--data_dir={}", "--test_days=20170101"], 2, "no event is of day '20170101': one of 20160711, 20160712"),
        (["--data_dir={}", "--validation_days=20160711", "--test_days=20160711"], 2, "day 20160711 is named twice"),
        (["--data_dir={}/20160711"], 2, r"1 days \(20160711\) cannot be split in 3 parts"),
        (["--data_dir={}", "--frame=26"], 2, "tiles of 26 pixels do not fit frames of 24 x 24"),
        (
            ["--data_dir={}", "--horizon=9"],
            1,
            "{}: an event of 20160711 has 10 frames, fewer than --observed and --horizon together, 11: ",
        ),
        (["--data_dir={}", "--batch_size=25"], 2, "--batch_size=25: there are 24 training sequences, give fewer"),
    ],
)
def test_frames_that_cannot_be_used_are_one_line(rainy, command, capsys, tmp_path, flags, code, message):
    flags = [flag.format(rainy) for flag in flags]
    assert command(EXPERIMENT, *RADAR, "--networks=fc-3", *flags, f"--workdir={tmp_path}") == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.match("error: " + message.replace("{}", re.escape(str(rainy))), err), err


def test_radars_of_different_clocks_are_one_line(command, capsys, tmp_path):
    folder = write_radar(tmp_path / "frames", dict(zip(DAYS, (5, 10, 5), strict=True)))
    assert command(EXPERIMENT, *RADAR, f"--data_dir={folder}", f"--workdir={tmp_path / 'work'}") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder}: events with 5, 10 minutes between frames: ")


def test_other_frames_are_another_run(rainy, command, capsys, tmp_path):
    arguments = (*RADAR, "--networks=persistence", f"--workdir={tmp_path / 'work'}")
    assert command(EXPERIMENT, *arguments, f"--data_dir={rainy}") == 0
    moved = write_radar(tmp_path / "moved", dict.fromkeys(DAYS, 5))
    assert command(EXPERIMENT, *arguments, f"--data_dir={moved}") == 0  # the same ones in another place
    others = write_radar(tmp_path / "others", dict.fromkeys([*DAYS][:2], 5) | {"20160713": 10})
    capsys.readouterr()
    assert command(EXPERIMENT, *arguments, f"--data_dir={others}") != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "belongs to another configuration: files is" in line
    assert command(EXPERIMENT, *arguments, "--report_only", "--data_dir=nowhere") == 0


def test_a_network_beats_persistence_on_sequences_that_it_has_not_seen(command, tmp_path):
    options = ("--frame=16", "--digits=1", "--observed=3", "--horizon=4", "--steps=300", "--evaluations=1")
    sizes = ("--train_examples=2400", "--validation_examples=32", "--test_examples=64")
    done = run(command, tmp_path, *options, *sizes, "--networks=3x3-3x3-8,persistence")
    names = ("moving_digits-3x3-3x3-8-seed0", "moving_digits-persistence")
    conv, still = (done.results[name]["scores"]["overall"]["squared_error"] for name in names)
    assert conv < 0.75 * still


def test_a_pool_larger_than_the_data_is_one_line(command, capsys, tmp_path):
    assert command(EXPERIMENT, *TINY, "--pool=100000", f"--workdir={tmp_path}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: a pool of 100000 of \d+ images: give 1 to \d+$", line)
