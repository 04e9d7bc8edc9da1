"""The propagation identities: each number against an independent computation, on small networks in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from research.analysis.identities import identities
from research.models import cifar_resnet, probe
from research.models.convolution import Convolution
from research.models.joins import DropoutShortcut, Gate, Scale
from research.models.residual_unit import ResidualUnit
from research.models.resnet import ResNet, Stage

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.standard_normal((4, 8, 8, 3))
LABELS = RANDOM.integers(0, 10, 4).astype(np.int32)
KEY = jax.random.key(0)
UNITS = 3  # of each stage at 20 layers
STATISTICS = {
    *("gradient_norm", "shortcut_gradient_norm", "shortcut_gradient_share"),
    *("jacobian_gain", "shortcut_jacobian_gain", "activation_std", "forward_residue"),
}

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def network(*units, **options):
    """Stages of basic units, 2 channels wide in the first: the fewer, the less to compile."""
    stages = [
        Stage(n, (Convolution(2 * 2**k, stride=2 if k else 1), Convolution(2 * 2**k))) for k, n in enumerate(units)
    ]
    return ResNet((Convolution(2),), False, tuple(stages), num_classes=10, **options)


def variables_of(model, size=8, seed=0):
    """Kernels of He et al.'s law, scales and shifts at random; float64."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False))

    def value(path, leaf):
        if path[-1].key == "kernel":
            return random.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[-4:-1]))
        return random.uniform(0.5, 1.5, leaf.shape) - (path[-1].key == "bias")

    return jax.tree_util.tree_map_with_path(value, shapes)


def cross_entropy(logits, labels):
    log_softmax = logits - jax.scipy.special.logsumexp(logits, axis=1, keepdims=True)
    return -log_softmax[jnp.arange(len(labels)), labels].mean()


def observe(model, variables):
    """What the probes read, and the gradients there: whole, and through shortcuts alone."""

    def whole(variables):
        return probe.observe(model, variables, IMAGES, lambda logits: cross_entropy(logits, LABELS))[:2]

    def direct(variables):
        with probe.shortcuts_alone():
            return whole(variables)[1]

    activations, gradients = jax.jit(whole)(variables)
    return jax.device_get((activations, gradients, jax.jit(direct)(variables)))


def norms(x):
    return np.sqrt(np.square(x).sum(axis=tuple(range(1, x.ndim))))


def stages(values):
    """A list over units as a list over stages."""
    assert len(values) == 3 * UNITS
    return [np.asarray(values[UNITS * k : UNITS * (k + 1)]) for k in range(3)]


@pytest.fixture(scope="module")
def preactivated():
    """A network of full pre-activation, its variables, what is measured in it, and what its probes see."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        model = cifar_resnet(20, width=2, placement="full_preactivation")
        variables = variables_of(model)
        measured = identities(model)(variables, IMAGES, LABELS, KEY)
        return model, variables, measured, observe(model, variables)


# With identities for h and f


def test_every_unit_has_every_number(preactivated):
    _, _, measured, (activations, gradients, direct) = preactivated
    assert measured.keys() == STATISTICS
    assert all(len(values) == 3 * UNITS and set(map(type, values)) == {float} for values in measured.values())
    for statistic, tree, reduce in (
        ("gradient_norm", gradients, norms),
        ("shortcut_gradient_norm", direct, norms),
        ("activation_std", activations, lambda x: x.std(axis=tuple(range(1, x.ndim)))),
    ):
        for number, values in enumerate(stages(measured[statistic]), start=1):
            inputs = [tree[f"stage{number}_first"]["input"][None], tree[f"stage{number}_rest"]["input"]]
            np.testing.assert_allclose(values, np.concatenate([reduce(x) for x in inputs]), rtol=1e-12)
    shares = np.asarray(measured["shortcut_gradient_norm"]) / measured["gradient_norm"]
    np.testing.assert_array_equal(measured["shortcut_gradient_share"], shares)


def test_a_unit_reads_the_earlier_one_and_the_sum_of_the_branches_between(preactivated):
    """Equation 4, to the precision of a float64; with a ReLU after the addition it does not hold."""
    _, _, measured, (activations, _, _) = preactivated
    assert max(measured["forward_residue"]) < 1e-12
    for stage in (1, 2, 3):
        rest = activations[f"stage{stage}_rest"]
        np.testing.assert_allclose(rest["output"][-1], rest["input"][0] + rest["branch"].sum(axis=0), atol=1e-12)
    model = network(4)
    variables = variables_of(model)
    original = identities(model)(variables, IMAGES, LABELS, KEY)["forward_residue"]
    assert min(original) > 1e-2
    rest = observe(model, variables)[0]["stage1_rest"]
    for number in range(3):
        missing = rest["output"][-1] - rest["input"][number] - rest["branch"][number:].sum(axis=0)
        by_hand = np.linalg.norm(missing) / np.linalg.norm(rest["output"][-1])
        assert original[number + 1] == pytest.approx(by_hand, rel=1e-12)


def test_the_gradient_through_shortcuts_is_the_same_at_every_unit_of_a_stage(preactivated):
    """The 1 of equation 5: to the bit, since nothing is computed."""
    _, _, measured, (_, gradients, direct) = preactivated
    for number, values in enumerate(stages(measured["shortcut_gradient_norm"]), start=1):
        keeping = values if number == 1 else values[1:]  # the first unit of stages 2 and 3 changes the shape
        assert len(set(keeping)) == 1 and keeping[0] > 0
        if number > 1:
            assert values[0] != values[1]
        rest = f"stage{number}_rest"
        np.testing.assert_array_equal(direct[rest]["input"][0], direct[rest]["input"][1])
        assert np.abs(gradients[rest]["input"][0] - gradients[rest]["input"][1]).max() > 1e-6


def convolve(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def activate(x, norm):
    mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    return jnp.maximum((x - mean) / jnp.sqrt(variance + 1e-5) * norm["scale"] + norm["bias"], 0)


def test_the_rest_of_the_gradient_came_through_the_branches(preactivated):
    """Equation 5 by hand: dE/dx_l - dE/dx_L = dE/dx_L d/dx_l sum F, in the last stage, with no Flax and no probes."""
    _, variables, measured, (activations, gradients, direct) = preactivated
    params = variables["params"]
    units = [jax.tree.map(lambda leaf, i=i: leaf[i], params["stage3_rest"]) for i in range(UNITS - 1)]

    def branches(x, units):
        """Sum of F over the units, each of which reads what the ones before it left."""
        start = x
        for unit in units:
            inside = convolve(activate(x, unit["norm1"]), unit["conv1"]["kernel"])
            x = x + convolve(activate(inside, unit["norm2"]), unit["conv2"]["kernel"])
        return x - start

    def head(x):
        features = activate(x, params["final_norm"]).mean(axis=(1, 2))
        return cross_entropy(features @ params["head"]["kernel"] + params["head"]["bias"], LABELS)

    at_end = jax.grad(head)(activations["stage3_rest"]["output"][-1])
    for number in range(UNITS - 1):
        x = activations["stage3_rest"]["input"][number]
        _, pull_back = jax.vjp(lambda x, own=units[number:]: branches(x, own), x)
        (through_branches,) = pull_back(at_end)
        assert np.abs(through_branches).max() > 0.05 * np.abs(at_end).max(), "branches too weak to prove anything"
        whole, shortcuts = (tree["stage3_rest"]["input"][number] for tree in (gradients, direct))
        np.testing.assert_allclose(shortcuts, at_end, rtol=1e-10, atol=1e-15)
        np.testing.assert_allclose(whole - shortcuts, through_branches, rtol=1e-8, atol=1e-12)
        norm = np.linalg.norm(at_end + through_branches)
        assert stages(measured["gradient_norm"])[2][number + 1] == pytest.approx(norm, rel=1e-9)


# With other shortcuts


def gradient_at_the_end(variables, x):
    """dE/dx of what the original network's classifier reads: softmax minus one-hot, spread over the pixels."""
    head = variables["params"]["head"]
    logits = x.mean(axis=(1, 2)) @ head["kernel"] + head["bias"]
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    at_features = (softmax - np.eye(10)[LABELS]) / len(LABELS) @ head["kernel"].T
    pixels = x.shape[1] * x.shape[2]
    return np.broadcast_to(at_features[:, None, None] / pixels, x.shape)


def test_a_scaled_shortcut_multiplies_its_scale_and_the_masks_of_the_relu():
    """Equation 8 with f a ReLU: a product of lambda and of masks over the units between, in NumPy."""
    scale = 0.5
    model = network(4, join=partial(Scale, shortcut_scale=scale, branch_scale=0.75))
    variables = variables_of(model)
    measured = identities(model)(variables, IMAGES, LABELS, KEY)
    activations, _, direct = observe(model, variables)
    rest = activations["stage1_rest"]
    gradient = gradient_at_the_end(variables, rest["output"][-1])
    for number in reversed(range(3)):
        mask = rest["output"][number] > 0
        assert 0.1 < mask.mean() < 0.9
        gradient = scale * mask * gradient
        np.testing.assert_allclose(direct["stage1_rest"]["input"][number], gradient, rtol=1e-10)
        assert measured["shortcut_gradient_norm"][number + 1] == pytest.approx(np.linalg.norm(gradient), rel=1e-10)
        # An element is scaled or cut off: the gain of the shortcut lies between 0 and its scale.
        gain = measured["shortcut_jacobian_gain"][number + 1]
        assert 0.1 * scale < gain < scale


# The gain of one unit


def test_the_gain_is_the_frobenius_norm_of_the_units_jacobian():
    """One random vector estimates |J|_F^2 / dim without bias: the mean over 60 keys against the Jacobian in full."""
    model = network(2, 1, join=partial(Gate, exclusive=False))
    variables, images = variables_of(model, size=4), IMAGES[:2, :4, :4]
    measure = identities(model)
    found = [measure(variables, images, LABELS[:2], jax.random.key(seed)) for seed in range(60)]
    activations = jax.jit(lambda: probe.observe(model, variables, images, jnp.sum)[0])()
    # The second unit of the first stage, and the first of the second, which changes the shape.
    for number, stage, first in ((1, 1, False), (2, 2, True)):
        unit = ResidualUnit(**model.unit_arguments(stage, first=first, train=True), parent=None)
        name = f"stage{stage}_{'first' if first else 'rest'}"
        own = {kind: variables[kind][name] for kind in ("params", "batch_stats")}
        x = activations[name]["input"]
        if not first:
            own, x = jax.tree.map(lambda leaf: leaf[0], (own, x))

        def output(x, unit=unit, own=own):
            return unit.apply(own, x, mutable=["batch_stats"])[0][0].ravel()

        def shortcut_output(x, output=output):
            with probe.shortcuts_alone():
                return output(x)

        for statistic, function in (("jacobian_gain", output), ("shortcut_jacobian_gain", shortcut_output)):
            matrix = jax.jit(jax.jacobian(function))(x)
            expected = np.square(matrix).sum() / len(matrix)
            squares = np.square([run[statistic][number] for run in found])
            error = squares.std() / np.sqrt(len(squares))
            assert error < 0.1 * expected
            assert abs(squares.mean() - expected) < 3 * error, (number, statistic)


def test_the_gain_of_an_identity_and_of_a_constant_is_exact(preactivated):
    keeping = (0, 1, 2, 4, 5, 7, 8)  # the units that keep the shape
    identity = preactivated[2]
    assert [identity["shortcut_jacobian_gain"][number] for number in keeping] == pytest.approx([1] * 7, rel=1e-12)
    assert min(abs(gain - 1) for gain in identity["jacobian_gain"]) > 1e-3
    model = network(2, join=partial(Scale, shortcut_scale=0.25), placement="full_preactivation")
    scaled = identities(model)(variables_of(model), IMAGES, LABELS, KEY)
    assert scaled["shortcut_jacobian_gain"] == pytest.approx([0.25] * 2, rel=1e-12)


# The surroundings


def test_outside_the_context_gradients_pass_the_branches_as_before():
    model = network(2)
    variables = variables_of(model)
    _, before, cut = observe(model, variables)
    with pytest.raises(RuntimeError, match="inside"), probe.shortcuts_alone():
        raise RuntimeError("inside")
    _, after, _ = observe(model, variables)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert np.abs(before["stage1_first"]["input"] - cut["stage1_first"]["input"]).max() > 1e-4


def test_a_dropped_shortcut_and_stages_of_one_unit_are_measured_too():
    model = network(1, 1, join=DropoutShortcut)
    measured = identities(model)(variables_of(model), IMAGES, LABELS, KEY)
    assert measured.keys() == STATISTICS and {len(values) for values in measured.values()} == {2}
    assert np.isnan(measured["forward_residue"]).all()  # between a unit and itself there is nothing to add
    assert all(np.isfinite(measured[name]).all() for name in STATISTICS - {"forward_residue"})
    # Half of the elements are dropped, and what is kept is not scaled up.
    assert 0.3 < measured["shortcut_jacobian_gain"][0] < 0.7
