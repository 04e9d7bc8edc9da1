"""Sweeps on a real Slurm: each cell meets another misfortune, and ends with the bits of a run that met none."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SEEDS = 5


class Sweeps:
    """Calls the launcher; each step of a cell ends with a checkpoint, and every program is compiled already."""

    def __init__(self, commands, slurm):
        self.slurm = slurm
        self.flags = (*commands.many_checkpoints, "--steps=90", "--evaluations=90", "--time=20", "--nproc=2")
        self._start = [sys.executable, "-m", "launch.slurm", "depth_ablation", f"--compilation_cache={commands.cache}"]
        self._options = {"cwd": slurm.folder, "env": commands.environment | slurm.variables, "text": True}

    def run(self, workdir: Path, *flags: str) -> subprocess.CompletedProcess:
        line = [*self._start, *self.flags, *flags, f"--workdir={workdir}"]
        return subprocess.run(line, capture_output=True, timeout=300, **self._options)

    def start(self, workdir: Path, *flags: str) -> subprocess.Popen:
        line = [*self._start, *self.flags, *flags, f"--workdir={workdir}"]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **self._options)

    def tasks(self, job: str) -> dict[int, str]:
        """Index -> state of the tasks that have not ended."""
        rows = (line.split() for line in self.slurm.ask("squeue", "-h", "-r", "-o", "%F %K %T").splitlines())
        return {int(index): state for array, index, state in rows if array == job and index.isdigit()}

    def python(self, job: str, index: int) -> int | None:
        """The process that trains a cell now, if one does."""
        for process in self.slurm.processes(f"SLURM_ARRAY_JOB_ID={job}", f"SLURM_ARRAY_TASK_ID={index}"):
            command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            if b"experiments.depth_ablation" in command and b"python" in command[0]:
                return process
        return None


def name_of(seed):
    return f"residual-8-w4-seed{seed}"


def step_of(workdir, seed):
    """Of the newest checkpoint of a cell that is not finished; -1 where there is none, or it is."""
    run = workdir / "runs" / name_of(seed)
    if (run / "result.json").exists():
        return -1
    return max((int(path.stem[5:]) for path in (run / "checkpoints").glob("step_*.safetensors")), default=-1)


def log_of(workdir, seed):
    path = workdir / "logs" / f"{name_of(seed)}.log"
    return path.read_text() if path.exists() else ""


def jobs_of(workdir):
    return json.loads((workdir / "slurm" / "jobs.json").read_text())


def digests(workdir):
    results = (json.loads(path.read_text()) for path in sorted((workdir / "runs").glob("*/result.json")))
    return [result["final_state_sha256"] for result in results]


def outputs(workdir):
    """Every table and figure but for the one that tells times."""
    files = list(workdir.rglob("figures/*"))
    assert len(files) == 8
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def sweeps(commands, slurm):
    return Sweeps(commands, slurm)


@pytest.fixture(scope="module")
def expected(commands, sweeps, tmp_path_factory):
    """The same grid in one process, undisturbed."""
    workdir = tmp_path_factory.mktemp("expected")
    flags = [flag for flag in sweeps.flags if not flag.startswith(("--time", "--nproc"))]
    done = commands.run(*flags, f"--seeds={','.join(map(str, range(SEEDS)))}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


# Each is done to one cell, in the middle of its run.


def requeue(sweeps, job, index, node):
    sweeps.slurm.ask("scontrol", "requeue", f"{job}_{index}")


def kill(sweeps, job, index, node):
    os.kill(sweeps.python(job, index), signal.SIGKILL)


def time_is_nearly_up(sweeps, job, index, node):
    # What Slurm does by itself, but only every half minute.
    sweeps.slurm.ask("scancel", "--signal=USR1", "--batch", f"{job}_{index}")


def preempt(sweeps, job, index, node):
    sweeps.slurm.ask(
        "sbatch", "--partition=urgent", f"--nodelist={node}", "--exclusive", "-o/dev/null", "--wrap=sleep 1"
    )


def lose_the_node(sweeps, job, index, node):
    sweeps.slurm.kill_node(node)


MISFORTUNES = (requeue, kill, time_is_nearly_up, preempt, lose_the_node)


@pytest.fixture(scope="module")
def disturbed(sweeps, wait_for, tmp_path_factory):
    """A sweep of which every cell was hit; the last one when the others are done, since it takes a node away."""
    workdir = tmp_path_factory.mktemp("disturbed") / "a work dir"
    seeds = f"--seeds={','.join(map(str, range(SEEDS)))}"
    with sweeps.start(workdir, seeds, "--partition=cpu", "--throttle=4", "--wait") as launcher:
        try:
            wait_for((workdir / "slurm" / "jobs.json").exists)
            job, last = jobs_of(workdir)["array"], SEEDS - 1
            sweeps.slurm.ask("scontrol", "hold", f"{job}_{last}")
            for indices in (range(last), [last]):
                hit_all(sweeps, wait_for, workdir, job, set(indices))
                number = len(indices)
                wait_for(lambda number=number: len(digests(workdir)) >= number)
                sweeps.slurm.ask("scontrol", "release", f"{job}_{last}")
            launcher.output, launcher.errors = launcher.communicate(timeout=120)
        finally:
            launcher.kill()
    launcher.workdir, launcher.job = workdir, job
    for node in {"n1", "n2"}.difference(sweeps.slurm.nodes):
        sweeps.slurm.start_node(node)
    return launcher


def hit_all(sweeps, wait_for, workdir, job, waiting):
    """Each of these cells meets its misfortune once some of its steps are done."""

    def none_is_left():
        for index in list(waiting):
            if step_of(workdir, index) >= 5 and sweeps.python(job, index):
                node = re.findall(r"starts on (n\d)", log_of(workdir, index))[-1]
                MISFORTUNES[index](sweeps, job, index, node)
                waiting.remove(index)
        return not waiting

    wait_for(none_is_left)


def test_a_disturbed_sweep_ends_as_an_undisturbed_one(disturbed, expected):
    assert disturbed.returncode == 0, disturbed.errors
    assert digests(disturbed.workdir) == digests(expected)
    assert outputs(disturbed.workdir) == outputs(expected)
    assert "summary.csv" in disturbed.output and "scancel" in disturbed.output
    assert disturbed.errors.splitlines()[-1].startswith(f"cells: {SEEDS} done")


@pytest.mark.parametrize(
    ("seed", "words"),
    [
        (0, "DUE TO JOB REQUEUE"),
        (1, "ended with 137: it is started again"),
        (2, "ended with 75: it is started again"),
        (3, "DUE TO PREEMPTION"),
        (4, "starts on"),
    ],
    ids=[each.__name__ for each in MISFORTUNES],
)
def test_each_cell_met_its_misfortune_and_went_on(disturbed, seed, words):
    log = log_of(disturbed.workdir, seed)
    assert words in log
    starts = re.findall(r"starts on (n\d)", log)
    assert len(starts) >= 2 and len(re.findall(r"going on from step [1-9]", log)) == len(starts) - 1
