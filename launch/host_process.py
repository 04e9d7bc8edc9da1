"""What `launch.hosts` starts: one of the processes that train the cells of an experiment jointly."""

import contextlib
import dataclasses
import os
import signal
import sys
import traceback
from pathlib import Path

from absl import flags, logging

from experiments import command_line, runner
from launch import cells, hosts
from research.errors import CarouselError, Interrupted, Lost, UsageError


def run(asked: cells.Launch, own: flags.FlagValues) -> int:
    """Trains all cells with the other processes; the writer makes the report. Returns the exit code."""
    import jax

    from research.training import distributed

    # While it waits for the others in JAX's code, Python could not answer a signal.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    place, scratch = hosts.place_of(own, os.environ), Path(os.environ[hosts.SCRATCH])
    devices = asked.grid.config.devices
    if devices:
        jax.config.update("jax_num_cpu_devices", devices // place.processes)
    distributed.start(*place, own.start_timeout)
    (scratch / hosts.JOINED).touch()
    asked_to_stop = command_line.StopRequest()
    command_line.end_with_launcher()
    _check_same(asked, place)
    # The command that makes the same runs without a launcher, for the record.
    sys.argv[1:] = [*asked.words, *([] if devices else [f"--devices={jax.device_count()}"])]

    def stop() -> bool:
        return distributed.any_of(asked_to_stop())

    with contextlib.ExitStack() as stack:
        grid, stream = asked.grid, None
        if distributed.is_writer():
            stack.enter_context(cells.lock(asked.workdir))
        else:
            grid = dataclasses.replace(grid, workdir=scratch / "work")
            stream = stack.enter_context(open(os.devnull, "w"))
            flags.FLAGS.tensorboard, flags.FLAGS.profile = False, None
        try:
            runner.run_cells(asked.experiment, grid, stop, flags.FLAGS, stream)
        except Interrupted as stopped:
            distributed.leave()
            if distributed.is_writer():
                raise
            raise Interrupted(f"process {place.process} of {place.processes}, with the others") from stopped
        failed = distributed.from_writer(lambda: bool(runner.failures(grid)))
        distributed.leave()
        if distributed.is_writer():  # the others do not wait for the drawing
            return runner.conclude(asked.experiment, grid)
    return CarouselError.exit_code if failed and not asked.experiment.divergence_is_a_result else 0


def _check_same(asked: cells.Launch, place: hosts.Place) -> None:
    """Processes that were asked for different things would wait for each other for ever."""
    import jax

    from research.training import distributed

    cell_fields = [
        runner.identity(cell) | {"parallel": cell.parallel, "devices": cell.devices} for cell in asked.grid.cells
    ]
    mine = {"experiment": asked.experiment.name, "cells": repr(cell_fields), "jax": jax.__version__}
    theirs = distributed.from_writer(lambda: mine)
    if odd := [name for name in mine if mine[name] != theirs[name]]:
        raise UsageError(
            f"process {place.process} has another {odd[0]} than process 0: start all with the same flags and versions"
        )


def main() -> None:
    """Ends without Python's usual leave-taking: JAX's runtime would wait for processes that are gone, then abort."""
    logging.set_verbosity(logging.WARNING)
    # What Gloo prints of its connections is not among the experiment's results.
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    own = hosts.own_flags()
    try:
        code = command_line.guarded(lambda: run(cells.parse(sys.argv, own), own))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        from research.training import distributed

        if distributed.is_loss(error):
            print(f"a message to another process failed: {distributed.line(error)}", file=sys.stderr)
            code = Lost.exit_code
        else:
            traceback.print_exc()
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
