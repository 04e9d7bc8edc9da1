"""The residual unit of He et al. 2015 and 2016: a branch of convolutions, a shortcut, and where the activations sit.

    y = h(x) + F(x)        next x = f(y)

`PLACEMENTS` says where normalisation and ReLU stand in F and in f; `research.models.joins` says what h is.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from research.models.convolution import Convolution
from research.models.joins import Join
from research.ops import initializers, shortcuts


class Placement(NamedTuple):
    """Where activations stand: strings of `n` (normalisation) and `r` (ReLU), applied from left to right.

    Attributes:
      before: the branch's first convolution (pre-activation).
      between: two convolutions of the branch.
      last: after the branch's last convolution, before the addition.
      after: the addition.
      final: after the network's last unit.
    """

    before: str
    between: str
    last: str
    after: str
    final: str

    @property
    def normalises_after_convolution(self) -> bool:
        """Whether every convolution is followed by its own normalisation, rather than preceded by it."""
        return not self.before.startswith("n")


# He et al. 2016, Table 2 and Figure 4, (a) to (e). The network's first activation stands right after its stem, before
# any unit ("for the first Residual Unit ... we adopt the first activation right after conv1"), and pre-activation
# networks end with one more ("an extra activation right after its element-wise addition").
PLACEMENTS = {
    "original": Placement("", "nr", "n", "r", ""),
    "norm_after_addition": Placement("", "nr", "", "nr", ""),
    "relu_before_addition": Placement("", "nr", "nr", "", ""),
    "relu_only_preactivation": Placement("r", "nr", "n", "", "r"),
    "full_preactivation": Placement("nr", "nr", "", "", "nr"),
}


class ResidualUnit(nn.Module):
    """Some convolutions, with or without a shortcut around them.

        original, two convolutions:   y = relu(F(x) + x)    F(x) = norm2(conv2(relu(norm1(conv1(x)))))
        full pre-activation:          y = F(x) + x          F(x) = conv2(relu(norm2(conv1(relu(norm1(x))))))

    Where the shape changes, pre-activation stands before the split, so that the shortcut reads the activated x too.
    Source: He et al. 2015, section 3.2, Figures 2 and 5; He et al. 2016, Figures 1, 2 and 4.

    Attributes:
      convolutions: of the branch; the last one's features are the result's, strides multiply.
      residual: whether the shortcut is there.
      placement: a row of `PLACEMENTS`.
      norm: constructor of a normalisation layer.
      join: constructor of a `Join`.
      option: shortcut where the shape changes: `A` subsampling and zero channels, `B` a projection by a convolution;
        `C` is a projection in every unit. A projection is normalised where convolutions are.
      projection_kernel: its height and width in pixels.
      squeeze_ratio: r of squeeze-and-excitation at the end of the branch; 0 for none.
      activated: x has gone through the first activation already (the network's first unit).
      dtype: of convolutions and activations, see `research.models.resnet.ResNet`.
    """

    convolutions: tuple[Convolution, ...]
    residual: bool
    placement: Placement
    norm: Callable[..., nn.Module]
    join: Callable[..., Join]
    option: str = "A"
    projection_kernel: int = 1
    squeeze_ratio: int = 0
    activated: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, None]:
        """y of x `[batch, height, width, channels]`; key for a join that draws. The second result is for `nn.scan`."""
        place, numbers = self.placement, itertools.count(1)
        x = self._probe("input", x)
        branch = x
        if self.activated and "n" in place.before:
            next(numbers)  # norm1 is the stem's, so that norm i always stands at convolution i
        elif not self.activated:
            branch = self._activate(place.before, x, numbers)
        split = branch if self._changes_shape(x) else x
        for number, row in enumerate(self.convolutions, start=1):
            branch = row.layer(f"conv{number}", dtype=self.dtype)(branch)
            last = number == len(self.convolutions)
            activations = place.last if last else place.between
            if place.normalises_after_convolution and activations.startswith("n"):
                branch, activations = self._activate("n", branch, numbers), activations[1:]
            branch = self._probe(f"response{number}", branch)
            branch = self._activate(activations, branch, numbers)
            if not last:
                branch = self._probe(f"activation{number}", branch)
        if self.squeeze_ratio:
            branch = SqueezeExcitation(self.squeeze_ratio, self.dtype, name="squeeze_excitation")(branch)
        branch = self._probe("branch", branch)
        y = self.join(name="join")(split, self._shortcut(split), branch, key) if self.residual else branch
        return self._probe("output", self._activate(place.after, y, numbers)), None

    @property
    def _features(self):
        return self.convolutions[-1].features

    @property
    def _stride(self):
        return math.prod(row.stride for row in self.convolutions)

    def _changes_shape(self, x):
        return self._stride != 1 or x.shape[-1] != self._features

    def _activate(self, activations, x, numbers):
        for kind in activations:
            x = nn.relu(x) if kind == "r" else self.norm(name=f"norm{next(numbers)}")(x)
        return x

    def _shortcut(self, x):
        if self.option == "C" or (self.option == "B" and self._changes_shape(x)):
            row = Convolution(self._features, self.projection_kernel, self._stride)
            x = row.layer("projection", dtype=self.dtype)(x)
            return self.norm(name="projection_norm")(x) if self.placement.normalises_after_convolution else x
        if self._changes_shape(x):
            return shortcuts.subsample_and_pad(x, self._features, (self._stride, self._stride))
        return x

    def _probe(self, name, x):
        """Lets an analysis read x ('intermediates') and take gradients at x ('perturbations'); costs nothing else."""
        self.sow("intermediates", name, x)
        return self.perturb(name, x) if self.has_variable("perturbations", name) else x


class SqueezeExcitation(nn.Module):
    """Channels weighted by what the whole image holds.

        z = mean over pixels of u        s = sigmoid(W2 relu(W1 z + b1) + b2)        y = s u

    Source: Hu et al. 2018, "Squeeze-and-Excitation Networks", equations 2 to 4.

    Attributes:
      ratio: r, by which the hidden layer is narrower.
      dtype: of both layers; None for that of u and the weights.
    """

    ratio: int
    dtype: Any = None

    @nn.compact
    def __call__(self, u: jax.Array) -> jax.Array:
        channels, options = u.shape[-1], {"kernel_init": initializers.he_normal, "dtype": self.dtype}
        z = u.mean(axis=(1, 2))
        z = nn.relu(nn.Dense(channels // self.ratio, name="squeeze", **options)(z))
        s = nn.sigmoid(nn.Dense(channels, name="excite", **options)(z))
        return u * s[:, None, None, :]
