"""Readers of operators that compute on codes themselves: QLinearConv, MatMulInteger and others.

Each becomes a float operator between a Dequantize of its operands and a Quantize of its result;
the products to int32 become integer layers at once.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mpqc.errors import ModelError
from mpqc.graph import Array, Attribute, Node, TensorType
from mpqc.numerics import along
from mpqc.packing import unpack_elements
from mpqc.passes.quantized_values import (
    INTEGER_BITS,
    Grid,
    Operand,
    Reader,
    check_scale,
)
from mpqc.pooling import explicit_pads

EXACT_FLOAT = 2**24  # integers that float32 has without gaps


def qlinear_conv(reader: Reader, node: Node) -> None:
    """``QLinearConv``: its Conv has the node's name."""
    x, xs, xz, w, ws, wz, ys, yz, bias = (*node.inputs, "")[:9]
    data = _told(reader, node, x, xs, xz)
    weight = _told(reader, node, w, ws, wz, axis=0)
    inputs = [data, weight]
    if bias:
        step = _constant(reader, node, xs, "scale").astype(np.float32) * _constant(
            reader, node, ws, "scale"
        ).astype(np.float32)
        inputs.append(_bias(reader, node, bias, step))
    kind = TensorType("float32", reader.shape(node.output))
    attrs = _padded(reader, node, reader.shape(w)[2:])
    y = reader.emit(node, "Conv", inputs, kind, name=node.name, attrs=attrs)
    _coded(reader, node, y, node.output, ys, yz)


def qlinear_matmul(reader: Reader, node: Node) -> None:
    """``QLinearMatMul``; scales per row of a, or per column of b."""
    a, a_scale, az, b, bs, bz, ys, yz = node.inputs
    data = _told(reader, node, a, a_scale, az, axis=-2)
    weight = _told(reader, node, b, bs, bz, axis=-1)
    kind = TensorType("float32", reader.shape(node.output))
    y = reader.emit(node, "MatMul", (data, weight), kind, name=node.name)
    _coded(reader, node, y, node.output, ys, yz)


def qgemm(reader: Reader, node: Node) -> None:
    """ONNX Runtime's ``QGemm``: int32 bias, and codes or float32 out."""
    a, a_scale, az, b, bs, bz, c, ys, yz = (*node.inputs, *[""] * 9)[:9]
    transposed = node.int_attr("transB", 0)
    data = _told(reader, node, a, a_scale, az)
    inputs = [data, _told(reader, node, b, bs, bz, axis=0 if transposed else 1)]
    alpha = np.float32(node.attrs.get("alpha", 1.0))  # type: ignore[arg-type]
    if c:
        step = _constant(reader, node, a_scale, "scale") * _constant(reader, node, bs, "scale")
        inputs.append(_bias(reader, node, c, (alpha * step).astype(np.float32)))
    kind = TensorType("float32", reader.shape(node.output))
    kept = {key: node.attrs[key] for key in ("alpha", "transA", "transB") if key in node.attrs}
    if not ys:
        reader.emit(node, "Gemm", inputs, kind, out=node.output, name=node.name, attrs=kept)
        return
    y = reader.emit(node, "Gemm", inputs, kind, name=node.name, attrs=kept)
    _coded(reader, node, y, node.output, ys, yz)


def _binary(op: str) -> "Handler":
    def read(reader: Reader, node: Node) -> None:
        a, a_scale, az, b, bs, bz, ys, yz = (*node.inputs, *[""] * 8)[:8]
        inputs = [_told(reader, node, a, a_scale, az), _told(reader, node, b, bs, bz)]
        kind = TensorType("float32", reader.shape(node.output))
        y = reader.emit(node, op, inputs, kind, name=node.name)
        _coded(reader, node, y, node.output, ys, yz)

    return read


def _unary(op: str, *kept: str) -> "Handler":
    def read(reader: Reader, node: Node) -> None:
        x, xs, xz, ys, yz = (*node.inputs, *[""] * 5)[:5]
        attrs = {key: node.attrs[key] for key in kept if key in node.attrs}
        value = _told(reader, node, x, xs, xz)
        kind = TensorType("float32", reader.shape(node.output))
        last = bool(node.int_attr("channels_last", 0))
        if last:
            value = _transposed(reader, node, value, to_first=True)
            kind = TensorType("float32", _channels_first(kind.shape))
        if "auto_pad" in attrs:
            spatial = reader.shape_of(value)[2:]
            kernel = node.ints_attr("kernel_shape")
            attrs["pads"] = explicit_pads(node, spatial, kind.shape[2:], kernel)
            del attrs["auto_pad"]
        y = reader.emit(node, op, (value,), kind, name=node.name, attrs=attrs)
        y = _transposed(reader, node, y, to_first=False) if last else y
        _coded(reader, node, y, node.output, ys, yz)

    return read


def qlinear_softmax(reader: Reader, node: Node) -> None:
    """ONNX Runtime's ``QLinearSoftmax``; before opset 13 of all axes from ``axis`` on."""
    x, xs, xz, ys, yz = (*node.inputs, *[""] * 5)[:5]
    value = _told(reader, node, x, xs, xz)
    shape = reader.shape(node.output)
    axis = node.int_attr("axis", -1) % max(len(shape), 1)
    kind = TensorType("float32", shape)
    if node.int_attr("opset", 13) >= 13 or axis == len(shape) - 1:
        y = reader.emit(node, "Softmax", (value,), kind, name=node.name, attrs={"axis": axis})
    else:
        flat = (int(np.prod(shape[:axis])), int(np.prod(shape[axis:])))
        value = reader.reshape(node, value, flat)
        y = reader.emit(
            node, "Softmax", (value,), TensorType("float32", flat), name=node.name,
            attrs={"axis": 1},
        )  # fmt: skip
        y = reader.reshape(node, y, shape)
    _coded(reader, node, y, node.output, ys, yz)


def qlinear_reduce_mean(reader: Reader, node: Node) -> None:
    """ONNX Runtime's ``QLinearReduceMean``."""
    x, xs, xz, ys, yz = (*node.inputs, *[""] * 5)[:5]
    value = _told(reader, node, x, xs, xz)
    attrs: dict[str, Attribute] = {"keepdims": node.int_attr("keepdims", 1)}
    inputs = [value]
    axes = node.ints_attr("axes")
    if axes and reader.source.opset >= 18:
        inputs.append(reader.constant(node, "axes", np.asarray(axes, np.int64)))
    elif axes:
        attrs["axes"] = axes
    kind = TensorType("float32", reader.shape(node.output))
    y = reader.emit(node, "ReduceMean", inputs, kind, name=node.name, attrs=attrs)
    _coded(reader, node, y, node.output, ys, yz)


def qlinear_concat(reader: Reader, node: Node) -> None:
    """ONNX Runtime's ``QLinearConcat``: the result's rule, then each operand with its own."""
    ys, yz, *rest = node.inputs
    if not rest or len(rest) % 3 or not all(rest):
        raise ModelError(f"{_label(node)} has {len(rest)} operands, not three for each tensor")
    inputs = [_told(reader, node, *three) for three in zip(*[iter(rest)] * 3, strict=True)]
    kind = TensorType("float32", reader.shape(node.output))
    attrs = {"axis": node.int_attr("axis", 0)}
    y = reader.emit(node, "Concat", inputs, kind, name=node.name, attrs=attrs)
    _coded(reader, node, y, node.output, ys, yz)


def matmul_n_bits(reader: Reader, node: Node) -> None:
    """ONNX Runtime's ``MatMulNBits``: blocks along K of weights; float data."""
    a, packed, scales, zeros, groups, bias = (*node.inputs, "", "", "")[:6]
    k, n, block = (node.int_attr(name, 0) for name in ("K", "N", "block_size"))
    bits = node.int_attr("bits", 4)
    if k < 1 or n < 1 or reader.shape(a)[-1:] != (k,):
        raise ModelError(
            f"{_label(node)} has K={k} and N={n} for data of {list(reader.shape(a))}; export it "
            "again"
        )
    if bits not in (2, 4, 8) or block < 1:
        raise ModelError(f"{_label(node)} has {bits} bits in blocks of {block}: 2, 4 or 8 are read")
    if groups and not _in_order(reader, node, groups, block):
        raise ModelError(f"{_label(node)} orders its groups by g_idx; export it without")
    blocks = -(-k // block)
    raw = _constant(reader, node, packed, "weights").astype(np.uint8)
    scale = _constant(reader, node, scales, "scales").astype(np.float32)
    if raw.size != n * blocks * (block * bits // 8) or scale.size != n * blocks:
        raise ModelError(
            f"{_label(node)} holds {raw.size} bytes and {scale.size} scales for {n} columns of "
            f"{blocks} blocks of {block} by {bits} bits; export it again"
        )
    check_scale(node, scale, constant=True)
    codes = unpack_elements(raw.reshape(n, blocks, -1), bits).astype(np.int64)
    scale = scale.reshape(n, blocks, 1)
    zero = _n_bits_zeros(reader, node, zeros, (n, blocks), bits)
    if blocks == 1 and not np.any(zero % 1):
        integers = codes.reshape(n, -1)[:, :k].T
        weight = f"{node.output}.weight"
        weight = reader.fresh(weight)
        reader.define_weights(node, weight, integers, scale.reshape(1, n), zero.reshape(1, n), bits)
        reader.write_weights(weight)
    else:
        exact = ((codes - zero).astype(np.float32) * scale).reshape(n, -1)[:, :k].T
        weight = reader.constant(node, "weight", np.ascontiguousarray(exact, np.float32))
        reader.keep_float(
            node, f"weights of {bits} bits in blocks of {block} along K: each block has its scale"
        )
    kind = TensorType("float32", reader.shape(node.output))
    data = reader.as_float(node, a)
    dtype = reader.dtype(node.output)
    out = node.output if dtype == "float32" else ""
    if bias:
        y = reader.emit(node, "MatMul", (data, weight), kind, name=node.name)
        y = reader.emit(node, "Add", (y, reader.as_float(node, bias)), kind, out=out)
    else:
        y = reader.emit(node, "MatMul", (data, weight), kind, out=out, name=node.name)
    if not out:
        reader.cast(node, y, dtype, node.output)


def _n_bits_zeros(
    reader: Reader, node: Node, name: str, shape: tuple[int, int], bits: int
) -> Array:
    """Zero points [n, blocks, 1]: packed as the weights are, or given as floats."""
    n, blocks = shape
    if not name:
        return np.full((n, blocks, 1), 2 ** (bits - 1), np.float64)
    given = _constant(reader, node, name, "zero points")
    if str(given.dtype).startswith("float") and given.size == n * blocks:
        return given.astype(np.float64).reshape(n, blocks, 1)
    each = 8 // bits
    row = -(-blocks // each)
    if given.size != n * row or str(given.dtype).startswith("float"):
        raise ModelError(
            f"{_label(node)} has {given.size} zero points of type {given.dtype}, not {n * row} "
            f"bytes or {n * blocks} floats; export it again"
        )
    zeros = unpack_elements(given.astype(np.uint8).reshape(n, row), bits)[:, :blocks]
    return zeros.astype(np.float64).reshape(n, blocks, 1)


def _in_order(reader: Reader, node: Node, name: str, block: int) -> bool:
    groups = _constant(reader, node, name, "g_idx").reshape(-1)
    return bool(np.array_equal(groups, np.arange(groups.size) // block))


def matmul_integer(reader: Reader, node: Node) -> None:
    """``MatMulInteger``: int32 products of codes."""
    a, b, az, bz = (*node.inputs, "", "")[:4]
    weights = _integer_weights(reader, node, b, bz, along_axis=-1)
    rows = reader.integers.get(az)
    if rows is not None and rows.array.size not in (1, *reader.shape(a)[-2:-1]):
        raise ModelError(
            f"{_label(node)} has {rows.array.size} zero points for data of "
            f"{list(reader.shape(a))}; export it again"
        )
    if weights is None or weights.ndim != 2 or (rows is not None and rows.array.size > 1):
        _in_float(reader, node, "MatMul", (a, az, -2), (b, bz, -1))
        return
    column_sums = weights.sum(axis=0)
    _integer_product(reader, node, "IntMatMul", a, az, weights, column_sums, {})


def conv_integer(reader: Reader, node: Node) -> None:
    """``ConvInteger``: int32 products of codes."""
    x, w, xz, wz = (*node.inputs, "", "")[:4]
    weights = _integer_weights(reader, node, w, wz, along_axis=0)
    if weights is None or weights.ndim not in (3, 4):
        _in_float(reader, node, "Conv", (x, xz, 1), (w, wz, 0))
        return
    attrs = _padded(reader, node, weights.shape[2:])
    # what a zero point that is known only at run time takes off: one unit of data everywhere
    ones = np.zeros(()) if _known_zero(reader, xz) else _sums_of_ones(reader, node, weights, attrs)
    _integer_product(reader, node, "IntConv", x, xz, weights, ones, attrs)


def _padded(reader: Reader, node: Node, kernel: tuple[int, ...]) -> dict[str, Attribute]:
    """A convolution's attributes with its padding spelled out."""
    spatial, out = reader.shape(node.inputs[0])[2:], reader.shape(node.output)[2:]
    attrs = {key: value for key, value in node.attrs.items() if key != "auto_pad"}
    return {**attrs, "pads": explicit_pads(node, spatial, out, kernel)}


def _known_zero(reader: Reader, name: str) -> bool:
    return not name or (name in reader.integers and reader.integers[name].array.size == 1)


def _sums_of_ones(
    reader: Reader, node: Node, weights: Array, attrs: Mapping[str, Attribute]
) -> Array:
    from mpqc import reference
    from mpqc.graph import Graph

    shape = (1, *reader.shape(node.inputs[0])[1:])
    out = TensorType("int32", (1, *reader.shape(node.output)[1:]))
    kept = {**attrs, "zero_point": 0, "weight_bits": 8, "activation_bits": 1,
            "weight_levels": "signed"}  # fmt: skip
    graph = Graph(
        {"x": TensorType("uint8", shape)}, ["y"], [Node("y", "IntConv", ("x", "w"), ("y",), kept)],
        {"w": weights.astype(np.int16)}, {"y": out},
    )  # fmt: skip
    return reference.run(graph, {"x": np.ones(shape, np.uint8)})["y"]


def _integer_product(
    reader: Reader,
    node: Node,
    op: str,
    x: str,
    zero: str,
    weights: Array,
    ones: Array,
    attrs: Mapping[str, Attribute],
) -> None:
    codes = reader.codes_of(node, x)
    known = reader.integers.get(zero) if zero else None
    static = _known_zero(reader, zero)
    offset = int(known.array.reshape(())) if known is not None and static else 0
    values = reader.constant(node, "integers", weights.astype(np.int16))
    made: dict[str, Attribute] = {
        **attrs,
        "zero_point": offset + codes.shift if static else 0,
        "weight_bits": 8,  # of the file's type; a zero point may shift them beyond int8
        "activation_bits": Grid.of(codes.dtype).bits,
        "weight_levels": "signed",
    }
    kind = TensorType("int32", reader.shape(node.output))
    out = node.output if static else ""
    acc = reader.emit(node, op, (codes.value, values), kind, out=out, name=node.name, attrs=made)
    if static:
        return
    numbers = reader.numbers(node, reader.codes_of(node, zero))
    shift = reader.constant(node, "shift", np.asarray(codes.shift, np.float32))
    one = TensorType("float32", ())
    if reader.shape(zero):
        numbers = reader.reshape(node, numbers, ())
    total = reader.emit(node, "Add", (numbers, shift), one)
    level = reader.cast(node, total, "int32")
    sums = reader.constant(node, "sums", np.asarray(ones, np.int32))
    inside = TensorType("int32", np.shape(ones))
    taken = reader.emit(node, "Mul", (sums, level), inside)
    reader.emit(node, "Sub", (acc, taken), kind, out=node.output)


def _integer_weights(
    reader: Reader, node: Node, name: str, zero: str, along_axis: int
) -> Array | None:
    known = reader.integers.get(name)
    if known is None or (zero and zero not in reader.integers):
        return None
    if not zero:
        return known.array
    offset = reader.integers[zero].array.reshape(-1)
    if offset.size not in (1, known.array.shape[along_axis]):
        raise ModelError(
            f"{_label(node)} has {offset.size} zero points for "
            f"{known.array.shape[along_axis]} channels; export it again"
        )
    taken: Array = known.array - along(offset, along_axis % known.array.ndim, known.array.ndim)
    return taken


def _in_float(
    reader: Reader, node: Node, op: str, data: tuple[str, str, int], other: tuple[str, str, int]
) -> None:
    """A product that no integer layer computes: in float, where sums below 2**24 are exact."""
    reader.keep_float(node, "its second operand is no constant matrix: the product is float")
    operands = []
    taps = 1
    for name, zero, axis in (data, other):
        value = reader.numbers(node, reader.codes_of(node, name))
        if zero:
            known = reader.integers.get(zero)
            if known is not None:
                offset: Operand = _spread(known.array, axis, len(reader.shape(name)))
            else:
                offset = reader.numbers(node, reader.codes_of(node, zero))
            value = reader.binary(node, "Sub", value, offset)
        operands.append(value)
    shape = reader.shape(other[0])
    taps = int(np.prod(shape[1:])) if op == "Conv" else shape[-2] if len(shape) > 1 else shape[0]
    if taps * 255 * 255 >= EXACT_FLOAT:
        raise ModelError(
            f"{_label(node)} multiplies codes that both follow from the data, {taps} in a sum: "
            "float32 does not hold such sums; export it with constant weights"
        )
    kind = TensorType("float32", reader.shape(node.output))
    attrs = node.attrs if op == "Conv" else {}
    y = reader.emit(node, op, operands, kind, name=node.name, attrs=attrs)
    reader.cast(node, y, "int32", node.output)


def _spread(array: Array, axis: int, rank: int) -> Array:
    return along(array.reshape(-1), axis % max(rank, 1), rank) if array.size > 1 else (
        array.reshape(())
    )  # fmt: skip


def _told(
    reader: Reader, node: Node, x: str, scale_name: str, zero_name: str, axis: int = 1
) -> str:
    """Name of the float value that an operand's codes stand for."""
    shape = reader.shape(x)
    scale = _constant(reader, node, scale_name, "scale")
    check_scale(node, scale)
    zero = np.zeros((), np.int64)
    if zero_name:
        dtype = reader.dtype(zero_name)
        if dtype != reader.dtype(x):
            raise ModelError(
                f"{_label(node)} has codes of type {reader.dtype(x)} and a zero point of type "
                f"{dtype}; export it again"
            )
        zero = _constant(reader, node, zero_name, "zero point")
    scale, zero = _rule(node, scale, zero, shape, axis)
    out = reader.fresh(f"{x}.told")
    known = reader.integers.get(x)
    if known is not None:
        reader.define_weights(node, out, known.array, scale, zero, known.bits)
        if out in reader.weights:
            reader.write_weights(out)
        return out
    name = reader.fresh(f"{node.name}.dequantize")
    reader.dequantize(node, reader.codes_of(node, x), out, scale, zero, name=name)
    return out


def _coded(reader: Reader, node: Node, y: str, out: str, scale_name: str, zero_name: str) -> None:
    """The result's codes, by the operator's own rule."""
    scale = _constant(reader, node, scale_name, "scale")
    check_scale(node, scale)
    dtype = reader.dtype(out)
    if dtype not in INTEGER_BITS or INTEGER_BITS[dtype] > 16:
        raise ModelError(
            f"{_label(node)} gives codes of type {dtype}, which are no integers of 2 to 16 bits; "
            "export it again"
        )
    zero = np.zeros((), np.int64)
    if zero_name:
        if reader.dtype(zero_name) != dtype:
            raise ModelError(
                f"{_label(node)} gives codes of type {dtype}, its zero point has the type "
                f"{reader.dtype(zero_name)}; export it again"
            )
        zero = _constant(reader, node, zero_name, "zero point")
    shape = reader.shape(out)
    scale, zero = _rule(node, scale, zero, shape, -2 if node.op == "QLinearMatMul" else 1)
    name = reader.fresh(f"{node.name}.quantize")
    reader.quantize(node, y, out, scale, zero, Grid.of(dtype), dtype, name=name)


def _rule(
    node: Node, scale: Array, zero: Array, shape: tuple[int, ...], axis: int
) -> tuple[Array, Array]:
    """Scale and zero point that broadcast to the shape: of the tensor, or along the axis."""
    for what, array in (("scale", scale), ("zero point", zero)):
        if array.size != 1 and (
            not array.size or not shape or array.size != shape[axis % len(shape)]
        ):
            raise ModelError(
                f"{_label(node)} has {array.size} numbers as {what} of {list(shape)}; export it "
                "again"
            )
    return _spread(scale, axis, len(shape)), _spread(zero, axis, len(shape))


def _bias(reader: Reader, node: Node, name: str, step: Array) -> str:
    values = _constant(reader, node, name, "bias").astype(np.float32)
    return reader.constant(node, "bias", values * step.reshape(-1))


def _constant(reader: Reader, node: Node, name: str, what: str) -> Array:
    known = reader.integers.get(name)
    if known is not None:
        return known.array
    array = reader.array(name)
    if array is None:
        raise ModelError(f"the {what} of {_label(node)} depends on the data; export with constants")
    return array


def _channels_first(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0], shape[-1], *shape[1:-1])


def _transposed(reader: Reader, node: Node, value: str, *, to_first: bool) -> str:
    shape = reader.shape_of(value)
    rank = len(shape)
    perm = (0, rank - 1, *range(1, rank - 1)) if to_first else (0, *range(2, rank), 1)
    kind = TensorType("float32", tuple(shape[axis] for axis in perm))
    return reader.emit(node, "Transpose", (value,), kind, attrs={"perm": perm})


def _label(node: Node) -> str:
    return f"{node.op} {node.name!r}"


Handler = Callable[[Reader, Node], None]

_POOL = ("kernel_shape", "strides", "pads", "ceil_mode", "count_include_pad", "auto_pad",
         "dilations")  # fmt: skip

READERS: Mapping[str, Handler] = {
    "QLinearConv": qlinear_conv,
    "QLinearMatMul": qlinear_matmul,
    "ConvInteger": conv_integer,
    "MatMulInteger": matmul_integer,
    "com.microsoft::QGemm": qgemm,
    "com.microsoft::QLinearAdd": _binary("Add"),
    "com.microsoft::QLinearMul": _binary("Mul"),
    "com.microsoft::QLinearAveragePool": _unary("AveragePool", *_POOL),
    "com.microsoft::QLinearGlobalAveragePool": _unary("GlobalAveragePool"),
    "com.microsoft::QLinearSigmoid": _unary("Sigmoid"),
    "com.microsoft::QLinearLeakyRelu": _unary("LeakyRelu", "alpha"),
    "com.microsoft::QLinearSoftmax": qlinear_softmax,
    "com.microsoft::QLinearReduceMean": qlinear_reduce_mean,
    "com.microsoft::QLinearConcat": qlinear_concat,
    "com.microsoft::MatMulNBits": matmul_n_bits,
}

_UNARY = (0, 1, 3)

OPERANDS: Mapping[str, tuple[Sequence[int], int]] = {
    "QLinearConv": (range(8), 9),
    "QLinearMatMul": (range(8), 8),
    "ConvInteger": (range(2), 4),
    "MatMulInteger": (range(2), 4),
    "com.microsoft::QGemm": ((0, 1, 3, 4), 9),
    "com.microsoft::QLinearAdd": ((0, 1, 3, 4, 6), 8),
    "com.microsoft::QLinearMul": ((0, 1, 3, 4, 6), 8),
    "com.microsoft::QLinearAveragePool": (_UNARY, 5),
    "com.microsoft::QLinearGlobalAveragePool": (_UNARY, 5),
    "com.microsoft::QLinearSigmoid": (_UNARY, 5),
    "com.microsoft::QLinearLeakyRelu": (_UNARY, 5),
    "com.microsoft::QLinearSoftmax": (_UNARY, 5),
    "com.microsoft::QLinearReduceMean": (_UNARY, 5),
    "com.microsoft::QLinearConcat": ((0, 2, 3), 3 * 10**6),
    "com.microsoft::MatMulNBits": (range(3), 6),
}
