"""The bootstrap script, without network: a small checkout of its own and, mostly, a fake environment.

A fake environment is a folder with a stamp that says it is finished and a `bin/python` that prints what it was given.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE_PYTHON = """#!/bin/sh
printf 'cwd=%s\\nNPROC=%s\\nPYTHONPATH=%s\\n' "$PWD" "$NPROC" "$PYTHONPATH"
for argument; do printf 'argument=%s\\n' "$argument"; done
exit "${FAKE_EXIT:-0}"
"""
# What the script needs beside a shell and Python, for a PATH that has these and no Python.
TOOLS = ("cat", "cksum", "dirname", "grep", "ls", "mkdir", "mv", "nproc", "rm", "sed", "tail", "tr")


@pytest.fixture
def checkout(tmp_path):
    """A checkout in a path with spaces: one experiment, one helper, no dependencies."""
    root = tmp_path / "a check out"
    (root / "launch").mkdir(parents=True)
    (root / "experiments").mkdir()
    shutil.copy(ROOT / "launch" / "run", root / "launch" / "run")
    for name in ("constraints-py311.txt", "constraints-py312.txt"):
        (root / "launch" / name).write_text("")
    (root / "pyproject.toml").write_text(
        '[project]\nname = "x"\ndependencies = []\n[project.optional-dependencies]\ntest = []\ndev = []\nmore = []\n'
    )
    (root / "experiments" / "depth.py").write_text('if __name__ == "__main__":\n    print("depth")\n')
    (root / "experiments" / "helper.py").write_text("x = 1\n")
    return root


@pytest.fixture
def run(checkout, tmp_path):
    """Calls launch/run of the small checkout in a clean environment."""

    def call(*arguments, cwd=tmp_path, **variables):
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CAROUSEL_PYTHON": sys.executable, **variables}
        env = {name: str(value) for name, value in env.items() if value is not None}
        command = [checkout / "launch" / "run", *arguments]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)

    return call


@pytest.fixture
def fake(run, tmp_path):
    """A fake finished environment, in a path with spaces."""
    folder = tmp_path / "fake environment"
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    (folder / "carousel-stamp").write_text(run("--print-stamp").stdout)
    return folder


@pytest.fixture
def tools(tmp_path):
    """A PATH without any Python."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for tool in TOOLS:
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return folder


def printed(result, field):
    return [line.partition("=")[2] for line in result.stdout.splitlines() if line.startswith(field + "=")]


def test_usage(run):
    without = run()
    assert (without.returncode, without.stdout) == (2, "")
    assert without.stderr.startswith("usage: launch/run EXPERIMENT")
    asked = run("--help")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, without.stderr, "")


@pytest.mark.parametrize("name", ["nope", "helper", "../experiments/depth", "depth.py", "", "--depth"])
def test_unknown_experiment_lists_the_known_ones(run, name):
    result = run(name)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert f"no experiment '{name}'" in line
    assert "there are: depth (" in line


def test_no_python(run, tools, checkout):
    result = run("depth", PATH=tools, CAROUSEL_PYTHON=None)
    assert result.returncode == 1
    assert (
        result.stderr == "launch/run: no Python 3.11 or newer found; install one or set CAROUSEL_PYTHON to its path\n"
    )
    assert not list(checkout.glob(".venv*"))


@pytest.mark.parametrize("named", ["no-such-python", "cat"])
def test_named_python_is_unsuitable(run, tools, named):
    result = run("depth", PATH=tools, CAROUSEL_PYTHON=named)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert f"CAROUSEL_PYTHON={named} " in line


def test_python3_that_is_too_old_is_passed_over(run, tools):
    (tools / "python3").symlink_to(shutil.which("true"))  # answers nothing, as a Python below 3.11 does
    assert run("--print-stamp", PATH=tools, CAROUSEL_PYTHON=None).returncode == 1
    (tools / "python3.12").symlink_to(sys.executable)
    result = run("--print-stamp", PATH=tools, CAROUSEL_PYTHON=None)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == f"python 3.{sys.version_info.minor}"
    assert result.stdout.splitlines()[-1] == f"for search:{tools}/python3"


def test_arguments_exit_code_and_folder_pass_through(run, fake, checkout, tmp_path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    result = run("depth", "--text=a b", "*", "", cwd=elsewhere, CAROUSEL_VENV=fake, FAKE_EXIT=75)
    assert (result.returncode, result.stderr) == (75, "")
    assert printed(result, "argument") == ["-m", "experiments.depth", "--text=a b", "*", ""]
    assert printed(result, "cwd") == [str(elsewhere)]
    assert printed(result, "PYTHONPATH") == [str(checkout)]


def test_relative_environment_and_link_to_the_script(run, fake, checkout, tmp_path):
    link = tmp_path / "carousel"
    link.symlink_to(checkout / "launch" / "run")
    env = {"PATH": os.environ["PATH"], "CAROUSEL_PYTHON": sys.executable, "CAROUSEL_VENV": fake.name}
    result = subprocess.run([link, "depth"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert printed(result, "PYTHONPATH") == [str(checkout)]


def test_other_commands(run, fake, checkout, tmp_path):
    result = run("tests", "-k", "a b", CAROUSEL_VENV=fake, FAKE_EXIT=5)
    assert (result.returncode, printed(result, "argument")) == (5, ["-m", "pytest", "-k", "a b"])
    assert printed(result, "cwd") == [str(checkout)]
    result = run("python", "-c", "1", CAROUSEL_VENV=fake)
    assert (printed(result, "argument"), printed(result, "cwd")) == (["-c", "1"], [str(tmp_path)])
    result = run("lint", CAROUSEL_VENV=fake)
    assert result.returncode == 0
    assert printed(result, "argument") == ["-m", "ruff", "check", ".", "-m", "ruff", "format", "--check", "."]
    assert run("lint", CAROUSEL_VENV=fake, FAKE_EXIT=1).returncode == 1
    assert run("install", CAROUSEL_VENV=fake).stdout == ""


@pytest.mark.parametrize(
    ("flags", "variables", "at_least"),
    [
        ([], {}, 1),
        (["--devices=1"], {}, 1),
        (["--devices=300"], {}, 1200),
        (["--devices", "300"], {}, 1200),
        (["--devices=300", "--devices=400"], {}, 1600),
        ([], {"JAX_NUM_CPU_DEVICES": "300"}, 1200),
        (["--devices=08"], {}, 1),
        (["--devices=many"], {}, 1),
        (["--devices="], {}, 1),
        (["--devices"], {}, 1),
    ],
)
def test_threads(run, fake, flags, variables, at_least):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    result = run("depth", *flags, CAROUSEL_VENV=fake, OMP_NUM_THREADS=3 * cores, **variables)
    assert result.returncode == 0, result.stderr
    assert printed(result, "NPROC") == [str(max(cores, at_least))]


def test_threads_given_by_the_user_stay(run, fake):
    assert printed(run("depth", "--devices=8", CAROUSEL_VENV=fake, NPROC=3), "NPROC") == ["3"]


@pytest.mark.parametrize("name", ["launch/constraints-py311.txt", "launch/constraints-py312.txt", "pyproject.toml"])
def test_stamp_follows_its_inputs(run, checkout, name):
    before = run("--print-stamp").stdout
    with open(checkout / name, "a") as file:
        file.write("# changed\n")
    used = "py311" if sys.version_info < (3, 12) else "py312"
    assert (run("--print-stamp").stdout != before) == (used in name or name == "pyproject.toml")


def test_a_folder_of_someone_else_is_left_alone(run, tmp_path):
    other = tmp_path / "other"
    (other / "lib").mkdir(parents=True)
    result = run("depth", CAROUSEL_VENV=other)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "did not make" in line
    assert [path.name for path in other.iterdir()] == ["lib"]


def test_failed_installation_says_why_and_leaves_no_stamp(run, checkout):
    (checkout / "pyproject.toml").write_text('[project]\ndependencies = ["no-such-package-anywhere"]\n')
    result = run("depth", CAROUSEL_EXTRAS="", PIP_NO_INDEX=1, PIP_CONFIG_FILE=os.devnull)
    assert result.returncode == 1
    assert "no-such-package-anywhere" in result.stderr
    assert "give the same command again" in result.stderr.splitlines()[-1]
    assert not list(checkout.glob(".venv-*/carousel-stamp"))


def test_two_first_calls_at_once_then_repair(run, checkout, tmp_path):
    """With no dependencies an installation is real (venv, pip, lock, stamp) and needs no network."""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CAROUSEL_PYTHON": sys.executable}
    env |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    command = [checkout / "launch" / "run", "depth"]
    both = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [(process.returncode, out) for process, (out, _) in zip(both, outputs, strict=True)] == [(0, "depth\n")] * 2
    assert sum("installing packages" in err for _, err in outputs) == 1

    (venv,) = checkout.glob(".venv-*")
    again = run("depth")
    assert (again.stdout, again.stderr) == ("depth\n", "")

    # Another way of naming the same Python is remembered without installing.
    named = os.path.join(os.path.dirname(sys.executable), "..", "bin", os.path.basename(sys.executable))
    assert run("depth", CAROUSEL_PYTHON=named).stderr == ""
    assert f"for {named}\n" in (venv / "carousel-stamp").read_text()

    # More extras are added to what is there; a request for fewer is then served by the same environment.
    added = run("depth", CAROUSEL_EXTRAS="more", PIP_NO_INDEX=1)
    assert (added.returncode, added.stdout) == (0, "depth\n")
    assert "extras test dev more\n" in (venv / "carousel-stamp").read_text()
    assert run("depth").stderr == ""

    # Interrupted: no stamp, rubbish inside. The next call starts anew.
    (venv / "carousel-stamp").unlink()
    (site,) = venv.glob("lib/python3*/site-packages")
    (site / "half").mkdir()
    repaired = run("depth", PIP_NO_INDEX=1)
    assert (repaired.returncode, repaired.stdout) == (0, "depth\n")
    assert not (site / "half").exists()


@pytest.mark.parametrize("name", ["local", "slurm", "hosts", "status"])
def test_launchers_start_like_experiments(run, fake, tmp_path, name):
    done = run(name, "depth", "--devices=3", CAROUSEL_VENV=fake, NPROC=None)
    assert printed(done, "argument") == ["-m", f"launch.{name}", "depth", "--devices=3"]
    assert int(printed(done, "NPROC")[0]) >= 12 and printed(done, "cwd") == [str(tmp_path)]
