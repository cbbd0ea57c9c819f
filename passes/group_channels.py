"""group-channels: output channels of equal weight width become a layer of their own.

Widths are read from the integers themselves, so that plans with a width for every channel, trained
networks and files of other tools are served alike. Works on channels-last graphs, just before
lowering: the reference model keeps whole layers, so that ``verify`` checks this pass too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from mpqc.graph import Array, Attribute, Graph, Node, TensorType
from mpqc.passes.base import Pass, fresh
from mpqc.quantizers import channel_widths, stored_levels

Cycles = Callable[[Graph, Node], float]
"""Expected time of an integer layer of a channels-last graph."""

PART = "part_of"  # attribute of a part: the layer that it came from
LEAST = 8  # channels of a layer that is looked at
WORTH = 0.92  # of the time: what a split has to come down to
CALL, JOINED, GATHERED = 1500.0, 0.15, 1.0  # cycles of a kernel's start, of a byte moved
WORD = 8  # channels of a value come in multiples where they did before: planes are bytes


@dataclass(frozen=True)
class GroupChannels(Pass):
    """Before: layers at the width of their widest channel. After: at each channel's own.

        %q = Requantize(%acc, %m, %b)          of %acc = IntConv(%x, %w), channels of 2 and 4 bits
        =>
        %q.w2 = Requantize(%acc.w2, ...)       of IntConv(%x, %w.w2) {weight_bits=2}
        %q.w4 = Requantize(%acc.w4, ...)       of IntConv(%x, %w.w4) {weight_bits=4}
        %q.grouped = Concat(%q.w2, %q.w4)

    Layers that read the codes get their weights in the new order, which costs nothing; where
    something else reads them, a Gather puts them back. Channels of zeros whose constant code is
    the zero point of all readers are not computed at all, and fall out of the readers' weights.
    Neighbouring widths stay together where that is expected to be faster. Grouped convolutions
    stay whole.

    Attributes:
        cycles: what a layer is expected to take; None: split wherever widths differ.
    """

    name = "group-channels"

    cycles: Cycles | None = None

    def rewrite(self, graph: Graph) -> Graph:
        writer = _Writer(graph, self.cycles)
        for node in graph:
            if _candidate(graph, node):
                writer.layer(node)
        nodes = [made for node in graph for made in writer.nodes[node.name]]
        return graph.with_(nodes, constants=writer.constants, types=writer.types)


def part_of(node: Node) -> str:
    """The layer of the model that the node is, or is a part of."""
    return node.str_attr(PART) or node.name


def _candidate(graph: Graph, node: Node) -> bool:
    """A layer over channels in the last axis, with constant weights."""
    if not _product(node) or node.inputs[1] not in graph.constants:
        return False
    return node.str_attr("weight_levels") == "signed" and graph.shape(node.output)[-1] >= LEAST


def _product(node: Node) -> bool:
    if node.op == "IntMatMul":
        return True
    channels_last = node.op == "IntConv" and node.str_attr("layout") == "NHWC"
    return channels_last and node.int_attr("group", 1) == 1


def _axes(node: Node) -> tuple[int, int]:
    """Of output and input channels in the weights."""
    return (0, 1) if node.op == "IntConv" else (1, 0)


@dataclass(frozen=True)
class _Tail:
    """What turns a layer's sums into what others read.

    Attributes:
        node: Affine or Requantize; None: the sums themselves are read.
        value: that is read.
        readers: layers that can take the channels in any order, where all readers are such.
    """

    node: Node | None
    value: str
    readers: tuple[Node, ...] | None


@dataclass
class _Writer:
    graph: Graph
    cycles: Cycles | None
    nodes: dict[str, list[Node]] = field(init=False)
    constants: dict[str, Array] = field(default_factory=dict)
    types: dict[str, TensorType] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = {node.name: [node] for node in self.graph}

    def layer(self, original: Node) -> None:
        """Split one layer, if that is worth it."""
        (node,) = self.nodes[original.name]  # a layer before it may have changed its input
        tail = self._tail(original)
        weight = np.moveaxis(self._array(node.inputs[1]), _axes(node)[0], 0)
        widths = channel_widths(weight)
        if int(widths.max()) > node.int_attr("weight_bits"):
            return  # weights of other tools, beyond the codes of their width
        gone = self._gone(tail, widths)
        kept = np.flatnonzero(~gone)
        parts = self._parts(node, weight, widths, kept, tail)
        if len(parts) == 1 and not gone.any():
            return
        self._write(original, node, weight, widths, parts, tail)

    def _tail(self, node: Node) -> _Tail:
        graph, value = self.graph, node.output
        readers = graph.consumers(value)
        end: Node | None = None
        if value not in graph.outputs and len(readers) == 1:
            rank = len(graph.shape(value))
            if readers[0].op in ("Affine", "Requantize") and readers[0].int_attr(
                "axis", 1
            ) % rank == rank - 1:  # fmt: skip
                end = readers[0]
                value = end.output
        readers = graph.consumers(value)
        free = (
            end is not None
            and end.op == "Requantize"
            and value not in graph.outputs
            and bool(readers)
            and all(_product(r) and r.inputs.count(value) == 1 for r in readers)
            and all(r.inputs[0] == value and r.inputs[1] in graph.constants for r in readers)
        )
        return _Tail(end, value, readers if free else None)

    def _gone(self, tail: _Tail, widths: Array) -> Array:
        """Bool [O]: channels that tell their readers nothing."""
        gone = widths == 0
        if tail.readers is None or tail.node is None or not gone.any():
            return np.zeros_like(gone)
        end = tail.node
        zero = end.int_attr("zero_point")
        offset = np.broadcast_to(self._array(end.inputs[2]), widths.shape)
        high = end.int_attr("high", 2 ** end.int_attr("bits") - 1)
        codes = np.clip(np.rint(offset) + np.float32(zero), end.int_attr("low", 0), high)
        for reader in tail.readers:
            gone &= codes == reader.int_attr("zero_point", 0)
        left = len(widths) - int(gone.sum())
        step = WORD if len(widths) % WORD == 0 else 1
        back = max(-(-left // step) * step, 1) - left
        gone[np.flatnonzero(gone)[:back]] = False
        return np.asarray(gone, np.bool_)

    def _parts(
        self, node: Node, weight: Array, widths: Array, kept: Array, tail: _Tail
    ) -> list[Array]:
        """Channels of each part, by rising width: the cheapest of all ways to join neighbours."""
        used = widths[kept]
        # zeros that have to be computed: beside +-1 they would cost a bit more
        home = min({int(w) for w in used if w > 1} or {int(used.max())})
        used = np.where(used == 0, home, used)
        _, counts = np.unique(used, return_counts=True)
        bounds = [0, *np.cumsum(counts).tolist()]
        order = kept[np.argsort(used, kind="stable")]
        if self.cycles is None:
            return [np.sort(order[a:b]) for a, b in pairwise(bounds)]
        moved = self.graph.type(tail.value).nbytes
        best: list[tuple[float, list[int]]] = [(0.0, [])]
        for stop in range(1, len(bounds)):
            best.append(min(
                (best[start][0] + CALL
                 + self._time(node, weight, widths, order[bounds[start] : bounds[stop]]),
                 [*best[start][1], stop])
                for start in range(stop)
            ))  # fmt: skip
        whole = CALL + self._time(node, weight, widths, order)
        extra = moved * (JOINED if tail.readers is not None else JOINED + GATHERED)
        time, stops = best[-1]
        if len(stops) > 1 and time + extra > WORTH * whole:
            stops = [len(bounds) - 1]
        cuts = [0, *(bounds[stop] for stop in stops)]
        return [np.sort(order[a:b]) for a, b in pairwise(cuts)]

    def _time(self, node: Node, weight: Array, widths: Array, chosen: Array) -> float:
        """Of some of a layer's channels."""
        assert self.cycles is not None
        shape = (*self._shape(node.output)[:-1], len(chosen))
        bits, levels = stored_levels(widths[chosen])
        attrs = {**node.attrs, "weight_bits": bits, "weight_levels": levels}
        rows = np.moveaxis(weight[chosen], 0, _axes(node)[0])
        lone = Graph(
            {"codes": TensorType("uint8", self._shape(node.inputs[0]))},
            ["sums"],
            [Node(node.name, node.op, ("codes", "weights"), ("sums",), attrs)],
            {"weights": np.ascontiguousarray(rows)},
            {"sums": TensorType("int32", shape)},
        )
        return self.cycles(lone, lone[node.name])

    def _write(
        self,
        original: Node,
        node: Node,
        weight: Array,
        widths: Array,
        parts: Sequence[Array],
        tail: _Tail,
    ) -> None:
        made: list[Node] = []
        values = []
        for number, chosen in enumerate(parts):
            bits, levels = stored_levels(widths[chosen])
            suffix = f".part{number}" if len(parts) > 1 else ".kept"
            made += self._part(node, weight, chosen, bits, levels, suffix, tail)
            values.append(made[-1].output)
        order = np.concatenate(parts)
        kind = self.graph.type(tail.value)
        if len(parts) > 1:
            same = np.array_equal(order, np.arange(len(widths)))
            name = tail.value if same else fresh(self.graph, f"{tail.value}.grouped")
            self.types[name] = TensorType(kind.dtype, (*kind.shape[:-1], len(order)))
            axis: Mapping[str, Attribute] = {"axis": len(kind.shape) - 1}
            made.append(Node(f"{original.name}.concat", "Concat", tuple(values), (name,), axis))
        else:
            name = values[0]
        if name != tail.value and tail.readers is None:
            place = fresh(self.graph, f"{tail.value}.places")
            self.constants[place] = np.argsort(order).astype(np.int64)
            axis = {"axis": len(kind.shape) - 1}
            made.append(
                Node(f"{original.name}.gather", "Gather", (name, place), (tail.value,), axis)
            )
        elif name != tail.value:
            for reader in tail.readers or ():
                self._reorder(reader, name, order)
        self.nodes[original.name] = made
        if tail.node is not None:
            self.nodes[tail.node.name] = []

    def _part(
        self,
        node: Node,
        weight: Array,
        chosen: Array,
        bits: int,
        levels: str,
        suffix: str,
        tail: _Tail,
    ) -> list[Node]:
        graph = self.graph
        rows = np.moveaxis(weight[chosen], 0, _axes(node)[0])
        values = fresh(graph, f"{node.output}.w{suffix}")
        sums = fresh(graph, f"{node.output}{suffix}")
        self.constants[values] = np.ascontiguousarray(rows)
        self.types[sums] = TensorType("int32", (*graph.shape(node.output)[:-1], len(chosen)))
        attrs = {**node.attrs, "weight_bits": bits, "weight_levels": levels, PART: node.name}
        name = fresh(graph, f"{node.name}{suffix}")
        made = [Node(name, node.op, (node.inputs[0], values), (sums,), attrs)]
        if tail.node is None:
            return made
        end = tail.node
        vectors = []
        for what, value in zip(("m", "b"), end.inputs[1:], strict=True):
            vector, name = self._array(value), value
            if vector.size > 1:
                name = fresh(graph, f"{end.output}.{what}{suffix}")
                self.constants[name] = vector.reshape(-1)[chosen]
            vectors.append(name)
        result = fresh(graph, f"{end.output}{suffix}")
        kind = graph.type(end.output)
        self.types[result] = TensorType(kind.dtype, (*kind.shape[:-1], len(chosen)))
        name = fresh(graph, f"{end.name}{suffix}")
        return [*made, replace(end, name=name, inputs=(sums, *vectors), outputs=(result,))]

    def _reorder(self, reader: Node, value: str, order: Array) -> None:
        """Let a layer read the value's channels, those of its old input in a new order."""
        (node,) = self.nodes[reader.name]
        weight = np.take(self._array(node.inputs[1]), order, _axes(node)[1])
        name = fresh(self.graph, f"{node.output}.turned")
        self.constants[name] = np.ascontiguousarray(weight)
        self.nodes[reader.name] = [replace(node, inputs=(value, name))]

    def _array(self, name: str) -> Array:
        known = self.constants.get(name)
        return self.graph.constants[name] if known is None else known

    def _shape(self, value: str) -> tuple[int, ...]:
        known = self.types.get(value)
        return self.graph.shape(value) if known is None else known.shape
