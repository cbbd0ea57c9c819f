"""Interpret a graph in numpy: the oracle of every test. Integers are exact."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from mpqc import numerics, pooling
from mpqc.errors import DataError, GraphError
from mpqc.graph import QUANTIZED_OPS, Array, Graph, Node, TensorType


def run(
    graph: Graph, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
) -> dict[str, Array]:
    """Compute values of a graph.

    Args:
        graph: float, quantized or both.
        feeds: one array per input of the graph.
        outputs: any values of the graph; by default its outputs.

    Raises:
        DataError: feeds that do not fit the inputs.
        GraphError: an operator without a meaning, or an accumulator beyond int32.
    """
    wanted = list(graph.outputs if outputs is None else outputs)
    if strangers := [name for name in wanted if name not in graph.types]:
        raise GraphError(f"no value named {strangers[0]!r} in the graph")
    _check(graph, feeds)
    values: dict[str, Array] = {**graph.constants, **feeds}
    needed = _needed(graph, wanted)
    fixed = any(node.op in QUANTIZED_OPS for node in graph)
    for node in graph:
        if node.name not in needed:
            continue
        operands = [values[name] if name else None for name in node.inputs]
        for name, array in zip(node.outputs, _compute(graph, node, operands, fixed), strict=True):
            if name and TensorType.of(array) != graph.type(name):
                raise GraphError(
                    f"{node.op} {node.name!r} gave {TensorType.of(array)}, not {graph.type(name)}"
                )
            values[name] = array
    return {name: values[name] for name in wanted}


def _check(graph: Graph, feeds: Mapping[str, Array]) -> None:
    if missing := sorted(graph.inputs.keys() - feeds.keys()):
        raise DataError(f"no array for input {missing[0]!r}")
    if strangers := sorted(feeds.keys() - graph.inputs.keys()):
        known = ", ".join(graph.inputs)
        raise DataError(f"no input named {strangers[0]!r}; the model has: {known}")
    for name, kind in graph.inputs.items():
        if TensorType.of(feeds[name]) != kind:
            raise DataError(f"input {name!r} is {TensorType.of(feeds[name])}, not {kind}")


def _needed(graph: Graph, wanted: Sequence[str]) -> set[str]:
    values, names = set(wanted), set()
    for node in reversed(tuple(graph)):
        if not values.isdisjoint(node.outputs):
            names.add(node.name)
            values.update(node.inputs)
    return names


def _compute(
    graph: Graph, node: Node, operands: list[Array | None], fixed: bool
) -> Sequence[Array]:
    given = [array for array in operands if array is not None]
    if node.op in QUANTIZED_OPS:
        return (_quantized(node, given),)
    if fixed and (found := pooling.windows(graph, node)) is not None:
        return (pooling.mean(given[0], found, graph.shape(node.output)),)
    from mpqc.onnx_nodes import evaluate  # integers alone need no onnx

    found_outputs = iter(evaluate(node, operands, graph.opset))
    return [next(found_outputs) if name else np.zeros(()) for name in node.outputs]


def _quantized(node: Node, operands: list[Array]) -> Array:
    match node.op:
        case "Quantize":
            return numerics.quantize(
                operands[0], node.float_attr("scale"), node.int_attr("zero_point"), *clip(node)
            )
        case "Dequantize":
            return numerics.dequantize(
                operands[0], node.float_attr("scale"), node.int_attr("zero_point")
            )
        case "DequantizeWeights":
            w, scale = operands
            return numerics.dequantize_weights(w, scale, node.int_attr("axis", 0))
        case "IntConv":
            return _int_conv(node, operands[0], operands[1])
        case "IntMatMul":
            q, w = operands
            centred = q.astype(np.float64) - node.int_attr("zero_point")
            return _int32(node, centred @ w.astype(np.float64))
        case "Affine":
            acc, m, b = operands
            return numerics.affine(acc, m, b, node.int_attr("axis", 1))
    acc, m, b = operands
    axis = node.int_attr("axis", 1)
    return numerics.requantize(acc, m, b, axis, node.int_attr("zero_point"), *clip(node))


def clip(node: Node) -> tuple[int, int]:
    """Bounds of the codes that a Quantize or Requantize gives."""
    return node.int_attr("low", 0), node.int_attr("high", 2 ** node.int_attr("bits") - 1)


def _int_conv(node: Node, q: Array, w: Array) -> Array:
    """Convolve [N, C, *spatial] by [O, C/groups, *kernel], one kernel position at a time."""
    rank, groups = q.ndim - 2, node.int_attr("group", 1)
    strides = node.ints_attr("strides", (1,) * rank)
    dilations = node.ints_attr("dilations", (1,) * rank)
    pads = node.ints_attr("pads", (0,) * 2 * rank)
    edges = [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]
    # zeros after the zero point is taken off: the same as padding with it before.
    # float64 holds these sums exactly (255 * 255 * taps < 2**53) and has a fast product
    centred = np.pad(q.astype(np.float64) - node.int_attr("zero_point"), edges)
    kernel = w.shape[2:]
    out = tuple(
        (centred.shape[i + 2] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1
        for i in range(rank)
    )
    planes = w.astype(np.float64).reshape(groups, w.shape[0] // groups, w.shape[1], -1)
    acc = np.zeros((q.shape[0], groups, planes.shape[1], int(np.prod(out))))
    for index, at in enumerate(product(*map(range, kernel))):
        under: tuple[Any, ...] = tuple(
            slice(a * d, a * d + (o - 1) * s + 1, s)
            for a, d, o, s in zip(at, dilations, out, strides, strict=True)
        )
        taps = centred[:, :, *under].reshape(q.shape[0], groups, w.shape[1], -1)
        acc += planes[..., index] @ taps
    return _int32(node, acc.reshape(q.shape[0], w.shape[0], *out))


def _int32(node: Node, exact: Array) -> Array:
    if exact.size and np.abs(exact).max() >= 2**31:
        raise GraphError(f"the sums of {node.name!r} exceed int32")
    return exact.astype(np.int32)
