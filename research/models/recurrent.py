"""Recurrent layers: Linen holds the weights of `research.ops.recurrent`'s cells, `research.ops.recurrence` runs them.

A `Cell` says what a layer needs to know of a kind of unit; `CELLS` are their constructors. Weights of a layer of n
units that reads d features, gate blocks beside each other (order: the step's docstring):

    input_kernel [d, gates n]    recurrent_kernel [n, gates n]    bias [gates n]    and the cell's own [n]
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.ops import recurrence, recurrent

Initializer = Callable[..., jax.Array]

# With so few inputs their product is made step by step: for all times at once it would be written, and its gradient
# read, at more cost than it saves.
_FEW_INPUTS = 4
_ORTHOGONAL = nn.initializers.orthogonal()


@dataclasses.dataclass(frozen=True)
class Cell:
    """A kind of unit.

    Attributes:
      gates: blocks of pre-activations.
      step: `(carry, a, r or U, own weights) -> carry`.
      initial: `(batch, n) -> carry` before the first step, zeros.
      hidden: the carry's part that is put out.
      recurrent_init: of each block `[n, n]` of the recurrent kernel.
      own: names and initialisers of further weights `[n]`.
      kernel_inside: the step multiplies by U itself.
    """

    gates: int
    step: Callable[..., Any]
    initial: Callable[[int, int], Any] = lambda batch, n: jnp.zeros((batch, n))
    hidden: Callable[[Any], jax.Array] = lambda h: h
    recurrent_init: Initializer = _ORTHOGONAL
    own: Mapping[str, Initializer] = dataclasses.field(default_factory=dict)
    kernel_inside: bool = False


def vanilla(activation: str = "tanh") -> Cell:
    """tanh, ReLU or sigmoid units, orthogonal recurrent weights."""
    act = {"tanh": jnp.tanh, "relu": nn.relu, "sigmoid": nn.sigmoid}[activation]
    return Cell(1, lambda h, a, r, _: recurrent.vanilla_step(h, a, r, activation=act))


def irnn() -> Cell:
    """ReLU units whose recurrent weights begin as the identity: Le et al. 2015.

    There input weights are N(0, 0.001^2), for plain gradient descent of very many steps; here as in the other cells,
    with which Adam learns in a few thousand.
    """

    def identity(key, shape, dtype=jnp.float32):
        return jnp.eye(*shape, dtype=dtype)

    return dataclasses.replace(vanilla("relu"), recurrent_init=identity)


def leaky(leak: float = 0.9) -> Cell:
    """Leaky tanh units of time constant 1 / (1 - leak)."""
    return Cell(1, lambda h, a, r, _: recurrent.leaky_step(h, a, r, leak=leak))


def lstm(forget_bias: float = 1.0, peepholes: bool = False, candidate: str = "tanh") -> Cell:
    """LSTM; `candidate="sigmoid"` is Goodfellow's form. Peepholes begin at zero."""
    act = {"tanh": jnp.tanh, "sigmoid": nn.sigmoid}[candidate]

    def step(carry, a, r, own):
        holes = recurrent.Peepholes(own["peephole_i"], own["peephole_f"], own["peephole_o"]) if peepholes else None
        return recurrent.lstm_step(carry, a, r, forget_bias=forget_bias, peepholes=holes, candidate=act)

    return Cell(
        gates=4,
        step=step,
        initial=lambda batch, n: recurrent.LSTMCarry(jnp.zeros((batch, n)), jnp.zeros((batch, n))),
        hidden=lambda carry: carry.h,
        own={f"peephole_{gate}": nn.initializers.zeros for gate in "ifo"} if peepholes else {},
    )


def gru(reset: str = "after") -> Cell:
    """GRU with the reset gate after the product (cuDNN, PyTorch; with a bias of its own) or before (Cho, Chung)."""
    if reset == "before":
        return Cell(3, lambda h, a, u, _: recurrent.gru_reset_before_step(h, a, u), kernel_inside=True)
    return Cell(
        gates=3,
        step=lambda h, a, r, own: recurrent.gru_reset_after_step(h, a, r, bias=own["reset_bias"]),
        own={"reset_bias": nn.initializers.zeros},
    )


def mgu() -> Cell:
    """Minimal gated unit."""
    return Cell(2, lambda h, a, u, _: recurrent.minimal_gated_step(h, a, u), kernel_inside=True)


CELLS = {
    "tanh": vanilla,
    "relu": partial(vanilla, "relu"),
    "sigmoid": partial(vanilla, "sigmoid"),
    "irnn": irnn,
    "leaky": leaky,
    "lstm": lstm,
    "gru": gru,
    "mgu": mgu,
}


class Recurrent(nn.Module):
    """One recurrent layer over time.

    Attributes:
      cell: see `Cell`.
      features: n, its units.
      use_bias: whether pre-activations have a bias.
      reverse: walks from the last time to the first.
      segment: see `research.ops.recurrence.recur`.
    """

    cell: Cell
    features: int
    use_bias: bool = True
    reverse: bool = False
    segment: int | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        carry: Any = None,
        mask: jax.Array | None = None,
        starts: jax.Array | None = None,
        nudge: jax.Array | None = None,
    ) -> tuple[Any, jax.Array]:
        """The last carry, and outputs `[batch, time, n]` of x `[batch, time, features]`.

        Args:
          x: the sequence.
          carry: before the first step; zeros when None.
          mask: `[batch, time]` bool, False where a sequence has ended: zero output there, the carry stays.
          starts: `[batch, time]` bool, True where a sequence begins: what stands before it in the row is forgotten.
          nudge: `[batch, time, n]`, added to the hidden states; its gradient is that at the states.
        """
        n, gates = self.features, self.cell.gates
        width = gates * n
        kernel = self.param("input_kernel", nn.initializers.glorot_uniform(), (x.shape[-1], width))
        inner = self.param("recurrent_kernel", _by_gate(self.cell.recurrent_init, gates), (n, width))
        own = {name: self.param(name, init, (n,)) for name, init in self.cell.own.items()}
        bias = self.param("bias", nn.initializers.zeros, (width,)) if self.use_bias else jnp.zeros(width)
        if carry is None:
            dtype = jnp.result_type(x, kernel)
            carry = jax.tree.map(lambda leaf: leaf.astype(dtype), self.cell.initial(x.shape[0], n))
        step, x = self.cell.step, jnp.swapaxes(x, 0, 1)
        few = x.shape[-1] <= _FEW_INPUTS
        if few:
            own, step = (kernel, bias, own), _with_products(self.cell)
        carry, outputs = recurrence.recur(
            step,
            inner,
            own,
            carry,
            x if few else x @ kernel + bias,
            hidden=self.cell.hidden,
            mask=None if mask is None else mask.T,
            starts=None if starts is None else starts.T,
            reverse=self.reverse,
            kernel_inside=few or self.cell.kernel_inside,
            segment=self.segment,
            nudge=None if nudge is None else jnp.swapaxes(nudge, 0, 1),
        )
        return carry, jnp.swapaxes(outputs, 0, 1)


def _with_products(cell):
    """The cell's step with both products made inside: `(carry, x, U, (W, b, own weights)) -> carry`."""

    def step(carry, x, inner, weights):
        kernel, bias, own = weights
        a = x @ kernel + bias
        return cell.step(carry, a, inner if cell.kernel_inside else cell.hidden(carry) @ inner, own)

    return step


def _by_gate(init, gates):
    """Draws each gate's square block on its own."""

    def draw(key, shape, dtype=jnp.float32):
        n = shape[0]
        blocks = [init(key, (n, n), dtype) for key in jax.random.split(key, gates)]
        return jnp.concatenate(blocks, axis=-1)

    return draw
