"""LeNet-5, the network of LeCun et al. 1998 in the form in which it is written today."""

from collections.abc import Callable

import jax
from flax import linen as nn

from research.models.convolution import convolve
from research.ops import pooling


class LeNet5(nn.Module):
    """Two convolutions with pooling, three linear layers: 61,706 parameters on MNIST.

        28x28x1 -> 5x5 conv 28x28x6 -> pool 14x14x6 -> 5x5 conv 10x10x16 -> pool 5x5x16 -> 120 -> 84 -> classes

    Differences from the paper: ReLU in place of the scaled tanh, max-pooling in place of trainable means, all maps of
    the second convolution read all of the first, linear outputs in place of radial basis functions.

    Attributes:
      num_classes: outputs.
      convolve: the convolution itself; None for XLA's own with XLA's gradient, what `nn.Conv` has by default.

    Source: LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition", section II.B.
    """

    num_classes: int = 10
    convolve: Callable[..., jax.Array] | None = convolve

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits `[batch, num_classes]` of images `[batch, height, width, channels]`."""
        for number, (features, padding) in enumerate(((6, 2), (16, 0)), start=1):  # MNIST padded to the paper's 32x32
            layer = nn.Conv(
                features,
                (5, 5),
                padding=((padding, padding), (padding, padding)),
                conv_general_dilated=self.convolve,
                name=f"conv{number}",
            )
            x = pooling.max_pool(nn.relu(layer(x)), window=2, stride=2)
        x = x.reshape(x.shape[0], -1)
        for number, features in enumerate((120, 84), start=1):
            x = nn.relu(nn.Dense(features, name=f"dense{number}")(x))
        return nn.Dense(self.num_classes, name="head")(x)
