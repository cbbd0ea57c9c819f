"""A trained network as a file: ONNX with its quantizers, in standard operators."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from mpqc.graph import Array, Graph, Node, TensorType
from mpqc.passes.base import fresh
from mpqc.passes.drop_dead import DropDead
from mpqc.passes.find_layers import Layer, find_layers
from mpqc.quantizers import ActivationQuantizer
from mpqc.rounding import RoundedLayer


def to_qdq(
    graph: Graph,
    rounded: Mapping[str, RoundedLayer],
    tensors: Mapping[str, ActivationQuantizer] | None = None,
) -> Graph:
    """Quantizers around every trained layer: QDQ, and QCDQ below eight bits.

    Inputs go through QuantizeLinear (uint8), a Clip to their codes if they are narrow, and
    DequantizeLinear. Weights are integers in int8 behind a Clip and a DequantizeLinear with a
    scale for each output channel; their width is that of the Clip. Odd levels (DoReFa's, and +-1)
    are the odd integers between the Clip's bounds. Biases stay float32.

    Args:
        graph: float, BatchNorm folded, with the trained weights of what is not quantized.
        rounded: ``GraphModule.rounded`` of the module.
        tensors: quantizers of values that all readers share.
    """
    writer = _Writer(graph)
    layers = {layer.name: layer for layer in find_layers(graph)}
    narrowed = {
        value: writer.quantized(value, value, rule) for value, rule in (tensors or {}).items()
    }
    for node in graph:
        made = rounded.get(node.name)
        if made is None:
            inputs = tuple(narrowed.get(value, value) for value in node.inputs)
            writer.nodes.append(replace(node, inputs=inputs))
            continue
        layer = layers[node.name]
        writer.layer(node, layer, made, narrowed.get(layer.input, layer.input))
    return DropDead()(graph.with_(writer.nodes, constants=writer.constants, types=writer.types))


@dataclass
class _Writer:
    source: Graph
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    types: dict[str, TensorType] = field(default_factory=dict)
    known: dict[tuple[str, int], str] = field(default_factory=dict)

    def quantized(self, value: str, source: str, rule: ActivationQuantizer) -> str:
        """Name of a value as its codes tell it; ``source`` is what is quantized."""
        if (value, rule.bits) in self.known:
            return self.known[value, rule.bits]
        name = fresh(self.source, f"{value}.q{rule.bits}")
        shape = self.source.shape(value)
        scale = self._constant(f"{name}.scale", np.float32(rule.scale))
        zero = self._constant(f"{name}.zero_point", np.uint8(rule.zero_point))
        codes = self._node("QuantizeLinear", (source, scale, zero), name, "uint8", shape)
        if rule.bits < 8:
            codes = self._clip(codes, name, "uint8", shape, 0, rule.top)
        found = self._node("DequantizeLinear", (codes, scale, zero), f"{name}.dq", "float32", shape)
        self.known[value, rule.bits] = found
        return found

    def layer(self, node: Node, layer: Layer, made: RoundedLayer, source: str) -> None:
        """The layer on quantized operands; it keeps its name and its output."""
        data = self.quantized(layer.input, source, made.rule)
        weight = self._weight(node, made)
        bias = self._constant(f"{node.name}.bias", made.bias)
        if node.op == "Conv":
            self.nodes.append(replace(node, inputs=(data, weight, bias)))
        elif len(self.source.shape(layer.output)) == 2:
            self.nodes.append(Node(node.name, "Gemm", (data, weight, bias), node.outputs))
        else:
            kind = self.source.type(layer.output)
            product = fresh(self.source, f"{node.name}.product")
            self.types[product] = kind
            self.nodes.append(Node(node.name, "MatMul", (data, weight), (product,)))
            self.nodes.append(Node(f"{product}.add", "Add", (product, bias), node.outputs))

    def _weight(self, node: Node, made: RoundedLayer) -> str:
        weights = made.weights
        name = fresh(self.source, f"{node.name}.w{weights.bits}")
        if weights.levels == "odd":
            low, high = 1 - 2**weights.bits, 2**weights.bits - 1
        else:
            low, high = -(2 ** (weights.bits - 1)), 2 ** (weights.bits - 1) - 1
        shape = weights.values.shape
        axis = 0 if node.op == "Conv" else 1
        # odd levels of eight bits do not fit into int8
        dtype = "int8" if high <= 127 else "int32"
        codes = self._constant(f"{name}.codes", weights.values.astype(dtype))
        if dtype == "int8" and (low, high) != (-128, 127):
            codes = self._clip(codes, name, dtype, shape, low, high)
        scale = self._constant(f"{name}.scale", weights.scale)
        return self._node(
            "DequantizeLinear", (codes, scale), f"{name}.dq", "float32", shape, axis=axis
        )

    def _clip(
        self, value: str, name: str, dtype: str, shape: tuple[int, ...], low: int, high: int
    ) -> str:
        bounds = [
            self._constant(f"{name}.{what}", np.array(bound, dtype))
            for what, bound in (("low", low), ("high", high))
        ]
        return self._node("Clip", (value, *bounds), f"{name}.clip", dtype, shape)

    def _node(
        self,
        op: str,
        inputs: tuple[str, ...],
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        **attrs: int,
    ) -> str:
        self.types[name] = TensorType(dtype, shape)
        self.nodes.append(Node(name, op, inputs, (name,), attrs))
        return name

    def _constant(self, name: str, array: "Array | np.generic") -> str:
        self.constants[name] = np.asarray(array)
        return name


def batch_is_open(one: Graph, two: Graph) -> bool:
    """Whether the same nodes and constants serve any batch: the graph at two batch sizes."""
    if one.constants.keys() != two.constants.keys() or len(one) != len(two):
        return False
    same = all(np.array_equal(array, two.constants[name]) for name, array in one.constants.items())
    return same and all(
        a.op == b.op and a.inputs == b.inputs and str(dict(a.attrs)) == str(dict(b.attrs))
        for a, b in zip(one, two, strict=True)
    )
