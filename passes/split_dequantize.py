"""split-dequantize: every reader turns codes into floats for itself."""

from dataclasses import dataclass, replace

from mpqc.graph import Graph, Node, TensorType
from mpqc.passes.base import Pass, fresh


@dataclass(frozen=True)
class SplitDequantize(Pass):
    """Before: a Dequantize with several readers. After: one for each, so that codes travel.

        %d = Dequantize(%q); %y = Relu(%d); %z = Neg(%d)
        =>
        %d = Dequantize(%q); %y = Relu(%d); %d.z = Dequantize(%q); %z = Neg(%d.z)

    A kernel then reads bytes from memory where it would read floats, and converts in registers.
    """

    name = "split-dequantize"

    def rewrite(self, graph: Graph) -> Graph:
        nodes: dict[str, Node] = {node.name: node for node in graph}
        types: dict[str, TensorType] = {}
        for node in graph:
            if node.op != "Dequantize":
                continue
            readers = graph.consumers(node.output)
            first = 0 if node.output in graph.outputs else 1
            for reader in readers[first:]:
                value = fresh(graph, f"{node.output}.{reader.name}")
                nodes[value] = replace(node, name=value, outputs=(value,))
                types[value] = graph.type(node.output)
                current = nodes[reader.name]
                inputs = tuple(value if v == node.output else v for v in current.inputs)
                nodes[reader.name] = replace(current, inputs=inputs)
        return graph.with_(nodes.values(), types=types)
