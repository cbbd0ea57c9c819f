"""fold-pad: zeros around a picture are the convolution's own padding."""

from dataclasses import dataclass, replace

from mpqc.graph import Graph, Node
from mpqc.passes.base import Pass
from mpqc.passes.drop_dead import DropDead


@dataclass(frozen=True)
class FoldPad(Pass):
    """Each convolution that reads a constant zero Pad of spatial axes pads by itself.

    ``%p = Pad(%x, [0,0,1,1,0,0,1,1])  %y = Conv(%p, %w)``    =>
    ``%y = Conv(%x, %w) {pads=[1,1,1,1]}``

    A Pad with other readers stays for them; a convolution never gets slower by padding.
    """

    name = "fold-pad"

    def rewrite(self, graph: Graph) -> Graph:
        return DropDead().rewrite(graph.with_(_folded(graph, node) for node in graph))


def _folded(graph: Graph, node: Node) -> Node:
    if node.op != "Conv" or node.str_attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return node
    pad = graph.producer(node.inputs[0])
    if pad is None or pad.op != "Pad":
        return node
    amounts = _zero_pads(graph, pad)
    rank = len(graph.shape(node.output)) - 2
    if amounts is None or any(before or after for before, after in amounts[:2]):
        return node
    own = node.ints_attr("pads", (0,) * 2 * rank)
    begins = [own[axis] + amounts[axis + 2][0] for axis in range(rank)]
    ends = [own[axis + rank] + amounts[axis + 2][1] for axis in range(rank)]
    attrs = {key: value for key, value in node.attrs.items() if key != "auto_pad"}
    return replace(
        node,
        inputs=(pad.inputs[0], *node.inputs[1:]),
        attrs={**attrs, "pads": (*begins, *ends)},
    )


def _zero_pads(graph: Graph, pad: Node) -> list[tuple[int, int]] | None:
    """(before, after) per axis; None unless the Pad adds constant zeros and cuts nothing."""
    if pad.str_attr("mode", "constant") != "constant":
        return None
    operands = [*pad.inputs, "", "", ""]
    if any(name and name not in graph.constants for name in operands[1:]):
        return None
    if operands[2] and graph.constants[operands[2]].any():
        return None
    rank = len(graph.shape(pad.output))
    axes = graph.constants[operands[3]].tolist() if operands[3] else list(range(rank))
    pads = graph.constants[operands[1]].tolist()
    if min(pads) < 0:
        return None
    amounts = [(0, 0)] * rank
    for index, axis in enumerate(axes):
        amounts[axis % rank] = (pads[index], pads[index + len(axes)])
    return amounts
