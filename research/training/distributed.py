"""One training over several processes: who writes, and how all of them come to the same decisions.

Every process runs the same code on the same configuration and holds some of the devices. Process 0 is the writer: what
it finds on its disk decides for all, so no file system need be shared. All functions here but `start` and `leave` are
for one process too, where they do nothing.

On the CPU, messages go by Gloo. It waits for a late process: a step for at least 100 s (jaxlib 0.10.2 and 0.12.0; only
reduce-scatter, which nothing here uses, gives up after 30 s in 0.10.2). A process that is gone, or whose heartbeat is
missing for `HEARTBEAT` seconds, ends the others: their next message fails, or the runtime aborts them.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from research.errors import CarouselError, Lost, one_line

HEARTBEAT = 10
"""Seconds without a sign of life after which a process counts as lost."""


# What a message to a process that is gone ends in: Gloo's, NCCL's and the coordinator's words.
_LOST = re.compile(r"Gloo|NCCL|coordination|CoordinationService|heartbeat|DEADLINE_EXCEEDED|UNAVAILABLE")


def start(coordinator: str, processes: int, process: int, timeout: int = 300) -> None:
    """Joins the other processes; before the first use of a device.

    Args:
      coordinator: `host:port` on which process 0 listens.
      processes: how many there are.
      process: which one this is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      Lost: not all of them came.
      CarouselError: process 0 cannot listen there.
    """
    # That service would take SIGTERM for itself, which asks for a checkpoint here.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            # On a cluster too, processes take the devices that they see: a second division would leave some with none.
            cluster_detection_method="deactivate",
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except RuntimeError as error:
        if "bind" in str(error) or "UNKNOWN" in str(error):
            raise CarouselError(
                f"process 0 cannot listen on {coordinator}: {line(error)}; choose another port"
            ) from error
        raise Lost(f"the processes did not meet at {coordinator}: {line(error)}") from error
    try:
        any_of(False)
    except Exception as error:
        if not is_loss(error):
            raise
        raise Lost(
            f"the processes cannot reach each other ({line(error)}): on every host its name, as hostname prints it, "
            "has to stand for an address that the others reach"
        ) from error


def leave() -> None:
    """Waits until every process has come here, then parts from them; devices of this process can still be used."""
    any_of(False)  # the parting itself waits for a few seconds only
    jax.distributed.shutdown()


def is_loss(error: BaseException) -> bool:
    """Whether an exception tells that another process is gone."""
    return isinstance(error, Lost) or (isinstance(error, RuntimeError | ValueError) and bool(_LOST.search(str(error))))


def line(error: BaseException) -> str:
    """What an error of JAX's runtime says, in one line; some say pages."""
    return one_line(error)[:300]


def is_writer() -> bool:
    """Whether this process writes files and shows progress; also after `leave`."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process; the same answer in all."""
    if not jax.distributed.is_initialized():
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def from_writer(function: Callable[[], Any]) -> Any:
    """What the function, which only the writer calls, returns there: something that JSON holds."""
    if not jax.distributed.is_initialized():
        return function()
    content = json.dumps(function()).encode() if is_writer() else b""
    size = int.from_bytes(_broadcast(len(content).to_bytes(8, "little")), "little")
    # Padded to a power of two, since every size is a program of its own.
    return json.loads(_broadcast(content.ljust(1 << size.bit_length(), b"\0"))[:size])


def arrays_from_writer(tree: Any) -> Any:
    """The writer's arrays, to the bit, in every process.

    Args:
      tree: of arrays on the host; of the same structure, shapes and types in all processes.
    """
    if not jax.distributed.is_initialized():
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [np.asarray(leaf) for leaf in leaves]
    content, at, received = _broadcast(b"".join(leaf.tobytes() for leaf in leaves)), 0, []
    for leaf in leaves:
        received.append(np.frombuffer(content, leaf.dtype, leaf.size, at).reshape(leaf.shape))
        at += leaf.nbytes
    return treedef.unflatten(received)


def _broadcast(content: bytes) -> bytes:
    """The writer's bytes; equally many in all processes. Not as numbers: the sum with zeros changes minus zero."""
    return np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(content, np.uint8))).tobytes()
