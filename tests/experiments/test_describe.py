"""The command that prints a network: its totals, its flags, and one line for a wrong request."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import research

ROOT = Path(research.__file__).parents[1]


def describe(*flags):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "experiments.describe", *flags],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "40"},  # a narrow terminal must not cut the table
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_depth_56():
    done = describe("--depth=56", "--block=plain")
    assert (done.returncode, done.stderr) == (0, "")
    title, header, *rows = done.stdout.splitlines()
    assert title == "resnet depth=56 block=plain num_classes=10, input 32x32x3"
    assert header.split() == ["layer", "kind", "x", "output", "activations", "parameters", "multiply-adds"]
    cells = [row.split() for row in rows]
    assert cells[0] == ["stem_conv", "Conv", "1", "32x32x16", "16,384", "432", "442,368"]
    rest = ["stage1_rest/conv1", "Conv", "8", "32x32x16", "131,072", "18,432", "18,874,368"]
    assert rest in cells
    total, blank, memory = cells[-3:]
    activations = 2 * (19 * 32 * 32 * 16 + 18 * 16 * 16 * 32 + 18 * 8 * 8 * 64) + 10
    assert total == ["total", "56", "weight", "layers", f"{activations:,}", "853,018", "125,485,696"]
    assert not blank
    assert " ".join(memory) == (
        f"float32, one example, forward: 3.3 MiB of parameters, {4 * activations / 2**20:.1f} MiB of activations"
    )
    columns = [sum(int(row[-1 - k].replace(",", "")) for row in cells[:-3]) for k in range(3)]
    assert columns == [125_485_696, 853_018, activations]


def test_every_flag_reaches_the_network():
    done = describe("--depth=8", "--width=4", "--num_classes=3", "--image_size=8", "--channels=1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "resnet depth=8 width=4 num_classes=3, input 8x8x1"
    assert lines[2].split() == ["stem_conv", "Conv", "1", "8x8x4", "256", "36", "2,304"]
    assert lines[-4].split() == ["head", "Dense", "1", "3", "3", "51", "48"]


@pytest.mark.parametrize(
    ("flags", "total"),
    [  # multiply-adds as published, for the paper's stride and for torchvision's
        (("--depth=50", "--stride_on=1x1"), ["54", "25,557,032", "3,857,973,248"]),
        (("--depth=50",), ["54", "25,557,032", "4,089,184,256"]),
        (("--depth=18",), ["21", "11,689,512", "1,814,073,344"]),
        (("--depth=152",), ["156", "60,192,808", "11,513,626,624"]),
    ],
)
def test_imagenet_networks_at_224_pixels(flags, total):
    done = describe("--model=imagenet_resnet", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith(
        "num_classes=1000" + " stride_on=1x1" * (len(flags) > 1) + ", input 224x224x3"
    )
    cells = done.stdout.splitlines()[-3].split()
    assert [cells[1], *cells[-2:]] == total  # weight layers, the projections among them


def test_the_help_explains_every_flag_in_the_constructors_words():
    done = describe("--help")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "imagenet_resnet (default 50): 18 or 34 (basic units)" in text
    assert "resnet (default identity): of shortcut and branch (R2, Table 1): identity" in text
    assert "stride_on" in text and "default" in text and "(default None): " not in text


def test_a_closed_pipe_ends_it_quietly():
    command = f"{sys.executable} -m experiments.describe --depth=20 | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--dept=20", ["Unknown command line flag 'dept'", "--help lists the flags"]),
        ("--depth=21", ["depth 21 is not 6n+2", "try 20 or 26"]),
        ("--block=bottleneck", ["'bottleneck'", "plain", "residual"]),
        ("--image_size=0", ["image_size"]),
        ("56", ["unexpected argument '56'"]),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(flag, parts):
    done = describe(flag)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr
