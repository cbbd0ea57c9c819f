"""read-quantizers: the quantizers of other tools' models, in the few that the graph has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpqc.errors import ModelError
from mpqc.graph import Array, Graph, Node, TensorType
from mpqc.passes import read_qdq, read_qonnx, read_qoperator
from mpqc.passes.base import Pass
from mpqc.passes.drop_dead import DropDead
from mpqc.passes.moves import moves
from mpqc.passes.quantized_values import (
    INTEGER_BITS,
    MAX_FOLDED_ELEMENTS,
    Codes,
    Integers,
    Kept,
    Reader,
    container,
)
from mpqc.passes.widen_floats import WidenFloats

READERS: Mapping[str, Callable[[Reader, Node], None]] = {
    **read_qdq.READERS,
    **read_qoperator.READERS,
    **read_qonnx.READERS,
}

# Operands that a node must have, and how many it may have.
OPERANDS: Mapping[str, tuple[Sequence[int], int]] = {
    **read_qdq.OPERANDS,
    **read_qoperator.OPERANDS,
    **read_qonnx.OPERANDS,
}

_RANDOM = frozenset({"Bernoulli", "Multinomial", "RandomNormalLike", "RandomUniformLike"})


@dataclass(frozen=True)
class Reading:
    """A model's quantizers as they were read.

    Attributes:
        graph: fake-quantized: float operators, Quantize, Dequantize, DequantizeWeights, and
            integer products where the file had such.
        kept: nodes whose arithmetic stays float, and why.
    """

    graph: Graph
    kept: tuple[Kept, ...]


@dataclass(frozen=True)
class ReadQuantizers(Pass):
    """QDQ, QCDQ, QOperator and QONNX become one form of float operators between quantizers.

    ``%q = QuantizeLinear(%x, %s, %z)``        =>    ``%q = Quantize(%x) {scale, zero_point, bits}``
    ``%y = Quant(%x, %s, %z, %b)``             =>    ``%y = Dequantize(Quantize(%x))``
    ``%w = DequantizeLinear(%const, %s, %z)``  =>    ``%w = DequantizeWeights(%integers, %scale)``
    ``%y = QLinearConv(%x, %w, ...)``          =>    ``%y = Quantize(Conv(...))``
    """

    name = "read-quantizers"

    def rewrite(self, graph: Graph) -> Graph:
        return read_quantizers(graph).graph


def read_quantizers(graph: Graph) -> Reading:
    """Read the quantizers of a model, whatever tool wrote it.

    Args:
        graph: as the importer made it.

    Returns:
        The graph itself where it has none.

    Raises:
        ModelError: a quantizer whose arithmetic cannot be kept; names the node.
    """
    if not _is_quantized(graph):
        return Reading(graph, ())
    graph = WidenFloats()(graph)
    reader = Reader(graph)
    for node in graph:
        if node.name not in reader.absorbed:
            _read(reader, node)
    outputs = [_output(reader, name) for name in graph.outputs]
    inputs = {
        name: replace(kind, dtype=container(kind.dtype)) for name, kind in graph.inputs.items()
    }
    constants = {**_contained(graph.constants), **reader.constants}
    made = Graph(inputs, outputs, reader.nodes, constants, reader.types, graph.opset)
    made = DropDead().rewrite(made)
    alive = {node.name for node in graph}
    return Reading(made, tuple(kept for kept in reader.kept if kept.node in alive))


def _is_quantized(graph: Graph) -> bool:
    narrow = any(container(kind.dtype) != kind.dtype for kind in graph.types.values())
    return narrow or any(node.op in READERS for node in graph)


def _read(reader: Reader, node: Node) -> None:
    read = READERS.get(node.op)
    if read is not None:
        _check_operands(node)
        read(reader, node)
    elif not any(attempt(reader, node) for attempt in _ATTEMPTS):
        _keep(reader, node)


def _check_operands(node: Node) -> None:
    """Refuse a node that lacks an operand which its operator cannot do without."""
    needed, at_most = OPERANDS[node.op]
    missing = [i for i in needed if i >= len(node.inputs) or not node.inputs[i]]
    if missing:
        raise ModelError(
            f"{node.op} {node.name!r} lacks its operand {missing[0] + 1} of {max(needed) + 1}; "
            "export it again"
        )
    if len(node.inputs) > at_most:
        raise ModelError(
            f"{node.op} {node.name!r} has {len(node.inputs)} operands, {at_most} at most are "
            "read; export it again"
        )


def _moved(reader: Reader, node: Node) -> bool:
    """A node that only moves codes moves them in the graph's form."""
    if node.op == "Concat":
        return _joined(reader, node)
    if node.op == "Pad":
        return _padded(reader, node)
    if not moves(node) or not _is_narrow(reader, node.inputs[0]):
        return False
    given = reader.codes_of(node, node.inputs[0])
    outputs = []
    for name in node.outputs:
        made = reader.moved_codes(name, given)
        reader.codes[name] = made
        outputs.append(made.value)
        reader.types[made.value] = TensorType(_held(made), reader.shape(name))
    inputs = (given.value, *node.inputs[1:])
    reader.nodes.append(replace(node, inputs=inputs, outputs=tuple(outputs)))
    return True


def _is_narrow(reader: Reader, name: str) -> bool:
    """Codes, or a table of codes that is a constant."""
    known = reader.integers.get(name)
    return name in reader.codes or (known is not None and INTEGER_BITS[known.dtype] <= 8)


def _padded(reader: Reader, node: Node) -> bool:
    """A Pad of codes: the constant that it puts around is shifted as they are."""
    given = reader.codes.get(node.inputs[0])
    value_name = node.inputs[2] if len(node.inputs) > 2 else ""
    known = reader.integers.get(value_name)
    if given is None or (value_name and known is None):
        return False
    inputs = [given.value, *node.inputs[1:]]
    if node.str_attr("mode", "constant") == "constant":
        number = 0 if known is None else int(known.array.reshape(()))
        around = reader.constant(node, "around", np.asarray(number + given.shift, _held(given)))
        inputs[2:3] = [around]
    made = reader.moved_codes(node.output, given)
    reader.codes[node.output] = made
    reader.types[made.value] = TensorType(_held(made), reader.shape(node.output))
    reader.nodes.append(replace(node, inputs=tuple(inputs), outputs=(made.value,)))
    return True


def _held(codes: Codes) -> str:
    return "float32" if codes.exact else "uint8"


def _joined(reader: Reader, node: Node) -> bool:
    """A Concat of codes that all are shifted alike."""
    if not any(name in reader.codes for name in node.inputs):
        return False
    given = [reader.codes_of(node, name) for name in node.inputs]
    if len({(codes.shift, codes.exact) for codes in given}) > 1:
        return False
    made = reader.moved_codes(node.output, given[0])
    reader.codes[node.output] = made
    reader.types[made.value] = TensorType(_held(made), reader.shape(node.output))
    inputs = tuple(codes.value for codes in given)
    reader.nodes.append(replace(node, inputs=inputs, outputs=(made.value,)))
    return True


def _folded(reader: Reader, node: Node) -> bool:
    """Compute a node whose operands were read as constants."""
    given = [reader.array(name) if name else None for name in node.inputs]
    if not given or any(array is None for array, name in zip(given, node.inputs, strict=True)
                        if name):  # fmt: skip
        return False
    fresh = any(name in reader.constants or name in reader.weights or name in reader.integers
                for name in node.inputs)  # fmt: skip
    small = all(reader.source.type(name).elements <= MAX_FOLDED_ELEMENTS
                for name in node.outputs if name)  # fmt: skip
    if not fresh or not small or "::" in node.op or node.op in _RANDOM:
        return False
    from mpqc.onnx_nodes import evaluate

    if any(name in reader.weights for name in node.inputs):
        reader.keep_float(node, "its quantized weights pass through it: they are float")
    found = evaluate(node, given, reader.source.opset)
    for name, array in zip(filter(None, node.outputs), found, strict=True):
        _define(reader, node, name, array)
    return True


def _define(reader: Reader, node: Node, name: str, array: Array) -> None:
    dtype = reader.dtype(name)
    integers = [reader.integers.get(value) for value in node.inputs if value]
    kind = str(array.dtype)
    if container(dtype) in ("int8", "uint8", "int16", "uint16", "int32"):
        known = [found.bits for found in integers if found is not None and found.dtype == dtype]
        bits = max(known) if known else INTEGER_BITS[dtype]
        reader.integers[name] = Integers(array.astype("int64"), dtype, bits)
        return
    reader.define(node, name, array if kind == dtype else array.astype(dtype))


def _keep(reader: Reader, node: Node) -> None:
    """An operator of the file stays, on values in the file's own types."""
    _refuse(reader, node)
    inputs = tuple(reader.file_value(name) if name else "" for name in node.inputs)
    for name in filter(None, node.outputs):
        kind = reader.source.type(name)
        reader.types[name] = replace(kind, dtype=container(kind.dtype))
    reader.nodes.append(replace(node, inputs=inputs))


def _refuse(reader: Reader, node: Node) -> None:
    types = [reader.source.type(name).dtype for name in (*node.inputs, *node.outputs) if name]
    narrow = [dtype for dtype in types if container(dtype) != dtype]
    if narrow:
        raise ModelError(
            f"{node.op} {node.name!r} computes on {narrow[0]}, which is only for codes"
        )


def _output(reader: Reader, name: str) -> str:
    """The graph's output of the file's output: same name, the file's type."""
    found = reader.integers.get(name)
    if found is not None and name not in reader.source.constants:
        reader.constants[name] = found.array.astype(container(found.dtype))
        return name
    return reader.file_value(name)


def _contained(constants: Mapping[str, Array]) -> dict[str, Array]:
    return {
        name: array if container(str(array.dtype)) == str(array.dtype)
        else array.astype(container(str(array.dtype)))
        for name, array in constants.items()
    }  # fmt: skip


_ATTEMPTS = (read_qdq.clip, read_qdq.cast, Reader.move_weights, _folded, _moved)
