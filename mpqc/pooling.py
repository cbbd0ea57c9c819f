"""Averages over windows: what a node averages, and the tree order of its sum.

A float mean that feeds a quantizer must not depend on who sums: in a graph with quantized
operators all backends follow ``numerics.tree_mean`` over the windows described here.
"""

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from mpqc.graph import QUANTIZED_OPS, Array, Graph, Node
from mpqc.numerics import tree_mean


@dataclass(frozen=True)
class Windows:
    """Windows of an average over the spatial axes of [N, C, *spatial].

    Attributes:
        kernel, strides, dilations: per spatial axis.
        begins, ends: zeros around the picture, per spatial axis; ceil_mode's overhang too.
        out: windows per spatial axis.
        count: int64 [*out], the elements that each mean divides by.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    out: tuple[int, ...]
    count: npt.NDArray[np.int64]

    @property
    def whole(self) -> bool:
        """One window that is the whole picture."""
        return prod(self.out) == 1 and not any(self.begins) and not any(self.ends)

    def slices(self) -> list[tuple[slice, ...]]:
        """Per kernel position, in row-major order, the padded picture's elements under it."""
        axes = range(len(self.kernel))
        return [
            tuple(
                slice(
                    at[i] * self.dilations[i],
                    at[i] * self.dilations[i] + (self.out[i] - 1) * self.strides[i] + 1,
                    self.strides[i],
                )
                for i in axes
            )
            for at in product(*map(range, self.kernel))
        ]


def fixed_order(graph: Graph, node: Node) -> Windows | None:
    """The windows of a float32 mean whose summation order is fixed; None for any other node."""
    if not any(other.op in QUANTIZED_OPS for other in graph):
        return None
    return windows(graph, node)


def windows(graph: Graph, node: Node) -> Windows | None:
    """The windows of GlobalAveragePool, AveragePool, or ReduceMean over all spatial axes."""
    if node.op not in ("GlobalAveragePool", "AveragePool", "ReduceMean"):
        return None
    kind = graph.type(node.inputs[0])
    if kind.dtype != "float32" or len(kind.shape) < 3 or not kind.elements:
        return None
    spatial = kind.shape[2:]
    if node.op == "AveragePool":
        return _pool(node, spatial, graph.shape(node.output)[2:])
    if node.op == "ReduceMean" and not _is_spatial(graph, node, len(kind.shape)):
        return None
    ones, zeros = (1,) * len(spatial), (0,) * len(spatial)
    return Windows(spatial, ones, ones, zeros, zeros, ones, np.full(ones, prod(spatial)))


def _is_spatial(graph: Graph, node: Node, rank: int) -> bool:
    axes: tuple[int, ...] = node.ints_attr("axes")
    if len(node.inputs) > 1 and node.inputs[1]:
        if node.inputs[1] not in graph.constants:
            return False
        axes = tuple(int(axis) for axis in graph.constants[node.inputs[1]].reshape(-1))
    return sorted(axis % rank for axis in axes) == list(range(2, rank))


def _pool(node: Node, spatial: tuple[int, ...], out: tuple[int, ...]) -> Windows:
    rank = len(spatial)
    kernel = node.ints_attr("kernel_shape")
    strides = node.ints_attr("strides", (1,) * rank)
    dilations = node.ints_attr("dilations", (1,) * rank)
    pads = explicit_pads(node, spatial, out, kernel)
    begins, after = pads[:rank], pads[rank:]
    reach = [(out[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 for i in range(rank)]
    ends = tuple(max(after[i], reach[i] - spatial[i] - begins[i]) for i in range(rank))
    # an overhang of ceil_mode never counts, padding does if the node says so
    counted = [np.zeros(begins[i] + spatial[i] + ends[i], np.int64) for i in range(rank)]
    include = bool(node.int_attr("count_include_pad", 0))
    for i in range(rank):
        first, last = (0, begins[i] + spatial[i] + after[i]) if include else (
            begins[i], begins[i] + spatial[i]
        )  # fmt: skip
        counted[i][first:last] = 1
    count: Array = np.ones((), np.int64)
    for i in range(rank):
        index = np.arange(out[i])[:, None] * strides[i] + np.arange(kernel[i])[None] * dilations[i]
        count = np.multiply.outer(count, counted[i][index].sum(axis=1))
    # a window of padding alone sums to zero, whatever it is divided by
    return Windows(kernel, strides, dilations, begins, ends, out, np.maximum(count, 1))


def explicit_pads(
    node: Node, spatial: tuple[int, ...], out: tuple[int, ...], kernel: tuple[int, ...]
) -> tuple[int, ...]:
    """Begins, then ends, per spatial axis of a Conv or pool, its auto_pad resolved."""
    rank = len(spatial)
    auto = node.str_attr("auto_pad", "NOTSET")
    if auto == "VALID":
        return (0,) * 2 * rank
    if auto == "NOTSET":
        return node.ints_attr("pads", (0,) * 2 * rank)
    strides = node.ints_attr("strides", (1,) * rank)
    dilations = node.ints_attr("dilations", (1,) * rank)
    begins, ends = [], []
    for i in range(rank):
        reach = (out[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1
        total = max(0, reach - spatial[i])
        begins.append(total // 2 if auto == "SAME_UPPER" else total - total // 2)
        ends.append(total - begins[i])
    return (*begins, *ends)


def mean(x: Array, found: Windows, shape: tuple[int, ...]) -> Array:
    """Average x, float32 [N, C, *spatial], over the windows; the result has the shape given."""
    edges = zip(found.begins, found.ends, strict=True)
    padded = np.pad(x, [(0, 0), (0, 0), *edges])
    indices: list[tuple[Any, ...]] = [(..., *at) for at in found.slices()]
    stacked = np.stack([padded[index] for index in indices], axis=-1)
    return tree_mean(stacked, found.count).reshape(shape)
