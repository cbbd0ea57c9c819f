"""The rows of numbers that a layer multiplies its weights with, for chosen output positions."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mpqc.graph import Array, Graph, Node
from mpqc.passes.find_layers import Layer


@dataclass(frozen=True)
class Geometry:
    """Of a convolution, or of a matrix product, which has one position for each row.

    Attributes:
        groups: of input and output channels.
        kernel: extents; empty for a matrix product.
        strides: one an axis.
        dilations: one an axis.
        pads: begins, then ends.
        out: extents of the output, without batch and channels.
    """

    groups: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    out: tuple[int, ...]

    @classmethod
    def of(cls, graph: Graph, layer: Layer) -> "Geometry":
        """Of a quantizable layer."""
        node: Node = graph[layer.name]
        rank = len(layer.kernel)
        if not rank:
            return cls(1, (), (), (), (), ())
        return cls(
            layer.groups,
            layer.kernel,
            node.ints_attr("strides", (1,) * rank),
            node.ints_attr("dilations", (1,) * rank),
            node.ints_attr("pads", (0,) * 2 * rank),
            graph.shape(layer.output)[2:],
        )

    def positions(self, x: Array) -> int:
        """Rows that the input x has."""
        return int(x.shape[0] * prod(self.out) if self.kernel else x.size // x.shape[-1])

    def inputs(self, x: Array, at: Array) -> Array:
        """Rows of the input.

        Args:
            x: [N, C, *spatial], or [..., K].
            at: positions, int64 [n], in row-major order of batch and space.

        Returns:
            [G, n, K], K in the order of the flattened weights.
        """
        if not self.kernel:
            return np.ascontiguousarray(x.reshape(1, -1, x.shape[-1])[:, at])
        rank = len(self.kernel)
        edges = list(zip(self.pads[:rank], self.pads[rank:], strict=True))
        padded = np.pad(x, [(0, 0), (0, 0), *edges])
        sample, *place = np.unravel_index(at, (x.shape[0], *self.out))
        offsets = np.indices(self.kernel).reshape(rank, -1)
        index = [
            p[:, None] * s + o * d
            for p, s, o, d in zip(place, self.strides, offsets, self.dilations, strict=True)
        ]
        chosen: tuple[Any, ...] = (slice(None), sample[:, None], *index)
        found = padded.swapaxes(0, 1)[chosen]  # [C, n, taps]
        channels = x.shape[1] // self.groups
        found = found.reshape(self.groups, channels, len(at), -1).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(found.reshape(self.groups, len(at), -1))

    def outputs(self, y: Array, at: Array) -> Array:
        """The same rows of the output: [N, O, *spatial] or [..., O] -> [n, O]."""
        if not self.kernel:
            return np.ascontiguousarray(y.reshape(-1, y.shape[-1])[at])
        rows = np.moveaxis(y, 1, -1).reshape(-1, y.shape[1])
        return np.ascontiguousarray(rows[at])
