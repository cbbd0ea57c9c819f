"""Readers of QuantizeLinear, DequantizeLinear and what stands between them: QDQ and QCDQ."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mpqc.errors import ModelError
from mpqc.graph import Array, Node, TensorType
from mpqc.passes.quantized_values import (
    INTEGER_BITS,
    Grid,
    Integers,
    Operand,
    Reader,
    check_scale,
    container,
)

_FULL_WIDTH = 8


def quantize_linear(reader: Reader, node: Node) -> None:
    """``QuantizeLinear``, the Clip of floats before it and the Clip of codes behind it."""
    dtype = _output_dtype(reader, node)
    scale, zero_point = _rule(reader, node, node.inputs[0], dtype)
    x = node.inputs[0]
    array = reader.array(x)
    if array is not None:
        _quantize_constant(reader, node, array, scale, zero_point, dtype)
        return
    grid, out = Grid.of(dtype), node.output
    clip = reader.only_reader(out)
    if clip is not None and clip.op == "Clip" and clip.inputs[0] == out:
        bounds = _bounds(reader, clip)
        if bounds is not None:
            reader.absorbed.add(clip.name)
            grid, out = grid.within(*bounds), clip.output
    x, grid = _clipped_before(reader, node, x, scale, zero_point, grid)
    x = reader.as_float(node, x)
    reader.quantize(node, x, out, scale, zero_point, grid, dtype)


def dequantize_linear(reader: Reader, node: Node) -> None:
    """``DequantizeLinear`` of weights, biases or activations."""
    source = node.inputs[0]
    dtype = reader.dtype(source)
    if dtype not in INTEGER_BITS:
        raise ModelError(f"{_label(node)} reads codes of type {dtype}, which are no integers")
    scale, zero_point = _rule(reader, node, source, dtype)
    known = reader.integers.get(source)
    out = reader.dtype(node.output)
    if known is None or isinstance(scale, str) or isinstance(zero_point, str):
        codes = reader.codes_of(node, source)
        reader.dequantize(node, codes, node.output, scale, zero_point, out)
        return
    if out != "float32":
        exact = (known.array - zero_point).astype(np.float32) * scale.astype(np.float32)
        reader.define(node, node.output, np.asarray(exact).astype(out))
        return
    reader.define_weights(node, node.output, known.array, scale, zero_point, known.bits)


def clip(reader: Reader, node: Node) -> bool:
    """A Clip of integer constants tells their width; any other is left alone."""
    known = reader.integers.get(node.inputs[0]) if node.op == "Clip" else None
    bounds = _bounds(reader, node) if known is not None else None
    if known is None or bounds is None:
        return False
    low, high = bounds
    grid = Grid.of(known.dtype).within(low, high)
    array = np.clip(known.array, low, high)
    reader.integers[node.output] = Integers(array, known.dtype, min(known.bits, grid.bits))
    return True


def cast(reader: Reader, node: Node) -> bool:
    """A Cast from codes, or from or to a type narrower than a byte; any other is left alone."""
    if node.op != "Cast":
        return False
    source, (before, after) = node.inputs[0], map(reader.dtype, (node.inputs[0], node.output))
    narrow = container(after) != after
    if reader.array(source) is not None:
        return False
    if not narrow and container(before) == before and source not in reader.codes:
        return False
    if source in reader.codes or container(before) != before:
        x = reader.numbers(node, reader.codes_of(node, source))
    else:
        x = reader.cast(node, source, "float32") if before != "float32" else source
    if not narrow:
        reader.cast(node, x, after, node.output)
        return True
    grid = Grid.of(after)
    if before not in INTEGER_BITS:  # towards zero
        sign, size = reader.unary(node, "Sign", x), reader.unary(node, "Abs", x)
        x = reader.binary(node, "Mul", reader.unary(node, "Floor", size), sign)
    # the low bits stay: x - span * floor((x - low) / span)
    span = float(2**grid.bits)
    laps = reader.binary(node, "Mul", reader.binary(node, "Sub", x, float(grid.low)), 1 / span)
    laps = reader.binary(node, "Mul", reader.unary(node, "Floor", laps), span)
    kind = TensorType("float32", reader.shape(source))
    x = reader.emit(node, "Sub", (x, laps), kind)
    unit, none = np.ones((), np.float32), np.zeros((), np.int64)
    reader.quantize(node, x, node.output, unit, none, grid, after)
    return True


def dynamic_quantize_linear(reader: Reader, node: Node) -> None:
    """``DynamicQuantizeLinear``: its rule from the data, in the operator's own float steps."""
    codes, scale_out, zero_out = (*node.outputs, "", "")[:3]
    x = node.inputs[0]
    array = reader.array(x)
    if array is not None:
        scale, zero = _dynamic_rule(array)
        for name, value in ((scale_out, scale), (zero_out, zero)):
            if name:
                reader.define(node, name, value)
        if zero_out:
            reader.integers[zero_out] = Integers(zero.astype(np.int64), "uint8", 8)
        _quantize_constant(reader, node, array, scale, zero, "uint8", codes)
        return
    high = _extreme(reader, node, x, "ReduceMax", "Max")
    low = _extreme(reader, node, x, "ReduceMin", "Min")
    span = reader.binary(node, "Sub", high, low)
    step = reader.binary(node, "Div", span, 255.0)
    # all zeros: any scale tells them, and one does not divide by zero
    flat = TensorType("bool", ())
    zero_name = reader.number(node, "nothing", 0.0)
    empty = reader.emit(node, "Equal", (span, zero_name), flat)
    one = reader.number(node, "one", 1.0)
    kind = TensorType("float32", ())
    scale_name = reader.emit(node, "Where", (empty, one, step), kind, out=scale_out)
    lowest = reader.binary(node, "Div", low, scale_name)
    minus = reader.unary(node, "Neg", lowest)
    offset = reader.unary(node, "Round", reader.clip(node, minus, 0.0, 255.0))
    reader.keep_float(node, "its scale follows from the data: the codes are made in float")
    grid = Grid.of("uint8")
    steps = reader.unary(node, "Round", reader.binary(node, "Div", x, scale_name))
    steps = reader.binary(node, "Add", steps, offset)
    unit = np.ones((), np.float32)
    reader.quantize(node, steps, codes, unit, np.zeros((), np.int64), grid, "uint8")
    if zero_out:
        number = TensorType("uint8", ())
        attrs = {"scale": 1.0, "zero_point": 0, "bits": 8}
        reader.emit(node, "Quantize", (offset,), number, out=zero_out, attrs=attrs)


def _extreme(reader: Reader, node: Node, x: str, reduce: str, join: str) -> str:
    """The largest or the smallest of the data and zero: float32 []."""
    kind = TensorType("float32", ())
    found = reader.emit(node, reduce, (x,), kind, attrs={"keepdims": 0})
    zero = reader.number(node, "zero", 0.0)
    return reader.emit(node, join, (found, zero), kind)


def _dynamic_rule(x: Array) -> tuple[Array, Array]:
    low = np.minimum(x.min(initial=0), 0).astype(np.float32)
    high = np.maximum(x.max(initial=0), 0).astype(np.float32)
    scale = np.float32(high - low) / np.float32(255) if high > low else np.float32(1)
    zero = np.rint(np.clip(-low / scale, 0, 255))
    return np.asarray(scale, np.float32), np.asarray(zero, np.uint8)


def _label(node: Node) -> str:
    return f"{node.op} {node.name!r}"


def _output_dtype(reader: Reader, node: Node) -> str:
    dtype = reader.dtype(node.output)
    if dtype not in INTEGER_BITS or INTEGER_BITS[dtype] > 16:
        raise ModelError(
            f"{_label(node)} gives codes of type {dtype}; integers of 2, 4, 8 and 16 bits are read"
        )
    return dtype


def _rule(reader: Reader, node: Node, data: str, dtype: str) -> tuple[Operand, Operand]:
    """Scale and zero point, shaped to broadcast against the data, checked."""
    shape = reader.shape(data)
    names = (*node.inputs, "", "")
    zero_name = names[2]
    if zero_name and reader.dtype(zero_name) != dtype:
        raise ModelError(
            f"{_label(node)} has codes of type {dtype} and a zero point of type "
            f"{reader.dtype(zero_name)}; export it again"
        )
    scale = _operand(reader, node, names[1], "scale", shape)
    if not isinstance(scale, str):
        told = node.op.endswith("DequantizeLinear") and reader.array(data) is not None
        check_scale(node, scale, constant=told)
    zero: Operand = np.zeros((), np.int64)
    if zero_name:
        if (
            reader.shape(zero_name) != reader.shape(names[1])
            and max(np.prod(reader.shape(zero_name)), np.prod(reader.shape(names[1]))) != 1
        ):
            raise ModelError(
                f"{_label(node)} has scales of shape {list(reader.shape(names[1]))} and zero "
                f"points of shape {list(reader.shape(zero_name))}; export it again"
            )
        zero = _operand(reader, node, zero_name, "zero point", shape)
    return scale, zero


def _operand(reader: Reader, node: Node, name: str, what: str, shape: tuple[int, ...]) -> Operand:
    """A scale or a zero point for each tensor, channel or block."""
    known = reader.integers.get(name)
    array = known.array if known is not None else reader.array(name)
    given = reader.shape(name)
    if not given or given == (1,):
        if array is not None:
            return array.reshape(())
        value = reader.numbers(node, reader.codes_of(node, name)) if what != "scale" else name
        return value if not given else reader.reshape(node, value, ())
    axis, block = node.int_attr("axis", 1), node.int_attr("block_size", 0)
    if not -len(shape) <= axis < len(shape):
        raise ModelError(f"{_label(node)} has the axis {axis}, its data {len(shape)} axes")
    axis %= len(shape)
    if array is None:
        raise ModelError(
            f"the {what} of {_label(node)} depends on the data, channel by channel or block by "
            "block; export with constants"
        )
    if block:
        return _blocked(node, array, what, shape, axis, block)
    if array.ndim != 1 or array.size != shape[axis]:
        raise ModelError(
            f"{_label(node)} has a {what} of shape {list(given)} for {shape[axis]} channels "
            f"along axis {axis}; export it again"
        )
    return array.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def _blocked(
    node: Node, array: Array, what: str, shape: tuple[int, ...], axis: int, block: int
) -> Array:
    blocks = -(-shape[axis] // block) if block > 0 else 0
    want = tuple(blocks if i == axis else n for i, n in enumerate(shape))
    if array.shape != want:
        raise ModelError(
            f"{_label(node)} has blocks of {block} along axis {axis} of {list(shape)}: its {what} "
            f"must have the shape {list(want)}, not {list(array.shape)}; export it again"
        )
    return np.repeat(array, block, axis=axis).take(range(shape[axis]), axis=axis)


def _quantize_constant(
    reader: Reader, node: Node, array: Array, scale: Operand, zero_point: Operand, dtype: str,
    out: str = "",
) -> None:  # fmt: skip
    if isinstance(scale, str) or isinstance(zero_point, str):
        raise ModelError(f"{_label(node)} quantizes a constant by a scale that depends on data")
    grid = Grid.of(dtype)
    with np.errstate(all="ignore"):
        steps = np.rint(array.astype(np.float32) / scale.astype(np.float32))
    if not np.isfinite(steps).all():
        raise ModelError(f"{_label(node)} quantizes a constant that is not finite; export it again")
    integers = np.clip(steps + zero_point.astype(np.float32), grid.low, grid.high)
    reader.integers[out or node.output] = Integers(integers.astype(np.int64), dtype, grid.bits)


def _bounds(reader: Reader, node: Node) -> tuple[int, int] | None:
    """Bounds of a Clip of integers, where they are constants."""
    grid = Grid.of(reader.dtype(node.inputs[0]))
    found = []
    for name, default in zip((*node.inputs[1:3], "", "")[:2], (grid.low, grid.high), strict=True):
        known = reader.integers.get(name) if name else None
        if name and (known is None or known.array.size != 1):
            return None
        found.append(default if known is None else int(known.array.reshape(())))
    low, high = found
    if low > high:
        raise ModelError(f"{_label(node)} clips from {low} to {high}; export it again")
    return low, high


def _clipped_before(
    reader: Reader, node: Node, x: str, scale: Operand, zero_point: Operand, grid: Grid
) -> tuple[str, Grid]:
    """A Clip of floats that leaves the codes of a narrower type tells the width, and goes."""
    before = reader.source.producer(x)
    if (
        before is None
        or before.op != "Clip"
        or reader.only_reader(x) is None
        or isinstance(scale, str)
        or isinstance(zero_point, str)
        or scale.size != 1
        or zero_point.size != 1
        or grid.bits > _FULL_WIDTH
    ):
        return x, grid
    codes = []
    names = (*before.inputs[1:3], "", "")[:2]
    for name, default in zip(names, (grid.low, grid.high), strict=True):
        bound = reader.array(name) if name else None
        if name and (bound is None or bound.size != 1):
            return x, grid
        if bound is None:
            codes.append(default)
            continue
        step = np.rint(bound.reshape(()).astype(np.float32) / scale.reshape(()).astype(np.float32))
        codes.append(int(np.clip(step + float(zero_point.reshape(())), grid.low, grid.high)))
    narrow = grid.within(*codes)
    half = 2 ** (narrow.bits - 1)
    signed = narrow.high == half - 1 and narrow.low in (-half, 1 - half)
    whole = signed or (narrow.low, narrow.high) == (0, 2 * half - 1)
    # of an 8-bit signed type's upper half a Relu6 says nothing about the width
    half_of_signed = narrow.low == 0 and narrow.bits == grid.bits - 1 and grid.low < 0
    if not whole or narrow.bits >= grid.bits or half_of_signed:
        return x, grid
    return before.inputs[0], narrow


Handler = Callable[[Reader, Node], None]

READERS: Mapping[str, Handler] = {
    "QuantizeLinear": quantize_linear,
    "DequantizeLinear": dequantize_linear,
    "DynamicQuantizeLinear": dynamic_quantize_linear,
    "com.microsoft::QuantizeLinear": quantize_linear,
    "com.microsoft::DequantizeLinear": dequantize_linear,
}

OPERANDS: Mapping[str, tuple[Sequence[int], int]] = {
    op: (range(1), 1) if op.startswith("Dynamic") else (range(2), 3) for op in READERS
}
