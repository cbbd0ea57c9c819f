"""widen-floats: quantized models compute in float32 between their quantizers."""

from dataclasses import dataclass, replace

import numpy as np

from mpqc.graph import Graph, Node, TensorType
from mpqc.passes.base import Pass, fresh

NARROW = ("float16", "bfloat16")
# Operators whose result has the type of an operand, or of an attribute that is changed here.
_TYPED = frozenset({"Cast", "DequantizeLinear", "com.microsoft::DequantizeLinear", "MatMulNBits"})


@dataclass(frozen=True)
class WidenFloats(Pass):
    """Before: float16 or bfloat16 values. After: the same operators in float32.

    ``%y = Conv(%x, %w) : f16``  =>  ``%y = Conv(%x, %w) : f32``

    Inputs and outputs of the graph keep their types; a Cast stands at each.
    """

    name = "widen-floats"

    def rewrite(self, graph: Graph) -> Graph:
        narrow = {name: kind for name, kind in graph.types.items() if kind.dtype in NARROW}
        if not narrow:
            return graph
        ends = [*graph.inputs, *graph.outputs]
        names = {name: fresh(graph, f"{name}.f32") for name in ends if name in narrow}
        constants = {
            names.get(name, name): graph.constants[name].astype(np.float32)
            for name in narrow
            if name in graph.constants
        }
        types = {
            names.get(name, name): TensorType("float32", kind.shape)
            for name, kind in narrow.items()
        }
        nodes = [_cast(names[name], name, "float32") for name in graph.inputs if name in names]
        for node in graph:
            inputs = tuple(names.get(name, name) for name in node.inputs)
            outputs = tuple(names.get(name, name) for name in node.outputs)
            made = any(name in narrow for name in node.outputs)
            if made and node.op not in _TYPED and not any(name in narrow for name in node.inputs):
                raw = {name: fresh(graph, f"{name}.narrow") for name in node.outputs}
                types |= {raw[name]: narrow[name] for name in node.outputs if name in narrow}
                nodes.append(replace(node, inputs=inputs, outputs=tuple(raw.values())))
                nodes += [
                    _cast(target, raw[name], "float32")
                    for name, target in zip(node.outputs, outputs, strict=True)
                ]
                continue
            nodes.append(replace(_float32(node), inputs=inputs, outputs=outputs))
        for name in dict.fromkeys(graph.outputs):
            if name in names and name not in graph.inputs and name not in graph.constants:
                nodes.append(_cast(name, names[name], graph.type(name).dtype))
                types[name] = graph.type(name)
        return graph.with_(nodes, constants=constants, types=types)


def _cast(target: str, source: str, dtype: str) -> Node:
    from mpqc.onnx_nodes import element_type

    return Node(f"{target}.cast", "Cast", (source,), (target,), {"to": element_type(dtype)})


def _float32(node: Node) -> Node:
    """The node without an attribute that asks for a narrow type."""
    from mpqc.onnx_nodes import element_type

    wanted = [element_type(dtype) for dtype in NARROW]
    attrs = dict(node.attrs)
    if node.op == "Cast" and attrs.get("to") in wanted:
        attrs["to"] = element_type("float32")
    for key in ("output_dtype", "precision"):
        if node.op.endswith("Linear") and attrs.get(key) in wanted:
            del attrs[key]
    return replace(node, attrs=attrs)
