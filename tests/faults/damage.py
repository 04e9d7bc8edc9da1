"""Damage to a file of a run folder between two sittings: each function is a scenario; see scene.py."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.commands import run_of, saved_steps
from tests.faults.scene import Lines, Scene, check, contents


def cut(path: Path, share: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def flip_bit(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def change_digit(path: Path) -> None:
    """Changes the last digit of the first record."""
    first, *rest = path.read_bytes().split(b"\n")
    digit = first[-2:-1]
    assert digit.isdigit()
    path.write_bytes(b"\n".join([first[:-2] + (b"1" if digit != b"1" else b"2") + b"}", *rest]))


def checkpoints(workdir: Path) -> list[Path]:
    return [run_of(workdir) / "checkpoints" / f"step_{step:08d}.safetensors" for step in saved_steps(workdir)]


_SET_ASIDE = (
    r"damaged checkpoint \S+step_{newest:08d}.safetensors \({why}; renamed to \S+\.corrupt\): the run goes on from "
)
_NO_SUM, _WRONG_SUM = "no SHA-256 where one belongs", "its SHA-256 does not match its content"


def damaged_newest(scene: Scene, harm: Callable[[Path], None], why: str) -> Lines:
    """The newest checkpoint is noticed to be damaged, and the one before is used."""
    workdir = scene.copy()
    before, newest = saved_steps(workdir)
    harm(checkpoints(workdir)[-1])
    lines = scene.goes_on(workdir, before)
    return check(lines, _SET_ASIDE.format(newest=newest, why=why) + f"step {before}$")


def truncated(scene: Scene) -> Lines:
    return damaged_newest(scene, cut, _WRONG_SUM)


def emptied(scene: Scene) -> Lines:
    return damaged_newest(scene, lambda path: cut(path, 0), _NO_SUM)


def flipped(scene: Scene, seed: int = 0) -> Lines:
    generator = random.Random(seed)
    return damaged_newest(scene, lambda path: flip_bit(path, generator), f"({_NO_SUM}|{_WRONG_SUM})")


def flipped_five_times(scene: Scene) -> Lines:
    """In five copies."""
    return [line for seed in range(1, 6) for line in flipped(scene, seed)][:1]


def all_flipped(scene: Scene) -> Lines:
    workdir, generator = scene.copy(), random.Random(0)
    for path in checkpoints(workdir):
        flip_bit(path, generator)
    lines = scene.goes_on(workdir, 0)
    return check(lines, r"damaged checkpoint .*; renamed .*; renamed .*: the run starts from the beginning")


def newest_deleted(scene: Scene) -> Lines:
    workdir = scene.copy()
    before, _ = saved_steps(workdir)
    checkpoints(workdir)[-1].unlink()
    return check(scene.goes_on(workdir, before), f"going on from step {before}$")


def all_deleted(scene: Scene) -> Lines:
    workdir = scene.copy()
    shutil.rmtree(run_of(workdir) / "checkpoints")
    return check(scene.goes_on(workdir, 0), "starts from the beginning, for there is no checkpoint to go on from$")


def best_harmed(scene: Scene, harm: Callable[[Path], None], *, newest_too: bool = False) -> Lines:
    """The best state is written again where a checkpoint holds it, else the run, which does not need it, goes on."""
    workdir = scene.copy()
    if newest_too:
        checkpoints(workdir)[-1].unlink()
    harm(run_of(workdir) / "checkpoints" / "best.safetensors")
    lines = scene.goes_on(workdir, saved_steps(workdir)[-1], without="checkpoints/best.safetensors")
    said = (
        f"written again from the checkpoint of step {saved_steps(scene.interrupted)[-1 - newest_too]}|goes on without"
    )
    return check(lines, rf"best\.safetensors is (missing|damaged).*: .*({said})")


def best_deleted(scene: Scene) -> Lines:
    return best_harmed(scene, Path.unlink)


def half_deleted(scene: Scene) -> Lines:
    return best_harmed(scene, Path.unlink, newest_too=True)


def best_flipped(scene: Scene) -> Lines:
    return best_harmed(scene, lambda path: flip_bit(path, random.Random(0)))


def metrics_harmed(scene: Scene, harm: Callable[[Path], None]) -> Lines:
    workdir = scene.copy()
    before, newest = saved_steps(workdir)
    harm(run_of(workdir) / "metrics.jsonl")
    lost = r"metrics\.jsonl that the checkpoint of step {} counts on are lost or changed; an older one is used"
    return check(scene.goes_on(workdir, 0), lost.format(newest), lost.format(before))


def metrics_shortened(scene: Scene) -> Lines:
    return metrics_harmed(scene, cut)


def metrics_changed(scene: Scene) -> Lines:
    return metrics_harmed(scene, change_digit)


def metrics_deleted(scene: Scene) -> Lines:
    return metrics_harmed(scene, Path.unlink)


def config_harmed(scene: Scene, harm: Callable[[Path], None], line: str) -> Lines:
    workdir = scene.copy()
    harm(run_of(workdir) / "config.json")
    before = contents(workdir)
    lines = check(scene.refused(workdir), line)
    assert contents(workdir) == before
    return lines


def config_deleted(scene: Scene) -> Lines:
    return config_harmed(scene, Path.unlink, r"has \S+ but no config\.json: choose another --workdir")


def config_truncated(scene: Scene) -> Lines:
    return config_harmed(scene, cut, r"config\.json is not valid JSON \(.*\); restore it from a copy")


def environment_harmed(scene: Scene, harm: Callable[[Path], None]) -> Lines:
    workdir = scene.copy()
    harm(run_of(workdir) / "environment.json")
    return check(scene.goes_on(workdir), r"warning: .*may not give the bits .* environment\.json, .*missing or damaged")


def environment_deleted(scene: Scene) -> Lines:
    return environment_harmed(scene, Path.unlink)


def environment_truncated(scene: Scene) -> Lines:
    return environment_harmed(scene, cut)


def compiled_truncated(scene: Scene) -> Lines:
    """Compiled programs, as one leaves them who is killed while he writes them, are made again without a word."""
    workdir = scene.copy()
    programs = {path: path.read_bytes() for path in scene.commands.cache.glob("jax-*/jit_stretch-*-cache")}
    for path in programs:
        cut(path)
    try:
        lines = scene.goes_on(workdir, saved_steps(workdir)[-1])
        again = [path.stat().st_size / len(content) for path, content in programs.items() if path.exists()]
        assert again and min(again) > 0.9, again
    finally:
        for path, content in programs.items():  # those of other runs are still wanted
            path.write_bytes(content)
    return check(lines, "going on from step")


def result_truncated(scene: Scene, share: float = 0.5) -> Lines:
    """Of a finished run."""
    workdir = scene.copy(scene.uninterrupted)
    path = run_of(workdir) / "result.json"
    cut(path, share)
    lines = check(
        scene.refused(workdir), r"result\.json is not valid JSON \(.*\); delete it and start the same command"
    )
    path.unlink()
    scene.goes_on(workdir, saved_steps(workdir)[-1])
    return lines


def result_emptied(scene: Scene) -> Lines:
    return result_truncated(scene, 0)
