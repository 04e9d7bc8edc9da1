"""The convolution and normalisation layers of every network: Linen holds the parameters, `research.ops` computes."""

from typing import NamedTuple

from flax import linen as nn

from research.ops import conv, initializers


class Convolution(NamedTuple):
    """A row of an architecture's table.

    Attributes:
      features: channels of the result.
      kernel: height and width in pixels, odd.
      stride: step in pixels, both ways.
      groups: parts into which channels and features are cut.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    def layer(self, name: str, *, use_bias: bool = False, **options) -> nn.Conv:
        """The layer, padded by half the kernel on every side; no bias, since BatchNorm follows or precedes it."""
        half = self.kernel // 2
        return nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            strides=(self.stride, self.stride),
            padding=((half, half), (half, half)),
            feature_group_count=self.groups,
            use_bias=use_bias,
            kernel_init=initializers.he_normal,
            conv_general_dilated=convolve,
            name=name,
            **options,
        )


def convolve(x, kernel, strides, padding, *, feature_group_count, **unused):
    """nn.Conv's injected convolution: the repository's one door (only undilated NHWC is asked for)."""
    return conv.conv2d(x, kernel, strides=strides, padding=padding, groups=feature_group_count)
