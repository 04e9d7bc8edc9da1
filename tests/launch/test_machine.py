"""What a machine has, and how it is dealt out."""

import pytest

from launch import machine


@pytest.mark.parametrize(
    ("things", "parts", "dealt"),
    [
        ([0, 1, 2, 3], 2, [[0, 1], [2, 3]]),
        ([0, 1, 2, 3, 4], 2, [[0, 1], [2, 3, 4]]),
        ([0, 1, 2], 3, [[0], [1], [2]]),
        (["a", "b"], 5, [["a"], ["b"], ["a"], ["b"], ["a"]]),
        ([7], 1, [[7]]),
        ([], 2, [[], []]),
    ],
)
def test_shares(things, parts, dealt):
    assert machine.shares(things, parts) == dealt


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"CUDA_VISIBLE_DEVICES": "2,5"}, ["2", "5"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932"}, ["GPU-8932"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cpu"}, []),
        ({"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cuda,cpu"}, ["0"]),
    ],
)
def test_gpus_that_are_named(environment, found):
    assert machine.gpus(environment) == found


def test_gpus_that_are_asked_for(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\nfor i in 0 1 2; do echo "GPU $i: H100 (UUID: GPU-$i) $1"; done\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert machine.gpus({}) == ["0", "1", "2"]
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert machine.gpus({}) == []
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert machine.gpus({}) == []
