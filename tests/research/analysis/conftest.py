"""Finished runs, made by hand as the trainer makes them, and what every figure is held to."""

import matplotlib
import pytest

from research.analysis import figures  # before pyplot: it chooses a backend that needs no display
from research.analysis.results import read_run
from research.files import write_json_atomic
from research.training import run_folder

ENVIRONMENT = {"command": "launch/run depth_ablation --depths=8,20", "source": {"commit": "c0ffee" * 6, "dirty": False}}


@pytest.fixture
def make_run(tmp_path):
    """A function that writes a finished run and reads it back."""

    def make(name, config, errors, result=None, environment=ENVIRONMENT, signal=None):
        path = tmp_path / "runs" / name
        with run_folder.open_run(path, config) as folder:
            write_json_atomic(path / run_folder.ENVIRONMENT, environment)
            for number, error in enumerate(errors, start=1):
                folder.metrics.append({"step": 10 * number, "error": error})
                if number % 2 == 0:
                    folder.metrics.append({"step": 10 * number, "test_error": error + 0.05})
            if signal is not None:
                write_json_atomic(path / "signal.json", signal)
            folder.finish({"test_error": errors[-1] + 0.05, "train_error": errors[-1]} if result is None else result)
        return read_run(path)

    return make


@pytest.fixture
def grid(make_run):
    """Plain and residual runs of two depths and two seeds; one run diverged."""
    runs = []
    for block, base in (("plain", 0.3), ("residual", 0.2)):
        for depth in (8, 20):
            for seed in (0, 1):
                config = {"block": block, "depth": depth, "seed": seed}
                errors = [0.9, base + 0.1, base + 0.01 * seed + depth / 1000, base + 0.01 * seed]
                diverged = (block, depth, seed) == ("plain", 20, 1)
                signal = None
                if depth == 20:
                    values = [2.0**k * (1 + base) for k in range(9)]
                    twice = [value for value in values for _ in (1, 2)]
                    found = {"output_variance": values, "block_input_gradient_norm": values}
                    found |= {"response_std": twice, "weight_gradient_norm": twice}
                    signal = {"initial": found, "final": {name: v[::-1] for name, v in found.items()}}
                result = {"failure": "diverged", "failed_at_step": 3} if diverged else None
                runs.append(make_run(f"{block}-{depth}-{seed}", config, errors, result, signal=signal))
    return runs


@pytest.fixture(autouse=True)
def close_figures():
    yield
    matplotlib.pyplot.close("all")


@pytest.fixture
def saved(tmp_path):
    """Draws a figure as a report does, with warnings as errors; nothing of it lies outside or over another part."""

    def check(figure):
        (legend,) = figure.legends or [None]
        figure.canvas.draw()
        if legend is not None:
            box = legend.get_window_extent()
            assert min(box.x0, box.y0, figure.bbox.x1 - box.x1) >= 0
            assert not any(box.overlaps(axis.get_tightbbox()) for axis in figure.axes)
        assert all(path.stat().st_size for path in figures.save(figure, tmp_path / "figure", {}))

    return check
