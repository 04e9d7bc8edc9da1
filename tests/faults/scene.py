"""A run that something is done to, and what is asked of it afterwards.

A scenario is a function of a `Scene` that does harm to a copy of a run, asks what the same command makes of it, and
returns the lines that users see. It raises AssertionError where something is not as it should be, `Impossible` where
this machine cannot be harmed so.
"""

import dataclasses
import re
import shutil
from pathlib import Path

from tests.commands import Commands, bits, notes, refusal

Lines = list[str]


class Impossible(Exception):
    """This machine does not let us do that."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """Where it happens.

    Attributes:
      commands: starts experiments.
      uninterrupted: the working folder of the run that nothing happened to.
      interrupted: that of the same run, stopped on its way.
      folder: an empty one.
    """

    commands: Commands
    uninterrupted: Path
    interrupted: Path
    folder: Path

    def copy(self, of: Path | None = None, to: Path | None = None) -> Path:
        """A copy of a working folder, of the interrupted one if not told otherwise."""
        workdir = to or self.folder / "work"
        shutil.rmtree(workdir, ignore_errors=True)
        return shutil.copytree(of or self.interrupted, workdir)

    def flags(self, workdir: Path) -> tuple[str, ...]:
        return (*Commands.many_checkpoints, f"--only_cell={Commands.cell}", f"--workdir={workdir}")

    def refused(self, workdir: Path) -> str:
        """The one line with which the same command is refused, with exit code 1."""
        return refusal(self.commands.run(*self.flags(workdir)), 1)

    def goes_on(self, workdir: Path, step: int | None = None, without: str = "", flags: tuple[str, ...] = ()) -> Lines:
        """What the same command says besides its progress, or where it begins; the end must be equal to the bit.

        Args:
          workdir: of the run.
          step: from which it must go on; 0 is from the beginning.
          without: a file that may be missing in the end.
          flags: further ones.
        """
        done = self.commands.run(*self.flags(workdir), *flags)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stderr.splitlines() if "going on from step" in line]
        if step is not None:
            assert [line.endswith(f" {step}") for line in lines] == [True] * bool(step), done.stderr
        same(workdir, self.uninterrupted, without)
        begins = re.findall(r"^.*(?:going on from step|starts from the beginning).*$", done.stderr, re.MULTILINE)
        return notes(done.stderr) or begins


def same(workdir: Path, uninterrupted: Path, without: str = "") -> None:
    """Raises AssertionError where a run did not end as the uninterrupted one."""
    found, expected = bits(workdir), bits(uninterrupted)
    if without and found[without] is None:
        expected[without] = None
    assert found == expected, f"{workdir} ended differently"


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below `folder` but locks, which name who asked last, and the status, which comes and goes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("lock", "status.json"))
    return {path.relative_to(folder): path.read_bytes() for path in files}


def check(lines: Lines | str, *patterns: str) -> Lines:
    """The lines, each of which matches its pattern."""
    lines = [lines] if isinstance(lines, str) else lines
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.search(pattern, line), f"{line!r} does not say {pattern!r}"
    return lines
