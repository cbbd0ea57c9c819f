"""fold-bias: a constant added right after a quantized layer becomes its bias."""

from dataclasses import dataclass, replace

import numpy as np

from mpqc.graph import Array, Graph, Node
from mpqc.passes.base import Pass, fresh


@dataclass(frozen=True)
class FoldBias(Pass):
    """Before: MatMul + Add, as exporters write a dense layer. After: one Affine, the same bits.

        %y = Affine(%acc, %m, %zero); %z = Add(%y, %c)    =>    %z = Affine(%acc, %m, %c)

    Only a bias of zero makes room: otherwise three roundings would become two.
    """

    name = "fold-bias"

    def rewrite(self, graph: Graph) -> Graph:
        nodes: dict[str, Node] = {node.name: node for node in graph}
        constants: dict[str, Array] = {}
        for node in graph:
            bias = _bias(graph, node)
            if bias is None:
                continue
            (add,) = graph.consumers(node.output)
            name = fresh(graph, f"{add.name}.b")
            constants[name] = bias
            del nodes[add.name]
            nodes[node.name] = replace(node, inputs=(*node.inputs[:2], name), outputs=(add.output,))
        return graph.with_(nodes.values(), constants=constants)


def _bias(graph: Graph, node: Node) -> Array | None:
    """float32 [channels] that the only reader of the node adds, if it adds one."""
    if node.op != "Affine" or node.output in graph.outputs or graph.constants[node.inputs[2]].any():
        return None
    consumers = graph.consumers(node.output)
    if len(consumers) != 1 or consumers[0].op != "Add":
        return None
    others = [value for value in consumers[0].inputs if value != node.output]
    if len(others) != 1 or others[0] not in graph.constants:
        return None
    constant, shape = graph.constants[others[0]], graph.shape(node.output)
    if constant.ndim > len(shape) or not np.isfinite(constant).all():
        return None
    axis = node.int_attr("axis", 1)
    extents = (1,) * (len(shape) - constant.ndim) + constant.shape
    if any(extent != 1 for i, extent in enumerate(extents) if i != axis):
        return None
    return np.array(np.broadcast_to(constant.reshape(-1), graph.shape(node.inputs[1])))
