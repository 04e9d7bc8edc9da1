"""A launcher's command line: which flags are whose, the command of a cell, and one launcher a working folder."""

import os
import shlex
import subprocess
import sys

import pytest
from absl import flags

from experiments import command_line
from launch import cells
from research.errors import CarouselError, UsageError


@pytest.fixture
def parse():
    """`(*words) -> Launch` of a launcher with the flags --workers and --time; the flags are gone afterwards."""
    before = set(flags.FLAGS)

    def call(*words):
        own = flags.FlagValues()
        flags.DEFINE_integer("workers", 1, "", flag_values=own)
        flags.DEFINE_string("time", None, "", flag_values=own)
        call.own = own
        return cells.parse(["launch/local.py", *words], own)

    yield call
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


def test_every_flag_finds_its_owner(parse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch = parse("depth_ablation", "--depths", "8", "--workers=3", "--blocks=plain", "--time", "5", "--workdir=here")
    assert (parse.own.workers, parse.own.time) == (3, "5")
    assert launch.words == ("--depths", "8", "--blocks=plain", "--workdir=here")
    assert launch.grid.names == ["plain-8-w8-seed0"]
    start = [sys.executable, "-m", "experiments.depth_ablation", "--depths", "8", "--blocks=plain"]
    start.append(f"--workdir={tmp_path / 'here'}")
    assert launch.command("plain-8-w8-seed0") == [*start, "--only_cell=plain-8-w8-seed0"]
    assert launch.report_command() == [*start, "--report_only"]


def test_a_flag_of_both_is_the_experiments(parse):
    launch = parse("language_model", "--time=7", "--workers=2")
    assert launch.grid.config.time == 7 and "time" not in parse.own and parse.own.workers == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name an experiment first: python -m launch.local EXPERIMENT [flags]; it is one of benchmark, "),
        (("--workers=2", "depth_ablation"), "name an experiment first"),
        (("depth",), "there is no experiment 'depth'; there are benchmark, depth_ablation, "),
        (("depth_ablation", "--workers=two"), "flag --workers=two"),
        (("depth_ablation", "--only_cell=a"), "--only_cell is not for a launcher: give it to `python -m experiments."),
        (("depth_ablation", "--report_only"), "--report_only is not for a launcher"),
        (("depth_ablation", "--depths=7"), "7"),
    ],
)
def test_a_wrong_line_is_refused_in_one(parse, words, message):
    with pytest.raises(UsageError) as caught:
        parse(*words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_help_tells_of_the_launchers_own_flags(launcher):
    out, err = launcher("local", "--help").communicate(timeout=120)
    assert err == "" and "usage: python -m launch.local EXPERIMENT" in out and "--workers:" in out
    assert "flagfile" not in out


def test_nobody_reading_on_is_no_error_to_tell_of(commands):
    line = f"{shlex.quote(sys.executable)} -m launch.local --help | true"
    environment = commands.environment | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) in ((0, b""), (1, b""))


def test_threads_stay_those_of_a_run_by_itself(parse, monkeypatch):
    launch = parse("depth_ablation", "--devices=2")
    monkeypatch.setenv("NPROC", "3")
    assert launch.environment()["NPROC"] == "3"
    monkeypatch.delenv("NPROC")
    assert launch.environment()["NPROC"] == str(max(8, len(os.sched_getaffinity(0))))


def test_one_launcher_a_working_folder(tmp_path, commands):
    work = tmp_path / "new" / "work"
    with cells.lock(work):
        message = f"working folder {work} is being written by process {os.getpid()} on"
        with pytest.raises(CarouselError, match=message), cells.lock(work):
            pass
        take = f"from launch import cells; import pathlib\nwith cells.lock(pathlib.Path({str(work)!r})): pass"
        assert commands.script(take).returncode == 1
    assert commands.script(take).returncode == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(CarouselError, match="cannot make the working folder"), cells.lock(tmp_path / "file" / "x"):
        pass


def test_a_process_ends_with_its_launcher(commands, tmp_path):
    """A launcher that is killed leaves no training behind."""
    follow = shlex.join([sys.executable, "-c", FOLLOWS, str(tmp_path / "pid")])
    # A shell that starts it in the background and dies when it is ready.
    script = (
        f"export {command_line.LAUNCHER}=$$; {follow} & while ! [ -s '{tmp_path}/pid' ]; do sleep 0.1; done; kill -9 $$"
    )
    done = subprocess.run(["sh", "-c", script], env=commands.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -9
    assert "stopping: a checkpoint is written" in done.stderr and "left" in done.stdout


FOLLOWS = """
import os, sys, threading, time
from experiments import command_line
stop = command_line.StopRequest()
threading.Thread(target=command_line._end_with, args=(int(os.environ[command_line.LAUNCHER]),), daemon=True).start()
open(sys.argv[1], "w").write(str(os.getpid()))
while not stop():
    time.sleep(0.1)
print("left")
"""
