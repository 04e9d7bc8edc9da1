"""Nowcasting: ConvLSTM against FC-LSTM, on moving digits and on radar (Shi et al. 2015).

The recurrence is the LSTM's; what differs is how states are tied from step to step. FC-LSTM ties all to all and has to
learn every place anew. ConvLSTM ties neighbours alike everywhere; its state-to-state kernel is how far what is seen may
move in a step: with 1x1 nothing moves, whatever stands before it.

By default: digits of 8x8 pixels that fly through frames of 24x24, generated in the compiled program, one seed, in under
five minutes on two cores. Presets: `shi2015` (the six networks of Table 1 on Moving MNIST), `radar` (the network of
section 4.2 against FC-LSTM, optical flow and persistence, on your folder of radar frames).

Differences from the paper: it stops early, by the validation loss, after a time that it does not tell; here the
network with the lowest validation loss of a given number of steps is taken. Its batch size is not told, in the presets
it is 16. Its forget gates' bias is not told, here it begins at 1. Digits bounce off walls elastically; all sequences
draw from one pool of digits, as there. Its radar data are not public: 97 days of Hong Kong. Its optical flow is ROVER,
here TV-L1.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from experiments import nowcasting_data, training
from experiments.nowcasting_cells import BASELINES, Config, NowcastCell, cells, layers_of, network_of
from experiments.runner import Experiment, main, report_of
from research.errors import CarouselError, UsageError

# Sequences of an evaluation call: their hidden states are held at once.
_EVALUATION_BATCH = 32


def check(cell: NowcastCell) -> None:
    """Whether the cell can be run.

    Raises:
      CarouselError: it needs a library or a file that is not there.
    """
    from research.analysis import optical_flow

    if cell.published:
        nowcasting_data.published(cell)
    if cell.network == "optical_flow" and not optical_flow.available():
        raise CarouselError(
            "optical_flow needs scikit-image: CAROUSEL_EXTRAS=test,dev,radar launch/run install, or leave it out of "
            "--networks"
        )


def run(cell: NowcastCell, context: Any) -> Mapping[str, Any]:
    """Trains the network and scores its forecasts of the test sequences; keeps one of them for the figures."""
    data = nowcasting_data.load(cell)
    if cell.network in BASELINES:
        from research.training import environment

        environment.record(context.folder.path, context.command, data.splits.checksums, context.reporter.note)
        forecast, result = _baseline(cell), {"params": 0}
    else:
        outcome, result = _train(cell, data, context)
        forecast = _learned(cell, outcome.final.variables)
        result |= _write_receptive_field(cell, outcome.final.params, context.folder.path)
    result |= _scores(cell, data, forecast)
    _write_example(cell, data, forecast, context.folder.path)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in result["scores"]["overall"].items())
    context.reporter.note(f"{context.label}: test {shown}")
    return result


def _train(cell: NowcastCell, data: Any, context: Any) -> tuple[Any, dict[str, Any]]:
    from research.tasks.nowcasting import nowcasting
    from research.training import loop, optimizers

    if cell.batch_size > data.splits.train:
        raise UsageError(
            f"--batch_size={cell.batch_size}: there are {data.splits.train} training sequences, give fewer"
        )
    plan = training.plan_of(cell, data.splits, select="best", evaluation_batch_size=_EVALUATION_BATCH)
    schedule = optimizers.constant(cell.learning_rate)
    make = {"rmsprop": functools.partial(optimizers.rmsprop, decay=0.9), "adam": optimizers.adam}[cell.optimizer]
    optimizer = make(schedule, clip_norm=cell.clip_norm or None)
    outcome = loop.train(
        lambda axis_name=None: network_of(cell),
        lambda apply: nowcasting(apply, data.frames_of, observed=cell.observed),
        optimizer,
        schedule,
        data.splits,
        plan,
        context,
    )
    return outcome, training.result_of(outcome, plan)


def _learned(cell: NowcastCell, variables: Any) -> Callable[[Any], tuple[Any, Any]]:
    import jax

    network = network_of(cell)

    @jax.jit
    def forecast(inputs):
        logits = network.apply(variables, inputs)
        return jax.nn.sigmoid(logits), logits

    return forecast


def _baseline(cell: NowcastCell) -> Callable[[Any], tuple[Any, None]]:
    import jax.numpy as jnp
    import numpy as np

    from research.analysis import optical_flow
    from research.ops import verification

    if cell.network == "persistence":
        return lambda inputs: (verification.persistence(inputs[:, -1], cell.horizon), None)

    def advected(inputs):
        moved = [optical_flow.advect(frames[..., 0], cell.horizon) for frames in np.asarray(inputs)]
        return jnp.asarray(np.stack(moved)[..., None]), None

    return advected


def _scores(cell: NowcastCell, data: Any, forecast: Any) -> dict[str, Any]:
    """Scores of the test split, and of the published sequences where they are given."""
    from research.analysis import nowcast_scores

    def scores(frames_of, arrays, *places):
        measure = nowcast_scores.of_rain if cell.dataset == "radar" else nowcast_scores.of_grey
        options = {"observed": cell.observed, "measure": measure}
        return nowcast_scores.scores(nowcast_scores.summed(forecast, frames_of, arrays, *places, **options))

    splits = data.splits
    counts = {name: getattr(splits, name) for name in ("train", "validation", "test")}
    found = {"scores": scores(data.frames_of, splits.arrays, *splits.range("test"))}
    if cell.published:
        frames = nowcasting_data.published(cell)
        found["published_scores"] = scores(nowcasting_data.from_bytes, {"frames": frames}, 0, len(frames))
        counts["published"] = len(frames)
    return found | {"examples": counts, "minutes": data.minutes}


def _write_example(cell: NowcastCell, data: Any, forecast: Any, folder: Any) -> None:
    """`example.safetensors`: a test sequence's frames and the forecast of it, grey `[time, height, width]`."""
    import jax
    import numpy as np
    import safetensors.numpy

    from research.files import write_output

    frames = data.frames_of({name: array[data.shown : data.shown + 1] for name, array in data.splits.arrays.items()})
    prediction, _ = forecast(frames[:, : cell.observed])
    arrays = {"frames": frames[0, ..., 0], "prediction": prediction[0, ..., 0]}
    arrays = {name: np.ascontiguousarray(array) for name, array in jax.device_get(arrays).items()}
    write_output(folder / "example.safetensors", safetensors.numpy.save(arrays))


def _write_receptive_field(cell: NowcastCell, params: Any, folder: Any) -> dict[str, Any]:
    """`receptive_field.safetensors` of a network on maps: `[steps, height, width]`, pixels after folding; diameters."""
    import safetensors.numpy

    from research.analysis import receptive
    from research.files import write_output

    kernels, features = layers_of(cell.network)
    network = network_of(cell)
    if kernels is None or network.cell.own_by_position:
        return {}
    before = 2 if cell.cell == "gru_before" else 1
    reach = len(features) * (kernels[0] // 2 + kernels[1] // 2) + cell.observed * before * (kernels[1] // 2)
    maps = receptive.of_encoder(network, params, time=cell.observed, size=2 * reach + 3)
    write_output(folder / "receptive_field.safetensors", safetensors.numpy.save({"maps": maps}))
    return {"receptive_field": receptive.diameters(maps)}


_SHI = {
    "dataset": "moving_mnist",
    "networks": (
        "fc-2048-2048",
        "5x5-5x5-256",
        "5x5-5x5-128-128",
        "5x5-5x5-128-64-64",
        "9x9-1x1-128-128",
        "9x9-1x1-128-64-64",
        "persistence",
    ),
    "validation_examples": 2_000,
    "test_examples": 3_000,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "epochs": 50,
    "evaluations": 50,
}
_RADAR = {
    "dataset": "radar",
    "networks": ("3x3-3x3-64-64", "fc-2000-2000", "optical_flow", "persistence"),
    "frame": 100,
    "scale": 1,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "epochs": 20,
    "evaluations": 20,
}


EXPERIMENT = Experiment(
    name="nowcasting",
    config=Config,
    cells=cells,
    run=run,
    report=report_of("nowcasting_report"),
    presets={"shi2015": _SHI, "radar": _RADAR},
    smoke={
        "train_examples": 32,
        "validation_examples": 8,
        "test_examples": 8,
        "steps": 4,
        "batch_size": 4,
        "steps_per_call": 2,
        "evaluations": 2,
    },
    exclusive=(("epochs", "steps"),),
    check=check,
)

if __name__ == "__main__":
    main(EXPERIMENT)
