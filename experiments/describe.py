"""Prints a network of the library layer by layer: output shape, activations, parameters, multiply-adds, totals.

Shapes are evaluated abstractly, so 1,202 layers cost no memory. The flags are the arguments of the models'
constructors; a flag that the chosen model does not have is an error.
"""

import inspect
import sys

from absl import app, flags

from experiments.runner import parse_flags
from research.analysis import summary
from research.errors import CarouselError, UsageError
from research.models import MODELS
from research.models.layers import layers

# Arguments that change no shape.
_HIDDEN = {"axis_name"}


def _parameters(constructor):
    return {name: p for name, p in inspect.signature(constructor).parameters.items() if name not in _HIDDEN}


def _define_flags() -> None:
    flags.DEFINE_enum("model", "resnet", sorted(MODELS), "Which family.")
    flags.DEFINE_integer("image_size", 32, "Height and width of the input in pixels.", lower_bound=1)
    flags.DEFINE_integer("channels", 3, "Channels of the input.", lower_bound=1)
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool, str: flags.DEFINE_string}
    seen = set()
    for family, constructor in MODELS.items():
        for name, parameter in _parameters(constructor).items():
            if name not in seen:
                define[parameter.annotation](name, parameter.default, f"Of {family}: see its constructor.")
                seen.add(name)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    known = _parameters(MODELS[values.model])
    given = {name: values[name].value for name in values if name in known and values[name].present}
    others = {name for constructor in MODELS.values() for name in _parameters(constructor)} - known.keys()
    try:
        for name in others:
            if values[name].present:
                raise UsageError(f"--{name} is not an argument of {values.model}; it has {', '.join(known)}")
        input_shape = (values.image_size, values.image_size, values.channels)
        found = layers(MODELS[values.model](**given), input_shape)
    except CarouselError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    chosen = " ".join(f"{name}={given.get(name, p.default)}" for name, p in known.items())
    print(summary.describe(f"{values.model} {chosen}", input_shape, found))


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=parse_flags)
