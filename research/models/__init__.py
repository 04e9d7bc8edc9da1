"""Flax Linen modules, one file per family; thin holders of parameters over `research.ops`."""

from research.models.resnet_tables import cifar_resnet, imagenet_resnet, senet154

MODELS = {"resnet": cifar_resnet, "imagenet_resnet": imagenet_resnet, "senet154": senet154}
