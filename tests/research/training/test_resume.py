"""Killed, stopped, damaged, and started again: the end is to the bit that of a run which nothing happened to."""

import json
import random
import shutil
import signal

import pytest

from tests.commands import bits, run_of, saved_steps, wait_for

# A tiny network, with BatchNorm and augmentation so that nothing a run carries is missing, trained by the one trainer.
# Arguments: FOLDER CACHE DEVICES FATES... Each of FATES is a list: "0.3,0.8" is a first life that ends after 0.3 of the
# moments of an uninterrupted one, a second that ends at 0.8, and one more that finishes the run; "damage", "ruin" and
# "shorten" happen between lives; "all" stands for one fate for each moment. A moment is before a system call that
# changes what will be found, or when half of the waiting metrics are written. Each life is a fork of a process that
# never used a device.
LIVES = """
import functools
import hashlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

from research.data import digits
from research.tasks.classification import classification
from research.training import loop, optimizers, run_folder
from research.training.progress import Reporter

jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_num_cpu_devices", int(sys.argv[3]))


class Net(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(8)(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(x))
        return nn.Dense(10)(x)


def train(folder):
    data = digits.load()
    parts = (data.train, data.validation, data.test)
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels")}
    schedule = optimizers.step_decay(0.1, drops=(3,))
    plan = loop.Plan(seed=0, steps=5, batch_size=16, steps_per_call=2, evaluate_every=2)
    task = functools.partial(classification, mean=data.train.images.mean(0), crop=1, flip=True)
    optimizer = optimizers.sgd(schedule)
    with run_folder.open_run(folder, {"seed": 0}) as run, open(f"{folder}.log", "a") as log, Reporter(log) as reporter:
        context = loop.Context(run, "run", reporter)
        outcome = loop.train(Net, task, optimizer, schedule, loop.Splits(arrays, *map(len, parts)), plan, context)
        run.finish({"final_state_sha256": outcome.sha256, "evaluations": outcome.evaluations})


def life(folder, death):
    moments = 0

    def moment():
        nonlocal moments
        moments += 1
        if moments == death:
            os.kill(os.getpid(), signal.SIGKILL)

    def mortal(call):
        def wrapper(*args, **kwargs):
            moment()
            return call(*args, **kwargs)

        return wrapper

    def torn(flush):
        def wrapper(self):
            if whole := list(self._waiting):
                size = os.fstat(self._file.fileno()).st_size
                self._file.write(b"".join(whole)[: len(b"".join(whole)) // 2])
                moment()
                truncate(self._file.fileno(), size)
            return flush(self)

        return wrapper

    truncate = os.ftruncate
    for name in ("fsync", "replace", "ftruncate", "unlink"):
        setattr(os, name, mortal(getattr(os, name)))
    run_folder.Metrics.flush = torn(run_folder.Metrics.flush)
    train(folder)
    return moments


def live(folder, death):
    # True when the life ended with the run finished, and the number of its moments.
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of forks, for it starts threads with its first device
        child = os.fork()
    if child == 0:
        os.write(write, str(life(folder, death)).encode())
        os._exit(0)
    os.close(write)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    with open(read) as answer:
        return code == 0, int(answer.read() or 0)


def remains(folder):
    result = json.loads((folder / "result.json").read_text())
    best = hashlib.sha256((folder / "checkpoints" / "best.safetensors").read_bytes()).hexdigest()
    return result, (folder / "metrics.jsonl").read_text(), best


def damage(folder, last=1):
    for checkpoint in sorted((folder / "checkpoints").glob("step_*"))[-last:]:
        content = bytearray(checkpoint.read_bytes())
        content[-9] ^= 1
        checkpoint.write_bytes(content)


def ruin(folder):
    damage(folder, last=2)


def shorten(folder):
    # Between the second evaluation and the third.
    os.truncate(folder / "metrics.jsonl", int(0.6 * (folder / "metrics.jsonl").stat().st_size))


root = Path(sys.argv[1])
root.mkdir()
finished, moments = live(root / "uninterrupted", 0)
assert finished
expected = remains(root / "uninterrupted")
print(json.dumps({"moments": moments, "sha256": expected[0]["final_state_sha256"], "metrics": expected[1]}))
fates = sys.argv[4:]
if fates == ["all"]:
    fates = [str(moment / moments) for moment in range(1, moments + 1)]
for number, fate in enumerate(fates):
    folder, survived = root / str(number), []
    for event in fate.split(",") + ["0"]:
        if event in ("damage", "ruin", "shorten"):
            globals()[event](folder)
            continue
        survived.append(live(folder, round(float(event) * moments))[0])
        if survived[-1]:
            break
    log = Path(f"{folder}.log").read_text().splitlines()
    end = {"fate": fate, "survived": survived, "equal": remains(folder) == expected, "log": log}
    print(json.dumps(end), flush=True)
"""


def lives(commands, folder, *fates, devices=1):
    """Lives through each of `fates`; every end must be that of the uninterrupted run to the bit.

    Returns for each fate which of its lives survived, and its log.
    """
    threads = str(max(2, 4 * devices))  # XLA:CPU deadlocks on fewer
    result = commands.script(LIVES, folder / "lives", commands.cache, devices, *fates, NPROC=threads, timeout=900)
    assert result.returncode == 0, result.stderr
    whole, *ends = map(json.loads, result.stdout.splitlines())
    assert [record["step"] for record in map(json.loads, whole["metrics"].splitlines())] == [2, 2, 4, 4, 5, 5]
    assert len(ends) == (whole["moments"] if fates == ("all",) else len(fates))
    assert [end["fate"] for end in ends if not end["equal"]] == []
    return ends


def random_fates(seed, count, deaths):
    generator = random.Random(seed)
    return [",".join(f"{generator.uniform(0, 0.8):.3f}" for _ in range(deaths)) for _ in range(count)]


def test_many_deaths_in_a_row_change_nothing(commands, tmp_path):
    # One life in the first fate gets nowhere: it dies before its first checkpoint.
    ends = lives(commands, tmp_path, "0.7,0.05,0.25", *random_fates(0, 2, 5))
    assert sum(end["survived"].count(False) for end in ends) >= 8


def test_deaths_on_two_devices_change_nothing(commands, tmp_path):
    ends = lives(commands, tmp_path, *random_fates(1, 1, 3), devices=2)
    assert ends[0]["survived"].count(False) >= 2


@pytest.mark.slow
def test_death_at_any_moment_changes_nothing(commands, tmp_path):
    ends = lives(commands, tmp_path, "all")
    assert len(ends) > 30 and all(end["survived"] == [False, True] for end in ends)


def test_a_damaged_checkpoint_or_lost_metrics_take_the_run_back_further_and_change_nothing(commands, tmp_path):
    damaged, shortened, ruined = lives(commands, tmp_path, "0.85,damage", "0.85,shorten", "0.85,shorten,ruin")
    for end in (damaged, shortened, ruined):
        assert end["survived"] == [False, True]
    assert any("damaged checkpoint" in line and "the run goes on from step 2" in line for line in damaged["log"])
    assert any("metrics.jsonl that the checkpoint of step 4 counts on are lost" in line for line in shortened["log"])
    assert all("run: going on from step 2" in end["log"] for end in (damaged, shortened))
    assert any("damaged checkpoint" in line and "starts from the beginning" in line for line in ruined["log"])


# The same from outside: the experiment itself, as a user starts it. (Deaths and damage: tests/faults.)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stop_signal_writes_a_checkpoint_and_the_same_command_goes_on(commands, uninterrupted, tmp_path, number):
    with commands.start(*commands.many_checkpoints, f"--workdir={tmp_path}") as process:
        wait_for(tmp_path, 8, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    *_, stopping, interrupted = errors.splitlines()
    assert stopping.startswith("stopping: ")
    step = saved_steps(tmp_path)[-1]
    assert 8 <= step < 30
    assert interrupted.startswith("interrupted: ") and f"stopped at step {step} of 30" in interrupted
    assert "Traceback" not in errors and not (run_of(tmp_path) / "result.json").exists()
    done = commands.run(*commands.many_checkpoints, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert f"going on from step {step}\n" in done.stderr
    assert bits(tmp_path) == bits(uninterrupted)


def test_a_finished_cell_is_not_run_again_and_the_grid_can_grow(commands, uninterrupted, tmp_path):
    workdir = tmp_path / "grown"
    shutil.copytree(uninterrupted, workdir)
    before = {path: path.stat() for path in (run_of(workdir)).rglob("*")}
    done = commands.run(*commands.many_checkpoints, "--seeds=0,1", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert f"[1/2] {commands.cell}: finished before\n" in done.stderr
    after = {path: path.stat() for path in (run_of(workdir)).rglob("*")}
    assert {path: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for path, stat in after.items()} == {
        path: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for path, stat in before.items()
    }
    rows = (workdir / "summary.csv").read_text().splitlines()
    assert [row.split(",")[4] for row in rows] == ["seed", "0", "1"]
    assert len((uninterrupted / "summary.csv").read_text().splitlines()) == 2
    assert bits(workdir) == bits(uninterrupted)
    other = json.loads((workdir / "runs" / "residual-8-w4-seed1" / "result.json").read_text())
    assert other["final_state_sha256"] != bits(workdir)["final_state_sha256"]
