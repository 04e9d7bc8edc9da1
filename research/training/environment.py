"""Where a run ran: what environment.json holds, and which part of it decides the bits of the results.

Measured on CPU: the same command gives the same bits in fresh processes, but another number of threads (`NPROC`),
another instruction set or another device count changes the bits of convolutions. Runs can be compared to the bit only
where `reproducibility_key` is equal.
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.extend import backend

from research.files import make_folder, write_json_atomic
from research.training.run_folder import CHECKPOINTS, ENVIRONMENT, FORMAT, differing_fields, read_environment

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "chex", "numpy")
_VARIABLES = ("NPROC", "XLA_FLAGS")
# Options of JAX that change results without a word, whether set in the environment or in code.
_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")
_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("research", "experiments", "launch", "pyproject.toml")
_CPUINFO = Path("/proc/cpuinfo")
# Of x86's flags those that a compiler may use. The others tell of the kernel, and change when it is updated.
_X86_INSTRUCTIONS = re.compile(
    r"(v?aes|abm|adx|amx|avx|bmi|f16c|fma|gfni|movbe|v?pclmul|pni|popcnt|sha_ni|s?sse|xop).*"
)
_LEVELS = ("avx512f", "avx2", "avx", "sse4_2", "sse2", "sve2", "sve", "asimd")


def describe(command: Sequence[str], data_checksums: Mapping[str, str]) -> dict[str, Any]:
    """Returns the content of environment.json; initialises JAX's backend.

    Args:
        command: What makes the run again, word by word; how this process was started is recorded besides (`argv`).
        data_checksums: What the readers of the data sets verified: name -> digest.
    """
    devices = jax.devices()
    return {
        "format": FORMAT,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
        "jax_options": {name: getattr(jax.config, name) for name in _OPTIONS},
        "devices": {
            "platform": devices[0].platform,
            "kinds": sorted({device.device_kind for device in devices}),
            "count": len(devices),
            "runtime": backend.get_backend().platform_version,
        },
        "processes": jax.process_count(),
        "cpu": {"model": _cpu_model(), "instruction_set": isa(), "usable_cores": usable_cores()},
        "system": platform.platform(),
        "hostname": socket.gethostname(),
        "source": source_state(_ROOT) | {"sha256": source_digest(_ROOT)},
        "command": shlex.join(command),
        "argv": shlex.join(sys.orig_argv),
        "data_checksums": dict(data_checksums),
        "started_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def reproducibility_key(environment: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of `describe`'s result within which the same command gives the same bits.

    The CPU's model is in it besides its instruction set, since numerical libraries choose block sizes by cache size.
    """
    versions, cpu = environment.get("versions", {}), environment.get("cpu", {})
    variables = environment.get("variables", {})
    return {
        **{name: versions.get(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        "threads": variables.get("NPROC") or str(cpu.get("usable_cores")),
        "XLA_FLAGS": variables.get("XLA_FLAGS") or "",
        "jax_options": environment.get("jax_options"),
        "devices": environment.get("devices"),
        "processes": environment.get("processes", 1),  # it came later than the first records
        "cpu_model": cpu.get("model"),
        "instruction_set": cpu.get("instruction_set"),
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns what differs between the keys of two environments, such as 'jax: "0.10.1" -> "0.10.2"'."""
    fields = differing_fields(reproducibility_key(old), reproducibility_key(new))
    return [f"{name}: {was} -> {now}" for name, was, now in fields]


def isa(cpuinfo: Path = _CPUINFO) -> str:
    """Returns the CPU's instruction set as a name for people and a hash for machines: 'x86_64-avx512f-1b2c3d4e'.

    Where there is no `cpuinfo` (other systems than Linux) the level is 'generic', and the hash stands for the CPU's
    name alone.
    """
    fields = _first_processor(cpuinfo)
    names = fields.get("flags", fields.get("Features", "")).split()
    if "flags" in fields:
        names = [name for name in names if _X86_INSTRUCTIONS.fullmatch(name)]
    level = next((name for name in _LEVELS if name in names), "generic")
    content = " ".join(sorted(set(names))) or platform.processor()
    return f"{platform.machine()}-{level}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def compilation_cache_dir(root: str | Path) -> Path:
    """Returns the folder for compiled programs that are valid for this JAX on this kind of CPU; does not make it.

    Programs compiled for one instruction set may crash on another, and homes are shared between unlike hosts.
    """
    return Path(root) / f"jax-{_version('jax')}-jaxlib-{_version('jaxlib')}-{isa()}"


def keep_compiled(root: Path, log: Callable[[str], None]) -> None:
    """Has JAX keep compiled programs below `root`; where that cannot be written, `log` is told and nothing is kept.

    Of several processes the writer keeps them, the others read them where they see its folder.
    """
    folder = compilation_cache_dir(root).absolute()  # for processes in other folders too
    if jax.distributed.is_initialized() and jax.process_index() != 0:
        if not folder.is_dir():
            return
    elif reason := _unwritable(folder):
        log(f"warning: {folder}: compiled programs are not kept ({reason}); see --compilation_cache")
        return
    else:
        _remove_torn(folder)
    # A program that does not fit on the disk is compiled again next time; what stops the run says so itself.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry", UserWarning)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _unwritable(folder: Path) -> str | None:
    """Why nothing can be written to a folder, which is made if need be; None where it can."""
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(4096))
            return None
    except OSError as error:
        return error.strerror


def _remove_torn(folder: Path) -> None:
    """Removes compiled programs that were cut off while they were written, or damaged since.

    JAX does not write them in one move. It compiles such a program again, but never replaces the file: each start would
    warn and be slow. They are zlib streams, which know their end and a checksum; another kind of file is left alone.
    """
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            if content[:1] in (b"", b"\x78") and not _whole(content):
                path.unlink()


def _whole(content: bytes) -> bool:
    stream = zlib.decompressobj()
    try:
        stream.decompress(content)
    except zlib.error:
        return False
    return stream.eof


def source_state(root: Path) -> dict[str, Any]:
    """Returns the git commit of the source tree at `root` and whether its code differs from it (new files count).

    Both are None where `root` itself is no git checkout, git is missing or nothing is committed yet.
    """
    unknown = {"commit": None, "dirty": None}
    # Git would answer for any repository that happens to lie around an installation.
    if not (root / ".git").exists():
        return unknown
    # In a git hook GIT_DIR points elsewhere; without GIT_OPTIONAL_LOCKS=0 a status may write to the repository.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), "status", "--porcelain=v2", "--branch", "--", *_SOURCES]
    try:
        answer = subprocess.run(
            command, env=variables | {"GIT_OPTIONAL_LOCKS": "0"}, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return unknown
    commit = re.search(r"^# branch\.oid ([0-9a-f]{40,})$", answer.stdout, re.MULTILINE)
    if answer.returncode or not commit:
        return unknown
    return {"commit": commit[1], "dirty": any(not line.startswith("#") for line in answer.stdout.splitlines())}


def source_digest(root: Path) -> str:
    """Returns a SHA-256 of the Python files below `root` that results come from; where there is no git, too."""
    digest = hashlib.sha256()
    for path in sorted(path for name in _SOURCES for path in (root / name).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _other_code(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """What to say where two sittings' sources are not known to be the same: 'commit abc -> def with changes'."""
    if old.get("sha256"):  # records had no digest at first
        same = old["sha256"] == new["sha256"]
    else:
        same = old.get("commit") == new["commit"] and not old.get("dirty") and not new["dirty"]
    shown = [f"{(s.get('commit') or 'unknown')[:12]}{' with changes' if s.get('dirty') else ''}" for s in (old, new)]
    return None if same else f"code: commit {' -> '.join(shown)}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def usable_cores() -> int | None:
    # A cluster or a container may give a process fewer cores than the machine has; os.cpu_count() does not see that.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def _cpu_model(cpuinfo: Path = _CPUINFO) -> str:
    return _first_processor(cpuinfo).get("model name") or platform.processor() or platform.machine()


def _first_processor(cpuinfo: Path) -> dict[str, str]:
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def record(folder: Path, command: Sequence[str], data_checksums: Mapping[str, str], log: Callable[[str], None]) -> None:
    """Writes environment.json of a run; warns where a run that goes on left the tuple within which bits are equal."""
    path, now = folder / ENVIRONMENT, describe(command, data_checksums)
    before, may_differ = read_environment(folder), "this sitting may not give the bits of the one before it"
    if before is not None:
        if before.get("data_checksums") != now["data_checksums"]:
            log(f"warning: {folder}: the data files are not those that the run began with")
        changed = differences(before, now)
        if other := _other_code(before.get("source") or {}, now["source"]):
            changed.append(other)
        if changed:
            log(f"warning: {folder}: {may_differ}: {'; '.join(changed)}")
    elif (folder / CHECKPOINTS).exists():
        log(f"warning: {folder}: {may_differ}, since {ENVIRONMENT}, which told where that was, is missing or damaged")
    write_json_atomic(path, now)
