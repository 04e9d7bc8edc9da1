"""The long form of the fault tests: every fault and many kills, and a table of what came of them.

    python tests/faults/long.py [--kills=50] [--into_saves=10] [--seed=0] [--workdir=FOLDER]

Exit code 0 where everything is as it should be. The table goes to standard output, in Markdown.
"""

import argparse
import datetime
import os
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from research.training import environment
from tests.commands import Commands, wait_for
from tests.faults import kills, scenarios
from tests.faults.scene import Impossible, Scene


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how many, by SIGKILL")
    parser.add_argument("--into_saves", type=int, default=10, help="how many of them inside a checkpoint save")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workdir", type=Path, help="where the runs go; a temporary folder if not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        workdir = (options.workdir or Path(temporary)).absolute()
        if workdir.exists() and any(workdir.iterdir()):
            parser.error(f"--workdir={workdir} is not empty: choose another")
        (workdir / "kills").mkdir(parents=True)
        commands = Commands(workdir / "compiled")
        print(_hardware(), flush=True)
        passed = _kill(commands, workdir / "kills", options)
        return 0 if _harm(commands, workdir) and passed else 1


def _hardware() -> str:
    facts = environment.describe([], {})
    cpu, versions = facts["cpu"], facts["versions"]
    code = f"commit {facts['source']['commit']}{' with changes' if facts['source']['dirty'] else ''}"
    return (
        f"{datetime.date.today()}, {cpu['usable_cores']} cores of {cpu['model']}, {facts['system']}, Python "
        f"{versions['python']}, jax {versions['jax']}, {code}, load {os.getloadavg()[0]:.1f}\n"
    )


def _kill(commands: Commands, folder: Path, options: argparse.Namespace) -> bool:
    start, problem, count = time.monotonic(), "", kills.Count()
    try:
        kills.kill_many_times(commands, folder, options.kills, options.into_saves, options.seed, count=count, say=_say)
    except AssertionError as error:
        problem = str(error)
    phases = ", ".join(f"{number} in {phase}" for phase, number in count.phases.most_common())
    rows = {
        "kills by SIGKILL": f"{count.kills} ({phases})",
        "of them inside a checkpoint save": count.in_a_save,
        "restarts": count.restarts,
        "went on behind an acknowledged checkpoint": "never" if not problem else "see below",
        "steps lost, all in all": sum(count.lost),
        f"steps lost by one kill at most (a checkpoint every {kills.EVERY})": max(count.lost, default=0),
        "runs that were killed and ended": count.runs,
        "bitwise equal to the uninterrupted run (state, metrics, best state, figures)": problem or "yes, all",
        "minutes": f"{(time.monotonic() - start) / 60:.0f}",
    }
    print("| SIGKILL at random moments | |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()), end="\n\n", flush=True)
    return not problem and count.kills == count.restarts == options.kills and count.in_a_save >= options.into_saves


def _harm(commands: Commands, workdir: Path) -> bool:
    uninterrupted, interrupted = workdir / "uninterrupted", workdir / "interrupted"
    done = commands.run(*Commands.many_checkpoints, f"--workdir={uninterrupted}")
    assert done.returncode == 0, done.stderr
    with commands.start(*Commands.many_checkpoints, f"--workdir={interrupted}") as process:
        wait_for(interrupted, 8, process)
        process.terminate()
        process.communicate(timeout=60)
    print("| what | how | what the message said | as it should be |\n|---|---|---|---|")
    every = []
    for what, group in scenarios.ALL.items():
        for number, (scenario, how) in enumerate(group.items()):
            folder = workdir / f"{scenario.__name__}-{number}"
            folder.mkdir()
            try:
                said, passed = scenario(Scene(commands, uninterrupted, interrupted, folder)), "yes"
            except Impossible as reason:
                said, passed = [str(reason)], "not tried"
            except Exception as error:  # the others are still wanted
                said, passed = [" ".join(repr(error).split())[:500]], "NO"
            shown = "<br>".join(_short(line, folder) for line in said)
            print(f"| {what} | {how} | {shown} | {passed} |", flush=True)
            every.append(passed)
    return "NO" not in every


def _short(line: str, folder: Path) -> str:
    """A message without what differs from run to run."""
    line = line.replace(f"{folder}/", "").replace("|", "\\|").removeprefix("[1/1] ")
    return re.sub(rf"\S*runs/{Commands.cell}", "RUN", line).replace(f"{Commands.cell}: ", "RUN: ")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
