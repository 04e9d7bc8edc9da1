"""Equal units in a row as one compiled body, with or without keeping what is inside them for the backward pass."""

import functools

import jax
from flax import linen as nn
from jax import lax

from research.ops.segments import scan_in_segments

# So few units are written out: a loop stores what the backward pass reads in stacked arrays, which costs a tenth of a
# ResNet-20's step. More take longer to compile than that is worth.
_FEW = 4


def scanned(unit: type[nn.Module], length: int) -> type[nn.Module]:
    """`length` units in a row; every collection they hold gains a leading axis of units."""
    return nn.scan(
        unit,
        variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0, "perturbations": 0},
        split_rngs={"params": True},
        length=length,
        unroll=length if length <= _FEW else 1,
    )


def rematerialised(parent: nn.Module, name: str, unit: nn.Module, x: jax.Array, keys: jax.Array | None) -> jax.Array:
    """Applies the units that `scanned` made under `name`, keeping only the input of every segment of units.

    With n units in segments of about sqrt(n) / 2, the backward pass holds the inputs of n / segment segments and the
    inside of one: activation memory grows with the square root of depth, for one more forward pass. (Half of sqrt(n),
    since the inside of a unit weighs a few times its input.)

    Args:
      parent: the module that holds the variables, being applied, not initialised. Its units' probes are off.
      name: of the stacked units in it.
      unit: one unit, unbound, `unit(x, key) -> (y, None)`.
      x: what the first one reads.
      keys: one a unit, or None.
    """
    params = parent.variables["params"][name]
    statistics = parent.variables.get("batch_stats", {}).get(name, {})
    mutable = ["batch_stats"] if parent.is_mutable_collection("batch_stats") else []

    def one(x, leaves):
        params, statistics, key = leaves
        (y, _), updated = unit.apply({"params": params, "batch_stats": statistics}, x, key, mutable=mutable)
        return y, updated.get("batch_stats", {})

    size = segment_length(jax.tree.leaves(params)[0].shape[0])
    x, updated = scan_in_segments(functools.partial(lax.scan, one), x, (params, statistics, keys), size=size)
    if mutable:
        parent.put_variable("batch_stats", name, updated)
    return x


def segment_length(length: int) -> int:
    """Units of a segment, so that as little as possible is held: about half the square root of their number.

    Held are the inputs of whole segments, the inside of one, and that of the units left over; an inside weighs about
    four inputs.
    """
    return min(range(1, length + 1), key=lambda size: length // size + 4 * (size + length % size))
