"""fuse-requantize: accumulators become codes without passing through float memory."""

from dataclasses import dataclass

import numpy as np

from mpqc import numerics
from mpqc.graph import Array, Attribute, Graph, Node
from mpqc.passes.base import Pass, fresh

NEGLIGIBLE = 2.0**-100  # times an int32 it moves no sum that rint could see


@dataclass(frozen=True)
class FuseRequantize(Pass):
    """Before: Affine, Relu or Clip, Quantize, and nobody else reads between. After: Requantize.

        %y = Affine(%acc, %m, %b)
        %r = Relu(%y)
        %q = Quantize(%r) {scale=s, zero_point=z, bits=a}
        =>
        %q = Requantize(%acc, %m / s, %b / s) {zero_point=z, bits=a, low, high}

    Relu and Clip turn into bounds on the codes, which is exact because rounding is monotone;
    ``low`` and ``high`` are written where they differ from 0 and 2**bits - 1. This is where the
    scale moves into m and b, rounded to float32: from here on that is the model's arithmetic.
    """

    name = "fuse-requantize"

    def rewrite(self, graph: Graph) -> Graph:
        nodes: dict[str, Node] = {node.name: node for node in graph}
        constants: dict[str, Array] = {}
        for node in graph:
            if node.op != "Affine":
                continue
            chain, bounds, end = _chain(graph, node)
            readers = graph.consumers(end)
            if end in graph.outputs or not readers or any(r.op != "Quantize" for r in readers):
                continue
            fused = [_fused(graph, node, bounds, reader) for reader in readers]
            made = [pair for pair in fused if pair is not None]
            if len(made) < len(readers):
                continue
            for step in (node, *chain):
                del nodes[step.name]
            for requantize, arrays in made:
                nodes[requantize.name] = requantize
                constants |= arrays
        return graph.with_(nodes.values(), constants=constants)


def _chain(graph: Graph, affine: Node) -> tuple[list[Node], Array, str]:
    """The Relus and Clips after the node, their bounds float32 [2], and the value at the end."""
    chain: list[Node] = []
    bounds, value = np.array([-np.inf, np.inf], np.float32), affine.output
    while value not in graph.outputs and len(graph.consumers(value)) == 1:
        (node,) = graph.consumers(value)
        limits = clip_bounds(graph, node)
        if limits is None or node.inputs[0] != value:
            break
        chain.append(node)
        bounds = np.minimum(np.maximum(bounds, np.float32(limits[0])), np.float32(limits[1]))
        value = node.output
    return chain, bounds, value


def _fused(
    graph: Graph, affine: Node, bounds: Array, quantize: Node
) -> tuple[Node, dict[str, Array]] | None:
    acc, m, b = affine.inputs
    scale = np.float32(quantize.float_attr("scale"))
    with np.errstate(over="ignore", under="ignore"):
        factor, offset = graph.constants[m] / scale, graph.constants[b] / scale
    if not (np.isfinite(factor).all() and np.isfinite(offset).all()):
        return None
    factor = np.where(np.abs(factor) < NEGLIGIBLE, np.float32(0), factor)
    names = tuple(fresh(graph, f"{quantize.name}.{suffix}") for suffix in ("m", "b"))
    attrs: dict[str, Attribute] = {
        "zero_point": quantize.int_attr("zero_point"),
        "bits": quantize.int_attr("bits"),
        "axis": affine.int_attr("axis", 1),
        **code_bounds(quantize, bounds),
    }
    node = Node(quantize.name, "Requantize", (acc, *names), quantize.outputs, attrs)
    return node, dict(zip(names, (factor, offset), strict=True))


def clip_bounds(graph: Graph, node: Node) -> tuple[float, float] | None:
    """What Relu or Clip limits its first operand to; None for other nodes and computed limits."""
    if node.op == "Relu":
        return 0.0, np.inf
    if node.op != "Clip":
        return None
    limits = {"min": -np.inf, "max": np.inf}
    for index, key in enumerate(limits, start=1):
        if key in node.attrs:  # before opset 11
            limits[key] = node.float_attr(key)
        operand = node.inputs[index] if len(node.inputs) > index else ""
        if operand and operand not in graph.constants:
            return None
        if operand:
            limits[key] = float(graph.constants[operand].reshape(()))
    return limits["min"], limits["max"]


def code_bounds(quantize: Node, bounds: Array) -> dict[str, Attribute]:
    """Attributes low and high of codes whose values were limited to ``bounds`` before.

    Args:
        quantize: its own bounds hold too.
        bounds: float32 [2].
    """
    top = 2 ** quantize.int_attr("bits") - 1
    low, high = numerics.quantize(
        bounds,
        quantize.float_attr("scale"),
        quantize.int_attr("zero_point"),
        quantize.int_attr("low", 0),
        quantize.int_attr("high", top),
    ).tolist()
    return ({"low": low} if low > 0 else {}) | ({"high": high} if high < top else {})
