"""In what precision a run computes: one flag, what it means to networks, and to products of matrices and convolutions.

    float32     everything; products too, where a GPU would take TF32 unasked
    tf32        products read operands of 10 bits after the point in place of 23: NVIDIA GPUs from Ampere on
    bfloat16    activations, and the operands of products, have 7 bits after the point

Parameters, the optimiser's state, BatchNorm's statistics, states carried through time, logits, losses and what
checkpoints hold are float32 in all three. A network is evaluated and looked into as it was trained.
"""

import contextlib
import re
from collections.abc import Mapping
from typing import Any

from experiments.options import option
from research.errors import CarouselError

DEFAULT = "float32"


def field() -> Any:
    """The field `precision` of a Config, and of its cells; a cell without such a field computes as JAX does unasked."""
    help_text = "Of activations and products; parameters, optimiser, statistics and losses are float32 in all."
    return option(DEFAULT, help_text, choices=(DEFAULT, "bfloat16", "tf32"), implied=True)


def dtype(cell: Any) -> Any:
    """What a network of the cell is given as its `dtype`; None for float32."""
    import jax.numpy as jnp

    return jnp.bfloat16 if getattr(cell, "precision", DEFAULT) == "bfloat16" else None


def check(cell: Any) -> None:
    """Whether this machine computes so.

    Raises:
      CarouselError: it has no TF32, and would take float32 without a word.
    """
    if getattr(cell, "precision", DEFAULT) != "tf32":
        return
    import jax

    device = jax.devices()[0]
    if not has_tf32(device):
        cure = "give float32 or bfloat16"
        raise CarouselError(
            f"--precision=tf32: NVIDIA GPUs from Ampere on have it, this is {device.device_kind}; {cure}"
        )


def has_tf32(device: Any) -> bool:
    """Whether it is an NVIDIA GPU of compute capability 8.0 or more; AMD's capability is a name such as gfx90a."""
    version = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))
    return device.platform == "gpu" and version is not None and int(version[1]) >= 8


def products(cell: Any) -> contextlib.AbstractContextManager:
    """A context within which products of float32 arrays are what the cell asks for, whatever the accelerator's habit.

    On the CPU they are full float32 anyway; it sets nothing there, so that programs and their record stay as they were.
    """
    import jax

    asked = getattr(cell, "precision", None)
    if asked is None or jax.default_backend() == "cpu":
        return contextlib.nullcontext()
    return jax.default_matmul_precision("tensorfloat32" if asked == "tf32" else "highest")


def suffix(cell: Any) -> str:
    """What the name of a cell ends with, so that runs of two precisions are two: nothing for the default."""
    return "" if cell.precision == DEFAULT else f"-{cell.precision}"


def column(config: Mapping[str, Any]) -> dict[str, str]:
    """Of a run's configuration: its precision as a column of `summary.csv`, nothing for the default."""
    return {"precision": config["precision"]} if "precision" in config else {}


def title(config: Mapping[str, Any]) -> str:
    """What the title of a table says of the runs, all of one precision: nothing for the default."""
    return f", in {config['precision']}" if "precision" in config else ""
