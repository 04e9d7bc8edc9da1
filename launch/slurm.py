"""Runs an experiment's cells on a Slurm cluster: a job array over a manifest of command lines, then the report.

    python -m launch.slurm EXPERIMENT --partition=... --time=... [experiment flags]

Call it on a machine from which sbatch works, with the checkout, its Python and the working folder on a file system
that all nodes see. Before the time limit, and on preemption, a cell writes a checkpoint and is queued again; a killed
one and one of a lost node go on from their last checkpoint (launch/slurm_array.sh is what each task runs). The same
command again submits what is not finished; where everything is, it makes the report. WORKDIR/slurm/ holds:

    manifest.txt   one full command line for each unfinished cell; each can be run by hand from any folder
    jobs.json      numbers of the jobs, and which index of the array is which cell
    INDEX.log      links to WORKDIR/logs/NAME.log

Exit codes: 0 submitted (with --wait: all done); 1 the environment, Slurm or a failed cell; 2 the request; 75 --wait was
interrupted, and the jobs go on.
"""

import datetime
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import command_line, runner
from launch import cells, slurm_jobs, slurm_watch
from launch.cells import Launch
from launch.slurm_watch import FOLDER
from research.errors import CarouselError, UsageError
from research.files import io_error, make_folder, write_atomic, write_json_atomic

_SCRIPT = Path(__file__).with_name("slurm_array.sh")
# What changes the results of a run, besides the variables that every launcher sets.
_PASSED_ON = ("XLA_FLAGS", "JAX_")


def _flags() -> flags.FlagValues:
    own = flags.FlagValues()
    given = {"flag_values": own}
    # A name that the experiment has too is the experiment's: --sbatch_options="--time=..." then says it to Slurm.
    flags.DEFINE_string("partition", None, "Of Slurm; without it, the cluster's default.", **given)
    flags.DEFINE_string("time", None, "Limit of one sitting of a cell, as sbatch has it: 30, 4:00:00, 1-0.", **given)
    flags.DEFINE_integer("cpus_per_task", 1, "Cores of each cell.", lower_bound=1, **given)
    flags.DEFINE_string("mem", None, "Memory of each cell, as sbatch writes it: 4G.", **given)
    flags.DEFINE_integer("gpus_per_task", 0, "GPUs of each cell.", lower_bound=0, **given)
    flags.DEFINE_integer("throttle", None, "At most so many cells at once.", lower_bound=1, **given)
    seconds = "The checkpoint before the time limit begins so many seconds early; Slurm may add up to 60."
    flags.DEFINE_integer("signal_seconds", 60, seconds, lower_bound=1, upper_bound=65535, **given)
    nproc = "Threads of XLA, which decide the last bits; default: the cores, at least 4 for each of several --devices."
    flags.DEFINE_integer("nproc", None, nproc, lower_bound=1, **given)
    flags.DEFINE_string("sbatch_options", "", "Further ones, in one word: '--account=x --qos=y'.", **given)
    flags.DEFINE_bool("wait", False, "Show progress until the last cell has ended, and make the report.", **given)
    flags.DEFINE_bool("dry_run", False, "Write the manifest and print what would be submitted.", **given)
    finish = "Submit nothing: make the report, or tell of each unfinished cell why. The report job does this."
    flags.DEFINE_bool("finish", False, finish, **given)
    return own


def main() -> None:
    own = _flags()
    cells.main(__doc__, own, lambda launch: start(launch, own))


def start(launch: Launch, own: flags.FlagValues) -> int:
    """Submits the unfinished cells of an experiment, or does what the flags ask for instead; returns the exit code."""
    if own.finish:
        return slurm_watch.finish(launch)
    try:
        further = shlex.split(own.sbatch_options)
    except ValueError as error:
        raise UsageError(f"--sbatch_options={own.sbatch_options!r}: {error}") from None
    with cells.lock(launch.workdir):
        _refuse_a_second(launch.workdir)
        if not own.dry_run and launch.unfinished():
            slurm_jobs.ask("squeue", "--me", "--noheader")  # is there a Slurm at all?
        runner.prepare(launch.experiment, launch.grid)
        names = launch.unfinished()
        if names:
            variables = _variables(launch, own)
            lines = [_line(launch.command(name), variables) for name in names]
            array, report = _commands(launch, len(names), own, further)
            _write(launch, lines, names)
            if own.dry_run:
                print(shlex.join(array), shlex.join(_after("ARRAY", report)), sep="\n")
                return 0
            jobs = _submit(launch, names, array, report)
    if not names:
        print(f"all {len(launch.grid.names)} cells are finished")
        return 0 if own.dry_run else slurm_watch.finish(launch)
    return slurm_watch.wait(launch, jobs) if own.wait else 0


def _refuse_a_second(workdir: Path) -> None:
    """Jobs of an earlier call read the manifest, and train the same cells."""
    jobs = slurm_watch.read_jobs(workdir)
    if not jobs:
        return
    waiting = slurm_jobs.queued([job for job in (jobs["array"], jobs["report"]) if job])
    if jobs["array"] in waiting:
        number = len(waiting[jobs["array"]])
        raise CarouselError(
            f"{workdir}: job array {jobs['array']}, submitted {jobs['submitted']}, has {number} task"
            f"{'s' if number != 1 else ''} in the queue or running: wait for {'them' if number != 1 else 'it'} "
            f"(python -m launch.status {workdir}), or end the array with: scancel {jobs['array']}"
        )
    if jobs["report"] in waiting:
        slurm_jobs.ask("scancel", jobs["report"])  # it would report on what is about to be trained


def _write(launch: Launch, lines: Sequence[str], names: Sequence[str]) -> None:
    """Writes all that the tasks of the array read."""
    folder, logs = launch.workdir / FOLDER, launch.workdir / "logs"
    try:
        make_folder(folder)
        make_folder(logs)
        for old in (*folder.glob("*.log"), *folder.glob("restarts-*")):
            old.unlink()
        for index, name in enumerate(names):
            (folder / f"{index}.log").symlink_to(Path("..", "logs", f"{name}.log"))
        write_atomic(folder / "manifest.txt", "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise io_error(error.filename or folder, error) from error


def _commands(launch: Launch, number: int, own: flags.FlagValues, further: list[str]) -> tuple[list[str], list[str]]:
    """The commands that submit an array of so many tasks, and the job of the report."""
    folder, name = launch.workdir / FOLDER, launch.experiment.name
    common = ["sbatch", "--parsable", "--open-mode=append"]
    for flag in ("partition", "time", "mem"):
        if flag in own and own[flag].value is not None:
            common.append(f"--{flag}={own[flag].value}")
    limit = f"%{own.throttle}" if own.throttle else ""
    array = [*common, f"--job-name={name}", f"--array=0-{number - 1}{limit}", "--requeue"]
    array += [f"--signal=B:USR1@{own.signal_seconds}", f"--cpus-per-task={own.cpus_per_task}"]
    if launch.experiment.alone:
        array.append("--exclusive")  # it measures time or memory: no other job on its node
    if own.gpus_per_task:
        array.append(f"--gres=gpu:{own.gpus_per_task}")
    array += [f"--output={_pattern(folder)}/%a.log", *further, str(_SCRIPT), str(folder)]
    again = [sys.executable, "-m", "launch.slurm", name, *command_line.without_flags(launch.words, ["workdir"])]
    line = _line([*again, f"--workdir={launch.workdir}", "--finish"], _variables(launch, own))
    report = [*common, f"--job-name={name}-report", f"--output={_pattern(launch.workdir)}/logs/report.log"]
    return array, [*report, *further, f"--wrap=exec {line}"]


def _variables(launch: Launch, own: flags.FlagValues) -> Mapping[str, str]:
    # Not this machine's NPROC: launch/run sets it to the cores of whatever machine jobs are submitted from.
    devices = getattr(launch.grid.config, "devices", None) or 1
    threads = own.nproc or max(own.cpus_per_task, 4 * devices if devices > 1 else 1)
    passed_on = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    return {**passed_on, **launch.environment(), "NPROC": str(threads)}


def _line(command: Sequence[str], variables: Mapping[str, str]) -> str:
    settings = [f"{name}={value}" for name, value in sorted(variables.items())]
    line = shlex.join(["env", f"--chdir={Path.cwd()}", *settings, *command])
    if "\n" in line:
        raise UsageError("a flag or a variable holds a line break: a line of the manifest cannot")
    return line


def _pattern(folder: Path) -> str:
    return str(folder).replace("%", "%%")  # sbatch reads %a and the like in the names of logs


def _after(array: str, report: Sequence[str]) -> list[str]:
    return [report[0], f"--dependency=afterany:{array}", *report[1:]]


def _submit(launch: Launch, names: Sequence[str], array: Sequence[str], report: Sequence[str]) -> dict[str, Any]:
    """Submits both jobs, records them and says how to watch them."""
    workdir = launch.workdir
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    jobs = {"array": slurm_jobs.submit(array), "report": None, "cells": list(names), "submitted": now}
    path = workdir / FOLDER / "jobs.json"
    write_json_atomic(path, jobs)
    print(f"job array {jobs['array']}: {len(names)} of the {len(launch.grid.names)} cells of {launch.experiment.name}")
    try:
        jobs["report"] = slurm_jobs.submit(_after(jobs["array"], report))
        write_json_atomic(path, jobs)
        print(f"job {jobs['report']}: the report, when they have ended; {workdir}/logs/report.log")
    except CarouselError as error:
        print(f"no job for the report ({error}): start this command again when they have ended", file=sys.stderr)
    numbers = " ".join(filter(None, (jobs["array"], jobs["report"])))
    print(f"watch them:   python -m launch.status {workdir}    or: squeue --me")
    print(f"logs:         {workdir}/logs/NAME.log")
    print(f"cancel them:  scancel {numbers}")
    return jobs


if __name__ == "__main__":
    main()
