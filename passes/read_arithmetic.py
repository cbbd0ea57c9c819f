"""read-arithmetic: quantized operators that a model spells out in float arithmetic."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from mpqc.graph import Array, Attribute, Graph, Node
from mpqc.passes.base import Pass, fresh

Found: TypeAlias = tuple[Node, dict[str, Array]]


@dataclass(frozen=True)
class ReadArithmetic(Pass):
    """Before: Cast, Mul, Add, Round, Clip. After: the quantized operators that they mean.

        Cast(Clip(Round(%x / s) + z, low, high)) to uint8        =>  Quantize(%x)
        (Cast(%codes) - z) * s                                   =>  Dequantize(%codes)
        Cast(%acc) * m + b                                       =>  Affine(%acc, m, b)
        Cast(Clip(Round(Cast(%acc) * m + b) + z, low, high))     =>  Requantize(%acc, m, b)

    This is how integer networks are written in standard operators, ``mpqc export --format
    integer`` among them. Each step rounds as the quantized operator does; what differs in any
    way stays as it is.
    """

    name = "read-arithmetic"

    def rewrite(self, graph: Graph) -> Graph:
        nodes, constants = {}, {}
        for node in graph:
            made = _codes(graph, node) or _dequantize(graph, node) or _affine(graph, node)
            if made is None:
                nodes[node.name] = node
            else:
                nodes[node.name] = made[0]
                constants.update(made[1])
        # What only the replaced nodes read is dead now, and left to drop-dead.
        return graph.with_(nodes.values(), constants=constants)


def _codes(graph: Graph, node: Node) -> Found | None:
    """Quantize or Requantize for the Cast that ends it."""
    if node.op != "Cast" or graph.type(node.output).dtype != "uint8":
        return None
    clip = _producer(graph, node.inputs[0], "Clip")
    if clip is None or len(clip.inputs) != 3:
        return None
    low, high = (_scalar(graph, name) for name in clip.inputs[1:])
    shifted = _operand(graph, clip.inputs[0], "Add")
    if shifted is None or low is None or high is None:
        return None
    rounded, zero_point = _producer(graph, shifted[0], "Round"), _one(shifted[1])
    whole = all(value == np.rint(value) for value in (low, high, zero_point or 0.0))
    if rounded is None or zero_point is None or not whole or not 0 <= low < high <= 255:
        return None
    bits = int(high).bit_length()
    attrs: dict[str, Attribute] = {"zero_point": int(zero_point), "bits": bits}
    if low > 0:
        attrs["low"] = int(low)
    if high < 2**bits - 1:
        attrs["high"] = int(high)
    if not 0 <= zero_point < 2**bits:
        return None
    value = rounded.inputs[0]
    divided = _producer(graph, value, "Div")
    scale = None if divided is None else _scalar(graph, divided.inputs[1])
    if divided is not None and scale is not None:
        source = graph.type(divided.inputs[0])
        same = source.dtype == "float32" and source.shape == graph.shape(node.output)
        if not same or not np.isfinite(scale) or scale <= 0:
            return None
        quantize = Node(node.name, "Quantize", divided.inputs[:1], node.outputs,
                        {"scale": float(scale), **attrs})  # fmt: skip
        return quantize, {}
    return _scaled(graph, node, value, "Requantize", attrs)


def _affine(graph: Graph, node: Node) -> Found | None:
    return _scaled(graph, node, node.output, "Affine", {})


def _scaled(
    graph: Graph, node: Node, value: str, op: str, attrs: dict[str, Attribute]
) -> Found | None:
    """The operator ``op`` in the place of ``node`` if ``value`` is ``float(acc) * m + b``."""
    added = _operand(graph, value, "Add")
    product = None if added is None else _operand(graph, added[0], "Mul")
    if added is None or product is None:
        return None
    cast = _producer(graph, product[0], "Cast")
    if cast is None or graph.type(cast.inputs[0]).dtype != "int32":
        return None
    acc = cast.inputs[0]
    maker = graph.producer(acc)
    if maker is None or maker.op not in ("IntConv", "IntMatMul"):
        return None
    shape = graph.shape(acc)
    if graph.shape(value) != shape:
        return None
    axis = 1 if maker.op == "IntConv" else len(shape) - 1
    names = tuple(fresh(graph, f"{node.name}.{suffix}") for suffix in ("m", "b"))
    vectors = [_along(array, shape, axis) for array in (product[1], added[1])]
    if vectors[0] is None or vectors[1] is None:
        return None
    made = Node(node.name, op, (acc, *names), node.outputs, {"axis": axis, **attrs})
    return made, dict(zip(names, (vectors[0], vectors[1]), strict=True))


def _dequantize(graph: Graph, node: Node) -> Found | None:
    product = _operand(graph, node.output, "Mul")
    if product is None:
        return None
    shifted, scale = _producer(graph, product[0], "Sub"), _one(product[1])
    if shifted is None or scale is None or not np.isfinite(scale) or scale <= 0:
        return None
    cast = _producer(graph, shifted.inputs[0], "Cast")
    zero_point = _scalar(graph, shifted.inputs[1])
    if cast is None or zero_point is None or graph.type(cast.inputs[0]).dtype != "uint8":
        return None
    if graph.shape(cast.inputs[0]) != graph.shape(node.output):
        return None
    if zero_point != np.rint(zero_point) or not 0 <= zero_point <= 255:
        return None
    attrs: dict[str, Attribute] = {"scale": float(scale), "zero_point": int(zero_point)}
    return Node(node.name, "Dequantize", cast.inputs[:1], node.outputs, attrs), {}


def _producer(graph: Graph, value: str, op: str) -> Node | None:
    node = graph.producer(value)
    return node if node is not None and node.op == op else None


def _operand(graph: Graph, value: str, op: str) -> tuple[str, Array] | None:
    """Computed and constant float32 operand of the commutative node that defines the value."""
    node = _producer(graph, value, op)
    if node is None or graph.type(value).dtype != "float32":
        return None
    given = [name for name in node.inputs if name in graph.constants]
    computed = [name for name in node.inputs if name not in graph.constants]
    if len(given) != 1 or len(computed) != 1:
        return None
    return computed[0], graph.constants[given[0]]


def _scalar(graph: Graph, name: str) -> float | None:
    return _one(graph.constants[name]) if name in graph.constants else None


def _one(array: Array) -> float | None:
    return float(array.reshape(())) if array.size == 1 else None


def _along(array: Array, shape: tuple[int, ...], axis: int) -> Array | None:
    """float32 [channels] of a constant that broadcasts along one axis alone."""
    extents = (1,) * (len(shape) - array.ndim) + array.shape
    if len(extents) != len(shape) or any(e != 1 for i, e in enumerate(extents) if i != axis):
        return None
    if not np.isfinite(array).all():
        return None
    return np.array(np.broadcast_to(array.reshape(-1), shape[axis : axis + 1]), np.float32)
