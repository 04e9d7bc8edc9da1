"""Recurrence over time: one scan for every cell of `research.ops.recurrent`; time is the leading axis inside.

The input's share of the pre-activations comes for all times at once, `a = x W + b` `[time, batch, gates n]`: that
product stands outside the loop. The hidden state's share h U cannot, but its weight gradient can: the backward loop
emits the gradient of every step's r = h U, and

    dL/dU = sum_t h_{t-1}' dL/dr_t

is one product over all times afterwards (LSTM of 650 units and inputs, batch 20: 1.8 times as fast as a loop that holds
all products). Where the step reads a + r alone, its gradients at a and r are one array and stored once. With 1 or 2
inputs `research.models.recurrent` puts the input's product into the step, since a is larger there than all it saves.
What else was tried: `SPEED.md` beside this file.

For units on a map, `[batch, height, width, n]`, the product is a convolution: the recurrence is the same one.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from research.ops.segments import scan_in_segments

Carry = Any
Product = Callable[[jax.Array, jax.Array], jax.Array]


def recur(
    step: Callable[..., Carry],
    kernel: jax.Array,
    parameters: Any,
    carry: Carry,
    a: jax.Array,
    *,
    hidden: Callable[[Carry], jax.Array] = lambda h: h,
    product: Product = jnp.matmul,
    mask: jax.Array | None = None,
    starts: jax.Array | None = None,
    reverse: bool = False,
    kernel_inside: bool = False,
    segment: int | None = None,
    nudge: jax.Array | None = None,
) -> tuple[Carry, jax.Array]:
    """Runs a cell over time.

        carry_t = step(carry_{t-1}, a_t, hidden(carry_{t-1}) U, parameters)        output_t = hidden(carry_t)

    Args:
      step: one step of a cell; must not close over traced arrays.
      kernel: U `[n, gates n]`, or what `product` takes.
      parameters: further weights of the cell (peepholes, biases), or None.
      carry: before the first step, arrays `[batch, ..., n]`; `...` is nothing, or height and width of a map.
      a: `[time, batch, ..., gates n]`.
      hidden: the carry's part that is multiplied by U and put out.
      product: `(h, U) -> h U`, linear in both, with h `[any batch, ..., n]`; must not close over traced arrays.
      mask: `[time, batch]` bool, False where a sequence has no element: the carry passes unchanged and the output is
        zero there, so the last carry is that of the last valid step.
      starts: `[time, batch]` bool, True where a sequence begins: several may stand behind each other in one row. The
        carry before that step is zero, masked or not, and no gradient goes across. In reverse it is zero before a
        sequence's last element, the step whose next time is a start; `carry` stands behind the last time of all.
      reverse: walks from the last time to the first; outputs stand at their own times.
      kernel_inside: the step multiplies by U itself: `step(carry, a_t, U, parameters)`. Its gradient is accumulated in
        the loop. Differentiable in forward mode too, if the step is; the other kind only in reverse mode, any number of
        times.
      segment: steps of a segment. Where it is given, only the carry before each segment is kept for the backward pass
        and segments are run again there: at segment = sqrt(time) memory grows with the square root of time (Chen et al.
        2016), for one more forward pass.
      nudge: `[time, batch, ..., n]`, added to the hidden state after each step. At zero it changes nothing, and the
        gradient there is dL/dh_t, through everything that comes after t.

    Returns:
      The last carry, and the outputs `[time, batch, ..., n]`.
    """
    time, batch = a.shape[:2]
    if mask is not None:
        chex.assert_shape(mask, (time, batch))
    if starts is not None:
        chex.assert_shape(starts, (time, batch))
        if reverse:  # from where each sequence begins to where it ends
            starts = jnp.concatenate([starts[1:], jnp.zeros_like(starts[:1])])[::-1]
    if nudge is not None:
        a, step = jnp.concatenate([a, nudge], axis=-1), _nudged(step, hidden, nudge.shape[-1])
    if reverse:
        a, mask = a[::-1], None if mask is None else mask[::-1]
    loop = (
        functools.partial(_loop_inside, step, hidden)
        if kernel_inside
        else functools.partial(_loop, step, hidden, product)
    )
    if segment is None or segment >= time:
        carry, outputs = loop(kernel, parameters, carry, a, mask, starts)
    else:
        carry, outputs = scan_in_segments(
            lambda carry, inputs: loop(kernel, parameters, carry, *inputs), carry, (a, mask, starts), size=segment
        )
    return carry, outputs[::-1] if reverse else outputs


def _nudged(step, hidden, n):
    """The step with `a`'s last n numbers added to the hidden state behind it."""

    def nudged(carry, a, *rest):
        new = step(carry, a[..., :-n], *rest)
        (added,) = jax.linear_transpose(hidden, new)(a[..., -n:])
        return jax.tree.map(jnp.add, new, added)

    return nudged


def _reset(start, carry):
    """Zeros where `start` `[batch]` says so; linear and its own transpose, so that gradients go through it too."""
    return carry if start is None else jax.tree.map(lambda leaf: _where(start, 0, leaf), carry)


def _where(rows, yes, no):
    """`yes` in the examples `[batch]` where `rows` says so, elsewhere `no` `[batch, ...]`."""
    return jnp.where(rows.reshape(-1, *[1] * (no.ndim - 1)), yes, no)


def _masked(step, hidden, mask, carry, *arguments):
    """One step where the mask `[batch]` says so, everywhere where it is None: the new carry and the output."""
    new = step(carry, *arguments)
    if mask is None:
        return new, hidden(new)
    new = jax.tree.map(functools.partial(_where, mask), new, carry)
    return new, _where(~mask, 0, hidden(new))


def _loop_inside(step, hidden, kernel, parameters, carry, a, mask, starts):
    def body(carry, inputs):
        a, mask, start = inputs
        return _masked(step, hidden, mask, _reset(start, carry), a, kernel, parameters)

    return lax.scan(body, carry, (a, mask, starts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loop(step, hidden, product, kernel, parameters, carry, a, mask, starts):
    def body(carry, inputs):
        a, mask, start = inputs
        carry = _reset(start, carry)
        return _masked(step, hidden, mask, carry, a, product(hidden(carry), kernel), parameters)

    return lax.scan(body, carry, (a, mask, starts))


def _forward(step, hidden, product, kernel, parameters, carry, a, mask, starts):
    def body(carry, inputs):
        a, mask, start = inputs
        state, through_hidden = jax.vjp(hidden, _reset(start, carry))
        one = functools.partial(_masked, step, hidden, mask)
        (new, output), pull_back = jax.vjp(one, _reset(start, carry), a, product(state, kernel), parameters)
        # What a step's derivative needs is kept and not computed again: exponentials cost more than memory here.
        return new, (output, state, through_hidden, pull_back)

    last, (outputs, *kept) = lax.scan(body, carry, (a, mask, starts))
    return (last, outputs), (kernel, parameters, starts, *kept)


def _backward(step, hidden, product, saved, gradients):
    kernel, parameters, starts, states, *pulls = saved
    last, outputs = gradients
    transposed = kernel.T
    one = []  # whether the gradients at a and r are one array: known when the body is traced

    def through_product(r_gradient):
        if product is jnp.matmul:  # transposed once, not at every step
            return r_gradient @ transposed
        # Its value is not used, and XLA leaves it out: the transpose alone is computed.
        return jax.vjp(lambda h: product(h, kernel), jnp.zeros(states.shape[1:], states.dtype))[1](r_gradient)[0]

    def body(accumulated, inputs):
        carry_gradient, parameter_gradient = accumulated
        output_gradient, start, through_hidden, pull_back = inputs
        carry_gradient, a_gradient, r_gradient, own = pull_back((carry_gradient, output_gradient))
        (through_kernel,) = through_hidden(through_product(r_gradient))
        carry_gradient = _reset(start, jax.tree.map(jnp.add, carry_gradient, through_kernel))
        one[:] = [a_gradient is r_gradient]
        a_gradient = None if one[0] else a_gradient
        return (carry_gradient, jax.tree.map(jnp.add, parameter_gradient, own)), (a_gradient, r_gradient)

    end = last, jax.tree.map(jnp.zeros_like, parameters)
    (carry_gradient, parameter_gradient), (a_gradient, r_gradient) = lax.scan(
        body, end, (outputs, starts, *pulls), reverse=True
    )
    a_gradient = r_gradient if one[0] else a_gradient
    states, r_gradient = (x.reshape(-1, *x.shape[2:]) for x in (states, r_gradient))
    (kernel_gradient,) = jax.vjp(lambda kernel: product(states, kernel), kernel)[1](r_gradient)
    return kernel_gradient, parameter_gradient, carry_gradient, a_gradient, None, None


_loop.defvjp(_forward, _backward)
