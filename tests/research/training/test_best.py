"""Before a run goes on: is the best state there on which its newest checkpoint counts?"""

import numpy as np
import pytest

from research.errors import CarouselError
from research.training import best, checkpoint


def state(step):
    return {"params/kernel": np.arange(50, dtype=np.float32) + step}


def newest(folder, step=30, best_step=20, of=None):
    """The checkpoint of `step`, which counts on a best state of `best_step`; the file holds the state of step `of`."""
    evaluated = {"step": best_step, "error": 0.5}
    checkpoint.save_best(folder, np.max(best_step if of is None else of), state(20), evaluated)
    return checkpoint.load(checkpoint.save(folder, step, state(step), {"evaluated": evaluated}))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


LOSSES = {"missing": lambda path: path.unlink(), "damaged (its SHA-256": cut}


@pytest.mark.parametrize("of", [20, 25], ids=["as recorded", "later"])
def test_what_is_there_is_left_alone(tmp_path, of):
    best.check(tmp_path, newest(tmp_path, of=of), True, pytest.fail)


def test_a_run_without_an_evaluation_needs_none(tmp_path):
    kept = checkpoint.load(checkpoint.save(tmp_path, 3, state(3), {"evaluated": None}))
    best.check(tmp_path, kept, True, pytest.fail)


@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_written_again_where_the_newest_checkpoint_is_the_best(tmp_path, loss):
    kept, path, log = newest(tmp_path, step=20), tmp_path / checkpoint.BEST, []
    before = path.read_bytes()
    LOSSES[loss](path)
    best.check(tmp_path, kept, True, log.append)
    assert path.read_bytes() == before
    (line,) = log
    assert str(path) in line and loss in line and "written again from the checkpoint of step 20" in line


@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_missed_only_where_it_is_needed(tmp_path, loss):
    kept, path, log = newest(tmp_path), tmp_path / checkpoint.BEST, []
    LOSSES[loss](path)
    left = sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir())
    with pytest.raises(CarouselError) as caught:
        best.check(tmp_path, kept, True, pytest.fail)
    best.check(tmp_path, kept, False, log.append)
    for line in (str(caught.value), *log):
        assert str(path) in line and loss in line and "\n" not in line
    assert "restore it from a copy, or delete" in str(caught.value) and "goes on without" in log[0]
    assert sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir()) == left


def test_one_of_an_earlier_time_does_not_pass_for_it(tmp_path):
    with pytest.raises(CarouselError, match="is older than the run's best state, of step 20"):
        best.check(tmp_path, newest(tmp_path, of=10), True, pytest.fail)


def test_of_several_seeds_the_newest_checkpoint_serves_only_if_it_is_the_best_of_all(tmp_path):
    kept = newest(tmp_path, step=20, best_step=[10, 20])
    best.check(tmp_path, kept, True, pytest.fail)
    (tmp_path / checkpoint.BEST).unlink()
    with pytest.raises(CarouselError, match="is missing"):
        best.check(tmp_path, kept, True, pytest.fail)
