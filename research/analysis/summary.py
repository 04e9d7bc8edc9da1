"""A model as a table, one row a layer, with totals: shapes, activations, parameters, multiply-adds."""

from collections.abc import Sequence

from research.analysis.tables import render
from research.models.layers import Layer


def totals(layers: Sequence[Layer]) -> dict[str, int]:
    """Parameters, multiply-adds, convolution and dense activations of the whole network, for one example."""
    return {
        "parameters": sum(layer.parameters * layer.repeats for layer in layers),
        "macs": sum(layer.macs * layer.repeats for layer in layers),
        "activations": sum(layer.activations * layer.repeats for layer in layers),
        "weight_layers": sum(layer.repeats for layer in layers if layer.macs),
    }


def describe(name: str, input_shape: tuple[int, ...], layers: Sequence[Layer]) -> str:
    """The table as text. Activations are numbers put out, normalisation layers counted too; 4 bytes each in float32."""
    rows = [
        {
            "layer": layer.name,
            "kind": layer.kind,
            "x": layer.repeats,
            "output": "x".join(map(str, layer.output_shape)),
            "activations": layer.activations * layer.repeats,
            "parameters": layer.parameters * layer.repeats,
            "multiply-adds": layer.macs * layer.repeats,
        }
        for layer in layers
    ]
    total = totals(layers)
    last = {"layer": "total", "kind": f"{total['weight_layers']} weight layers", "x": "", "output": ""}
    rows.append(
        last | {"activations": total["activations"], "parameters": total["parameters"], "multiply-adds": total["macs"]}
    )
    memory = [f"{4 * total[part] / 2**20:,.1f} MiB of {part}" for part in ("parameters", "activations")]
    shape = "x".join(map(str, input_shape))
    return render(f"{name}, input {shape}", rows) + f"\n\nfloat32, one example, forward: {', '.join(memory)}"
