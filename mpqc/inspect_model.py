"""Preflight: what a model holds, what can be quantized, what cannot be compiled, what it costs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpqc import importer, pipeline
from mpqc.graph import Graph, Node, Precision, TensorType
from mpqc.passes.estimate_cost import estimate_cost
from mpqc.passes.find_layers import Layer, find_float_layers, find_layers
from mpqc.plan import Plan
from mpqc.target import Target

UNIFORM = tuple(Precision(bits, bits) for bits in (8, 4, 2, 1))


@dataclass(frozen=True)
class LayerRow:
    """One convolution or matrix product.

    Attributes:
        name: of the node; plans use it.
        op: ONNX operator.
        input, output: shapes.
        macs, weights: counts; 0 where it stays in float.
        reason: why it stays in float; empty when it can be quantized.
    """

    name: str
    op: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    macs: int
    weights: int
    reason: str

    @property
    def quantizable(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Problem:
    """A node that cannot be compiled, and what to do about it."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class UniformCost:
    """Costs with every quantizable layer at one precision; ``float`` is the model as it is.

    Attributes:
        widths: "w4a4" or "float".
        bitops: sum over the layers.
        size: of the weights [bytes].
        scale_bytes, bias_bytes: beside them.
    """

    widths: str
    bitops: int
    size: float
    scale_bytes: int
    bias_bytes: int


@dataclass(frozen=True)
class Expectation:
    """What the kernel model expects of one layer at one precision.

    Attributes:
        kernel: that would be chosen.
        gain: how many times faster than the int8 kernel.
    """

    kernel: str
    gain: float


@dataclass(frozen=True)
class Forecast:
    """Kernels on one target, before anything is measured.

    Attributes:
        target: name.
        layers: layer -> widths -> expectation.
        gains: widths -> gain over int8 of all quantizable layers together.
    """

    target: str
    layers: Mapping[str, Mapping[str, Expectation]]
    gains: Mapping[str, float]


@dataclass(frozen=True)
class Inspection:
    """Result of ``inspect_model``.

    Attributes:
        nodes: number of operators after folding.
        operators: ONNX operator -> count, most frequent first.
        problems: everything that cannot be compiled.
        forecast: None where no target was named.
    """

    model: Path
    sha256: str
    opset: int
    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    nodes: int
    operators: Mapping[str, int]
    layers: tuple[LayerRow, ...]
    problems: tuple[Problem, ...]
    costs: tuple[UniformCost, ...]
    forecast: Forecast | None

    @property
    def compiles(self) -> bool:
        return not self.problems

    @property
    def message(self) -> str:
        """One line for people."""
        good = sum(row.quantizable for row in self.layers)
        text = f"{good} of {len(self.layers)} layers can be quantized"
        if self.problems:
            return f"{text}; {len(self.problems)} nodes cannot be compiled"
        return f"{text}; everything can be compiled"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""

        def kinds(types: Mapping[str, TensorType]) -> dict[str, Any]:
            return {n: {"dtype": t.dtype, "shape": list(t.shape)} for n, t in types.items()}

        return {
            "model": str(self.model),
            "model_sha256": self.sha256,
            "opset": self.opset,
            "compiles": self.compiles,
            "inputs": kinds(self.inputs),
            "outputs": kinds(self.outputs),
            "nodes": self.nodes,
            "operators": dict(self.operators),
            "layers": [{**asdict(row), "quantizable": row.quantizable} for row in self.layers],
            "problems": [asdict(problem) for problem in self.problems],
            "costs": [asdict(cost) for cost in self.costs],
            "forecast": None if self.forecast is None else asdict(self.forecast),
        }


def inspect_model(
    model: Path,
    target: Target | None = None,
    dims: Mapping[str, int] | None = None,
    batch: int = 1,
) -> Inspection:
    """Look at everything at once, and compile nothing.

    Args:
        model: ONNX file.
        target: forecast the kernels of this machine too.
        dims: values of symbolic dimensions.
        batch: size of the batch dimension.

    Raises:
        ModelError: the file cannot be imported at all.
    """
    from mpqc import onnx_to_tir  # loads TVM

    graph = pipeline.import_model(model, dims, batch)
    layers = {layer.name: layer for layer in find_layers(graph)}
    floats = {layer.name: layer.reason for layer in find_float_layers(graph)}
    refused = onnx_to_tir.unsupported([node for node in graph if node.name not in layers], graph)
    return Inspection(
        model=model,
        sha256=importer.sha256(model),
        opset=graph.opset,
        inputs=dict(graph.inputs),
        outputs={name: graph.type(name) for name in graph.outputs},
        nodes=len(graph),
        operators=dict(Counter(node.op for node in graph).most_common()),
        layers=tuple(
            _row(graph, node, layers.get(node.name), floats.get(node.name, ""))
            for node in graph
            if node.name in layers or node.name in floats
        ),
        problems=tuple(Problem(node.name, node.op, reason) for node, reason in refused),
        costs=_costs(graph),
        forecast=None if target is None else _forecast(graph, tuple(layers.values()), target),
    )


def _row(graph: Graph, node: Node, layer: Layer | None, reason: str) -> LayerRow:
    source = next((value for value in node.inputs if value not in graph.constants), node.inputs[0])
    return LayerRow(
        node.name,
        node.op,
        graph.shape(source),
        graph.shape(node.output),
        layer.macs if layer else 0,
        layer.weights if layer else 0,
        reason,
    )


def _costs(graph: Graph) -> tuple[UniformCost, ...]:
    plans: dict[str, Plan | None] = {"float": None}
    plans |= {str(widths): Plan.uniform(graph, widths, None) for widths in UNIFORM}
    costs = {name: estimate_cost(graph, plan) for name, plan in plans.items()}
    return tuple(
        UniformCost(name, cost.bitops, cost.size, cost.scale_bytes, cost.bias_bytes)
        for name, cost in costs.items()
    )


# Forecast ------------------------------------------------------------------------------------


def _forecast(graph: Graph, layers: tuple[Layer, ...], target: Target) -> Forecast:
    from mpqc.select_kernel import Selector

    selector = Selector(target)
    rows: dict[str, dict[str, Expectation]] = {}
    cycles: dict[str, list[float]] = {str(widths): [0.0, 0.0] for widths in UNIFORM}
    for layer in layers:
        rows[layer.name] = {}
        for widths in UNIFORM:
            lone = _lone_layer(graph, graph[layer.name], widths)
            choice = selector.choose(lone, lone[layer.name])
            own, int8 = choice.rates[choice.kind], choice.rates["int8"]
            rows[layer.name][str(widths)] = Expectation(choice.kind, own / int8)
            cycles[str(widths)][0] += layer.macs / int8
            cycles[str(widths)][1] += layer.macs / own
    gains = {widths: int8 / own for widths, (int8, own) in cycles.items() if own}
    return Forecast(target.name, rows, gains)


def _lone_layer(graph: Graph, node: Node, widths: Precision) -> Graph:
    """The layer as the kernel selector sees it: quantized, channels last, alone.

    Only shapes and the largest weight matter, so that all weights are that one.
    """
    weight = graph.constants[node.inputs[1]]
    shape, out = graph.shape(node.inputs[0]), graph.shape(node.output)
    attrs = {
        **node.attrs,
        "zero_point": 0,
        "weight_bits": widths.weight,
        "activation_bits": widths.activation,
        "weight_levels": "odd" if widths.weight == 1 else "signed",
    }
    if node.op == "Conv":
        op, stored = "IntConv", weight.shape
        shape, out = (shape[0], *shape[2:], shape[1]), (out[0], *out[2:], out[1])
    else:
        op = "IntMatMul"
        stored = (shape[-1], out[-1])
    largest = max(1, 2 ** (widths.weight - 1) - 1)
    return Graph(
        {"codes": TensorType("uint8", shape)},
        ["sums"],
        [Node(node.name, op, ("codes", "weights"), ("sums",), attrs)],
        {"weights": np.broadcast_to(np.int16(largest), stored)},
        {"sums": TensorType("int32", out)},
    )
