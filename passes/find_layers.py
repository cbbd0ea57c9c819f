"""find-layers: which nodes can compute on integer codes, and why the others cannot."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

import numpy as np

from mpqc.graph import Array, Graph, Node, Precision

Values: TypeAlias = Callable[[Node], tuple[str, ...]]

MATRIX_OPS = frozenset({"Conv", "Gemm", "MatMul", "ConvTranspose", "Einsum", "LSTM", "GRU", "RNN"})


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product whose weights are constant.

    Attributes:
        name: of the node; plans use it.
        op: ``Conv``, ``Gemm`` or ``MatMul``.
        input: value that the layer reads; layers with the same input share its width.
        weight: name of the constant.
        output: value that the layer defines.
        macs: multiply-accumulates of one run of the graph (one sample when the batch is 1).
        weights: number of weights, without the bias.
        biases: number of biases, 0 or ``channels_out``.
        channels_in: over all groups.
        channels_out: over all groups; each has its own weight scale.
        kernel: spatial extents; empty for a matrix product.
        stride: one an axis, as ``kernel``.
        groups: 1 unless a grouped or depthwise convolution.
    """

    name: str
    op: str
    input: str
    weight: str
    output: str
    macs: int
    weights: int
    biases: int
    channels_in: int
    channels_out: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    groups: int = 1


@dataclass(frozen=True)
class FloatLayer:
    """A convolution or product that has to stay in float.

    Attributes:
        name: of the node.
        op: ONNX operator.
        reason: half a sentence for the user.
    """

    name: str
    op: str
    reason: str


def find_layers(graph: Graph) -> tuple[Layer, ...]:
    """Quantizable layers in topological order."""
    return tuple(
        _layer(graph, node)
        for node in graph
        if node.op in MATRIX_OPS and why_float(graph, node) is None
    )


def find_integer_layers(graph: Graph) -> dict[Layer, Precision]:
    """Layers that compute on codes, because the model was quantized already, and their widths."""
    return {
        _integer_layer(graph, node): Precision(
            node.int_attr("weight_bits"), node.int_attr("activation_bits")
        )
        for node in graph
        if node.op in ("IntConv", "IntMatMul")
    }


def why_none(graph: Graph) -> str:
    """Why a graph has no layer to choose widths for: what to tell the user."""
    if given := find_integer_layers(graph):
        widths = ", ".join(sorted({str(precision) for precision in given.values()}))
        return (
            f"the model is quantized already ({widths}), there are no widths to choose: compile "
            "it as it is, or give the float model that it came from"
        )
    return "the model has no layer that can be quantized: mpqc inspect says why"


def find_float_layers(graph: Graph) -> tuple[FloatLayer, ...]:
    """Convolutions and products that cannot be quantized, each with its reason."""
    return tuple(
        FloatLayer(node.name, node.op, reason)
        for node in graph
        if node.op in MATRIX_OPS and (reason := why_float(graph, node)) is not None
    )


def tied_groups(layers: tuple[Layer, ...]) -> tuple[tuple[str, ...], ...]:
    """Names of the layers that read the same value, hence share its width."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.input, []).append(layer.name)
    return tuple(map(tuple, groups.values()))


def shared_tensors(graph: Graph, planned: Collection[str]) -> tuple[str, ...]:
    """Float values that a planned layer reads, and something else too: residual streams."""
    found = []
    for node in graph:
        for value in filter(None, node.outputs):
            readers = graph.consumers(value)
            layers = [reader for reader in readers if reader.name in planned]
            if layers and len(layers) < len(readers) and graph.type(value).dtype == "float32":
                found.append(value)
    return tuple(found)


def first_layers(graph: Graph) -> tuple[str, ...]:
    """Layers that no other layer feeds: the first convolution, or one a branch or input."""
    return _ends(graph, [*graph], lambda node: node.inputs, lambda node: node.outputs)


def last_layers(graph: Graph) -> tuple[str, ...]:
    """Layers that feed no other layer: the classifier, or each head of a detector."""
    return _ends(graph, [*graph][::-1], lambda node: node.outputs, lambda node: node.inputs)


def _ends(graph: Graph, nodes: list[Node], arrives: Values, leaves: Values) -> tuple[str, ...]:
    """Layers that no other layer reaches when the graph is walked in the order of ``nodes``."""
    names = {layer.name for layer in find_layers(graph)}
    touched: set[str] = set()
    ends = []
    for node in nodes:
        reached = any(value in touched for value in arrives(node) if value)
        if node.name in names and not reached:
            ends.append(node.name)
        if node.name in names or reached:
            touched.update(
                value for value in leaves(node) if value and value not in graph.constants
            )
    order = {node.name: index for index, node in enumerate(graph)}
    return tuple(sorted(ends, key=order.__getitem__))


def weight_matrix(graph: Graph, node: Node) -> Array:
    """Weights of a layer as they are quantized, float32.

    Returns:
        [O, I/groups, *kernel] for ``Conv``, [K, N] for ``Gemm`` (alpha multiplied in) and
        ``MatMul``.
    """
    weight = graph.constants[node.inputs[1]]
    if node.op != "Gemm":
        return weight
    weight = weight.T if node.int_attr("transB", 0) else weight
    alpha = np.float32(node.attrs.get("alpha", 1.0))  # type: ignore[arg-type]
    return np.ascontiguousarray(weight if alpha == 1 else weight * alpha)


def bias_vector(graph: Graph, node: Node) -> Array | None:
    """Bias of a layer, float32 [channels_out] (beta multiplied in), or None."""
    if len(node.inputs) < 3 or not node.inputs[2]:
        return None
    channels = weight_matrix(graph, node).shape[0 if node.op == "Conv" else 1]
    bias = np.broadcast_to(graph.constants[node.inputs[2]].reshape(-1), (channels,))
    beta = np.float32(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else np.float32(1)  # type: ignore[arg-type]
    return bias if beta == 1 else bias * beta


def why_float(graph: Graph, node: Node) -> str | None:
    """Why the node cannot compute on codes; None when it can."""
    if node.op not in ("Conv", "Gemm", "MatMul"):
        return f"{node.op} has no integer kernel"
    data, weight = node.inputs[:2]
    if data in graph.constants and weight not in graph.constants:
        return "the constant operand is on the left"
    if weight not in graph.constants:
        producer = graph.producer(weight)
        origin = f"computed by {producer.op}" if producer else "an input of the model"
        return f"the weights are {origin}, not constant"
    array = graph.constants[weight]
    if graph.type(data).dtype != "float32" or array.dtype != np.float32:
        return f"computes in {graph.type(data).dtype}, not float32"
    if array.size == 0 or graph.type(data).elements == 0:
        return "an operand is empty"
    if not np.isfinite(array).all():
        return f"weights {weight!r} hold NaN or infinity"
    ranks = (3, 4) if node.op == "Conv" else (2,)
    if array.ndim not in ranks:
        return f"weights have {array.ndim} dimensions; {node.op} is quantized with {ranks}"
    if node.op == "Gemm" and node.int_attr("transA", 0):
        return "transA is set"
    return _why_bias(graph, node)


def _why_bias(graph: Graph, node: Node) -> str | None:
    if len(node.inputs) < 3 or not node.inputs[2]:
        return None
    if node.inputs[2] not in graph.constants:
        return "the bias is computed"
    bias = graph.constants[node.inputs[2]]
    channels = graph.shape(node.output)[1 if node.op == "Conv" else -1]
    if bias.size not in (1, channels) or (bias.ndim > 1 and bias.shape[-1] != bias.size):
        return f"the bias has shape {list(bias.shape)}, not one value a channel"
    if not np.isfinite(bias).all():
        return f"bias {node.inputs[2]!r} holds NaN or infinity"
    return None


def _integer_layer(graph: Graph, node: Node) -> Layer:
    biased = any(
        reader.op in ("Affine", "Requantize") and graph.constants[reader.inputs[2]].any()
        for reader in graph.consumers(node.output)
    )
    made = _layer(graph, node)
    return replace(made, biases=made.channels_out if biased else 0)


def _layer(graph: Graph, node: Node) -> Layer:
    weight = graph.constants[node.inputs[1]]
    output = graph.type(node.output)
    convolution = node.op in ("Conv", "IntConv")
    if convolution:
        groups = node.int_attr("group", 1)
        channels_in, channels_out = weight.shape[1] * groups, weight.shape[0]
        taps = prod(weight.shape[1:])
        kernel = tuple(weight.shape[2:])
        stride = node.ints_attr("strides", (1,) * len(kernel))
    else:
        groups, kernel, stride = 1, (), ()
        taps, channels_out = weight.shape
        if node.op == "Gemm" and node.int_attr("transB", 0):
            channels_out, taps = weight.shape
        channels_in = taps
    return Layer(
        name=node.name,
        op=node.op,
        input=node.inputs[0],
        weight=node.inputs[1],
        output=node.output,
        macs=output.elements * taps,
        weights=weight.size,
        biases=channels_out if len(node.inputs) > 2 and node.inputs[2] else 0,
        channels_in=channels_in,
        channels_out=channels_out,
        kernel=kernel,
        stride=stride,
        groups=groups,
    )
