"""ONNX file -> Graph: shapes static, shape arithmetic and constants folded, names kept."""

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter

from mpqc import contrib_types
from mpqc.errors import GraphError, ModelError
from mpqc.graph import Array, Attribute, Graph, Node, TensorType
from mpqc.onnx_files import read_model, read_tensor, sha256, tensors_of
from mpqc.onnx_nodes import (
    attribute_value,
    dtype_name,
    evaluate_proto,
    infer,
    join_op,
    refuse_element_type,
    tensor_type,
)
from mpqc.pooling import explicit_pads

__all__ = ["load", "sha256"]

OLDEST_OPSET = 7
BASE_OPSET = 13  # older models are upgraded to it
MAX_FOLDED_BYTES = 256 * 2**20
MAX_VALUE_BYTES = 4 * 2**30
MAX_TOTAL_BYTES = 64 * 2**30
MAX_NODES = 200_000
SMALL_TENSOR_BYTES = 1 << 16  # larger weights bypass the C++ parts of onnx

# Folding one of these would lose a number format, be random, or take long in numpy.
_NEVER_FOLDED = frozenset(
    {
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Bernoulli"),
        *("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"),
        *("Multinomial", "Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv"),
        *("MatMulInteger", "QLinearMatMul"),
        *("MaxPool", "AveragePool", "LpPool", "Resize", "Loop", "Scan", "LSTM", "GRU", "RNN"),
    }
)
_CODES = frozenset({"int8", "uint8", "int16", "uint16"})
_DATA_DEPENDENT = frozenset({"NonZero", "Unique", "Compress"})
# QONNX's quantizers keep the shape of what they quantize.
_SHAPE_KEEPING = frozenset({"Quant", "BipolarQuant", "Trunc", "IntQuant", "FloatQuant"})


def load(path: str | Path, dims: Mapping[str, int] | None = None, batch: int = 1) -> Graph:
    """Read an ONNX model into a graph with static shapes.

    Args:
        path: the .onnx file; weights kept outside it must lie in its folder.
        dims: extents of symbolic dimensions by their name in the model; an unnamed one is
            called ``input:axis``.
        batch: extent of axis 0 of inputs where the model leaves it open.

    Raises:
        ModelError: the file is damaged or hostile, a dimension is open, or operators cannot
            be typed (all of them are listed).
    """
    path = Path(path)
    model = read_model(path)
    opsets = _opsets(model, path)
    graph = model.graph
    if graph.sparse_initializer:
        raise ModelError(f"{path} has sparse initializers; save them dense")
    arrays = {tensor.name: read_tensor(tensor, path.parent) for tensor in graph.initializer}
    for tensor in tensors_of(graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.name not in arrays:
            raise ModelError(f"tensor {tensor.name} of an attribute keeps its values outside")
    inputs = _bind_inputs(graph, arrays, dict(dims or {}), batch)
    model, upgraded = _modernise(model, opsets, path)
    if model.graph.initializer:
        arrays |= {
            tensor.name: read_tensor(tensor, path.parent)
            for tensor in model.graph.initializer
            if tensor.name not in arrays
        }
    try:
        return _Folder(arrays, inputs, upgraded, model.graph).graph()
    except GraphError as error:
        raise ModelError(f"{path} is not a valid model: {error}; export it again") from error


def _opsets(model: Any, path: Path) -> dict[str, int]:
    opsets: dict[str, int] = {}
    for entry in model.opset_import:
        opsets["" if entry.domain == "ai.onnx" else entry.domain] = entry.version
    opset, newest = opsets.get(""), onnx.defs.onnx_opset_version()
    if opset is None:
        raise ModelError(f"{path} names no opset of the standard operators; export it again")
    if opset < OLDEST_OPSET:
        raise ModelError(
            f"{path} has opset {opset}; {OLDEST_OPSET} is the oldest that is read: "
            "export it with a newer one"
        )
    if opset > newest:
        raise ModelError(
            f"{path} has opset {opset}, the installed onnx knows up to {newest}; "
            "update onnx or export with an older opset"
        )
    return opsets


def _bind_inputs(
    graph: Any, arrays: Mapping[str, Array], dims: dict[str, int], batch: int
) -> dict[str, TensorType]:
    """Types of what a caller feeds; open dimensions bound, all that stay open in one error."""
    if batch < 1:
        raise ModelError(f"batch must be at least 1, got {batch}")
    if bad := sorted(name for name, extent in dims.items() if extent < 1):
        raise ModelError(f"dimensions must be at least 1: --dim {bad[0]}={dims[bad[0]]}")
    fed = [info for info in graph.input if info.name not in arrays]
    known: set[str] = set()
    batched = False
    bound: dict[str, int] = {}
    for info in fed:  # an open axis 0 is the batch wherever else its name occurs
        symbols = _symbols(info)
        known.update(symbol for symbol in symbols if symbol)
        if symbols and symbols[0]:
            bound.setdefault(symbols[0], batch)
            batched = True
    if strangers := sorted(dims.keys() - known):
        listed = ", ".join(sorted(known)) or "none"
        raise ModelError(f"no open dimension named {strangers[0]!r}; the model has: {listed}")
    if batch != 1 and not batched:
        raise ModelError(f"batch {batch} was asked for, but the model fixes its batch")
    bound |= dims
    if missing := sorted(known - bound.keys()):
        flags = " ".join(f"--dim {symbol}=VALUE" for symbol in missing)
        raise ModelError(f"the model leaves dimensions open: {', '.join(missing)}; give {flags}")
    types = {info.name: _input_type(info, bound) for info in fed}
    if len(types) != len(fed):
        raise ModelError("two inputs of the model have the same name; export it again")
    return types


def _symbols(info: Any) -> list[str]:
    """Per axis the name of an open dimension, "" for a fixed one."""
    kind = info.type
    if not kind.HasField("tensor_type"):
        raise ModelError(f"input {info.name} is not a tensor; such models cannot be compiled")
    if not kind.tensor_type.HasField("shape"):
        raise ModelError(f"input {info.name} has no shape; export the model with one")
    symbols = []
    for axis, dim in enumerate(kind.tensor_type.shape.dim):
        if dim.dim_value < -1:
            raise ModelError(
                f"input {info.name} has the negative dimension {dim.dim_value}; export it again"
            )
        fixed = dim.HasField("dim_value") and dim.dim_value > 0
        symbols.append("" if fixed else dim.dim_param or f"{info.name}:{axis}")
    return symbols


def _input_type(info: Any, bound: Mapping[str, int]) -> TensorType:
    dtype = dtype_name(info.type.tensor_type.elem_type)
    if dtype is None:
        raise ModelError(f"input {info.name} has an element type that cannot be compiled")
    extents = (
        bound[symbol] if symbol else dim.dim_value
        for symbol, dim in zip(_symbols(info), info.type.tensor_type.shape.dim, strict=True)
    )
    kind = TensorType(dtype, tuple(extents))
    if kind.nbytes > MAX_VALUE_BYTES:
        raise ModelError(f"input {info.name} : {kind} would take {kind.nbytes} bytes; too large")
    return kind


def _modernise(model: Any, opsets: dict[str, int], path: Path) -> tuple[Any, dict[str, int]]:
    """Inline the model's own functions and bring old standard operators to BASE_OPSET."""
    if not model.functions and opsets[""] >= BASE_OPSET:
        return model, opsets
    slim = _without_weights(model)
    try:
        if slim.functions:
            _refuse_recursion(slim)
            slim = onnx.inliner.inline_local_functions(slim)
        if opsets[""] < BASE_OPSET:
            slim = onnx.version_converter.convert_version(slim, BASE_OPSET)
    except ModelError:
        raise
    except Exception as error:  # C++ errors of many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path} (opset {opsets['']}) cannot be upgraded to opset {BASE_OPSET}: {reason}; "
            f"export it with opset {BASE_OPSET} or newer"
        ) from error
    return slim, {**opsets, "": max(opsets[""], BASE_OPSET)}


def _without_weights(model: Any) -> Any:
    """A copy whose large initializers are mere inputs, so that C++ need not copy them."""
    slim = onnx.ModelProto()
    slim.ir_version = max(model.ir_version, 4)
    slim.opset_import.extend(model.opset_import)
    named = {entry.domain for entry in model.opset_import} | {"", "ai.onnx"}
    for domain in sorted({node.domain for node in model.graph.node} - named):
        slim.opset_import.append(onnx.helper.make_opsetid(domain, 1))  # QONNX often forgets it
    slim.functions.extend(model.functions)
    slim.graph.name = model.graph.name
    slim.graph.node.extend(model.graph.node)
    slim.graph.input.extend(model.graph.input)
    slim.graph.output.extend(model.graph.output)
    slim.graph.value_info.extend(model.graph.value_info)
    declared = {info.name for info in model.graph.input}
    for tensor in model.graph.initializer:
        outside = tensor.data_location == onnx.TensorProto.EXTERNAL
        if not outside and tensor.ByteSize() <= SMALL_TENSOR_BYTES:
            slim.graph.initializer.append(tensor)
        elif tensor.name not in declared:
            slim.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return slim


def _refuse_recursion(model: Any) -> None:
    calls = {
        (function.domain, function.name): {(n.domain, n.op_type) for n in function.node}
        for function in model.functions
    }
    done: set[tuple[str, str]] = set()
    while ready := {f for f in calls.keys() - done if not (calls[f] & calls.keys()) - done}:
        done |= ready
    if loop := calls.keys() - done:
        raise ModelError(f"function {min(loop)[1]} of the model calls itself; export it again")


@dataclass
class _Folder:
    """One walk over the nodes in dataflow order. Every value is a constant or has a type.

    With static inputs a ``Shape`` is a constant as soon as it is met, and so is what is
    computed from it: one walk reaches the fixpoint of inference and folding.
    """

    constants: dict[str, Array]
    inputs: dict[str, TensorType]
    opsets: dict[str, int]
    source: Any
    types: dict[str, TensorType] = field(default_factory=dict)
    alias: dict[str, str] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    declared: dict[str, TensorType] = field(default_factory=dict)
    total: int = 0

    def graph(self) -> Graph:
        self.types |= self.inputs
        for name, array in self.constants.items():
            self._define(name, TensorType.of(array), f"initializer {name}")
        for info in (*self.source.value_info, *self.source.output):
            if (kind := tensor_type(info.type)) is not None:
                self.declared[info.name] = kind
        self._walk(self.source)
        if self.problems:
            listed = "\n  ".join(self.problems)
            raise ModelError(f"{len(self.problems)} nodes cannot be compiled:\n  {listed}")
        return self._finish()

    def _walk(self, graph: Any) -> None:
        for proto in _ordered(graph, self.types.keys() | self.alias.keys() | self.lost):
            if any(name in self.lost for name in proto.input):
                self.lost.update(filter(None, proto.output))
                continue
            try:
                self._visit(proto)
            except ModelError as error:
                label = f" {proto.name}" if proto.name else ""
                self.problems.append(f"{join_op(proto.domain, proto.op_type)}{label}: {error}")
                self.lost.update(filter(None, proto.output))

    def _visit(self, original: Any) -> None:
        proto = onnx.NodeProto()
        proto.CopyFrom(original)
        proto.input[:] = [self.alias.get(name, name) for name in original.input]
        if not any(proto.output):
            return
        op = join_op(proto.domain, proto.op_type)
        if op == "If":
            self._inline_if(proto)
        elif self._is_noop(proto, op):
            self.alias[proto.output[0]] = proto.input[0]
        else:
            self._add(proto, op)

    def _is_noop(self, proto: Any, op: str) -> bool:
        if op == "Identity":
            return True
        if op == "Cast":
            to = next((a.i for a in proto.attribute if a.name == "to"), 0)
            return dtype_name(to) == self.types[proto.input[0]].dtype
        if op != "Dropout" or any(proto.output[1:]):
            return False
        training = proto.input[2] if len(proto.input) > 2 else ""
        if training and (training not in self.constants or self.constants[training].any()):
            raise ModelError("is in training mode; export the model in inference mode")
        return True

    def _inline_if(self, proto: Any) -> None:
        condition = self.constants.get(proto.input[0])
        if condition is None or condition.size != 1:
            raise ModelError("its condition depends on data; export without control flow")
        wanted = "then_branch" if bool(condition.reshape(())) else "else_branch"
        branch = next((a.g for a in proto.attribute if a.name == wanted), None)
        if branch is None or len(branch.output) != len(proto.output):
            raise ModelError(f"has no usable {wanted}; export the model again")
        inner = _renamed(branch, f"{proto.output[0]}/")
        for tensor in inner.initializer:
            array = read_tensor(tensor, Path())
            self.constants[tensor.name] = array
            self._define(tensor.name, TensorType.of(array), tensor.name)
        self._walk(inner)
        for target, value in zip(proto.output, inner.output, strict=True):
            if value.name in self.lost:
                self.lost.add(target)
            elif target:
                self.alias[target] = self.alias.get(value.name, value.name)

    def _add(self, proto: Any, op: str) -> None:
        attrs = {a.name: _attribute(a) for a in proto.attribute}
        if op == "BatchNormalization" and attrs.get("training_mode", 0):
            raise ModelError("is in training mode; export the model in inference mode")
        outputs = [name for name in proto.output if name]
        kinds = self._infer(proto, op)
        if self._foldable(proto, op, kinds):
            operands = [self.constants[name] if name else None for name in proto.input]
            for name, array in zip(
                outputs, evaluate_proto(proto, operands, self.opsets[""]), strict=True
            ):
                self.constants[name] = array
                self._define(name, TensorType.of(array), name)
            return
        if open_ := [name for name in outputs if kinds.get(name) is None]:
            raise ModelError(f"the shape or type of its output {open_[0]} cannot be inferred")
        for name in outputs:
            kind = kinds[name]
            assert kind is not None
            self._define(name, kind, name)
        node = Node(proto.name, op, tuple(proto.input), tuple(proto.output), attrs)
        self.nodes.append(self._explicit_padding(node) if "auto_pad" in attrs else node)

    def _explicit_padding(self, node: Node) -> Node:
        """Spell auto_pad as pads: with static shapes nobody need work it out again."""
        if node.op not in ("Conv", "MaxPool", "AveragePool"):
            return node
        spatial, out = self.types[node.inputs[0]].shape[2:], self.types[node.output].shape[2:]
        kernel = node.ints_attr("kernel_shape")
        if not kernel:
            kernel = self.types[node.inputs[1]].shape[2:]
        pads = explicit_pads(node, spatial, out, kernel)
        attrs = {key: value for key, value in node.attrs.items() if key != "auto_pad"}
        if node.str_attr("auto_pad").startswith("SAME"):
            attrs.pop("ceil_mode", None)  # SAME fixes the output's extent by itself
        return replace(node, attrs={**attrs, "pads": pads})

    def _infer(self, proto: Any, op: str) -> dict[str, TensorType | None]:
        outputs = [name for name in proto.output if name]
        custom = "::" in op
        if custom and proto.op_type in _SHAPE_KEEPING:
            if not proto.input or not proto.input[0]:
                raise ModelError(
                    f"{op} {proto.name!r} lacks its first operand; export the model again"
                )
            return dict.fromkeys(outputs, self.types[proto.input[0]])
        if proto.domain == contrib_types.DOMAIN:
            known = contrib_types.contrib_types(proto, self.types)
            if known is not None:
                return dict(known)
        if custom and proto.domain not in self.opsets:
            return {name: self.declared.get(name) for name in outputs}
        try:
            found = infer(proto, self.types, self.constants, self.opsets)
        except ModelError:
            if not custom:
                raise
            return {name: self.declared.get(name) for name in outputs}
        for name in outputs:
            if name in found:
                refuse_element_type(name, found[name])
        return {name: tensor_type(found[name]) if name in found else None for name in outputs}

    def _foldable(self, proto: Any, op: str, kinds: Mapping[str, TensorType | None]) -> bool:
        if "::" in op or op in _NEVER_FOLDED:
            return False
        if op == "Clip" and self.types[proto.input[0]].dtype in _CODES:
            return False  # it tells how many bits the codes have
        if op == "Shape":  # of anything: shapes are static
            return self._fold_shape(proto)
        if any(name and name not in self.constants for name in proto.input):
            return False
        known = [kind for kind in kinds.values() if kind is not None]
        if len(known) < len(kinds) and op not in _DATA_DEPENDENT:
            return False
        return sum(kind.nbytes for kind in known) <= MAX_FOLDED_BYTES

    def _fold_shape(self, proto: Any) -> bool:
        """Give the operand of a Shape a stand-in that has its shape and takes no memory."""
        name = proto.input[0]
        if name in self.constants:
            return True
        start, end = (
            next((a.i for a in proto.attribute if a.name == key), None) for key in ("start", "end")
        )
        shape = np.asarray(self.types[name].shape[start:end], np.int64)
        stand_in = f"{proto.output[0]}/shape"
        self.constants[stand_in] = shape
        self.types[stand_in] = TensorType.of(shape)
        del proto.attribute[:]
        proto.op_type = "Identity"
        proto.input[:] = [stand_in]
        return True

    def _define(self, name: str, kind: TensorType, what: str) -> None:
        if name in self.inputs or (name in self.types and name not in self.constants):
            raise ModelError(f"value {name!r} is defined twice; export the model again")
        if kind.nbytes > MAX_VALUE_BYTES:
            raise ModelError(f"{what} : {kind} would take {kind.nbytes} bytes; too large")
        self.total += kind.nbytes
        if self.total > MAX_TOTAL_BYTES:
            raise ModelError(f"the model's values take over {MAX_TOTAL_BYTES} bytes; too large")
        self.types[name] = kind

    def _finish(self) -> Graph:
        outputs = [info.name for info in self.source.output]
        self._restore_output_names(outputs)
        nodes = _unique_names(self.nodes)
        return Graph(self.inputs, outputs, nodes, self.constants, self.types, opset=self.opsets[""])

    def _restore_output_names(self, outputs: list[str]) -> None:
        """An output that a removed Identity fed takes over the name of what fed it."""
        produced = {value for node in self.nodes for value in node.outputs}
        rename: dict[str, str] = {}
        for name in outputs:
            source = self.alias.get(name, name)
            if source not in self.types:
                raise ModelError(f"output {name!r} is produced by nothing; export the model again")
            if source == name:
                continue
            self.types[name] = self.types[source]
            if source in self.constants:
                self.constants[name] = self.constants[source]
            elif source in produced and source not in outputs and source not in rename:
                rename[source] = name
            else:
                self.nodes.append(Node("", "Identity", (source,), (name,)))
        self.nodes = [
            Node(
                node.name,
                node.op,
                tuple(rename.get(value, value) for value in node.inputs),
                tuple(rename.get(value, value) for value in node.outputs),
                node.attrs,
            )
            for node in self.nodes
        ]


def _attribute(attribute: Any) -> Attribute:
    if attribute.HasField("t"):
        return read_tensor(attribute.t, Path())
    return attribute_value(attribute)


def _ordered(graph: Any, available: set[str]) -> list[Any]:
    """Nodes so that each follows its producers, as far as possible in the file's order."""
    protos = list(graph.node)
    if len(protos) > MAX_NODES:
        raise ModelError(f"the model has {len(protos)} nodes, at most {MAX_NODES} are compiled")
    producer: dict[str, int] = {}
    for index, proto in enumerate(protos):
        for name in filter(None, proto.output):
            if name in producer:
                raise ModelError(f"value {name!r} is defined twice; export the model again")
            producer[name] = index
    needs = [_reads(proto) - {""} for proto in protos]
    for proto, names in zip(protos, needs, strict=True):
        for name in sorted(names):
            if name not in producer and name not in available and name in proto.input:
                raise ModelError(
                    f"input {name!r} of {proto.op_type} {proto.name or ''} has no producer; "
                    "export the model again"
                )
    waiting = [len({producer[name] for name in names if name in producer}) for names in needs]
    users: dict[int, list[int]] = {}
    for index, names in enumerate(needs):
        for source in {producer[name] for name in names if name in producer}:
            users.setdefault(source, []).append(index)
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(protos[index])
        for user in users.get(index, ()):
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(ready, user)
    if len(order) < len(protos):
        stuck = next(p for p, count in zip(protos, waiting, strict=True) if count)
        raise ModelError(
            f"the model has a cycle through {stuck.op_type} {stuck.name or stuck.output[0]!r}; "
            "export it again"
        )
    return order


def _reads(proto: Any) -> set[str]:
    """Values that a node reads, those that its subgraphs capture too."""
    names = set(proto.input)
    for attribute in proto.attribute:
        if attribute.HasField("g"):
            inner = attribute.g
            local = {name for node in inner.node for name in node.output}
            local |= {tensor.name for tensor in inner.initializer}
            local |= {info.name for info in inner.input}
            for node in inner.node:
                names |= _reads(node) - local
            names |= {info.name for info in inner.output} - local
    return names


def _renamed(graph: Any, prefix: str) -> Any:
    """A copy of a branch whose own values cannot collide with those outside."""
    inner = onnx.GraphProto()
    inner.CopyFrom(graph)
    local = {name for node in inner.node for name in node.output}
    local |= {tensor.name for tensor in inner.initializer}
    _rename(inner, {name: prefix + name for name in local if name})
    return inner


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    for thing in (*graph.initializer, *graph.output, *graph.value_info):
        thing.name = names.get(thing.name, thing.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names)


def _unique_names(nodes: list[Node]) -> list[Node]:
    """ONNX's own names where they tell nodes apart, else the first output's."""
    times = Counter(node.name for node in nodes)
    kept = {name for name, count in times.items() if name and count == 1}
    taken = set(kept)
    named = []
    for node in nodes:
        name = node.name
        if name not in kept:
            base = name = next(filter(None, node.outputs))
            serial = 1
            while name in taken:
                name, serial = f"{base}_{serial}", serial + 1
            taken.add(name)
        named.append(Node(name, node.op, node.inputs, node.outputs, node.attrs))
    return named
