"""The identity-mapping comparisons: their grids, the paper's recipe, what every variant is, and whole commands."""

import csv
import functools
import io
import itertools
import json
import re
import shutil

import jax
import numpy as np
import pytest

from experiments import depth_ablation, identity_mappings
from experiments import images as experiment_images
from experiments.identity_mappings import EXPERIMENT, Config, cells, network_of, parse_network
from experiments.identity_tables import FAIL, PAPER, VARIANTS, paper_error, paper_network
from research.data import images
from research.errors import UsageError
from research.models import cifar_resnet, joins
from research.training import loop

# He et al. 2016, from the page: variant -> test error of ResNet-110 in percent, None where it "fails".
TABLE1 = {
    "original": 6.61,
    "scale_0_1": None,
    "scale_0.5_1": None,
    "scale_0.5_0.5": 12.35,
    "exclusive_gate_0": None,
    "exclusive_gate_-6": 8.70,
    "exclusive_gate_-7": 9.81,
    "shortcut_gate_0": 12.86,
    "shortcut_gate_-6": 6.91,
    "conv_1x1": 12.22,
    "dropout": None,
}
# Of ResNet-110 and of ResNet-164.
TABLE2 = {
    "original": (6.61, 5.93),
    "norm_after_addition": (8.17, 6.50),
    "relu_before_addition": (7.84, 6.14),
    "relu_only_preactivation": (6.71, 5.91),
    "full_preactivation": (6.37, 5.46),
}
# Original unit and pre-activation unit.
TABLE3 = {
    "single-110": (9.90, 8.91),
    "basic-110": (6.61, 6.37),
    "bottleneck-164": (5.93, 5.46),
    "bottleneck-1001": (7.61, 4.92),
}
PRESETS = {
    "shortcuts": (["basic-110"], list(TABLE1)),
    "activations": (["basic-110", "bottleneck-164"], list(TABLE2)),
    "depth": (list(TABLE3), ["original", "full_preactivation"]),
}


# The grid


def test_the_grid_is_networks_times_variants_times_seeds():
    config = Config(networks=("basic-8", "bottleneck-11"), variants=("dropout", "original"), seeds=(0, 3, 10))
    grid = cells(config)
    assert [(f"{cell.unit}-{cell.depth}", cell.variant, cell.seed) for cell in grid] == list(
        itertools.product(config.networks, config.variants, config.seeds)
    )
    others = [cell for width in (4, 16) for cell in cells(Config(width=width, variants=tuple(VARIANTS)))]
    assert len({cell.name for cell in grid + others}) == len(grid) + 2 * len(VARIANTS) * 3
    # Rematerialisation changes memory and time and no number; it is in the folder's configuration all the same.
    assert {cell.remat for cell in cells(Config(remat=True))} == {True}


@pytest.mark.parametrize(
    ("text", "network"),
    [("basic-110", ("basic", 110)), ("bottleneck-1001", ("bottleneck", 1001)), ("single-5", ("single", 5))],
)
def test_a_network_is_a_unit_and_its_layers(text, network):
    assert parse_network(text) == network


@pytest.mark.parametrize("text", ["basic110", "basic-", "-110", "110", "basic-x", "basic-1.5", "basic-0110", ""])
def test_another_text_is_no_network(text):
    with pytest.raises(UsageError, match=re.escape(f"--networks={text}: write unit-layers, such as basic-110")):
        parse_network(text)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--networks=basic", "--networks=basic: write unit-layers"),
        ("--networks=dense-110", "unit 'dense' is unknown: choose from basic, bottleneck, single"),
        ("--networks=basic-110,basic-111", "depth 111 is not 6n+2"),
        ("--networks=bottleneck-111", "depth 111 is not 9n+2 (three stages of n blocks of three layers): try"),
        ("--networks=single-111", "depth 111 is not 3n+2"),
        ("--networks=basic-8,basic-08", "--networks=basic-08: write"),
        ("--networks=basic-8,basic-8", "names a value twice"),
        ("--variants=original,highway", "'highway' is unknown; choose from original, scale_0_1, scale_0.5_1"),
        ("--preset=shortcut", "preset=shortcut"),
        ("--batch_size=1281", "digits has 1280 training images"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(refusal, tmp_path, flag, message):
    assert message in refusal(EXPERIMENT, flag, f"--workdir={tmp_path / 'work'}")
    assert not (tmp_path / "work").exists()


# The paper's settings


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_is_a_table_of_the_paper(preset):
    assert EXPERIMENT.presets.keys() == PRESETS.keys()
    grid = cells(Config(**EXPERIMENT.presets[preset]))
    assert [(f"{cell.unit}-{cell.depth}", cell.variant, cell.seed) for cell in grid] == list(
        itertools.product(*PRESETS[preset], range(5))
    )


def test_the_papers_numbers():
    for table in (
        {("basic-110", variant): error for variant, error in TABLE1.items()},
        {("basic-110", variant): errors[0] for variant, errors in TABLE2.items()},
        {("bottleneck-164", variant): errors[1] for variant, errors in TABLE2.items()},
        {(network, "original"): errors[0] for network, errors in TABLE3.items()},
        {(network, "full_preactivation"): errors[1] for network, errors in TABLE3.items()},
    ):
        assert {(n, v): PAPER[n][v] for n, v in table} == {k: FAIL if e is None else e for k, e in table.items()}
    # And no others.
    counts = {network: len(errors) for network, errors in PAPER.items()}
    assert counts == {"basic-110": 15, "bottleneck-164": 5, "single-110": 2, "bottleneck-1001": 2}
    assert paper_error("original", "bottleneck-164") == "5.93%" and paper_error("dropout", "basic-110") == "fail"
    assert paper_error("exclusive_gate_-6", "basic-110") == "8.70%"


def test_which_of_the_papers_networks_stands_beside_ours():
    assert paper_network("bottleneck-164", TABLE2) == "bottleneck-164"
    assert paper_network("single-110", ["original"]) == "single-110"
    # Its ResNet-164 and its single layers were not trained with these: all rows are beside one network.
    assert paper_network("bottleneck-164", ["original", "exclusive_gate_-6"]) == "basic-110"
    assert paper_network("single-110", TABLE2) == paper_network("basic-56", ["original"]) == "basic-110"


class Handed(Exception):
    """What reached the trainer."""


def handed(monkeypatch, cell):
    def stop(*arguments, start):
        assert start is None
        raise Handed(*arguments)

    monkeypatch.setattr(loop, "train", stop)
    digits = images.load("digits")
    monkeypatch.setattr(experiment_images, "load", lambda *_: digits)
    with pytest.raises(Handed) as caught:
        identity_mappings.run(cell, loop.Context(None, "", None))
    return caught.value.args


def test_the_trainer_gets_the_papers_recipe_for_every_cell(monkeypatch):
    rates = {}
    for preset in PRESETS:
        for cell in cells(Config(**EXPERIMENT.presets[preset])):
            if cell.seed not in (0, 4):
                continue
            model, task, _, schedule, _, plan, _ = handed(monkeypatch, cell)
            assert (cell.dataset, cell.width, cell.weight_decay) == ("cifar10", 16, 1e-4)
            assert (plan.steps, plan.batch_size, plan.seed) == (64_000, 128, cell.seed)
            assert plan.evaluate_every == 1_000 and plan.evaluate_every % plan.steps_per_call == 0
            assert (task.keywords["crop"], task.keywords["flip"]) == (4, True)
            layers = {"single": 3, "basic": 6, "bottleneck": 9}[cell.unit]
            assert [stage.units for stage in model().stages] == [(cell.depth - 2) // layers] * 3
            # As text, since equal partials do not compare equal.
            assert str(model(axis_name="batch")) == str(network_of(cell, axis_name="batch"))
            assert model(axis_name="batch").axis_name == "batch" and not model().remat
            steps = (0, 399, 400, 31_999, 32_000, 47_999, 48_000, 63_999)
            # Compared as one number, since asking each of 58 schedules at 8 steps takes seconds.
            rates[cell.learning_rate, cell.warmup_steps, cell.steps] = [float(schedule(step)) for step in steps]
    # Warm-up for all, whatever the depth.
    (found,) = rates.values()
    assert found == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_rematerialisation_reaches_the_trainer(monkeypatch):
    (cell,) = cells(Config(networks=("basic-8",), variants=("original",), seeds=(0,), remat=True))
    assert handed(monkeypatch, cell)[0]().remat


# What the variants are


def test_every_variant_is_what_its_name_says():
    expected = {name: ("original", joins.Add, {}, "A") for name in VARIANTS}
    for shortcut, branch in (("0", "1"), ("0.5", "1"), ("0.5", "0.5")):
        scales = {"shortcut_scale": float(shortcut), "branch_scale": float(branch)}
        expected[f"scale_{shortcut}_{branch}"] = ("original", joins.Scale, scales, "A")
    for kind, biases in (("exclusive", (0, -6, -7)), ("shortcut", (0, -6))):
        for bias in biases:
            gate = {"exclusive": kind == "exclusive", "bias": float(bias)}
            expected[f"{kind}_gate_{bias}"] = ("original", joins.Gate, gate, "A")
    expected["conv_1x1"] = ("original", joins.Add, {}, "C")
    expected["dropout"] = ("original", joins.DropoutShortcut, {}, "A")
    for placement in tuple(TABLE2)[1:]:
        expected[placement] = (placement, joins.Add, {}, "A")
    for name, variant in VARIANTS.items():
        model = cifar_resnet(8, **variant.options)
        join = model.join if isinstance(model.join, functools.partial) else functools.partial(model.join)
        assert (model.placement, join.func, join.keywords, model.option) == expected[name], name
    assert expected.keys() == VARIANTS.keys() and len({variant.label for variant in VARIANTS.values()}) == 15
    assert joins.DropoutShortcut(train=True).rate == 0.5


def program(variant):
    """Initialisation and a training pass as text: every constant and every operation."""
    model, x = cifar_resnet(8, width=2, **VARIANTS[variant].options), np.zeros((2, 8, 8, 3), np.float32)

    def whole(key):
        variables = model.init(key, x, train=True)
        return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(whole)(jax.random.key(0))))  # without addresses


def test_every_variant_computes_something_else():
    programs = {name: program(name) for name in VARIANTS}
    assert len(set(programs.values())) == 15
    assert program("original") == programs["original"], "texts of one network differ: this proves nothing"


# Whole commands


def test_a_command_from_training_to_figures_and_its_report_again(commands, command, capsys, tmp_path):
    flags = ("--smoke", "--networks=basic-8", "--variants=original,full_preactivation")
    workdir, again = tmp_path / "work", tmp_path / "again"
    done = commands.run(*flags, f"--workdir={workdir}", experiment="identity_mappings")
    assert done.returncode == 0, done.stderr
    assert all(re.match(r"\[[12]/2\] ", line) for line in done.stderr.splitlines())
    assert (
        "basic-8, digits: paper | here" in done.stdout and "Differences of these runs from the paper's:" in done.stdout
    )
    rows = list(csv.DictReader(io.StringIO((workdir / "summary.csv").read_text())))
    for row, label, paper in zip(rows, ("original", "full pre-activation"), ("6.61%", "6.37%"), strict=True):
        folder = workdir / "runs" / f"{row['variant']}-basic-8-w4-seed0"
        result = json.loads((folder / "result.json").read_text())
        assert result["steps"] == 4 and row["test_error"] == str(result["test_error"])
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{label}  ")]
        assert re.split("  +", line)[1:4] == [paper, *(f"{result[f'{s}_error']:.2%}" for s in ("test", "train"))]
        signal = json.loads((folder / "signal.json").read_text())
        assert {len(signal[moment]["output_variance"]) for moment in ("initial", "final")} == {3}
    figures = {path.name: path.read_bytes() for path in (workdir / "figures").iterdir()}
    assert figures.keys() == {f"{n}_basic-8.{s}" for n in ("errors", "curves", "signal") for s in ("png", "svg")}

    shutil.copytree(workdir / "runs", again / "runs")
    assert command(EXPERIMENT, *flags, "--report_only", f"--workdir={again}") == 0
    assert capsys.readouterr().out.replace(str(again), str(workdir)) == done.stdout
    assert {path.name: path.read_bytes() for path in (again / "figures").iterdir()} == figures
    assert (again / "summary.csv").read_bytes() == (workdir / "summary.csv").read_bytes()


@pytest.mark.parametrize(("module", "code", "word"), [(identity_mappings, 0, "diverged"), (depth_ablation, 1, "error")])
def test_divergence_is_a_result_of_this_experiment_alone(command, finished, capsys, tmp_path, module, code, word):
    """The paper's Table 1 has rows that fail; in the depth ablation a diverged run is a mistake."""
    flags = {"networks": ("basic-8",), "variants": ("original",)} if code == 0 else {"depths": (8,)}
    if code:
        flags["blocks"] = ("residual",)
    (cell,) = module.cells(module.Config(**flags, seeds=(0,)))
    finished(tmp_path, cell, {"failure": "the loss is not finite", "failed_at_step": 1})
    arguments = [f"--{name}={','.join(map(str, values))}" for name, values in flags.items()]
    assert command(module.EXPERIMENT, *arguments, "--seeds=0", f"--workdir={tmp_path}") == code
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == f"{word}: the loss is not finite"
    assert "failed" in out and (tmp_path / "summary.csv").exists()
