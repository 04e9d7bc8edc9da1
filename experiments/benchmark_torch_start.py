"""From start to first step in PyTorch: `python -m experiments.benchmark_torch_start DEPTH WIDTH THREADS`.

The residual network of the depth ablation on the digits, by PyTorch's own initialisation, one step of 128 examples;
then it says so. Loads PyTorch and no JAX.
"""

import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from experiments.benchmark_timing import MOMENTUM, READY, WEIGHT_DECAY
from experiments.benchmark_torch import ResNet
from research.data import images

BATCH, LEARNING_RATE = 128, 0.1


class Row(NamedTuple):
    """A convolution, as in `research.models.convolution`, which imports JAX."""

    features: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1


def table(depth: int, width: int, num_classes: int) -> Any:
    """`research.models.cifar_resnet(depth, "residual", width, num_classes)`, as far as `ResNet` reads it."""

    def stage(features, stride):
        rest = (Row(features), Row(features))
        return SimpleNamespace(convolutions=(Row(features, stride=stride), rest[1]), units=(depth - 2) // 6, rest=rest)

    return SimpleNamespace(
        stem=(Row(width),),
        pool=False,
        stages=tuple(stage(width * 2**k, 1 if k == 0 else 2) for k in range(3)),
        num_classes=num_classes,
        placement="original",
        option="A",
    )


def network(depth: int, width: int, data: Any) -> ResNet:
    """The network for a data set, channels_last."""
    rows = table(depth, width, data.num_classes)
    work = SimpleNamespace(model=lambda: rows, arrays={"images": data.train.images})
    return ResNet(work).to(memory_format=torch.channels_last)


def first_step(depth: int, width: int, threads: int) -> float:
    """Reads the digits, makes the network, takes a step; returns its loss."""
    torch.set_num_threads(threads)
    data = images.load("digits", None)
    made = network(depth, width, data)
    chosen = torch.randperm(len(data.train))[:BATCH]
    batch = {
        "images": torch.from_numpy(data.train.images)[chosen],
        "labels": torch.from_numpy(data.train.labels).long()[chosen],
    }
    options = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    optimizer = torch.optim.SGD(made.parameters(), lr=LEARNING_RATE, **options)
    loss = made.loss(made(made.prepare(batch)), batch)
    loss.backward()
    optimizer.step()
    return loss.item()


if __name__ == "__main__":
    first_step(*map(int, sys.argv[1:]))
    print(READY, flush=True)
