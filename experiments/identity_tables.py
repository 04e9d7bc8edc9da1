"""The rows of He et al. 2016, Tables 1 to 3: what each variant is in our terms, and the paper's numbers."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kind of unit.

    Attributes:
      label: for tables and figures.
      options: arguments of `research.models.cifar_resnet`.
    """

    label: str
    options: Mapping[str, Any]


VARIANTS = {
    "original": Variant("original", {}),
    # Table 1: on the shortcut, on F.
    "scale_0_1": Variant("scaling 0, 1 (plain)", {"join": "scale", "shortcut_scale": 0.0, "branch_scale": 1.0}),
    "scale_0.5_1": Variant("scaling 0.5, 1", {"join": "scale", "shortcut_scale": 0.5, "branch_scale": 1.0}),
    "scale_0.5_0.5": Variant("scaling 0.5, 0.5", {"join": "scale", "shortcut_scale": 0.5, "branch_scale": 0.5}),
    "exclusive_gate_0": Variant("exclusive gate, b = 0", {"join": "exclusive_gate", "gate_bias": 0.0}),
    "exclusive_gate_-6": Variant("exclusive gate, b = -6", {"join": "exclusive_gate", "gate_bias": -6.0}),
    "exclusive_gate_-7": Variant("exclusive gate, b = -7", {"join": "exclusive_gate", "gate_bias": -7.0}),
    "shortcut_gate_0": Variant("shortcut-only gate, b = 0", {"join": "shortcut_gate", "gate_bias": 0.0}),
    "shortcut_gate_-6": Variant("shortcut-only gate, b = -6", {"join": "shortcut_gate", "gate_bias": -6.0}),
    "conv_1x1": Variant("1x1 convolution", {"option": "C"}),
    "dropout": Variant("dropout 0.5", {"join": "dropout"}),
    # Table 2.
    "norm_after_addition": Variant("BN after addition", {"placement": "norm_after_addition"}),
    "relu_before_addition": Variant("ReLU before addition", {"placement": "relu_before_addition"}),
    "relu_only_preactivation": Variant("ReLU-only pre-activation", {"placement": "relu_only_preactivation"}),
    "full_preactivation": Variant("full pre-activation", {"placement": "full_preactivation"}),
}

FAIL = "fail"  # the paper's word for a test error above 20%

# Test error in percent on CIFAR-10 after 64,000 steps, medians of five runs: network -> variant -> error.
PAPER: Mapping[str, Mapping[str, float | str]] = {
    "basic-110": {
        "original": 6.61,
        "scale_0_1": FAIL,
        "scale_0.5_1": FAIL,
        "scale_0.5_0.5": 12.35,
        "exclusive_gate_0": FAIL,
        "exclusive_gate_-6": 8.70,
        "exclusive_gate_-7": 9.81,
        "shortcut_gate_0": 12.86,
        "shortcut_gate_-6": 6.91,
        "conv_1x1": 12.22,
        "dropout": FAIL,
        "norm_after_addition": 8.17,
        "relu_before_addition": 7.84,
        "relu_only_preactivation": 6.71,
        "full_preactivation": 6.37,
    },
    "bottleneck-164": {
        "original": 5.93,
        "norm_after_addition": 6.50,
        "relu_before_addition": 6.14,
        "relu_only_preactivation": 5.91,
        "full_preactivation": 5.46,
    },
    "single-110": {"original": 9.90, "full_preactivation": 8.91},
    "bottleneck-1001": {"original": 7.61, "full_preactivation": 4.92},
}

# The presets' grids.
TABLE1 = tuple(VARIANTS)[:11]
TABLE2 = ("original", *tuple(VARIANTS)[11:])
TABLE2_NETWORKS = ("basic-110", "bottleneck-164")
TABLE3 = ("original", "full_preactivation")
TABLE3_NETWORKS = ("single-110", "basic-110", "bottleneck-164", "bottleneck-1001")


def paper_network(network: str, variants: Iterable[str]) -> str:
    """The paper's network to put these runs beside: the same one where it has all the variants, or its ResNet-110."""
    return network if set(variants) <= PAPER.get(network, {}).keys() else "basic-110"


def paper_error(variant: str, reference: str) -> str:
    """Test error of one of the paper's networks, as printed there."""
    error = PAPER[reference][variant]
    return error if isinstance(error, str) else f"{error:.2f}%"
