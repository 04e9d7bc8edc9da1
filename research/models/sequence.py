"""Networks over sequences: stacks of recurrent layers, in both directions, with one output or one a step.

The recurrent networks of Goodfellow et al. 2016, section 10.2: an output at every step (Figure 10.3), one output after
the last (Figure 10.5), recurrence from the output alone (Figure 10.4), one input to a sequence (Figure 10.9); deep ones
of Figure 10.13 and bidirectional ones of Figure 10.11.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from research.models.head import head
from research.models.recurrent import Cell, Recurrent

DEPTHS = ("stacked", "transition", "skip")


class Stack(nn.Module):
    """Recurrent layers above each other: three ways of depth, Goodfellow et al. 2016, Figure 10.13.

        stacked      layer k reads the outputs of layer k - 1 (a)
        transition   a feed-forward layer with tanh stands before each recurrent layer (b)
        skip         layer k also reads the input of the whole stack, so that the path is short again (c)

    Attributes:
      cell: of every layer.
      features: units of each layer; of a bidirectional one in each direction.
      depth: one of `DEPTHS`.
      bidirectional: every layer reads both ways, and its output holds both hidden states.
      use_bias, segment, dtype: of `Recurrent`.
    """

    cell: Cell
    features: tuple[int, ...]
    depth: str = "stacked"
    bidirectional: bool = False
    use_bias: bool = True
    segment: int | None = None
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: jax.Array, carries: Any = None, mask: jax.Array | None = None, starts: jax.Array | None = None
    ) -> tuple[tuple[Any, ...], jax.Array]:
        """The last carries, one a layer and direction, and the top outputs `[batch, time, features]`.

        Args:
          x: `[batch, time, inputs]`.
          carries: of an earlier call, which this one continues; zeros when None. Only of one direction.
          mask: `[batch, time]` bool, False where a sequence has ended.
          starts: `[batch, time]` bool, True where a sequence begins: a row may hold several.
        """
        if self.depth not in DEPTHS:
            raise ValueError(f"depth {self.depth!r} is unknown: choose from {', '.join(DEPTHS)}")
        if self.bidirectional and carries is not None:
            raise ValueError("a bidirectional network has seen the end: no carry continues it")
        bottom, last = x, []
        for number, n in enumerate(self.features, start=1):
            if self.depth == "skip" and number > 1:
                x = jnp.concatenate([x, bottom], axis=-1)
            if self.depth == "transition":
                x = jnp.tanh(nn.Dense(n, dtype=self.dtype, name=f"transition{number}")(x))
            outputs = []
            for reverse in (False, True)[: 1 + self.bidirectional]:
                layer = Recurrent(
                    self.cell,
                    n,
                    use_bias=self.use_bias,
                    reverse=reverse,
                    segment=self.segment,
                    dtype=self.dtype,
                    name=f"layer{number}{'_reverse' if reverse else ''}",
                )
                carry, y = layer(x, None if carries is None else carries[number - 1], mask, starts)
                last.append(carry)
                outputs.append(y)
            x = jnp.concatenate(outputs, axis=-1)
        return tuple(last), x


class SequenceToSequence(nn.Module):
    """An output for every step, aligned with the input: a stack and one linear layer.

    Attributes:
      stack: the recurrent layers.
      outputs: numbers of each output.
    """

    stack: Stack
    outputs: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        starts: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Outputs `[batch, time, outputs]` of x `[batch, time, inputs]`; mask and starts as in `Stack`."""
        _, states = self.stack(x, None, mask, starts)
        return head(self.outputs, self.stack.dtype, name="head")(states)


class SequenceToOne(nn.Module):
    """One output, after the last valid step of each sequence: of every direction its own last state.

    Attributes:
      stack: the recurrent layers.
      outputs: numbers of the output.
    """

    stack: Stack
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Outputs `[batch, outputs]` of x `[batch, time, inputs]`."""
        carries, _ = self.stack(x, None, mask)
        directions = 1 + self.stack.bidirectional
        top = [self.stack.cell.hidden(carry) for carry in carries[-directions:]]
        return head(self.outputs, self.stack.dtype, name="head")(jnp.concatenate(top, axis=-1))


class OneToSequence(nn.Module):
    """A sequence from one vector: the vector goes to every step, beside the output before (Figure 10.9).

    Attributes:
      stack: the recurrent layers.
      outputs: numbers of each output.
    """

    stack: Stack
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, targets: jax.Array, *, train: bool = False) -> jax.Array:
        """Outputs `[batch, time, outputs]` of x `[batch, inputs]`; step t reads `targets[:, t - 1]`, zeros first.

        Args:
          x: what the sequence is about.
          targets: `[batch, time, outputs]`, the true outputs (teacher forcing).
        """
        before = jnp.pad(targets[:, :-1], ((0, 0), (1, 0), (0, 0)))
        context = jnp.broadcast_to(x[:, None], (*before.shape[:2], x.shape[-1]))
        _, states = self.stack(jnp.concatenate([context, before], axis=-1))
        return head(self.outputs, self.stack.dtype, name="head")(states)


class OutputRecurrence(nn.Module):
    """Recurrence from the output alone: what is not put out is forgotten (Goodfellow et al. 2016, Figure 10.4).

        h_t = tanh(x_t W + o_{t-1} R + b)        o_t = h_t V + c

    With teacher forcing the true o_{t-1} is read, and all steps are computed at once: training needs no loop.

    Attributes:
      features: hidden units.
      outputs: numbers of each output.
    """

    features: int
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, targets: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Outputs `[batch, time, outputs]` of x `[batch, time, inputs]`.

        Args:
          x: the inputs.
          targets: `[batch, time, outputs]` for teacher forcing; None to read the network's own outputs.
        """
        glorot, zeros = nn.initializers.glorot_uniform(), nn.initializers.zeros
        inputs = self.param("input_kernel", glorot, (x.shape[-1], self.features))
        bias = self.param("bias", zeros, (self.features,))
        kernel = self.param("recurrent_kernel", glorot, (self.outputs, self.features))
        head = self.param("head_kernel", glorot, (self.features, self.outputs))
        head_bias = self.param("head_bias", zeros, (self.outputs,))
        a = x @ inputs + bias
        if targets is not None:
            before = jnp.pad(targets[:, :-1], ((0, 0), (1, 0), (0, 0)))
            return jnp.tanh(a + before @ kernel) @ head + head_bias

        def step(output, a):
            output = jnp.tanh(a + output @ kernel) @ head + head_bias
            return output, output

        start = jnp.zeros((x.shape[0], self.outputs), a.dtype)
        return jnp.swapaxes(lax.scan(step, start, jnp.swapaxes(a, 0, 1))[1], 0, 1)
