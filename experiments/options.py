"""The fields of a Config as flags: how a field says what it is, the flag that it becomes, and the value read back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from research.errors import UsageError


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    identity: bool = True,
    implied: bool = False,
    may_be_empty: bool = False,
) -> Any:
    """A field of a Config or a cell.

    Args:
      default: its type is the flag's (a tuple is a comma-separated list); None needs the annotation `int | None` etc.
      help: the flag's help text.
      choices: the values a string may take; for a tuple, each of its elements.
      minimum: the smallest value allowed; for a tuple, each of its elements.
      identity: False for what does not change a cell's result (where the data lies, how many devices).
      implied: left out of a cell's identity where it has its default: for a field that came later than runs without it,
        which are the same runs.
      may_be_empty: of a tuple, as `--name=`.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "identity": identity, "implied": implied}
    return dataclasses.field(default=default, metadata=metadata | {"may_be_empty": may_be_empty})


def define(field: dataclasses.Field, script: Mapping[str, str]) -> None:
    """Defines the flag of a field; `script` are arguments of every definition."""
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    help_text, choices = field.metadata["help"], list(field.metadata["choices"])
    kind = kind.replace(" | None", "")
    if kind.startswith("tuple"):
        if choices:
            help_text += f" Any of: {', '.join(choices)}."
        default = None if field.default is None else [str(value) for value in field.default]
        flags.DEFINE_list(field.name, default, help_text, **script)
    elif choices:
        flags.DEFINE_enum(field.name, field.default, choices, help_text, **script)
    else:
        define = {"int": flags.DEFINE_integer, "float": flags.DEFINE_float, "bool": flags.DEFINE_bool}
        define.get(kind, flags.DEFINE_string)(field.name, field.default, help_text, **script)


def read(field: dataclasses.Field, value: Any) -> Any:
    """The value of a field from that of its flag.

    Raises:
      UsageError: it cannot be read, or is not within the field's choices and bounds.
    """
    shown = f"--{field.name}={','.join(value) if isinstance(value, list) else value}"
    choices, minimum = field.metadata["choices"], field.metadata["minimum"]
    found = value
    if isinstance(value, list):
        try:
            found = tuple((int if "int" in str(field.type) else str)(part) for part in value)
        except ValueError:
            raise UsageError(f"{shown} is not a list of whole numbers: write --{field.name}=1,2,3") from None
        if not found and not field.metadata["may_be_empty"]:
            raise UsageError(f"{shown} is empty: give at least one value")
        if len(set(found)) < len(found):
            raise UsageError(f"{shown} names a value twice: give each once")
    for part in found if isinstance(found, tuple) else (found,):
        if choices and part not in choices:
            raise UsageError(f"{shown}: {part!r} is unknown; choose from {', '.join(choices)}")
        if minimum is not None and part is not None and not part >= minimum:
            raise UsageError(f"{shown}: give at least {minimum}")
    return found
