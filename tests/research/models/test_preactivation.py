"""Full pre-activation (He et al. 2016): a pure identity path, and parity with a network written in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from research.models import cifar_resnet
from research.models.convolution import Convolution
from research.models.resnet import ResNet, Stage, unstack_blocks

IMAGES = np.random.default_rng(0).standard_normal((8, 8, 8, 3))
LABELS = np.random.default_rng(1).integers(0, 10, 8)


# The identity path


def one_stage(**options):
    stage = Stage(4, (Convolution(4), Convolution(4)))
    return ResNet((Convolution(4),), False, (stage,), 10, placement="full_preactivation", **options)


def read_ends(model, variables):
    """What the first unit reads and the last norm reads, in training, and the gradients of a loss at both."""

    def ends(first, last):
        inputs = {}

        def shift(next_call, args, kwargs, context):
            name = context.module.name
            if context.method_name == "__call__" and name in ("stage1_first", "final_norm"):
                args = (args[0] + (first if name == "stage1_first" else last), *args[1:])
                inputs[name] = args[0]
            return next_call(*args, **kwargs)

        with nn.intercept_methods(shift):
            logits, _ = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
        return jnp.sin(logits).sum(), (inputs["stage1_first"], inputs["final_norm"])

    zeros = np.zeros((*IMAGES.shape[:3], 4))
    with jax.enable_x64(True):
        gradients, inputs = jax.device_get(jax.jit(jax.grad(ends, (0, 1), has_aux=True))(zeros, zeros))
    return inputs, gradients


def test_without_branches_it_is_the_identity_to_the_bit(abstract_variables, lively):
    """x_L = x_l + sum F and dE/dx_l = dE/dx_L (1 + ...), equations 4 and 5: F = 0 leaves x and dE/dx as they are."""
    model = one_stage()
    variables = lively(abstract_variables(model, size=8))
    (first, last), (at_first, at_last) = read_ends(model, variables)
    assert np.abs(last - first).max() > 0.1 and np.abs(at_first - at_last).max() > 1e-3
    silenced = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.zeros_like(leaf) if path[-2].key == "conv2" else leaf, variables
    )
    (first, last), (at_first, at_last) = read_ends(model, silenced)
    assert first.max() > 0.1 and np.abs(at_first).max() > 1e-3
    np.testing.assert_array_equal(last, first)
    np.testing.assert_array_equal(at_first, at_last)


def test_the_output_is_the_input_and_the_sum_of_the_branches(abstract_variables, lively, relative):
    model = one_stage()
    variables = lively(abstract_variables(model, size=8))
    with jax.enable_x64(True):
        updated = jax.jit(
            lambda: model.apply(variables, IMAGES, train=True, mutable=["batch_stats", "intermediates"])[1]
        )()
    units = unstack_blocks(
        jax.tree.map(lambda leaf: np.asarray(leaf[0]), updated["intermediates"], is_leaf=lambda x: isinstance(x, tuple))
    )
    total = units[0]["input"] + sum(unit["branch"] for unit in units)
    assert relative(units[-1]["output"], total) < 1e-14


# PyTorch, in float64: what is left is the order of summation


def torch_network(torch, units, width):
    """The bottleneck network of He et al. 2016 by its description, modules in the order of our names."""
    relu = torch.nn.functional.relu

    def conv(inputs, outputs, size, stride=1):
        return torch.nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)

    def norm(channels):
        return torch.nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1)

    class Bottleneck(torch.nn.Module):
        def __init__(self, inputs, inside, stride, first):
            super().__init__()
            if not first:
                self.norm1 = norm(inputs)
            self.conv1, self.norm2 = conv(inputs, inside, 1, stride), norm(inside)
            self.conv2, self.norm3 = conv(inside, inside, 3), norm(inside)
            self.conv3 = conv(inside, 4 * inside, 1)
            if inputs != 4 * inside:
                self.projection = conv(inputs, 4 * inside, 1, stride)

        def forward(self, x):
            a = relu(self.norm1(x)) if hasattr(self, "norm1") else x
            y = self.conv2(relu(self.norm2(self.conv1(a))))
            y = self.conv3(relu(self.norm3(y)))
            return y + (self.projection(a) if hasattr(self, "projection") else x)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem_conv, self.stem_norm = conv(3, width, 3), norm(width)
            self.units = torch.nn.Sequential()
            inputs = width
            for stage in range(3):
                for number in range(units):
                    inside, stride = width * 2**stage, 2 if stage and not number else 1
                    self.units.append(Bottleneck(inputs, inside, stride, first=not len(self.units)))
                    inputs = 4 * inside
            self.final_norm, self.head = norm(inputs), torch.nn.Linear(inputs, 10)

        def forward(self, x):
            x = self.units(relu(self.stem_norm(self.stem_conv(x))))
            return self.head(relu(self.final_norm(x)).mean(dim=(2, 3)))

    return Network().double()


TORCH_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def in_torchs_names(collection):
    """Our arrays by PyTorch's names and in its layout: kernels HWIO -> OIHW, dense kernels transposed."""
    trees = {name: tree for name, tree in collection.items() if not name.startswith("stage")}
    trees |= {f"units.{number}": unit for number, unit in enumerate(unstack_blocks(collection))}
    found = {}
    for path, leaf in flatten_dict(trees).items():
        leaf = np.asarray(leaf)
        if path[-1] == "kernel":
            leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
        found[".".join((*path[:-1], TORCH_NAMES[path[-1]]))] = leaf
    return found


def test_the_bottleneck_network_equals_pytorchs(abstract_variables, lively, relative):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra [bench])")
    model = cifar_resnet(20, unit="bottleneck", placement="full_preactivation", width=2)
    variables = lively(abstract_variables(model, size=8))

    def run(params, x):
        def loss(params, x):
            logits, new = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            picked = jnp.take_along_axis(nn.log_softmax(logits), LABELS[:, None], axis=1)
            return -picked.mean(), (logits, new["batch_stats"])

        return model.apply(variables, x, train=False), *jax.grad(loss, (0, 1), has_aux=True)(params, x)

    with jax.enable_x64(True):
        done = jax.device_get(jax.jit(run)(variables["params"], IMAGES))
    evaluated, (gradients, x_gradient), (trained, averages) = done

    network = torch_network(torch, units=2, width=2)
    values = in_torchs_names(variables["params"]) | in_torchs_names(variables["batch_stats"])
    state = network.state_dict()
    assert {name for name in state if not name.endswith("num_batches_tracked")} == set(values)
    for name, value in values.items():
        state[name].copy_(torch.from_numpy(value.copy()))
    x = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()).requires_grad_(True)
    network.eval()
    assert relative(evaluated, network(x).detach().numpy()) < 1e-10

    network.train()
    logits = network(x)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(LABELS)).backward()
    assert relative(trained, logits.detach().numpy()) < 1e-10
    assert relative(x_gradient.transpose(0, 3, 1, 2), x.grad.numpy()) < 1e-9
    found = in_torchs_names(gradients)
    for name, parameter in network.named_parameters():
        assert relative(found.pop(name), parameter.grad.numpy()) < 1e-9, name
        assert (parameter.grad != 0).double().mean() > 0.9, name  # no dead parameter, the last norm's included
    assert not found
    for name, mean in in_torchs_names(averages).items():
        if name.endswith("running_mean"):  # PyTorch's variances are unbiased estimates: see test_resnet.py
            assert relative(mean, network.state_dict()[name].numpy()) < 1e-10, name
