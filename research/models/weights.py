"""Weights of ResNet v1 in and out, without pickle: `python -m research.models.weights import|export SOURCE DEST`.

`import` reads safetensors in the names that torchvision and timm share (resnet18, 34, 50, 101, 152 and timm's 200) and
writes ours; `export` goes the other way, from our weights or from a checkpoint of a run. Both print one line. Exit code
0, 1 for a file that cannot be used, 2 for a wrong command line.

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
import math
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

from research.errors import CarouselError, UsageError
from research.files import make_folder, write_atomic
from research.models.resnet_tables import IMAGENET_DEPTHS, imagenet_resnet
from research.ops import initializers

FORMAT = "weights 1"

Arrays = Mapping[str, np.ndarray]

_STEM_AND_HEAD = {"stem_conv": "conv1", "stem_norm": "bn1", "head": "fc"}
_LAYERS = {"projection": "downsample.0", "projection_norm": "downsample.1"}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_COUNTER = "num_batches_tracked"
_COLLECTIONS = "collections/"  # where a run's checkpoint has batch_stats
_STAGES = range(1, 5)

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # PyTorch's archive of pickles; a pickle itself
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
}
_WIDENED = (_DTYPES["F16"], _DTYPES["BF16"])

_THEIR_CURE = "give all weights of a plain ResNet v1 of torchvision or timm: no ResNeXt, wide, SE, 'd' or v2 network"
_OUR_CURE = "give all variables of imagenet_resnet(depth): residual, v1, option B, one group, no SE"


def to_torchvision(variables: Any, depth: int | None = None, source: str = "the variables") -> dict[str, np.ndarray]:
    """Our variables as what `state_dict()` of torchvision's ResNet of this depth holds, name by name.

    Args:
      variables: `params` and `batch_stats` of `imagenet_resnet(depth)`.
      depth: of the network; found from names and shapes when None.
      source: what to call the variables in an error.

    Returns:
      Contiguous float32 arrays, and int64 zeros for the counters `num_batches_tracked`.

    Raises:
      UsageError: there is no network of this depth.
      CarouselError: an array is missing, too many, or of another shape or type.
    """
    flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}
    depth = depth or _our_depth(flat, source)
    flat = _checked(flat, _our_shapes(depth, _classes(flat)), f"{source}, ResNet-{depth}", _OUR_CURE)
    arrays = {name: np.array(array, order="C") for name, array in _unstacked(flat).items()}
    means = [name for name in arrays if name.endswith("running_mean")]
    return arrays | {name.replace("running_mean", _COUNTER): np.zeros((), np.int64) for name in means}


def from_torchvision(arrays: Arrays, depth: int | None = None, source: str = "the arrays") -> dict[str, Any]:
    """The inverse of `to_torchvision`: variables `{"params": ..., "batch_stats": ...}` of `imagenet_resnet(depth)`.

    Args:
      arrays: by torchvision's names; counters `num_batches_tracked` may be there.
      depth: of the network; found from names when None.
      source: what to call the arrays in an error.

    Raises:
      UsageError: there is no network of this depth.
      CarouselError: an array is missing, too many, or of another shape or type.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items() if name.split(".")[-1] != _COUNTER}
    depth = depth or _their_depth(arrays, source)
    ours = _our_shapes(depth, _classes(arrays))
    # The same translation tells the shapes: of arrays that take no memory.
    expected = _unstacked({name: np.broadcast_to(np.float32(0), shape) for name, shape in ours.items()})
    expected = {name: array.shape for name, array in expected.items()}
    arrays = _checked(arrays, expected, f"{source}, ResNet-{depth}", _THEIR_CURE)
    flat = {}
    for name, shape in ours.items():
        units = [_our_layout(arrays[theirs]) for theirs in _their_names(name, shape)]
        flat[name] = np.array(units if _is_stacked(name) else units[0], order="C")
    return unflatten_dict(flat, sep="/")


def replace_head(variables: Any, num_classes: int, key: jax.Array) -> dict[str, Any]:
    """The variables with a new classifier for fine-tuning: He's normal weights, zero biases; the rest is shared.

    Args:
      variables: of a network; its head has a kernel `[features, classes]`.
      num_classes: outputs of the new head.
      key: a PRNG key.

    Raises:
      UsageError: fewer than one class.
    """
    if num_classes < 1:
        raise UsageError(f"num_classes {num_classes} is not a number of classes: give at least 1")
    features = variables["params"]["head"]["kernel"].shape[0]
    head = {"kernel": initializers.he_normal(key, (features, num_classes)), "bias": jnp.zeros(num_classes)}
    return {**variables, "params": {**variables["params"], "head": head}}


def load(path: str | Path) -> dict[str, Any]:
    """The variables in a file of `save`, or in a checkpoint of a run of `imagenet_resnet`, as float32 on the host.

    The digest of a checkpoint is not looked at: `research.training.checkpoint` does that.

    Raises:
      CarouselError: the file cannot be read or does not hold all variables of one ResNet v1.
    """
    return _our_variables(read(path), path)


def save(path: str | Path, variables: Any) -> None:
    """Writes variables in our format, in one move; equal variables give equal files.

    Raises:
      CarouselError: these are not all variables of one ResNet v1, or the file cannot be written.
    """
    flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}
    depth = _our_depth(flat, "the variables")
    flat = _checked(flat, _our_shapes(depth, _classes(flat)), f"the variables, ResNet-{depth}", _OUR_CURE)
    # One key only: safetensors writes metadata in random order.
    metadata = json.dumps({"format": FORMAT, "depth": depth, "num_classes": _classes(flat)})
    _write(path, flat, {"carousel": metadata})


def save_torchvision(path: str | Path, arrays: Arrays) -> None:
    """Writes what `to_torchvision` gave as safetensors, in one move.

    Raises:
      CarouselError: the file cannot be written.
    """
    _write(path, arrays, {"format": "pt"})  # by convention what Hugging Face's readers ask for


def read(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file, in memory of their own.

    Raises:
      CarouselError: it cannot be read, is a pickle (which is not opened), another kind of file, damaged, or holds a
        type that no weights have.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CarouselError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    if data[8:9] != b"{":  # every safetensors file: 8 bytes of length, then JSON
        if data.startswith(_PICKLE_STARTS) or path.suffix in _PICKLES:
            raise CarouselError(
                f"{path} is a pickle, which can run code when opened, so it is not; convert it to safetensors by the "
                "two lines in the help of this module"
            )
        raise CarouselError(f"{path} is not a safetensors file: give one, as torchvision's or timm's hosts offer them")
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise CarouselError(f"{path} is damaged ({' '.join(str(error).split())}): fetch or write it again") from error
    arrays = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise CarouselError(f"{path}: tensor {name} has type {entry['dtype']}: give one of float32")
        arrays[name] = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def _our_variables(arrays: Arrays, source: str | Path) -> dict[str, Any]:
    if any(name.startswith(_COLLECTIONS) for name in arrays):  # a checkpoint: optimiser state and step besides
        kept = {name: array for name, array in arrays.items() if name.startswith(("params/", _COLLECTIONS))}
        arrays = {name.removeprefix(_COLLECTIONS): array for name, array in kept.items()}
    depth = _our_depth(arrays, source)
    flat = _checked(arrays, _our_shapes(depth, _classes(arrays)), f"{source}, ResNet-{depth}", _OUR_CURE)
    return unflatten_dict(flat, sep="/")


def _our_shapes(depth: int, num_classes: int) -> dict[str, tuple[int, ...]]:
    """What the model itself says that it holds."""
    model = imagenet_resnet(depth, num_classes=num_classes)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    return {name: leaf.shape for name, leaf in flatten_dict(variables, sep="/").items()}


def _is_stacked(name: str) -> bool:
    return "_rest/" in name


def _their_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """What our array is called there, unit by unit."""
    _, module, *layer, leaf = name.split("/")
    leaf = _LEAVES[leaf]
    if not layer:
        return [f"{_STEM_AND_HEAD[module]}.{leaf}"]
    layer = _LAYERS.get(layer[0]) or layer[0].replace("norm", "bn")
    stage = module.removeprefix("stage").split("_")[0]
    units = range(1, 1 + shape[0]) if _is_stacked(name) else [0]
    return [f"layer{stage}.{unit}.{layer}.{leaf}" for unit in units]


def _unstacked(flat: Arrays) -> dict[str, np.ndarray]:
    """Our arrays by their names and in their layout, as views."""
    arrays = {}
    for name, array in flat.items():
        units = array if _is_stacked(name) else [array]
        arrays.update(zip(_their_names(name, array.shape), map(_their_layout, units), strict=True))
    return arrays


def _their_layout(array: np.ndarray) -> np.ndarray:
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _our_layout(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _classes(arrays: Arrays) -> int:
    """Outputs of the classifier; where there is none, the number in which the error will speak of it."""
    if "fc.weight" in arrays:
        return sum(arrays["fc.weight"].shape[:1]) or 1000
    head = arrays.get("params/head/kernel")
    return 1000 if head is None else sum(head.shape[-1:]) or 1000


def _their_depth(arrays: Arrays, source: str | Path) -> int:
    found = [re.match(r"layer(\d+)\.(\d+)\.(conv\d)\.", name) for name in arrays]
    found = {match.groups() for match in found if match}
    units = tuple(len({unit for stage, unit, _ in found if stage == str(number)}) for number in _STAGES)
    return _find_depth(units, len({convolution for _, _, convolution in found}), source, _THEIR_CURE)


def _our_depth(flat: Arrays, source: str | Path) -> int:
    shapes = {name: array.shape for name, array in flat.items()}
    kernels = [f"params/stage{number}_{{}}/conv1/kernel" for number in _STAGES]
    units = tuple((k.format("first") in shapes) + sum(shapes.get(k.format("rest"), ())[:1]) for k in kernels)
    layers = sum(f"params/stage1_first/conv{number}/kernel" in shapes for number in range(1, 4))
    return _find_depth(units, layers, source, _OUR_CURE)


def _find_depth(units: tuple[int, ...], layers: int, source: str | Path, cure: str) -> int:
    for depth in IMAGENET_DEPTHS:
        stages = imagenet_resnet(depth).stages
        if (units, layers) == (tuple(stage.units for stage in stages), len(stages[0].convolutions)):
            return depth
    described = f"{', '.join(map(str, units))} units of {layers} convolutions" if any(units) else "no units"
    known = ", ".join(map(str, IMAGENET_DEPTHS))
    raise CarouselError(f"{source} names {described} in its four stages, which is no ResNet of {known}; {cure}")


def _checked(
    arrays: Arrays, expected: Mapping[str, tuple[int, ...]], source: str, cure: str
) -> dict[str, np.ndarray]:
    """The arrays as float32, if they are the expected ones."""
    odd = [
        name
        for name in sorted(arrays.keys() | expected.keys())
        if name not in arrays
        or arrays[name].shape != expected.get(name)
        or arrays[name].dtype not in (np.float32, *_WIDENED)
    ]
    if odd:
        name, more = odd[0], f" (and {len(odd) - 1} more such tensors)" if odd[1:] else ""
        wanted = f"float32 {list(expected[name])}" if name in expected else "none"
        found = f"{arrays[name].dtype} {list(arrays[name].shape)}" if name in arrays else "none"
        raise CarouselError(f"{source}: tensor {name}: expected {wanted}, found {found}{more}; {cure}")
    return {name: arrays[name].astype(np.float32, order="C", copy=False) for name in expected}


def _write(path: str | Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    # safetensors takes the memory as it lies, so a transposed array would come back wrong without a word.
    data = safetensors.numpy.save({n: np.asarray(array, order="C") for n, array in arrays.items()}, metadata)
    try:
        make_folder(Path(path).parent)
        write_atomic(path, data)
    except OSError as error:
        reason = error.strerror or error
        raise CarouselError(f"cannot write {path}: {reason}; make room for it or choose another place") from error


def _convert(direction: str, source: str, destination: str) -> str:
    if os.path.realpath(source) == os.path.realpath(destination):
        raise UsageError(f"{destination} is the source itself: choose another place for the result")
    arrays = read(source)
    if direction == "import":
        variables = from_torchvision(arrays, source=source)
        save(destination, variables)
    else:
        variables = _our_variables(arrays, source)
        save_torchvision(destination, to_torchvision(variables, source=source))
    flat = flatten_dict(variables, sep="/")
    parameters = sum(math.prod(leaf.shape) for name, leaf in flat.items() if name.startswith("params/"))
    widened = sorted({str(array.dtype) for array in arrays.values() if array.dtype in _WIDENED})
    note = f", from {' and '.join(widened)} to float32" if widened else ""
    network = f"ResNet-{_our_depth(flat, source)}, {parameters:,} parameters, {_classes(flat):,} classes"
    return f"wrote {destination}: {network}{note}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m research.models.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
