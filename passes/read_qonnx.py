"""Readers of QONNX: Quant, BipolarQuant and Trunc, as the qonnx package computes them."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mpqc.errors import ModelError
from mpqc.graph import Array, Node, TensorType
from mpqc.passes.quantized_values import (
    Codes,
    Grid,
    Operand,
    Reader,
    check_scale,
    quantize_attrs,
)

DOMAINS = ("onnx.brevitas", "qonnx.custom_op.general", "finn.custom_op.general", "qonnx")
MAX_BITS = 32

# A step this small sends every negative number below code 0, and zero and what is above to 1.
SIGN_STEP = 2.0**-60

ROUNDINGS = ("ROUND", "HALF_EVEN", "CEIL", "FLOOR", "UP", "DOWN", "HALF_UP", "HALF_DOWN")
_HALF_EVEN = ROUNDINGS[:2]
_BREVITAS = {"ROUND_TO_ZERO": "DOWN"}


def quant(reader: Reader, node: Node) -> None:
    """``Quant`` (``IntQuant``): ``(round(clip(x / scale + zero)) - zero) * scale``."""
    x, scale_name, zero_name, bits_name = _operands(node, 4)
    mode = _rounding(node, "ROUND")
    shape = reader.shape(x)
    bits = _widths(reader, node, bits_name, shape)
    signed, narrow = bool(node.int_attr("signed", 1)), bool(node.int_attr("narrow", 1))
    scale = _operand(reader, node, scale_name, "scale", shape)
    zero = _operand(reader, node, zero_name, "zero point", shape)
    if not isinstance(scale, str):
        check_scale(node, scale)
    if not isinstance(zero, str) and not np.isfinite(zero).all():
        raise ModelError(f"{_label(node)} has a zero point that is not finite; export it again")
    if signed and bits.min() == 1 and bits.max() > 1:
        raise ModelError(f"{_label(node)} mixes 1-bit signed channels with wider ones")
    array = reader.array(x)
    if array is not None and not isinstance(scale, str) and not isinstance(zero, str):
        _constant(reader, node, array, scale, zero, bits, mode, signed=signed, narrow=narrow)
        return
    x = reader.as_float(node, x)
    if signed and bits.max() == 1:
        _bipolar(reader, node, x, scale, zero)
        return
    low, high = _limits(bits, signed=signed, narrow=narrow)
    _activation(reader, node, x, scale, zero, low, high, mode, signed=signed)


def bipolar_quant(reader: Reader, node: Node) -> None:
    """``BipolarQuant``: the scale, with the sign of x; zero counts as positive."""
    x, scale_name = _operands(node, 2)
    shape = reader.shape(x)
    scale = _operand(reader, node, scale_name, "scale", shape)
    if not isinstance(scale, str):
        check_scale(node, scale)
    zero = np.zeros((), np.float32)
    array = reader.array(x)
    if array is not None and not isinstance(scale, str):
        bits = np.ones((), np.int64)
        _constant(reader, node, array, scale, zero, bits, "ROUND", signed=True, narrow=False)
        return
    _bipolar(reader, node, reader.as_float(node, x), scale, zero)


def trunc(reader: Reader, node: Node) -> None:
    """``Trunc``: integers, of which only the upper bits stay; version 2 has six operands."""
    version = 2 if len(node.inputs) == 6 else 1
    names = _operands(node, 6 if version == 2 else 5)
    mode = _rounding(node, "FLOOR")
    shape = reader.shape(names[0])
    scale = _fixed(reader, node, names[1], "scale", shape)
    zero = _fixed(reader, node, names[2], "zero point", shape)
    check_scale(node, scale)
    in_bits = _widths(reader, node, names[3], shape)
    x = reader.as_float(node, names[0])
    value = _steps(reader, node, x, scale, zero)
    value = reader.unary(node, "Round", value)
    if version == 1:
        out_bits = _widths(reader, node, names[4], shape)
        value = reader.binary(node, "Div", value, 2.0 ** (in_bits - out_bits))
        value = _round(reader, node, value, mode)
        reader.keep_float(node, "Trunc of version 1 does not say what range it gives")
        _scaled(reader, node, value, scale, zero)
        return
    out_scale = _fixed(reader, node, names[4], "output scale", shape)
    out_bits = _widths(reader, node, names[5], shape)
    check_scale(node, out_scale)
    factor = 2 ** np.round(np.log2(out_scale / scale))
    value = reader.binary(node, "Div", value, factor)
    signed, narrow = bool(node.int_attr("signed", 1)), bool(node.int_attr("narrow", 0))
    low, high = _limits(out_bits, signed=signed, narrow=narrow)
    _codes(reader, node, value, out_scale, zero / factor, low, high, mode, signed=signed)


def float_quant(reader: Reader, node: Node) -> None:
    """Floats of few bits are no integers."""
    raise ModelError(
        f"{_label(node)} rounds to floats of few bits, which no integer layer computes; "
        "export the model with integer quantizers"
    )


# ---- activations ---------------------------------------------------------------------------------


def _activation(
    reader: Reader,
    node: Node,
    x: str,
    scale: Operand,
    zero: Operand,
    low: Array,
    high: Array,
    mode: str,
    *,
    signed: bool,
) -> None:
    """What data go through: codes wherever at most 8 bits tell the result."""
    step, offset = _number(scale), _number(zero)
    grid = _grid(low, high, signed=signed)
    direct = mode in _HALF_EVEN and low.size == 1 and step is not None and grid.bits <= 8
    if direct and _has_code(offset, grid):
        assert step is not None
        assert offset is not None
        attrs = quantize_attrs(step, int(offset), grid)
        kind = TensorType("uint8", reader.shape_of(x))
        name = reader.fresh(f"{node.output}.codes")
        codes = reader.emit(node, "Quantize", (x,), kind, out=name, name=name, attrs=attrs)
        _told(reader, node, codes, grid, scale, zero)
        return
    value = _steps(reader, node, x, scale, zero)
    _codes(reader, node, value, scale, zero, low, high, mode, signed=signed)


def _codes(
    reader: Reader,
    node: Node,
    value: str,
    scale: Operand,
    zero: Operand,
    low: Array,
    high: Array,
    mode: str,
    *,
    signed: bool,
) -> None:
    """Codes of steps that are not rounded yet, and what they stand for."""
    grid = _grid(low, high, signed=signed)
    if grid.bits > 8:
        reader.keep_float(node, f"activations of {grid.bits} bits are float: at most 8 are codes")
        bounds = [
            reader.number(node, what, array) for what, array in (("low", low), ("high", high))
        ]
        kind = TensorType("float32", reader.shape_of(value))
        value = reader.emit(node, "Min", (value, bounds[1]), kind)
        value = reader.emit(node, "Max", (value, bounds[0]), kind)
        value = _round(reader, node, value, mode)
        _scaled(reader, node, value, scale, zero)
        return
    if mode not in _HALF_EVEN:
        reader.keep_float(node, f"it rounds by {mode}: the steps are rounded in float")
        value = _round(reader, node, value, mode)
    if low.size > 1 or high.size > 1:
        kind = TensorType("float32", reader.shape_of(value))
        value = reader.emit(node, "Min", (value, reader.number(node, "high", high)), kind)
        value = reader.emit(node, "Max", (value, reader.number(node, "low", low)), kind)
    attrs = quantize_attrs(1.0, 0, grid)
    kind = TensorType("uint8", reader.shape_of(value))
    name = reader.fresh(f"{node.output}.codes")
    codes = reader.emit(node, "Quantize", (value,), kind, out=name, name=name, attrs=attrs)
    _told(reader, node, codes, grid, scale, zero)


def _told(
    reader: Reader, node: Node, codes: str, grid: Grid, scale: Operand, zero: Operand
) -> None:
    if _number(scale) is None or not _has_code(_number(zero), grid):
        reader.keep_float(node, "its scale or zero point is not one number, or no integer in range")
    reader.dequantize(node, Codes(codes, "int8", grid.shift), node.output, scale, zero)


def _has_code(zero: float | None, grid: Grid) -> bool:
    return zero is not None and zero % 1 == 0 and 0 <= zero + grid.shift < 2**grid.bits


def _bipolar(reader: Reader, node: Node, x: str, scale: Operand, zero: Operand) -> None:
    """Codes 0 and 1 of ``x / scale + zero >= 0``, which stand for minus and plus one."""
    step, offset = _number(scale), _number(zero)
    kind = TensorType("uint8", reader.shape_of(x))
    if offset != 0:
        x = _steps(reader, node, x, scale, zero)
    attrs = {"scale": SIGN_STEP, "zero_point": 1, "bits": 1}
    name = reader.fresh(f"{node.output}.codes")
    codes = reader.emit(node, "Quantize", (x,), kind, out=name, name=name, attrs=attrs)
    simple = step is not None and offset == 0
    pair = {"scale": 2 * step if step is not None and simple else 2.0, "zero_point": 0}
    floats = TensorType("float32", kind.shape)
    told = reader.emit(node, "Dequantize", (codes,), floats, attrs=pair)
    if simple:
        assert step is not None
        reader.binary(node, "Add", told, -step, out=node.output, name=node.name)
        return
    reader.keep_float(node, "its scale is not one number, or it has a zero point")
    _scaled(reader, node, reader.binary(node, "Add", told, -1.0), scale, zero)


def _steps(reader: Reader, node: Node, x: str, scale: Operand, zero: Operand) -> str:
    value = reader.binary(node, "Div", x, scale)
    return value if _number(zero) == 0 else reader.binary(node, "Add", value, zero)


def _scaled(reader: Reader, node: Node, value: str, scale: Operand, zero: Operand) -> None:
    if _number(zero) != 0:
        value = reader.binary(node, "Sub", value, zero)
    reader.binary(node, "Mul", value, scale, out=node.output, name=node.name)


def _round(reader: Reader, node: Node, value: str, mode: str) -> str:
    """Round float32 steps to integers, ties and directions as the mode says."""
    if mode in _HALF_EVEN:
        return reader.unary(node, "Round", value)
    if mode in ("CEIL", "FLOOR"):
        return reader.unary(node, mode.capitalize(), value)
    size = reader.unary(node, "Abs", value)
    match mode:
        case "UP":
            size = reader.unary(node, "Ceil", size)
        case "DOWN":
            size = reader.unary(node, "Floor", size)
        case "HALF_UP":
            size = reader.unary(node, "Floor", reader.binary(node, "Add", size, 0.5))
        case _:
            size = reader.unary(node, "Ceil", reader.binary(node, "Sub", size, 0.5))
    return reader.binary(node, "Mul", size, reader.unary(node, "Sign", value))


# ---- constants -----------------------------------------------------------------------------------


def _constant(
    reader: Reader,
    node: Node,
    array: Array,
    scale: Array,
    zero: Array,
    bits: Array,
    mode: str,
    *,
    signed: bool,
    narrow: bool,
) -> None:
    if not np.isfinite(array).all():
        raise ModelError(f"{_label(node)} quantizes a constant that is not finite; export it again")
    x = array.astype(np.float32)
    steps = x / scale + zero
    steps = np.asarray(steps, np.float32)
    if signed and bits.max() == 1:
        integers = np.where(steps >= 0, 1.0, -1.0)
        reader.define_weights(node, node.output, integers, scale, zero, 1, "odd")
        return
    low, high = _limits(bits, signed=signed, narrow=narrow)
    integers = round_steps(np.clip(steps, low, high).astype(np.float32), mode)
    reader.define_weights(node, node.output, integers, scale, zero, int(bits.max()))


def round_steps(x: Array, mode: str) -> Array:
    """Round float32 to integers as the qonnx package does in each of its modes."""
    size, sign = np.abs(x), np.sign(x)
    half = np.float32(0.5)
    rounded: Mapping[str, Callable[[], Array]] = {
        "ROUND": lambda: np.rint(x),
        "HALF_EVEN": lambda: np.rint(x),
        "CEIL": lambda: np.ceil(x),
        "FLOOR": lambda: np.floor(x),
        "UP": lambda: sign * np.ceil(size),
        "DOWN": lambda: np.trunc(x),
        "HALF_UP": lambda: sign * np.floor(size + half),
        "HALF_DOWN": lambda: sign * np.ceil(size - half),
    }
    return rounded[mode]()


# ---- operands ------------------------------------------------------------------------------------


def _operands(node: Node, count: int) -> tuple[str, ...]:
    if len(node.inputs) != count or not all(node.inputs):
        raise ModelError(f"{_label(node)} has {len(node.inputs)} operands, not {count}")
    return node.inputs


def _rounding(node: Node, default: str) -> str:
    mode = node.str_attr("rounding_mode", default).upper()
    mode = _BREVITAS.get(mode, mode)
    if mode not in ROUNDINGS:
        raise ModelError(
            f"{_label(node)} rounds by {mode!r}, which cannot be kept exact; known: "
            f"{', '.join(ROUNDINGS)}"
        )
    return mode


def _operand(reader: Reader, node: Node, name: str, what: str, shape: tuple[int, ...]) -> Operand:
    """A constant of any broadcastable shape, or the name of a value that data decide."""
    array, given = reader.array(name), reader.shape(name)
    try:
        fits = np.broadcast_shapes(given, shape) == shape
    except ValueError:
        fits = False
    if not fits and int(np.prod(given)) != 1:
        raise ModelError(
            f"{_label(node)} has a {what} of shape {list(given)}, which does not broadcast to "
            f"{list(shape)}; export it again"
        )
    if array is not None:
        return array.astype(np.float32).reshape(given if fits else ())
    name = reader.as_float(node, name)
    return name if fits else reader.reshape(node, name, ())


def _fixed(reader: Reader, node: Node, name: str, what: str, shape: tuple[int, ...]) -> Array:
    operand = _operand(reader, node, name, what, shape)
    if isinstance(operand, str):
        raise ModelError(f"the {what} of {_label(node)} depends on the data; export with constants")
    return operand


def _widths(reader: Reader, node: Node, name: str, shape: tuple[int, ...]) -> Array:
    bits = _fixed(reader, node, name, "bit width", shape)
    if not np.isfinite(bits).all() or np.any(bits % 1) or bits.min() < 1 or bits.max() > MAX_BITS:
        worst = bits.reshape(-1)[np.argmax(~((bits.reshape(-1) >= 1) & (bits.reshape(-1) <= 32)))]
        raise ModelError(
            f"{_label(node)} has the bit width {worst:g}; whole numbers from 1 to {MAX_BITS} are "
            "read: export it again"
        )
    return bits.astype(np.int64)


def _limits(bits: Array, *, signed: bool, narrow: bool) -> tuple[Array, Array]:
    """Lowest and highest integer of each width: int64, shaped as ``bits``."""
    if signed:
        half = 2 ** (bits - 1)
        return -half + int(narrow), half - 1
    return np.zeros_like(bits), 2**bits - 1 - int(narrow)


def _grid(low: Array, high: Array, *, signed: bool) -> Grid:
    lowest, highest = int(low.min()), int(high.max())
    if signed:
        bits = highest.bit_length() + 1
        return Grid(lowest, highest, bits, 2 ** (bits - 1))
    return Grid.between(lowest, highest)


def _number(operand: Operand) -> float | None:
    if isinstance(operand, str) or not operand.size:
        return None
    flat = operand.reshape(-1)
    return float(flat[0]) if (flat == flat[0]).all() else None


def _label(node: Node) -> str:
    return f"{node.op} {node.name!r}"


Handler = Callable[[Reader, Node], None]

_OPERATORS: Mapping[str, Handler] = {
    "Quant": quant,
    "IntQuant": quant,
    "BipolarQuant": bipolar_quant,
    "Trunc": trunc,
    "FloatQuant": float_quant,
}

READERS: Mapping[str, Handler] = {
    f"{domain}::{op}": read for domain in DOMAINS for op, read in _OPERATORS.items()
}

_COUNTS = {"Quant": 4, "IntQuant": 4, "BipolarQuant": 2, "Trunc": 5, "FloatQuant": 1}

OPERANDS: Mapping[str, tuple[Sequence[int], int]] = {
    f"{domain}::{op}": (range(count), 99) for domain in DOMAINS for op, count in _COUNTS.items()
}
