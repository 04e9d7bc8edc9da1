"""Data sets by name, and what the room may import."""

import ast
import pathlib

import pytest

from research.data import images
from research.errors import CarouselError, UsageError


def test_load_by_name():
    assert images.load("digits").name == "digits"


def test_unknown_name_lists_the_names():
    with pytest.raises(UsageError, match=r"unknown data set 'minst': one of digits, mnist, cifar10$"):
        images.load("minst")


def test_default_folder_is_data_in_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mnist", "cifar10"):
        with pytest.raises(CarouselError, match=f"missing in data/.*download {name} --data_dir=data`$"):
            images.load(name)


def test_home_and_spaces_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CarouselError, match=f"--data_dir='{tmp_path}/my data'`$"):
        images.load("mnist", "~/my data")


def test_readers_need_numpy_and_the_standard_library_alone():
    names = ("dataset", "files", "digits", "mnist", "cifar10", "images", "download")
    for name in names:
        tree = ast.parse((pathlib.Path(images.__file__).parent / f"{name}.py").read_text())
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module.split(".")[0])
        assert not modules & {"jax", "flax", "absl", "matplotlib", "sklearn", "PIL", "requests"}, name
