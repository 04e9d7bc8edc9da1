"""Killed, damaged, out of space, at another time: the same command goes on, or one line says why it does not.

The short form; `python tests/faults/long.py` is the long one.
"""

import pytest

from tests.commands import Commands
from tests.faults import kills, scenarios
from tests.faults.scene import Impossible, Scene


@pytest.fixture
def scene(commands, uninterrupted, interrupted, tmp_path):
    return Scene(commands, uninterrupted, interrupted, tmp_path)


@pytest.mark.parametrize("scenario", scenarios.SHORT, ids=lambda scenario: scenario.__name__)
def test_fault(scene, scenario):
    try:
        assert scenario(scene)
    except Impossible as reason:
        pytest.skip(str(reason))


def test_kill_9_at_random_moments_and_inside_saves(commands, tmp_path):
    count = kills.kill_many_times(
        commands, tmp_path, kills=4, into_saves=2, steps=100, flags=(f"--only_cell={Commands.cell}",)
    )
    assert count.kills == count.restarts == 4 and count.in_a_save >= 2 and count.runs >= 1
