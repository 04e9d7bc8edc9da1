"""Signal propagation: each number against a network written out block by block, and the claim of the figures."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from research.analysis.signal import propagation
from research.models import cifar_resnet
from research.models.convolution import Convolution
from research.models.resnet import ResNet, Stage, unstack_blocks

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.standard_normal((6, 8, 8, 3))
LABELS = RANDOM.integers(0, 10, 6).astype(np.int32)
STAGES = (3, 1)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def network(units, residual=True):
    """Stages of basic units, 4 channels wide in the first."""
    stages = [
        Stage(n, (Convolution(4 * 2**k, stride=2 if k else 1), Convolution(4 * 2**k))) for k, n in enumerate(units)
    ]
    return ResNet((Convolution(4),), False, tuple(stages), num_classes=10, residual=residual)


def variables_of(model, *, initial=False, seed=0):
    """Kernels of He et al.'s law; scales and shifts at random, or one and zero as before training."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False))

    def value(path, leaf):
        if path[-1].key == "kernel":
            return random.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[-4:-1]))
        return (np.ones(leaf.shape) if initial else random.uniform(0.5, 1.5, leaf.shape)) - (path[-1].key == "bias")

    return jax.tree_util.tree_map_with_path(value, shapes)


# The network in plain functions: nothing of Flax, no scan, no probes.


def convolve(x, kernel, stride=1):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def normalise(x, norm):
    mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    return (x - mean) / jnp.sqrt(variance + 1e-5) * norm["scale"] + norm["bias"]


def block(params, x, number, residual):
    """The block's output and its two responses."""
    narrows = number == STAGES[0]  # the first block of the second stage halves the map and doubles the width
    response1 = normalise(convolve(x, params["conv1"]["kernel"], 2 if narrows else 1), params["norm1"])
    response2 = normalise(convolve(jnp.maximum(response1, 0), params["conv2"]["kernel"]), params["norm2"])
    shortcut = 0
    if residual:
        shortcut = x
        if narrows:
            zeros = jnp.zeros((len(x), x.shape[1] // 2, x.shape[2] // 2, x.shape[3] // 2))
            shortcut = jnp.concatenate([zeros, x[:, ::2, ::2], zeros], axis=-1)
    return jnp.maximum(response2 + shortcut, 0), (response1, response2)


def stem(params, images):
    return jnp.maximum(normalise(convolve(images, params["stem_conv"]["kernel"]), params["stem_norm"]), 0)


def loss_from(params, blocks, x, first, residual):
    """The loss as a function of what enters block `first`."""
    for number in range(first, len(blocks)):
        x, _ = block(blocks[number], x, number, residual)
    logits = x.mean(axis=(1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
    log_softmax = logits - jax.scipy.special.logsumexp(logits, axis=1, keepdims=True)
    return -log_softmax[jnp.arange(len(LABELS)), LABELS].mean()


@partial(jax.jit, static_argnums=1)
def by_hand(params, residual):
    """The statistics, by the chain rule from block to block: dL/dx_l = dL/dx_{l+1} dx_{l+1}/dx_l."""
    blocks = unstack_blocks(params)
    inputs, pullbacks, found = [stem(params, IMAGES)], [], {"output_variance": [], "response_std": []}
    for number, own in enumerate(blocks):
        output, pullback, responses = jax.vjp(
            lambda p, x, n=number: block(p, x, n, residual), own, inputs[-1], has_aux=True
        )
        found["output_variance"].append(output.var())
        found["response_std"] += [response.std() for response in responses]
        inputs.append(output)
        pullbacks.append(pullback)
    gradient = jax.grad(lambda x: loss_from(params, blocks, x, len(blocks), residual))(inputs[-1])
    at_inputs, at_weights = [], []
    for pullback in pullbacks[::-1]:
        own, gradient = pullback(gradient)
        at_inputs.insert(0, gradient)
        at_weights = [own["conv1"]["kernel"], own["conv2"]["kernel"], *at_weights]
    found["block_input_gradient_norm"] = [jnp.sqrt((g**2).sum()) for g in at_inputs]
    found["weight_gradient_norm"] = [jnp.sqrt((g**2).sum()) for g in at_weights]
    # And one of them by a finite difference of the loss, along the gradient's own direction.
    middle, step = 2, 1e-6
    direction = at_inputs[middle] / found["block_input_gradient_norm"][middle]
    ends = [loss_from(params, blocks, inputs[middle] + s * direction, middle, residual) for s in (step, -step)]
    return found, (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_statistics_equal_those_by_hand(kind):
    model = network(STAGES, kind == "residual")
    variables = variables_of(model)
    with jax.enable_x64(True):
        measured = propagation(model)(variables, IMAGES, LABELS)
        expected, finite_difference = jax.device_get(by_hand(variables["params"], kind == "residual"))
    blocks = sum(STAGES)
    assert {name: len(values) for name, values in measured.items()} == {
        "output_variance": blocks,
        "response_std": 2 * blocks,
        "weight_gradient_norm": 2 * blocks,
        "block_input_gradient_norm": blocks,
    }
    for name, values in expected.items():
        assert all(type(value) is float for value in measured[name])
        np.testing.assert_allclose(measured[name], values, rtol=1e-10, err_msg=name)
    assert measured["block_input_gradient_norm"][2] == pytest.approx(finite_difference, rel=1e-5)


def test_at_initialisation_plain_gradients_explode_and_residual_ones_do_not():
    """56 layers: towards the first one the gradient of a plain network with BatchNorm grows by orders of magnitude."""
    gradients, weights = {}, {}
    for kind in ("plain", "residual"):
        model = cifar_resnet(56, kind, 4)
        variables = jax.tree.map(np.float32, variables_of(model, initial=True))
        measured = propagation(model)(variables, np.float32(IMAGES), LABELS)
        gradients[kind], weights[kind] = measured["block_input_gradient_norm"], measured["weight_gradient_norm"]
    for norms in (gradients, weights):
        assert norms["plain"][0] > 30 * norms["residual"][0]
        assert norms["plain"][0] / norms["plain"][-1] > 300 > 50 > norms["residual"][0] / norms["residual"][-1]


def test_measuring_changes_nothing():
    model = network((1,))
    variables = jax.tree.map(np.float32, variables_of(model))
    before = jax.tree.map(np.copy, variables)
    measure = propagation(model)
    first = measure(variables, np.float32(IMAGES), LABELS)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert measure(variables, np.float32(IMAGES), LABELS) == first
    # Batch statistics and not the running ones: those do not matter.
    other = {**variables, "batch_stats": jax.tree.map(lambda leaf: leaf + 1, variables["batch_stats"])}
    assert measure(other, np.float32(IMAGES), LABELS) == first
