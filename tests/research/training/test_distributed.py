"""One training over several processes is that of one process; what the writer has arrives everywhere, to the bit."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

from research.errors import Lost
from research.training import distributed

# XLA:CPU deadlocks where it has too few threads a device, and fails fast with these flags.
DEVICES = {
    "NPROC": "32",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=30"
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=10",
}

# Arguments: COORDINATOR PROCESSES PROCESS DEVICES FOLDER. The whole trainer in each mode, in one of them interrupted.
TRAINING = """
import functools
import json
import os
import sys
from pathlib import Path

import jax

coordinator, processes, process, devices = sys.argv[1], *map(int, sys.argv[2:5])
folder = Path(sys.argv[5])
jax.config.update("jax_num_cpu_devices", devices // processes)

import ml_dtypes
import numpy as np
from flax import linen as nn

from research.data import digits
from research.errors import CarouselError, Interrupted
from research.tasks.classification import classification
from research.training import distributed, loop, optimizers, parallel, run_folder, state
from research.training.progress import Reporter

if processes > 1:
    distributed.start(coordinator, processes, process, 60)
    # What the others have differs in every bit; minus zero and no number at all have to come through.
    tree = {"a": np.array([-0.0, np.nan, 1e-45], np.float32), "b": np.zeros((0, 2), np.int32), "c": np.uint32(7)}
    tree |= {"d": np.array([[1.5], [-0.0]], ml_dtypes.bfloat16), "e": np.array([True, False])}
    mine = tree if process == 0 else jax.tree.map(np.ones_like, tree)
    received = distributed.arrays_from_writer(mine)
    for name, array in tree.items():
        assert received[name].dtype == array.dtype and received[name].shape == array.shape
        assert received[name].tobytes() == array.tobytes(), name
    for told in (None, 0.1, {"a": [1, "ö" * 5000]}):
        assert distributed.from_writer(lambda: told if process == 0 else 1 / 0) == told
    assert distributed.any_of(process == 1) is True and distributed.any_of(False) is False
    assert distributed.is_writer() == (process == 0)
    try:
        parallel.make_mesh(devices - 1)
        raise AssertionError("a process was left without devices")
    except CarouselError as error:
        assert f"all {devices} of the processes" in str(error)


class Net(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(8)(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(x))
        return nn.Dense(10)(nn.Dropout(0.2, deterministic=not train)(x))


data = digits.load()
parts = (data.train, data.validation, data.test)
arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels")}
splits = loop.Splits(arrays, *map(len, parts))
schedule = optimizers.step_decay(0.1, drops=(100,))
task = functools.partial(classification, mean=data.train.images.mean(0), crop=1)


def train(mode, path, stop=lambda: False):
    plan = loop.Plan((0, 1), 20, 16, 2, 4, select="best", parallel=mode, devices=devices)
    with open(os.devnull, "w") as log, Reporter(log) as reporter, run_folder.open_run(path, {}) as run:
        context = loop.Context(run, mode, reporter, lambda: distributed.any_of(stop()))
        return loop.train(Net, task, optimizers.sgd(schedule), schedule, splits, plan, context)


found = {}
for mode in ("pmap", "jit", "shard_map"):
    path = last = folder / mode / str(process)
    if mode == "pmap":  # interrupted, and gone on with
        asked = iter([False] * (5 if process == processes - 1 else 10_000))
        try:
            train(mode, path, lambda: next(asked, True))  # the last process alone is asked to stop
            raise AssertionError("not stopped")
        except Interrupted:
            assert distributed.is_writer() == any((path / "checkpoints").glob("*.safetensors"))
        if process > 0:  # only the writer finds its folder again: the others have nothing but what it tells them
            last = folder / "again" / str(process)
    outcome = train(mode, last)
    leaves = {name: array.astype(float).tolist() for name, array in state.flatten(outcome.final).items()}
    found[mode] = {"leaves": leaves, "evaluations": outcome.evaluations, "metrics": run_folder.read_metrics(last)}
    if distributed.is_writer():
        assert [record["step"] for record in found[mode]["metrics"] if "loss" in record] == list(range(2, 21, 2))
if processes > 1:
    distributed.leave()
    assert float(jax.jit(lambda x: x + 1)(1.0)) == 2.0 and distributed.is_writer() == (process == 0)
print(json.dumps(found))
"""


def trained(commands, folder, processes, devices):
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{port.getsockname()[1]}"
    line = [sys.executable, "-c", TRAINING, coordinator, processes]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(commands.cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    options = {
        "env": commands.environment | DEVICES | cache,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }
    started = [
        subprocess.Popen([*map(str, line), str(process), str(devices), str(folder)], **options)
        for process in range(processes)
    ]
    try:
        output = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert not any(process.returncode for process in started), "\n".join(err[-3000:] for _, err in output)
    return [json.loads(out.splitlines()[-1]) for out, _ in output]


@pytest.mark.parametrize("devices", [2, 4])
def test_two_processes_train_the_networks_of_one_in_every_mode(commands, tmp_path, devices):
    [alone] = trained(commands, tmp_path / "alone", 1, devices)
    writer, other = trained(commands, tmp_path / "joint", 2, devices)
    assert list(alone) == ["pmap", "jit", "shard_map"]
    for mode, expected in alone.items():
        assert (
            writer[mode]["leaves"] == other[mode]["leaves"]
        )  # the best state of each seed, which only one has on disk
        assert writer[mode]["evaluations"] == other[mode]["evaluations"]
        for name, leaf in expected["leaves"].items():
            np.testing.assert_allclose(writer[mode]["leaves"][name], leaf, rtol=0, atol=1e-6, err_msg=f"{mode} {name}")
        for split, metrics in expected["evaluations"].items():
            for name, values in metrics.items():
                np.testing.assert_allclose(writer[mode]["evaluations"][split][name], values, rtol=0, atol=1e-6)
        for one, two in zip(expected["metrics"], writer[mode]["metrics"], strict=True):
            for name, value in one.items():
                np.testing.assert_allclose(two[name], value, rtol=0, atol=1e-5 if name == "gradient_norm" else 1e-6)


def test_one_process_asks_nobody():
    tree = {"a": np.ones(3)}
    assert distributed.arrays_from_writer(tree) is tree
    answer = object()  # not even what JSON holds is asked for
    assert distributed.from_writer(lambda: answer) is answer
    assert distributed.any_of(answer) is answer and distributed.is_writer()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"), True),
        (RuntimeError("UNAVAILABLE: coordination service: heartbeat"), True),
        (RuntimeError("NCCL operation ncclAllReduce failed"), True),
        (Lost("they did not meet"), True),
        (ValueError("operands could not be broadcast together"), False),
        (KeyError("Gloo"), False),
    ],
)
def test_a_loss_is_told_from_a_failure_of_ones_own(error, lost):
    assert distributed.is_loss(error) is lost
