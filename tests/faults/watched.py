"""Runs the depth ablation as `python -m` does, and tells those who mean it harm what it is doing.

Each line that it appends to the file FAULTS_LOG is one system call, so that what was told before a SIGKILL is known:

    phase NAME      start, compile, train, evaluate, checkpoint, result, report, or `between` them
    from STEP       where the run begins or goes on
    step STEP       taken
    saving STEP     a checkpoint is about to be written
    saved STEP      it is acknowledged

Where FAULTS_FILL is `metrics:FILE`, `checkpoint:FILE` or `result:FILE`, the disk of FILE is filled to the last byte
before metrics that need another page, the third checkpoint or the result are written: the error is the system's own.
Where FAULTS_SLOW_DISK is a step, each checkpoint from there on lies half a second under its temporary name.

Where FAULTS_CLOCK is a file, the clock is off by as many seconds as stand in it, and moves when they change. (As on a
real machine, time since boot does not. Debian's faketime cannot do that: `time.sleep` fails or never returns with it.)
"""

import contextlib
import datetime
import os
import re
import runpy
import time


def tell(line):
    with open(os.environ["FAULTS_LOG"], "ab", buffering=0) as log:
        log.write(f"{line}\n".encode())


def fill(path):
    """Leaves no byte free on the disk of `path`."""
    with open(path, "ab", buffering=0) as ballast, contextlib.suppress(OSError):
        while ballast.write(bytes(4096)):
            pass


def around(owner, name, before=lambda *args: None, after=lambda *args: None):
    """Calls `before` and `after`, with the arguments, around a function of `owner`."""
    function = getattr(owner, name)

    def wrapper(*args, **kwargs):
        before(*args)
        result = function(*args, **kwargs)
        after(*args)
        return result

    setattr(owner, name, wrapper)


def watch():
    from experiments import runner
    from research.training import checkpoint, run_folder, timers
    from research.training.progress import Reporter

    timed = timers.Timers.__call__

    @contextlib.contextmanager
    def phase(self, name):
        tell(f"phase {name}")
        with timed(self, name) as lap:
            yield lap
        tell("phase between")

    timers.Timers.__call__ = phase
    around(Reporter, "start", after=lambda self, label, steps, at: tell(f"from {at}"))
    around(Reporter, "update", after=lambda self, step, *rest: tell(f"step {step}"))
    around(
        checkpoint,
        "save",
        before=lambda folder, step, *rest: tell(f"saving {step}"),
        after=lambda folder, step, *rest: tell(f"saved {step}"),
    )
    around(run_folder.RunFolder, "finish", before=lambda *args: tell("phase result"))

    report_of = runner.report_of
    runner.report_of = lambda module: lambda *args: (tell("phase report"), report_of(module)(*args))


def fill_before(what, path):
    from research.training import checkpoint, run_folder

    times = 0

    def count(*args):
        nonlocal times
        times += 1
        if times == 3:
            fill(path)

    def page_is_full(metrics):
        # A file on a full disk still grows to the end of its last page.
        size = metrics.path.stat().st_size
        if size % 4096 + sum(map(len, metrics._waiting)) > 4096:
            fill(path)

    if what == "metrics":
        around(run_folder.Metrics, "flush", before=page_is_full)
    elif what == "checkpoint":
        around(checkpoint, "save", before=count)
    else:
        around(run_folder.RunFolder, "finish", before=lambda *args: fill(path))


def slow_down_after(first):
    def wait(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        step = re.search(r"/\.tmp-\d+-step_(\d+)", path)
        if step and int(step[1]) >= first:
            time.sleep(0.5)

    around(os, "fsync", before=wait)


def move_clock(path):
    def off():
        with open(path) as file:  # replaced in one move
            return float(file.read())

    class Moved(datetime.datetime):
        __slots__ = ()  # of the size that extensions know

        @classmethod
        def now(cls, tz=None):
            return datetime_now(tz) + datetime.timedelta(seconds=off())

    true, datetime_now = time.time, datetime.datetime.now
    time.time = lambda: true() + off()
    time.time_ns = lambda: int(1e9 * time.time())
    datetime.datetime = Moved


if __name__ == "__main__":
    tell("phase start")
    watch()
    if "FAULTS_FILL" in os.environ:
        fill_before(*os.environ["FAULTS_FILL"].split(":", 1))
    if "FAULTS_SLOW_DISK" in os.environ:
        slow_down_after(int(os.environ["FAULTS_SLOW_DISK"]))
    if "FAULTS_CLOCK" in os.environ:
        move_clock(os.environ["FAULTS_CLOCK"])
    runpy.run_module("experiments.depth_ablation", run_name="__main__", alter_sys=True)
