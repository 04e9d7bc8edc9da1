"""Fine-tuning: an ImageNet network on a small data set, from pre-trained weights and from random ones.

Two runs a seed with one recipe, which differ in where they start: from a file of weights with a new classifier, or from
the paper's initialisation. All layers are trained, with BatchNorm in training mode. The file is one that
`python -m research.models.weights import` wrote; its metadata says the depth. Nothing is fetched here.

    x = (resize(image / 255) - mean) / std        torchvision's constants; one channel is repeated to three

Images are resized bilinearly inside the compiled program. The network halves the map five times, so 32 pixels leave
1x1 to the last stage: the default, for two cores, where ResNet-18 on the embedded digits takes minutes. Give more on
an accelerator.

What is not the published practice (Kornblith et al. 2019, for one): images are resized to 224, where the features were
learned, and here to --image_size; learning rate and weight decay are searched for each start, and here both share one
that nobody searched for; training from scratch goes on for longer (He et al. 2018 find that it catches up then), and
here it takes the same steps. Crops and mirror images are of the resized image; crops are filled with the mean colour.
Linear probes (all but the classifier frozen) are left out. A bottleneck's stride is on its 3x3, as in torchvision's and
timm's files. In runs as short as the default, part of the held-out error from scratch is that BatchNorm's running
averages (0.9 a step) lag behind; those of pre-trained weights begin nearer.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import images, precision
from experiments.options import option
from experiments.runner import Experiment, main
from research.errors import CarouselError, UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours in 0 to 1
WIDTH = 64
DEFAULTS = {name: {"width": WIDTH, "epochs": epochs} for name, epochs in (("digits", 3), ("mnist", 1), ("cifar10", 3))}


@dataclasses.dataclass(frozen=True)
class Config(images.ImageConfig):
    """The flags."""

    weights: str | None = option(None, "File of `python -m research.models.weights import`.")
    starts: tuple[str, ...] = option(("weights", "scratch"), "Where to start.", choices=("weights", "scratch"))
    depth: int | None = option(None, "Layers (default: those of --weights; 18 without).")
    image_size: int = option(32, "Height and width in pixels that images are resized to.", minimum=16)
    learning_rate: float = option(0.01, "Divided by 10 after 1/2 and 3/4 of the steps.")
    warmup_steps: int = option(0, "First steps at a tenth of the learning rate.", minimum=0)
    evaluations: int = option(5, "How often, evenly spread, validation and test errors are measured.", minimum=1)
    # XLA:CPU convolves slowly inside of loops: a step a call took two thirds of the time.
    steps_per_call: int = option(1, "Steps of a compiled stretch; give more on an accelerator.", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(images.ImageCell):
    """One network to train; from scratch there are no weights."""

    start: str
    depth: int
    image_size: int
    weights_sha256: str | None = None
    weights: str | None = option(None, "", identity=False)

    @property
    def name(self) -> str:
        name = f"{self.start}-resnet{self.depth}-s{self.image_size}-{self.dataset}-seed{self.seed}"
        return name + precision.suffix(self)


def cells(config: Config) -> list[Cell]:
    """The grid: starts x seeds."""
    from research.models import imagenet_resnet

    if "weights" in config.starts and not config.weights:
        raise UsageError("--starts has weights: say which by --weights=FILE, or take --starts=scratch")
    if config.width not in (None, WIDTH):
        raise UsageError(f"--width={config.width}: the first stage of an ImageNet network has {WIDTH} channels")
    recipe = images.recipe(config, DEFAULTS) | {"image_size": config.image_size, "depth": config.depth or 18}
    origins = {"scratch": {}}
    if config.weights:
        path = Path(config.weights).expanduser()
        recipe["depth"], digest = identify(path)
        if config.depth not in (None, recipe["depth"]):
            raise UsageError(f"--depth={config.depth}: {path} holds a ResNet-{recipe['depth']}; leave --depth out")
        origins["weights"] = {"weights": str(path), "weights_sha256": digest}
    imagenet_resnet(recipe["depth"])  # raises where there is no such network
    return [
        Cell(**recipe, **origins[start], start=start, seed=seed) for start in config.starts for seed in config.seeds
    ]


def identify(path: Path) -> tuple[int, str]:
    """The depth in the metadata of a file of weights, and the file's SHA-256; uses no device.

    Raises:
      CarouselError: the file cannot be read or is of another kind.
    """
    import safetensors

    from research.data import files
    from research.models import weights

    weights.read(path)  # raises where it is no whole safetensors file
    with safetensors.safe_open(path, "numpy") as file:
        content = json.loads((file.metadata() or {}).get("carousel", "{}"))
    if content.get("format") != weights.FORMAT:
        cure = "make one by `python -m research.models.weights import SOURCE DEST`"
        raise CarouselError(f"{path} is not a file of weights in our format: {cure}")
    return content["depth"], files.sha256(path.read_bytes())


def prepare(pixels: Any, mean: Any = None, *, size: int) -> Any:
    """Images as torchvision's ImageNet networks expect them, float32 `[batch, size, size, 3]`.

    Args:
      pixels: 0 to 255, `[batch, height, width, 1 or 3]`.
      mean: of the data set; not used.
      size: height and width in pixels.
    """
    import jax
    import jax.numpy as jnp

    batch, _, _, channels = pixels.shape
    x = jax.image.resize(pixels.astype(jnp.float32) / 255, (batch, size, size, channels), "bilinear")
    return (x - jnp.float32(MEAN)) / jnp.float32(STD)  # one channel becomes three by broadcasting


def run(cell: Cell, context: Any) -> Mapping[str, Any]:
    """Trains one network."""
    from research.models import imagenet_resnet, weights
    from research.training import state

    start, checksums = None, {}
    if cell.weights:
        if identify(Path(cell.weights)) != (cell.depth, cell.weights_sha256):
            raise CarouselError(f"{cell.weights} has changed since this command began: restore it or begin again")
        classes = images.load(cell.dataset, cell.data_dir).num_classes
        start = weights.replace_head(weights.load(cell.weights), classes, state.stream(cell.seed, "head"))
        checksums = {Path(cell.weights).name: cell.weights_sha256}
    make_model = functools.partial(imagenet_resnet, cell.depth, dtype=precision.dtype(cell))
    prepared = functools.partial(prepare, size=cell.image_size)
    return images.train(cell, make_model, context, start, prepare=prepared, checksums=checksums).result


def report(workdir: Path, names: list[str]) -> None:
    """Writes `summary.csv` and `figures/` into the working folder and prints the table."""
    from research.analysis import figures, results, tables

    runs = results.read_runs(workdir / "runs" / name for name in names)
    rows = [images.summary_row(run, ("start", "weights_sha256", "depth", "image_size")) for run in runs]
    tables.write_csv(workdir / "summary.csv", rows)
    starts = results.group(runs, lambda run: f"from {run.config['start']}")
    config = runs[0].config
    setting = f"ResNet-{config['depth']}, {config['dataset']} at {config['image_size']}x{config['image_size']}"
    title = f"\n{setting}: errors after {config['steps']} steps{precision.title(config)}"
    title += results.unfinished(names, runs)
    print(tables.render(title, [{"start": start} | _row(same) for start, same in starts.items()]))
    drawn = {
        "error_curves": figures.error_curves(starts, lambda run: run.config["depth"], "layers"),
        "loss_curves": figures.mean_curves(starts, "loss", "training loss", setting),
    }
    made_from, folder = figures.provenance(runs), workdir / "figures"
    written = [path for name, drawing in drawn.items() for path in figures.save(drawing, folder / name, made_from)]
    print(f"\nwritten: {workdir / 'summary.csv'}, {', '.join(map(str, written))}")


def _row(runs: Sequence[Any]) -> dict[str, Any]:
    from research.analysis import results

    return {
        "weights": (runs[0].config["weights_sha256"] or "-")[:12],
        "parameters": runs[0].result.get("params", "-"),
        **{f"{s} error": results.percent(runs, f"{s}_error") for s in ("train", "validation", "test")},
        "seconds": f"{sum(sum(run.result.get('seconds', {}).values()) for run in runs):.1f}",
    }


EXPERIMENT = Experiment(
    name="finetune",
    config=Config,
    cells=cells,
    run=run,
    report=report,
    smoke={"image_size": 16, "steps": 2, "batch_size": 8, "evaluations": 1},
    exclusive=(("epochs", "steps"),),
)

if __name__ == "__main__":
    main(EXPERIMENT)
