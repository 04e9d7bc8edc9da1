"""The networks of the benchmark in stock Flax layers, as one writes them from Flax's own examples.

`nn.Conv` with XLA's own gradient and one unit after the other, unrolled (inside a loop XLA:CPU's convolutions are
slower, which would be unfair to them); `nn.RNN` over `nn.OptimizedLSTMCell` or `nn.GRUCell`. Parameters are as many as
in ours. For comparison only: nothing else in the repository uses them.
"""

from collections.abc import Callable

import jax
from flax import linen as nn

from research.models.convolution import Convolution
from research.models.resnet import ResNet
from research.ops import shortcuts


def _conv(row: Convolution, name: str) -> nn.Conv:
    half = row.kernel // 2
    return nn.Conv(
        row.features,
        (row.kernel, row.kernel),
        strides=row.stride,
        padding=((half, half), (half, half)),
        feature_group_count=row.groups,
        use_bias=False,
        name=name,
    )


def _norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)


class StockUnit(nn.Module):
    """A residual unit as of `research.models.residual_unit`, `original` or `full_preactivation`.

    Attributes:
      convolutions: of the branch.
      preactivation: whether normalisation and ReLU stand before each convolution.
      option: of the shortcut where the shape changes, `A` or `B`.
      activated: x has gone through the first activation already.
    """

    convolutions: tuple[Convolution, ...]
    preactivation: bool
    option: str
    activated: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """y of x `[batch, height, width, channels]`."""
        features, stride = self.convolutions[-1].features, max(row.stride for row in self.convolutions)
        changes = stride != 1 or x.shape[-1] != features
        branch = x
        for number, row in enumerate(self.convolutions, start=1):
            if self.preactivation and not (number == 1 and self.activated):
                branch = nn.relu(_norm(train, f"norm{number}")(branch))
            if self.preactivation and number == 1 and changes:
                x = branch
            branch = _conv(row, f"conv{number}")(branch)
            if not self.preactivation:
                branch = _norm(train, f"norm{number}")(branch)
                branch = branch if row is self.convolutions[-1] else nn.relu(branch)
        if changes and self.option == "B":
            x = _conv(Convolution(features, 1, stride), "projection")(x)
            x = x if self.preactivation else _norm(train, "projection_norm")(x)
        elif changes:
            x = shortcuts.subsample_and_pad(x, features, (stride, stride))
        return x + branch if self.preactivation else nn.relu(x + branch)


class StockResNet(nn.Module):
    """The network of a table, unrolled.

    Attributes:
      table: a `ResNet` of ours, read for its architecture: residual, `original` or `full_preactivation`.
    """

    table: ResNet

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits `[batch, num_classes]` of images `[batch, height, width, channels]`."""
        table, number = self.table, 0
        preactivation = table.placement == "full_preactivation"
        x = nn.relu(_norm(train, "stem_norm")(_conv(table.stem[0], "stem_conv")(x)))
        if table.pool:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage in table.stages:
            for rows in [stage.convolutions] + [stage.rest] * (stage.units - 1):
                number += 1
                x = StockUnit(rows, preactivation, table.option, activated=number == 1, name=f"unit{number}")(
                    x, train=train
                )
        if preactivation:
            x = nn.relu(_norm(train, "final_norm")(x))
        return nn.Dense(table.num_classes, name="head")(x.mean(axis=(1, 2)))


RNN_CELLS: dict[str, Callable[[int], nn.RNNCellBase]] = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}


class StockSequenceToOne(nn.Module):
    """Recurrent layers and a linear layer on the last output.

    Attributes:
      cell: a key of `RNN_CELLS`.
      features: units of each layer.
      outputs: numbers of the output.
    """

    cell: str
    features: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Outputs `[batch, outputs]` of x `[batch, time, inputs]`."""
        for n in self.features:
            x = nn.RNN(RNN_CELLS[self.cell](n))(x)
        return nn.Dense(self.outputs, name="head")(x[:, -1])


class StockLanguageModel(nn.Module):
    """An embedding, LSTM layers that begin at zero with every window, and a linear layer.

    Attributes:
      vocabulary: number of tokens.
      features: units of each layer; the embedding has as many numbers as the first.
    """

    vocabulary: int
    features: tuple[int, ...]

    @nn.compact
    def __call__(self, tokens: jax.Array, first: jax.Array, *, train: bool) -> jax.Array:
        """Logits `[batch, time, vocabulary]` of `tokens` `[batch, time]`; `first` is ignored."""
        x = nn.Embed(self.vocabulary, self.features[0], name="embedding")(tokens)
        for n in self.features:
            x = nn.RNN(nn.OptimizedLSTMCell(n))(x)
        return nn.Dense(self.vocabulary, name="head")(x)
