"""Partition a channels-last graph into what one kernel computes, in an order that can run."""

from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import numpy as np

from mpqc.graph import Graph, Node
from mpqc.passes.fuse_requantize import clip_bounds

LAYERS = frozenset({"IntConv", "IntMatMul"})
# Elementwise operators whose float32 result does not depend on who computes it.
EXACT = frozenset({
    "Affine", "Requantize", "Quantize", "Dequantize",
    "Relu", "Clip", "LeakyRelu", "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Identity",
})  # fmt: skip
_ELEMENTS = frozenset({"float32", "uint8", "int32"})
MOST_FUSED = 12  # nodes of an epilogue: each stage repeats what it does not read back


@dataclass
class Group:
    """Nodes that become one kernel (or, for a region, a few)."""

    kind: str  # "layer", "elementwise" or "region"
    nodes: list[Node] = field(default_factory=list)


def form_groups(graph: Graph) -> list[Group]:
    """Assign every node to a group and order the groups so that each reads only earlier ones."""
    owner: dict[str, int] = {}
    groups: list[Group] = []
    dag = nx.DiGraph()
    dag.add_nodes_from(node.name for node in graph)
    for node in graph:
        for value in filter(None, node.inputs):
            producer = graph.producer(value)
            if producer is not None:
                dag.add_edge(producer.name, node.name)

    def grow(root: Node, kind: str) -> None:
        group = Group(kind, [root])
        owner[root.name] = len(groups)
        groups.append(group)
        shape = graph.shape(root.output)
        inside = {root.name}
        frontier = [root]
        while frontier:
            for node in graph.consumers(frontier.pop(0).output):
                if node.name in owner or not _fusible(graph, node, shape, kind):
                    continue
                if len(inside) >= MOST_FUSED or _cycles(dag, inside, node.name):
                    continue
                for member in (node, *_own_dequantizes(graph, node, owner)):
                    owner[member.name] = owner[root.name]
                    inside.add(member.name)
                    nx.contracted_nodes(dag, root.name, member.name, self_loops=False, copy=False)
                    group.nodes.append(member)
                frontier.append(node)

    order = list(graph)
    for node in reversed(order):
        if node.op in LAYERS:
            grow(node, "layer")
    for node in order:
        if node.name not in owner and node.op in ("Quantize", "Dequantize", "Affine", "Requantize"):
            grow(node, "elementwise")
    rank = {node.name: index for index, node in enumerate(order)}
    for group in groups:  # the layer first: a Dequantize that it reads may have come before it
        group.nodes.sort(key=lambda node: (node.op not in LAYERS, rank[node.name]))
    roots = {name: groups[index] for name, index in owner.items()}
    return _sequence(graph, dag, roots, rank)


def _own_dequantizes(graph: Graph, node: Node, owner: dict[str, int]) -> list[Node]:
    """Dequantize nodes that only this node reads: it loads the codes itself."""
    producers = {value: graph.producer(value) for value in node.inputs if value}
    return [
        producer
        for value, producer in producers.items()
        if producer is not None
        and producer.op == "Dequantize"
        and producer.name not in owner
        and value not in graph.outputs
        and len(graph.consumers(value)) == 1
        and graph.shape(value) == graph.shape(node.output)
    ]


def _cycles(dag: Any, inside: set[str], node: str) -> bool:
    """Whether fusing the node would make the group wait for itself."""
    root = next(name for name in inside if name in dag)
    return any(
        producer != root and nx.has_path(dag, root, producer) for producer in dag.predecessors(node)
    )


def _fusible(graph: Graph, node: Node, shape: tuple[int, ...], kind: str) -> bool:
    if node.op not in EXACT or graph.shape(node.output) != shape:
        return False
    channels = shape[-1] if shape else 1
    for index, value in enumerate(node.inputs):
        if not value or (node.op == "Clip" and index > 0):
            continue
        if value in graph.constants:
            array = graph.constants[value]
            vector = array.size == channels == (array.shape[-1] if array.ndim else 0)
            if array.dtype != np.float32 or not (array.size == 1 or vector):
                return False
            if node.op in ("Affine", "Requantize") and node.int_attr("axis", 1) != len(shape) - 1:
                return False
        elif graph.shape(value) != shape or graph.type(value).dtype not in _ELEMENTS:
            return False
    if node.op == "Clip" and clip_bounds(graph, node) is None:
        return False
    return graph.type(node.output).dtype in ("float32", "uint8")


def _sequence(
    graph: Graph,
    dag: Any,
    owner: dict[str, Group],
    rank: dict[str, int],
) -> list[Group]:
    """Topological order of the contracted graph; float nodes gather into maximal runs."""
    waiting = {name: dag.in_degree(name) for name in dag}
    ready = sorted((name for name, count in waiting.items() if not count), key=rank.__getitem__)
    result: list[Group] = []
    while ready:
        floats = [name for name in ready if name not in owner]
        in_region = bool(result) and result[-1].kind == "region"
        name = floats[0] if floats and (in_region or len(floats) == len(ready)) else None
        name = name or next((n for n in ready if n in owner), ready[0])
        ready.remove(name)
        if name in owner:
            result.append(owner[name])
        elif in_region:
            result[-1].nodes.append(graph[name])
        else:
            result.append(Group("region", [graph[name]]))
        for successor in dag.successors(name):
            waiting[successor] -= 1
            if not waiting[successor]:
                ready.append(successor)
        ready.sort(key=rank.__getitem__)
    return result
