"""fold-batch-norm: a scale and a shift per channel move into the layer before them."""

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mpqc.graph import Array, Graph, Node, TensorType
from mpqc.passes.base import Pass, fresh
from mpqc.passes.drop_dead import DropDead

Vector: TypeAlias = npt.NDArray[np.float64]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Layers absorb BatchNormalization and Mul, Add, Sub, Div by constants per channel.

    ``%c = Conv(%x, %w)  %y = BatchNormalization(%c, ...)``    =>    ``%y = Conv(%x, %w2, %b2)``

    The layer keeps its name. A chain folds as a whole: in float64, rounded once to the weight's
    type. A matrix product of rank 2 that gets a shift becomes a Gemm. A BatchNormalization that
    no layer can absorb becomes Mul and Add.
    """

    name = "fold-batch-norm"

    def rewrite(self, graph: Graph) -> Graph:
        for node in tuple(graph):
            if node.op in _LAYERS and node.name in graph:
                graph = _absorb(graph, node)
        for node in tuple(graph):
            if node.op == "BatchNormalization":
                graph = _spell_out(graph, node)
        return DropDead().rewrite(graph)


def _absorb(graph: Graph, layer: Node) -> Graph:
    absorbed, scale, shift = affine_chain(graph, layer)
    if not absorbed:
        return graph
    value = absorbed[-1].output
    weight, bias = _scaled(graph, layer, scale, shift)
    names = (fresh(graph, f"{layer.name}.weight"), fresh(graph, f"{layer.name}.bias"))
    attrs = {key: kind for key, kind in layer.attrs.items() if key != "beta"}
    merged = replace(
        layer,
        op="Gemm" if layer.op == "MatMul" else layer.op,
        inputs=(layer.inputs[0], *names),
        outputs=(value,),
        attrs=attrs,
    )
    gone = {node.name for node in absorbed}
    return graph.with_(
        [merged if node is layer else node for node in graph if node.name not in gone],
        constants=dict(zip(names, (weight, bias), strict=True)),
    )


def affine_chain(graph: Graph, layer: Node) -> tuple[list[Node], Vector, Vector]:
    """Nodes behind a layer that it can absorb, and what they do: ``scale * y + shift``.

    Args:
        graph: BatchNormalization in inference mode.
        layer: Conv, ConvTranspose, Gemm or MatMul.

    Returns:
        The nodes in order, float64 [channels] and float64 [channels]; no nodes and ones and zeros
        where there is nothing to absorb.
    """
    shape = graph.shape(layer.output)
    axis = len(shape) - 1 if layer.op == "MatMul" else 1
    channels = shape[axis] if axis < len(shape) else 1
    scale, shift = np.ones(channels), np.zeros(channels)
    absorbed: list[Node] = []
    constant = all(name in graph.constants for name in layer.inputs[1:] if name)
    if not constant or not graph.type(layer.output).dtype.startswith("float"):
        return absorbed, scale, shift
    if layer.op == "MatMul" and (len(shape) != 2 or len(graph.shape(layer.inputs[1])) != 2):
        return absorbed, scale, shift
    value = layer.output
    while (step := next_affine(graph, value, axis)) is not None:
        node, factor, offset = step
        scale, shift = scale * factor, shift * factor + offset
        absorbed.append(node)
        value = node.output
    return absorbed, scale, shift


def next_affine(graph: Graph, value: str, axis: int) -> tuple[Node, Vector, Vector] | None:
    """The only reader of the value, if all it does is ``factor * value + offset`` by channel."""
    readers = graph.consumers(value)
    if len(readers) != 1 or value in graph.outputs:
        return None
    node, shape = readers[0], graph.shape(value)
    if node.op == "BatchNormalization" and node.inputs[0] == value and axis == 1:
        found = batch_norm_affine(graph, node)
        return None if found is None else (node, *found)
    if node.op not in ("Add", "Sub", "Mul", "Div") or graph.shape(node.output) != shape:
        return None
    left = node.inputs[0] == value
    other = graph.constants.get(node.inputs[1 if left else 0])
    vector = None if other is None else _per_channel(other, len(shape), axis, shape[axis])
    if vector is None:
        return None
    one, zero = np.ones_like(vector), np.zeros_like(vector)
    match node.op:
        case "Add":
            return node, one, vector
        case "Sub":
            return (node, one, -vector) if left else (node, -one, vector)
        case "Mul":
            return node, vector, zero
    return (node, 1 / vector, zero) if left and vector.all() else None


def batch_norm_affine(graph: Graph, node: Node) -> tuple[Vector, Vector] | None:
    """Scale and shift per channel that a BatchNormalization in inference mode applies."""
    operands = [graph.constants.get(name) for name in node.inputs[1:5]]
    if any(operand is None for operand in operands):
        return None
    gamma, beta, mean, variance = (np.asarray(operand, np.float64) for operand in operands)
    epsilon = float(np.float32(node.attrs.get("epsilon", 1e-5)))  # type: ignore[arg-type]
    scale = gamma / np.sqrt(variance + epsilon)
    return scale, beta - mean * scale


def _per_channel(array: Array, rank: int, axis: int, channels: int) -> Vector | None:
    """The constant as one number per channel, if it broadcasts to nothing more than that."""
    if array.ndim > rank:
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    if any(extent != 1 for index, extent in enumerate(shape) if index != axis):
        return None
    return np.broadcast_to(array.astype(np.float64).reshape(-1), (channels,))


def _scaled(graph: Graph, layer: Node, scale: Vector, shift: Vector) -> tuple[Array, Array]:
    weight = graph.constants[layer.inputs[1]]
    wide = weight.astype(np.float64)
    if layer.op == "ConvTranspose":  # [I, O/groups, *kernel]
        groups = layer.int_attr("group", 1)
        split = wide.reshape(groups, wide.shape[0] // groups, *wide.shape[1:])
        ones = (1,) * (wide.ndim - 2)
        wide = (split * scale.reshape(groups, 1, -1, *ones)).reshape(wide.shape)
    elif layer.op == "Conv" or layer.int_attr("transB", 0):  # channels first
        wide = wide * scale.reshape(-1, *(1,) * (wide.ndim - 1))
    else:  # [K, N]
        wide = wide * scale
    name = layer.inputs[2] if len(layer.inputs) > 2 else ""
    bias = graph.constants[name].astype(np.float64) if name else np.zeros(1)
    if layer.op == "Gemm":
        bias = bias * float(layer.attrs.get("beta", 1.0))  # type: ignore[arg-type]
    folded = bias * scale + shift
    if folded.ndim == 2 and folded.shape[0] == 1:
        folded = folded[0]
    return wide.astype(weight.dtype), folded.astype(weight.dtype)


def _spell_out(graph: Graph, node: Node) -> Graph:
    found = batch_norm_affine(graph, node)
    if found is None:
        return graph
    kind = graph.type(node.inputs[0])
    column = (-1, *(1,) * (len(kind.shape) - 2))
    names = [fresh(graph, f"{node.name}.{part}") for part in ("scale", "shift", "scaled")]
    scale, shift = (vector.reshape(column).astype(kind.dtype) for vector in found)
    product = Node(names[2], "Mul", (node.inputs[0], names[0]), (names[2],))
    total = Node(node.name, "Add", (names[2], names[1]), node.outputs[:1])
    nodes: list[Node] = []
    for old in graph:
        nodes += [product, total] if old is node else [old]
    return graph.with_(
        nodes,
        constants={names[0]: scale, names[1]: shift},
        types={names[2]: TensorType(kind.dtype, kind.shape)},
    )
