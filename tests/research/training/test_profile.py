"""The profiler's trace: of whole stretches around the asked steps, and the training stays as it is to the bit."""

import contextlib
import functools
import gzip
import io
import json

import jax
import numpy as np
import pytest
from flax import linen as nn

from research.data import digits
from research.errors import Interrupted, UsageError
from research.tasks.classification import classification
from research.training import loop, optimizers, run_folder
from research.training.profile import Profile
from research.training.progress import Reporter

DATA = digits.load()
PARTS = (DATA.train, DATA.validation, DATA.test)
SPLITS = loop.Splits(
    {name: np.concatenate([getattr(part, name) for part in PARTS]) for name in ("images", "labels")},
    *map(len, PARTS),
)


class Net(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def train(path, steps, should_stop=lambda: False):
    """Trains 12 steps in stretches of 3 with a profile of `steps`; returns the outcome and the lines said."""
    schedule = optimizers.step_decay(0.05, drops=(100,))
    said = []
    profile = Profile(path, steps, said.append)
    with run_folder.open_run(path, {}) as run, Reporter(io.StringIO()) as reporter, profile:
        context = loop.Context(run, "run", reporter, should_stop, profile=profile)
        task = functools.partial(classification, mean=DATA.train.images.mean(0))
        plan = loop.Plan(0, 12, batch_size=16, steps_per_call=3, evaluate_every=6)
        outcome = loop.train(Net, task, optimizers.sgd(schedule), schedule, SPLITS, plan, context)
        run.finish({})
    return outcome, said


def stop_after(calls):
    left = iter([False] * calls)
    return lambda: next(left, True)


def traces(path):
    return sorted(path.rglob("*.trace.json.gz"))


def calls_of_the_training(trace):
    """How often the compiled stretch ran: XLA numbers the runs of a program."""
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    arguments = [event["args"] for event in events if "hlo_op" in event.get("args", {})]
    assert arguments, "no operation of XLA is in the trace"
    return len({each["run_id"] for each in arguments if "stretch" in each["hlo_module"]})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "run"
    outcome, said = train(path, None)
    assert said == [] and not (path / "profile").exists()
    return path, outcome


@pytest.mark.parametrize(
    ("steps", "traced", "calls"),
    [((4, 5), "steps 3 to 6", 1), ((3, 9), "steps 3 to 9", 2), ((2, 4), "steps 0 to 6", 2), ((0, 12), "0 to 12", 4)],
)
def test_a_trace_of_whole_stretches_and_the_same_bits(plain, tmp_path, steps, traced, calls):
    path, expected = plain
    outcome, (line,) = train(tmp_path / "run", steps)
    (trace,) = traces(tmp_path / "run")
    assert traced in line and str(trace) in line and "ui.perfetto.dev" in line
    assert calls_of_the_training(trace) == calls
    assert outcome.sha256 == expected.sha256
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (path / "metrics.jsonl").read_bytes()
    assert list(trace.parent.glob("*.xplane.pb"))


def test_a_range_beyond_the_end_is_refused_before_training(tmp_path):
    with pytest.raises(UsageError, match="--profile=10:13 goes beyond the end of the training, which has 12 steps"):
        train(tmp_path / "run", (10, 13))
    assert run_folder.read_metrics(tmp_path / "run") == [] and traces(tmp_path) == []


def test_a_run_that_is_stopped_within_the_range_leaves_what_it_traced_and_the_rest_follows(plain, tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", (3, 9), stop_after(2))
    (first,) = traces(tmp_path)
    assert calls_of_the_training(first) == 1
    first = first.rename(tmp_path / "first.trace.json.gz")  # a trace of the same second would take its name
    outcome, (line,) = train(tmp_path / "run", (3, 9))
    assert "steps 6 to 9" in line and outcome.sha256 == plain[1].sha256
    assert len(traces(tmp_path / "run")) == 1


def test_a_run_that_goes_on_behind_the_range_says_so(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", None, stop_after(3))
    _, (line,) = train(tmp_path / "run", (3, 9))
    assert "steps 3 to 9 were trained in an earlier sitting" in line and traces(tmp_path) == []


def test_what_has_no_steps_says_so(tmp_path):
    said = []
    for steps in ((3, 9), None):
        with Profile(tmp_path, steps, said.append):
            pass
    with contextlib.suppress(UsageError), Profile(tmp_path, (3, 9), said.append):
        raise UsageError("something else is wrong")
    assert said == [f"{tmp_path / 'profile'}: no trace, for there were no steps of training"]


def test_a_folder_in_which_nothing_can_be_written_costs_the_trace_alone(plain, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    outcome, (line,) = train(tmp_path / "run", (3, 6))
    assert line.startswith("warning: ") and str(tmp_path / "run" / "profile") in line and "\n" not in line
    assert outcome.sha256 == plain[1].sha256


def test_a_trace_that_cannot_be_written_costs_the_trace_alone(plain, tmp_path, monkeypatch):
    def full():
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device\nmore")

    stop = jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    try:
        outcome, (line,) = train(tmp_path / "run", (3, 6))
        assert "No space left on device" in line and "\n" not in line and outcome.sha256 == plain[1].sha256
        # As JAX has it, that trace is still being taken.
        outcome, (line,) = train(tmp_path / "next", (3, 6))
        assert "no trace is taken" in line and "\n" not in line and outcome.sha256 == plain[1].sha256
    finally:
        stop()
