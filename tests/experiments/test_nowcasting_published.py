"""The published sequences of moving digits: scored beside the test split, or refused in one line."""

import numpy as np
import pytest

from experiments import nowcasting, nowcasting_data
from experiments.nowcasting import EXPERIMENT
from experiments.nowcasting_cells import Config, cells
from research.training import loop

FRAMES = np.random.default_rng(0).integers(0, 256, (7, 40, 12, 12), dtype=np.uint8)  # time first, as in the file


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "seq.npy", FRAMES)
    return str(tmp_path / "seq.npy")


def cell_of(path, **flags):
    flags = {"frame": 12, "observed": 2, "horizon": 3, "networks": ("persistence",)} | flags
    return cells(Config(dataset="moving_mnist", published=path, **flags))[0]


def test_they_are_scored_whole_beside_the_test_split(path):
    cell, own = cell_of(path), np.zeros((4, 5, 12, 12, 1), np.uint8)
    own[:, 2:] = 255  # of the test split nothing persists
    splits = loop.Splits({"frames": own}, 1, 1, 2)
    data = nowcasting_data.Loaded(splits, nowcasting_data.from_bytes, minutes=None, shown=2)
    result = nowcasting._scores(cell, data, nowcasting._baseline(cell))
    assert result["scores"]["overall"]["squared_error"] == 144
    grey = FRAMES[:5].astype(np.float64) / 255
    expected = ((grey[2:] - grey[1]) ** 2).sum(axis=(2, 3)).mean(axis=1)
    np.testing.assert_allclose(result["published_scores"]["by_lead"]["squared_error"], expected, rtol=1e-5)
    assert result["examples"] == {"train": 1, "validation": 1, "test": 2, "published": 40}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"horizon": 6}, "holds 7 frames of 12x12: give --frame=12 and not more than that many frames"),
        ({"frame": 64}, "holds 7 frames of 12x12: give --frame=12"),
    ],
)
def test_frames_that_are_not_there_are_one_line_before_anything_is_trained(path, flags, message):
    with pytest.raises(nowcasting.UsageError, match=message):
        EXPERIMENT.check(cell_of(path, **flags))


def test_they_are_asked_of_moving_mnist_alone(refusal, tmp_path):
    assert "--published=seq.npy: it is for --dataset=moving_mnist" in refusal(EXPERIMENT, "--published=seq.npy")


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(nowcasting.CarouselError, match=r"gone\.npy is missing"):
        EXPERIMENT.check(cell_of(str(tmp_path / "gone.npy")))
