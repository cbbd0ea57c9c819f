"""commute-quantize: quantize before the operators that only move or compare values."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from mpqc import numerics
from mpqc.graph import Array, Attribute, Graph, Node, TensorType
from mpqc.passes.base import Pass, fresh
from mpqc.passes.fuse_requantize import clip_bounds, code_bounds
from mpqc.passes.moves import moves

SMALLEST_SCALE = 2.0**-100  # from here on 255 steps divided by one are 255 again


@dataclass(frozen=True)
class CommuteQuantize(Pass):
    """Before: every reader of a moved float value is the same Quantize. After: codes move.

        %y = MaxPool(%x)                    %x.q4 = Quantize(%x) {bits=4}
        %y.q4 = Quantize(%y) {bits=4}  =>   %y.q4 = MaxPool(%x.q4)

        %y = Dequantize(%c) {scale=s}
        %q = Quantize(%y) {scale=s}    =>   %c

    Exact, because rounding is monotone and MaxPool picks one of its values. Relu and Clip
    vanish into the bounds ``low`` and ``high`` of the Quantize. The moved operators compute on
    uint8; padding, a constant, is quantized as the rest (zero becomes the zero point, and
    MaxPool's minus infinity the code 0).
    """

    name = "commute-quantize"

    def rewrite(self, graph: Graph) -> Graph:
        while (simpler := _step(graph)) is not None:
            graph = simpler
        return graph


def _step(graph: Graph) -> Graph | None:
    """The graph after one move, or None when there is none left."""
    for node in graph:
        if readers := _equal_quantizes(graph, node):
            return _moved(graph, node, readers)
        bounds = clip_bounds(graph, node)
        if bounds is not None and _float(graph, node) and _only_quantized(graph, node.output):
            return _absorbed(graph, node, bounds)
        if (same := _same_codes(graph, node)) is not None:
            return same
    return None


def _float(graph: Graph, node: Node) -> bool:
    return graph.type(node.output).dtype == "float32"


def _only_quantized(graph: Graph, value: str) -> bool:
    readers = graph.consumers(value)
    return bool(readers) and value not in graph.outputs and all(r.op == "Quantize" for r in readers)


def _equal_quantizes(graph: Graph, node: Node) -> tuple[Node, ...]:
    """The Quantize nodes behind the node when they are all that reads it, and all alike."""
    if not moves(node) and node.op not in ("Concat", "Pad"):
        return ()
    outputs = [value for value in node.outputs if value]
    data = node.inputs if node.op == "Concat" else node.inputs[:1]
    if any(graph.type(value).dtype != "float32" for value in data):
        return ()
    if any(value in graph.constants for value in data):  # a table, of which few rows are read
        return ()
    if node.op == "Pad" and not _pads_with_constant(graph, node):
        return ()
    if not all(_only_quantized(graph, value) for value in outputs):
        return ()
    readers = tuple(reader for value in outputs for reader in graph.consumers(value))
    alike = all(dict(reader.attrs) == dict(readers[0].attrs) for reader in readers)
    returned = any(reader.output in graph.outputs for reader in readers)
    return readers if alike and not returned else ()


def _same_codes(graph: Graph, node: Node) -> Graph | None:
    """The codes themselves for a Quantize of what they stand for, clipped where it clips."""
    told = graph.producer(node.inputs[0]) if node.op == "Quantize" else None
    if told is None or told.op != "Dequantize" or node.output in graph.outputs:
        return None
    scale, zero_point = node.float_attr("scale"), node.int_attr("zero_point")
    if (told.float_attr("scale"), told.int_attr("zero_point")) != (scale, zero_point):
        return None
    if scale < SMALLEST_SCALE:
        return None
    codes, nodes, constants = told.inputs[0], {other.name: other for other in graph}, {}
    lowest, highest = _range(graph, codes)
    top = 2 ** node.int_attr("bits") - 1
    types = {}
    limits = (("Max", max(node.int_attr("low", 0), lowest), lowest),
              ("Min", min(node.int_attr("high", top), highest), highest))  # fmt: skip
    del nodes[node.name]
    for op, limit, reached in limits:
        if limit != reached:
            name, bound = (fresh(graph, f"{node.output}.{what}") for what in (op, f"{op}.bound"))
            constants[bound] = np.array(limit, np.uint8)
            types[name] = graph.type(node.output)
            nodes[name] = Node(name, op, (codes, bound), (name,))
            codes = name
    renamed = [
        replace(other, inputs=tuple(codes if v == node.output else v for v in other.inputs))
        for other in nodes.values()
    ]
    return graph.with_(renamed, constants=constants, types=types)


def _range(graph: Graph, codes: str) -> tuple[int, int]:
    """Lowest and highest code that a value can have."""
    node = graph.producer(codes)
    while node is not None and moves(node):
        node = graph.producer(node.inputs[0])
    if node is None or node.op not in ("Quantize", "Requantize"):
        return 0, 255
    return node.int_attr("low", 0), node.int_attr("high", 2 ** node.int_attr("bits") - 1)


def _pads_with_constant(graph: Graph, node: Node) -> bool:
    value = node.inputs[2] if len(node.inputs) > 2 else ""
    return not value or value in graph.constants


def _absorbed(graph: Graph, node: Node, bounds: tuple[float, float]) -> Graph:
    """Relu or Clip into the Quantize nodes behind it."""
    limits = np.array(bounds, np.float32)
    nodes = {other.name: other for other in graph if other.name != node.name}
    for reader in graph.consumers(node.output):
        kept = {key: value for key, value in reader.attrs.items() if key not in ("low", "high")}
        attrs = kept | code_bounds(reader, limits)
        nodes[reader.name] = replace(reader, inputs=node.inputs[:1], attrs=attrs)
    return graph.with_(nodes.values())


@dataclass
class _Codes:
    """Quantize nodes with the same rule, made or found."""

    graph: Graph
    attrs: Mapping[str, Attribute]
    made: dict[str, Node] = field(default_factory=dict)
    types: dict[str, TensorType] = field(default_factory=dict)

    def of(self, value: str) -> str:
        """Name of the codes of a float value."""
        for reader in self.graph.consumers(value):
            if reader.op == "Quantize" and dict(reader.attrs) == dict(self.attrs):
                return reader.output
        if value not in self.made:
            name = fresh(self.graph, f"{value}.q{self.attrs['bits']}")
            self.made[value] = Node(name, "Quantize", (value,), (name,), self.attrs)
            self.types[name] = TensorType("uint8", self.graph.shape(value))
        return self.made[value].output


def _moved(graph: Graph, node: Node, readers: tuple[Node, ...]) -> Graph:
    codes = _Codes(graph, readers[0].attrs)
    moved = len(node.inputs) if node.op == "Concat" else 1
    inputs = [*(codes.of(value) for value in node.inputs[:moved]), *node.inputs[moved:]]
    constants: dict[str, Array] = {}
    if node.op == "Pad":
        inputs, constants = _pad_inputs(graph, node, inputs, readers[0])
    # One Quantize behind each output gives the moved node its output; the others are aliases.
    names: dict[str, str] = {}
    for reader in readers:
        names.setdefault(reader.inputs[0], reader.output)
    aliases = {reader.output: names[reader.inputs[0]] for reader in readers}
    dropped = {reader.name for reader in readers}
    nodes = [
        replace(other, inputs=tuple(aliases.get(value, value) for value in other.inputs))
        for other in graph
        if other.name not in dropped and other.name != node.name
    ]
    outputs = tuple(names.get(value, "") for value in node.outputs)
    nodes += [*codes.made.values(), replace(node, inputs=tuple(inputs), outputs=outputs)]
    return graph.with_(nodes, constants=constants, types=codes.types)


def _pad_inputs(
    graph: Graph, node: Node, inputs: list[str], quantize: Node
) -> tuple[list[str], dict[str, Array]]:
    """Operands of a Pad on codes: its constant is quantized, zero where none was given."""
    if node.str_attr("mode", "constant") != "constant":
        return inputs, {}
    given = node.inputs[2] if len(node.inputs) > 2 else ""
    value = graph.constants[given] if given else np.zeros((), np.float32)
    code = numerics.quantize(
        value,
        quantize.float_attr("scale"),
        quantize.int_attr("zero_point"),
        quantize.int_attr("low", 0),
        quantize.int_attr("high", 2 ** quantize.int_attr("bits") - 1),
    )
    name = fresh(graph, f"{node.name}.value")
    return [*inputs[:2], name, *inputs[3:]], {name: code.reshape(())}
