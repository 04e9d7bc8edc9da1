"""What jobs of the benchmark do in a process of their own: `python -m experiments.benchmark_worker KIND [NUMBERS]`.

    baseline                  imports JAX, reads the digits
    compile DEPTH TINY        traces and compiles the training step of a CIFAR ResNet
    host STRETCHES TINY       trains ResNet-20, with a clock around the compiled stretch

The last line of the output is JSON; `baseline` has only to say that it is `READY`.
"""

import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.benchmark_timing import LEARNING_RATE, READY, WEIGHT_DECAY

STEPS = 10  # of a stretch: the default of the experiments
# Training, validation and test images of the host's job: CIFAR-10's, since drawing their order is work of the host.
_IMAGES, _TINY_IMAGES = (45_000, 1_000, 1_000), (64, 16, 16)


def baseline() -> None:
    """The least that any training with JAX has to do: import it, read the data."""
    import jax  # noqa: F401

    from research.data import images

    images.load("digits", None)
    print(READY, flush=True)


def compile_step(depth: int, tiny: bool) -> dict[str, float]:
    """Seconds from a function of the trainer to its compiled program, nothing before having been traced.

    The network is not initialised: shapes are all that compilation needs, and at 1,202 layers all there is memory for.
    """
    import jax

    from experiments import benchmark_workloads as workloads
    from research.training import optimizers, parallel, state, step

    work = workloads.cifar(**_sizes(tiny), depth=depth)
    schedule = optimizers.constant(LEARNING_RATE)
    optimizer = optimizers.sgd(schedule, weight_decay=WEIGHT_DECAY)
    mesh = parallel.make_mesh(1)
    key = state.stream(0, "augmentation")
    data = parallel.replicate(dict(work.arrays), mesh)
    model = work.model()
    start = jax.eval_shape(lambda: work.initial(model, optimizer))
    jax.clear_caches()  # the forward pass has been traced for the shapes
    begin = time.perf_counter()
    task = work.make_task(state.bind(model))
    stretch = step.make_stretch(task.loss, optimizer, schedule, None)
    parallel.compile_stretch(stretch, "jit", mesh, (start, data, work.rows(STEPS), key))
    return {"seconds": time.perf_counter() - begin}


def host(stretches: int, tiny: bool) -> dict[str, float]:
    """Trains with the trainer itself; see `sums`. Evaluation comes after the last stretch and is left out."""
    import numpy as np

    from research.models import cifar_resnet
    from research.tasks import classification
    from research.training import loop, optimizers, run_folder
    from research.training.progress import Reporter

    sizes, counts, random = _sizes(tiny), _TINY_IMAGES if tiny else _IMAGES, np.random.default_rng(0)
    shape, examples = (sizes["size"], sizes["size"], 3), sum(counts)
    arrays = {
        "images": random.integers(0, 256, (examples, *shape), dtype=np.uint8),
        "labels": random.integers(0, 10, examples, dtype=np.int32),
    }
    steps = stretches * STEPS
    plan = loop.Plan(
        seed=0,
        steps=steps,
        batch_size=sizes["batch"],
        steps_per_call=STEPS,
        evaluate_every=steps,
        train_evaluation_examples=counts[1],
        devices=1,
    )
    schedule = optimizers.constant(LEARNING_RATE)
    with (
        clocked_stretches() as laps,
        tempfile.TemporaryDirectory() as folder,
        run_folder.open_run(Path(folder) / "run", {}) as run,
        Reporter() as reporter,
    ):
        loop.train(
            functools.partial(cifar_resnet, 8 if tiny else 20, "residual", sizes["width"]),
            functools.partial(classification.classification, mean=np.full(shape, 128, np.float32)),
            optimizers.sgd(schedule),
            schedule,
            loop.Splits(arrays, *counts),
            plan,
            loop.Context(run, "host", reporter),
        )
    return sums(laps)


class clocked_stretches:
    """Within it the trainer's compiled stretches tell when they were called, had been handed over, and were done."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock

    def __enter__(self) -> list[tuple[float, float, float]]:
        import jax

        from research.training import parallel

        laps: list[tuple[float, float, float]] = []
        self._module, self._original = parallel, parallel.compile_stretch

        def compile_stretch(*arguments: Any) -> Callable[..., Any]:
            stretch = self._original(*arguments)

            def call(*arguments):
                called = self._clock()
                result = stretch(*arguments)
                handed = self._clock()
                jax.block_until_ready(result)
                laps.append((called, handed, self._clock()))
                return result

            return call

        parallel.compile_stretch = compile_stretch
        return laps

    def __exit__(self, *exception: Any) -> None:
        self._module.compile_stretch = self._original


def sums(laps: list[tuple[float, float, float]]) -> dict[str, float]:
    """Seconds from the end of the first stretch to the end of the last, and of those two shares of the stretches.

    Returns:
      `wall`; `called`, from the call of each stretch until it is done; `handed`, from when it has been handed over. The
      device works for at least `handed` (it begins before the call returns; a program so small that the caller runs it
      is done by then, and counts nothing) and at most `called`.
    """
    return {
        "wall": laps[-1][2] - laps[0][2],
        "called": sum(done - called for called, _, done in laps[1:]),
        "handed": sum(done - handed for _, handed, done in laps[1:]),
    }


def _sizes(tiny: bool) -> dict[str, int]:
    return {"batch": 4, "size": 8, "width": 4} if tiny else {"batch": 128, "size": 32, "width": 16}


if __name__ == "__main__":
    kind, *numbers = sys.argv[1:]
    found = {"baseline": baseline, "compile": compile_step, "host": host}[kind](*map(int, numbers))
    if found is not None:
        print(json.dumps(found))
