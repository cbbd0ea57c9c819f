"""What follows an accumulator at the tile: elementwise nodes as expressions."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpqc import compute
from mpqc.graph import Graph, Node
from mpqc.kernels import Operand, Reader
from mpqc.passes.fuse_requantize import clip_bounds


class Epilogue:
    """Elementwise nodes as expressions over an accumulator and operands."""

    def __init__(self, graph: Graph, layer: Node | None, nodes: Sequence[Node]) -> None:
        self.graph = graph
        self.accumulator = layer.output if layer is not None else None
        self.nodes = {node.output: node for node in nodes}
        self.operands: list[Operand] = []
        self.stored: dict[str, str] = {}  # value -> output stage that later stages read back
        seen: set[str] = set()
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if not value or value in seen or value in self.nodes or value == self.accumulator:
                    continue
                if node.op == "Clip" and index > 0:
                    continue
                constant = graph.constants.get(value)
                if constant is not None and constant.size == 1 and self._scalar(node):
                    continue
                seen.add(value)
                self.operands.append(Operand(value, constant is not None, graph.type(value).dtype))

    def _scalar(self, node: Node) -> bool:
        """Scalars become literals; a layer's m and b stay arrays, so that kernels are shared."""
        return node.op not in ("Affine", "Requantize")

    def cell(self, value: str) -> Callable[[Reader], Any]:
        return lambda reader: self._expression(value, reader, top=True)

    def _expression(self, value: str, reader: Reader, top: bool = False) -> Any:
        if value == self.accumulator:
            return reader("acc")
        if not top and value in self.stored:
            return reader(self.stored[value])
        node = self.nodes.get(value)
        if node is None:
            constant = self.graph.constants.get(value)
            if constant is not None and constant.size == 1 and not self._is_operand(value):
                return compute.literal(float(constant.reshape(())))
            return reader(value)
        if node.op == "Clip":
            low, high = clip_bounds(self.graph, node) or (-np.inf, np.inf)
            return compute.clip(self._expression(node.inputs[0], reader), low, high)
        operands = [self._expression(v, reader) for v in node.inputs if v]
        return compute.apply(node, operands)

    def _is_operand(self, value: str) -> bool:
        return any(operand.name == value for operand in self.operands)
