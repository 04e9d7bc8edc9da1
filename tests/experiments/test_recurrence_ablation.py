"""The recurrence ablation: its grid, the papers' settings and sizes, the gradients through time, a whole command."""

import csv
import io
import itertools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import sequences
from experiments.recurrence_ablation import EXPERIMENT, Config, cells, gradient_norms
from experiments.sequence_recipes import RECIPES
from experiments.sequence_tasks import TASKS, Loaded
from research.tasks import noise
from research.tasks.language import next_token
from research.training import loop

# Inputs and outputs of a step; of text the Penn Treebank's vocabularies.
SHAPES = {
    "adding": (2, 1),
    "copy": (10, 10),
    "mnist": (1, 10),
    "permuted_mnist": (1, 10),
    "jsb": (88, 88),
    "nottingham": (88, 88),
    "words": (10_000, 10_000),
    "characters": (50, 50),
}


def network_params(cell, inputs, outputs):
    """Shapes of the parameters of a cell's network, without computing them."""
    network = sequences.network_of(cell, Loaded(None, None, inputs, outputs))
    if TASKS[cell.task].network == "text":
        x = (jnp.zeros((cell.batch_size, 2), int), jnp.zeros(cell.batch_size, bool))
        made = jax.eval_shape(lambda key: network.init(key, *x, train=False), jax.random.key(0))
    else:
        made = jax.eval_shape(lambda key: network.init(key, jnp.zeros((1, 2, inputs))), jax.random.key(0))
    return made["params"]


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# The grid


def test_the_grid_is_recipes_times_tasks_times_lengths_times_cells():
    config = Config(
        recipes=("default", "bai2018"),
        tasks=("copy", "mnist", "adding"),
        lengths=(30, 7),
        cells=("gru", "tanh"),
        seeds=(3, 0),
    )
    tasks = [("copy", 30), ("copy", 7), ("mnist", None), ("adding", 30), ("adding", 7)]
    grid = cells(config)
    assert [(cell.recipe, (cell.task, cell.length), cell.cell) for cell in grid] == list(
        itertools.product(config.recipes, tasks, config.cells)
    )
    assert {cell.seed for cell in grid} == {(3, 0)}
    others = [c for units in (4, 5) for seeds in ((0,), (1,)) for c in cells(Config(units=(units, 4), seeds=seeds))]
    assert len(others) == 4 * 4 * 4 and len({cell.name for cell in grid + others}) == len(grid + others)
    assert grid[0].name == "copy30-gru-32-seeds3.0" and grid[-1].name == "adding7-tanh-261-bai2018-seeds3.0"


@pytest.mark.parametrize(
    ("recipe", "lengths"),
    [("default", {"adding": [25, 50, 100], "copy": [25, 50, 100]}), ("bai2018", {"adding": [600], "copy": [1000]})],
)
def test_lengths_that_are_not_given_are_the_recipes(recipe, lengths):
    grid = cells(Config(recipes=(recipe,), tasks=("adding", "copy"), cells=("lstm",)))
    assert {task: [cell.length for cell in grid if cell.task == task] for task in lengths} == lengths


def test_flags_override_recipes():
    only = {"recipes": ("bai2018",), "tasks": ("mnist",), "cells": ("lstm", "tanh")}
    published = cells(Config(**only))
    assert [(c.units, c.optimizer, c.learning_rate, c.batch_size, c.dropout) for c in published] == [
        ((130,), "rmsprop", 1e-3, 64, 0.0),
        ((259,), "rmsprop", 1e-3, 64, 0.0),
    ]
    # A 0 is given too.
    flags = {"units": (9, 8), "optimizer": "sgd", "learning_rate": 0.5, "batch_size": 7, "clip_norm": 0.0}
    for cell in cells(Config(**only, **flags, forget_bias=0.0)):
        assert {name: getattr(cell, name) for name in flags} == flags and cell.forget_bias == 0


@pytest.mark.parametrize(
    ("flags", "durations"),
    [
        ({}, {"default": (1_500, None), "bai2018": (None, 20)}),
        ({"steps": 7}, dict.fromkeys(("default", "bai2018"), (7, None))),
        ({"epochs": 3}, dict.fromkeys(("default", "bai2018"), (None, 3))),
    ],
)
def test_a_duration_takes_the_place_of_the_recipes(flags, durations):
    grid = cells(Config(recipes=tuple(durations), tasks=("mnist",), cells=("lstm",), **flags))
    assert {cell.recipe: (cell.steps, cell.epochs) for cell in grid} == durations


def test_a_kind_of_cell_has_its_own_fields():
    grid = cells(Config(tasks=("adding", "digits"), lengths=(25,)))
    rates = {
        "adding": {"tanh": 3e-3, "irnn": 1e-3, "lstm": 1e-2, "gru": 1e-2},
        "digits": {"tanh": 5e-3, "irnn": 2e-3, "lstm": 5e-3, "gru": 5e-3},
    }
    assert {(c.task, c.cell): c.learning_rate for c in grid} == {
        (task, cell): rate for task, of_cell in rates.items() for cell, rate in of_cell.items()
    }
    assert {cell.learning_rate for cell in cells(Config(learning_rate=0.25))} == {0.25}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_network_of_a_recipe_can_be_trained(recipe):
    for task, fields in RECIPES[recipe].items():
        for cell in fields.get("cells", ["lstm"]):
            flags = {"units": (8,)} if cell == "irnn" else {}
            made = cells(Config(recipes=(recipe,), tasks=(task,), cells=(cell,), **flags))
            assert all((c.steps is None) != (c.epochs is None) for c in made)
            assert all((c.length is None) != TASKS[task].has_length for c in made)
            assert all((c.time is None) != (TASKS[task].network == "text") for c in made)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--recipes=chung2014", "--recipes=chung2014 says nothing of adding: it is for jsb, nottingham, muse, piano"),
        ("--preset=chung2014 --cells=tanh,lstm", "--recipes=chung2014 has no size for lstm on jsb: give --units"),
        ("--learning_rate=0", "--learning_rate=0.0: give a positive number"),
        ("--learning_rate=nan", "--learning_rate=nan: give a positive number"),
        ("--learning_rate=inf", "--learning_rate=inf: give a positive number"),
        ("--dropout=1", "--dropout=1.0: give a probability below 1"),
        ("--dropout=nan", "--dropout=nan: give at least 0"),
        ("--batch_size=9 --devices=2", "--batch_size=9 does not divide by 2 devices: give a multiple"),
        ("--steps=3 --epochs=3", "--epochs=3 and --steps=3: give exactly one of them"),
        ("--cells=4-gram", "--cells=4-gram: '4-gram' is unknown; choose from tanh, relu"),
        ("--lengths=1", "--lengths=1: give at least 2"),
        ("--tasks=addition", "--tasks=addition: 'addition' is unknown"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(refusal, tmp_path, flags, message):
    assert refusal(EXPERIMENT, *flags.split(), f"--workdir={tmp_path / 'work'}").startswith(message)
    assert not (tmp_path / "work").exists()


# The papers' settings and sizes


def preset(name):
    return cells(Config(**EXPERIMENT.presets[name]))


def test_chung2014_is_table_2_at_the_papers_sizes():
    grid = preset("chung2014")
    units = {"tanh": (100,), "gru_before": (46,), "lstm_peepholes": (36,)}
    tasks = ("jsb", "nottingham", "muse", "piano")
    assert [(c.task, c.cell, c.units) for c in grid] == [(t, c, u) for t in tasks for c, u in units.items()]
    for cell in grid:
        assert (cell.optimizer, cell.weight_noise, cell.clip_norm, cell.select) == ("rmsprop", 0.075, 1.0, "best")
        assert (cell.use_bias, cell.forget_bias) == (False, 0.0)
    # At the mean of the paper's 93, 96, 105 and 108 notes; by hand as well as of the network.
    sizes = {}
    for cell in grid[:3]:
        layers = [network_params(cell, inputs, 88)["stack"] for inputs in (100, 101)]
        assert not [name for name in layers[0]["layer1"] if "bias" in name]
        sizes[cell.cell] = sum(map(count, layers)) / 2
    assert sizes == {"lstm_peepholes": 19_764, "gru_before": 20_217, "tanh": 20_050}
    assert sizes["lstm_peepholes"] == 4 * 36 * (100.5 + 36) + 3 * 36


# Bai et al. 2018, Table 1. Units of the LSTM are the paper's where it names them, and the table's sizes do not follow
# from all of them: what does is within a twentieth.
TABLE_1 = {
    "adding": ((130,), 70e3, 69_291),
    "copy": ((50,), None, 12_710),  # 16K
    "mnist": ((130,), 70e3, 69_950),
    "permuted_mnist": ((130,), 70e3, 69_950),
    "jsb": ((200, 200), None, 569_688),  # 300K
    "nottingham": ((280, 280, 280), None, 1_694_648),  # 1M
    "words": ((470, 470), 13e6, 12_948_160),
    "characters": ((430, 430), 3e6, 3_004_890),
}


def test_bai2018_is_table_1():
    grid = preset("bai2018")
    assert [(c.task, c.cell) for c in grid] == list(itertools.product(TABLE_1, ("lstm", "gru", "tanh")))
    assert {c.task: c.length for c in grid if c.length} == {"adding": 600, "copy": 1000}
    found = {
        c.task: (c.optimizer, c.learning_rate, c.clip_norm, c.forget_bias, c.batch_size) for c in grid[::3]
    }  # the LSTMs
    assert found == {
        "adding": ("adam", 2e-3, 5.0, 1.0, 32),
        "copy": ("rmsprop", 5e-4, 1.0, 1.0, 32),
        "mnist": ("rmsprop", 1e-3, 1.0, 1.0, 64),
        "permuted_mnist": ("rmsprop", 1e-3, 1.0, 10.0, 64),
        "jsb": ("adam", 2e-3, 1.0, 1.0, 8),
        "nottingham": ("adam", 4e-3, 1.0, 1.0, 8),
        "words": ("adam", 2e-3, 1.0, 1.0, 16),
        "characters": ("adam", 2e-3, 1.0, 1.0, 32),
    }


@pytest.mark.parametrize("task", [task for task in TABLE_1 if task != "permuted_mnist"])
def test_the_networks_of_bai2018_have_one_size(task):
    units, table, exactly = TABLE_1[task]
    lstm, *others = (cell for cell in preset("bai2018") if cell.task == task)
    size = count(network_params(lstm, *SHAPES[task]))
    assert (lstm.units, size) == (units, exactly)
    assert table is None or size == pytest.approx(table, rel=0.05)
    for cell in others:
        assert count(network_params(cell, *SHAPES[task])) == pytest.approx(size, rel=0.01), cell.cell


ZAREMBA = {  # of each size what the paper's section 4.1 says, and the number of parameters
    "small": {"units": 200, "time": 20, "clip": 5.0, "scale": 0.1, "dropout": 0.0, "decay": (4, 2.0, 13)},
    "medium": {"units": 650, "time": 35, "clip": 5.0, "scale": 0.05, "dropout": 0.5, "decay": (6, 1.2, 39)},
    "large": {"units": 1500, "time": 35, "clip": 10.0, "scale": 0.04, "dropout": 0.65, "decay": (14, 1.15, 55)},
}
PARAMETERS = {"small": 4_651_600, "medium": 19_775_200, "large": 66_022_000}


class Handed(Exception):
    """What reached the trainer."""


def handed(monkeypatch, cell, data):
    def stop(*arguments):
        raise Handed(*arguments)

    monkeypatch.setattr(loop, "train", stop)
    with pytest.raises(Handed) as caught:
        sequences.train(cell, data, loop.Context(None, "", None))
    return caught.value.args


@pytest.mark.parametrize("cell", preset("zaremba2014"), ids=lambda cell: cell.recipe)
def test_zaremba2014_is_the_papers(monkeypatch, cell):
    size = cell.recipe.removeprefix("zaremba2014_")
    paper, an_epoch = ZAREMBA[size], 100
    hold, factor, epochs = paper["decay"]
    assert (cell.task, cell.cell, cell.seed) == ("words", "lstm", (0,))
    assert (cell.units, cell.time, cell.batch_size) == ((paper["units"],) * 2, paper["time"], 20)
    assert (cell.dropout, cell.init_scale, cell.forget_bias) == (paper["dropout"], paper["scale"], 0.0)
    assert count(network_params(cell, *SHAPES["words"])) == PARAMETERS[size]

    splits = loop.Splits({}, 20 * an_epoch, 20, 20)
    data = Loaded(splits, next_token, 5, 5)
    make_model, make_task, optimizer, schedule, _, plan, _ = handed(monkeypatch, cell, data)
    assert (plan.steps, plan.batch_size, plan.select) == (epochs * an_epoch, 20, "best")
    model = make_model(axis_name="batch")
    assert (model.dropout, model.init_scale, model.axis_name) == (paper["dropout"], paper["scale"], "batch")
    rate = {epoch: float(schedule(epoch * an_epoch)) / paper["time"] for epoch in (0, hold - 1, hold, epochs - 1)}
    last = factor ** -(epochs - hold)
    assert rate == pytest.approx({0: 1, hold - 1: 1, hold: 1 / factor, epochs - 1: last}, rel=1e-5)
    assert float(schedule(hold * an_epoch - 1)) == float(schedule(0))

    # The paper sums the loss over the steps of a window, with rate 1 and this threshold: the same update.
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 5, (2, 3, paper["time"]))
    batch = {"inputs": tokens, "targets": targets, "valid": np.ones_like(tokens, bool), "first": np.ones(3, bool)}
    task = make_task(lambda variables, inputs, **_: (variables["params"][inputs["tokens"]], {}))
    mean_gradient = jax.jit(jax.grad(lambda params: task.loss({"params": params}, batch, None)[0]))
    clipped = []
    for scale in (0.01, 30.0):
        params = np.float32(scale * rng.normal(size=(5, 5)))
        gradient = mean_gradient(params)
        update, _ = optimizer.update(gradient, optimizer.init(params), params)
        softmax = np.exp(params - params.max(axis=1, keepdims=True))
        softmax /= softmax.sum(axis=1, keepdims=True)
        summed = np.zeros((5, 5))
        for token, target in zip(tokens.flat, targets.flat, strict=True):
            summed[token] += (softmax[token] - np.eye(5)[target]) / 3
        norm = np.linalg.norm(summed)
        clipped.append(bool(norm > paper["clip"]))
        np.testing.assert_allclose(update, -summed * min(1, paper["clip"] / norm), rtol=1e-4, atol=1e-6)
    assert clipped == [False, True]


def test_what_a_cell_says_reaches_the_trainer(monkeypatch):
    data = Loaded(loop.Splits({}, 1_000, 100, 50), lambda apply: "task", 2, 1)
    flags = {"tasks": ("adding",), "lengths": (5,), "cells": ("lstm_peepholes",), "seeds": (4, 2), "batch_size": 10}
    flags |= {"epochs": 3, "evaluations": 4, "steps_per_call": 7, "clip_norm": 0.0, "learning_rate": 0.5}
    flags |= {"forget_bias": 2.0, "segment": 3, "units": (6, 4), "optimizer": "sgd", "devices": 2, "parallel": "jit"}
    (cell,) = cells(Config(**flags))
    make_model, make_task, optimizer, schedule, splits, plan, _ = handed(monkeypatch, cell, data)
    # 300 steps and 4 evaluations, in whole stretches of 7.
    assert (plan.seed, plan.steps, plan.batch_size, plan.steps_per_call) == ((4, 2), 294, 10, 7)
    assert (plan.evaluate_every, plan.train_evaluation_examples, splits) == (70, 100, data.splits)
    assert (plan.select, plan.devices, plan.parallel) == ("last", 2, "jit")
    stack = make_model().stack
    assert (stack.features, stack.segment, stack.use_bias) == ((6, 4), 3, True)
    own = dict.fromkeys(("peephole_i", "peephole_f", "peephole_o"), jnp.zeros(1))
    assert stack.cell.own.keys() == own.keys()
    carry = stack.cell.initial(1, 1)._replace(c=jnp.ones((1, 1)))
    kept = stack.cell.step(carry, jnp.zeros((1, 4)), jnp.zeros((1, 4)), own).c
    assert float(kept[0, 0]) == pytest.approx(1 / (1 + math.exp(-2)))
    assert make_task(None) == "task" and float(schedule(10**6)) == 0.5
    gradient = jnp.full(3, 1e3)
    update, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    np.testing.assert_allclose(update, -0.5 * gradient)

    monkeypatch.setattr(noise, "with_weight_noise", lambda task, std: (task, std))
    (noisy,) = cells(Config(**flags, weight_noise=0.25))
    assert handed(monkeypatch, noisy, data)[1](None) == ("task", 0.25)


# The gradient at the hidden states


def test_gradient_norms_are_those_of_a_loop_by_hand():
    (cell,) = cells(Config(tasks=("adding",), lengths=(5,), cells=("tanh",), units=(3,)))
    data = sequences.load(cell)
    rng = np.random.default_rng(0)
    shapes = {"input_kernel": (2, 3), "recurrent_kernel": (3, 3), "bias": (3,)}
    layer = {name: rng.normal(size=(3, *shape)).astype(np.float32) for name, shape in shapes.items()}
    head = {"kernel": rng.normal(size=(3, 3, 1)).astype(np.float32), "bias": np.float32([[0.5], [-1.0], [0.0]])}
    layer["bias"][2, 0] = np.nan
    *found, lost = gradient_norms(cell, data, {"stack": {"layer1": layer}, "head": head})
    # One of three seeds diverged: it has no norms, and the others have theirs.
    assert lost == [None] * 5 and np.shape(found) == (2, 5)

    first, _ = data.splits.range("validation")
    examples = {name: array[first : first + 64] for name, array in data.splits.arrays.items()}

    def loss(nudges, layer, head, x, y):
        h = jnp.zeros(3)
        for t in range(5):
            h = jnp.tanh(x[t] @ layer["input_kernel"] + h @ layer["recurrent_kernel"] + layer["bias"]) + nudges[t]
        return jnp.square(h @ head["kernel"][:, 0] + head["bias"][0] - y)

    of_all = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, None, None, 0, 0)))
    for seed in (0, 1):
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], (layer, head))
        gradients = of_all(jnp.zeros((5, 3)), *one, examples["inputs"], examples["targets"])
        np.testing.assert_allclose(found[seed], np.linalg.norm(gradients, axis=-1).mean(axis=0), rtol=1e-4)


# A whole command


def figures_of(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "figures").iterdir()}


def test_a_command_from_training_to_figures_and_again(commands, command, capsys, monkeypatch, tmp_path):
    flags, workdir, again = ("--smoke", "--cells=lstm"), tmp_path / "work", tmp_path / "again"
    done = commands.run(*flags, f"--workdir={workdir}", experiment="recurrence_ablation")
    assert done.returncode == 0, done.stderr
    assert "without memory: 0.1667\n" in done.stdout and "without memory: 90.00%\n" in done.stdout
    assert "adding problem, T = 10, mean squared error after the last step\n" in done.stdout

    lengths = {"adding10-lstm-8-seeds0.1": 10, "digits-lstm-8-seeds0.1": 64}
    assert {path.name for path in (workdir / "runs").iterdir()} == lengths.keys()
    rows = list(csv.DictReader(io.StringIO((workdir / "summary.csv").read_text())))
    assert [(row["task"], row["seed"]) for row in rows] == list(itertools.product(("adding", "digits"), "01"))
    for name, length in lengths.items():
        folder = workdir / "runs" / name
        result = json.loads((folder / "result.json").read_text())
        assert result["steps"] == 4 and len(set(result["test_loss"])) == 2
        losses = [float(row["test_loss"]) for row in rows if row["task"] in name]
        assert losses == result["test_loss"]
        gradients = json.loads((folder / "gradients.json").read_text())
        assert gradients["initial"] != gradients["final"]
        assert {np.shape(norms) for norms in gradients.values()} == {(2, length)}
    figures = figures_of(workdir)
    stems = ("loss_curves", "gradient_adding10", "gradient_digits")
    assert figures.keys() == {f"{stem}.{suffix}" for stem in stems for suffix in ("png", "svg")}

    # Elsewhere, in another process, from the run folders alone; then all over, of which nothing is left to do.
    shutil.copytree(workdir / "runs", again / "runs")
    assert command(EXPERIMENT, *flags, "--report_only", f"--workdir={again}") == 0
    assert capsys.readouterr().out.replace(str(again), str(workdir)) == done.stdout
    assert figures_of(again) == figures
    assert (again / "summary.csv").read_bytes() == (workdir / "summary.csv").read_bytes()
    monkeypatch.setattr(sequences, "load", None)
    assert command(EXPERIMENT, *flags, f"--workdir={workdir}") == 0
    out, err = capsys.readouterr()
    assert out == done.stdout and err.count("finished before") == 2
