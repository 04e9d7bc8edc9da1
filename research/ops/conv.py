"""The one door to convolution: XLA's convolution with a weight gradient, and groups, that are fast on the CPU.

XLA:CPU computes the forward convolution and the input gradient at a good half of peak speed, but the weight gradient at
3 to 40 GFLOP/s. Here the weight gradient is one matrix product per block of the batch instead ('shift' form), which is
2 to 20 times faster and equal to the direct form up to the order of summation. A convolution in groups, which XLA:CPU
computes at 1 to 10 GFLOP/s, is made of a few without (`_bundled`). On other backends everything is left to XLA.
"""

import functools
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Bytes of the two operands of one block's products: small enough for the cache, large beside what a loop step costs.
_BLOCK_BYTES = 1 << 22
# A block's product is cut into so many parts, each for a core, where it has fewer elements than the other number.
_PARTS, _WIDE = 2, 1 << 17
# Channels of a bundle of groups, at least.
_BUNDLE = 32
# Name of the compiled function that computes so many of so many groups, with that many times their multiply-adds.
BUNDLE = "bundle_{}_of_{}"

Padding = str | Sequence[tuple[int, int]]


def conv2d(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: Padding = "SAME",
    groups: int = 1,
) -> jax.Array:
    """Two-dimensional cross-correlation, what the deep-learning literature calls convolution.

        y[n, h, w, f] = sum_{i, j, c} xpad[n, s h + i, s w + j, c] kernel[i, j, c, f]

    With groups, channels and features are cut into that many equal parts, and each part of the features reads its part
    of the channels alone (Krizhevsky et al. 2012; the 'cardinality' of Xie et al. 2017).

    Reverse, forward and higher-order differentiation, `vmap`, `scan` and `checkpoint` all work. The derivative with
    respect to the kernel is the shift form on the CPU (`_kernel_jvp_by_shifts`) and XLA's elsewhere.

    Args:
      x: images `[batch, height, width, channels]`.
      kernel: filters `[kernel_height, kernel_width, channels / groups, features]`.
      strides: steps `(vertical, horizontal)` in pixels.
      padding: `"SAME"`, `"VALID"`, or `((top, bottom), (left, right))` in pixels. `"SAME"` pads as XLA does (the odd
        pixel at the end); the papers' stride-2 networks pad `((1, 1), (1, 1))`, which reads other pixels.
      groups: how many.

    Returns:
      Feature maps `[batch, out_height, out_width, features]`.

    Raises:
      AssertionError: the ranks are not 4, or the channel counts differ, or groups do not divide the features.
    """
    chex.assert_rank([x, kernel], 4)
    chex.assert_equal(x.shape[-1], groups * kernel.shape[2])
    chex.assert_is_divisible(kernel.shape[3], groups)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    padding = tuple((int(low), int(high)) for low, high in padding)
    strides = tuple(strides)
    if groups == 1:
        return _conv2d(x, kernel, strides, padding)
    if jax.default_backend() == "cpu":
        return _bundled(x, kernel, strides, padding, groups)
    return _xla_conv2d(x, kernel, strides, padding, groups)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _conv2d(x, kernel, strides, padding):
    return _xla_conv2d(x, kernel, strides, padding)


def _xla_conv2d(x, kernel, strides, padding, groups=1):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=_DIMENSIONS, feature_group_count=groups
    )


@functools.partial(_conv2d.defjvp, symbolic_zeros=True)
def _conv2d_jvp(strides, padding, primals, tangents):
    """dy = conv(dx, kernel) + conv(x, dkernel); the second term is written so that its transpose is fast."""
    x, kernel = primals
    dx, dkernel = tangents
    y = _xla_conv2d(x, kernel, strides, padding)
    on_cpu = jax.default_backend() == "cpu"
    terms = []
    if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
        linear = _input_jvp_transposing_to_canonical if on_cpu else _xla_conv2d
        terms.append(linear(dx, kernel, strides, padding))
    if not isinstance(dkernel, jax.custom_derivatives.SymbolicZero):
        linear = _kernel_jvp_by_shifts if on_cpu else _xla_conv2d
        terms.append(linear(x, dkernel, strides, padding))
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


def _bundled(x, kernel, strides, padding, groups):
    """A convolution in groups as a few without: neighbouring groups share a kernel that is zero between them.

    Multiplying by the zeros costs less than XLA:CPU's loop over groups (`SPEED.md`); bundles are just wide enough for a
    fast product. What is not finite in one group makes its whole bundle NaN.
    """
    channels, features = kernel.shape[2], kernel.shape[3] // groups
    size = next(b for b in range(1, groups + 1) if groups % b == 0 and (b * channels >= _BUNDLE or b == groups))
    bundles = groups // size
    split = kernel.reshape(*kernel.shape[:3], bundles, size, features)
    dense = split[:, :, None] * np.eye(size, dtype=kernel.dtype)[:, None, None, :, None]
    dense = dense.reshape(*kernel.shape[:2], size * channels, bundles, size * features)

    def bundle(x, kernel):
        return _conv2d(x, kernel, strides, padding)

    bundle.__name__ = BUNDLE.format(size, groups)  # says in a jaxpr which part of the products is the convolution's
    bundle = jax.jit(bundle)
    inputs = jnp.split(x, bundles, axis=-1)
    return jnp.concatenate([bundle(x, dense[..., k, :]) for k, x in enumerate(inputs)], axis=-1)


def _input_jvp_transposing_to_canonical(dx, kernel, strides, padding):
    """conv(dx, kernel) with the kernel stored [h, w, features, channels], so that its transpose reads [h, w, in, out].

    Inside a loop XLA:CPU takes its fast path only for kernels stored [h, w, in, out]. The transpose of a plain
    convolution comes out the other way round, and is then 5 to 25 times slower; the transpose of this one is canonical.
    """
    return lax.conv_general_dilated(
        dx, jnp.swapaxes(kernel, 2, 3), strides, padding, dimension_numbers=("NHWC", "HWOI", "NHWC")
    )


def _kernel_jvp_by_shifts(x, dkernel, strides, padding):
    """conv(x, dkernel) as one product of column-shifted images, so that its transpose is one product as well.

    With kernel row i = s a + p (p the phase in 0..s-1) and Q_p[n, q, w, (j, c)] = xpad[n, s q + p, s w + j, c]:

        y[n, h, w, f] = sum_p sum_a (Q_p dkernel[p::s])[n, h + a, w, (a, f)]

    The transpose, which is what training runs, lays the k column shifts of x beside each other (k C channels) and the
    row shifts of the output gradient beside each other (k F channels): one product [rows, k C]^T [rows, k F] holds all
    k k taps, with 2 k copies of the data instead of k k. The batch is walked in blocks that fit the cache; a small
    product is cut in two, since one of 48 x 48 is too small for cores to share.
    """
    batch = x.shape[0]
    kernel_height, kernel_width, channels, features = dkernel.shape
    (top, bottom), (left, right) = padding
    out_height = (x.shape[1] + top + bottom - kernel_height) // strides[0] + 1
    out_width = (x.shape[2] + left + right - kernel_width) // strides[1] + 1

    def product(x_block, dkernels):
        """Of `[parts, examples, height, width, channels]` and a copy of the kernel for every part."""
        parts = len(x_block)
        padded = jnp.pad(x_block, ((0, 0), (0, 0), padding[0], padding[1], (0, 0)))
        columns = [
            lax.slice_in_dim(padded, j, j + (out_width - 1) * strides[1] + 1, strides[1], axis=3)
            for j in range(kernel_width)
        ]
        columns = jnp.concatenate(columns, axis=-1)  # [parts, examples, padded height, out_width, k channels]
        y = None
        for phase in range(min(strides[0], kernel_height)):
            taps = dkernels[:, phase :: strides[0]]  # [parts, a, kernel_width, channels, features]
            more = taps.shape[1] - 1
            last = phase + (out_height + more - 1) * strides[0]
            q = lax.slice_in_dim(columns, phase, last + 1, strides[0], axis=2)
            taps = jnp.transpose(taps, (0, 2, 3, 1, 4)).reshape(parts, kernel_width * channels, -1)
            shifted = (q.reshape(parts, -1, kernel_width * channels) @ taps).reshape(*q.shape[:4], -1)
            # Padded to equal height, added, cut: so the transpose pads the gradient once and lays slices of it
            # beside each other, where slices alone would be padded and added one by one.
            terms = [
                jnp.pad(term, ((0, 0), (0, 0), (more - a, a), (0, 0), (0, 0)))
                for a, term in enumerate(lax.split(shifted, [features] * (more + 1), axis=4))
            ]
            term = lax.slice_in_dim(sum(terms[1:], terms[0]), more, more + out_height, axis=2)
            y = term if y is None else y + term
        return y

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def product_of_block(x, k, dkernels):
        # Only x itself is kept for the backward pass; the blocks and their shifted copies are made again there.
        return product(lax.dynamic_index_in_dim(x, k, keepdims=False), dkernels)

    wide = kernel_height * features * kernel_width * channels >= _WIDE
    parts = 1 if wide else _largest_divisor(batch, _PARTS)
    row_bytes = x.dtype.itemsize * (kernel_width * channels + kernel_height * features)
    rows = parts * out_width * (x.shape[1] + top + bottom)
    block = _largest_divisor(batch // parts, _BLOCK_BYTES // (rows * row_bytes))
    blocks = batch // (parts * block)
    # Examples of a block are neighbours, so that nothing is copied for it. Where the compiler splits the batch over
    # devices (`parallel=jit`), a block then lies on one of them; in `pmap` and `shard_map` the batch is a device's own.
    x = x.reshape(blocks, parts, block, *x.shape[1:])
    dkernels = jnp.broadcast_to(dkernel, (parts, *dkernel.shape))
    if blocks == 1:
        y = jax.checkpoint(product, prevent_cse=False)(x[0], dkernels)
    else:
        y = lax.map(lambda k: product_of_block(x, k, dkernels), jnp.arange(blocks))
    return y.reshape(batch, out_height, out_width, features)


def _largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most limit, and at least 1."""
    return next(d for d in range(max(1, min(n, limit)), 0, -1) if n % d == 0)
