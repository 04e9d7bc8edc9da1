"""Progress: plain lines where nobody looks at a terminal, a bar where somebody does, and an honest remaining time."""

import io
import re
import time
from types import SimpleNamespace

import pytest

from research.training import progress
from research.training.progress import Reporter

METRICS = {"loss": 1.25, "error": 0.5}


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when told to."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def lines(run):
    stream = io.StringIO()
    with Reporter(stream) as reporter:
        run(reporter)
    return stream.getvalue().splitlines()


def test_a_file_gets_plain_lines_and_no_escape_codes():
    def run(reporter):
        reporter.note("[1/2] a/path [bold]not markup[/bold] :smile: " + "x" * 300)
        reporter.start("[1/2] net", 4, 0)
        reporter.update(2, METRICS, 1.0, 1234.5)
        reporter.update(4, METRICS, 1.0, 1234.5)

    note, last = lines(run)
    assert note == "[1/2] a/path [bold]not markup[/bold] :smile: " + "x" * 300  # as given, on one line
    assert last.startswith("[1/2] net  step 4/4  loss 1.25")
    assert "50.0%" in last and re.search(r"1,23[45]", last) and last.endswith("0:00 left")
    assert "\x1b" not in note + last and "\r" not in note + last


def test_a_task_without_an_error_shows_its_loss():
    def run(reporter):
        reporter.start("net", 2, 0)
        reporter.update(2, {"loss": 0.1667}, 1.0, 10.0)

    assert lines(run) == ["net  step 2/2  loss 0.167  10 examples/s  0:00 left"]


def test_a_line_at_most_every_ten_seconds_and_one_at_the_end(clock):
    def run(reporter):
        reporter.start("net", 100, 0)
        for step in range(1, 101):
            clock.seconds += 1
            reporter.update(step, METRICS, 1.0, 1.0)

    steps = [int(re.search(r"step (\d+)/100", line)[1]) for line in lines(run)]
    assert steps == list(range(10, 101, 10))


def test_the_remaining_time_is_that_of_training_alone(clock):
    def run(reporter):
        reporter.start("net", 1_000, 0)
        clock.seconds += 500  # compiling and evaluating are not what is ahead
        reporter.update(10, METRICS, 20.0, 1.0)

    (line,) = lines(run)
    assert line.endswith("33:00 left")  # 990 steps of 2 seconds


def test_the_remaining_time_of_a_resumed_run_counts_the_steps_of_this_sitting(clock):
    def run(reporter):
        reporter.start("net", 1_000, 900)
        clock.seconds += 60
        reporter.update(950, METRICS, 100.0, 1.0)

    (line,) = lines(run)
    assert "step 950/1000" in line and line.endswith("1:40 left")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (9, "0:09"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.7, "1:00:00"),
        (360_061, "100:01:01"),
    ],
)
def test_clock(seconds, shown):
    assert progress.clock(seconds) == shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", ["80", "20"])
def test_a_terminal_gets_a_bar_that_leaves_only_the_notes(monkeypatch, columns):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", columns)
    stream = Terminal()
    with Reporter(stream) as reporter:
        reporter.note("before")
        for number in (1, 2):
            reporter.start(f"[{number}/2] net", 4, 0)
            for step in (2, 4):
                reporter.update(step, METRICS, 0.01, 1234.5)
                time.sleep(0.3)  # longer than the bar's period
            reporter.note(f"done {number}")
    written = stream.getvalue()
    assert "\x1b[" in written and "[2/" in written
    assert written.index("done 1") < written.index("done 2")
    assert not re.search(r"step \d/\d", written), "lines for files have no place on a terminal"
    if columns == "80":
        # A bar that is wider than the terminal wraps, and then stays where it should be drawn over.
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)
        assert max(len(line) for line in re.split(r"[\r\n]", plain)) <= 80
        assert "50.0%" in plain and "left" in plain


def test_the_bar_is_taken_down_when_the_run_fails(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with pytest.raises(KeyError), Reporter(stream) as reporter:
        reporter.start("net", 4, 0)
        raise KeyError
    assert stream.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in stream.getvalue()  # the cursor is back
