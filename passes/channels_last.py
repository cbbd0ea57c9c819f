"""channels-last: images flow as NHWC, the layout in which channels share vectors and words."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mpqc.graph import Array, Graph, Node, TensorType
from mpqc.passes.base import Pass

# Operators that own a spatial window: always worth a transpose around them.
ANCHORS = frozenset(
    {"IntConv", "Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"}
)
ELEMENTWISE = frozenset({
    "Affine", "Requantize", "Quantize", "Dequantize",
    "Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Softplus",
    "Add", "Sub", "Mul", "Div", "Max", "Min", "Neg", "Abs", "Exp", "Log", "Sqrt", "Erf", "Pow",
    "Identity", "Cast", "Floor", "Ceil", "Round", "PRelu",
})  # fmt: skip
_PARAMETERS = {"Affine": 1, "Requantize": 1, "Clip": 1}  # operands from here on are no images
SUFFIX = ".nhwc"


def last(rank: int) -> tuple[int, ...]:
    """Axes of the channels-last array in terms of the channels-first one."""
    return (0, *range(2, rank), 1)


def first(rank: int) -> tuple[int, ...]:
    """Inverse of ``last``."""
    return (0, rank - 1, *range(1, rank - 1))


@dataclass(frozen=True)
class ChannelsLast(Pass):
    """Before: channels first. After: windows, and what lies between them, channels last.

        %y = IntConv(%x, %w)
        =>
        %x.nhwc = Transpose(%x) {perm=[0, 2, 3, 1]}
        %y.nhwc = IntConv(%x.nhwc, %w) {layout="NHWC"}
        %y = Transpose(%y.nhwc) {perm=[0, 3, 1, 2]}

    A transpose is written only where somebody reads that layout. Weights keep their layout.
    """

    name = "channels-last"

    def rewrite(self, graph: Graph) -> Graph:
        writer = _Writer(graph)
        for node in graph:
            writer.add(node)
        for value in graph.outputs:
            writer.channels_first(value)
        return graph.with_(writer.nodes, constants=writer.constants, types=writer.types)


@dataclass
class _Writer:
    graph: Graph
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    types: dict[str, TensorType] = field(default_factory=dict)
    first_ready: set[str] = field(default_factory=set)
    last_ready: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.first_ready |= {*self.graph.inputs, *self.graph.constants}

    def add(self, node: Node) -> None:
        if node.op in ANCHORS and self._image(node.inputs[0]) and _static_window(self.graph, node):
            self._write_last(node, images=1)
        elif node.op in ELEMENTWISE and self._agnostic(node):
            self._write_last(node, images=_PARAMETERS.get(node.op, len(node.inputs)))
        elif node.op == "Concat" and self._all_last(node.inputs):
            rank = len(self.graph.shape(node.output))
            axis = last(rank).index(node.int_attr("axis") % rank)
            self._write_last(node, images=len(node.inputs), attrs={"axis": axis})
        elif not self._remapped(node):
            inputs = [self.channels_first(value) if value else "" for value in node.inputs]
            self.nodes.append(replace(node, inputs=tuple(inputs)))
            self.first_ready |= set(filter(None, node.outputs))

    def _remapped(self, node: Node) -> bool:
        """Slice and Pad of an image follow it when their axes are known."""
        if node.op not in ("Slice", "Pad") or not self._all_last(node.inputs[:1]):
            return False
        return self._remap_slice(node) if node.op == "Slice" else self._remap_pad(node)

    def _image(self, value: str) -> bool:
        return len(self.graph.shape(value)) in (3, 4)

    def _all_last(self, values: Sequence[str]) -> bool:
        return all(value in self.last_ready for value in values)

    def _agnostic(self, node: Node) -> bool:
        """An operand flows channels last already, and every other one can be turned."""
        rank = len(self.graph.shape(node.output))
        operands = node.inputs[: _PARAMETERS.get(node.op, len(node.inputs))]
        images = [value for value in operands if value and value not in self.graph.constants]
        return any(value in self.last_ready for value in images) and all(
            len(self.graph.shape(value)) == rank for value in images
        )

    def _write_last(
        self, node: Node, images: int, attrs: dict[str, int | str] | None = None
    ) -> None:
        rank = len(self.graph.shape(node.output))
        inputs = [
            self._turned(value, rank) if index < images and value else value
            for index, value in enumerate(node.inputs)
        ]
        extra: dict[str, int | str] = dict(attrs or {})
        if node.op in ANCHORS:
            extra["layout"] = "NHWC"
        if "axis" in node.attrs and node.op in ("Affine", "Requantize"):
            extra["axis"] = rank - 1
        outputs = tuple(f"{value}{SUFFIX}" if value else "" for value in node.outputs)
        for value in filter(None, node.outputs):
            kind = self.graph.type(value)
            shape = tuple(kind.shape[axis] for axis in last(len(kind.shape)))
            self.types[f"{value}{SUFFIX}"] = TensorType(kind.dtype, shape)
            self.last_ready.add(value)
        self.nodes.append(
            replace(node, inputs=tuple(inputs), outputs=outputs, attrs={**node.attrs, **extra})
        )

    def _turned(self, value: str, rank: int) -> str:
        if value not in self.graph.constants:
            return self.channels_last(value)
        array = self.graph.constants[value]
        if array.size == 1:
            return value
        name = f"{value}{SUFFIX}"
        padded = array.reshape((1,) * (rank - array.ndim) + array.shape)
        self.constants[name] = np.ascontiguousarray(padded.transpose(last(rank)))
        return name

    def channels_last(self, value: str) -> str:
        name = f"{value}{SUFFIX}"
        if value not in self.last_ready:
            kind = self.graph.type(value)
            self._transpose(value, name, kind, last(len(kind.shape)))
            self.last_ready.add(value)
        return name

    def channels_first(self, value: str) -> str:
        if value not in self.first_ready:
            kind = self.graph.type(value)
            stored = self.types[f"{value}{SUFFIX}"]
            self._transpose(f"{value}{SUFFIX}", value, stored, first(len(kind.shape)))
            self.first_ready.add(value)
        return value

    def _transpose(self, source: str, result: str, kind: TensorType, perm: tuple[int, ...]) -> None:
        shape = tuple(kind.shape[axis] for axis in perm)
        self.types[result] = TensorType(kind.dtype, shape)
        moved = [axis for axis in perm if kind.shape[axis] != 1]
        if moved == sorted(moved):  # only axes of extent one move: no byte does
            target = f"{result}.shape"
            self.constants[target] = np.array(shape, np.int64)
            self.nodes.append(Node(f"{result}.turn", "Reshape", (source, target), (result,)))
            return
        self.nodes.append(Node(f"{result}.turn", "Transpose", (source,), (result,), {"perm": perm}))

    def _remap_slice(self, node: Node) -> bool:
        """Slice with constant axes: rename the axes."""
        if len(node.inputs) < 4 or not node.inputs[3]:
            return False
        axes = self.graph.constants.get(node.inputs[3])
        if axes is None:
            return False
        rank = len(self.graph.shape(node.output))
        name = f"{node.name}.axes{SUFFIX}"
        self.constants[name] = np.array([last(rank).index(int(a) % rank) for a in axes], np.int64)
        inputs = (*node.inputs[:3], name, *node.inputs[4:])
        self._write_last(replace(node, inputs=inputs), images=1)
        return True

    def _remap_pad(self, node: Node) -> bool:
        """Pad with constant pads and all axes: reorder the pads."""
        pads = self.graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
        if pads is None or (len(node.inputs) > 3 and node.inputs[3]):
            return False
        rank = len(self.graph.shape(node.output))
        name = f"{node.name}.pads{SUFFIX}"
        before_after = np.asarray(pads).reshape(2, rank)[:, list(last(rank))]
        self.constants[name] = before_after.reshape(-1).astype(np.int64)
        self._write_last(replace(node, inputs=(node.inputs[0], name, *node.inputs[2:])), images=1)
        return True


def _static_window(graph: Graph, node: Node) -> bool:
    """Float convolutions with computed weights, and pools with indices, stay as they are."""
    if node.op == "Conv":
        return node.inputs[1] in graph.constants and len(graph.shape(node.inputs[0])) == 4
    if node.op in ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"):
        if len([value for value in node.outputs if value]) > 1:
            return False
        return len(graph.shape(node.inputs[0])) == 4
    return True
