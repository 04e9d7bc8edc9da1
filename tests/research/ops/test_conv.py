"""Convolution: values against SciPy, derivatives of every kind against XLA's own, and that the fast path is on."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from jax import lax
from jax.test_util import check_grads

from research.ops import conv

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the shift form is for the CPU")

# height, width, kernel height, kernel width, strides, padding
CASES = [
    (8, 8, 3, 3, (1, 1), "SAME"),
    (8, 8, 3, 3, (2, 2), ((1, 1), (1, 1))),  # the stride-2 convolution of the papers' networks
    (8, 8, 3, 3, (2, 2), "SAME"),
    (7, 9, 3, 3, (2, 2), "SAME"),
    (7, 9, 5, 5, (2, 2), "VALID"),
    (9, 7, 7, 7, (1, 1), "SAME"),
    (9, 9, 7, 7, (2, 2), ((3, 3), (3, 3))),
    (6, 5, 1, 1, (1, 1), "SAME"),
    (7, 8, 1, 1, (2, 2), "VALID"),
    (7, 6, 1, 3, (1, 1), "SAME"),
    (6, 7, 5, 2, (2, 1), ((2, 0), (1, 3))),
    (8, 6, 2, 5, (1, 2), ((0, 3), (4, 1))),
    (5, 5, 5, 5, (1, 1), "VALID"),  # one output pixel
    (9, 9, 3, 3, (4, 3), "VALID"),  # strides longer than the kernel
]
CHANNELS, FEATURES = 3, 4

pytestmark = pytest.mark.usefixtures("quick_compilation")


def arrays(batch, height, width, kernel_height, kernel_width, dtype=np.float64, seed=0):
    random = np.random.default_rng(seed)
    x = random.standard_normal((batch, height, width, CHANNELS)).astype(dtype)
    kernel = random.standard_normal((kernel_height, kernel_width, CHANNELS, FEATURES)).astype(dtype)
    return x, kernel


def explicit(padding, size, kernel_size, strides):
    """The padding in pixels, by the definition of SAME: ceil(n / s) outputs, the odd pixel at the end."""
    if padding == "VALID":
        return ((0, 0), (0, 0))
    if padding != "SAME":
        return padding
    whole = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(size, kernel_size, strides, strict=True)]
    return tuple((total // 2, total - total // 2) for total in whole)


def by_scipy(x, kernel, strides, padding):
    pads = explicit(padding, x.shape[1:3], kernel.shape[:2], strides)
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    features = [
        [scipy.signal.correlate(image, kernel[..., f], mode="valid", method="direct")[:, :, 0] for image in padded]
        for f in range(kernel.shape[-1])
    ]
    return np.moveaxis(np.asarray(features), 0, -1)[:, :: strides[0], :: strides[1]]


def by_xla(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def relative_error(got, expected):
    assert got.shape == expected.shape
    return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


def block_of(monkeypatch, examples, case):
    """Makes the weight gradient walk the batch in blocks of at most that many examples."""
    height, width, kernel_height, kernel_width, strides, padding = case
    (top, bottom), (left, right) = explicit(padding, (height, width), (kernel_height, kernel_width), strides)
    out_width = (width + left + right - kernel_width) // strides[1] + 1
    numbers = out_width * (height + top + bottom) * (kernel_width * CHANNELS + kernel_height * FEATURES)
    itemsize = 8 if jax.config.jax_enable_x64 else 4
    monkeypatch.setattr(conv, "_BLOCK_BYTES", numbers * itemsize * examples)


def count(jaxpr, primitive):
    """How often a primitive stands in a jaxpr and in those inside it."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == primitive
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += count(inner, primitive)
    return found


IN_BOTH_PRECISIONS = [(case, np.float64) for case in CASES] + [(case, np.float32) for case in CASES[1:4]]


@pytest.mark.parametrize(
    ("case", "dtype"), IN_BOTH_PRECISIONS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_forward_equals_scipy(case, dtype):
    *sizes, strides, padding = case
    with jax.enable_x64(dtype == np.float64):
        x, kernel = arrays(2, *sizes, dtype=dtype)
        y = conv.conv2d(x, kernel, strides=strides, padding=padding)
    assert y.dtype == dtype
    expected = by_scipy(x.astype(np.float64), kernel, strides, padding)
    assert relative_error(y, expected) < (1e-6 if dtype == np.float32 else 1e-14)


@pytest.mark.parametrize(
    ("case", "dtype"), IN_BOTH_PRECISIONS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_gradients_equal_xlas(case, dtype, monkeypatch):
    *sizes, strides, padding = case
    with jax.enable_x64(dtype == np.float64):
        x, kernel = arrays(6, *sizes, dtype=dtype)
        block_of(monkeypatch, 2, case)

        def gradients(function, x, kernel):
            y, transpose = jax.vjp(lambda x, kernel: function(x, kernel, strides=strides, padding=padding), x, kernel)
            return transpose(jnp.sin(jnp.arange(y.size, dtype=dtype)).reshape(y.shape))

        got, expected = jax.jit(lambda *xs: [gradients(function, *xs) for function in (conv.conv2d, by_xla)])(x, kernel)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, np.asarray(theirs)) < (1e-5 if dtype == np.float32 else 1e-12)


# Groups: each part of the features reads its part of the channels

# size, channels, features, kernel size, groups, strides, padding
GROUPED = [
    (6, 6, 4, 3, 2, (1, 1), "SAME"),
    (8, 4, 8, 3, 4, (2, 2), ((1, 1), (1, 1))),  # a widening unit of ResNeXt
    (7, 6, 3, 3, 3, (2, 1), "VALID"),
    (6, 5, 10, 3, 5, (1, 1), "SAME"),  # one channel a group: depthwise
    (5, 4, 4, 1, 4, (1, 1), "SAME"),
]
grouped = pytest.mark.parametrize("case", GROUPED, ids=str)


def grouped_arrays(case):
    size, channels, features, kernel_size, groups, *_ = case
    random = np.random.default_rng(3)
    x = random.standard_normal((2, size, size, channels))
    return x, random.standard_normal((kernel_size, kernel_size, channels // groups, features))


def by_group(function, x, kernel, groups):
    """A function of images and a kernel applied to each group alone."""
    xs, kernels = (np.split(array, groups, axis=-1) for array in (x, kernel))
    return [function(*pair) for pair in zip(xs, kernels, strict=True)]


@grouped
def test_groups_are_convolutions_beside_each_other(case):
    *_, groups, strides, padding = case
    with jax.enable_x64(True):
        x, kernel = grouped_arrays(case)
        y = conv.conv2d(x, kernel, strides=strides, padding=padding, groups=groups)
    expected = by_group(lambda x, kernel: by_scipy(x, kernel, strides, padding), x, kernel, groups)
    assert relative_error(y, np.concatenate(expected, axis=-1)) < 1e-14


@grouped
def test_gradients_of_groups_are_those_of_convolutions_beside_each_other(case):
    *_, groups, strides, padding = case
    with jax.enable_x64(True):
        x, kernel = grouped_arrays(case)

        def gradients(function):
            return jax.jit(jax.grad(lambda x, kernel: jnp.sin(function(x, kernel)).sum(), (0, 1)))

        got = gradients(partial(conv.conv2d, strides=strides, padding=padding, groups=groups))(x, kernel)
        alone = gradients(lambda x, kernel: by_xla(x, kernel, strides, padding))
        for ours, parts in zip(got, zip(*by_group(alone, x, kernel, groups), strict=True), strict=True):
            assert relative_error(ours, np.concatenate(parts, axis=-1)) < 1e-12


@on_cpu
def test_groups_are_one_operation_of_xla_elsewhere_and_none_with_groups_on_the_cpu(monkeypatch):
    x, kernel = grouped_arrays(GROUPED[0])
    loss = square_of(conv.conv2d, groups=2)

    def groups():
        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(np.float32(x), np.float32(kernel)).jaxpr
        return [e.params["feature_group_count"] for e in equations(jaxpr) if e.primitive.name == "conv_general_dilated"]

    assert set(groups()) == {1}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.clear_caches()
    assert len(groups()) == 3 and 2 in groups()


@on_cpu
@pytest.mark.parametrize(
    ("groups", "channels", "convolutions"),
    [(32, 4, 4), (32, 1, 1), (2, 64, 2), (8, 10, 2), (3, 40, 3), (5, 3, 1)],  # bundles of 8, 32, 1, 4, 1, 5
)
def test_groups_come_in_bundles_no_wider_than_needed(groups, channels, convolutions):
    x, kernel = jnp.ones((1, 4, 4, groups * channels)), jnp.ones((3, 3, channels, groups * channels))
    jaxpr = jax.make_jaxpr(partial(conv.conv2d, groups=groups))(x, kernel).jaxpr
    assert count(jaxpr, "conv_general_dilated") == convolutions


@pytest.mark.parametrize(
    ("channels", "kernel_channels", "features", "groups"),
    [(6, 6, 4, 2), (6, 3, 4, 3), (6, 3, 5, 2), (6, 3, 4, 1)],  # kernel too deep, too shallow, features, no groups
)
def test_groups_must_divide_channels_and_features(channels, kernel_channels, features, groups):
    x, kernel = jnp.ones((1, 4, 4, channels)), jnp.ones((3, 3, kernel_channels, features))
    with pytest.raises(AssertionError):
        conv.conv2d(x, kernel, groups=groups)


# The batch in blocks


@pytest.mark.parametrize(
    ("batch", "limit", "blocks"), [(12, 100, 1), (12, 5, 3), (12, 0, 6), (7, 7, 1), (7, 6, 7), (1, 1, 1)]
)
def test_blocks_of_the_batch_change_nothing(batch, limit, blocks, monkeypatch):
    case = *sizes, strides, padding = CASES[1]
    block_of(monkeypatch, limit, case)
    x, kernel = arrays(batch, *sizes, dtype=np.float32)

    def gradient(function):
        return jax.grad(lambda kernel: (function(x, kernel, strides=strides, padding=padding) ** 2).sum())

    compiled = jax.jit(gradient(conv.conv2d)).trace(kernel)
    walks = [e.params["length"] for e in equations(compiled.jaxpr.jaxpr) if e.primitive.name == "scan"]
    assert walks == ([blocks] if blocks > 1 else [])
    got = compiled.lower().compile()(kernel)
    assert relative_error(got, np.asarray(jax.jit(gradient(by_xla))(kernel))) < 1e-5


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("n", [1, 2, 7, 12, 97, 128])
def test_blocks_are_the_largest_that_divide_the_batch(n):
    for limit in range(-1, n + 3):
        allowed = [d for d in range(1, n + 1) if n % d == 0 and (d <= limit or d == 1)]
        assert conv._largest_divisor(n, limit) == max(allowed)


# Which operations run


def square_of(function, **options):
    return lambda x, kernel: (function(x, kernel, **options) ** 2).sum()


def convolutions_and_products(argnums, strides, case=CASES[0]):
    *sizes, _, padding = case
    x, kernel = arrays(2, *sizes, dtype=np.float32)
    loss = square_of(conv.conv2d, strides=strides, padding=padding)
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums))(x, kernel).jaxpr
    return count(jaxpr, "conv_general_dilated"), count(jaxpr, "dot_general")


@on_cpu
@pytest.mark.parametrize("stride", [1, 2])
def test_the_weight_gradient_is_a_product_and_the_first_layer_has_no_input_gradient(stride):
    strides = (stride, stride)  # one product for each phase of the stride
    assert convolutions_and_products((0, 1), strides) == (2, stride)  # forward and input gradient
    assert convolutions_and_products(1, strides) == (1, stride)  # forward alone: nothing is asked about the images
    assert convolutions_and_products(0, strides) == (2, 0)


def test_elsewhere_everything_is_xlas(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert convolutions_and_products((0, 1), (2, 2)) == (3, 0)
    assert convolutions_and_products(1, (2, 2)) == (2, 0)
    x, kernel = arrays(2, 8, 8, 3, 3, dtype=np.float32)
    got, expected = (
        jax.grad(square_of(function, strides=(2, 2), padding="SAME"), (0, 1))(x, kernel)
        for function in (conv.conv2d, by_xla)
    )
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@on_cpu
@pytest.mark.parametrize("limit", [1, 4])
def test_the_weight_gradient_keeps_the_images_and_not_their_shifts(limit, monkeypatch):
    block_of(monkeypatch, limit, CASES[0])
    x, kernel = arrays(4, 8, 8, 3, 3, dtype=np.float32)
    transpose = jax.eval_shape(lambda x, kernel: jax.vjp(partial(conv.conv2d, x), kernel)[1], x, kernel)
    kept = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(transpose))
    assert x.size <= kept < 2 * x.size


# Transformations: each against the same transformation of XLA's convolution, in float64


def plain(x, kernel, *, strides=(1, 1), padding="SAME"):
    return by_xla(x, kernel, strides, padding)


def assert_same(transformed, *arguments, tolerance=1e-12):
    """`transformed(convolution)` is a function of the arguments; so compared for ours and XLA's."""
    got, expected = jax.jit(lambda *xs: [transformed(f)(*xs) for f in (conv.conv2d, plain)])(*arguments)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.abs(np.asarray(theirs)).max() > 0
        assert relative_error(ours, np.asarray(theirs)) < tolerance


@pytest.fixture
def double(monkeypatch):
    block_of(monkeypatch, 2, CASES[0])
    with jax.enable_x64(True):
        yield arrays(4, 8, 8, 3, 3)


STRIDED = {"strides": (2, 2), "padding": ((1, 1), (1, 1))}


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (1, 3)])
def test_vmap(double, axes):
    x, kernel = double
    stacked = [
        value if axis is None else np.stack([value, 2 * value, value**2], axis)
        for value, axis in zip(double, axes, strict=True)
    ]

    def transformed(function):
        gradient = jax.grad(lambda x, kernel: jnp.sin(function(x, kernel, **STRIDED)).sum(), (0, 1))
        return jax.vmap(lambda x, kernel: (function(x, kernel, **STRIDED), gradient(x, kernel)), axes)

    assert_same(transformed, *stacked)


def test_scan_and_checkpoint(double):
    x, _ = double
    kernels = np.random.default_rng(1).standard_normal((3, 3, 3, CHANNELS, CHANNELS)) / 5

    def transformed(function):
        def layer(x, kernel):
            return jax.checkpoint(lambda x, kernel: jnp.tanh(function(x, kernel)))(x, kernel), None

        return jax.value_and_grad(lambda x, kernels: lax.scan(layer, x, kernels)[0].sum(), (0, 1))

    assert_same(transformed, x, kernels)


@pytest.mark.parametrize("active", [(True, True), (True, False), (False, True)])
def test_forward_mode(double, active):
    x, kernel = double
    tangents = [np.cos(np.arange(value.size)).reshape(value.shape) for value in double]

    def transformed(function):
        def pushforward(*values):
            chosen = [value for value, on in zip(values, active, strict=True) if on]

            def of_chosen(*chosen):
                chosen = iter(chosen)
                return function(*(next(chosen) if on else v for v, on in zip(values, active, strict=True)), **STRIDED)

            return jax.jvp(of_chosen, chosen, [t for t, on in zip(tangents, active, strict=True) if on])

        return pushforward

    assert_same(transformed, x, kernel)


def test_hessian(double):
    x, _ = double
    kernel = np.random.default_rng(2).standard_normal((2, 2, CHANNELS, 2))

    def transformed(function):
        def loss(x, kernel):
            return jnp.sin(function(x[:2, :3, :3], kernel, strides=(2, 1))).sum()

        return lambda x, kernel: (
            jax.hessian(loss, 1)(x, kernel),
            jax.grad(lambda x: (jax.grad(loss, 1)(x, kernel) ** 2).sum())(x),  # mixed, reverse over reverse
            jax.grad(lambda kernel: (jax.grad(loss, 0)(x, kernel) ** 2).sum())(kernel),
        )

    assert_same(transformed, x, kernel)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_derivatives_equal_finite_differences(double, strides):
    x, kernel = double
    check_grads(
        jax.jit(lambda x, kernel: jnp.sin(conv.conv2d(x, kernel, strides=strides))),
        (x[:2, :5, :4], kernel),
        order=1,
        modes=("fwd", "rev"),
    )


def test_pmap(double):
    x, kernel = double
    got = jax.pmap(jax.grad(square_of(conv.conv2d, **STRIDED), (0, 1)))(x[None], kernel[None])
    expected = jax.jit(jax.grad(square_of(plain, **STRIDED), (0, 1)))(x, kernel)
    for ours, theirs in zip(got, expected, strict=True):
        assert relative_error(ours[0], np.asarray(theirs)) < 1e-12


def test_wrong_shapes_are_refused():
    x, kernel = arrays(2, 8, 8, 3, 3, dtype=np.float32)
    for wrong_x, wrong_kernel in ((x[0], kernel), (x, kernel[0]), (x[..., :2], kernel), (x, kernel[:, :, :2])):
        with pytest.raises(AssertionError):
            conv.conv2d(wrong_x, wrong_kernel)
