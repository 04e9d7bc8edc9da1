"""What a machine has to share out among processes: cores and GPUs. Asks the system, not JAX, which would take them."""

import itertools
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence


def cores() -> list[int]:
    """The cores that this process may use; empty where the system does not bind processes to cores."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The NVIDIA GPUs that JAX would use, by the names that `CUDA_VISIBLE_DEVICES` takes."""
    if environment.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name not in ("", "-1", "NoDevFiles")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    answer = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True, timeout=60)
    return [str(number) for number, _ in enumerate(line for line in answer.stdout.splitlines() if "UUID" in line)]


def shares(things: Sequence, parts: int) -> list[list]:
    """Things in a row dealt to so many parts, as equally as can be; where there are fewer things, parts share them."""
    if not things:
        return [[] for _ in range(parts)]
    if len(things) < parts:
        return [[things[part % len(things)]] for part in range(parts)]
    bounds = [len(things) * part // parts for part in range(parts + 1)]
    return [list(things[first:last]) for first, last in itertools.pairwise(bounds)]
