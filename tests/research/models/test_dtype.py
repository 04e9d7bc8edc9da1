"""Networks in bfloat16: what is short and what stays float32, and that they compute about the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models import cifar_resnet, imagenet_resnet
from research.models.forecaster import EncoderForecaster
from research.models.language import FeedForwardLanguageModel, RecurrentLanguageModel
from research.models.recurrent import CELLS, Recurrent, gru, lstm
from research.models.sequence import SequenceToOne, SequenceToSequence, Stack

SHORT = jnp.bfloat16
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.standard_normal((4, 8, 8, 3)).astype(np.float32)
SEQUENCES = RANDOM.standard_normal((3, 9, 6)).astype(np.float32)
FRAMES = RANDOM.random((2, 4, 8, 8, 1)).astype(np.float32)
TEXT = (RANDOM.integers(0, 11, (3, 7)), np.array([True, True, False]))

# constructors `dtype= -> network`, and what they read
IMAGE_NETWORKS = {
    "original": functools.partial(cifar_resnet, 14, width=4),
    "rematerialised": functools.partial(cifar_resnet, 20, width=4, remat=True),
    "pre-activation": functools.partial(cifar_resnet, 11, width=2, unit="bottleneck", placement="full_preactivation"),
    "gate": functools.partial(cifar_resnet, 8, width=4, join="exclusive_gate", option="B"),
    "scale": functools.partial(cifar_resnet, 14, width=4, join="scale"),
    "dropout": functools.partial(cifar_resnet, 14, width=4, join="dropout"),
    "plain": functools.partial(cifar_resnet, 14, "plain", width=4),
}


def _stack(cell, **options):
    return lambda dtype=None: Stack(cell, (5, 4), dtype=dtype, **options)


def _over(head, make):
    return lambda dtype=None: head(make(dtype), 3)


NETWORKS = {
    "one": (_over(SequenceToOne, _stack(lstm())), (SEQUENCES,)),
    "each": (_over(SequenceToSequence, _stack(gru("before"), depth="transition")), (SEQUENCES,)),
    "both ways": (_over(SequenceToSequence, _stack(gru(), bidirectional=True, depth="skip", segment=3)), (SEQUENCES,)),
    "words": (functools.partial(RecurrentLanguageModel, 11, 6, lstm(), (5, 4), streams=3), TEXT),
    "n-grams": (functools.partial(FeedForwardLanguageModel, 11, 6, 5, streams=3), TEXT),
    "maps": (functools.partial(EncoderForecaster, lstm(peepholes=True), (3, 2), 2, kernels=(3, 3), patch=2), (FRAMES,)),
    "frames": (functools.partial(EncoderForecaster, gru(), (5, 4), 2), (FRAMES,)),
} | {name: (make, (IMAGES,)) for name, make in IMAGE_NETWORKS.items()}
each = pytest.mark.parametrize("name", NETWORKS)


def applied(model, variables, inputs, key=None):
    """Outputs and updated collections of a training pass."""
    mutable = [name for name in variables if name != "params"]
    return model.apply(variables, *inputs, train=True, mutable=mutable, rngs={"dropout": key or jax.random.key(1)})


@functools.cache
def started(name):
    make, inputs = NETWORKS[name]
    return jax.jit(lambda: make().init(jax.random.key(0), *inputs, train=True))()


def types(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


@each
def test_products_are_short_and_what_is_kept_is_not(name, operands):
    make, inputs = NETWORKS[name]
    variables, model = started(name), make(dtype=SHORT)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, train=True))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), variables
    )
    rest = {kind: tree for kind, tree in variables.items() if kind != "params"}

    def loss(params, model=model):
        outputs, updated = applied(model, {"params": params, **rest}, inputs)
        return jnp.square(outputs).sum(), (outputs, updated)

    gradients, (outputs, updated) = jax.eval_shape(jax.grad(loss, has_aux=True), variables["params"])
    assert outputs.dtype == np.float32 and types(gradients) == {"float32"}
    assert types(updated) <= {"float32", "int32"} and updated.keys() == rest.keys()
    short = operands(jax.grad(loss, has_aux=True), variables["params"])
    assert short and set(short) == {("bfloat16", "bfloat16")}
    unasked = operands(jax.grad(functools.partial(loss, model=make()), has_aux=True), variables["params"])
    assert set(unasked) == {("float32", "float32")}


@each
def test_it_computes_about_the_same(name):
    make, inputs = NETWORKS[name]
    variables = started(name)
    run = jax.jit(lambda dtype: applied(make(dtype=dtype), variables, inputs), static_argnums=0)
    (exact, kept), (short, short_kept) = run(None), run(SHORT)
    scale = np.abs(exact).max()
    difference = np.abs(short - exact).max()
    assert 1e-5 * scale < difference < 0.1 * scale
    for ours, theirs in zip(*map(jax.tree.leaves, (short_kept, kept)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=0.05 * np.abs(theirs).max())


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_activations_are_short(name):
    make, inputs = NETWORKS[name]
    if name == "rematerialised":
        make = functools.partial(make, remat=False)  # its probes are off
    variables = started(name)
    options = {"train": True, "mutable": ["intermediates", "batch_stats"], "rngs": {"dropout": jax.random.key(0)}}
    _, updated = jax.eval_shape(lambda: make(dtype=SHORT).apply(variables, *inputs, **options))
    assert types(updated["intermediates"]) == {"bfloat16"} and len(jax.tree.leaves(updated["intermediates"])) > 10


def test_networks_of_imagenet_are_short_too(operands):
    model = imagenet_resnet(50, num_classes=7, squeeze_ratio=16, dtype=SHORT)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    assert types(variables) == {"float32"}
    assert set(operands(lambda v, x: model.apply(v, x, train=False), variables, x)) == {("bfloat16", "bfloat16")}
    assert jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, x).dtype == np.float32


def test_running_averages_are_not_rounded():
    """Steps of a tenth of what is missing: a bfloat16 average would stand still at 1/51 from its goal, or jump."""
    model = cifar_resnet(8, width=4, dtype=SHORT)
    variables = model.init(jax.random.key(0), IMAGES, train=True)
    _, updated = applied(model, variables, (IMAGES,))
    averages = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(updated["batch_stats"])])
    assert (averages != np.asarray(averages.astype(SHORT), np.float32)).mean() > 0.9


# Recurrent layers

LAYERS = {name: make() for name, make in CELLS.items()}
LAYERS |= {"peepholes": lstm(peepholes=True), "gru, before": gru("before")}
KERNELS = {"vectors": None, "few inputs": None, "maps": (3, 3)}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "vectors") for name in LAYERS)]
    + [(name, kind) for name in ("peepholes", "gru", "gru, before") for kind in ("few inputs", "maps")],
)
def test_a_layer_carries_float32_and_puts_out_short_numbers(name, kind, operands):
    x = {"vectors": SEQUENCES, "few inputs": SEQUENCES[..., :2], "maps": FRAMES[..., :6, :6, :]}[kind]
    exact, short = (Recurrent(LAYERS[name], 4, kernels=KERNELS[kind], dtype=dtype) for dtype in (None, SHORT))
    variables = exact.init(jax.random.key(0), x)
    (carry, y), (short_carry, short_y) = (jax.jit(layer.apply)(variables, x) for layer in (exact, short))
    assert types(short_carry) == {"float32"} and short_y.dtype == SHORT
    for ours, theirs in zip(*map(jax.tree.leaves, ((short_carry, short_y), (carry, y))), strict=True):
        np.testing.assert_allclose(
            ours.astype(np.float32), theirs, rtol=0, atol=0.04 * max(1, float(np.abs(theirs).max()))
        )

    def loss(layer):
        return lambda variables: jnp.square(layer.apply(variables, x)[1].astype(jnp.float32)).mean()

    assert set(operands(jax.grad(loss(short)), variables)) == {("bfloat16", "bfloat16")}
    found, expected = (jax.jit(jax.grad(loss(layer)))(variables) for layer in (short, exact))
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert ours.dtype == np.float32
        assert np.linalg.norm(ours - theirs) < 0.1 * np.linalg.norm(theirs) + 1e-4


def test_the_carousel_adds_up_what_bfloat16_would_lose():
    layer = Recurrent(lstm(forget_bias=0.0), 1, dtype=SHORT)
    x = np.zeros((1, 1_000, 5), np.float32)
    variables = layer.init(jax.random.key(0), x)
    # i = 1/2, f = 1, g = 1/256: a thousand times 1/512.
    bias = jnp.array([0.0, 50.0, 1 / 256, 0.0])
    params = {**jax.tree.map(jnp.zeros_like, variables["params"]), "bias": bias}
    carry, _ = jax.jit(layer.apply)({"params": params}, x)
    np.testing.assert_allclose(carry.c, 1_000 / 512, rtol=1e-3)
    lost = jax.lax.fori_loop(0, 1_000, lambda _, c: c + SHORT(1 / 512), SHORT(0))
    assert lost < 1.1


@pytest.mark.parametrize("name", ["gru, before", "few inputs"])
def test_gradients_summed_in_the_loop_are_summed_in_float32(name):
    """Of units that hardly see each other every step adds about the same; a bfloat16 sum of them stands still."""
    x = 1 + 0.01 * RANDOM.standard_normal((1, 600, 6 if name == "gru, before" else 1)).astype(np.float32)
    exact, short = (Recurrent(gru("before"), 3, dtype=dtype) for dtype in (None, SHORT))
    variables = jax.tree.map(lambda leaf: 0.1 * leaf, exact.init(jax.random.key(0), x))

    def gradient(layer):
        return jax.jit(jax.grad(lambda v: layer.apply(v, x)[1].astype(jnp.float32).sum()))(variables)["params"]

    for kind in ("recurrent_kernel", "input_kernel"):
        ours, theirs = gradient(short)[kind], gradient(exact)[kind]
        assert np.linalg.norm(ours - theirs) < 0.03 * np.linalg.norm(theirs)
