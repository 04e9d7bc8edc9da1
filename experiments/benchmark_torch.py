"""The peers in PyTorch: the networks of `experiments.benchmark_workloads` with `torch.nn`, as one writes them there.

Convolutions run channels_last; `torch.nn.LSTM` and `GRU` are PyTorch's own; of a ConvLSTM, which it lacks, the
input-to-state convolution is one for all times. The networks are built from our tables and start from our weights, so
that a test can hold their losses against ours. torch.nn.LSTM and GRU have biases for both products, so 4 and 2 numbers
a unit more than ours.

Needs torch (extra `[bench]`); besides `experiments.benchmark_torch_start` nothing else in the repository imports it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from experiments.benchmark_timing import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Side

if TYPE_CHECKING:  # it imports JAX, without which `experiments.benchmark_torch_start` does
    from experiments.benchmark_workloads import Workload

Batch = dict[str, torch.Tensor]


def _conv(inputs: int, row: Any) -> nn.Conv2d:
    return nn.Conv2d(
        inputs, row.features, row.kernel, row.stride, padding=row.kernel // 2, groups=row.groups, bias=False
    )


class Classifier(nn.Module):
    """What networks on images share: preparation, `(x - 128) / 128` in NCHW, and cross-entropy."""

    def prepare(self, batch: Batch) -> torch.Tensor:
        return ((batch["images"].float() - 128) / 128).permute(0, 3, 1, 2)

    def loss(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(outputs, batch["labels"])


class Unit(nn.Module):
    """A residual unit, original or full pre-activation, with shortcut A or B."""

    def __init__(self, inputs: int, rows: Sequence[Any], preactivation: bool, option: str, activated: bool):
        super().__init__()
        self.preactivation, self.count = preactivation, len(rows)
        self.stride, features = max(row.stride for row in rows), rows[-1].features
        self.changes = self.stride != 1 or inputs != features
        self.new = features - inputs
        self.projection = None
        if self.changes and option == "B":
            self.projection = nn.Conv2d(inputs, features, 1, self.stride, bias=False)
            self.projection_norm = nn.Identity() if preactivation else nn.BatchNorm2d(features)
        for number, row in enumerate(rows, start=1):
            setattr(self, f"conv{number}", _conv(inputs, row))
            if not (preactivation and activated and number == 1):
                setattr(self, f"norm{number}", nn.BatchNorm2d(inputs if preactivation else row.features))
            inputs = row.features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = x
        for number in range(1, self.count + 1):
            norm = getattr(self, f"norm{number}", None)
            if self.preactivation and norm is not None:
                branch = F.relu(norm(branch))
            if self.preactivation and number == 1 and self.changes:
                x = branch
            branch = getattr(self, f"conv{number}")(branch)
            if not self.preactivation:
                branch = norm(branch)
                branch = branch if number == self.count else F.relu(branch)
        if self.projection is not None:
            x = self.projection_norm(self.projection(x))
        elif self.changes:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return x + branch if self.preactivation else F.relu(x + branch)


class ResNet(Classifier):
    """The network of one of our tables."""

    def __init__(self, work: Workload):
        super().__init__()
        table, units = work.model(), []
        preactivation, width = table.placement == "full_preactivation", table.stem[0].features
        self.stem_conv, self.stem_norm = _conv(work.arrays["images"].shape[-1], table.stem[0]), nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if table.pool else nn.Identity()
        for stage in table.stages:
            for rows in [stage.convolutions] + [stage.rest] * (stage.units - 1):
                units.append(Unit(width, rows, preactivation, table.option, activated=not units))
                width = rows[-1].features
        self.units = nn.Sequential(*units)
        self.final_norm = nn.BatchNorm2d(width) if preactivation else None
        self.head = nn.Linear(width, table.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.units(self.pool(F.relu(self.stem_norm(self.stem_conv(x)))))
        x = x if self.final_norm is None else F.relu(self.final_norm(x))
        return self.head(x.mean((2, 3)))

    def load(self, params: Mapping[str, Any]) -> None:
        from research.models.resnet import unstack_blocks

        _copy(self, {name: value for name, value in params.items() if not name.startswith("stage")})
        for unit, values in zip(self.units, unstack_blocks(params), strict=True):
            _copy(unit, values)


class LeNet5(Classifier):
    """See `research.models.lenet`."""

    def __init__(self, work: Workload):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.dense1, self.dense2, self.head = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.permute(0, 2, 3, 1).flatten(1)  # our order of features; a view of channels_last
        return self.head(F.relu(self.dense2(F.relu(self.dense1(x)))))

    def load(self, params: Mapping[str, Any]) -> None:
        _copy(self, params)


class LanguageModel(nn.Module):
    """An embedding, torch.nn.LSTM and a linear layer; states begin at zero."""

    def __init__(self, work: Workload):
        super().__init__()
        ours = work.model()
        self.embedding = nn.Embedding(ours.vocabulary, ours.embedding)
        self.lstm = nn.LSTM(ours.embedding, ours.features[0], num_layers=len(ours.features), batch_first=True)
        self.head = nn.Linear(ours.features[-1], ours.vocabulary)

    def prepare(self, batch: Batch) -> torch.Tensor:
        return batch["inputs"]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])

    def loss(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch["targets"].flatten())

    def load(self, params: Mapping[str, Any]) -> None:
        _copy(self, {name: params[name] for name in ("embedding", "head")})
        for layer in range(self.lstm.num_layers):
            _copy_recurrent(self.lstm, layer, params[f"layer{layer + 1}"])


class SequenceToOne(nn.Module):
    """torch.nn.LSTM or GRU, and a linear layer on the last output."""

    def __init__(self, work: Workload):
        super().__init__()
        ours = work.model()
        kind = nn.GRU if work.kind.endswith("gru") else nn.LSTM
        self.pixels = "images" in work.arrays
        self.recurrent = kind(1 if self.pixels else 2, ours.stack.features[0], batch_first=True)
        self.head = nn.Linear(ours.stack.features[0], ours.outputs)

    def prepare(self, batch: Batch) -> torch.Tensor:
        return batch["images"].flatten(1)[..., None].float() / 255 if self.pixels else batch["inputs"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.recurrent(x)[0][:, -1])

    def loss(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        if self.pixels:
            return F.cross_entropy(outputs, batch["labels"])
        return F.mse_loss(outputs[:, 0], batch["targets"])

    def load(self, params: Mapping[str, Any]) -> None:
        _copy(self, {"head": params["head"]})
        _copy_recurrent(self.recurrent, 0, params["stack"]["layer1"])


class ConvLSTM(nn.Module):
    """A layer with peepholes; sequences are `[time batch, channels, height, width]`, time by time."""

    def __init__(self, inputs: int | None, n: int, kernels: tuple[int, int]):
        super().__init__()
        self.input = nn.Conv2d(inputs, 4 * n, kernels[0], padding=kernels[0] // 2) if inputs else None
        self.bias = None if inputs else nn.Parameter(torch.zeros(4 * n))
        self.inner = nn.Conv2d(n, 4 * n, kernels[1], padding=kernels[1] // 2, bias=False)
        self.peepholes = nn.Parameter(torch.zeros(3, n))
        self.n = n

    def forward(self, x: torch.Tensor | None, state: Any, batch: int, time: int) -> tuple[Any, torch.Tensor]:
        if x is None:
            inputs = [self.bias[:, None, None]] * time
        else:
            inputs = self.input(x).split(batch)
        if state is None:
            zeros = x.new_zeros(batch, self.n, *x.shape[2:]).contiguous(memory_format=torch.channels_last)
            state = zeros, zeros
        (h, c), outputs = state, []
        at_input, at_forget, at_output = self.peepholes[:, :, None, None]
        for a in inputs:
            i, f, g, o = (a + self.inner(h)).chunk(4, dim=1)
            c = torch.sigmoid(f + at_forget * c) * c + torch.sigmoid(i + at_input * c) * torch.tanh(g)
            h = torch.sigmoid(o + at_output * c) * torch.tanh(c)
            outputs.append(h)
        return (h, c), torch.cat(outputs)

    def load(self, params: Mapping[str, Any]) -> None:
        bias = _with_forget_bias(params["bias"])
        if self.input is not None:
            _set(self.input.weight, np.transpose(params["input_kernel"], (3, 2, 0, 1)))
        _set(self.bias if self.input is None else self.input.bias, bias)
        _set(self.inner.weight, np.transpose(params["recurrent_kernel"], (3, 2, 0, 1)))
        _set(self.peepholes, np.stack([params[f"peephole_{gate}"] for gate in "ifo"]))


class EncoderForecaster(nn.Module):
    """See `research.models.forecaster`."""

    def __init__(self, work: Workload):
        super().__init__()
        ours = work.model()
        self.patch, self.horizon = ours.patch, ours.horizon
        self.observed = work.arrays["frames"].shape[1] - ours.horizon
        widths, channels = ours.features, ours.patch**2
        below = (channels, *widths[:-1])
        above = (*widths[1:], None)
        self.encoder = nn.ModuleList(ConvLSTM(i, n, ours.kernels) for i, n in zip(below, widths, strict=True))
        self.forecaster = nn.ModuleList(ConvLSTM(i, n, ours.kernels) for i, n in zip(above, widths, strict=True))
        self.prediction = nn.Conv2d(sum(widths), channels, 1)

    def prepare(self, batch: Batch) -> torch.Tensor:
        return batch["frames"][:, : self.observed].float() / 255

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (batch, time, height, width, _), s = x.shape, self.patch
        x = x.reshape(batch, time, height // s, s, width // s, s).permute(1, 0, 2, 4, 3, 5)
        x = x.reshape(time * batch, height // s, width // s, s * s).permute(0, 3, 1, 2)
        carries, states, y = [], [], None
        for layer in self.encoder:
            carry, x = layer(x, None, batch, time)
            carries.append(carry)
        for layer, carry in zip(reversed(self.forecaster), reversed(carries), strict=True):
            _, y = layer(y, carry, batch, self.horizon)
            states.append(y)
        y = self.prediction(torch.cat(states, dim=1)).permute(0, 2, 3, 1)
        y = y.reshape(self.horizon, batch, height // s, width // s, s, s).permute(1, 0, 2, 4, 3, 5)
        return y.reshape(batch, self.horizon, height, width, 1)

    def loss(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        truth = batch["frames"][:, self.observed :].float() / 255
        return F.binary_cross_entropy_with_logits(outputs, truth, reduction="sum") / len(truth)

    def load(self, params: Mapping[str, Any]) -> None:
        for kind, layers in (("encoder", self.encoder), ("forecaster", self.forecaster)):
            for number, layer in enumerate(layers, start=1):
                layer.load(params[f"{kind}{number}"])
        _set(self.prediction.weight, params["prediction"]["kernel"].T[:, :, None, None])
        _set(self.prediction.bias, params["prediction"]["bias"])


_NETWORKS = {
    "resnet": ResNet,
    "lenet": LeNet5,
    "language": LanguageModel,
    "pixel_lstm": SequenceToOne,
    "pixel_gru": SequenceToOne,
    "adding_lstm": SequenceToOne,
    "convlstm": EncoderForecaster,
}


def network(work: Workload, params: Mapping[str, Any]) -> nn.Module:
    """The workload's network with our parameters, channels_last."""
    made = _NETWORKS[work.kind](work)
    made.load(params)
    return made.to(memory_format=torch.channels_last)


def parameters(work: Workload) -> int:
    """How many the workload's network has; nothing is computed."""
    with torch.device("meta"):
        return sum(each.numel() for each in _NETWORKS[work.kind](work).parameters())


def side(
    work: Workload,
    mode: str,
    *,
    steps: int,
    threads: int,
    compiled: bool = False,
    learning_rate: float = LEARNING_RATE,
) -> Side:
    """The side in PyTorch, one step a call on `threads` threads; `compiled` by torch.compile."""
    torch.set_num_threads(threads)
    made = network(work, work.variables()["params"])
    forward = made
    if compiled:
        torch.compiler.reset()  # programs of an earlier workload count against its limit of recompilations
        forward = torch.compile(made)
    wide = {"inputs", "labels", "targets"}  # indices are int64 there
    arrays = {
        name: torch.from_numpy(array.astype(np.int64) if name in wide and array.dtype == np.int32 else array.copy())
        for name, array in work.arrays.items()
    }
    rows = [torch.from_numpy(row.astype(np.int64)) for row in work.rows(steps)]

    def infer():
        with torch.inference_mode():
            batch = {name: array[rows[0]] for name, array in arrays.items()}
            return forward(made.prepare(batch)).numpy()

    if mode == "inference":
        made.eval()
        return Side(infer, 1)
    options = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    optimizer, taken = torch.optim.SGD(made.parameters(), lr=learning_rate, **options), 0

    def train():
        nonlocal taken
        batch = {name: array[rows[taken % steps]] for name, array in arrays.items()}
        optimizer.zero_grad()
        loss = made.loss(forward(made.prepare(batch)), batch)
        loss.backward()
        optimizer.step()
        taken += 1
        return loss.item()

    return Side(train, 1)


def _set(parameter: torch.Tensor, value: Any) -> None:
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.array(value, np.float32)))


def _copy(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Our arrays into modules of the same names: kernels HWIO or [in, out], scales, biases, embeddings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            _copy(getattr(module, name), value)
        elif name == "kernel":
            _set(module.weight, np.transpose(value, (3, 2, 0, 1)) if value.ndim == 4 else value.T)
        else:
            _set(module.bias if name == "bias" else module.weight, value)


def _with_forget_bias(bias: Any) -> np.ndarray:
    """Gates i, f, g, o: 1 is added to f's, as our cell does."""
    return np.asarray(bias) + np.repeat([0.0, 1.0, 0.0, 0.0], len(bias) // 4)


def _copy_recurrent(module: nn.LSTM | nn.GRU, layer: int, params: Mapping[str, Any]) -> None:
    """Our layer into one of torch.nn.LSTM, or of GRU: gates r, z, n there, z, s, g here, and there 1 - z is our z."""
    w, u, bias = (np.asarray(params[name]) for name in ("input_kernel", "recurrent_kernel", "bias"))
    if isinstance(module, nn.GRU):
        n = module.hidden_size
        order, sign = np.r_[n : 2 * n, :n, 2 * n : 3 * n], np.repeat([1.0, -1.0, 1.0], n)
        w, u, bias = (array[..., order] * sign for array in (w, u, bias))
        second = np.concatenate([np.zeros(2 * n), params["reset_bias"]])
    else:
        bias, second = _with_forget_bias(bias), np.zeros_like(bias)
    values = {"weight_ih": w.T, "weight_hh": u.T, "bias_ih": bias, "bias_hh": second}
    for name, value in values.items():
        _set(getattr(module, f"{name}_l{layer}"), value)
