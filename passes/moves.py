"""Operators that only move the values of their first operand."""

from mpqc.graph import Node

MOVES = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Reshape",
        "Resize",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)


def moves(node: Node) -> bool:
    """Whether each output's elements are elements of the first operand: elsewhere, fewer, or more.

    MaxPool compares them too, which order alone decides; Resize picks the nearest. What makes up
    values (a Resize between them, the indices of a MaxPool) does not count; nor does Pad, whose
    values callers have to look at.
    """
    if node.op == "Resize":
        outside = node.str_attr("coordinate_transformation_mode") == "tf_crop_and_resize"
        return node.str_attr("mode", "nearest") == "nearest" and not outside
    if node.op == "MaxPool":
        return len([name for name in node.outputs if name]) == 1
    return node.op in MOVES
