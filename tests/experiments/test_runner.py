"""The shared command line: flags from a Config, what overrides what, exit codes, and grids in which a cell fails."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from experiments import command_line, runner
from experiments.options import option
from experiments.runner import Experiment
from research.errors import UsageError
from research.training import status

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Config:
    colour: str = option("red", "What it looks like.", choices=("red", "green", "dark_blue"))
    folder: str | None = option(None, "Where it lies.")
    sizes: tuple[int, ...] = option((1, 2), "How large each is.", minimum=1)
    shapes: tuple[str, ...] = option(("round",), "How each looks.", choices=("round", "square"))
    rate: float = option(0.5, "How fast.", minimum=0)
    loud: bool = option(False, "Whether it can be heard.")
    minutes: int | None = option(None, "How long.", minimum=1)
    hours: int | None = option(None, "How long, in hours.", minimum=1)
    count: int = option(7, "How many.")


EXPERIMENT = Experiment(
    name="toy",
    config=Config,
    cells=lambda config: [],
    run=lambda cell, context: {},
    report=lambda workdir, names: None,
    presets={"paper": {"minutes": 90, "rate": 0.25, "sizes": (10, 20)}, "quick": {"count": 1}},
    smoke={"hours": 1, "count": 2},
    exclusive=(("minutes", "hours"),),
)


@pytest.fixture
def parse():
    """Parses arguments as the experiment does; the flags are gone afterwards."""
    before = set(flags.FLAGS)

    def call(*arguments):
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        runner.define_flags(EXPERIMENT)
        command_line.parse_flags(["toy", *arguments])
        return runner.parse_config(EXPERIMENT, flags.FLAGS)

    yield call
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


def test_without_flags_the_defaults(parse):
    assert parse() == Config()


@pytest.mark.parametrize(
    ("argument", "changed"),
    [
        ("--colour=dark_blue", {"colour": "dark_blue"}),
        ("--folder=a folder/x", {"folder": "a folder/x"}),
        ("--sizes=3", {"sizes": (3,)}),
        ("--sizes=30,4,5", {"sizes": (30, 4, 5)}),
        ("--sizes=3, 4", {"sizes": (3, 4)}),
        ("--shapes=square,round", {"shapes": ("square", "round")}),
        ("--rate=1e-3", {"rate": 0.001}),
        ("--rate=2", {"rate": 2.0}),
        ("--loud", {"loud": True}),
        ("--noloud", {"loud": False}),
        ("--minutes=5", {"minutes": 5}),
        ("--count=-3", {"count": -3}),
        ("--count=7", {}),
    ],
)
def test_a_flag_for_each_field_of_its_type(parse, argument, changed):
    expected = dataclasses.replace(Config(), **changed)
    assert parse(argument) == expected
    assert [type(value) for value in dataclasses.astuple(parse(argument))] == [
        type(value) for value in dataclasses.astuple(expected)
    ]


def test_every_flag_has_the_help_of_its_field(parse):
    parse()
    for field in dataclasses.fields(Config):
        flag = flags.FLAGS[field.name]
        assert field.metadata["help"] in flag.help
    assert "round, square" in flags.FLAGS["shapes"].help
    assert flags.FLAGS["colour"].parser.enum_values == ["red", "green", "dark_blue"]


# What overrides what: defaults < preset < given; smoke makes cells small; of an exclusive group one is left.


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (["--preset=paper"], {"minutes": 90, "rate": 0.25, "sizes": (10, 20)}),
        (["--preset=quick"], {"count": 1}),
        (["--preset=paper", "--rate=3"], {"minutes": 90, "rate": 3.0, "sizes": (10, 20)}),
        # Given, though equal to the default.
        (["--preset=paper", "--rate=0.5", "--sizes=1,2"], {"minutes": 90}),
        (["--preset=paper", "--hours=2"], {"hours": 2, "rate": 0.25, "sizes": (10, 20)}),
        (["--preset=paper", "--minutes=2"], {"minutes": 2, "rate": 0.25, "sizes": (10, 20)}),
        (["--smoke"], {"hours": 1, "count": 2}),
        (["--smoke", "--count=9"], {"hours": 1, "count": 9}),
        (["--smoke", "--minutes=3"], {"minutes": 3, "count": 2}),
        (["--smoke", "--hours=3"], {"hours": 3, "count": 2}),
        (["--smoke", "--preset=paper"], {"hours": 1, "count": 2, "rate": 0.25, "sizes": (10, 20)}),
        (["--smoke", "--preset=quick"], {"hours": 1, "count": 2}),
        (["--smoke", "--preset=paper", "--minutes=4"], {"minutes": 4, "count": 2, "rate": 0.25, "sizes": (10, 20)}),
    ],
)
def test_what_overrides_what(parse, arguments, changed):
    expected = dataclasses.replace(Config(), **changed)
    assert parse(*arguments) == expected
    assert parse(*reversed(arguments)) == expected
    assert EXPERIMENT.presets["paper"]["minutes"] == 90 and EXPERIMENT.smoke["hours"] == 1, "a preset was changed"


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes=2", "--hours=3"], "--minutes=2 and --hours=3: give exactly one of them"),
        (["--minutes=2", "--hours=3", "--preset=paper"], "--minutes=2 and --hours=3"),
        (["--sizes=1,2,1"], "--sizes=1,2,1 names a value twice"),
        (["--sizes=1,01"], "--sizes=1,01 names a value twice"),
        (["--shapes=round,round"], "--shapes=round,round names a value twice"),
        (["--sizes="], "--sizes= is empty: give at least one value"),
        (["--shapes="], "--shapes= is empty"),
        (["--sizes=a,b"], "--sizes=a,b is not a list of whole numbers: write --sizes=1,2,3"),
        (["--sizes=1.5"], "--sizes=1.5 is not a list of whole numbers"),
        (["--sizes=1,,2"], "--sizes=1,,2 is not a list of whole numbers"),
        (["--sizes=1,0"], "--sizes=1,0: give at least 1"),
        (["--shapes=round,oval"], "--shapes=round,oval: 'oval' is unknown; choose from round, square"),
        (["--rate=-0.1"], "--rate=-0.1: give at least 0"),
        (["--rate=nan"], "--rate=nan: give at least 0"),
        (["--minutes=0"], "--minutes=0: give at least 1"),
    ],
)
def test_values_that_make_no_sense_are_refused_with_a_cure(parse, arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        parse(*arguments)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--colour=blue", "red|green|dark_blue"),
        ("--preset=papier", "paper"),
        ("--colur=red", "colour"),
        ("--count=many", "many"),
        ("--count=1.5", "1.5"),
        ("--rate=fast", "fast"),
        ("--loud=perhaps", "perhaps"),
        ("red", "unexpected argument 'red'"),
    ],
)
def test_what_cannot_be_parsed_ends_in_one_line_and_code_2(parse, capsys, argument, message):
    with pytest.raises(SystemExit) as stop:
        parse(argument)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and "--help" in line


def test_the_identity_of_a_cell_leaves_out_what_changes_no_result():
    @dataclasses.dataclass(frozen=True)
    class Cell:
        size: int
        where: str = option("here", "", identity=False)
        depth: int = option(3, "")

    assert runner.identity(Cell(5)) == {"size": 5, "depth": 3}


# Whole commands. The toy experiment is a script of its own; its cells do not train, so nothing is compiled.

TOY = '''"""A toy.

It counts."""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

from experiments.options import option
from experiments.runner import Experiment, main


@dataclasses.dataclass(frozen=True)
class Config:
    sizes: tuple[int, ...] = option((1, 2, 3), "How large each is.")
    fail: tuple[int, ...] = option((0,), "Sizes that diverge.")
    error: str = option("", "What is raised.")


@dataclasses.dataclass(frozen=True)
class Cell:
    size: int
    fail: bool = option(False, "", identity=False)
    error: str = option("", "", identity=False)

    @property
    def name(self):
        return f"size-{self.size}"


def cells(config):
    return [Cell(size, size in config.fail, config.error) for size in config.sizes]


def run(cell, context):
    from research.errors import CarouselError, Interrupted, UsageError
    from research.training.loop import Diverged

    print(f"running {cell.name}", flush=True)
    if cell.fail:
        raise Diverged(f"{cell.name} diverged", 5)
    if cell.error == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
        assert context.should_stop()
    elif cell.error == "twice":
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
    elif cell.error == "file":
        open(context.folder.path / "missing" / "file")
    elif cell.error == "full":
        raise OSError(28, "No space left on device")
    elif cell.error == "bug":
        raise ZeroDivisionError("a bug")
    elif cell.error:
        raise {"carousel": CarouselError, "usage": UsageError, "interrupted": Interrupted}[cell.error]("what happened")
    return {"value": cell.size * 10}


def report(workdir, names):
    results = {name: workdir / "runs" / name / "result.json" for name in names}
    print(json.dumps({name: json.loads(path.read_text()) if path.exists() else None for name, path in results.items()}))


if __name__ == "__main__":
    main(Experiment("toy", Config, cells, run, report))
'''


@pytest.fixture
def toy(commands, tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(TOY)

    def call(*arguments):
        command = [sys.executable, script, f"--workdir={tmp_path / 'work'}", "--compilation_cache=", *arguments]
        return subprocess.run(
            command, env=commands.environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    return call


def ran(done):
    return [line.split("-")[1] for line in done.stdout.splitlines() if line.startswith("running")]


def test_help_is_readable_and_no_failure(toy):
    done = toy("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.lstrip().startswith("A toy.\n\nIt counts.")
    for name, text in {
        "sizes": "How large each is.",
        "fail": "Sizes that diverge.",
        "workdir": "runs/toy",
        "smoke": "",
        "report_only": "",
        "compilation_cache": "compiled",
        "tensorboard": "",
        "profile": "START:STOP",
    }.items():
        assert re.search(rf"--(\[no\])?{name}\b", done.stdout) and text in done.stdout
    assert "'1,2,3'" in done.stdout
    assert "pdb" not in done.stdout and "verbosity" not in done.stdout, "flags of other modules"


def test_a_cell_that_diverges_does_not_stop_the_others(toy, tmp_path):
    done = toy("--fail=2")
    assert ran(done) == ["1", "2", "3"]
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "error" in line] == ["error: size-2 diverged"]
    reported = json.loads(done.stdout.splitlines()[-1])
    assert reported["size-1"] == {"value": 10} and reported["size-3"] == {"value": 30}
    assert reported["size-2"] == {"failure": "size-2 diverged", "failed_at_step": 5}
    # It is a result: nothing is run again, and the command still says that a cell failed.
    again = toy("--fail=2")
    assert (again.returncode, ran(again)) == (1, [])
    assert again.stderr.count("finished before") == 3 and "error: size-2 diverged" in again.stderr
    assert toy("--sizes=1,3").returncode == 0


def test_finished_cells_are_kept_and_the_grid_can_grow(toy):
    assert ran(toy("--sizes=2")) == ["2"]
    done = toy("--sizes=1,2,3")
    assert (done.returncode, ran(done)) == (0, ["1", "3"])
    assert re.findall(r"(\[2/3\] size-2): finished before", done.stderr) == ["[2/3] size-2"]
    assert json.loads(done.stdout.splitlines()[-1]).keys() == {"size-1", "size-2", "size-3"}


def test_report_only_runs_nothing(toy, tmp_path):
    done = toy("--report_only")
    assert (done.returncode, ran(done)) == (0, [])
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("carousel", 1, "error: what happened"),
        ("usage", 2, "error: what happened"),
        ("interrupted", 75, "interrupted: what happened"),
        ("file", 1, "missing/file.*No such file or directory"),
        ("full", 1, "No space left on device"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line_and_its_code(toy, tmp_path, error, code, line):
    done = toy(f"--error={error}")
    assert done.returncode == code and ran(done) == ["1"]
    (only,) = done.stderr.splitlines()
    assert re.search(line, only)
    if error == "full":
        assert str(tmp_path / "work") in only, "where it was is not said"
    assert not (tmp_path / "work" / "runs" / "size-1" / "result.json").exists()


def test_a_bug_keeps_its_traceback(toy):
    done = toy("--error=bug")
    assert done.returncode == 1 and "ZeroDivisionError: a bug" in done.stderr


def test_a_stop_signal_between_cells(toy):
    done = toy("--error=signal")
    assert done.returncode == 75 and ran(done) == ["1"]
    assert "interrupted: " in done.stderr.splitlines()[-1] and "1 of 3 cells are finished" in done.stderr
    again = toy()
    assert again.returncode == 0 and ran(again) == ["2", "3"]


def test_a_second_interrupt_ends_at_once(toy, tmp_path):
    done = toy("--error=twice")
    assert done.returncode == 75 and ran(done) == ["1"]
    assert "stopping" in done.stderr and done.stderr.splitlines()[-1].startswith("interrupted at once")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "work" / "runs" / "size-1" / "result.json").exists()


def test_every_configuration_is_checked_before_the_first_cell_runs(toy, tmp_path):
    assert toy("--sizes=3").returncode == 0
    config = tmp_path / "work" / "runs" / "size-3" / "config.json"
    config.write_text(config.read_text().replace("3", "4"))
    done = toy()
    assert done.returncode == 2 and ran(done) == []
    assert re.search("size-3 belongs to another configuration: size is 4 there and 3 here", done.stderr)


def test_the_number_of_threads_is_set_for_those_who_call_python_themselves(commands, tmp_path):
    # XLA:CPU deadlocks with too few threads for its devices; the launcher sets NPROC, and so must a bare command.
    environment = {name: value for name, value in commands.environment.items() if name != "NPROC"}
    script = "import os; from experiments import depth_ablation, runner; import research.training.loop as loop\n"
    script += "loop.train = lambda *_, **__: print('NPROC', os.environ['NPROC']) or os._exit(0)\n"
    script += "runner.main(depth_ablation.EXPERIMENT)"
    command = [
        sys.executable,
        "-c",
        script,
        "--smoke",
        "--devices=4",
        "--compilation_cache=",
        f"--workdir={tmp_path}",
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("NPROC") and int(done.stdout.split()[1]) >= 16, done.stderr


def test_starting_loads_neither_jax_nor_a_drawing_library(commands):
    """What `--help` and a refused request need not wait for, and a training not before its first step."""
    names = [path.stem for path in (ROOT / "experiments").glob("*.py") if "EXPERIMENT =" in path.read_text()]
    assert "depth_ablation" in names and "benchmark" in names
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(f'experiments.{name}')\n"
        "print([name for name in ('jax', 'flax', 'matplotlib', 'torch') if name in sys.modules])"
    )
    done = commands.script(script, *names)
    assert done.stdout == "[]\n", done.stderr


# What launchers use


def test_one_cell_of_the_grid_without_a_report(toy, tmp_path):
    done = toy("--sizes=1,2", "--only_cell=size-2")
    assert (done.returncode, done.stdout) == (0, "running size-2\n")
    assert [path.name for path in (tmp_path / "work" / "runs").iterdir()] == ["size-2"]
    done = toy("--sizes=1,2", "--only_cell=size-3")
    assert done.returncode == 2
    assert done.stderr == "error: --only_cell=size-3: the cells are size-1, size-2\n"


def test_cells_to_come_can_be_seen(toy, tmp_path):
    assert toy("--sizes=4,5", "--error=carousel").returncode == 1
    work = tmp_path / "work"
    told = {each.name: (each.state, each.message) for each in status.read_all(work)}
    assert told == {"size-4": ("failed", "what happened"), "size-5": ("pending", "")}
    assert toy("--sizes=4,5").returncode == 0
    assert {each.state for each in status.read_all(work)} == {"done"}


def test_the_recorded_command_makes_the_same_runs_elsewhere(parse):
    parse()
    words = [
        "--sizes=1,2",
        "--workdir=a",
        "--loud",
        "--workdir",
        "b",
        "--only_cell",
        "c",
        "--noreport_only",
        "--tensorboard",
        "--profile=1:2",
        "--count=1",
    ]
    assert command_line.without_flags(words, runner._OF_THE_PLACE) == ["--sizes=1,2", "--loud", "--count=1"]


def test_experiments_by_name():
    assert runner.load("depth_ablation").name == "depth_ablation"
    with pytest.raises(UsageError, match="no experiment 'describe'; there are benchmark, depth_ablation, "):
        runner.load("describe")
