"""measure-perturbation: what the outputs lose when one layer's input or weights are disturbed.

The float graph runs once a batch; the layer and what follows it run again for every disturbance,
with the layer's input, weights and bias as inputs of that part. So no session is made, and no
weight is copied, more than once a layer.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from mpqc.data import Data
from mpqc.errors import DataError
from mpqc.graph import Array, Graph, Node, TensorType
from mpqc.passes.base import fresh
from mpqc.passes.find_layers import bias_vector, weight_matrix

Metric: TypeAlias = Literal["sqnr", "kl"]
"""``sqnr``: power of the error over power of the signal, the inverse of the ratio of signal to
quantization noise; of logits where the model ends in a softmax. ``kl``: divergence of the class
probabilities in nats, for classifiers."""


# A saturated probability tells little about the noise that reached it.
_SQUASH = frozenset({"Softmax", "LogSoftmax", "Sigmoid"})


@dataclass(frozen=True)
class Disturbed:
    """One batch, ready for disturbances.

    Attributes:
        input: what the layers read, float32.
        outputs: of the undisturbed graph.
        rows: samples of the batch that count; the last batch may repeat its last sample.
    """

    input: Array
    outputs: Mapping[str, Array]
    rows: int
    _run: Callable[[Mapping[str, Array]], dict[str, Array]]
    _feeds: Mapping[str, Array]
    _names: Mapping[tuple[str, str], str]

    def __call__(
        self,
        x: Array | None = None,
        weights: Mapping[str, Array] | None = None,
        biases: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Outputs that depend on the layers, with what is given in place of what is there.

        Args:
            x: what all the layers read.
            weights: by layer name, as ``weight_matrix`` shapes them.
            biases: by layer name, one value a channel.
        """
        feeds = dict(self._feeds)
        if x is not None:
            feeds[self._names["", "input"]] = x
        for kind, given in (("weight", weights or {}), ("bias", biases or {})):
            for layer, array in given.items():
                feeds[self._names[layer, kind]] = np.ascontiguousarray(array, np.float32)
        return self._run(feeds)


def disturb(graph: Graph, data: Data, layers: Sequence[str]) -> Iterator[Disturbed]:
    """Batches of the data, with handles on layers that read one value.

    Args:
        graph: float, at the batch size of the data.
        data: streamed once.
        layers: names of quantizable layers with a common input.

    Raises:
        DataError: no data, or outputs that are not finite.
    """
    from mpqc import onnx_export, ort

    part, names, originals = _after(graph, tuple(layers))
    value = graph[layers[0]].inputs[0]
    live = [name for name in part.inputs if name in graph.types]
    taps = [
        name for name in dict.fromkeys([*graph.outputs, *live, value]) if name not in graph.inputs
    ]
    threads = available_threads()
    before = ort.Session(onnx_export.to_onnx(graph, taps), threads=threads, optimise=True)
    after = ort.Session(onnx_export.to_onnx(part), threads=threads, optimise=True)
    done = 0
    for feeds in data.feeds():
        values = {**feeds, **before.run(feeds)}
        rows = data.batch if data.samples is None else min(data.batch, data.samples - done)
        done += rows
        outputs = {name: values[name] for name in graph.outputs}
        if not all(np.isfinite(array).all() for array in outputs.values()):
            raise DataError(
                f"the float model gives NaN or infinity after {done} samples; "
                "check the preprocessing"
            )
        inputs = {name: values[name] for name in live} | originals
        inputs[names["", "input"]] = values[value]
        yield Disturbed(values[value], outputs, rows, after.run, inputs, names)
    if done == 0:
        raise DataError("no samples; give at least one")


def available_threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _after(
    graph: Graph, layers: tuple[str, ...]
) -> tuple[Graph, dict[tuple[str, str], str], dict[str, Array]]:
    """The layers and all that depends on them, as a graph of its own.

    Returns:
        The part; names of its inputs by (layer, "weight" | "bias") and ("", "input"); what
        those of weights and biases are in the graph.
    """
    reached: set[str] = set()
    nodes: list[Node] = []
    names: dict[tuple[str, str], str] = {}
    originals: dict[str, Array] = {}
    value = graph[layers[0]].inputs[0]
    names["", "input"] = fresh(graph, f"{value}.disturbed")
    types = dict(graph.types)
    inputs = {names["", "input"]: graph.type(value)}
    for node in graph:
        if node.name in layers:
            matrix, bias = weight_matrix(graph, node), bias_vector(graph, node)
            channels = matrix.shape[0 if node.op == "Conv" else 1]
            bias = np.zeros(channels, np.float32) if bias is None else bias
            for kind, array in (("weight", matrix), ("bias", bias)):
                name = names[node.name, kind] = fresh(graph, f"{node.name}.{kind}.disturbed")
                inputs[name] = TensorType.of(array)
                originals[name] = np.ascontiguousarray(array)
            w, b = names[node.name, "weight"], names[node.name, "bias"]
            if node.op == "Conv":
                nodes.append(
                    Node(node.name, "Conv", (names["", "input"], w, b), node.outputs, node.attrs)
                )
            else:
                product = fresh(graph, f"{node.output}.product")
                types[product] = graph.type(node.output)
                nodes.append(Node(product, "MatMul", (names["", "input"], w), (product,)))
                nodes.append(Node(node.name, "Add", (product, b), node.outputs))
        elif reached.isdisjoint(node.inputs):
            continue
        else:
            nodes.append(node)
        reached.update(filter(None, node.outputs))
    made = {name for node in nodes for name in node.outputs}
    for node in nodes:
        for name in filter(None, node.inputs):
            if name not in made and name not in inputs and name not in graph.constants:
                inputs[name] = graph.type(name)
    outputs = [name for name in graph.outputs if name in made]
    if not outputs:
        raise DataError(f"no output of the model depends on layer {layers[0]!r}")
    part = Graph(inputs, outputs, nodes, graph.constants, types, graph.opset)
    return part, names, originals


@dataclass
class Loss:
    """Mean distance of disturbed outputs from those of the float model.

    Attributes:
        metric: ``kl`` or ``sqnr``.
    """

    metric: Metric
    _sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, run: Disturbed, outputs: Mapping[str, Array]) -> None:
        """Count one batch; outputs that are missing were not disturbed."""
        for name, reference in run.outputs.items():
            if reference.dtype.kind != "f":
                continue
            got = outputs.get(name, reference)
            p, q = (_rows(array, run.rows) for array in (reference, got))
            above, below = self._sums.get(name, (0.0, 0.0))
            if self.metric == "kl":
                above, below = above + _divergence(p, q), below + p.size // p.shape[-1]
            else:
                error = (q.astype(np.float64) - p) ** 2
                above, below = (
                    above + float(error.sum()),
                    below + float((p.astype(np.float64) ** 2).sum()),
                )
            self._sums[name] = above, below

    @property
    def value(self) -> float:
        """Mean over the outputs; 0 for equal outputs, infinity for NaN."""
        ratios = [above / max(below, 1e-30) for above, below in self._sums.values()]
        mean = float(np.mean(ratios)) if ratios else 0.0
        return mean if np.isfinite(mean) else float("inf")


def compared(graph: Graph, metric: Metric) -> Graph:
    """The graph whose outputs the metric compares.

    Raises:
        DataError: ``kl`` for a model without class probabilities.
    """
    if metric == "sqnr":
        producers = [graph.producer(name) for name in graph.outputs]
        outputs = [
            node.inputs[0] if node is not None and node.op in _SQUASH else name
            for name, node in zip(graph.outputs, producers, strict=True)
        ]
        return graph.with_(outputs=dict.fromkeys(outputs))
    for name in graph.outputs:
        kind = graph.type(name)
        if kind.dtype == "float32" and (len(kind.shape) < 2 or kind.shape[-1] < 2):
            raise DataError(
                f"output {name!r} is {kind}: no classes to compare by kl; take metric=sqnr"
            )
    return graph


def probabilities(outputs: Array) -> Array:
    """float64 [..., classes]: outputs that are probabilities as they are, logits by softmax."""
    wide = outputs.astype(np.float64)
    if wide.min(initial=0.0) >= 0 and np.allclose(wide.sum(-1), 1, atol=1e-3):
        return wide
    powers = np.exp(wide - wide.max(-1, keepdims=True))
    shares: Array = powers / powers.sum(-1, keepdims=True)
    return shares


def _divergence(reference: Array, got: Array) -> float:
    """Sum over rows of KL(reference || got)."""
    if not np.isfinite(got).all():
        return float("inf")
    p, q = probabilities(reference), probabilities(got)
    tiny = 1e-12
    # both sides of the sum, so that rounding cannot make a divergence negative
    each = p * (np.log(p + tiny) - np.log(q + tiny)) - p + q
    return float(np.maximum(each.sum(), 0.0))


def _rows(array: Array, rows: int) -> Any:
    return array[:rows] if array.ndim and array.shape[0] > rows else array
