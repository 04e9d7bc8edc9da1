"""One training step to be timed, in a process of its own: JAX fixes the number of virtual devices when it starts.

The process builds a workload of `benchmark_workloads`, takes a first call of its compiled stretch, and says what it has
found in one line of JSON. From then on every line that it reads is a call, and every line that it writes is its end.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments import benchmark_timing as timing
from research.errors import CarouselError

_ROOT = Path(__file__).resolve().parents[1]


def environment(devices: int, cache: str | None) -> dict[str, str]:
    """The variables of a process with so many virtual CPU devices.

    Its threads are as many as `launch/run` would give the trainer: NPROC, four times the devices at least where there
    are several. Both are read when JAX starts.

    Args:
      devices: of the process.
      cache: folder of compiled programs, None for none.
    """
    threads = max(int(os.environ["NPROC"]), 4 * devices if devices > 1 else 1)
    found = dict(os.environ)
    found |= {"NPROC": str(threads), "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    found["PYTHONPATH"] = timing.python_path(_ROOT)
    if cache:
        found["JAX_COMPILATION_CACHE_DIR"] = cache
        found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        found["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    return found


class Worker:
    """The other end of such a process.

    Args:
      name: for messages.
      process: just started.
      errors: the file that its standard error goes to.
    """

    def __init__(self, name: str, process: subprocess.Popen, errors: Any):
        self._name, self._process, self._errors = name, process, errors

    def found(self) -> dict[str, Any]:
        """What `serve` says after the first call; waits for it. To be asked once, before the first `call`."""
        return json.loads(self._read())

    def call(self) -> None:
        """Takes the steps of a call and waits for their end."""
        with contextlib.suppress(BrokenPipeError):  # why it ended is said below
            os.write(self._process.stdin.fileno(), b"\n")  # past the buffer, which closing would flush once more
        self._read()

    def _read(self) -> str:
        line = self._process.stdout.readline()
        if line:
            return line
        code = self._process.wait()
        self._errors.seek(0)
        reason = next((text for text in reversed(self._errors.read().splitlines()) if text.strip()), "it said nothing")
        killed = "; too little memory?" if code == -9 else ""
        raise CarouselError(f"{self._name}: its process ended with {code} ({reason}){killed}: leave that value out")


@contextlib.contextmanager
def start(name: str, point: Mapping[str, Any], cache: str | None) -> Iterator[Worker]:
    """A process for one point of a curve; it ends with the context, or with us.

    Args:
      name: for messages.
      point: `network` of `NETWORKS`, its `sizes`, and `devices` and `steps` of `benchmark_workloads.training`.
      cache: folder of compiled programs, None for none.
    """
    code = "from experiments.scaling_worker import serve; serve()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        tempfile.TemporaryFile("w+") as errors,
        # A session of its own: Ctrl-C is ours to answer. Where we are killed, it reads the end of its input.
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(point)],
            env=environment(point["devices"], cache),
            stderr=errors,
            start_new_session=True,
            **pipes,
        ) as process,
    ):
        try:
            yield Worker(name, process, errors)
        finally:
            process.kill()


def serve() -> None:
    """The process itself: builds the point of the command line, then takes a call for every line that it reads."""
    import jax
    import numpy as np

    from experiments import benchmark_workloads as workloads

    point = json.loads(sys.argv[1])
    begun = time.perf_counter()
    make = {"cifar": workloads.cifar, "adding": workloads.adding}[point["network"]]
    work = make(**point["sizes"])
    timed, compiled = workloads.training(work, steps=point["steps"], devices=point["devices"])
    losses = timed.call()
    found = compiled.memory | {
        "batch": work.batch,
        "devices": jax.device_count(),
        "threads": int(os.environ["NPROC"]),
        "params": sum(leaf.size for leaf in jax.tree.leaves(work.shapes()["params"])),
        "multiply_adds": work.multiply_adds(),
        "first_call_seconds": time.perf_counter() - begun,
        "first_losses": np.ravel(losses).tolist(),
    }
    print(json.dumps(found), flush=True)
    for _ in sys.stdin:
        timed.call()
        print(flush=True)
