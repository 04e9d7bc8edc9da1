"""ResNets of He et al. 2015, section 4.2: published counts, names, gradients, and parity with two other writings.

The other writings are one in PyTorch, with no code in common, and one block by block, without the scan.
"""

import functools
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from research.errors import UsageError
from research.models import MODELS, cifar_resnet
from research.models.residual_unit import ResidualUnit
from research.models.resnet import unstack_blocks

# He et al. 2015, Table 6, computed exactly: depth -> (parameters, multiply-adds of one 32x32 image).
COUNTS = {
    20: (269_722, 40_551_040),
    32: (464_154, 68_862_592),
    44: (658_586, 97_174_144),
    56: (853_018, 125_485_696),
    110: (1_727_962, 252_887_680),
    1202: (19_421_274, 2_829_238_912),
}
BLOCKS = ("plain", "residual")
both = pytest.mark.parametrize("block", BLOCKS)

IMAGES = np.random.default_rng(0).standard_normal((16, 8, 8, 3)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 10, 16)


def cross_entropy(logits):
    return -jnp.take_along_axis(nn.log_softmax(logits), LABELS[:, None], axis=1).mean()


class Passes(NamedTuple):
    """What one network does with IMAGES, in float64."""

    model: nn.Module
    variables: Any
    evaluated: Any  # logits
    trained: Any  # logits
    averages: Any  # BatchNorm's after the step
    gradients: Any
    x_gradient: Any


@pytest.fixture(scope="module")
def passes(abstract_variables, lively):
    """`(depth, block)` -> `Passes`, each made once."""

    @functools.cache
    def made(depth, block):
        model = cifar_resnet(depth, block, 4)
        variables = lively(abstract_variables(model, size=8))

        def run(params, x):
            def loss(params, x):
                logits, new = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
                return cross_entropy(logits), (logits, new["batch_stats"])

            (gradients, x_gradient), (trained, averages) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
            return model.apply(variables, x, train=False), trained, averages, gradients, x_gradient

        with jax.enable_x64(True):
            return Passes(model, variables, *jax.device_get(jax.jit(run)(variables["params"], np.float64(IMAGES))))

    return made


# Counts


@both
@pytest.mark.parametrize("depth", COUNTS)
def test_parameter_counts_are_the_published_ones(depth, block, abstract_variables):
    variables = abstract_variables(cifar_resnet(depth, block))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])) == COUNTS[depth][0]


@both
@pytest.mark.parametrize("depth", COUNTS)
def test_operations_are_those_of_the_paper(depth, block, operations, abstract_variables):
    counts, macs = operations(cifar_resnet(depth, block))
    assert macs == COUNTS[depth][1]
    assert counts["conv_general_dilated"] == depth - 1
    assert counts["dot_general"] == 1
    assert counts["max"] == depth - 1  # ReLUs: one after each convolution
    assert counts["rsqrt"] == depth - 1  # BatchNorms: one after each convolution
    variables = abstract_variables(cifar_resnet(depth, block))
    scales = [leaf for path, leaf in flatten_dict(variables["params"]).items() if path[-1] == "scale"]
    assert sum(leaf.shape[0] if leaf.ndim == 2 else 1 for leaf in scales) == depth - 1
    # A BatchNorm adds its epsilon and its shift, the classifier its bias, and a residual block its shortcut.
    shortcuts = (depth - 2) // 2 if block == "residual" else 0
    assert counts["add"] == 2 * (depth - 1) + 1 + shortcuts
    # Two shortcuts change the shape: they pad channels.
    assert counts.get("pad", 0) == (2 if block == "residual" else 0)


# Names and order


def test_parameter_names_are_a_contract(abstract_variables):
    """Checkpoints outlive refactors: a change here makes every one of them unreadable."""
    shapes = {"/".join(path): leaf.shape for path, leaf in flatten_dict(abstract_variables(cifar_resnet(20))).items()}
    assert set(shapes) == {
        "params/stem_conv/kernel",
        "params/stem_norm/scale",
        "params/stem_norm/bias",
        "params/stage1_first/conv1/kernel",
        "params/stage1_first/norm1/scale",
        "params/stage1_first/norm1/bias",
        "params/stage1_first/conv2/kernel",
        "params/stage1_first/norm2/scale",
        "params/stage1_first/norm2/bias",
        "params/stage1_rest/conv1/kernel",
        "params/stage1_rest/norm1/scale",
        "params/stage1_rest/norm1/bias",
        "params/stage1_rest/conv2/kernel",
        "params/stage1_rest/norm2/scale",
        "params/stage1_rest/norm2/bias",
        "params/stage2_first/conv1/kernel",
        "params/stage2_first/norm1/scale",
        "params/stage2_first/norm1/bias",
        "params/stage2_first/conv2/kernel",
        "params/stage2_first/norm2/scale",
        "params/stage2_first/norm2/bias",
        "params/stage2_rest/conv1/kernel",
        "params/stage2_rest/norm1/scale",
        "params/stage2_rest/norm1/bias",
        "params/stage2_rest/conv2/kernel",
        "params/stage2_rest/norm2/scale",
        "params/stage2_rest/norm2/bias",
        "params/stage3_first/conv1/kernel",
        "params/stage3_first/norm1/scale",
        "params/stage3_first/norm1/bias",
        "params/stage3_first/conv2/kernel",
        "params/stage3_first/norm2/scale",
        "params/stage3_first/norm2/bias",
        "params/stage3_rest/conv1/kernel",
        "params/stage3_rest/norm1/scale",
        "params/stage3_rest/norm1/bias",
        "params/stage3_rest/conv2/kernel",
        "params/stage3_rest/norm2/scale",
        "params/stage3_rest/norm2/bias",
        "params/head/kernel",
        "params/head/bias",
        "batch_stats/stem_norm/mean",
        "batch_stats/stem_norm/var",
        "batch_stats/stage1_first/norm1/mean",
        "batch_stats/stage1_first/norm1/var",
        "batch_stats/stage1_first/norm2/mean",
        "batch_stats/stage1_first/norm2/var",
        "batch_stats/stage1_rest/norm1/mean",
        "batch_stats/stage1_rest/norm1/var",
        "batch_stats/stage1_rest/norm2/mean",
        "batch_stats/stage1_rest/norm2/var",
        "batch_stats/stage2_first/norm1/mean",
        "batch_stats/stage2_first/norm1/var",
        "batch_stats/stage2_first/norm2/mean",
        "batch_stats/stage2_first/norm2/var",
        "batch_stats/stage2_rest/norm1/mean",
        "batch_stats/stage2_rest/norm1/var",
        "batch_stats/stage2_rest/norm2/mean",
        "batch_stats/stage2_rest/norm2/var",
        "batch_stats/stage3_first/norm1/mean",
        "batch_stats/stage3_first/norm1/var",
        "batch_stats/stage3_first/norm2/mean",
        "batch_stats/stage3_first/norm2/var",
        "batch_stats/stage3_rest/norm1/mean",
        "batch_stats/stage3_rest/norm1/var",
        "batch_stats/stage3_rest/norm2/mean",
        "batch_stats/stage3_rest/norm2/var",
    }
    assert shapes["params/stage2_first/conv1/kernel"] == (3, 3, 16, 32)
    assert shapes["params/stage2_rest/conv1/kernel"] == (2, 3, 3, 32, 32)  # blocks in front


@both
def test_names_do_not_depend_on_the_block_and_short_stages_have_no_rest(block, abstract_variables):
    names = flatten_dict(abstract_variables(cifar_resnet(8, block)))
    assert names.keys() == flatten_dict(abstract_variables(cifar_resnet(8))).keys()
    assert {path[1] for path in names if path[0] == "params"} == {
        "stem_conv",
        "stem_norm",
        "stage1_first",
        "stage2_first",
        "stage3_first",
        "head",
    }


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_unstack_blocks_is_in_order_of_depth(blocks):
    collection = {"stem_conv": {"kernel": -1}, "head": {"kernel": -1}}
    for stage in (2, 3, 1):
        base = (stage - 1) * blocks
        collection[f"stage{stage}_first"] = {"conv1": {"kernel": np.full((2, stage), base)}}
        if blocks > 1:
            rest = np.arange(base + 1, base + blocks).reshape(-1, 1, 1) * np.ones((1, 2, stage))
            collection[f"stage{stage}_rest"] = {"conv1": {"kernel": rest}}
    found = [block["conv1"]["kernel"] for block in unstack_blocks(collection)]
    for depth, kernel in enumerate(found):
        np.testing.assert_array_equal(kernel, np.full((2, 1 + depth // blocks), depth))
    assert len(found) == 3 * blocks


# Requests


@pytest.mark.parametrize("depth", [-4, 0, 1, 2, 3, 7, 9, 13, 15, 19, 21, 57, 1000])
def test_a_wrong_depth_names_the_nearest_valid_ones(depth):
    valid = [6 * n + 2 for n in range(1, 300)]
    below = max([d for d in valid if d < depth], default=8)
    with pytest.raises(UsageError) as caught:
        cifar_resnet(depth)
    assert f"depth {depth} " in str(caught.value) and f"try {below} or {below + 6}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"block": "bottleneck"}, "'bottleneck' is unknown: choose from plain, residual"), ({"width": 0}, "width 0")],
)
def test_other_wrong_arguments_are_one_line(wrong, message):
    with pytest.raises(UsageError, match=message):
        cifar_resnet(**wrong)


def test_the_table_of_models_holds_the_constructor():
    assert MODELS["resnet"] is cifar_resnet


# Gradients and options


@both
@pytest.mark.parametrize("depth", [8, 20])
def test_every_parameter_has_a_gradient(depth, block, passes):
    for path, leaf in flatten_dict(passes(depth, block).gradients, sep="/").items():
        assert np.isfinite(leaf).all(), path
        if not path.endswith("kernel"):
            assert (leaf != 0).all(), path
        for kernel in leaf if leaf.ndim == 5 else [leaf]:  # behind a ReLU shut for all 16 images a weight has none
            assert (kernel != 0).mean() > 0.9, path


def test_the_shortcut_changes_the_output(passes):
    plain, residual = (passes(20, block) for block in BLOCKS)
    for one, two in ((plain.evaluated, residual.evaluated), (plain.trained, residual.trained)):
        assert np.abs(one - two).max() > 0.1 * np.abs(one).max()
    jax.tree.map(np.testing.assert_array_equal, plain.variables, residual.variables)  # with the same parameters


def test_initial_values_and_sizes_follow_the_arguments():
    model = cifar_resnet(20, width=5, num_classes=7)
    variables = jax.jit(lambda key: model.init(key, IMAGES[:1], train=False))(jax.random.key(0))
    assert jax.eval_shape(lambda: model.apply(variables, IMAGES, train=False)).shape == (16, 7)
    assert variables["params"]["stage3_first"]["conv2"]["kernel"].shape == (3, 3, 20, 20)
    for path, leaf in flatten_dict(variables).items():
        if path[-1] == "kernel":  # He et al. 2015b: variance 2 / fan_in, here to 4 standard errors
            fan_in = math.prod(leaf.shape[-4:-1])
            assert abs(leaf.var() * fan_in / 2 - 1) < 4 * math.sqrt(2 / leaf.size), path
        else:
            np.testing.assert_array_equal(leaf, np.full(leaf.shape, path[-1] in ("scale", "var")))
    stage = variables["params"]["stage1_first"], variables["params"]["stage1_rest"]
    kernels = [stage[0]["conv1"]["kernel"], *stage[1]["conv1"]["kernel"]]
    assert len(np.unique(kernels)) == 3 * kernels[0].size  # each block is drawn apart


def test_batch_statistics_cross_the_axis_only_if_it_is_named(abstract_variables, lively):
    named, local = (cifar_resnet(8, width=4, axis_name=name) for name in ("batch", None))
    variables = lively(abstract_variables(local, size=8))
    assert jax.tree.structure(abstract_variables(named, size=8)) == jax.tree.structure(variables)
    train = {"train": True, "mutable": ["batch_stats"]}

    def mapped(model, variables, images):
        halves = jax.vmap(lambda x: model.apply(variables, x, **train), axis_name="batch")
        logits, updated = halves(images.reshape(2, 8, *images.shape[1:]))
        return logits.reshape(16, 10), updated

    @jax.jit
    def run(*arguments):
        whole = local.apply(*arguments, **train)
        evaluated = [model.apply(*arguments, train=False) for model in (named, local)]  # no map, no axis needed
        return whole, mapped(named, *arguments), mapped(local, *arguments), evaluated

    (whole, whole_stats), (together, together_stats), (apart, _), evaluated = run(
        jax.tree.map(np.float32, variables), IMAGES
    )
    np.testing.assert_allclose(together, whole, rtol=1e-4, atol=1e-4)
    for one, two in zip(jax.tree.leaves(together_stats), jax.tree.leaves(whole_stats), strict=True):
        np.testing.assert_allclose(one, jnp.stack([two, two]), rtol=1e-4, atol=1e-5)
    assert np.abs(apart - whole).max() > 0.01
    np.testing.assert_array_equal(*evaluated)
    with pytest.raises(NameError, match="batch"):  # training says that the axis is missing
        jax.eval_shape(lambda: named.apply(variables, IMAGES, **train))


# The same network, block by block


def unrolled(model, variables, x, train):
    """The network without the scan; returns logits and the blocks' new running averages."""
    norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)

    def call(module, name, x, collections=variables, **keywords):
        own = {kind: tree[name] for kind, tree in collections.items() if name in tree}
        return module.apply(own, x, mutable=["batch_stats"], **keywords)

    x, _ = call(nn.Conv(model.stem[0].features, (3, 3), padding=1, use_bias=False), "stem_conv", x)
    x, _ = call(norm(), "stem_norm", x)
    x = nn.relu(x)
    blocks = zip(*(unstack_blocks(variables[kind]) for kind in ("params", "batch_stats")), strict=True)
    averages = []
    for number, (params, stats) in enumerate(blocks):
        stage, place = divmod(number, model.stages[0].units)
        block = ResidualUnit(**model.unit_arguments(stage + 1, first=not place, train=train))
        (x, _), new = block.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        averages.append(new["batch_stats"])
    logits, _ = call(nn.Dense(model.num_classes), "head", x.mean(axis=(1, 2)))
    return logits, averages


@both
def test_the_scan_is_the_blocks_one_after_another(block, passes, relative):
    done = passes(20, block)
    with jax.enable_x64(True):
        images = np.float64(IMAGES)
        (trained, averages), (evaluated, kept) = jax.jit(
            lambda variables: [unrolled(done.model, variables, images, train) for train in (True, False)]
        )(done.variables)
    assert relative(done.trained, trained) < 1e-12
    assert relative(done.evaluated, evaluated) < 1e-12
    before, after = (unstack_blocks(tree) for tree in (done.variables["batch_stats"], done.averages))
    for ours, old, theirs, same in zip(after, before, averages, kept, strict=True):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11), ours, theirs)
        jax.tree.map(np.testing.assert_array_equal, old, same)  # evaluation changes nothing
        assert not any(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (ours, old)), strict=True))


# PyTorch, in float64: what is left is the order of summation


def torch_network(torch, depth, width, residual):
    """The network by its description in the paper, in PyTorch's words; modules in the order of application."""
    F = torch.nn.functional

    class Block(torch.nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            self.norm1 = torch.nn.BatchNorm2d(outputs, eps=1e-5, momentum=0.1)
            self.conv2 = torch.nn.Conv2d(outputs, outputs, 3, 1, padding=1, bias=False)
            self.norm2 = torch.nn.BatchNorm2d(outputs, eps=1e-5, momentum=0.1)
            self.new, self.stride = outputs - inputs, stride

        def forward(self, x):
            y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
            if residual:
                if self.stride == 2:
                    x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
                y = y + x
            return F.relu(y)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem_conv = torch.nn.Conv2d(3, width, 3, 1, padding=1, bias=False)
            self.stem_norm = torch.nn.BatchNorm2d(width, eps=1e-5, momentum=0.1)
            widths = [width * 2**stage for stage in range(3) for _ in range((depth - 2) // 6)]
            pairs = zip([width, *widths], widths, strict=False)
            self.blocks = torch.nn.Sequential(*(Block(i, o, 1 if i == o else 2) for i, o in pairs))
            self.head = torch.nn.Linear(4 * width, 10)

        def forward(self, x):
            x = self.blocks(F.relu(self.stem_norm(self.stem_conv(x))))
            return self.head(x.mean(dim=(2, 3)))

    return Network().double()


def in_torchs_order(collection):
    """Our modules in the order in which they are applied, each a flat dictionary."""
    blocks = [
        block[name]
        for block in unstack_blocks(collection)
        for name in ("conv1", "norm1", "conv2", "norm2")
        if name in block
    ]
    before, after = (
        [collection[name] for name in names if name in collection] for names in (("stem_conv", "stem_norm"), ("head",))
    )
    return before + blocks + after


def as_torch(name, array):
    """Our array in PyTorch's layout: kernels HWIO -> OIHW, dense kernels transposed."""
    array = np.asarray(array, np.float64)
    if name != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def leaf_modules(network):
    return [module for module in network.modules() if not list(module.children())]


TORCH_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


@both
@pytest.mark.parametrize("depth", [8, 20])
def test_values_and_gradients_equal_pytorchs(depth, block, passes, relative):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra [bench])")
    done = passes(depth, block)
    network = torch_network(torch, depth, 4, block == "residual")
    for kind in ("params", "batch_stats"):
        modules = [m for m in leaf_modules(network) if kind == "params" or hasattr(m, "running_mean")]
        for module, values in zip(modules, in_torchs_order(done.variables[kind]), strict=True):
            for name, value in values.items():
                getattr(module, TORCH_NAMES[name]).data.copy_(torch.from_numpy(as_torch(name, value).copy()))
    torch_x = torch.from_numpy(np.float64(IMAGES).transpose(0, 3, 1, 2).copy())
    network.eval()
    with torch.no_grad():
        assert relative(done.evaluated, network(torch_x).numpy()) < 1e-10

    network.train()
    torch_x.requires_grad_(True)
    torch_logits = network(torch_x)
    torch.nn.functional.cross_entropy(torch_logits, torch.from_numpy(LABELS)).backward()
    assert relative(done.trained, torch_logits.detach().numpy()) < 1e-10
    assert relative(done.x_gradient.transpose(0, 3, 1, 2), torch_x.grad.numpy()) < 1e-9
    for module, values in zip(leaf_modules(network), in_torchs_order(done.gradients), strict=True):
        for name, value in values.items():
            assert relative(as_torch(name, value), getattr(module, TORCH_NAMES[name]).grad.numpy()) < 1e-9

    norms = [module for module in leaf_modules(network) if hasattr(module, "running_mean")]
    before, after = (in_torchs_order(tree) for tree in (done.variables["batch_stats"], done.averages))
    size = 8
    for number, (module, old, new) in enumerate(zip(norms, before, after, strict=True)):
        if module.num_features == 4 * 2 * (8 // size):  # the first norm after a change of width
            size //= 2
        assert relative(new["mean"], module.running_mean.numpy()) < 1e-10, number
        # Running variances: PyTorch averages the unbiased estimate of the batch's variance, Flax the biased one.
        n = len(IMAGES) * size * size
        batch = (module.running_var.numpy() - 0.9 * old["var"]) / 0.1 * (n - 1) / n
        assert relative(new["var"], 0.9 * old["var"] + 0.1 * batch) < 1e-10, number
