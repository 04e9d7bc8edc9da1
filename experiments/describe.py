"""Prints a network of the library layer by layer: output shape, activations, parameters, multiply-adds, totals.

Shapes are evaluated abstractly, so 1,202 layers cost no memory. The flags are the arguments of the models'
constructors; a flag that the chosen model does not have is an error.
"""

import inspect
import re
import signal
import sys

from absl import app, flags

from experiments.command_line import parse_flags
from research.analysis import summary
from research.errors import CarouselError, UsageError
from research.models import MODELS
from research.models.layers import layers

# Arguments that change no shape.
_HIDDEN = {"axis_name", "dtype", "remat"}
# Height and width of the input in pixels; of the others 224.
_IMAGE_SIZES = {"resnet": 32}


def _parameters(constructor):
    return {name: p for name, p in inspect.signature(constructor).parameters.items() if name not in _HIDDEN}


def _documented(constructor, name: str) -> str:
    """What the constructor's docstring says of an argument."""
    found = re.search(
        rf"^ +{name}: (.*?)(?=^ +\w+: |^ *$)", inspect.getdoc(constructor) or "", re.DOTALL | re.MULTILINE
    )
    return " ".join(found[1].split()) if found else ""


def _define_flags() -> None:
    flags.DEFINE_enum("model", "resnet", sorted(MODELS), "Which family.")
    flags.DEFINE_integer(
        "image_size", None, "Height and width of the input in pixels (default: 32 for resnet, else 224).", lower_bound=1
    )
    flags.DEFINE_integer("channels", 3, "Channels of the input.", lower_bound=1)
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool, str: flags.DEFINE_string}
    families: dict[str, list[str]] = {}
    for family, constructor in MODELS.items():
        for name in _parameters(constructor):
            families.setdefault(name, []).append(family)
    for name, having in families.items():
        parameter = _parameters(MODELS[having[0]])[name]
        help_text = " ".join(
            f"{family} (default {_parameters(MODELS[family])[name].default}): {_documented(MODELS[family], name)}"
            for family in having
        )
        define[parameter.annotation](name, None, help_text)


def main(argv: list[str]) -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends us quietly
    values = flags.FLAGS
    constructor = MODELS[values.model]
    known = _parameters(constructor)
    given = {name: values[name].value for name in values if name in known and values[name].present}
    others = {name for constructor in MODELS.values() for name in _parameters(constructor)} - known.keys()
    size = values.image_size or _IMAGE_SIZES.get(values.model, 224)
    try:
        for name in others:
            if values[name].present:
                raise UsageError(f"--{name} is not an argument of {values.model}; it has {', '.join(known)}")
        input_shape = (size, size, values.channels)
        found = layers(constructor(**given), input_shape)
    except CarouselError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    shown = {name: p.default for name, p in known.items() if name in ("depth", "num_classes")} | given
    chosen = " ".join(f"{name}={shown[name]}" for name in known if name in shown)
    print(summary.describe(f"{values.model} {chosen}", input_shape, found))


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=parse_flags)
