"""Weights of ResNet v1 in and out, without pickle: `python -m research.models.weights import|export SOURCE DEST`.

`import` reads safetensors in the names that torchvision and timm share (resnet18, 34, 50, 101, 152 and timm's 200) and
writes ours; `export` goes the other way, from our weights or from a checkpoint of a run. Both print one line.

    conv1, bn1                                stem_conv, stem_norm
    layer{k}.0.*                              stage{k}_first/*
    layer{k}.{1 + i}.*                        stage{k}_rest/*, place i of the leading axis of units
    .conv{j}, .bn{j}, .downsample.{0, 1}      conv{j}, norm{j}, projection, projection_norm
    fc                                        head
    .weight of a convolution [O, I, H, W]     kernel [H, W, I, O]
    .weight of the classifier [O, I]          kernel [I, O]
    .weight, .bias of a normalisation         scale, bias
    .running_mean, .running_var               mean, var in `batch_stats`
    .num_batches_tracked, int64 []            not used: ignored on import, 0 on export, as PyTorch fills it in itself

Our file is plain safetensors with our names joined by `/` (`params/stage1_first/conv1/kernel`); its metadata holds
under `carousel` the format, the depth and the number of classes as JSON. Values are float32 and go through bit by bit;
float16 and bfloat16 become float32, which is exact, and the printed line says so. Other types are refused.

Names and shapes do not say everything. Where a bottleneck's stride stands is the caller's choice when the model is
built: `imagenet_resnet(50, stride_on="3x3")` for files of torchvision and timm ('v1.5'), "1x1" for those of R1's own
networks. The placements of R2 that move only ReLUs have the names of the original one, which exported files mean. And a
file of torchvision expects RGB in 0 to 1, less (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225); timm's say their own.

A pickle (.pt, .pth, .bin) can run any code when it is opened, so none is. Those who trust theirs convert it by

    state = torch.load("resnet50.pth", weights_only=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, "resnet50.safetensors")
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from research.errors import CarouselError, UsageError, one_line
from research.files import make_folder, write_atomic
from research.models.resnet_tables import IMAGENET_DEPTHS, imagenet_resnet
from research.ops import initializers

FORMAT = "weights 1"
Arrays = Mapping[str, np.ndarray]

_STEM_AND_HEAD = {"stem_conv": "conv1", "stem_norm": "bn1", "head": "fc"}
_LAYERS = {"projection": "downsample.0", "projection_norm": "downsample.1"}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_COUNTER = "num_batches_tracked"
_CHECKPOINT = "collections/"  # where a run's checkpoint has batch_stats
_TO_HWIO, _TO_OIHW = (2, 3, 1, 0), (3, 2, 0, 1)
_PICKLES = (b"PK\x03\x04", b"\x80")  # first bytes of PyTorch's archive of pickles, and of a pickle
_DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
_DTYPES |= {"I64": np.int64, "I32": np.int32, "U32": np.uint32, "U8": np.uint8, "BOOL": np.bool_}
_HALVES = (np.float16, ml_dtypes.bfloat16)

_THEIR_CURE = "import takes all weights of a torchvision or timm ResNet v1: no ResNeXt, wide, SE, 'd' or v2 network"
_OUR_CURE = "export and load take all variables of imagenet_resnet(depth): residual, v1, option B, one group, no SE"


def to_torchvision(variables: Any, depth: int | None = None, source: str = "the variables") -> dict[str, np.ndarray]:
    """Our variables as what `state_dict()` of torchvision's ResNet of this depth holds, name by name, contiguous.

    Args:
      variables: `params` and `batch_stats` of `imagenet_resnet(depth)`.
      depth: of the network; found from names and shapes when None.
      source: what to call the variables in an error.

    Raises:
      UsageError: there is no network of this depth.
      CarouselError: an array is missing, too many, or of another shape or type.
    """
    flat = _our_arrays(_flat(variables), source, depth)
    arrays = {name: np.array(array, order="C") for name, array in _unstacked(flat).items()}
    means = [name for name in arrays if name.endswith("running_mean")]
    return arrays | {name.replace("running_mean", _COUNTER): np.zeros((), np.int64) for name in means}


def from_torchvision(arrays: Arrays, depth: int | None = None, source: str = "the arrays") -> dict[str, Any]:
    """The inverse of `to_torchvision`: variables `{"params": ..., "batch_stats": ...}` of `imagenet_resnet(depth)`.

    Args:
      arrays: by torchvision's names; counters `num_batches_tracked` may be there.
      depth, source: as in `to_torchvision`, and so are the errors.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items() if name.split(".")[-1] != _COUNTER}
    depth = _their_depth(arrays, source) if depth is None else depth
    ours = _our_shapes(depth, _classes(arrays))
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in ours.items()}  # these take no memory
    expected = {name: array.shape for name, array in _unstacked(zeros).items()}
    arrays = _checked(arrays, expected, f"{source}, ResNet-{depth}", _THEIR_CURE)
    flat = {}
    for name, shape in ours.items():
        units = [_transposed(arrays[unit], _TO_HWIO) for unit in _their_names(name, shape)]
        flat[name] = np.array(units if "_rest/" in name else units[0], order="C")
    return unflatten_dict(flat, sep="/")


def replace_head(variables: Any, num_classes: int, key: jax.Array) -> dict[str, Any]:
    """The variables with a new classifier for fine-tuning: He's normal weights, zero biases; the rest is shared.

    Args:
      variables: of a network; its head has a kernel `[features, classes]`.
      num_classes: outputs of the new head.
      key: a PRNG key.
    """
    features = variables["params"]["head"]["kernel"].shape[0]
    head = {"kernel": initializers.he_normal(key, (features, num_classes)), "bias": jnp.zeros(num_classes)}
    return {**variables, "params": {**variables["params"], "head": head}}


def load(path: str | Path) -> dict[str, Any]:
    """The variables in a file of `save`, or in a checkpoint of a run of `imagenet_resnet`, as float32 on the host.

    The digest of a checkpoint is not looked at: `research.training.checkpoint` does that.

    Raises:
      CarouselError: the file cannot be read or does not hold all variables of one ResNet v1.
    """
    return unflatten_dict(_our_arrays(read(path), path), sep="/")


def save(path: str | Path, variables: Any) -> None:
    """Writes variables in our format, in one move; equal variables give equal files.

    Raises:
      CarouselError: these are not all variables of one ResNet v1, or the file cannot be written.
    """
    flat = _our_arrays(_flat(variables), "the variables")
    content = {"format": FORMAT, "depth": _our_depth(flat, path), "num_classes": _classes(flat)}
    _write(path, flat, {"carousel": json.dumps(content)})  # one key: safetensors writes several in random order


def read(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file.

    Raises:
      CarouselError: it cannot be read, is a pickle or another kind of file, is damaged, or holds an unknown type.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CarouselError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    if data[8:9] != b"{":  # a safetensors file begins with 8 bytes of length, then JSON
        if data.startswith(_PICKLES):
            cure = "convert it to safetensors by the two lines that --help shows"
            raise CarouselError(f"{path} is a pickle, which may run any code when opened, so it was not; {cure}")
        raise CarouselError(f"{path} is not a safetensors file: fetch it again, or give another")
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise CarouselError(f"{path} is damaged ({one_line(error)}): get it again") from error
    arrays = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise CarouselError(f"{path}: tensor {name!r} has type {entry['dtype']}: give float32 weights")
        arrays[name] = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def _flat(variables: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}


def _our_arrays(arrays: Arrays, source: str | Path, depth: int | None = None) -> dict[str, np.ndarray]:
    """All arrays of one network by our names, if that is what these are."""
    if any(name.startswith(_CHECKPOINT) for name in arrays):  # it holds the optimiser's state and the step besides
        names = [name for name in arrays if name.startswith(("params/", _CHECKPOINT))]
        arrays = {name.removeprefix(_CHECKPOINT): arrays[name] for name in names}
    depth = _our_depth(arrays, source) if depth is None else depth
    return _checked(arrays, _our_shapes(depth, _classes(arrays)), f"{source}, ResNet-{depth}", _OUR_CURE)


def _our_shapes(depth: int, num_classes: int) -> dict[str, tuple[int, ...]]:
    """What the model itself says that it holds."""
    model = imagenet_resnet(depth, num_classes=num_classes)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    return {name: leaf.shape for name, leaf in flatten_dict(variables, sep="/").items()}


def _their_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """What our array is called there, unit by unit."""
    _, module, *layer, leaf = name.split("/")
    leaf = _LEAVES[leaf]
    if not layer:
        return [f"{_STEM_AND_HEAD[module]}.{leaf}"]
    layer = _LAYERS.get(layer[0]) or layer[0].replace("norm", "bn")
    stage, place = module.removeprefix("stage").split("_")
    units = range(1, 1 + shape[0]) if place == "rest" else [0]
    return [f"layer{stage}.{unit}.{layer}.{leaf}" for unit in units]


def _unstacked(flat: Arrays) -> dict[str, np.ndarray]:
    """Our arrays by their names and in their layout, as views."""
    arrays = {}
    for name, array in flat.items():
        units = [_transposed(unit, _TO_OIHW) for unit in (array if "_rest/" in name else [array])]
        arrays.update(zip(_their_names(name, array.shape), units, strict=True))
    return arrays


def _transposed(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return array.transpose(axes) if array.ndim == 4 else array.T


def _classes(arrays: Arrays) -> int:
    """Outputs of the classifier; where it is missing, what the error about that will expect."""
    head = arrays["fc.weight"].T if "fc.weight" in arrays else arrays.get("params/head/kernel", np.zeros(0))
    return sum(head.shape[-1:]) if head.size else 1000


def _their_depth(arrays: Arrays, source: str | Path) -> int:
    found = [match for name in arrays if (match := re.match(r"(layer\d+\.\d+)\.(conv\d)\.", name))]
    return _depth(len({match[1] for match in found}), len({match[2] for match in found}), source, _THEIR_CURE)


def _our_depth(arrays: Arrays, source: str | Path) -> int:
    found = [match for name in arrays if (match := re.fullmatch(r"params/(stage\d+_\w+)/(conv\d)/kernel", name))]
    units = {match[1]: sum(arrays[match[0]].shape[:1]) if "_rest/" in match[0] else 1 for match in found}
    return _depth(sum(units.values()), len({match[2] for match in found}), source, _OUR_CURE)


def _depth(units: int, convolutions: int, source: str | Path, cure: str) -> int:
    """The layers with weights: those of the units, the stem and the classifier."""
    depth = units * convolutions + 2
    if depth not in IMAGENET_DEPTHS:
        known = ", ".join(map(str, IMAGENET_DEPTHS))
        raise CarouselError(f"{source} has {units} units of {convolutions} convolutions, no ResNet-{known}; {cure}")
    return depth


def _checked(arrays: Arrays, expected: Mapping[str, tuple[int, ...]], source: str, cure: str) -> dict[str, np.ndarray]:
    """The arrays as float32, if they are the expected ones."""
    types = (np.float32, *_HALVES)
    good = {name for name, array in arrays.items() if array.shape == expected.get(name) and array.dtype in types}
    if odd := sorted((arrays.keys() | expected.keys()) - good):
        name, more = odd[0], f" (and {len(odd) - 1} more such tensors)" if odd[1:] else ""
        wanted = f"float32 {list(expected[name])}" if name in expected else "none"
        found = f"{arrays[name].dtype} {list(arrays[name].shape)}" if name in arrays else "none"
        raise CarouselError(f"{source}: tensor {name!r}: expected {wanted}, found {found}{more}; {cure}")
    return {name: arrays[name].astype(np.float32, order="C", copy=False) for name in expected}


def _write(path: str | Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    data = safetensors.numpy.save(dict(arrays), metadata)  # as they lie in memory: they must be contiguous, and are
    try:
        make_folder(Path(path).parent)
        write_atomic(path, data)
    except OSError as error:
        raise CarouselError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def _convert(direction: str, source: str, destination: str) -> str:
    """Does what the command line says; returns the line to print."""
    if os.path.realpath(source) == os.path.realpath(destination):
        raise UsageError(f"{destination} is the source itself: choose another place for the result")
    arrays = read(source)
    if direction == "import":
        flat = _flat(from_torchvision(arrays, source=source))
        save(destination, unflatten_dict(flat, sep="/"))
    else:
        flat = _our_arrays(arrays, source)
        _write(destination, to_torchvision(unflatten_dict(flat, sep="/")), {"format": "pt"})  # as others mark theirs
    parameters = sum(array.size for name, array in flat.items() if name.startswith("params/"))
    widened = sorted({str(array.dtype) for array in arrays.values() if array.dtype in _HALVES})
    note = f", from {' and '.join(widened)} to float32" if widened else ""
    network = f"ResNet-{_our_depth(flat, source)}, {parameters:,} parameters, {_classes(flat):,} classes"
    return f"wrote {destination}: {network}{note}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m research.models.weights", description=__doc__, formatter_class=raw)
    parser.add_argument("direction", choices=("import", "export"), help="from torchvision's and timm's names, or to")
    parser.add_argument("source", metavar="SOURCE", help="a safetensors file; for export, ours or a run's checkpoint")
    parser.add_argument("destination", metavar="DEST", help="the file to write, replaced in one move if it is there")
    arguments = parser.parse_args(argv)
    try:
        print(_convert(arguments.direction, arguments.source, arguments.destination))
    except CarouselError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
