"""Recurrent layers: Linen holds the weights of `research.ops.recurrent`'s cells, `research.ops.recurrence` runs them.

A `Cell` says what a layer needs to know of a kind of unit; `CELLS` are their constructors. Weights of a layer of n
units that reads d features, gate blocks beside each other (order: the step's docstring):

    input_kernel [d, gates n]    recurrent_kernel [n, gates n]    bias [gates n]    and the cell's own [n]

With `kernels` the units stand on every pixel of a map and both kernels begin with their height and width: ConvLSTM,
ConvGRU.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.ops import conv, recurrence, recurrent

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
      initial: `(batch, ..., n) -> carry` before the first step, zeros: of the world outside nothing is known.
      hidden: the carry's part that is put out.
      recurrent_init: of each block `[..., n, n]` of the recurrent kernel.
      own: names and initialisers of further weights `[n]`.
      own_by_position: on a map those are `[height, width, n]`.
      kernel_inside: the step multiplies by U itself, with the argument `product`.
    """

    gates: int
    step: Callable[..., Any]
    initial: Callable[..., Any] = lambda *shape: jnp.zeros(shape)
    hidden: Callable[[Any], jax.Array] = lambda h: h
    recurrent_init: Initializer = _ORTHOGONAL
    own: Mapping[str, Initializer] = dataclasses.field(default_factory=dict)
    own_by_position: bool = False
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
        centre = tuple(size // 2 for size in shape[:-2])  # of a convolution
        return jnp.zeros(shape, dtype).at[centre].set(jnp.eye(*shape[-2:], dtype=dtype))

    return dataclasses.replace(vanilla("relu"), recurrent_init=identity)


def leaky(leak: float = 0.9) -> Cell:
    """Leaky tanh units of time constant 1 / (1 - leak)."""
    return Cell(1, lambda h, a, r, _: recurrent.leaky_step(h, a, r, leak=leak))


def lstm(forget_bias: float = 1.0, peepholes: bool = False, candidate: str = "tanh", by_position: bool = False) -> Cell:
    """LSTM; `candidate="sigmoid"` is Goodfellow's form. Peepholes begin at zero.

    On a map all positions share them, as the parameter counts of Shi et al. 2015 say, or with `by_position` none do.
    """
    act = {"tanh": jnp.tanh, "sigmoid": nn.sigmoid}[candidate]

    def step(carry, a, r, own):
        if not peepholes and candidate == "tanh":
            return recurrent.fused_lstm_step(carry, a, r, forget_bias=forget_bias)
        holes = recurrent.Peepholes(own["peephole_i"], own["peephole_f"], own["peephole_o"]) if peepholes else None
        return recurrent.lstm_step(carry, a, r, forget_bias=forget_bias, peepholes=holes, candidate=act)

    return Cell(
        gates=4,
        step=step,
        initial=lambda *shape: recurrent.LSTMCarry(jnp.zeros(shape), jnp.zeros(shape)),
        hidden=lambda carry: carry.h,
        own_by_position=by_position,
        own={f"peephole_{gate}": nn.initializers.zeros for gate in "ifo"} if peepholes else {},
    )


def gru(reset: str = "after") -> Cell:
    """GRU with the reset gate after the product (cuDNN, PyTorch; with a bias of its own) or before (Cho, Chung)."""
    if reset == "before":

        def step(h, a, kernel, own, product=jnp.matmul):
            return recurrent.gru_reset_before_step(h, a, kernel, product=product)

        return Cell(3, step, kernel_inside=True)
    return Cell(
        gates=3,
        step=lambda h, a, r, own: recurrent.gru_reset_after_step(h, a, r, bias=own["reset_bias"]),
        own={"reset_bias": nn.initializers.zeros},
    )


def mgu() -> Cell:
    """Minimal gated unit."""

    def step(h, a, kernel, own, product=jnp.matmul):
        return recurrent.minimal_gated_step(h, a, kernel, product=product)

    return Cell(2, step, kernel_inside=True)


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

        a_t = x_t W + b        r_t = h_{t-1} U        carry_t = step(carry_{t-1}, a_t, r_t)

    Attributes:
      cell: see `Cell`.
      features: n, its units; on a map its channels.
      kernels: height and width of W and of U on a map, where products are convolutions of stride 1 padded with zeros;
        None for vectors. What reaches a state has come from an area that grows by U's size - 1 with every step.
      use_bias: whether pre-activations have a bias.
      reverse: walks from the last time to the first.
      segment: see `research.ops.recurrence.recur`.
      dtype: of activations and of the operands of products, such as bfloat16; None for that of x and the weights. The
        state is carried and the step computed in float32 all the same: the constant error carousel, c of an LSTM and h
        of a GRU, is a sum of many small terms, and what is below 1/256 of a bfloat16 sum is lost from it.
    """

    cell: Cell
    features: int
    kernels: tuple[int, int] | None = None
    use_bias: bool = True
    reverse: bool = False
    segment: int | None = None
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array | None,
        carry: Any = None,
        mask: jax.Array | None = None,
        starts: jax.Array | None = None,
        nudge: jax.Array | None = None,
        time: int | None = None,
    ) -> tuple[Any, jax.Array]:
        """The last carry, and outputs `[batch, time, ..., n]` of x `[batch, time, ..., features]`.

        With a `dtype` outputs are of that type, and the carry float32.

        Args:
          x: the sequence; `...` is nothing, or height and width. None for none, as in a decoder: W is not there then.
          carry: before the first step; zeros when None.
          mask: `[batch, time]` bool, False where a sequence has ended: zero output there, the carry stays.
          starts: `[batch, time]` bool, True where a sequence begins: what stands before it in the row is forgotten.
          nudge: `[batch, time, ..., n]`, added to the hidden states; its gradient is that at the states.
          time: steps to take without x, with a carry.
        """
        cell, n = self.cell, self.features
        width = cell.gates * n
        product, (input_window, inner_window) = jnp.matmul, ((), ())
        if self.kernels is not None:
            product, (input_window, inner_window) = conv.conv2d, [(size, size) for size in self.kernels]
        positions = (cell.hidden(carry).shape if x is None else x.shape[:1] + x.shape[2:])[1:-1]
        own_shape = (*positions, n) if cell.own_by_position else (n,)
        kernel = None
        if x is not None:
            kernel = self.param("input_kernel", nn.initializers.glorot_uniform(), (*input_window, x.shape[-1], width))
        inner = self.param("recurrent_kernel", _by_gate(cell.recurrent_init, cell.gates), (*inner_window, n, width))
        own = {name: self.param(name, init, own_shape) for name, init in cell.own.items()}
        bias = self.param("bias", nn.initializers.zeros, (width,)) if self.use_bias else jnp.zeros(width)
        if carry is None:
            dtype = jnp.result_type(x, kernel)
            carry = jax.tree.map(lambda leaf: leaf.astype(dtype), cell.initial(x.shape[0], *positions, n))
        if self.dtype is not None:
            x, product = None if x is None else x.astype(self.dtype), _rounded(product, self.dtype)
        options = {"hidden": cell.hidden, "product": product, "kernel_inside": cell.kernel_inside}
        step = partial(cell.step, product=product) if cell.kernel_inside else cell.step
        if x is None:
            own, step = (bias, own), _without_input(step, cell)
            a = jnp.zeros((time, len(cell.hidden(carry)), 0), bias.dtype)
        elif self.kernels is None and x.shape[-1] <= _FEW_INPUTS:
            own, step = (kernel, bias, own), _with_input_product(step, product)
            a = jnp.swapaxes(x, 0, 1)
        else:
            x = jnp.swapaxes(x, 0, 1)
            a = product(x.reshape(-1, *x.shape[2:]), kernel) + bias  # of all times as of one large batch
            a = a.reshape(*x.shape[:2], *a.shape[1:]).astype(self.dtype or a.dtype)
        carry, outputs = recurrence.recur(
            step,
            inner,
            own,
            carry,
            a,
            mask=None if mask is None else mask.T,
            starts=None if starts is None else starts.T,
            reverse=self.reverse,
            segment=self.segment,
            nudge=None if nudge is None else jnp.swapaxes(nudge, 0, 1),
            **options,
        )
        return carry, jnp.swapaxes(outputs, 0, 1).astype(self.dtype or outputs.dtype)


def _rounded(product, dtype):
    """`(h, U) -> h U` with both operands rounded to `dtype`, put out in the type of h.

    U comes in float32, so that where its gradient is a sum over a loop's steps, it is one of float32.
    """

    def rounded(h, kernel):
        return product(h.astype(dtype), kernel.astype(dtype)).astype(h.dtype)

    return rounded


def _with_input_product(step, product):
    """The cell's step with the input's product made inside: `(carry, x, r or U, (W, b, own weights)) -> carry`."""

    def with_product(carry, x, r, weights):
        kernel, bias, own = weights
        return step(carry, product(x, kernel) + bias, r, own)

    return with_product


def _without_input(step, cell):
    """The step with the bias alone for `a`: `(carry, nothing, r or U, (b, own weights)) -> carry`."""

    def without(carry, nothing, r, weights):
        bias, own = weights
        return step(carry, jnp.broadcast_to(bias, (*cell.hidden(carry).shape[:-1], bias.size)), r, own)

    return without


def _by_gate(init, gates):
    """Draws each gate's block `[..., n, n]` on its own."""

    def draw(key, shape, dtype=jnp.float32):
        blocks = [init(key, (*shape[:-1], shape[-2]), dtype) for key in jax.random.split(key, gates)]
        return jnp.concatenate(blocks, axis=-1)

    return draw
