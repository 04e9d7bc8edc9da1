"""Weights in and out: parity with torchvision's networks as written here in PyTorch, the command line, fine-tuning."""

import functools
import math
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from research.data import digits
from research.errors import CarouselError, UsageError
from research.models import cifar_resnet, imagenet_resnet, weights
from research.tasks.classification import classification
from research.training import checkpoint, state, step

ROOT = Path(__file__).resolve().parents[3]
# depth -> (units of each stage, tensors of torchvision's state_dict(), parameters that torchvision publishes).
NETWORKS = {
    18: ((2, 2, 2, 2), 122, 11_689_512),
    34: ((3, 4, 6, 3), 218, 21_797_672),
    50: ((3, 4, 6, 3), 320, 25_557_032),
    101: ((3, 4, 23, 3), 626, 44_549_160),
    152: ((3, 8, 36, 3), 932, 60_192_808),
    200: ((3, 24, 36, 3), 1220, 64_673_832),  # timm's
}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="torch is not installed (extra [bench])")


def torch_resnet(torch, depth, num_classes=1000, stride_on="3x3"):
    """torchvision's ResNet: its names, order and arithmetic. Its tensors have shapes only (device `meta`)."""
    nn, relu = torch.nn, torch.nn.functional.relu

    def conv(inputs, outputs, kernel, stride=1):
        return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)

    class BasicBlock(nn.Module):
        expansion = 1

        def __init__(self, inputs, width, stride, downsample):
            super().__init__()
            self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
            self.downsample = downsample

        def forward(self, x):
            y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
            return relu(y + (x if self.downsample is None else self.downsample(x)))

    class Bottleneck(nn.Module):
        expansion = 4

        def __init__(self, inputs, width, stride, downsample):
            super().__init__()
            first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
            self.conv1, self.bn1 = conv(inputs, width, 1, first), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = conv(width, width, 3, second), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
            self.downsample = downsample

        def forward(self, x):
            y = relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))))
            return relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))

    class ResNet(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.inputs, self.block = 64, block
            self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
            self.layer1, self.layer2, self.layer3, self.layer4 = (
                self.layer(64 * 2**k, units, 1 if k == 0 else 2) for k, units in enumerate(NETWORKS[depth][0])
            )
            self.fc = nn.Linear(self.inputs, num_classes)

        def layer(self, width, units, first_stride):
            blocks, outputs = [], width * self.block.expansion
            for stride in (first_stride, *[1] * (units - 1)):
                changes = stride != 1 or self.inputs != outputs
                projection = (conv(self.inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)) if changes else ()
                blocks.append(self.block(self.inputs, width, stride, nn.Sequential(*projection) if changes else None))
                self.inputs = outputs
            return nn.Sequential(*blocks)

        def features(self, x):
            x = nn.functional.max_pool2d(relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
            return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3))

        def forward(self, x):
            return self.fc(self.features(x))

    with torch.device("meta"):
        return ResNet(BasicBlock if depth < 50 else Bottleneck).eval()


def random_values(shapes, seed=0):
    """Arrays for torchvision's names with no zeros and ones, of a size that signals pass: biases and averages too."""
    random = np.random.default_rng(seed)

    def value(name, shape):
        if name.endswith("num_batches_tracked"):
            return np.int64(random.integers(1, 100))
        if len(shape) > 1:
            return random.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / math.prod(shape[1:])))
        low = {"weight": 0.5, "running_var": 1.5}.get(name.split(".")[-1], -0.5)
        return random.uniform(low, low + 1, shape).astype(np.float32)

    return {name: np.asarray(value(name, shape)) for name, shape in shapes.items()}


def load_strictly(torch, network, arrays):
    network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, assign=True)
    return network


def torch_state(torch, depth, num_classes, **options):
    """A network with random values, and these."""
    network = torch_resnet(torch, depth, num_classes, **options)
    arrays = random_values({name: tuple(tensor.shape) for name, tensor in network.state_dict().items()})
    return load_strictly(torch, network, arrays), arrays


def images(size):
    return np.random.default_rng(1).standard_normal((2, size, size, 3)).astype(np.float32)


def torch_logits(torch, network, x):
    with torch.no_grad():
        return network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()


def our_logits(variables, x, depth, num_classes, **options):
    model = imagenet_resnet(depth, num_classes=num_classes, **options)
    return jax.jit(functools.partial(model.apply, train=False))(variables, x)


def relative(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.abs(expected).max() > 0
    return np.abs(got - expected).max() / np.abs(expected).max()


def assert_same(got, expected):
    """Every name, type, shape and bit."""
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


def without_counters(arrays):
    return {name: array for name, array in arrays.items() if not name.endswith("num_batches_tracked")}


@functools.cache
def our_variables(num_classes=5):
    """Random variables of ResNet-18; not to be written to."""
    shapes = flatten_dict(abstract(imagenet_resnet(18, num_classes=num_classes)), sep="/")
    zeros = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in shapes.items()}
    named = weights.to_torchvision(unflatten_dict(zeros, sep="/"))
    return weights.from_torchvision(random_values({name: array.shape for name, array in named.items()}))


@functools.cache
def their_arrays():
    """The same by torchvision's names."""
    return weights.to_torchvision(our_variables())


def abstract(model):
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)


# Parity


@pytest.mark.parametrize(
    ("depth", "size", "stride_on"),
    [
        (18, 64, "3x3"),
        (34, 32, "3x3"),
        (50, 64, "3x3"),
        (50, 64, "1x1"),
        (101, 32, "3x3"),
        pytest.param(152, 32, "3x3", marks=pytest.mark.slow),
    ],
)
def test_logits_equal_torchvisions(torch, depth, size, stride_on):
    network, arrays = torch_state(torch, depth, 7, stride_on=stride_on)
    variables = weights.from_torchvision(arrays, depth)
    x = images(size)
    expected = torch_logits(torch, network, x)
    assert relative(our_logits(variables, x, depth, 7, stride_on=stride_on), expected) < 1e-4
    if depth == 50:  # names and shapes do not tell where the stride is: the wrong choice must be seen in the output
        other = "1x1" if stride_on == "3x3" else "3x3"
        assert relative(our_logits(variables, x, depth, 7, stride_on=other), expected) > 0.05


@pytest.mark.parametrize("depth", NETWORKS)
def test_names_and_shapes_are_torchvisions(torch, depth):
    network = torch_resnet(torch, depth)
    assert len(network.state_dict()) == NETWORKS[depth][1]
    assert sum(tensor.numel() for tensor in network.parameters()) == NETWORKS[depth][2]
    theirs = {
        name: np.broadcast_to(np.float32(0), tuple(tensor.shape))
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    variables = weights.from_torchvision(theirs)  # the depth is found
    shapes = {name: leaf.shape for name, leaf in flatten_dict(abstract(imagenet_resnet(depth)), sep="/").items()}
    assert {name: array.shape for name, array in flatten_dict(variables, sep="/").items()} == shapes
    for arrays in (weights.to_torchvision(variables), theirs):  # counters need not be there
        shapes = {name: torch.empty(array.shape, device="meta") for name, array in arrays.items()}
        network.load_state_dict(shapes, assign=True)  # strict is the default


@pytest.mark.parametrize("depth", [18, 50])
def test_there_and_back_is_the_same_to_the_bit(torch, depth):
    network, arrays = torch_state(torch, depth, 3)
    back = weights.to_torchvision(weights.from_torchvision(arrays), depth)
    assert_same(without_counters(back), without_counters(arrays))
    assert back.keys() == arrays.keys()
    assert all(array.flags.c_contiguous for array in back.values())
    counters = [array for name, array in back.items() if name.endswith("num_batches_tracked")]
    assert all(array == 0 and array.dtype == np.int64 and array.shape == () for array in counters)
    loaded = load_strictly(torch, network, back).state_dict()
    assert_same({name: tensor.numpy() for name, tensor in loaded.items()}, back)


def test_units_go_where_their_numbers_say():
    """Without PyTorch: one tensor of each kind by hand."""
    theirs, ours = their_arrays(), our_variables()
    stem, stage = ours["params"]["stem_conv"]["kernel"], ours["params"]["stage3_rest"]
    assert theirs["conv1.weight"][5, 2, 1, 3] == stem[1, 3, 2, 5]
    assert theirs["layer3.1.conv2.weight"][7, 9, 0, 2] == stage["conv2"]["kernel"][0, 0, 2, 9, 7]
    assert theirs["layer3.1.bn2.weight"][4] == stage["norm2"]["scale"][0, 4]
    assert theirs["layer2.0.downsample.1.bias"][3] == ours["params"]["stage2_first"]["projection_norm"]["bias"][3]
    assert theirs["layer2.0.bn1.running_var"][3] == ours["batch_stats"]["stage2_first"]["norm1"]["var"][3]
    assert theirs["fc.weight"][4, 100] == ours["params"]["head"]["kernel"][100, 4]


# Files


def test_our_file_gives_the_variables_back_and_says_what_it_is(tmp_path):
    path, again = tmp_path / "new" / "ours.safetensors", tmp_path / "again.safetensors"
    weights.save(path, our_variables())
    weights.save(again, jax.tree.map(jnp.asarray, our_variables()))
    assert path.read_bytes() == again.read_bytes()
    assert_same(flatten_dict(weights.load(path), sep="/"), flatten_dict(our_variables(), sep="/"))
    with safetensors.safe_open(path, "np") as file:
        assert "params/stage1_first/conv1/kernel" in file.keys()  # noqa: SIM118 (it is no dictionary)
        content = '{"format": "weights 1", "depth": 18, "num_classes": 5}'
        assert file.metadata() == {"carousel": content}
    assert [file.name for file in path.parent.iterdir()] == ["ours.safetensors"]


def test_a_checkpoint_of_a_run_is_a_source(tmp_path):
    variables = our_variables()
    params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    moments = optax.adam(0.1).init(params["stem_conv"])
    trained = state.TrainState(jnp.int32(3), params, stats, moments)
    path = checkpoint.save(tmp_path, 3, state.flatten(trained), {})
    assert_same(flatten_dict(weights.load(path), sep="/"), flatten_dict(variables, sep="/"))
    assert weights.main(["export", str(path), str(tmp_path / "out.safetensors")]) == 0
    assert_same(weights.read(tmp_path / "out.safetensors"), their_arrays())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves_become_float32_and_the_line_says_so(dtype, tmp_path, capsys):
    halves = {name: array.astype(dtype) for name, array in without_counters(their_arrays()).items()}
    source, destination = tmp_path / "half.safetensors", tmp_path / "ours.safetensors"
    safetensors.numpy.save_file(halves, source)
    assert weights.main(["import", str(source), str(destination)]) == 0
    assert capsys.readouterr().out.endswith(f", from {np.dtype(dtype).name} to float32\n")
    expected = {name: array.astype(np.float32) for name, array in halves.items()}
    assert_same(without_counters(weights.to_torchvision(weights.load(destination))), expected)


# The command line


def command(commands, *arguments):
    line = [sys.executable, "-m", "research.models.weights", *map(str, arguments)]
    return subprocess.run(line, env=commands.environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_import_and_export_as_commands(commands, tmp_path):
    """In fresh processes, with warnings as errors; with the classes of ImageNet."""
    theirs = weights.to_torchvision(our_variables(1000))
    source, ours, back = (tmp_path / name for name in ("source.safetensors", "ours.safetensors", "back.safetensors"))
    safetensors.numpy.save_file(theirs, source, {"format": "pt"})
    ours.write_bytes(b"replaced")
    for arguments in (("import", source, ours), ("export", ours, back)):
        done = command(commands, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"wrote {arguments[-1]}: ResNet-18, 11,689,512 parameters, 1,000 classes\n"
    assert_same(weights.read(back), theirs)
    wrong = command(commands, "export", source, back)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith(f"error: {source} has 0 units") and wrong.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == sorted([source, ours, back])


def failure(capsys, *arguments):
    """The one line of a command that fails, and its exit code."""
    code = weights.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return code, err


def test_places_that_cannot_be_written_are_one_line(tmp_path, capsys):
    source = tmp_path / "source.safetensors"
    safetensors.numpy.save_file(their_arrays(), source)
    code, line = failure(capsys, "import", source, source / "in_a_file.safetensors")
    assert code == 1 and "cannot write" in line
    code, line = failure(capsys, "import", source, tmp_path)
    assert code == 1 and f"cannot write {tmp_path}" in line
    before = source.read_bytes()
    code, line = failure(capsys, "import", source, tmp_path / "." / source.name)
    assert code == 2 and "is the source itself" in line
    assert source.read_bytes() == before and list(tmp_path.iterdir()) == [source]
    with pytest.raises(SystemExit) as caught:
        weights.main(["convert", str(source), "out.safetensors"])
    assert caught.value.code == 2


# Files that are not what they should be


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_pickle_is_refused_unopened(direction, tmp_path, capsys, torch):
    mark = tmp_path / "opened"
    for protocol in (2, 3, 4, 5):
        (tmp_path / f"{protocol}.safetensors").write_bytes(pickle.dumps(Trap(mark), protocol))
    torch.save({"conv1.weight": torch.zeros(2), "trap": Trap(mark)}, tmp_path / "new.pth")
    torch.save({"trap": Trap(mark)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    sources = list(tmp_path.iterdir())
    assert len(sources) == 6
    for source in sources:
        code, line = failure(capsys, direction, source, tmp_path / "out.safetensors")
        assert code == 1 and f"{source} is a pickle" in line and "--help" in line
    assert set(tmp_path.iterdir()) == set(sources)
    pickle.loads(sources[0].read_bytes())
    assert mark.exists()  # the trap works
    with pytest.raises(SystemExit):
        weights.main(["--help"])
    assert "weights_only=True" in capsys.readouterr().out


def test_damaged_files_are_one_line(tmp_path, capsys):
    whole = safetensors.numpy.save({"conv1.weight": np.ones((64, 3, 7, 7), np.float32)})
    broken = {
        "not a safetensors": (b"", b"PNG", b"a text that goes on for a while", whole[:8]),
        "damaged": (whole[:-1], whole[: len(whole) // 2], whole[:20], b"\xff" * 8 + whole[8:], whole + b"\0"),
    }
    path = tmp_path / "broken.safetensors"
    for words, contents in broken.items():
        for content in contents:
            path.write_bytes(content)
            code, line = failure(capsys, "import", path, tmp_path / "out.safetensors")
            assert code == 1 and f"{path} is {words}" in line
    for missing in (tmp_path / "nothing.safetensors", tmp_path):
        code, line = failure(capsys, "import", missing, tmp_path / "out.safetensors")
        assert code == 1 and f"cannot read {missing}" in line
    header = b'{"x":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    assert "tensor 'x' has type F8_E4M3: give float32" in failure(capsys, "import", path, tmp_path / "out")[1]


def renamed(arrays, old, new):
    return {name.replace(old, new): array for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda a: {name: array for name, array in a.items() if name != "layer2.1.bn1.running_var"},
            "tensor 'layer2.1.bn1.running_var': expected float32 [128], found none; import takes",
        ),
        (
            lambda a: a | {"layer1.0.se.fc1.weight": np.zeros((4, 64), np.float32)},
            "tensor 'layer1.0.se.fc1.weight': expected none, found float32 [4, 64]; import takes",
        ),
        (
            lambda a: a | {"layer1.0.conv2.weight": np.zeros((64, 4, 3, 3), np.float32)},  # grouped
            "tensor 'layer1.0.conv2.weight': expected float32 [64, 64, 3, 3], found float32 [64, 4, 3, 3]; import",
        ),
        (
            lambda a: a | {"bn1.weight": np.ones(64)},
            "tensor 'bn1.weight': expected float32 [64], found float64 [64]; import takes",
        ),
        (
            lambda a: {name: array for name, array in a.items() if not name.startswith("fc.")},
            "tensor 'fc.bias': expected float32 [1000], found none (and 1 more such tensors); import takes",
        ),
        (
            lambda a: a | {"fc.weight": np.zeros((0, 512), np.float32)},
            "tensor 'fc.bias': expected float32 [1000], found float32 [5] (and 1 more such tensors); import takes",
        ),
        (
            lambda a: {name: array for name, array in a.items() if not name.startswith("layer4.1.")},
            "has 7 units of 2 convolutions, no ResNet-18, 34, 50, 101, 152, 200; import takes",
        ),
        (lambda a: a | {"fc.weight": np.float32(1)}, "tensor 'fc.bias': expected float32 [0], found float32 [5]"),
        (lambda a: renamed(a, "layer", "stages."), "has 0 units of 0 convolutions"),  # timm's v2
        (lambda a: renamed(a, "conv1.weight", "conv1.0.weight"), "ResNet-18: tensor 'conv1.0.weight': expected none"),
        (lambda a: {}, "has 0 units"),
    ],
)
def test_arrays_of_something_else_are_one_line(change, words):
    with pytest.raises(CarouselError) as caught:
        weights.from_torchvision(change(their_arrays()), source="a.safetensors")
    assert (
        "\n" not in str(caught.value) and str(caught.value).startswith("a.safetensors") and words in str(caught.value)
    )
    assert caught.value.exit_code == 1


def test_another_depth_than_the_arrays_is_an_error():
    with pytest.raises(CarouselError, match=r"the arrays, ResNet-34: tensor 'layer1\.2\.bn1\.bias': expected float32"):
        weights.from_torchvision(their_arrays(), 34)
    with pytest.raises(CarouselError, match=r"the variables, ResNet-34: tensor 'batch_stats/stage1_rest/norm1/mean'"):
        weights.to_torchvision(our_variables(), 34)
    for function in (lambda: weights.from_torchvision(their_arrays(), 20), lambda: weights.to_torchvision({}, 20)):
        with pytest.raises(UsageError, match="depth 20"):
            function()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (cifar_resnet(20), "has 9 units of 2 convolutions, no ResNet-18"),
        (cifar_resnet(18 * 3 + 2, unit="single"), "of 1 convolutions"),
        (imagenet_resnet(18, "plain"), "stage2_first/projection_norm/mean': expected float32 [128], found none"),
        (imagenet_resnet(18, option="A"), "found none"),
        (imagenet_resnet(18, option="C"), "expected none"),
        (imagenet_resnet(50, placement="full_preactivation"), "final_norm/mean': expected none, found float32 [2048]"),
        (imagenet_resnet(50, squeeze_ratio=16), "squeeze_excitation/excite/bias': expected none"),
        (imagenet_resnet(50, groups=32, group_width=4), "ResNet-50: tensor 'batch_stats/stage1_first/norm1/mean'"),
    ],
)
def test_variables_of_another_family_are_one_line(model, words, tmp_path):
    variables = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract(model))
    for export in (weights.to_torchvision, functools.partial(weights.save, tmp_path / "out.safetensors")):
        with pytest.raises(CarouselError) as caught:
            export(variables)
        assert "\n" not in str(caught.value) and words in str(caught.value)
    assert not list(tmp_path.iterdir())


# Fine-tuning


def test_a_new_head_is_he_normal_and_nothing_else_is_new():
    variables = our_variables()
    before = flatten_dict(variables, sep="/")
    new = flatten_dict(weights.replace_head(variables, 100, jax.random.key(0)), sep="/")
    kernel = new.pop("params/head/kernel")
    assert kernel.shape == (512, 100)
    assert abs(float(kernel.var()) * 512 / 2 - 1) < 4 * math.sqrt(2 / kernel.size)  # 4 standard errors
    np.testing.assert_array_equal(new.pop("params/head/bias"), np.zeros(100))
    assert all(new[name] is before[name] for name in new) and len(new) == len(before) - 2
    assert variables["params"]["head"]["kernel"].shape == (512, 5)


def test_fine_tuning_starts_from_the_imported_features(tmp_path, torch):
    """Import, a new head, four steps on digits: 8x8 grey made 16x16 and three colours."""
    network, arrays = torch_state(torch, 18, 5)
    source, ours = tmp_path / "source.safetensors", tmp_path / "ours.safetensors"
    safetensors.numpy.save_file(arrays, source)
    assert weights.main(["import", str(source), str(ours)]) == 0
    variables = weights.replace_head(weights.load(ours), 10, jax.random.key(0))

    split = digits.load().train
    pixels = np.broadcast_to(split.images[:64].repeat(2, axis=1).repeat(2, axis=2), (64, 16, 16, 3))
    data, mean = {"images": pixels, "labels": split.labels[:64]}, np.full((16, 16, 3), 80, np.float32)
    apply = state.bind(imagenet_resnet(18, num_classes=10))
    prepared = (pixels[:8].astype(np.float32) - mean) / 128
    network.features, network.forward = None, network.features
    features = torch_logits(torch, network, prepared)
    logits, _ = jax.jit(functools.partial(apply, train=False))(variables, prepared)
    assert relative(logits, features @ np.asarray(variables["params"]["head"]["kernel"])) < 1e-4

    optimizer = optax.sgd(0.01, momentum=0.9)
    stretch = step.make_stretch(classification(apply, mean=mean).loss, optimizer, optax.constant_schedule(0.01), None)
    stretch = jax.jit(stretch)
    params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    start = end = state.TrainState(jnp.int32(0), params, stats, optimizer.init(params))
    losses = []
    for rows in (np.arange(128) % 64).reshape(4, 1, 32):  # a step a call: XLA:CPU convolves slowly inside of loops
        end, metrics = stretch(end, data, rows, jax.random.key(1))
        losses.append(float(metrics["loss"][0]))
    assert losses[-1] < 0.5 * losses[0], losses
    kernel = arrays["conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(start.params["stem_conv"]["kernel"], kernel)
    moved = np.abs(end.params["stem_conv"]["kernel"] - kernel)
    assert moved.max() > 0 and moved.mean() < 0.5 * np.abs(kernel).mean()  # still the imported features, tuned
    assert weights.to_torchvision(end.variables).keys() == arrays.keys()
