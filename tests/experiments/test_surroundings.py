"""Around the runs: kept programs, events and profiles, by the flags of every experiment."""

import json

import pytest

from experiments import depth_ablation, surroundings
from research.errors import UsageError
from research.training import environment

RUN = "residual-8-w4-seed0"


def sha256(workdir, run=RUN):
    return json.loads((workdir / "runs" / run / "result.json").read_text())["final_state_sha256"]


def cached(folder):
    """Names and contents of the compiled programs."""
    return {path.name: path.read_bytes() for path in folder.rglob("*-cache")}


@pytest.fixture(scope="module")
def flags(commands):
    return (*commands.tiny, "--steps=4", "--steps_per_call=2", "--evaluations=1")


@pytest.fixture(scope="module")
def kept(commands, flags, tmp_path_factory):
    """A run by the defaults, in a working folder of a relative name."""
    folder = tmp_path_factory.mktemp("kept")
    done = commands.script(DEFAULT_CACHE, *flags, "--workdir=work", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "work"


DEFAULT_CACHE = "from experiments import depth_ablation, runner; runner.main(depth_ablation.EXPERIMENT)"


def test_programs_are_kept_in_the_working_folder_and_used_again(commands, flags, kept):
    (folder,) = (kept / "compiled").iterdir()
    assert folder == environment.compilation_cache_dir(kept / "compiled")
    programs = cached(kept)
    assert len(programs) > 3
    done = commands.script(DEFAULT_CACHE, *flags, "--seeds=0,1", "--workdir=work", cwd=kept.parent)
    assert done.returncode == 0, done.stderr
    assert "compiled" not in done.stdout, "a report took the folder for a run"
    assert cached(kept) == programs, "the second seed's programs are those of the first"


WHERE = """
import os
import jax
import research.training.loop as loop
from experiments import depth_ablation, runner

loop.train = lambda *_, **__: print(jax.config.jax_compilation_cache_dir, flush=True) or os._exit(0)
runner.main(depth_ablation.EXPERIMENT)
"""


def test_another_folder_or_none(commands, tmp_path):
    def where(*flags):
        done = commands.script(WHERE, "--smoke", "--workdir=work", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    assert where("--compilation_cache=") == ("None", "")
    for folder, flags in {"work/compiled": (), "programs": ("--compilation_cache=programs",)}.items():
        # Absolute, for processes that a run starts elsewhere.
        assert where(*flags) == (str(environment.compilation_cache_dir(tmp_path / folder)), "")
    (tmp_path / "file").write_text("in the way")
    found, errors = where("--compilation_cache=file")
    (line,) = errors.splitlines()
    assert found == "None" and line.startswith("warning: ") and str(tmp_path / "file") in line
    assert "programs are not kept" in line and "--compilation_cache" in line


@pytest.mark.parametrize("text", ["5", "9:3", "3:3", "-1:3", "a:b", "1:2:3", "", ":4", "1.5:3", "²:³"])
def test_what_is_no_range_of_steps_is_refused(command, capsys, tmp_path, text):
    assert command(depth_ablation.EXPERIMENT, "--smoke", f"--profile={text}", f"--workdir={tmp_path / 'work'}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --profile={text}: give START:STOP") and not (tmp_path / "work").exists()


def test_a_range_beyond_the_end_is_refused_before_anything_is_trained(command, capsys, tmp_path):
    code = command(depth_ablation.EXPERIMENT, "--steps=30", "--profile=20:31", f"--workdir={tmp_path / 'work'}")
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and "which has 30 steps" in line and not (tmp_path / "work").exists()
    assert surroundings.parse_profile("20:31") == (20, 31) and surroundings.parse_profile(None) is None
    with pytest.raises(UsageError):
        surroundings.parse_profile("20:31 ")


def test_every_cell_is_traced_into_its_own_folder_and_no_bit_changes(commands, flags, kept, tmp_path):
    done = commands.run(*flags, "--seeds=0,1", "--profile=1:3", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("profile of steps 0 to 4: open ") == 2
    for seed in (0, 1):
        (trace,) = (tmp_path / "runs" / f"residual-8-w4-seed{seed}" / "profile").rglob("*.trace.json.gz")
        assert str(trace) in done.stderr
    assert sha256(tmp_path) == sha256(kept)
    recorded = json.loads((tmp_path / "runs" / RUN / "environment.json").read_text())
    assert "--profile" not in recorded["command"] and "--profile=1:3" in recorded["argv"]
