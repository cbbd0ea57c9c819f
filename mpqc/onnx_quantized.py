"""Fake-quantized graph -> ONNX in the dialects that other tools read: QDQ, QCDQ, QONNX.

What is written keeps the names of the model's layers and values. Operators are first converted to
the opset that the dialect's types need; quantizers pass through that step as placeholders of a
domain of their own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from mpqc.errors import ModelError
from mpqc.graph import Array, Graph, Node
from mpqc.numerics import along
from mpqc.onnx_export import to_onnx
from mpqc.onnx_nodes import join_op

Dialect: TypeAlias = Literal["qdq", "qcdq", "qonnx"]

QONNX_DOMAIN = "qonnx.custom_op.general"
_PLACEHOLDER = "mpqc.placeholder"
_QUANTIZERS = frozenset({"Quantize", "Dequantize", "DequantizeWeights"})

# Bits -> element type, and the first opset whose quantizers know it.
_UNSIGNED = {8: TensorProto.UINT8, 4: TensorProto.UINT4, 2: TensorProto.UINT2}
_SIGNED = {8: TensorProto.INT8, 4: TensorProto.INT4, 2: TensorProto.INT2}
_OPSETS = {8: 13, 4: 21, 2: 25}  # 13: a scale for each channel


def to_dialect(graph: Graph, dialect: Dialect) -> bytes:
    """Write a fake-quantized graph: float operators, Quantize, Dequantize, DequantizeWeights.

    Args:
        graph: as ``FakeQuantizeLayers`` makes it, or as the quantizers of a model were read.
        dialect: ``qdq`` uses the 4- and 2-bit types of ONNX, and what ``qcdq`` does for other
            widths: 8-bit types with a Clip that tells the width; ``qonnx`` has Quant nodes.

    Raises:
        ModelError: operators that cannot be brought to the opset of the types, a model beyond
            protobuf's 2 GB, or a quantizer that the dialect cannot express.
    """
    writer = _WRITERS[dialect](graph)
    model = onnx.load_from_string(to_onnx(_with_placeholders(graph)))
    model = _converted(model, writer.opset(graph.opset), dialect)
    nodes = [made for proto in model.graph.node for made in writer.nodes_for(proto)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _keep_initializers(model, writer)
    domains = [(o.domain, o.version) for o in model.opset_import if o.domain != _PLACEHOLDER]
    domains += [(writer.domain, 1)] if writer.domain else []
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*pair) for pair in domains)
    model.ir_version = max(
        model.ir_version,
        helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True),
    )
    tell_widths(model, layer_widths(graph))
    return bytes(model.SerializeToString(deterministic=True))


def to_integer(graph: Graph) -> bytes:
    """Write an integer graph in standard integer operators, its widths in the metadata."""
    model = onnx.load_from_string(to_onnx(graph))
    tell_widths(model, layer_widths(graph))
    return bytes(model.SerializeToString(deterministic=True))


def opset_of(model: bytes) -> int:
    """Version of the standard operators that a model uses."""
    opsets = onnx.load_from_string(model).opset_import
    return max(int(o.version) for o in opsets if o.domain in ("", "ai.onnx"))


def layer_widths(graph: Graph) -> dict[str, dict[str, int]]:
    """Node name -> widths, as far as the node has any: layers, and quantizers themselves."""
    found: dict[str, dict[str, int]] = {}
    for node in graph:
        if node.op in ("Quantize", "DequantizeWeights"):
            found[node.name] = {"bits": node.int_attr("bits")}
        elif node.op in ("IntConv", "IntMatMul"):
            found[node.name] = {
                "weight_bits": node.int_attr("weight_bits"),
                "activation_bits": node.int_attr("activation_bits"),
            }
        elif len(node.inputs) > 1:
            data, weight = map(graph.producer, node.inputs[:2])
            if weight is not None and weight.op == "DequantizeWeights":
                found[node.name] = {"weight_bits": weight.int_attr("bits")}
                source = graph.producer(data.inputs[0]) if data and data.inputs else None
                if data and data.op == "Dequantize" and source and source.op == "Quantize":
                    found[node.name]["activation_bits"] = source.int_attr("bits")
    return found


def tell_widths(model: Any, widths: Mapping[str, Mapping[str, int]]) -> None:
    """Widths into the nodes, where viewers show them: metadata, or the doc string before IR 10."""
    for proto in model.graph.node:
        for key, value in widths.get(proto.name, {}).items():
            if model.ir_version >= 10:
                proto.metadata_props.add(key=f"mpqc.{key}", value=str(value))
            else:
                proto.doc_string += f"{' ' if proto.doc_string else ''}mpqc.{key}={value}"


def _with_placeholders(graph: Graph) -> Graph:
    return graph.with_(
        replace(node, op=join_op(_PLACEHOLDER, node.op)) if node.op in _QUANTIZERS else node
        for node in graph
    )


def _converted(model: Any, opset: int, dialect: Dialect) -> Any:
    current = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if opset <= current:
        return model
    try:
        return version_converter.convert_version(model, opset)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        cure = "" if dialect != "qdq" else "; --format qcdq needs no more than opset 13"
        raise ModelError(
            f"the model's operators cannot be brought from opset {current} to {opset}, which "
            f"{dialect} with these widths needs: {str(error).splitlines()[0]}{cure}"
        ) from error


def _keep_initializers(model: Any, writer: "_Writer") -> None:
    used = {name for proto in model.graph.node for name in proto.input}
    used.update(value.name for value in model.graph.output)
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    kept += writer.tensors
    size = sum(tensor.ByteSize() for tensor in kept)
    if size > 2**31 - 1:
        raise ModelError(f"the weights take {size} bytes, an ONNX file holds 2 GB")
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


@dataclass
class _Writer:
    """Turns placeholders into a dialect's nodes."""

    graph: Graph
    tensors: list[Any] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    domain: str = ""

    def __post_init__(self) -> None:
        self.taken = set(self.graph.types) | {node.name for node in self.graph}

    def opset(self, current: int) -> int:
        """The opset that the dialect needs."""
        return max(current, 13)

    def nodes_for(self, proto: Any) -> Iterator[Any]:
        """The proto itself, or what replaces a placeholder."""
        if proto.domain != _PLACEHOLDER:
            yield proto
            return
        node = self.graph[proto.name]
        make: Mapping[str, Callable[[Node], Iterator[Any]]] = {
            "Quantize": self.quantize,
            "Dequantize": self.dequantize,
            "DequantizeWeights": self.weights,
        }
        yield from make[node.op](node)

    def quantize(self, node: Node) -> Iterator[Any]:
        raise NotImplementedError

    def dequantize(self, node: Node) -> Iterator[Any]:
        raise NotImplementedError

    def weights(self, node: Node) -> Iterator[Any]:
        raise NotImplementedError

    def fresh(self, base: str) -> str:
        name, serial = base, 1
        while name in self.taken:
            name, serial = f"{base}_{serial}", serial + 1
        self.taken.add(name)
        return name

    def tensor(self, node: Node, what: str, value: Any, kind: int) -> str:
        """Name of a new constant of an ONNX element type, sub-byte ones among them."""
        name, array = self.fresh(f"{node.output}/{what}"), np.asarray(value)
        if kind == TensorProto.FLOAT:
            made = numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name)
            made.dims[:] = array.shape
        else:
            dtype = helper.tensor_dtype_to_np_dtype(kind)
            made = numpy_helper.from_array(np.ascontiguousarray(array).astype(dtype), name)
            made.dims[:] = array.shape
        self.tensors.append(made)
        return name

    def constant(self, name: str) -> Array:
        return self.graph.constants[name]


def _bounds(node: Node) -> tuple[int, int]:
    return node.int_attr("low", 0), node.int_attr("high", 2 ** node.int_attr("bits") - 1)


class _Qdq(_Writer):
    """QuantizeLinear and DequantizeLinear; Clip where the type alone does not tell the width."""

    types: tuple[int, ...] = (8, 4, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kinds: dict[str, int] = {}  # codes -> element type

    def opset(self, current: int) -> int:
        needed = [_OPSETS[8]]
        for node in self.graph:
            if node.op == "Quantize":
                needed.append(_OPSETS[self._container(node)])
            elif node.op == "DequantizeWeights":
                needed.append(_OPSETS[self._weights_container(node)[0]])
        return max(current, *needed)

    def _container(self, node: Node) -> int:
        """Bits of the type that holds a Quantize's codes."""
        bits = node.int_attr("bits")
        full = _bounds(node) == (0, 2**bits - 1)
        return bits if full and bits in self.types else 8

    def quantize(self, node: Node) -> Iterator[Any]:
        held, (low, high) = self._container(node), _bounds(node)
        kind = self.kinds[node.output] = _UNSIGNED[held]
        scale = self.tensor(node, "scale", node.float_attr("scale"), TensorProto.FLOAT)
        zero = self.tensor(node, "zero_point", node.int_attr("zero_point"), kind)
        operands = [node.inputs[0], scale, zero]
        if (low, high) == (0, 2**held - 1):
            yield helper.make_node("QuantizeLinear", operands, [node.output], name=node.name)
            return
        codes = self.fresh(f"{node.output}/codes")
        limits = [self.tensor(node, *limit, kind) for limit in (("low", low), ("high", high))]
        yield helper.make_node("QuantizeLinear", operands, [codes], name=node.name)
        name = self.fresh(f"{node.name}/clip")
        yield helper.make_node("Clip", [codes, *limits], [node.output], name=name)

    def dequantize(self, node: Node) -> Iterator[Any]:
        kind = self.kinds.get(node.inputs[0], TensorProto.UINT8)
        scale = self.tensor(node, "scale", node.float_attr("scale"), TensorProto.FLOAT)
        zero = self.tensor(node, "zero_point", node.int_attr("zero_point"), kind)
        operands = [node.inputs[0], scale, zero]
        yield helper.make_node("DequantizeLinear", operands, [node.output], name=node.name)

    def weights(self, node: Node) -> Iterator[Any]:
        values, scale = map(self.constant, node.inputs)
        held, kind, zero_point = self._weights_container(node)
        codes = values.astype(np.int64) + zero_point
        source = self.tensor(node, "codes", codes, kind)
        bits = node.int_attr("bits")
        if held != bits and bits > 1:
            lowest = 0 if zero_point else -(2 ** (bits - 1))
            low, high = lowest, lowest + 2**bits - 1
            if low <= codes.min(initial=low) and codes.max(initial=high) <= high:
                limits = [
                    self.tensor(node, what, bound, kind)
                    for what, bound in (("low", low), ("high", high))
                ]
                clipped, name = self.fresh(f"{node.output}/clipped"), f"{node.name}/clip"
                yield helper.make_node("Clip", [source, *limits], [clipped], name=self.fresh(name))
                source = clipped
        per_channel = scale.size > 1
        operands = [source, self.tensor(node, "scale", scale.reshape(-1) if per_channel else
                                        scale.reshape(()), TensorProto.FLOAT)]  # fmt: skip
        if zero_point:
            zeros = np.full(scale.size, zero_point) if per_channel else np.int64(zero_point)
            operands.append(self.tensor(node, "zero_point", zeros, kind))
        attrs = {"axis": node.int_attr("axis")} if per_channel else {}
        yield helper.make_node("DequantizeLinear", operands, [node.output], name=node.name, **attrs)

    def _weights_container(self, node: Node) -> tuple[int, int, int]:
        """Bits, element type and zero point of the type that holds the integers."""
        values = self.constant(node.inputs[0])
        low, high = int(values.min(initial=0)), int(values.max(initial=0))
        bits = node.int_attr("bits")
        # INT2 holds the -1 and +1 of one bit; other widths without a type need Clip: 8 bits alone
        own = 2 if bits == 1 else bits
        for held in (own, 8) if own in self.types else (8,):
            half = 2 ** (held - 1)
            if -half <= low and high < half:
                return held, _SIGNED[held], 0
            if high - low < 2**held:
                return held, _UNSIGNED[held], min(max(-low, 0), 2**held - 1)
        raise ModelError(
            f"the weights of {node.name!r} reach from {low} to {high}: no 8-bit type holds them"
        )


class _Qcdq(_Qdq):
    """QDQ of 8-bit types alone: every other width is told by a Clip."""

    types = (8,)


class _Qonnx(_Writer):
    """Quant and BipolarQuant: rounding, width and scale in one node."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.domain = QONNX_DOMAIN

    def opset(self, current: int) -> int:
        return max(current, 11)  # Clip with inputs

    def quantize(self, node: Node) -> Iterator[Any]:
        """A pair of Quantize and Dequantize is one Quant, written at the second."""
        readers = self.graph.consumers(node.output)
        if any(reader.op != "Dequantize" for reader in readers) or node.output in (
            self.graph.outputs
        ):
            raise ModelError(
                f"QONNX has no codes: {node.output!r} is read by something else than a "
                "Dequantize; --format qdq can express it"
            )
        yield from ()

    def dequantize(self, node: Node) -> Iterator[Any]:
        made = self.graph.producer(node.inputs[0])
        if made is None or made.op != "Quantize":
            raise ModelError(f"QONNX has no codes, which {node.name!r} reads; --format qdq does")
        bits, zero_point = made.int_attr("bits"), made.int_attr("zero_point")
        alike = [made.float_attr("scale"), zero_point] == [
            node.float_attr("scale"), node.int_attr("zero_point")
        ]  # fmt: skip
        low, high = _bounds(made)
        if not alike and (bits, zero_point, low, high) == (1, 1, 0, 1):
            yield from self._sign(made, node)
            return
        if not alike:
            raise ModelError(
                f"{made.name!r} and {node.name!r} have different scales: QONNX cannot express "
                "that; --format qdq can"
            )
        half = 2 ** (bits - 1)
        signed = zero_point == half
        narrow = signed and (low, high) == (1, 2 * half - 1)
        target = node.output
        clipped = not narrow and (low, high) != (0, 2 * half - 1)
        if clipped:
            target = self.fresh(f"{node.output}/wide")
        zero = 0 if signed else zero_point
        yield self._quant(node, made.inputs[0], made.float_attr("scale"), zero, bits, target,
                          signed=signed, narrow=narrow)  # fmt: skip
        if clipped:
            scale = np.float32(node.float_attr("scale"))
            limits = [
                self.tensor(node, what, np.float32(bound - zero_point) * scale, TensorProto.FLOAT)
                for what, bound in (("low", low), ("high", high))
            ]
            name = self.fresh(f"{node.name}/clip")
            yield helper.make_node("Clip", [target, *limits], [node.output], name=name)

    def _sign(self, made: Node, node: Node) -> Iterator[Any]:
        """Codes of the sign: values 0 and ``scale``, as a BipolarQuant and its shift."""
        half = np.float32(node.float_attr("scale")) / np.float32(2)
        scale = self.tensor(node, "scale", half, TensorProto.FLOAT)
        sign = self.fresh(f"{node.output}/sign")
        yield helper.make_node(
            "BipolarQuant", [made.inputs[0], scale], [sign], name=node.name, domain=self.domain
        )
        name = self.fresh(f"{node.name}/shift")
        yield helper.make_node("Add", [sign, scale], [node.output], name=name)

    def weights(self, node: Node) -> Iterator[Any]:
        values, scale = map(self.constant, node.inputs)
        bits = node.int_attr("bits")
        scale = along(scale.reshape(-1), node.int_attr("axis"), values.ndim)
        source = self.tensor(node, "value", values * scale, TensorProto.FLOAT)
        if node.attrs.get("levels") == "odd" and bits == 1:
            operands = [source, self.tensor(node, "scale", scale, TensorProto.FLOAT)]
            yield helper.make_node(
                "BipolarQuant", operands, [node.output], name=node.name, domain=self.domain
            )
            return
        low, high = int(values.min(initial=0)), int(values.max(initial=0))
        width = next(
            (b for b in range(bits, 17) if -(2 ** (b - 1)) <= low and high < 2 ** (b - 1)), 16
        )
        zero = 0
        if width > bits and high - low < 2**bits:  # asymmetric: as unsigned codes
            width, zero = bits, min(max(-low, 0), 2**bits - 1)
        yield self._quant(node, source, scale, zero, width, node.output, signed=zero == 0)

    def _quant(
        self,
        node: Node,
        source: str,
        scale: Any,
        zero_point: int,
        bits: int,
        target: str,
        *,
        signed: bool,
        narrow: bool = False,
    ) -> Any:
        operands = [
            source,
            self.tensor(node, "scale", scale, TensorProto.FLOAT),
            self.tensor(node, "zero_point", zero_point, TensorProto.FLOAT),
            self.tensor(node, "bits", bits, TensorProto.FLOAT),
        ]
        return helper.make_node(
            "Quant",
            operands,
            [target],
            name=node.name,
            domain=self.domain,
            signed=int(signed),
            narrow=int(narrow),
            rounding_mode="ROUND",
        )


_WRITERS: Mapping[Dialect, type[_Writer]] = {"qdq": _Qdq, "qcdq": _Qcdq, "qonnx": _Qonnx}
