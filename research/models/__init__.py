"""Flax Linen modules, one file per family; thin holders of parameters over `research.ops`."""

from research.models.resnet import cifar_resnet

MODELS = {"resnet": cifar_resnet}
