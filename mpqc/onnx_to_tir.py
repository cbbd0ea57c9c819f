"""Float ONNX operators to TIR kernels: the one door to TVM's ONNX frontend and its fusion passes.

``convert_region`` takes a convex list of float nodes and returns a ``Region``: kernels
(PrimFuncs, fused, not yet scheduled), the calls in order, constants, temporaries and aliases.
No call needs TVM at run time; what would is refused with ``PackedCallNeeded``.

Operators whose layout or summation order matters (convolution, pools, spatial means, products
with constant matrices) are our own tensor expressions (``float_compute``); the rest goes through
the frontend's per-operator converters. Those, and the Relax passes, are internals of TVM 0.27.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.relax.frontend.onnx import onnx_frontend

from mpqc import float_compute as compute
from mpqc.errors import MpqcError
from mpqc.float_compute import Window
from mpqc.float_math import expand_math
from mpqc.graph import Array, Graph, Node, TensorType

OPAQUE, OUT_FUSABLE, INJECTIVE = 8, 4, 2  # Relax's op_pattern kinds
SHORT_ROW = 240  # floats: TVM puts buffers from 1 KiB on the heap
ALIAS_OPS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})
# Converted by the frontend into calls of a runtime library, or into shapes known at run time.
PACKED_OPS = frozenset({
    "NonZero", "Unique", "Compress", "NonMaxSuppression", "AllClassNMS", "MaxUnpool",
    "Optional", "OptionalGetElement", "OptionalHasElement", "SequenceAt", "SequenceConstruct",
    "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SplitToSequence",
    "ConcatFromSequence", "DynamicQuantizeLinear", "Range",
})  # fmt: skip


class RegionError(MpqcError):
    """A float operator has no TVM conversion, or its conversion disagrees with the graph."""


class PackedCallNeeded(RegionError):  # noqa: N818 - says what is needed
    """A float operator would call the TVM runtime library, which artifacts do not carry."""


@dataclass(frozen=True)
class Call:
    """One kernel call: buffers in the order of the PrimFunc's parameters."""

    kernel: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Region:
    """Float nodes as kernels over named buffers.

    Values that cross the region's boundary keep their graph names. A kernel may see a buffer in
    another shape than its name's type (same bytes, same order): reshapes cost nothing.

    Attributes:
        kernels: name -> PrimFunc without ``global_symbol``; the name ends in a hash of the
            structure, so that equal kernels of different regions share it.
        calls: in execution order.
        temps: buffers that only this region uses.
        constants: arrays that the graph lacks (folded or packed), by fresh name; and any region
            output that is constant, by its own name.
        aliases: region output -> buffer that holds its bytes (a boundary input, a constant or
            another output).
        inputs: values that the calls and aliases read and the region does not define.
        outputs: values that the region defines and the rest of the graph uses.
    """

    kernels: dict[str, Any]
    calls: list[Call]
    temps: dict[str, TensorType]
    constants: dict[str, Array]
    aliases: dict[str, str]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


def supported(op: str, domain: str = "") -> bool:
    """Whether float nodes of this operator can be converted at all; some attributes cannot."""
    if domain not in ("", "ai.onnx") or op in PACKED_OPS:
        return False
    return op in OWN or op in _converters()


def supported_operators() -> tuple[str, ...]:
    """Names for which ``supported`` holds, sorted."""
    return tuple(sorted(op for op in {*OWN, *_converters()} if supported(op)))


def unsupported(nodes: Iterable[Node], graph: Graph | None = None) -> list[tuple[Node, str]]:
    """Every node that ``convert_region`` would refuse, with the reason.

    Args:
        nodes: float nodes.
        graph: when given, each distinct node is converted on its own, which also finds refused
            attributes and types.
    """
    refused = []
    seen: dict[Any, str] = {}
    for node in nodes:
        domain, _, op = node.op.rpartition("::")
        reason = _refusal(op, domain)
        if not reason and graph is not None:
            key = _signature(node, graph)
            if key not in seen:
                seen[key] = _trial(node, graph)
            reason = seen[key]
        if reason:
            refused.append((node, reason))
    return refused


def convert_region(
    nodes: Sequence[Node],
    graph: Graph,
    target: Any,
    *,
    vector_bits: int = 256,
    prefix: str = "",
) -> Region:
    """Convert float nodes, in topological order, to fused kernels.

    A Conv, MaxPool, AveragePool, GlobalAveragePool, GlobalMaxPool or ReduceMean node with the
    attribute ``layout="NHWC"`` has its data and result channels last in the graph's types.

    Args:
        nodes: convex in the graph, topologically ordered.
        graph: types every value.
        target: what ``tvm.target.Target`` takes, or a Target.
        vector_bits: width of the target's vector registers; shapes register tiles.
        prefix: of fresh temporary and constant names, to keep regions apart.

    Raises:
        PackedCallNeeded: an operator needs the TVM runtime; names the node.
        RegionError: an operator cannot be converted; names the node.
    """
    builder = _Builder(graph, vector_bits)
    boundary = _boundary(nodes, graph)
    module, outputs = builder.build(nodes, boundary)
    with _target(target):
        module = _simplify(module)
        _refuse_packed(module, nodes, graph)
        module = _fuse(module)
    return _Walk(builder, module, outputs, prefix).region(boundary)


@dataclass(frozen=True)
class _Boundary:
    inputs: tuple[str, ...]  # neither constants nor defined inside
    outputs: tuple[str, ...]


def _boundary(nodes: Sequence[Node], graph: Graph) -> _Boundary:
    names = {node.name for node in nodes}
    defined = dict.fromkeys(value for node in nodes for value in node.outputs if value)
    used = dict.fromkeys(value for node in nodes for value in node.inputs if value)
    outputs = [
        value
        for value in defined
        if value in graph.outputs or any(c.name not in names for c in graph.consumers(value))
    ]
    inputs = [v for v in used if v not in defined and v not in graph.constants]
    return _Boundary(tuple(inputs), tuple(outputs))


@dataclass
class _Builder:
    """Builds one Relax function from nodes; operators of ``OWN`` before the frontend's."""

    graph: Graph
    vector_bits: int
    bb: Any = field(default_factory=relax.BlockBuilder)
    env: dict[str, Any] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # address of a constant -> graph name
    keep: list[Any] = field(default_factory=list)  # keeps those addresses taken

    def build(self, nodes: Sequence[Node], boundary: _Boundary) -> tuple[Any, list[str]]:
        params = []
        for index, value in enumerate(boundary.inputs):
            kind = self.graph.type(value)
            params.append(relax.Var(f"p{index}", relax.TensorType(kind.shape, kind.dtype)))
            self.env[value] = params[-1]
        refused: MpqcError | None = None
        with self.bb.function("main", params):
            with self.bb.dataflow():
                try:
                    for node in nodes:
                        self._convert(node)
                    results = [self.env[value] for value in boundary.outputs]
                except MpqcError as error:  # a BlockBuilder left open complains on stderr
                    refused, results = error, []
                out = self.bb.emit_output(relax.Tuple(results))
            self.bb.emit_func_output(out)
        if refused is not None:
            raise refused
        return self.bb.get(), list(boundary.outputs)

    def value(self, name: str) -> Any:
        """The Relax expression of a value; constants enter on first use."""
        if name not in self.env:
            self.env[name] = self.constant(self.graph.constants[name], name)
        return self.env[name]

    def constant(self, array: Array, name: str = "") -> Any:
        # relax.const of a numpy array would narrow int64 and float64
        contiguous = np.ascontiguousarray(array).reshape(array.shape)
        const = relax.const(tvm.runtime.tensor(contiguous))
        self.keep.append(const)
        if name:
            self.names[const.value.data_ptr()] = name
        return const

    def array(self, name: str) -> Array | None:
        """The value of a constant, in the graph or computed by this builder."""
        if name in self.graph.constants:
            return self.graph.constants[name]
        expr = self.env.get(name)
        return expr.value.numpy() if isinstance(expr, tvm.ir.GenericConst) else None

    def accumulators(self) -> int:
        """Rows of a register tile that is one packed block wide: fits the registers.

        Wide-vector machines (AVX-512) and NEON have 32 registers, AVX2 has 16; the tile must
        also stay below 1 KiB, above which TVM allocates it on the heap.
        """
        return 6 if self.vector_bits == 256 else 14 if self.vector_bits >= 512 else 5

    def te(self, fn: Callable[..., Any], *args: Any, pattern: int, **options: Any) -> Any:
        """Emit a kernel of our own with a fixed fusion pattern."""
        return self.bb.emit_te(fn, *args, primfunc_attrs={"op_pattern": pattern}, **options)

    def _convert(self, node: Node) -> None:
        domain, _, op = node.op.rpartition("::")
        reason = _refusal(op, domain)
        if reason:
            kind = PackedCallNeeded if op in PACKED_OPS else RegionError
            raise kind(f"node {node.name!r}: {reason}")
        try:
            results = OWN[op](self, node) if op in OWN else None
            if results is None:
                results = self._frontend(node, op)
        except MpqcError:
            raise
        except Exception as error:
            last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise RegionError(
                f"node {node.name!r}: TVM cannot convert {node.op}: {last[0]}"
            ) from error
        for value, result in zip(node.outputs, results, strict=False):
            if value:
                self.env[value] = self._checked(node, value, result)

    def _frontend(self, node: Node, op: str) -> list[Any]:
        if node.str_attr("layout") == "NHWC":
            raise RegionError(
                f"node {node.name!r}: {op} has no channels-last form with these attributes;"
                " keep it channels first"
            )
        inputs = onnx_frontend.onnx_input(
            [self.value(name) if name else None for name in node.inputs]
        )
        attrs: dict[str, Any] = {key: _frontend_attr(v) for key, v in node.attrs.items()}
        attrs["tvm_custom"] = {"name": node.name, "num_outputs": len(node.outputs)}
        converter = _converters()[op].get_converter(self.graph.opset)
        result = converter(self.bb, inputs, attrs, [self.env, {}])
        result = self.bb.normalize(result) if isinstance(result, relax.Expr) else result
        if isinstance(result, relax.Tuple):
            return list(result.fields)
        if isinstance(result.ty, relax.TupleType):
            return [
                self.bb.emit(relax.TupleGetItem(result, i)) for i in range(len(result.ty.fields))
            ]
        return [result]

    def _checked(self, node: Node, value: str, expr: Any) -> Any:
        """The expression bound to a variable, of the very type that the graph says."""
        kind = self.graph.type(value)
        expr = self.bb.normalize(expr)
        if isinstance(expr.ty, relax.ShapeType):
            shape = [int(d) for d in expr.values]
            expr = self.constant(np.array(shape, np.int64))
        found = _static_type(expr.ty)
        if found is None:
            raise PackedCallNeeded(
                f"node {node.name!r}: the result of {node.op} has a shape known only at run time"
            )
        if found == kind:
            return expr if isinstance(expr, tvm.ir.GenericConst) else self.bb.emit(expr)
        if found.elements != kind.elements:
            raise RegionError(
                f"node {node.name!r}: TVM computes {found} where the graph says {kind}"
            )
        if found.dtype != kind.dtype:
            expr = self.bb.emit(relax.op.astype(expr, kind.dtype))
        return self.bb.emit(relax.op.reshape(expr, kind.shape))


# ---- operators of our own ------------------------------------------------------------------------
# Each takes (builder, node) and returns the node's results, or None to leave it to the frontend.


def _alias(b: _Builder, node: Node) -> list[Any] | None:
    if len([v for v in node.outputs if v]) > 1:
        return None  # Dropout with a mask
    data = b.value(node.inputs[0])
    shape = b.graph.shape(node.output)
    if isinstance(data, tvm.ir.GenericConst):
        return [b.constant(data.value.numpy().reshape(shape))]
    return [relax.op.reshape(data, shape)]


def _shape(b: _Builder, node: Node) -> list[Any]:
    dims = b.graph.shape(node.inputs[0])
    return [
        b.constant(np.array(dims, np.int64)[node.int_attr("start", 0) :][: node.attrs.get("end")])
    ]


def _size(b: _Builder, node: Node) -> list[Any]:
    return [b.constant(np.array(b.graph.type(node.inputs[0]).elements, np.int64))]


def _constant_of_shape(b: _Builder, node: Node) -> list[Any]:
    kind = b.graph.type(node.output)
    value = np.asarray(node.attrs.get("value", np.zeros(1, np.float32))).reshape(-1)[0]
    return [b.constant(np.full(kind.shape, value, kind.dtype))]


def _constant(b: _Builder, node: Node) -> list[Any]:
    kind = b.graph.type(node.output)
    value = next(iter(node.attrs.values()))
    return [b.constant(np.asarray(value, kind.dtype).reshape(kind.shape))]


def _split(b: _Builder, node: Node) -> list[Any]:
    """One slice per part: each fuses into its reader, which a kernel of many results cannot."""
    data = b.value(node.inputs[0])
    rank = len(b.graph.shape(node.inputs[0]))
    axis = node.int_attr("axis", 0) % rank
    parts, start = [], 0
    for value in node.outputs:
        if not value:
            raise RegionError(f"node {node.name!r}: Split with an unnamed output")
        end = start + b.graph.shape(value)[axis]
        parts.append(b.bb.emit(relax.op.strided_slice(data, [axis], [start], [end])))
        start = end
    return parts


def _slice(b: _Builder, node: Node) -> list[Any] | None:
    """A slice with constant bounds, by numpy's rules for out-of-range and negative ones."""
    bounds = [b.array(name) if name else None for name in node.inputs[1:5]]
    if any(name and found is None for name, found in zip(node.inputs[1:5], bounds, strict=True)):
        return None
    if len(bounds) < 2 or bounds[0] is None or bounds[1] is None:
        return None
    shape = b.graph.shape(node.inputs[0])
    starts, ends = bounds[0], bounds[1]
    axes = bounds[2] if len(bounds) > 2 and bounds[2] is not None else np.arange(len(starts))
    steps = bounds[3] if len(bounds) > 3 and bounds[3] is not None else np.ones(len(starts))
    first, stride = [0] * len(shape), [1] * len(shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis = int(axis) % len(shape)
        first[axis], _, stride[axis] = slice(int(start), int(end), int(step)).indices(shape[axis])
    return [b.te(
        compute.strided, b.value(node.inputs[0]), first, stride, b.graph.shape(node.output),
        pattern=INJECTIVE, primfunc_name_hint="slice",
    )]  # fmt: skip


def _cum_sum(b: _Builder, node: Node) -> list[Any] | None:
    axis = b.array(node.inputs[1])
    if axis is None:
        return None
    options = {key: bool(node.int_attr(key, 0)) for key in ("exclusive", "reverse")}
    along = int(axis.reshape(-1)[0]) % len(b.graph.shape(node.inputs[0]))
    return [b.te(
        lambda d: compute.cumulative_sum(d, along, **options),
        b.value(node.inputs[0]), pattern=OPAQUE, primfunc_name_hint="cumsum",
    )]  # fmt: skip


def _one_hot(b: _Builder, node: Node) -> list[Any] | None:
    values = b.array(node.inputs[2])
    if values is None:
        return None
    shape, kind = b.graph.shape(node.output), b.graph.type(node.output)
    axis = node.int_attr("axis", -1) % len(shape)
    off, on = values.reshape(-1).tolist()
    return [b.te(
        lambda d: compute.one_hot(d, axis, shape[axis], off, on, kind.dtype),
        b.value(node.inputs[0]), pattern=INJECTIVE, primfunc_name_hint="one_hot",
    )]  # fmt: skip


def _top_k(b: _Builder, node: Node) -> list[Any] | None:
    count = b.array(node.inputs[1]) if len(node.inputs) > 1 else None
    if count is None:
        return None
    shape, kind = b.graph.shape(node.inputs[0]), b.graph.type(node.inputs[0])
    axis = node.int_attr("axis", -1) % len(shape)
    data = b.value(node.inputs[0])
    rank = b.te(
        lambda d: compute.rank(d, axis, bool(node.int_attr("largest", 1))),
        data, pattern=OPAQUE, primfunc_name_hint="rank",
    )  # fmt: skip
    k = int(count.reshape(()))
    values = b.te(
        lambda d, r: compute.take_ranks(d, r, axis, k, kind.dtype),
        data, rank, pattern=OPAQUE, primfunc_name_hint="top_values",
    )  # fmt: skip
    indices = b.te(
        lambda r: compute.take_ranks(None, r, axis, k, "int64"),
        rank, pattern=OPAQUE, primfunc_name_hint="top_indices",
    )  # fmt: skip
    return [values, indices]


def _layout(node: Node) -> str:
    return node.str_attr("layout") or "NC"


def _spatial(shape: Sequence[int], layout: str) -> tuple[int, ...]:
    return tuple(shape[1:-1] if layout == "NHWC" else shape[2:])


def _window(b: _Builder, node: Node, kernel: Sequence[int]) -> Window:
    """Geometry from the attributes; the graph's types settle auto_pad and ceil_mode."""
    layout = _layout(node)
    rank = len(kernel)
    inputs = _spatial(b.graph.shape(node.inputs[0]), layout)
    output = _spatial(b.graph.shape(node.output), layout)
    ones = (1,) * rank
    strides = node.ints_attr("strides", ones)
    dilations = node.ints_attr("dilations", ones)
    pads = node.ints_attr("pads", (0,) * (2 * rank))
    before, after = pads[:rank], pads[rank:]
    auto = node.str_attr("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max(0, (o - 1) * s + (k - 1) * d + 1 - i)
            for o, s, k, d, i in zip(output, strides, kernel, dilations, inputs, strict=True)
        ]
        small = tuple(t // 2 for t in total)
        large = tuple(t - t // 2 for t in total)
        before, after = (small, large) if auto == "SAME_UPPER" else (large, small)
    elif auto == "VALID":
        before = after = (0,) * rank
    return Window(tuple(kernel), strides, dilations, before, after, output)


def _conv(b: _Builder, node: Node) -> list[Any] | None:
    weight = b.array(node.inputs[1])
    if weight is None or weight.dtype != np.float32 or weight.ndim not in (3, 4):
        return None
    layout, groups, outs = _layout(node), node.int_attr("group", 1), weight.shape[0]
    data = b.value(node.inputs[0])
    bias = b.value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    window = _window(b, node, weight.shape[2:])
    if groups == outs and weight.shape[1] == 1:
        if layout == "NC":  # vectors lie along the row, where a border would make them diverge
            data = _padded(b, data, window, 1, layout)
            window = replace(window, before=(0,) * len(window.kernel))
        taps = b.constant(np.moveaxis(weight[:, 0], 0, -1))
        return [b.te(
            lambda d, w, *c: compute.depthwise(d, w, c[0] if c else None, window, layout),
            data, taps, *([] if bias is None else [bias]),
            pattern=OUT_FUSABLE, primfunc_name_hint="depthwise",
        )]  # fmt: skip
    packed = b.constant(compute.pack_weights(weight, groups))
    rows = compute.register_rows(window.output[-1], b.accumulators())
    data = _padded(b, data, window, rows, layout)
    return [b.te(
        lambda d, w, *c: compute.convolution(
            d, w, c[0] if c else None, window, outs, groups, layout, rows
        ),
        data, packed, *([] if bias is None else [bias]),
        pattern=OUT_FUSABLE, primfunc_name_hint="conv",
    )]  # fmt: skip


def _padded(b: _Builder, data: Any, window: Window, rows: int, layout: str) -> Any:
    """Data with its border, wide enough for whole register tiles; itself where it is already."""
    shape = [int(d) for d in data.ty.shape]
    first = 1 if layout == "NHWC" else 2
    last = len(window.kernel) - 1
    before, padded = [0] * len(shape), list(shape)
    for axis in range(len(window.kernel)):
        out = window.output[axis]
        if axis == last:
            out = ceil(out / rows) * rows
        reach = (out - 1) * window.strides[axis] + (window.kernel[axis] - 1) * window.dilations[
            axis
        ]
        before[first + axis] = window.before[axis]
        padded[first + axis] = max(reach + 1, shape[first + axis] + window.before[axis])
    if padded == shape:
        return data
    return b.te(
        lambda d: compute.pad(d, before, padded, 0.0),
        data, pattern=INJECTIVE, primfunc_name_hint="pad",
    )  # fmt: skip


def _max_pool(b: _Builder, node: Node) -> list[Any] | None:
    if len(node.outputs) > 1 and node.outputs[1]:
        return None
    window = _window(b, node, node.ints_attr("kernel_shape"))
    return [b.te(
        lambda d: compute.max_pool(d, window, _layout(node)),
        b.value(node.inputs[0]), pattern=OUT_FUSABLE, primfunc_name_hint="max_pool",
    )]  # fmt: skip


def _average_pool(b: _Builder, node: Node) -> list[Any]:
    window = _window(b, node, node.ints_attr("kernel_shape"))
    include = bool(node.int_attr("count_include_pad", 0))
    return [b.te(
        lambda d: compute.average_pool(d, window, _layout(node), include),
        b.value(node.inputs[0]), pattern=OPAQUE, primfunc_name_hint="average_pool",
    )]  # fmt: skip


def _global_average_pool(b: _Builder, node: Node) -> list[Any]:
    return [_spatial_mean(b, node)]


def _global_max_pool(b: _Builder, node: Node) -> list[Any] | None:
    if _layout(node) != "NHWC":
        return None
    rank = len(b.graph.shape(node.inputs[0]))
    axes = list(range(1, rank - 1))
    return [relax.op.max(b.value(node.inputs[0]), axis=axes, keepdims=True)]


def _reduce_mean(b: _Builder, node: Node) -> list[Any] | None:
    """The mean over all spatial axes of [N, C, ...], or along rows; others are the frontend's."""
    rank = len(b.graph.shape(node.inputs[0]))
    spatial = list(range(rank))[1:-1] if _layout(node) == "NHWC" else list(range(rank))[2:]
    if rank >= 3 and _axes(b, node) == spatial:
        return [_spatial_mean(b, node)]
    return _row_total(b, node, mean=True)


def _reduce_sum(b: _Builder, node: Node) -> list[Any] | None:
    return _row_total(b, node, mean=False)


def _axes(b: _Builder, node: Node) -> list[int] | None:
    """Constant axes of a reduction, sorted; None where they are absent or not constant."""
    axes: Any = node.attrs.get("axes")
    if len(node.inputs) > 1 and node.inputs[1]:
        axes = b.array(node.inputs[1])
    if axes is None:
        return None
    rank = len(b.graph.shape(node.inputs[0]))
    return sorted(int(a) % rank for a in np.asarray(axes).reshape(-1))


def _is_float_row(b: _Builder, node: Node, axis: int) -> bool:
    kind = b.graph.type(node.inputs[0])
    return (
        kind.dtype == "float32"
        and bool(kind.shape)
        and axis % len(kind.shape) == len(kind.shape) - 1
    )


def _row_total(b: _Builder, node: Node, *, mean: bool) -> list[Any] | None:
    axes = _axes(b, node)
    if axes is None or len(axes) != 1 or not _is_float_row(b, node, axes[0]):
        return None
    total = b.te(
        compute.row_total, b.value(node.inputs[0]), mean,
        pattern=OPAQUE, primfunc_name_hint="row_mean" if mean else "row_sum",
    )  # fmt: skip
    return [relax.op.reshape(total, b.graph.shape(node.output))]


def _softmax(b: _Builder, node: Node) -> list[Any] | None:
    """Long rows in two kernels, whose intermediate results are planned with all other buffers."""
    default = -1 if b.graph.opset >= 13 else 1
    if not _is_float_row(b, node, node.int_attr("axis", default)):
        return None
    data = b.value(node.inputs[0])
    if b.graph.shape(node.inputs[0])[-1] <= SHORT_ROW:
        return [b.te(compute.softmax, data, pattern=OPAQUE, primfunc_name_hint="softmax")]
    parts = b.te(compute.softmax_terms, data, pattern=OPAQUE, primfunc_name_hint="softmax_terms")
    terms, total = (b.bb.emit(relax.TupleGetItem(parts, i)) for i in range(2))
    return [b.te(
        compute.divide_rows, terms, total, pattern=INJECTIVE, primfunc_name_hint="softmax"
    )]  # fmt: skip


def _layer_norm(b: _Builder, node: Node) -> list[Any] | None:
    if not _is_float_row(b, node, node.int_attr("axis", -1)) or any(node.outputs[1:]):
        return None
    row = b.graph.shape(node.inputs[0])[-1:]
    if any(b.graph.shape(name) != row for name in node.inputs[1:] if name):
        return None
    operands = [b.value(name) for name in node.inputs if name]
    epsilon = float(node.attrs.get("epsilon", 1e-5))  # type: ignore[arg-type]
    return [b.te(
        lambda d, g, *c: compute.layer_norm(d, g, c[0] if c else None, epsilon),
        *operands, pattern=OPAQUE, primfunc_name_hint="layer_norm",
    )]  # fmt: skip


def _spatial_mean(b: _Builder, node: Node) -> Any:
    """Levels of the pairwise tree as kernels, so that their buffers are planned; then reshape."""
    layout = _layout(node)
    shape = b.graph.shape(node.inputs[0])
    count = prod(_spatial(shape, layout))
    if layout == "NHWC":
        flat: tuple[int, ...] = (shape[0], count, shape[-1])
    else:
        flat = (shape[0] * shape[1], count)
    axis = 1
    data = b.bb.emit(relax.op.reshape(b.value(node.inputs[0]), flat))
    while int(data.ty.shape[axis]) > compute.TREE_LEAVES:
        data = b.te(compute.tree_halve, data, axis, pattern=OPAQUE, primfunc_name_hint="tree_halve")
    mean = b.te(
        compute.tree_finish, data, axis, count, pattern=OPAQUE, primfunc_name_hint="tree_mean"
    )
    return relax.op.reshape(mean, b.graph.shape(node.output))


def _matmul(b: _Builder, node: Node) -> list[Any] | None:
    weight = b.array(node.inputs[1])
    if weight is None:
        return None
    return _constant_product(b, node, weight, None)


def _gemm(b: _Builder, node: Node) -> list[Any] | None:
    weight = b.array(node.inputs[1])
    has_bias = len(node.inputs) > 2 and bool(node.inputs[2])
    bias = b.array(node.inputs[2]) if has_bias else None
    if weight is None or node.int_attr("transA", 0) or (has_bias and bias is None):
        return None
    if node.int_attr("transB", 0):
        weight = weight.T
    if bias is not None and bias.size not in (1, weight.shape[1]):
        return None
    alpha, beta = (float(node.attrs.get(k, 1.0)) for k in ("alpha", "beta"))  # type: ignore[arg-type]
    if alpha != 1.0:
        weight = weight * np.float32(alpha)
    if bias is not None:
        flat = np.broadcast_to(bias.reshape(-1), (weight.shape[1],))
        bias = flat if beta == 1.0 else flat * np.float32(beta)
    return _constant_product(b, node, weight, bias)


def _constant_product(
    b: _Builder, node: Node, weight: Array, bias: Array | None
) -> list[Any] | None:
    shape = b.graph.shape(node.inputs[0])
    if weight.ndim != 2 or weight.dtype != np.float32 or len(shape) < 2:
        return None
    data = b.value(node.inputs[0])
    outs, height = weight.shape[1], shape[-2]
    rows = compute.register_rows(height, b.accumulators())
    tall = ceil(height / rows) * rows
    if tall != height:
        padded = [*shape[:-2], tall, shape[-1]]
        data = b.te(
            lambda d: compute.pad(d, [0] * len(shape), padded, 0.0),
            data, pattern=INJECTIVE, primfunc_name_hint="pad",
        )  # fmt: skip
    packed = b.constant(compute.pack_weights(np.ascontiguousarray(weight.T), 1))
    extra = [] if bias is None else [b.constant(np.ascontiguousarray(bias))]
    return [b.te(
        lambda d, w, *c: compute.matmul(d, w, c[0] if c else None, outs, height, rows),
        data, packed, *extra, pattern=OUT_FUSABLE, primfunc_name_hint="matmul",
    )]  # fmt: skip


OWN: Mapping[str, Callable[[_Builder, Node], list[Any] | None]] = {
    **dict.fromkeys(ALIAS_OPS, _alias),
    "Shape": _shape,
    "Size": _size,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Split": _split,
    "Slice": _slice,
    "CumSum": _cum_sum,
    "OneHot": _one_hot,
    "TopK": _top_k,
    "Conv": _conv,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "ReduceMean": _reduce_mean,
    "ReduceSum": _reduce_sum,
    "Softmax": _softmax,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "Gemm": _gemm,
}


# ---- passes and the walk -------------------------------------------------------------------------


def _simplify(module: Any) -> Any:
    passes = relax.transform
    return tvm.transform.Sequential([
        passes.CanonicalizeBindings(), passes.DeadCodeElimination(["main"]),
        passes.LegalizeOps(), passes.FoldConstant(), passes.DeadCodeElimination(["main"]),
    ])(module)  # fmt: skip


def _fuse(module: Any) -> Any:
    passes = relax.transform
    return tvm.transform.Sequential([
        passes.RewriteDataflowReshape(), passes.AnnotateTIROpPattern(), passes.FuseOps(2),
        passes.FuseTIR(), passes.DeadCodeElimination(["main"]),
    ])(module)  # fmt: skip


def _bindings(module: Any) -> Iterable[Any]:
    for block in module["main"].body.blocks:
        yield from block.bindings


def _is_call_tir(value: Any) -> bool:
    return isinstance(value, relax.Call) and _op_name(value) == "relax.call_tir"


def _op_name(call: Any) -> str:
    return str(getattr(call.op, "name", call.op))


def _refuse_packed(module: Any, nodes: Sequence[Node], graph: Graph) -> None:
    for binding in _bindings(module):
        value = binding.value
        if isinstance(value, relax.Call) and not _is_call_tir(value):
            if len(nodes) > 1:
                for node in nodes:  # alone, the culprit names itself
                    reason = _trial(node, graph)
                    if reason:
                        raise PackedCallNeeded(reason)
            raise PackedCallNeeded(
                f"node {nodes[0].name!r}: {nodes[0].op} calls {_op_name(value)} of the TVM"
                " runtime, which a freestanding library does not carry"
            )


class _Walk:
    """Reads the fused Relax function into names."""

    def __init__(self, builder: _Builder, module: Any, outputs: list[str], prefix: str) -> None:
        self.builder, self.module, self.outputs, self.prefix = builder, module, outputs, prefix
        self.kernels: dict[str, Any] = {}
        self.constants: dict[str, Array] = {}
        self.temps: dict[str, TensorType] = {}
        self.calls: list[Call] = []
        self.root: dict[Any, str] = {}  # Relax variable -> buffer
        self.parts: dict[Any, list[str]] = {}  # Relax variable of a tuple -> buffers
        self.kernel_names: dict[str, str] = {}
        self.const_names: dict[int, str] = {}

    def region(self, boundary: _Boundary) -> Region:
        main = self.module["main"]
        for param, value in zip(main.params, boundary.inputs, strict=True):
            self.root[param] = value
        results: list[str] = []
        for binding in _bindings(self.module):
            value = binding.value
            if _is_call_tir(value):
                self._call(binding.var, value)
            elif isinstance(value, relax.Call):  # relax.reshape, after RewriteDataflowReshape
                self.root[binding.var] = self._buffer(value.args[0])
            elif isinstance(value, relax.TupleGetItem):
                self.root[binding.var] = self.parts[value.tuple_value][int(value.index)]
            elif isinstance(value, relax.Tuple):
                results = [self._buffer(item) for item in value.fields]
                self.parts[binding.var] = results
            elif value in self.parts:
                self.parts[binding.var] = self.parts[value]
            else:
                self.root[binding.var] = self._buffer(value)
        body = main.body.body
        if isinstance(body, relax.Tuple):
            results = [self._buffer(item) for item in body.fields]
        else:
            results = self.parts[body]
        return self._named(boundary, results)

    def _named(self, boundary: _Boundary, results: list[str]) -> Region:
        """Temporaries that are region outputs take the output's name, further ones are aliases."""
        rename: dict[str, str] = {}
        aliases: dict[str, str] = {}
        constants = dict(self.constants)
        for output, buffer in zip(self.outputs, results, strict=True):
            if buffer in self.temps and buffer not in rename:
                rename[buffer] = output
            else:
                aliases[output] = rename.get(buffer, buffer)

        def name(buffer: str) -> str:
            return rename.get(buffer, buffer)

        calls = [
            Call(c.kernel, tuple(map(name, c.inputs)), tuple(map(name, c.outputs)))
            for c in self.calls
        ]
        read = {v for c in calls for v in c.inputs} | set(aliases.values())
        made = {v for c in calls for v in c.outputs}
        return Region(
            kernels=self.kernels,
            calls=calls,
            temps={k: v for k, v in self.temps.items() if k not in rename},
            constants={k: v for k, v in constants.items() if k in read},
            aliases=aliases,
            inputs=tuple(sorted(read - made - set(constants))),
            outputs=tuple(self.outputs),
        )

    def _buffer(self, expr: Any) -> str:
        if isinstance(expr, tvm.ir.GenericConst):
            return self._constant(expr)
        return self.root[expr]

    def _constant(self, const: Any) -> str:
        address = const.value.data_ptr()
        if address in self.builder.names:
            return self.builder.names[address]
        if address not in self.const_names:
            name = f"{self.prefix}const{len(self.const_names)}"
            self.const_names[address] = name
            self.builder.keep.append(const)
            self.constants[name] = const.value.numpy()
        return self.const_names[address]

    def _call(self, var: Any, call: Any) -> None:
        kernel = self._kernel(call.args[0])
        if len(call.args) > 2:
            raise RegionError(f"kernel {kernel!r} takes a size that is known only at run time")
        inputs = tuple(self._buffer(arg) for arg in call.args[1].fields)
        kind = var.ty
        kinds = list(kind.fields) if isinstance(kind, relax.TupleType) else [kind]
        outputs = []
        for each in kinds:
            static = _static_type(each)
            if static is None:
                raise RegionError(f"kernel {kernel!r} has a result of unknown shape")
            name = f"{self.prefix}t{len(self.temps)}"
            self.temps[name] = static
            outputs.append(name)
        if isinstance(kind, relax.TupleType):
            self.parts[var] = outputs
        else:
            self.root[var] = outputs[0]
        self.calls.append(Call(kernel, inputs, tuple(outputs)))

    def _kernel(self, gvar: Any) -> str:
        hint = gvar.name_hint
        if hint in self.kernel_names:
            return self.kernel_names[hint]
        func = self.module[gvar]
        for attr in ("global_symbol", "op_pattern"):
            if func.attrs and attr in func.attrs:
                func = func.without_attr(attr)
        func = expand_math(func.with_attr("tirx.noalias", True))
        stem = hint.rstrip("0123456789_")
        name = f"{stem[:48]}_{tvm_ffi.structural_hash(func) & (2**48 - 1):012x}"
        while name in self.kernels and not tvm_ffi.structural_equal(self.kernels[name], func):
            name += "x"
        self.kernels[name] = func
        self.kernel_names[hint] = name
        return name


def _static_type(kind: Any) -> TensorType | None:
    if not isinstance(kind, relax.TensorType) or kind.shape is None:
        return None
    dims = list(kind.shape)
    if not all(isinstance(d, tirx.IntImm) for d in dims):
        return None
    return TensorType(str(kind.dtype), tuple(int(d) for d in dims))


def _converters() -> Any:
    return onnx_frontend._get_convert_map()


def _frontend_attr(value: Any) -> Any:
    """Attributes as protobuf would give them to the frontend: strings are bytes."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, tuple) and value and isinstance(value[0], str):
        return tuple(v.encode() for v in value)
    return value


def _refusal(op: str, domain: str) -> str:
    name = f"{domain}::{op}" if domain else op
    if domain not in ("", "ai.onnx"):
        return f"operator {name} is of a foreign domain and not quantized; replace it in the model"
    if op in PACKED_OPS:
        return f"{op} needs the TVM runtime, which a freestanding library does not carry"
    if not supported(op, domain):
        return f"operator {name} has no conversion; replace it in the model or cut it off"
    return ""


def _trial(node: Node, graph: Graph) -> str:
    """Why the node alone is refused; empty when it is not."""
    try:
        builder = _Builder(graph, 256)
        module, _ = builder.build([node], _boundary([node], graph))
        with _target({"kind": "llvm"}):
            _refuse_packed(_simplify(module), [node], graph)
    except MpqcError as error:
        return str(error)
    return ""


def _signature(node: Node, graph: Graph) -> Any:
    kinds = tuple(str(graph.type(v)) if v else "" for v in (*node.inputs, *node.outputs))
    constant = tuple(
        graph.constants[v].tobytes() if v in graph.constants and graph.type(v).nbytes < 256 else v
        for v in node.inputs
        if v in graph.constants
    )
    return node.op, kinds, constant, tuple(sorted((k, str(v)) for k, v in node.attrs.items()))


def _target(target: Any) -> Any:
    return target if isinstance(target, tvm.target.Target) else tvm.target.Target(target)
