"""Sweeps on a real Slurm: each cell meets another misfortune, and ends with the bits of a run that met none."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest


class Sweeps:
    """Calls the launcher; each step of a cell ends with a checkpoint, and every program is compiled already."""

    def __init__(self, commands, slurm):
        self.slurm = slurm
        self.flags = (*commands.many_checkpoints, "--steps=60", "--evaluations=60", "--time=20", "--nproc=2")
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
    done = commands.run(*flags, SEEDS, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


# Each is done to one cell, in the middle of its run, while its process stands still.


def requeue(sweeps, job, index, node):
    sweeps.slurm.ask("scontrol", "requeue", f"{job}_{index}")


def kill(sweeps, job, index, node):
    os.kill(sweeps.python(job, index), signal.SIGKILL)


def time_is_nearly_up(sweeps, job, index, node):
    # What Slurm does by itself, but only every half minute.
    sweeps.slurm.ask("scancel", "--signal=USR1", "--batch", f"{job}_{index}")


def preempt(sweeps, job, index, node):
    options = ("--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    sweeps.slurm.ask("sbatch", *options)


def lose_the_node(sweeps, job, index, node):
    sweeps.slurm.kill_node(node)


# And the words by which one sees it in the cell's log.
MISFORTUNES = {
    requeue: "DUE TO JOB REQUEUE",
    kill: "ended with 137: it is started again",
    time_is_nearly_up: "ended with 75: it is started again",
    preempt: "DUE TO PREEMPTION",
    lose_the_node: "starts on",  # nobody is left to say anything
}
SEEDS = f"--seeds={','.join(str(seed) for seed in range(len(MISFORTUNES)))}"


@pytest.fixture(scope="module")
def disturbed(sweeps, wait_for, tmp_path_factory):
    """A finished sweep of which each cell met another misfortune."""
    workdir = tmp_path_factory.mktemp("disturbed") / "a work dir"
    with sweeps.start(workdir, SEEDS, "--partition=cpu", "--wait") as launcher:
        try:
            wait_for((workdir / "slurm" / "jobs.json").exists)
            job = jobs_of(workdir)["array"]
            for index, (misfortune, words) in enumerate(MISFORTUNES.items()):
                frozen = wait_for(lambda index=index: freeze(sweeps, workdir, job, index))
                misfortune(sweeps, job, index, re.findall(r"starts on (n\d)", log_of(workdir, index))[-1])
                wait_for(lambda process=frozen: has_been_told(process))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(frozen, signal.SIGCONT)
                # The next one may hit this cell too.
                wait_for(lambda index=index, words=words: words in log_of(workdir, index))
            launcher.output, launcher.errors = launcher.communicate(timeout=240)
        finally:
            launcher.kill()
    launcher.workdir = workdir
    for node in {"n1", "n2"}.difference(sweeps.slurm.nodes):
        sweeps.slurm.start_node(node)
    return launcher


def freeze(sweeps, workdir, job, index):
    """The process of a cell, stopped after some of its steps; None before."""
    process = step_of(workdir, index) >= 5 and sweeps.python(job, index)
    if not process:
        return None
    os.kill(process, signal.SIGSTOP)
    assert not (workdir / "runs" / name_of(index) / "result.json").exists(), "too late: it was as good as done"
    return process


def has_been_told(process):
    """Whether a stopped process is stopped no more, or would have SIGTERM when it goes on."""
    try:
        fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    except OSError:
        return True
    waiting = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
    return not fields["State"].startswith("T") or bool(waiting >> (signal.SIGTERM - 1) & 1)


def test_a_disturbed_sweep_ends_as_an_undisturbed_one(disturbed, expected, sweeps):
    assert disturbed.returncode == 0, disturbed.errors
    assert digests(disturbed.workdir) == digests(expected)
    assert outputs(disturbed.workdir) == outputs(expected)
    assert "summary.csv" in disturbed.output and "scancel" in disturbed.output
    assert "5 cells: " in disturbed.errors and "; Slurm: " in disturbed.errors
    assert sweeps.slurm.ask("squeue", "-h") == ""  # the report's job has gone too


@pytest.mark.parametrize("index", range(len(MISFORTUNES)), ids=[each.__name__ for each in MISFORTUNES])
def test_each_cell_met_its_misfortune_and_went_on(disturbed, index):
    log = log_of(disturbed.workdir, index)
    assert list(MISFORTUNES.values())[index] in log
    assert log.count("starts on") >= 2 and re.search(r"going on from step ([5-9]|[1-9]\d)$", log, re.MULTILINE)


def test_a_cancelled_sweep_stays_cancelled_and_the_same_command_submits_the_rest(sweeps, wait_for, expected, tmp_path):
    flags = ("--seeds=0,1", "--throttle=1", "--wait")
    with sweeps.start(tmp_path, *flags) as launcher:
        try:
            wait_for(lambda: step_of(tmp_path, 1) >= 5)
            job = jobs_of(tmp_path)["array"]
            second = sweeps.run(tmp_path, *flags)
            launcher.send_signal(signal.SIGINT)
            _, errors = launcher.communicate(timeout=60)
        finally:
            launcher.kill()
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.startswith(f"error: {tmp_path}: job array {job}, submitted ")
    assert second.stderr.endswith(f"or end the array with: scancel {job}\n")
    assert launcher.returncode == 75
    assert errors.splitlines()[-1] == f"no longer waiting; the jobs go on (to end them: scancel {job})"
    assert sweeps.tasks(job) == {1: "RUNNING"}

    sweeps.slurm.ask("scancel", job)
    wait_for(lambda: not sweeps.tasks(job))
    assert step_of(tmp_path, 1) >= 5 and "ended with 75; Slurm's state is 'COMPLETING None'" in log_of(tmp_path, 1)
    report = tmp_path / "logs" / "report.log"
    wait_for(lambda: report.exists() and "error: " in report.read_text())
    reason, error = report.read_text().splitlines()
    step = step_of(tmp_path, 1)
    assert reason.startswith(f"{name_of(1)}: stopped at step {step}/60; interrupted; Slurm: CANCELLED")
    assert error == f"error: {tmp_path}: 1 of 2 cells are not finished; the same command goes on with them"

    again = sweeps.run(tmp_path, *flags)
    assert again.returncode == 0, again.stderr
    assert "1 of the 2 cells of depth_ablation" in again.stdout and jobs_of(tmp_path)["cells"] == [name_of(1)]
    assert f"going on from step {step}\n" in log_of(tmp_path, 1)
    assert digests(tmp_path) == digests(expected)[:2]


def test_lines_run_by_hand_and_a_cell_that_fails(sweeps, tmp_path):
    work, elsewhere = tmp_path / "a work dir", tmp_path / "elsewhere"
    elsewhere.mkdir()
    flags = ("--steps=5", "--evaluations=5", "--seeds=0,1")
    dry = sweeps.run(work, *flags, "--dry_run")
    assert dry.returncode == 0 and not (work / "slurm" / "jobs.json").exists()
    first, second = (work / "slurm" / "manifest.txt").read_text().splitlines()
    # Of what a test needs to find this Slurm and its programs nothing is in the line.
    subprocess.run(["sh", "-c", first], cwd=elsewhere, check=True, capture_output=True, timeout=120)
    metrics = work / "runs" / name_of(1) / "metrics.jsonl"
    metrics.unlink()
    metrics.mkdir()
    failed = sweeps.run(work, *flags, "--wait")
    assert failed.returncode == 1
    *_, reason, error = failed.stderr.splitlines()
    log = work / "logs" / f"{name_of(1)}.log"
    assert reason.startswith(f"{name_of(1)}: ") and "Slurm: FAILED, exit code 1" in reason
    assert reason.endswith(f"; log: {log}") and f"{metrics}: Is a directory" in log.read_text()
    assert error.startswith(f"error: {work}: 1 of 2 cells are not finished")

    metrics.rmdir()
    subprocess.run(["sh", "-c", second], cwd=elsewhere, check=True, capture_output=True, timeout=120)
    done = sweeps.run(work, *flags)
    assert done.returncode == 0 and done.stdout.startswith("all 2 cells are finished\n") and outputs(work)
    assert jobs_of(work)["cells"] == [name_of(1)]  # nothing was submitted
