"""drop-dead: nodes that reach no output go."""

from dataclasses import dataclass

from mpqc.graph import Graph
from mpqc.passes.base import Pass


@dataclass(frozen=True)
class DropDead(Pass):
    """Keep what the outputs are computed from; inputs of the graph stay, used or not.

    ``%a = Relu(%x)  %b = Exp(%x)  return %a``    =>    ``%a = Relu(%x)  return %a``
    """

    name = "drop-dead"

    def rewrite(self, graph: Graph) -> Graph:
        wanted = set(graph.outputs)
        kept = []
        for node in reversed(tuple(graph)):
            if wanted.isdisjoint(node.outputs):
                continue
            wanted.update(node.inputs)
            kept.append(node)
        return graph.with_(reversed(kept))
