"""--precision: whose flag it is, what it changes in a run and what it leaves, where it is refused."""

import csv
import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    depth_ablation,
    finetune,
    generate,
    identity_mappings,
    language_model,
    nowcasting,
    precision,
    propagation,
    recurrence_ablation,
    runner,
    sequences,
)
from experiments.nowcasting_cells import network_of as nowcaster
from research.training import checkpoint, run_folder

EXPERIMENTS = {
    "depth_ablation": depth_ablation.EXPERIMENT,
    "identity_mappings": identity_mappings.EXPERIMENT,
    "finetune": finetune.EXPERIMENT,
    "recurrence_ablation": recurrence_ablation.EXPERIMENT,
    "language_model": language_model.EXPERIMENT,
    "nowcasting": nowcasting.EXPERIMENT,
}
OWN_FLAGS = {"finetune": {"starts": ("scratch",)}}


def grid(name, **fields):
    experiment = EXPERIMENTS[name]
    return experiment.cells(experiment.config(**OWN_FLAGS.get(name, {}), **fields))


# What it is to a cell


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_float32_is_the_run_that_it_was_and_another_precision_another_run(name):
    for old, new in zip(grid(name), grid(name, precision="bfloat16"), strict=True):
        assert old.precision == "float32" and "precision" not in runner.identity(old)
        assert runner.identity(new) == {**runner.identity(old), "precision": "bfloat16"}
        assert new.name == old.name + "-bfloat16"
    assert grid(name, precision="float32") == grid(name)


def test_a_run_from_before_the_flag_goes_on(tmp_path):
    (cell,) = grid("depth_ablation", depths=(8,), blocks=("plain",))
    old = {f.name: getattr(cell, f.name) for f in dataclasses.fields(cell) if f.metadata.get("identity", True)}
    del old["precision"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    run_folder.check_config(tmp_path, runner.identity(cell))


def test_every_network_is_told(tmp_path):
    text = tmp_path / "text"
    text.write_text("any text\n" * 100)
    for wanted, dtype in (("float32", None), ("tf32", None), ("bfloat16", jnp.bfloat16)):
        assert depth_ablation.network_of(grid("depth_ablation", precision=wanted)[0]).dtype is dtype
        assert identity_mappings.network_of(grid("identity_mappings", precision=wanted)[0]).dtype is dtype
        assert nowcaster(grid("nowcasting", precision=wanted)[0]).dtype is dtype
        for cell in grid("recurrence_ablation", precision=wanted):
            assert sequences.network_of(cell, sequences.of_vocabulary(3)).stack.dtype is dtype
        for cell in grid("language_model", precision=wanted, text=str(text)):
            assert sequences.network_of(cell, sequences.of_vocabulary(3)).dtype is dtype


# What it is to products


@pytest.fixture
def on_gpu(monkeypatch):
    """JAX says that there is a GPU; nothing is computed on it."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize(
    ("wanted", "products"), [("float32", "highest"), ("bfloat16", "highest"), ("tf32", "tensorfloat32")]
)
def test_products_are_what_was_asked_for_while_the_run_lasts(on_gpu, wanted, products):
    before = jax.config.jax_default_matmul_precision
    with precision.products(SimpleNamespace(precision=wanted)):
        assert jax.config.jax_default_matmul_precision == products
        lowered = jax.make_jaxpr(lambda x: x @ x)(jnp.ones((2, 2)))
        assert {"highest": "HIGHEST", "tensorfloat32": "HIGH"}[products] in str(lowered)
    assert jax.config.jax_default_matmul_precision == before
    with precision.products(SimpleNamespace()):  # says nothing of it
        assert jax.config.jax_default_matmul_precision == before
    with precision.products(propagation.cells(propagation.Config())[0]):
        assert jax.config.jax_default_matmul_precision == "highest"


def test_on_the_cpu_nothing_is_set():
    before = jax.config.jax_default_matmul_precision
    with precision.products(SimpleNamespace(precision="float32")):
        assert jax.config.jax_default_matmul_precision == before


@dataclasses.dataclass(frozen=True)
class Toy:
    """The config and its one cell."""

    precision: str = precision.field()
    name = "toy"


def test_a_command_runs_its_cells_within(command, on_gpu, tmp_path, capsys):
    found = []

    def run(cell, context):
        found.append(jax.config.jax_default_matmul_precision)
        return {}

    toy = runner.Experiment("toy", Toy, lambda config: [config], run, lambda workdir, names: None)
    assert command(toy, f"--workdir={tmp_path}") == 0 and found == ["highest"]
    assert jax.config.jax_default_matmul_precision is None


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("gpu", "9.0", True),
        ("gpu", "8.0", True),
        ("gpu", "12.0", True),
        ("gpu", "7.5", False),
        ("gpu", "gfx90a", False),
        ("cpu", None, False),
        ("tpu", None, False),
    ],
)
def test_which_devices_have_tf32(platform, capability, expected):
    known = {} if capability is None else {"compute_capability": capability}
    assert precision.has_tf32(SimpleNamespace(platform=platform, **known)) is expected


@pytest.mark.parametrize("name", ["depth_ablation", "recurrence_ablation", "nowcasting"])
def test_where_there_is_no_tf32_it_is_refused(command, name, tmp_path, capsys):
    workdir = tmp_path / "work"
    assert command(EXPERIMENTS[name], "--smoke", "--precision=tf32", f"--workdir={workdir}") == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("error: --precision=tf32: ") and "bfloat16" in line
    assert not workdir.exists()


# What it is to a run


def arrays_of(folder):
    """The arrays of every checkpoint of a run."""
    paths = list((folder / "checkpoints").glob("*.safetensors"))
    assert paths
    return [array for path in paths for array in checkpoint.load(path).arrays.values()]


def test_a_residual_network_learns_in_bfloat16_as_in_float32(command, tmp_path, capsys):
    # Both in one working folder: they are two runs.
    recipe = ("--depths=8", "--blocks=residual", "--steps=40", "--evaluations=1", f"--workdir={tmp_path}")
    results, summaries, shown = {}, {}, {}
    for name in ("float32", "bfloat16"):
        assert command(depth_ablation.EXPERIMENT, *recipe, f"--precision={name}") == 0
        folder = tmp_path / "runs" / ("residual-8-w8-seed0" + ("-bfloat16" if name == "bfloat16" else ""))
        results[name] = run_folder.read_result(folder)
        assert {array.dtype.name for array in arrays_of(folder)} <= {"float32", "int32"}
        with open(tmp_path / "summary.csv", newline="") as file:
            (summaries[name],) = csv.DictReader(file)
        shown[name] = capsys.readouterr().out
    exact, short = results["float32"], results["bfloat16"]
    assert exact["final_state_sha256"] != short["final_state_sha256"]
    assert exact["train_loss"] < 0.5  # of 2.3
    assert abs(short["train_loss"] - exact["train_loss"]) < 0.1 and short["train_loss"] != exact["train_loss"]
    assert summaries["bfloat16"]["precision"] == "bfloat16" and "in bfloat16" in shown["bfloat16"]
    assert "precision" not in summaries["float32"] and "in float32" not in shown["float32"]


SMOKE = {
    "recurrence_ablation": ("--smoke", "--tasks=adding", "--cells=lstm,gru_before"),  # two seeds side by side
    "language_model": ("--smoke", "--cells=lstm,4-gram"),
    "nowcasting": ("--smoke", "--frame=12", "--observed=2", "--horizon=2", "--networks=3x3-3x3-4,persistence"),
}


@pytest.mark.parametrize("name", SMOKE)
def test_sequences_texts_and_frames_in_bfloat16(command, name, tmp_path, capsys, quick_compilation):
    text = tmp_path / "text"
    text.write_text("any text of some letters\n" * 100)
    workdir = tmp_path / "work"
    arguments = [*SMOKE[name], f"--workdir={workdir}", *([f"--text={text}"] if name == "language_model" else [])]
    assert command(EXPERIMENTS[name], *arguments, "--precision=bfloat16") == 0
    assert "in bfloat16" in capsys.readouterr().out
    folders = sorted((workdir / "runs").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert folder.name.endswith("-bfloat16")
        if "persistence" not in folder.name:
            assert {array.dtype.name for array in arrays_of(folder)} <= {"float32", "int32", "int64"}
            assert np.isfinite(np.ravel(run_folder.read_result(folder)["test_loss"])).all()
    with open(workdir / "summary.csv", newline="") as file:
        assert {row["precision"] for row in csv.DictReader(file)} == {"bfloat16"}
    if name == "language_model":
        cell, _, variables = generate.load(folders[1], None)
        assert cell.precision == "bfloat16" and variables["carry"]["text"]["state"][0].c.dtype == np.float32


# Two virtual devices, in a process of its own. One step in bfloat16, three ways to spread it.
MODES = """
import functools
import json

import jax

jax.config.update("jax_num_cpu_devices", 2)

import jax.numpy as jnp
import numpy as np

from research.data import digits
from research.models import cifar_resnet
from research.tasks.classification import classification
from research.training import optimizers, parallel, state, step

train = digits.load().train
arrays = {"images": train.images[:16], "labels": train.labels[:16]}
schedule = optimizers.step_decay(0.1, drops=())
optimizer = optimizers.sgd(schedule)
make_model = functools.partial(cifar_resnet, 14, "residual", 4, dtype=jnp.bfloat16, remat=True)
initial = jax.device_get(state.initialize(make_model(), optimizer, 0, jnp.zeros((1, 8, 8, 1))))
rows = np.arange(16, dtype=np.int32)[None]
found = {}
for mode in ("jit", "pmap", "shard_map"):
    mesh, axis = parallel.make_mesh(2), parallel.axis_name(mode)
    task = classification(state.bind(make_model(axis_name=axis)), mean=train.images.mean(axis=0, dtype="float32"))
    stretch = step.make_stretch(task.loss, optimizer, schedule, axis)
    place = functools.partial(parallel.replicate, mesh=mesh)
    arguments = place(initial), place(arrays), place(state.stream(0, "augmentation"))
    compiled = parallel.compile_stretch(stretch, mode, mesh, (*arguments[:2], rows, arguments[2]))
    final, metrics = jax.device_get(compiled(*arguments[:2], rows, arguments[2]))
    leaves = state.flatten(final)
    assert all(leaf.dtype == np.float32 for name, leaf in leaves.items() if name != "step" and "count" not in name)
    assert metrics["loss"].dtype == metrics["gradient_norm"].dtype == np.float32
    found[mode] = np.concatenate([np.ravel(leaf) for name, leaf in leaves.items() if name.startswith("params")])
start = np.concatenate([np.ravel(l) for name, l in state.flatten(initial).items() if name.startswith("params")])
moved = np.linalg.norm(found["jit"] - start)
print(json.dumps({mode: float(np.linalg.norm(found[mode] - found["jit"]) / moved) for mode in found}))
"""


def test_modes_agree_as_far_as_rounding_lets_them(commands):
    result = commands.script(MODES, NPROC="8")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.keys() == {"jit", "pmap", "shard_map"} and max(found.values()) < 0.05, found
