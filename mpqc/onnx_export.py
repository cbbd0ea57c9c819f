"""Graph -> ONNX in standard operators: what is written computes exactly what the graph means.

ONNX Runtime's products of uint8 by int8 saturate on CPUs without VNNI, those of uint8 by uint8
are exact everywhere: so weights are written as uint8 with the zero point 128.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper, numpy_helper

from mpqc import numerics, pooling
from mpqc.errors import GraphError, ModelError
from mpqc.graph import QUANTIZED_OPS, Array, Attribute, Graph, Node
from mpqc.onnx_nodes import element_type, node_proto, split_op
from mpqc.reference import clip

MAX_MODEL_BYTES = 2**31 - 1


def to_onnx(graph: Graph, outputs: Sequence[str] | None = None) -> bytes:
    """Write any graph as an ONNX model.

    Args:
        graph: float operators are written as they are, quantized ones by exact standard ones.
        outputs: values to give instead of the graph's outputs.

    Raises:
        GraphError: an output that does not exist, or weights beyond 8 bits.
        ModelError: the model would exceed protobuf's 2 GB.
    """
    writer = _Writer(graph)
    names = list(graph.outputs if outputs is None else outputs)
    if strangers := [name for name in names if name not in graph.types]:
        raise GraphError(f"no value named {strangers[0]!r} in the graph")
    for node in graph:
        writer.write(node)
    return writer.model(names)


@dataclass
class _Writer:
    graph: Graph
    protos: list[Any] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    fixed: bool = False

    def __post_init__(self) -> None:
        self.taken = set(self.graph.types) | {node.name for node in self.graph}
        self.fixed = any(node.op in QUANTIZED_OPS for node in self.graph)

    def write(self, node: Node) -> None:
        if node.op in QUANTIZED_OPS:
            getattr(self, f"_{node.op.lower()}")(node)
        elif self.fixed and (found := pooling.windows(self.graph, node)) is not None:
            self._mean(node, found)
        else:
            self._keep(node.inputs)
            self.protos.append(node_proto(node))

    def model(self, outputs: Sequence[str]) -> bytes:
        self._keep(outputs)
        types = self.graph.types
        graph = helper.make_graph(
            self.protos,
            "mpqc",
            [_info(name, kind) for name, kind in self.graph.inputs.items()],
            [_info(name, types[name]) for name in outputs],
        )
        size = sum(array.nbytes for array in self.constants.values())
        if size > MAX_MODEL_BYTES:
            raise ModelError(f"the weights take {size} bytes, an ONNX file holds 2 GB")
        for name, array in self.constants.items():
            tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
            tensor.dims[:] = array.shape  # ascontiguousarray makes scalars vectors
            graph.initializer.append(tensor)
        domains = sorted({split_op(node.op)[0] for node in self.graph} - {""})
        opsets = [helper.make_opsetid("", self.graph.opset)]
        opsets += [helper.make_opsetid(domain, 1) for domain in domains]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="mpqc")
        model.ir_version = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
        return bytes(model.SerializeToString(deterministic=True))

    def _keep(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self.graph.constants:
                self.constants[name] = self.graph.constants[name]

    def _fresh(self, base: str) -> str:
        name, serial = base, 1
        while name in self.taken:
            name, serial = f"{base}_{serial}", serial + 1
        self.taken.add(name)
        return name

    def _constant(self, node: Node, what: str, value: npt.ArrayLike) -> str:
        name = self._fresh(f"{node.output}/{what}")
        self.constants[name] = np.asarray(value)
        return name

    def _op(
        self,
        node: Node,
        op: str,
        *inputs: str,
        out: str | None = None,
        attrs: Mapping[str, Attribute] | None = None,
    ) -> str:
        """Append one standard operator; the last of a node's takes its name and output."""
        self._keep(inputs)
        target = out or self._fresh(f"{node.output}/{op}")
        name = node.name if out == node.output else target
        self.protos.append(node_proto(Node(name, op, inputs, (target,), attrs or {})))
        return target

    def _cast(self, node: Node, value: str, dtype: str, out: str | None = None) -> str:
        return self._op(node, "Cast", value, out=out, attrs={"to": element_type(dtype)})

    def _quantize(self, node: Node) -> None:
        scale = self._constant(node, "scale", np.float32(node.float_attr("scale")))
        self._round_and_clip(node, self._op(node, "Div", node.inputs[0], scale))

    def _round_and_clip(self, node: Node, value: str) -> None:
        value = self._op(node, "Round", value)
        zero_point = np.float32(node.int_attr("zero_point"))
        value = self._op(node, "Add", value, self._constant(node, "zero_point", zero_point))
        low, high = (
            self._constant(node, what, np.float32(bound))
            for what, bound in zip(("low", "high"), clip(node), strict=True)
        )
        self._cast(node, self._op(node, "Clip", value, low, high), "uint8", node.output)

    def _dequantize(self, node: Node) -> None:
        zero_point = np.float32(node.int_attr("zero_point"))
        value = self._cast(node, node.inputs[0], "float32")
        value = self._op(node, "Sub", value, self._constant(node, "zero_point", zero_point))
        scale = self._constant(node, "scale", np.float32(node.float_attr("scale")))
        self._op(node, "Mul", value, scale, out=node.output)

    def _dequantizeweights(self, node: Node) -> None:
        values, scale = (self._array(node, name) for name in node.inputs)
        scale = numerics.along(scale, node.int_attr("axis", 0), values.ndim)
        small = not values.size or (values.min() >= -128 and values.max() <= 127)
        integers = self._constant(node, "w", values.astype(np.int8 if small else np.int16))
        wide = self._cast(node, integers, "float32")
        self._op(node, "Mul", wide, self._constant(node, "scale", scale), out=node.output)

    def _affine(self, node: Node) -> None:
        self._scale_and_shift(node, node.output)

    def _requantize(self, node: Node) -> None:
        self._round_and_clip(node, self._scale_and_shift(node, None))

    def _scale_and_shift(self, node: Node, out: str | None) -> str:
        acc = node.inputs[0]
        rank, axis = len(self.graph.shape(acc)), node.int_attr("axis", 1)
        m, b = (
            self._constant(node, what, numerics.along(self._array(node, name), axis, rank))
            for what, name in zip(("m", "b"), node.inputs[1:], strict=True)
        )
        product = self._op(node, "Mul", self._cast(node, acc, "float32"), m)
        return self._op(node, "Add", product, b, out=out)

    def _array(self, node: Node, name: str) -> Array:
        if name not in self.graph.constants:
            raise GraphError(f"{name!r} of {node.op} {node.name!r} is not a constant")
        return self.graph.constants[name]

    def _intconv(self, node: Node) -> None:
        kept = ("dilations", "group", "pads", "strides")
        attrs = {key: node.attrs[key] for key in kept if key in node.attrs}
        w = self._array(node, node.inputs[1])
        attrs["kernel_shape"] = w.shape[2:]
        groups = node.int_attr("group", 1)
        ones = np.ones((1 if groups == 1 else w.shape[0], *w.shape[1:]), np.uint8)
        self._integer_product(node, "ConvInteger", w, ones, attrs)

    def _intmatmul(self, node: Node) -> None:
        w = self._array(node, node.inputs[1])
        ones = np.ones((w.shape[0], 1), np.uint8)
        self._integer_product(node, "MatMulInteger", w, ones, {})

    def _integer_product(
        self, node: Node, op: str, w: Array, ones: Array, attrs: dict[str, Attribute]
    ) -> None:
        """Product with the integers w; 8-bit odd levels as ``w = 2 * (v - 128) + 1``."""
        wide = w.astype(np.int64)
        zero_point = self._constant(node, "zero_point", np.uint8(node.int_attr("zero_point")))
        low, high = int(wide.min(initial=0)), int(wide.max(initial=0))
        small = high - low <= 255  # codes of uint8 around some zero point
        zero = 128 if low >= -128 and high <= 127 else min(-low, 255) if small else 128
        middle = self._constant(node, "w_zero_point", np.uint8(zero))
        codes = wide + zero if small else (wide + 255) // 2
        if codes.size and (codes.min() < 0 or codes.max() > 255):
            raise GraphError(f"weights of {node.name!r} exceed 8 bits")
        weight = self._constant(node, "w", codes.astype(np.uint8))
        operands = (node.inputs[0], weight, zero_point, middle)
        if small:
            self._op(node, op, *operands, out=node.output, attrs=attrs)
            return
        if not np.array_equal(2 * codes - 255, wide):
            raise GraphError(f"weights of {node.name!r} exceed 8 bits and are not odd levels")
        half = self._op(node, op, *operands, attrs=attrs)
        none = self._constant(node, "no_zero_point", np.uint8(0))
        unit = self._constant(node, "ones", ones)
        total = self._op(node, op, node.inputs[0], unit, zero_point, none, attrs=attrs)
        two = self._constant(node, "two", np.int32(2))
        self._op(node, "Add", self._op(node, "Mul", half, two), total, out=node.output)

    def _mean(self, node: Node, found: pooling.Windows) -> None:
        """A mean in the tree order of ``numerics.tree_sum``, one Add per level or pair."""
        if found.whole:
            total = self._sum_of_last_axis(node, found)
        else:
            total = self._sum_of_windows(node, found)
        factor = (1 / found.count.astype(np.float64)).astype(np.float32)
        uniform = bool((factor == factor.flat[0]).all())
        shape = self.graph.shape(node.output)
        if uniform:
            factor = factor.reshape(-1)[:1].reshape(())
        scaled = self._op(node, "Mul", total, self._constant(node, "factor", factor))
        self._op(node, "Reshape", scaled, self._ints(node, "shape", shape), out=node.output)

    def _ints(self, node: Node, what: str, values: Sequence[int]) -> str:
        return self._constant(node, what, np.asarray(values, np.int64))

    def _slice(self, node: Node, value: str, start: int, end: int) -> str:
        bounds = [
            self._ints(node, what, [number])
            for what, number in (("start", start), ("end", end), ("axis", 2))
        ]
        return self._op(node, "Slice", value, *bounds)

    def _sum_of_last_axis(self, node: Node, found: pooling.Windows) -> str:
        source = node.inputs[0]
        n = int(np.prod(found.kernel))
        rows = (*self.graph.shape(source)[:2], n)
        x = self._op(node, "Reshape", source, self._ints(node, "rows", rows))
        while n > 1:
            half = (n + 1) // 2
            pair = (self._slice(node, x, 0, n - half), self._slice(node, x, half, n))
            total = self._op(node, "Add", *pair)
            if n % 2:
                rest = self._slice(node, x, n - half, half)
                total = self._op(node, "Concat", total, rest, attrs={"axis": 2})
            x, n = total, half
        return x

    def _sum_of_windows(self, node: Node, found: pooling.Windows) -> str:
        x = node.inputs[0]
        if any(found.begins) or any(found.ends):
            pads = (0, 0, *found.begins, 0, 0, *found.ends)
            x = self._op(node, "Pad", x, self._ints(node, "pads", pads))
        rank = len(found.kernel)
        axes = self._ints(node, "axes", range(2, 2 + rank))
        steps = self._ints(node, "steps", found.strides)
        terms = []
        for at in found.slices():
            starts = self._ints(node, "starts", [s.start for s in at])
            ends = self._ints(node, "ends", [s.stop for s in at])
            terms.append(self._op(node, "Slice", x, starts, ends, axes, steps))
        while (n := len(terms)) > 1:
            half = (n + 1) // 2
            pairs = zip(terms[: n - half], terms[half:], strict=True)
            terms = [self._op(node, "Add", a, b) for a, b in pairs] + terms[n - half : half]
        return terms[0]


def _info(name: str, kind: Any) -> Any:
    return helper.make_tensor_value_info(name, element_type(kind.dtype), kind.shape)
