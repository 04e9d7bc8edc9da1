"""The house of DESIGN.md, section 1: a room imports from floors below it, and three packages stay in their rooms."""

import ast
from pathlib import Path

import pytest

import research

ROOT = Path(research.__file__).parents[1]
# Of the longest prefix counts; rooms on one floor do not import each other.
FLOORS = {
    "research": 0,  # research/*.py: errors, files
    "research.ops": 1,
    "research.data": 1,
    "research.models": 2,
    "research.tasks": 3,
    "research.training": 4,
    "research.analysis": 4,
    "experiments": 5,
    "launch": 6,
}
PLACES_OF_PACKAGE = {
    "absl.flags": ("experiments", "launch"),
    "flax": ("research.models", "research.training.state"),  # the one place that calls init and apply
    "matplotlib": ("research.analysis",),
    "torch": (
        "experiments.benchmark_torch",
        "experiments.benchmark_torch_start",
    ),  # a peer to measure, where it is installed
    # Nowhere: TensorFlow and what brings it, and what a run must not need.
    **dict.fromkeys(("tensorflow", "clu", "tensorflow_datasets", "ray", "xmanager", "pytest"), ()),
}


def imports(path, package):
    """Dotted names that a file imports, in functions too; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(name):
    """The room of a dotted name of this repository, or None."""
    parts = name.split(".")
    return next((p for k in range(len(parts), 0, -1) if (p := ".".join(parts[:k])) in FLOORS), None)


def within(name, package):
    return name == package or name.startswith(package + ".")


def broken_rules(module, names):
    room = room_of(module)
    for name in names:
        for package, places in PLACES_OF_PACKAGE.items():
            if within(name, package) and not any(within(module, place) for place in places):
                yield f"{module} imports {name}, which belongs to {' and '.join(places) or 'no room'}"
        other = room_of(name)
        if other is not None and other != room and FLOORS[other] >= FLOORS[room]:
            yield f"{module} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[other]})"


def sources():
    """Every source file: path, dotted name, package."""
    for top in ("research", "experiments", "launch"):
        for path in sorted((ROOT / top).rglob("*.py")):
            package = ".".join(path.parent.relative_to(ROOT).parts)
            yield path, package if path.name == "__init__.py" else f"{package}.{path.stem}", package


def test_every_source_is_in_a_room_of_the_house():
    packages = {package for _, _, package in sources()}
    assert packages >= FLOORS.keys()
    # A folder without a floor would pass for a part of the room around it: give a new room one in FLOORS.
    assert not [package for package in packages if package.count(".") == 1 and package not in FLOORS]
    assert len(list(sources())) > 20


def test_imports_go_down():
    broken = [rule for path, module, package in sources() for rule in broken_rules(module, imports(path, package))]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("research.ops", "from research.models import resnet"),
        ("research.ops", "from research.data import digits"),  # the same floor
        ("research.models", "import research.tasks.classification"),
        ("research.analysis", "def f():\n    from research.training import state"),
        ("research.training", "from ..analysis import results"),
        ("research.training", "from experiments import runner"),
        ("experiments", "import launch.local"),
        ("research", "from research.ops.conv import conv2d"),
        ("research.training", "from absl import flags"),
        ("research.models", "import absl.flags as f"),
        ("research.ops", "from flax import linen as nn"),
        ("research.tasks", "import flax.struct"),
        ("research.training", "import flax"),
        ("experiments", "import matplotlib.pyplot as plt"),
        ("research.data", "import tensorflow as tf"),
    ],
)
def test_a_broken_rule_is_found(room, source, tmp_path):
    path = tmp_path / "new.py"
    path.write_text(source)
    assert len(list(broken_rules(f"{room}.new", imports(path, room)))) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("research.analysis", "from research.models import probe\nimport matplotlib"),
        ("research.training", "from flax import linen\nfrom research.errors import UsageError\nfrom . import state"),
        ("launch", "from absl import flags, app\nfrom experiments.runner import main\nimport researching"),
        ("research.ops", "from absl import logging\nfrom .. import errors"),
    ],
)
def test_a_kept_rule_is_not(room, source, tmp_path):
    path = tmp_path / "new.py"
    path.write_text(source)
    assert not list(broken_rules(f"{room}.state", imports(path, room)))
