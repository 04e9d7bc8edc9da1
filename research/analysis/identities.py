"""The propagation identities of He et al. 2016, section 2, measured unit by unit.

With h and f identities, for units l < L of one stage:

    forward   x_L = x_l + sum_{i=l}^{L-1} F(x_i)                                  (equation 4)
    backward  dE/dx_l = dE/dx_L (1 + d/dx_l sum_{i=l}^{L-1} F(x_i))               (equation 5)

The first term of the backward pass reaches every unit whole. Where h scales, gates or convolves, it is multiplied unit
by unit (equation 8: a product of lambdas); where f is a ReLU it is masked. Here that term is measured on its own: the
gradient of the loss with the input of every branch cut off ('through shortcuts alone').
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from research.models import probe
from research.models.residual_unit import ResidualUnit


def identities(model: Any) -> Callable[[Any, jax.Array, jax.Array, jax.Array], dict[str, list[float]]]:
    """Measures one training-mode pass of a residual network, unit by unit.

    Args:
      model: a `ResNet` with shortcuts, not mapped over an axis, without rematerialisation.

    Returns:
      A function `(variables, images, labels, key) -> statistics`, of a prepared batch and its labels; the key draws the
      random vectors. One number a unit, in order of depth:
      `gradient_norm` and `shortcut_gradient_norm`, the L2 norms of dE/dx_l and of its part through shortcuts alone, and
      `shortcut_gradient_share`, their ratio;
      `jacobian_gain` and `shortcut_jacobian_gain`, the root mean square singular value |J|_F / sqrt(dim) of the unit's
      Jacobian and of its shortcut's, estimated with one random vector v as |J'v| / |v|;
      `activation_std` of what the unit reads;
      `forward_residue`, |x_L - x_l - sum F| / |x_L| from the unit to the end of its stage (a stage's first unit changes
      the shape: it has the next one's).
    """

    @jax.jit
    def measured(variables, images, labels, key):
        def loss(logits):
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        activations, gradients, _ = probe.observe(model, variables, images, loss)
        with probe.shortcuts_alone():
            _, direct, _ = probe.observe(model, variables, images, loss)
            shortcut_gains = _gains(model, variables, activations, key)
        return {
            "gradient_norm": _of_inputs(gradients, _norm),
            "shortcut_gradient_norm": _of_inputs(direct, _norm),
            "activation_std": _of_inputs(activations, jnp.std),
            "jacobian_gain": _gains(model, variables, activations, key),
            "shortcut_jacobian_gain": shortcut_gains,
            "forward_residue": _forward_residues(activations),
        }

    def measure(variables, images, labels, key):
        found = jax.device_get(measured(variables, images, labels, key))
        lists = {name: np.concatenate(parts).astype(float).tolist() for name, parts in found.items()}
        pairs = zip(lists["shortcut_gradient_norm"], lists["gradient_norm"], strict=True)
        lists["shortcut_gradient_share"] = [part / whole if whole else math.nan for part, whole in pairs]
        return lists

    return measure


def _stages(tree):
    """Pairs of the first unit's and, stacked, the other units' part of a collection, stage by stage."""
    number = 1
    while f"stage{number}_first" in tree:
        yield tree[f"stage{number}_first"], tree.get(f"stage{number}_rest")
        number += 1


def _of_inputs(tree, reduce):
    parts = []
    for first, rest in _stages(tree):
        parts.append(reduce(first["input"])[None])
        if rest is not None:
            parts.append(jax.vmap(reduce)(rest["input"]))
    return parts


def _norm(x):
    return jnp.sqrt(jnp.square(x).sum())


def _gains(model, variables, activations, key):
    """|J'v| / |v| of every unit for a random v: of J'v the expected square is |J|_F^2 / dim times that of v."""
    parts = []
    collections = {name: tree for name, tree in variables.items() if name in ("params", "batch_stats")}
    for stage, (first, rest) in enumerate(_stages(activations), start=1):
        for name, own in (("first", first), ("rest", rest)):
            if own is None:
                continue
            unit = ResidualUnit(**model.unit_arguments(stage, first=name == "first", train=True), parent=None)
            stacked = {kind: tree[f"stage{stage}_{name}"] for kind, tree in collections.items()}

            def gain(leaves, unit=unit):
                own, x, key = leaves

                def apply(x):
                    (y, _), _ = unit.apply(own, x, jax.random.fold_in(key, 0), mutable=["batch_stats"])
                    return y

                y, pull_back = jax.vjp(apply, x)
                v = jax.random.normal(jax.random.fold_in(key, 1), y.shape, y.dtype)
                return _norm(pull_back(v)[0]) / _norm(v)

            stage_key = jax.random.fold_in(key, stage)
            if name == "first":
                parts.append(gain((stacked, own["input"], stage_key))[None])
            else:
                parts.append(lax.map(gain, (stacked, own["input"], jax.random.split(stage_key, len(own["input"])))))
    return parts


def _forward_residues(activations):
    parts = []
    for _, rest in _stages(activations):
        if rest is None:
            parts.append(jnp.full((1,), jnp.nan))
            continue
        remaining = jnp.cumsum(rest["branch"][::-1], axis=0)[::-1]  # sum of F from each unit to the stage's end
        last = rest["output"][-1]
        residues = jax.vmap(_norm)(last - rest["input"] - remaining) / _norm(last)
        parts.append(jnp.concatenate([residues[:1], residues]))
    return parts
