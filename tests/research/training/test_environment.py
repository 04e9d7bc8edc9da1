"""What a run records about where it ran, and which of it is said to decide the bits."""

import copy
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import zlib

import jax
import jaxlib
import numpy as np
import pytest

from research.training import environment, run_folder

X86 = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\nflags\t\t: avx2\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp {flags}\nCPU implementer\t: 0x41\n\n"


@pytest.fixture(scope="module")
def here():
    return environment.describe(["python", "-m", "experiments.depth", "--name=a b"], {"mnist": "ab12"})


def cpu(tmp_path, text, flags):
    path = tmp_path / "cpuinfo"
    path.write_text(text.format(flags=flags))
    return path


def test_what_is_described(here, tmp_path):
    assert here["versions"]["jax"] == jax.__version__ and here["versions"]["numpy"] == np.__version__
    assert all(here["versions"][name] for name in ("python", "jaxlib", "flax", "optax", "chex"))
    assert here["devices"]["count"] == jax.device_count()
    assert here["devices"]["kinds"] == [jax.devices()[0].device_kind]
    assert here["command"] == "python -m experiments.depth '--name=a b'"
    assert here["data_checksums"] == {"mnist": "ab12"}
    assert here["cpu"]["usable_cores"] >= 1
    started = datetime.datetime.fromisoformat(here["started_utc"])
    assert started.utcoffset() == datetime.timedelta(0)
    assert abs(datetime.datetime.now(datetime.UTC) - started) < datetime.timedelta(minutes=5)
    run_folder.write_json_atomic(tmp_path / "environment.json", here)
    assert run_folder.read_json(tmp_path / "environment.json") == here


def test_variables_are_taken_from_the_process(monkeypatch):
    monkeypatch.setenv("NPROC", "16")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    found = environment.describe([], {})
    assert found["variables"] == {"NPROC": "16", "XLA_FLAGS": "--xla_dump_to=x"}
    key = environment.reproducibility_key(found)
    assert (key["threads"], key["XLA_FLAGS"]) == ("16", "--xla_dump_to=x")


def test_a_missing_package_is_none():
    assert environment._version("no-such-package-anywhere") is None


@pytest.mark.parametrize(
    ("place", "value", "shown"),
    [
        (("versions", "jax"), "0.9", 'jax: "{old}" -> "0.9"'),
        (("versions", "jaxlib"), "0.9", 'jaxlib: "{old}" -> "0.9"'),
        (("versions", "flax"), "0.9", 'flax: "{old}" -> "0.9"'),
        (("versions", "optax"), "0.9", 'optax: "{old}" -> "0.9"'),
        (("versions", "numpy"), "0.9", 'numpy: "{old}" -> "0.9"'),
        (("variables", "NPROC"), "999", 'threads: "{threads}" -> "999"'),
        (("variables", "XLA_FLAGS"), "--xla_a=1", 'XLA_FLAGS: "{flags}" -> "--xla_a=1"'),
        (("devices", "count"), 1000, "devices.count: {old} -> 1000"),
        (("devices", "kinds"), ["TPU"], 'devices.kinds: ["{old[0]}"] -> ["TPU"]'),
        (("cpu", "instruction_set"), "mips", 'instruction_set: "{old}" -> "mips"'),
        (("cpu", "model"), "Z80", 'cpu_model: "{old}" -> "Z80"'),
        (("jax_options", "jax_enable_x64"), "odd", 'jax_options.jax_enable_x64: {x64} -> "odd"'),
    ],
)
def test_what_decides_the_bits_is_reported_as_a_difference(here, place, value, shown):
    new = copy.deepcopy(here)
    new[place[0]][place[1]] = value
    key = environment.reproducibility_key(here)
    facts = {"threads": key["threads"], "flags": key["XLA_FLAGS"], "x64": json.dumps(jax.config.jax_enable_x64)}
    assert environment.differences(here, new) == [shown.format(old=here[place[0]][place[1]], **facts)]


def test_what_does_not_decide_the_bits_is_not_reported(here):
    new = copy.deepcopy(here)
    new |= {"hostname": "other", "command": "other", "started_utc": "other", "system": "other", "source": None}
    new["versions"] |= {"python": "4.0", "chex": "9"}
    new["variables"]["NPROC"] = environment.reproducibility_key(here)["threads"]  # pinned to what it was anyway
    assert environment.differences(here, new) == []
    assert environment.differences({}, new)  # an old record that lacks everything is not taken for equal


def test_the_instruction_set_ignores_the_kernel_and_sees_the_compiler(tmp_path):
    base = environment.isa(cpu(tmp_path, X86, "sse2 avx2 fma"))
    assert base.startswith(f"{platform.machine()}-avx2-")
    assert environment.isa(cpu(tmp_path, X86, "fma avx2 sse2 retbleed_new_flag cpuid hypervisor")) == base
    others = {environment.isa(cpu(tmp_path, X86, flags)) for flags in ("sse2 avx2", "sse2 avx2 fma avx512f", "sse2")}
    assert len(others | {base}) == 4


def test_the_instruction_set_of_other_machines(tmp_path):
    plain, vector = (environment.isa(cpu(tmp_path, ARM, flags)) for flags in ("asimd", "asimd sve"))
    assert "-asimd-" in plain and "-sve-" in vector and plain != vector
    assert environment.isa(tmp_path / "absent").startswith(f"{platform.machine()}-generic-")
    assert environment._cpu_model(cpu(tmp_path, X86, "")) == "Some CPU"
    assert environment._cpu_model(tmp_path / "absent")


def test_the_cache_folder_is_named_after_what_compiled_programs_depend_on(tmp_path, monkeypatch):
    folder = environment.compilation_cache_dir(tmp_path)
    assert folder.parent == tmp_path and not folder.exists()
    assert folder.name == f"jax-{jax.__version__}-jaxlib-{jaxlib.__version__}-{environment.isa()}"
    monkeypatch.setattr(environment, "isa", lambda: "other")
    assert environment.compilation_cache_dir(tmp_path) != folder


def test_compiled_programs_that_are_not_whole_are_removed(tmp_path):
    whole = zlib.compress(os.urandom(20_000))
    flipped = bytearray(whole)
    flipped[10_000] ^= 1
    contents = {"whole": whole, "short": whole[:-1], "half": whole[:9_000], "flipped": bytes(flipped), "empty": b""}
    contents |= {"zstandard": b"\x28\xb5\x2f\xfd" + whole[:100]}
    for name, content in contents.items():
        (tmp_path / f"{name}-cache").write_bytes(content)
    (tmp_path / "empty").touch()
    environment._remove_torn(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"whole-cache", "zstandard-cache", "empty"}


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_source_state_follows_the_checkout(tmp_path, monkeypatch):
    unknown = {"commit": None, "dirty": None}
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert environment.source_state(tmp_path) == unknown
    git("init", "--quiet")
    assert environment.source_state(tmp_path) == unknown  # nothing is committed
    (tmp_path / "research").mkdir()
    (tmp_path / "research" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "--quiet", "--message=a")
    clean = {"commit": git("rev-parse", "HEAD"), "dirty": False}
    assert environment.source_state(tmp_path) == clean
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "result.json").write_text("{}")  # not code
    assert environment.source_state(tmp_path) == clean
    assert environment.source_state(tmp_path / "research") == unknown  # inside a checkout, not one itself
    (tmp_path / "research" / "new.py").write_text("")
    assert environment.source_state(tmp_path) == clean | {"dirty": True}
    (tmp_path / "research" / "new.py").unlink()
    (tmp_path / "research" / "a.py").write_text("2")
    assert environment.source_state(tmp_path) == clean | {"dirty": True}
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "absent"))  # as in a git hook
    assert environment.source_state(tmp_path) == clean | {"dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.source_state(tmp_path) == unknown


def test_naming_the_cache_folder_starts_no_backend():
    # The launcher sets the number of devices after this and before the first use of JAX.
    script = "from research.training import environment as e; e.compilation_cache_dir('x')\nimport jax\n"
    script += "jax.config.update('jax_platforms', 'cpu'); jax.config.update('jax_num_cpu_devices', 3)\n"
    script += "print(e.describe([], {})['devices']['count'])"
    variables = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    variables["PYTHONPATH"] = str(environment._ROOT)
    result = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "3", result.stderr


def test_a_record_warns_where_a_run_that_goes_on_may_change_its_bits(tmp_path, monkeypatch):
    log = []
    monkeypatch.setenv("NPROC", "8")
    for _ in range(2):
        environment.record(tmp_path, ["a"], {"mnist": "1"}, log.append)
    assert not log
    monkeypatch.setenv("NPROC", "16")
    environment.record(tmp_path, ["a"], {"mnist": "2"}, log.append)
    assert len(log) == 2 and all(str(tmp_path) in line and "\n" not in line for line in log)
    assert "data files" in log[0] and 'threads: "8" -> "16"' in log[1]
    assert run_folder.read_json(tmp_path / "environment.json")["variables"]["NPROC"] == "16"


def test_a_record_warns_where_other_code_goes_on(tmp_path, monkeypatch):
    path, log = tmp_path / "environment.json", []

    def sitting(**source):
        monkeypatch.setattr(environment, "source_state", lambda root: {"commit": "ab" * 20, "dirty": False} | source)
        environment.record(tmp_path, ["a"], {}, log.append)
        found = list(log)
        log.clear()
        return found

    assert not sitting()
    assert not sitting(commit="cd" * 20, dirty=True)  # the files that results come from are the same
    monkeypatch.setattr(environment, "source_digest", lambda root: "0" * 64)
    (line,) = sitting()
    assert str(tmp_path) in line and "may not give the bits" in line
    assert line.endswith("code: commit cdcdcdcdcdcd with changes -> abababababab")

    def without_digest(**source):
        path.write_text(json.dumps(environment.describe([], {}) | {"source": {"commit": "ab" * 20} | source}))

    # Records of before there were digests.
    without_digest(dirty=False)
    assert not sitting()
    without_digest(dirty=True)
    assert len(sitting()) == 1
    without_digest(dirty=False)
    assert len(sitting(dirty=True)) == 1
    without_digest(dirty=False)
    assert len(sitting(commit="cd" * 20)) == 1


def test_a_lost_or_damaged_record_is_said_and_written_again(tmp_path):
    path, log = tmp_path / "environment.json", []
    environment.record(tmp_path, ["a"], {}, log.append)
    assert not log
    (tmp_path / "checkpoints").mkdir()
    for damage in (path.unlink, lambda: path.write_text('{"versions": '), lambda: path.write_text("[]")):
        damage()
        environment.record(tmp_path, ["a"], {}, log.append)
        (line,) = log
        assert str(tmp_path) in line and "environment.json" in line and "missing or damaged" in line
        log.clear()
        assert run_folder.read_environment(tmp_path)["format"] == run_folder.FORMAT


def test_the_digest_of_the_source_sees_every_change_of_code(tmp_path):
    (tmp_path / "research").mkdir()
    (tmp_path / "research" / "a.py").write_text("1")
    digests = [environment.source_digest(tmp_path)]
    (tmp_path / "research" / "notes.txt").write_text("not code")
    assert environment.source_digest(tmp_path) == digests[0]
    for change in (
        lambda: (tmp_path / "research" / "a.py").write_text("2"),
        lambda: (tmp_path / "research" / "b.py").write_text(""),
        lambda: (tmp_path / "research" / "b.py").rename(tmp_path / "research" / "c.py"),
    ):
        change()
        digests.append(environment.source_digest(tmp_path))
    assert len(set(digests)) == 4
