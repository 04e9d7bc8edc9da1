"""What is read from Slurm's commands, with and without accounts, and what is submitted; its commands are fakes."""

import shlex
from pathlib import Path

import pytest

from launch import slurm_jobs
from research.errors import CarouselError

ROOT = Path(__file__).resolve().parents[2]


def prints(*lines):
    return "cat <<'END'\n" + "\n".join(lines) + "\nEND"


def test_what_is_in_the_queue(fake):
    fake(
        "squeue", prints("12|0|RUNNING|None", "12|3|PENDING|JobArrayTaskLimit", "13|N/A|PENDING|Dependency", "14|0|x|y")
    )
    assert slurm_jobs.queued(["12", "13", "15"]) == {
        "12": {0: ("RUNNING", "None"), 3: ("PENDING", "JobArrayTaskLimit")},
        "13": {None: ("PENDING", "Dependency")},
    }


SHOWN = (
    "JobId=14 ArrayJobId=12 ArrayTaskId=1 JobName=a UserId=root(0) JobState=FAILED Reason=NonZeroExitCode ExitCode=2:0",
    "JobId=13 ArrayJobId=12 ArrayTaskId=0 JobName=a UserId=root(0) JobState=TIMEOUT Reason=TimeLimit ExitCode=0:15",
    "JobId=12 ArrayJobId=12 ArrayTaskId=2 JobName=a UserId=root(0) JobState=RUNNING Reason=None ExitCode=0:0",
    "JobId=15 ArrayJobId=12 ArrayTaskId=3-4%2 JobName=a UserId=root(0) JobState=PENDING Reason=None ExitCode=0:0",
)


@pytest.mark.parametrize(
    "without", ["echo Slurm accounting storage is disabled >&2; exit 1", ":"], ids=["off", "empty"]
)
def test_endings_without_accounts(fake, without):
    fake("sacct", without)
    fake("scontrol", prints(*SHOWN))
    assert slurm_jobs.endings("12") == {0: "TIMEOUT, signal 15", 1: "FAILED, exit code 2"}
    fake("scontrol", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    assert slurm_jobs.endings("12") == {}


def test_endings_with_accounts(fake):
    # The last row lags: the task has ended, as scontrol knows.
    fake(
        "sacct",
        prints("12_0|CANCELLED by 1000|0:0", "12_5|OUT_OF_MEMORY|0:125", "12_[6-7]|PENDING|0:0", "12_1|RUNNING|0:0"),
    )
    fake("scontrol", prints(*SHOWN))
    assert slurm_jobs.endings("12") == {
        0: "CANCELLED by 1000",
        1: "FAILED, exit code 2",
        5: "OUT_OF_MEMORY, signal 125",
    }
    fake("scontrol", "exit 1")
    assert slurm_jobs.endings("12") == {0: "CANCELLED by 1000", 5: "OUT_OF_MEMORY, signal 125"}


@pytest.mark.parametrize("answer", ["34", "34;cluster", "welcome to the cluster\n34"])
def test_the_number_of_a_submitted_job(fake, answer):
    fake("sbatch", prints(answer))
    assert slurm_jobs.submit(["sbatch", "--parsable"]) == "34"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo sbatch: error: invalid partition specified: x >&2; exit 1", "sbatch: invalid partition specified: x"),
        ("exit 3", "sbatch: exit code 3"),
        ("echo hello", "sbatch gave no job number but 'hello': look at squeue before trying again"),
    ],
)
def test_a_refused_job(fake, body, message):
    fake("sbatch", body)
    with pytest.raises(CarouselError) as caught:
        slurm_jobs.submit(["sbatch", "--parsable"])
    assert str(caught.value) == message


def submitted(launcher, tmp_path, *flags):
    """The words of a dry run's two commands, and the lines of its manifest."""
    work = tmp_path / "work"
    process = launcher("slurm", "depth_ablation", "--depths=8", "--seeds=0,1", f"--workdir={work}", "--dry_run", *flags)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    array, report = map(shlex.split, output.splitlines())
    return array, report, [shlex.split(each) for each in (work / "slurm" / "manifest.txt").read_text().splitlines()]


def test_flags_become_options_of_sbatch(launcher, tmp_path):
    flags = ("--partition=gpu", "--time=4:00:00", "--mem=4G", "--cpus_per_task=3", "--gpus_per_task=2", "--throttle=2")
    flags += ("--signal_seconds=90", "--sbatch_options=--account=x '--comment=a b'", "--devices=2")
    array, report, lines = submitted(launcher, tmp_path, *flags)
    slurm = tmp_path / "work" / "slurm"
    common = {"--partition=gpu", "--time=4:00:00", "--mem=4G", "--account=x", "--comment=a b", "--parsable"}
    assert common <= set(array) and common <= set(report)
    own = {
        "--array=0-3%2",
        "--signal=B:USR1@90",
        "--cpus-per-task=3",
        "--gres=gpu:2",
        "--requeue",
        f"--output={slurm}/%a.log",
    }
    assert own <= set(array) and not own & set(report) and "--open-mode=append" in array
    assert array[-2:] == [str(ROOT / "launch" / "slurm_array.sh"), str(slurm)]
    assert report[1] == "--dependency=afterany:ARRAY"
    assert report[-1].startswith("--wrap=exec env ") and report[-1].endswith(" --finish")
    for line in lines:
        assert line[0] == "env" and f"--chdir={Path.cwd()}" in line and "NPROC=8" in line  # 4 for each device
        assert "XLA_FLAGS=--xla_backend_optimization_level=0" in line and line[-1].startswith("--only_cell=")
        assert not [word for word in line if word.startswith(("--partition", "--dry_run", "--gpus"))]
    assert submitted(launcher, tmp_path, "--cpus_per_task=3", "--nproc=5")[2][0].count("NPROC=5") == 1
    array, _, lines = submitted(launcher, tmp_path, "--cpus_per_task=3")
    assert "NPROC=3" in lines[0] and "--array=0-3" in array and not [word for word in array if "gres" in word]
    assert "--exclusive" not in array


def test_cells_that_measure_have_a_node_by_themselves(launcher, tmp_path):
    output, errors = launcher("slurm", "memory", f"--workdir={tmp_path}", "--dry_run").communicate(timeout=120)
    array, report = map(shlex.split, output.splitlines())
    assert "--exclusive" in array and "--exclusive" not in report, errors


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--sbatch_options='"], 2, '--sbatch_options="\'": No closing quotation'),
        (["--throttle=0"], 2, "flag --throttle=0"),
        (["--depths=7"], 2, "depth 7 is not 6n+2"),
        ([], 1, "squeue is not found: start this where a Slurm cluster takes jobs, or use launch.local"),
    ],
    ids=["quote", "throttle", "depth", "nowhere"],
)
def test_what_cannot_be_is_refused_before_anything_is_submitted(launcher, commands, tmp_path, flags, code, message):
    environment = {"env": commands.environment | {"PATH": str(tmp_path)}}
    process = launcher("slurm", "depth_ablation", f"--workdir={tmp_path}", *flags, **environment)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (code, "")
    (line,) = errors.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "slurm").exists() and not (tmp_path / "runs").exists()
