"""What each task of a job array does (launch/slurm_array.sh); Slurm's commands are fakes, and cells are shells."""

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm_array.sh"


class Task:
    """Task 1 of job array 7, of which Slurm says `state`; `requeued` counts how often it was asked to start again."""

    def __init__(self, folder: Path, fake):
        self.work, self.state = folder / "a work dir", "RUNNING None"
        self.slurm, self.checkpoints = self.work / "slurm", self.work / "runs" / "a cell" / "checkpoints"
        self._calls = folder / "scontrol"
        for made in (self.slurm, self.checkpoints):
            made.mkdir(parents=True)
        fake("squeue", 'printf "%s\\n" "$STATE"')
        fake("scontrol", f'echo "$*" >>"{self._calls}"')
        fake("sleep", ":")  # the waiting between questions

    @property
    def requeued(self):
        calls = self._calls.read_text().splitlines() if self._calls.exists() else []
        assert set(calls) <= {"requeue 7_1"}
        return len(calls)

    def start(self, cell: str) -> subprocess.Popen:
        # Bash's own words stand for the program of a cell; the name comes last, as in a manifest.
        line = shlex.join(["env", "CELL=1", "bash", "-c", cell, "python", "--only_cell=a cell"])
        (self.slurm / "manifest.txt").write_text(f"exit 99\n{line}\n")
        variables = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "STATE": self.state}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["bash", SCRIPT, self.slurm], env=os.environ | variables, **pipes)

    def run(self, cell: str) -> int:
        with self.start(cell) as process:
            self.output, _ = process.communicate(timeout=60)
        return process.returncode


@pytest.fixture
def task(tmp_path, fake):
    return Task(tmp_path, fake)


@pytest.mark.parametrize(
    ("cell", "code", "requeued"),
    [
        ("exit 0", 0, 0),
        ("exit 1", 1, 0),
        ("exit 2", 2, 0),
        ("exit 75", 75, 1),
        ("exit 76", 76, 1),
        ("kill -KILL $$", 137, 1),
        ("kill -SEGV $$", 139, 1),
    ],
)
def test_what_is_no_failure_of_the_cell_is_started_again(task, cell, code, requeued):
    assert (task.run(cell), task.requeued) == (code, requeued)
    assert task.output.startswith("slurm: job 7_1: a cell starts on ")


@pytest.mark.parametrize("cell", ["exit 75", "exit 76", "kill -KILL $$"])
def test_without_progress_five_times(task, cell):
    for attempt in range(1, 8):
        task.run(cell)
        assert task.requeued == min(attempt, 5)
    assert "was started again 5 times before: it is left alone" in task.output


def test_a_stop_after_further_steps_does_not_count(task):
    step = f'touch "{task.checkpoints}/step_$(ls "{task.checkpoints}" | wc -l)"; exit 75'
    for attempt in range(1, 9):
        task.run(step)
        assert task.requeued == attempt
    task.run("exit 75")
    assert task.requeued == 9  # the first of five
    assert len((task.slurm / "restarts-1").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("state", "requeued"),
    [
        ("RUNNING None", 1),
        ("COMPLETING TimeLimit", 1),  # its time is over; nobody else starts it again
        ("COMPLETING None", 0),  # cancelled; or preempted or requeued by hand, which Slurm does by itself
        ("PENDING BeginTime", 0),
        ("CANCELLED None", 0),
        ("", 0),
    ],
)
@pytest.mark.parametrize("cell", ["exit 75", "kill -KILL $$"], ids=["stopped", "killed"])
def test_a_cancelled_job_stays_cancelled(task, state, requeued, cell):
    task.state = state
    task.run(cell)
    assert task.requeued == requeued


def test_slurm_is_asked_again_where_it_is_away(task, fake, tmp_path):
    fake("squeue", f'[ -e "{tmp_path}/asked" ] && echo RUNNING None; touch "{tmp_path}/asked"')
    assert (task.run("exit 75"), task.requeued) == (75, 1)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_signals_reach_the_cell_as_sigterm_and_its_answer_is_waited_for(task, number):
    # Bash would not run a trap before `sleep` ends, so it waits for one in the background.
    cell = 'trap "/bin/sleep 0.5; echo asked; exit 75" TERM; echo ready; /bin/sleep 60 & wait'
    with task.start(cell) as process:
        assert "starts on" in process.stdout.readline() and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        output = process.stdout.readline()
        subprocess.run(["pkill", "-P", str(process.pid)], check=False)
        process.wait(timeout=60)
    assert output == "asked\n" and (process.returncode, task.requeued) == (75, 1)


def test_a_missing_line_is_told(task):
    task.start("exit 0").communicate(timeout=60)
    (task.slurm / "manifest.txt").write_text("exit 99\n")
    environment = os.environ | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["bash", SCRIPT, task.slurm], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "has no line 2: start the launcher again" in done.stdout
