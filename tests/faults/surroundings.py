"""Disks, clocks, other processes and other code around a run: scenarios; see scene.py."""

import contextlib
import datetime
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.commands import Commands, notes, refusal, run_of, saved_steps, wait_for
from tests.faults import kills
from tests.faults.scene import Impossible, Lines, Scene, check, contents, same
from tests.faults.watched import fill

# The disk


@contextlib.contextmanager
def small_disk(scene: Scene) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = scene.folder / "disk"
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def _mount(*arguments: object) -> None:
    mount = shutil.which("mount")
    mounted = subprocess.run([mount, *arguments], capture_output=True, text=True) if mount else None
    if mounted is None or mounted.returncode:
        raise Impossible(f"no file system can be mounted here: {mounted.stderr.strip() if mounted else 'no mount'}")


def disk_full(scene: Scene, what: str, line: str) -> Lines:
    """The disk is full from the moment when `what` is to be written; there is room again, and the run ends as ever."""
    with small_disk(scene) as disk:
        workdir, ballast = scene.copy(to=disk / "work"), disk / "ballast"
        command = kills.watched_line(scene.commands, *scene.flags(workdir))
        told = {"FAULTS_LOG": str(scene.folder / "log"), "FAULTS_FILL": f"{what}:{ballast}"}
        done = subprocess.run(
            command, env=scene.commands.environment | told, capture_output=True, text=True, timeout=300
        )
        message = refusal(done, 1)
        step = saved_steps(workdir)[-1]
        check(message, line.format(run=re.escape(str(run_of(workdir))), step=step))
        assert step >= saved_steps(scene.interrupted)[-1]
        assert not list(workdir.rglob(".tmp*")) and not (run_of(workdir) / "result.json").exists()
        ballast.unlink()
        scene.goes_on(workdir, step)
    return [message]


_FULL = r"No space left on device; {}free some space and start the same command again$"


def full_at_checkpoint(scene: Scene) -> Lines:
    intact = _FULL.format(r"the checkpoint of step {step} is intact; ")
    return disk_full(scene, "checkpoint", r"^cannot write {run}/checkpoints/step_\d+.safetensors: " + intact)


def full_at_metrics(scene: Scene) -> Lines:
    return disk_full(scene, "metrics", r"^cannot write {run}/metrics.jsonl: " + _FULL.format(""))


def full_at_result(scene: Scene) -> Lines:
    return disk_full(scene, "result", r"^cannot write {run}/result.json: " + _FULL.format(""))


def full_at_report(scene: Scene) -> Lines:
    """The run is finished; old figures stay whole."""
    with small_disk(scene) as disk:
        workdir, ballast = scene.copy(scene.uninterrupted, to=disk / "work"), disk / "ballast"
        before = contents(workdir)
        fill(ballast)
        flags = (*Commands.many_checkpoints, f"--workdir={workdir}", "--report_only")
        lines = check(
            refusal(scene.commands.run(*flags), 1), rf"^cannot write {workdir}/(figures/)?\S+: " + _FULL.format("")
        )
        assert contents(workdir) == before
        ballast.unlink()
        done = scene.commands.run(*flags)
        assert done.returncode == 0, done.stderr
    return lines


def read_only(scene: Scene) -> Lines:
    """Nothing can be written: a run that goes on, a new one, a report."""
    with small_disk(scene) as disk:
        workdir, finished = scene.copy(to=disk / "work"), scene.copy(scene.uninterrupted, to=disk / "finished")
        before = contents(disk)
        _mount("-o", "remount,ro", disk)
        cure = "Read-only file system; make it writable or choose another --workdir$"
        lines = check(scene.refused(workdir), rf"^cannot write {run_of(workdir)}/lock: {cure}")
        lines += check(scene.refused(disk / "new"), rf"^cannot make the run folder {run_of(disk / 'new')}: {cure}")
        flags = (*Commands.many_checkpoints, f"--workdir={finished}")
        lines += check(refusal(scene.commands.run(*flags), 1), rf"^cannot write {finished}/\S+: {cure}")
        assert contents(disk) == before
        _mount("-o", "remount,rw", disk)
        scene.goes_on(workdir, saved_steps(scene.interrupted)[-1])
    return lines


# The clock


_YEAR = 365 * 86_400


def clock_moved(scene: Scene, *seconds: int) -> Lines:
    """The run goes on under a clock that is off, by each of `seconds` in turn."""
    workdir, clock = scene.copy(), scene.folder / "clock"
    _set(clock, seconds[0])
    step = saved_steps(workdir)[-1]
    line = kills.watched_line(scene.commands, *scene.flags(workdir))
    with scene.commands.popen(line, FAULTS_LOG=str(scene.folder / "log"), FAULTS_CLOCK=str(clock)) as process:
        for later in seconds[1:]:
            step += 3
            wait_for(workdir, step, process)
            _set(clock, later)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and not notes(errors), errors
    same(workdir, scene.uninterrupted)
    result = json.loads((run_of(workdir) / "result.json").read_text())
    assert all(0 <= spent < 600 for spent in result["seconds"].values()), result["seconds"]
    assert result["examples_per_second"] > 0
    started = json.loads((run_of(workdir) / "environment.json").read_text())["started_utc"]
    begun = datetime.datetime.fromisoformat(started).timestamp()
    assert abs(begun - seconds[0] - time.time()) < 600, started  # so the clock was off
    return re.findall(".*going on from step .*", errors)


def _set(clock: Path, seconds: int) -> None:
    new = clock.with_suffix(".new")
    new.write_text(str(seconds))
    new.replace(clock)


def clock_behind(scene: Scene) -> Lines:
    return clock_moved(scene, -_YEAR)


def clock_jumps(scene: Scene) -> Lines:
    return clock_moved(scene, _YEAR, -_YEAR, 0)


# Others


def second_process(scene: Scene) -> Lines:
    """A second process on the same run is turned away and the first goes on; the lock of a killed one does not stay."""
    workdir = scene.copy()
    step = saved_steps(workdir)[-1]
    with scene.commands.start(*scene.flags(workdir)) as first:
        wait_for(workdir, step + 2, first)
        first.send_signal(signal.SIGSTOP)  # it must not end before the second has come
        before = contents(workdir)
        lines = check(scene.refused(workdir), f"is being written by process {first.pid} on .*wait for it or choose")
        assert contents(workdir) == before
        first.send_signal(signal.SIGCONT)
        wait_for(workdir, step + 4, first)
        first.kill()
        first.communicate()
    scene.goes_on(workdir)
    return lines


def second_launcher(scene: Scene) -> Lines:
    """A second launcher on the same working folder is turned away, and the first ends as ever."""
    workdir, commands = scene.copy(), scene.commands
    line = [sys.executable, "-m", "launch.local", "depth_ablation", f"--compilation_cache={commands.cache}"]
    line += [*Commands.many_checkpoints, "--workers=1", f"--workdir={workdir}"]
    with commands.popen(line) as first:
        wait_for(workdir, saved_steps(workdir)[-1] + 1, first)
        first.send_signal(signal.SIGSTOP)
        second = subprocess.run(line, env=commands.environment, capture_output=True, text=True, timeout=300)
        lines = check(
            refusal(second, 1), f"^working folder {workdir} is being written by process {first.pid} on .*wait"
        )
        first.send_signal(signal.SIGCONT)
        _, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    same(workdir, scene.uninterrupted)
    return lines


def other_format(scene: Scene) -> Lines:
    """A run that was begun by code of another format is refused; one of before there were formats goes on."""
    workdir = scene.copy()
    path = run_of(workdir) / "environment.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"format": 0, "source": {"commit": "ab" * 20, "dirty": False}}))
    before = contents(workdir)
    commit = f"in format 0 by commit {'ab' * 20}, and .*: check out that commit to finish it"
    lines = check(scene.refused(workdir), f"unfinished run in {run_of(workdir)} was begun {commit}")
    assert contents(workdir) == before
    del record["format"]
    path.write_text(json.dumps(record))
    scene.goes_on(workdir, saved_steps(workdir)[-1])
    return lines


def other_code(scene: Scene) -> Lines:
    """Code that has changed since is no reason to refuse, but said."""
    workdir = scene.copy()
    path = run_of(workdir) / "environment.json"
    record = json.loads(path.read_text())
    record["source"] |= {"commit": "ab" * 20, "dirty": False, "sha256": "0" * 64}
    path.write_text(json.dumps(record))
    return check(scene.goes_on(workdir), "^warning: .*may not give the bits .*code: commit abababababab -> ")
