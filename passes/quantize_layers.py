"""quantize-layers: the planned layers compute on integer codes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from mpqc.calibration import Calibration
from mpqc.errors import PlanError
from mpqc.graph import Array, Attribute, Graph, Node, TensorType
from mpqc.histogram import Method
from mpqc.passes.base import Pass, fresh
from mpqc.passes.find_layers import Layer, bias_vector, find_layers, weight_matrix
from mpqc.plan import Plan
from mpqc.quantizers import (
    ActivationQuantizer,
    QuantizedWeights,
    conv_shift,
    quantize_weights,
)
from mpqc.rounding import RoundedLayer

ACCUMULATOR = 2**31  # int32


def tensors_to_calibrate(graph: Graph, plan: Plan) -> tuple[str, ...]:
    """Values whose histograms the pass needs."""
    inputs = [layer.input for layer in find_layers(graph) if layer.name in plan.layers]
    return tuple(dict.fromkeys([*inputs, *plan.tensors]))


@dataclass(frozen=True)
class QuantizeLayers(Pass):
    """Before: float. After: each planned layer reads codes, its float output keeps its name.

        %y = Conv(%x, %w, %b)
        =>
        %x.q4 = Quantize(%x)
        %y.acc = IntConv(%x.q4, %y.codes)
        %y = Affine(%y.acc, %y.m, %y.b)

    Layers that read one value at one width share its codes. A value in the plan's ``tensors``
    is replaced by ``Dequantize(Quantize(value))`` for all who read it.

    Attributes:
        plan: widths.
        calibration: of the values that ``tensors_to_calibrate`` names.
        method: how ranges follow from histograms.
        correct_bias: subtract from the bias what rounding the weights adds to the mean of each
            output channel on the calibration data; below eight bits it decides over accuracy.
        rounded: what layers compute with, where that is known better than by rounding.
        rules: of the plan's tensors, where they are known better than by calibration.
    """

    name = "quantize-layers"

    plan: Plan
    calibration: Calibration
    method: Method = "mse"
    correct_bias: bool = True
    rounded: Mapping[str, RoundedLayer] = field(default_factory=dict)
    rules: Mapping[str, ActivationQuantizer] = field(default_factory=dict)

    def requires(self, graph: Graph) -> None:
        self.plan.check(graph, None)

    def rewrite(self, graph: Graph) -> Graph:
        writer = self.writer(graph)
        layers = {layer.name: layer for layer in find_layers(graph)}
        narrowed = {
            value: writer.narrow(
                value,
                self.rules.get(value)
                or self.calibration.quantizer(value, tensor.bits, self.method),
            )
            for value, tensor in self.plan.tensors.items()
        }
        for node in graph:
            planned = self.plan.layers.get(node.name)
            if planned is None:
                writer.keep(node, narrowed)
                continue
            layer = layers[node.name]
            made = self.rounded.get(node.name) or self._nearest(graph, layer)
            _check_accumulator(layer, made.weights, made.rule)
            writer.layer(node, layer, made, narrowed)
        return writer.graph()

    def writer(self, graph: Graph) -> "LayerWriter":
        """Collects the nodes of the new graph."""
        return LayerWriter(graph)

    def _nearest(self, graph: Graph, layer: Layer) -> RoundedLayer:
        node, planned = graph[layer.name], self.plan.layers[layer.name]
        exact = weight_matrix(graph, node)
        weights = quantize_weights(exact, planned.weight_bits, 0 if node.op == "Conv" else 1)
        bias = bias_vector(graph, node)
        if bias is None:
            bias = np.zeros(layer.channels_out, np.float32)
        if self.correct_bias:
            means = self.calibration.mean(layer.input)
            bias = (bias - _mean_shift(layer, exact, weights, means)).astype(np.float32)
        rule = self.calibration.quantizer(layer.input, planned.activation_bits, self.method)
        return RoundedLayer(weights, bias, rule)


def _mean_shift(layer: Layer, exact: Array, weights: QuantizedWeights, means: Array) -> Array:
    """What rounding the weights adds to the mean of each output channel: float64 [O]."""
    if layer.op != "Conv":
        shift: Array = means @ (weights.values * weights.scale.astype(np.float64) - exact)
        return shift
    scale = weights.scale.reshape(-1, *[1] * (exact.ndim - 1)).astype(np.float64)
    return conv_shift(weights.values * scale - exact, means, layer.groups)


def _check_accumulator(layer: Layer, weights: QuantizedWeights, rule: ActivationQuantizer) -> None:
    axis = tuple(range(1, weights.values.ndim)) if layer.op == "Conv" else 0
    reach = max(rule.zero_point, rule.top - rule.zero_point)
    largest = int(np.abs(weights.values.astype(np.int64)).sum(axis=axis).max()) * reach
    if largest >= ACCUMULATOR:
        raise PlanError(
            f"layer {layer.name!r} can sum to {largest}, beyond int32: "
            "plan fewer bits for it, or leave it out of the plan"
        )


@dataclass
class LayerWriter:
    """Collects the nodes of the new graph: layers on integer codes."""

    source: Graph
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    types: dict[str, TensorType] = field(default_factory=dict)
    codes: dict[tuple[str, int], str] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)

    def keep(self, node: Node, narrowed: Mapping[str, str]) -> None:
        inputs = tuple(narrowed.get(value, value) for value in node.inputs)
        self.nodes.append(replace(node, inputs=inputs))

    def narrow(self, value: str, rule: ActivationQuantizer) -> str:
        """Name of the value as its codes can tell it."""
        codes = self.quantized(value, rule)
        known = self.told.get(codes)
        if known is not None:
            return known
        name = self.told[codes] = fresh(self.source, f"{value}.d{rule.bits}")
        attrs: dict[str, Attribute] = {"scale": rule.scale, "zero_point": rule.zero_point}
        self.nodes.append(Node(name, "Dequantize", (codes,), (name,), attrs))
        self.types[name] = self.type(value)
        return name

    def quantized(self, value: str, rule: ActivationQuantizer) -> str:
        """Name of the value's codes at the rule's width."""
        known = self.codes.get((value, rule.bits))
        if known is not None:
            return known
        name = self.codes[value, rule.bits] = fresh(self.source, f"{value}.q{rule.bits}")
        self.nodes.append(Node(name, "Quantize", (value,), (name,), quantize_attrs(rule)))
        self.types[name] = TensorType("uint8", self.type(value).shape)
        return name

    def data(self, layer: Layer, rule: ActivationQuantizer, narrowed: Mapping[str, str]) -> str:
        """Name of the value that a layer quantizes."""
        if layer.input in narrowed and (layer.input, rule.bits) not in self.codes:
            return narrowed[layer.input]
        return layer.input

    def layer(
        self,
        node: Node,
        layer: Layer,
        made: RoundedLayer,
        narrowed: Mapping[str, str],
    ) -> None:
        """The node of a planned layer, on codes."""
        weights, rule = made.weights, made.rule
        codes = self.quantized(self.data(layer, rule, narrowed), rule)
        convolution = node.op == "Conv"
        shape = self.source.shape(layer.output)
        values, m, b, acc = (
            fresh(self.source, f"{node.name}.{suffix}") for suffix in ("codes", "m", "b", "acc")
        )
        self.constants |= {
            values: weights.values,
            m: np.float32(rule.scale) * weights.scale,
            b: np.array(made.bias),
        }
        self.types[acc] = TensorType("int32", shape)
        attrs: dict[str, Attribute] = dict(node.attrs) if convolution else {}
        attrs |= {
            "zero_point": rule.zero_point,
            "activation_bits": rule.bits,
            "weight_bits": weights.bits,
            "weight_levels": weights.levels,
        }
        op, axis = ("IntConv", 1) if convolution else ("IntMatMul", len(shape) - 1)
        self.nodes += [
            Node(node.name, op, (codes, values), (acc,), attrs),
            Node(
                fresh(self.source, f"{node.name}.affine"),
                "Affine",
                (acc, m, b),
                (layer.output,),
                {"axis": axis},
            ),
        ]

    def type(self, value: str) -> TensorType:
        return self.types.get(value) or self.source.type(value)

    def graph(self) -> Graph:
        return self.source.with_(self.nodes, constants=self.constants, types=self.types)


def quantize_attrs(rule: ActivationQuantizer) -> dict[str, Attribute]:
    """Attributes of the Quantize node that follows the rule."""
    return {"scale": rule.scale, "zero_point": rule.zero_point, "bits": rule.bits}
