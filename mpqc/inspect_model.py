"""Preflight: what a model holds, what can be quantized, what cannot be compiled, what it costs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpqc import importer, pipeline
from mpqc.forecast import Expectation, expect, total_gain
from mpqc.graph import QUANTIZED_OPS, Graph, Node, Precision, TensorType
from mpqc.passes.estimate_cost import estimate_cost
from mpqc.passes.find_layers import (
    Layer,
    find_float_layers,
    find_integer_layers,
    find_layers,
)
from mpqc.plan import Plan
from mpqc.target import Target

UNIFORM = tuple(Precision(bits, bits) for bits in (8, 4, 2, 1))
AS_GIVEN = "as given"


@dataclass(frozen=True)
class LayerRow:
    """One convolution or matrix product.

    Attributes:
        name: of the node; plans use it.
        op: ONNX operator.
        input, output: shapes.
        macs, weights: counts; 0 where it stays in float.
        widths: "w2a4" where the model brings them; empty where it is float.
        reason: why it stays in float; empty when it can be quantized, or is already.
    """

    name: str
    op: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    macs: int
    weights: int
    widths: str
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
    """Costs with every quantizable layer at one precision.

    Attributes:
        widths: "w4a4"; "float" or, where layers are quantized already, "as given" for the model
            as it is; "others w4a4" with its float layers at one precision.
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
class Forecast:
    """Kernels on one target, before anything is measured.

    Attributes:
        target: name.
        layers: layer -> widths -> expectation: of float layers at every uniform precision, of
            quantized ones at theirs.
        gains: widths -> gain over int8 of all float layers together; "as given" -> of all
            quantized ones.
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
        kept: node of a quantized model -> why its arithmetic stays in float.
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
    kept: Mapping[str, str]
    problems: tuple[Problem, ...]
    costs: tuple[UniformCost, ...]
    forecast: Forecast | None

    @property
    def compiles(self) -> bool:
        return not self.problems

    @property
    def message(self) -> str:
        """One line for people."""
        given = [row for row in self.layers if row.widths]
        good = [row for row in self.layers if row.quantizable and not row.widths]
        if given:
            widths = ", ".join(sorted({row.widths for row in given}))
            text = f"{len(given)} of {len(self.layers)} layers are quantized already ({widths})"
            text += f", {len(good)} more can be" if good else ""
        else:
            text = f"{len(good)} of {len(self.layers)} layers can be quantized"
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
            "kept": dict(self.kept),
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

    imported = pipeline.read_model(model, dims, batch)
    graph = imported.graph
    given = find_integer_layers(graph)
    layers = {layer.name: layer for layer in (*given, *find_layers(graph))}
    widths = {layer.name: precision for layer, precision in given.items()}
    reasons = {layer.name: layer.reason for layer in find_float_layers(graph)}
    reasons |= {name: why for name, why in imported.kept.items() if name in reasons}
    others = [n for n in graph if n.name not in layers and n.op not in QUANTIZED_OPS]
    refused = onnx_to_tir.unsupported(others, graph)
    return Inspection(
        model=model,
        sha256=importer.sha256(model),
        opset=graph.opset,
        inputs=dict(graph.inputs),
        outputs={name: graph.type(name) for name in graph.outputs},
        nodes=len(graph),
        operators=dict(Counter(node.op for node in graph).most_common()),
        layers=tuple(
            _row(graph, node, layers.get(node.name), widths.get(node.name),
                 reasons.get(node.name, ""))
            for node in graph
            if node.name in layers or node.name in reasons
        ),
        kept=imported.kept,
        problems=tuple(Problem(node.name, node.op, reason) for node, reason in refused),
        costs=_costs(graph),
        forecast=None if target is None else _forecast(graph, target),
    )  # fmt: skip


def _row(
    graph: Graph, node: Node, layer: Layer | None, widths: Precision | None, reason: str
) -> LayerRow:
    source = next((value for value in node.inputs if value not in graph.constants), node.inputs[0])
    return LayerRow(
        node.name,
        node.op,
        graph.shape(source),
        graph.shape(node.output),
        layer.macs if layer else 0,
        layer.weights if layer else 0,
        str(widths) if widths else "",
        reason,
    )


def _costs(graph: Graph) -> tuple[UniformCost, ...]:
    quantized = bool(find_integer_layers(graph))
    plans: dict[str, Plan | None] = {AS_GIVEN if quantized else "float": None}
    if find_layers(graph):
        rest = "others " if quantized else ""
        plans |= {f"{rest}{widths}": Plan.uniform(graph, widths, None) for widths in UNIFORM}
    costs = {name: estimate_cost(graph, plan) for name, plan in plans.items()}
    return tuple(
        UniformCost(name, cost.bitops, cost.size, cost.scale_bytes, cost.bias_bytes)
        for name, cost in costs.items()
    )


def _forecast(graph: Graph, target: Target) -> Forecast:
    from mpqc.select_kernel import Selector

    selector = Selector(target)
    candidates = {AS_GIVEN: {**find_integer_layers(graph)}}
    floats = find_layers(graph)
    candidates |= {str(widths): dict.fromkeys(floats, widths) for widths in UNIFORM}
    rows: dict[str, dict[str, Expectation]] = {}
    gains = {}
    for name, layers in candidates.items():
        found = {layer: expect(graph, layer, widths, selector) for layer, widths in layers.items()}
        for layer, expectation in found.items():
            rows.setdefault(layer.name, {})[str(layers[layer])] = expectation
        if found:
            gains[name] = total_gain(found)
    order = [node.name for node in graph if node.name in rows]
    return Forecast(target.name, {name: rows[name] for name in order}, gains)
