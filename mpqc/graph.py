"""The IR: an immutable dataflow graph of typed tensors, valid by construction.

Float operators carry their ONNX names and attributes (at the opset ``Graph.opset``). Quantized
operators are few and exact; each computes plain integers or IEEE float32, nothing else:

``Quantize(x) {scale, zero_point, bits}``
    float32 -> uint8 codes, ``clip(rint(x / scale) + zero_point, 0, 2**bits - 1)``.
``Dequantize(q) {scale, zero_point}``
    uint8 codes -> float32, ``float32(q - zero_point) * scale``.
``IntConv(q, w) {zero_point, weight_bits, weight_levels, activation_bits, + Conv's attributes}``
    ``conv(q - zero_point, w)`` in int32, q uint8 codes NCHW or NCW, padded with the zero point;
    w int16 [O, I/groups, *kernel], the integers that the weight codes stand for.
``IntMatMul(q, w) {zero_point, weight_bits, weight_levels, activation_bits}``
    ``(q - zero_point) @ w`` in int32, q uint8 codes [..., K], w int16 [K, N].
``Affine(acc, m, b)``
    int32 -> float32, ``float32(acc) * m + b`` in two roundings; m, b float32 along the channels
    (axis 1 after IntConv, the last after IntMatMul: attribute ``axis``).
``Requantize(acc, m, b) {zero_point, bits, axis}``
    int32 -> uint8 codes, ``clip(rint(float32(acc) * m + b) + zero_point, 0, 2**bits - 1)``.
``DequantizeWeights(w, scale) {axis, bits, levels}``
    constants int16 of any shape -> float32, ``float32(w) * scale``, scale float32 along ``axis``
    or of one element. Only in fake-quantized graphs: those that other tools exchange.

``rint`` rounds half to even. ``weight_levels`` (``levels``) says which codes v stand for the
integers w:
``"signed"``: two's complement, w = v - 2**bits * (v >= 2**(bits-1));
``"odd"``: DoReFa's and bipolar levels, w = 2 * v - (2**bits - 1).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self, TypeAlias

import networkx as nx
import numpy as np

from mpqc.errors import GraphError
from mpqc.tensor_type import Array as Array
from mpqc.tensor_type import TensorType as TensorType

Attribute: TypeAlias = (
    int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...] | Array
)

QUANTIZED_OPS = frozenset(
    {
        *("Quantize", "Dequantize", "IntConv", "IntMatMul", "Affine", "Requantize"),
        "DequantizeWeights",
    }
)


@dataclass(frozen=True)
class Precision:
    """Bits of one layer's weights and of its input activations, each 1 to 8."""

    weight: int
    activation: int

    def __post_init__(self) -> None:
        if not (1 <= self.weight <= 8 and 1 <= self.activation <= 8):
            raise GraphError(f"bitwidths must be from 1 to 8, got w{self.weight}a{self.activation}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"w2a4"``."""
        match = re.fullmatch(r"w(\d+)a(\d+)", text.strip().lower())
        if not match:
            raise GraphError(f"not a bitwidth: {text!r}; write weights and activations as w2a4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"


@dataclass(frozen=True, eq=False)
class Node:
    """One operator. A pass replaces a node; nobody edits one.

    Attributes:
        name: unique; the ONNX node's own name where it had one, so that plans can name layers.
        op: ONNX operator type, with ``domain::`` in front outside the default domain, or one
            of the quantized operators above.
        inputs: values in operand order; ``""`` stands for an absent optional operand.
        outputs: values that the node defines; ``""`` for an output that nobody asked for.
        attrs: immutable.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    attrs: Mapping[str, Attribute] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attrs", MappingProxyType(dict(self.attrs)))

    def __reduce__(self) -> tuple[Any, ...]:  # a mappingproxy does not pickle
        return (Node, (self.name, self.op, self.inputs, self.outputs, dict(self.attrs)))

    @property
    def output(self) -> str:
        """The first output."""
        return self.outputs[0]

    def int_attr(self, name: str, default: int | None = None) -> int:
        """An integer attribute; without a default a missing one is a KeyError."""
        value = self.attrs.get(name, default)
        if value is None:
            raise KeyError(name)
        return int(value)  # type: ignore[arg-type]

    def float_attr(self, name: str) -> float:
        return float(self.attrs[name])  # type: ignore[arg-type]

    def ints_attr(self, name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        value = self.attrs.get(name, default)
        return tuple(int(v) for v in value)  # type: ignore[union-attr]

    def str_attr(self, name: str, default: str = "") -> str:
        return str(self.attrs.get(name, default))


class Graph:
    """An immutable DAG of nodes over named values. One that exists is valid.

    Args:
        inputs: name -> type of the values that a caller feeds, in order.
        outputs: names of the values that a caller gets, in order.
        nodes: in any order; kept in a topological order that depends on names alone.
        constants: name -> array (made read-only).
        types: name -> type of every value that a node defines.
        opset: ONNX opset that the float operators follow.

    Raises:
        GraphError: a value without a producer or with two, a cycle, a duplicate node name,
            an untyped value, an unknown output.
    """

    def __init__(
        self,
        inputs: Mapping[str, TensorType],
        outputs: Iterable[str],
        nodes: Iterable[Node],
        constants: Mapping[str, Array],
        types: Mapping[str, TensorType],
        opset: int = 21,
    ) -> None:
        self.inputs = MappingProxyType(dict(inputs))
        self.outputs = tuple(outputs)
        self.opset = opset
        nodes = tuple(nodes)
        used = {value for node in nodes for value in node.inputs} | set(self.outputs)
        self.constants = MappingProxyType(
            {name: _frozen(array) for name, array in constants.items() if name in used}
        )
        defined = [value for node in nodes for value in node.outputs if value]
        self._types = {
            **self.inputs,
            **{name: TensorType.of(array) for name, array in self.constants.items()},
            **{value: types[value] for value in defined if value in types},
        }
        self._dag: Any = nx.DiGraph()
        self._producer: dict[str, str] = {}
        for node in nodes:
            self._add(node)
        self._consumers: dict[str, list[str]] = {}
        for node in nodes:
            self._connect(node)
        for value in self.outputs:
            if value not in self._types:
                raise GraphError(f"graph output {value!r} has no producer")
        if not nx.is_directed_acyclic_graph(self._dag):
            raise GraphError(f"cycle through {nx.find_cycle(self._dag)[0][0]!r}")
        rank = {node.name: index for index, node in enumerate(nodes)}
        order = nx.lexicographical_topological_sort(self._dag, key=rank.__getitem__)
        self._order: tuple[str, ...] = tuple(order)

    def _add(self, node: Node) -> None:
        if node.name in self._dag:
            raise GraphError(f"two nodes named {node.name!r}")
        self._dag.add_node(node.name, node=node)
        for value in filter(None, node.outputs):
            if value in self._producer or value in self.inputs or value in self.constants:
                raise GraphError(f"value {value!r} is defined twice")
            if value not in self._types:
                raise GraphError(f"value {value!r} of node {node.name!r} has no type")
            self._producer[value] = node.name

    def _connect(self, node: Node) -> None:
        for value in filter(None, node.inputs):
            if value not in self._types:
                raise GraphError(f"input {value!r} of node {node.name!r} has no producer")
            users = self._consumers.setdefault(value, [])
            if node.name not in users:
                users.append(node.name)
            if value in self._producer:
                self._dag.add_edge(self._producer[value], node.name)

    def __reduce__(self) -> tuple[Any, ...]:  # a mappingproxy does not pickle
        parts = (dict(self.inputs), self.outputs, tuple(self), dict(self.constants))
        return (Graph, (*parts, dict(self._types), self.opset))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Graph":
        return self  # nobody can change it

    def __getitem__(self, name: str) -> Node:
        node: Node = self._dag.nodes[name]["node"]
        return node

    def __contains__(self, name: str) -> bool:
        return name in self._dag

    def __iter__(self) -> Iterator[Node]:
        """Nodes in topological order; ties keep the order in which they were given."""
        return (self[name] for name in self._order)

    def __len__(self) -> int:
        return len(self._order)

    def type(self, value: str) -> TensorType:
        """Type of any value: input, constant or a node's output."""
        return self._types[value]

    def shape(self, value: str) -> tuple[int, ...]:
        return self._types[value].shape

    @property
    def types(self) -> Mapping[str, TensorType]:
        return MappingProxyType(self._types)

    def producer(self, value: str) -> Node | None:
        """The node that defines the value; None for inputs and constants."""
        name = self._producer.get(value)
        return None if name is None else self[name]

    def consumers(self, value: str) -> tuple[Node, ...]:
        """Nodes that read the value, in topological order of definition."""
        return tuple(self[name] for name in self._consumers.get(value, ()))

    def with_(
        self,
        nodes: Iterable[Node] | None = None,
        *,
        constants: Mapping[str, Array] | None = None,
        types: Mapping[str, TensorType] | None = None,
        outputs: Iterable[str] | None = None,
        inputs: Mapping[str, TensorType] | None = None,
    ) -> "Graph":
        """A new graph: given nodes, outputs and inputs replace, constants and types are added."""
        return Graph(
            self.inputs if inputs is None else inputs,
            self.outputs if outputs is None else outputs,
            tuple(self) if nodes is None else nodes,
            {**self.constants, **(constants or {})},
            {**self._types, **(types or {})},
            self.opset,
        )

    def __str__(self) -> str:
        """Text form, one node a line; ``parse`` reads it back (constants by value if tiny)."""
        lines = [f"%{name} = Input() : {kind}" for name, kind in self.inputs.items()]
        lines += [_constant_line(name, array) for name, array in self.constants.items()]
        lines += [self._node_line(node) for node in self]
        lines.append(f"return {', '.join('%' + value for value in self.outputs)}")
        return "\n".join(lines)

    def _node_line(self, node: Node) -> str:
        targets = ", ".join(f"%{value}" for value in node.outputs)
        operands = ", ".join(f"%{value}" if value else "_" for value in node.inputs)
        attrs = ", ".join(f"{key}={_show(value)}" for key, value in sorted(node.attrs.items()))
        kinds = ", ".join(str(self._types[value]) for value in node.outputs if value)
        name = "" if node.outputs and node.name == node.output else f" @{node.name}"
        braces = f" {{{attrs}}}" if attrs else ""
        return f"{targets} = {node.op}({operands}){braces} : {kinds}{name}"

    @classmethod
    def parse(cls, text: str, constants: Mapping[str, Array] | None = None) -> "Graph":
        """Read the text form; for tests.

        A constant is written ``%w = Constant() : f32[2,3]``, its values in ``constants``, or
        drawn from a generator seeded with its name; tiny ones inline: ``{value=[1.0, 2.0]}``.
        """
        from mpqc.graph_text import parse_graph  # the reader serves tests only

        return parse_graph(text, constants or {})


def _frozen(array: Array) -> Array:
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def _constant_line(name: str, array: Array) -> str:
    value = f" {{value={_show(array)}}}" if array.size <= 8 and array.dtype != object else ""
    return f"%{name} = Constant(){value} : {TensorType.of(array)}"


def _show(value: Attribute) -> str:
    if isinstance(value, np.ndarray):
        return "[" + ", ".join(_show(v.item()) for v in value.reshape(-1)) + "]"
    if isinstance(value, tuple):
        return "[" + ", ".join(_show(v) for v in value) + "]"
    if isinstance(value, str):
        return f'"{value}"'
    return repr(value)
