"""What the readers of the quantized dialects share: grids, codes, weights, and how to write them.

Files hold codes in many integer types; the graph holds them as uint8, ``code = integer + shift``,
so that the lowest integer of the type (or of the width that a Clip tells) is code 0. What does
not fit eight bits is held as float32 that are integers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from mpqc.errors import ModelError
from mpqc.graph import Array, Attribute, Graph, Node, TensorType
from mpqc.numerics import along

INTEGER_BITS = {
    "int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16,
    "int32": 32, "uint32": 32,
}  # fmt: skip
_CONTAINERS = {"int2": "int8", "int4": "int8", "uint2": "uint8", "uint4": "uint8"}
MAX_WEIGHT = 2**15 - 1
_KERNEL_BITS = 8
MAX_FOLDED_ELEMENTS = 2**26

Operand: TypeAlias = Array | str  # a constant, or the name of a value that data decide


def container(dtype: str) -> str:
    """The element type in which numpy and the library hold an element type of ONNX."""
    return _CONTAINERS.get(dtype, dtype)


@dataclass(frozen=True)
class Grid:
    """The integers that a quantizer can give.

    Attributes:
        low: the lowest, in the file's own numbers; high: the highest.
        bits: width of the codes.
        shift: what codes exceed the integers by.
    """

    low: int
    high: int
    bits: int
    shift: int

    @classmethod
    def between(cls, low: int, high: int) -> "Grid":
        """Integers of the narrowest width that has them all."""
        if low >= 0:
            return cls(low, high, max(1, high.bit_length()), 0)
        bits = 1 + max((-low - 1).bit_length(), max(high, 0).bit_length())
        return cls(low, high, bits, 2 ** (bits - 1))

    @classmethod
    def of(cls, dtype: str) -> "Grid":
        """All integers of an element type."""
        bits = INTEGER_BITS[dtype]
        if dtype.startswith("u"):
            return cls(0, 2**bits - 1, bits, 0)
        return cls(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, bits, 2 ** (bits - 1))

    def within(self, low: int, high: int) -> "Grid":
        """The part between two bounds, at the width that it needs."""
        return Grid.between(min(max(self.low, low), self.high), max(min(self.high, high), self.low))

    def with_zero(self, zero_point: float | None, dtype: str) -> "Grid":
        """The same integers, in codes that the zero point has one of.

        They start at the lowest integer where that takes fewer bits, and have the type's width if
        the zero point has no code at their own.
        """
        if zero_point is None:
            return self
        least = max(1, (self.high - self.low).bit_length())
        if least < self.bits and 0 <= zero_point - self.low < 2**least:
            return replace(self, bits=least, shift=-self.low)
        if 0 <= zero_point + self.shift < 2**self.bits:
            return self
        whole = Grid.of(dtype)
        return replace(self, bits=whole.bits, shift=whole.shift)


@dataclass(frozen=True)
class Codes:
    """How the graph holds a value that the file holds in a narrow integer type.

    Attributes:
        value: its name in the graph: uint8 codes, or float32 that are integers.
        dtype: the file's element type.
        shift: what uint8 codes exceed the file's integers by.
        exact: the value is float32 instead of codes.
    """

    value: str
    dtype: str
    shift: int = 0
    exact: bool = False


@dataclass(frozen=True)
class Integers:
    """A constant of the file in an integer type.

    Attributes:
        array: int64, the file's numbers.
        dtype: the file's element type.
        bits: its true width: that of the type, or of a Clip.
    """

    array: Array
    dtype: str
    bits: int


@dataclass(frozen=True)
class Weights:
    """A quantized constant: ``values * scale``.

    Attributes:
        values: int16, of any shape.
        scale: float32 along ``axis``, or of one element.
        bits: the true width.
        levels: "signed" or "odd".
    """

    values: Array
    scale: Array
    axis: int
    bits: int
    levels: str = "signed"

    def array(self) -> Array:
        """What the constant stands for, float32."""
        scale = along(self.scale, self.axis, self.values.ndim)
        return np.asarray(self.values.astype(np.float32) * scale, np.float32)


@dataclass(frozen=True)
class Kept:
    """A node of a quantized model that computes in float, and why."""

    node: str
    reason: str


@dataclass
class Reader:
    """Collects the nodes of the graph that is read; one for a walk over the nodes in order."""

    source: Graph
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    types: dict[str, TensorType] = field(default_factory=dict)
    codes: dict[str, Codes] = field(default_factory=dict)
    integers: dict[str, Integers] = field(default_factory=dict)
    weights: dict[str, Weights] = field(default_factory=dict)
    absorbed: set[str] = field(default_factory=set)
    kept: list[Kept] = field(default_factory=list)
    _written: dict[str, str] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._taken = set(self.source.types) | {node.name for node in self.source}
        for name, array in self.source.constants.items():
            bits = INTEGER_BITS.get(str(array.dtype))
            if bits is not None and str(array.dtype) != "uint32":
                self.integers[name] = Integers(array.astype(np.int64), str(array.dtype), bits)

    # -- what the file says ---------------------------------------------------------------------

    def array(self, name: str) -> Array | None:
        """A constant's values: of the file, or read from it; None where data decide."""
        if name in self.constants:
            return self.constants[name]
        if name in self.weights:
            return self.weights[name].array()
        if name in self.source.constants:
            return self.source.constants[name]
        if name in self.integers:
            found = self.integers[name]
            return found.array.astype(container(found.dtype))
        return None

    def dtype(self, name: str) -> str:
        """Element type of a value in the file."""
        return self.source.type(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def only_reader(self, value: str) -> Node | None:
        """The node that alone reads a value of the file, if there is one."""
        readers = self.source.consumers(value)
        if len(readers) != 1 or value in self.source.outputs:
            return None
        return readers[0]

    # -- writing --------------------------------------------------------------------------------

    def fresh(self, base: str) -> str:
        """A name that neither graph has."""
        name, serial = base, 1
        while name in self._taken:
            name, serial = f"{base}_{serial}", serial + 1
        self._taken.add(name)
        return name

    def constant(self, node: Node, what: str, array: Array) -> str:
        """Name of a new constant."""
        name = self.fresh(f"{node.name}.{what}")
        self.constants[name] = array
        return name

    def emit(
        self,
        node: Node,
        op: str,
        inputs: Sequence[str],
        kind: TensorType,
        *,
        out: str = "",
        name: str = "",
        attrs: Mapping[str, Attribute] | None = None,
    ) -> str:
        """Append a node; returns its output's name, made up from the node's unless given."""
        target = out or self.fresh(f"{node.name}.{op.lower()}")
        self.types[target] = kind
        if not name:  # a value of the file may have the name of its node
            name = self.fresh(f"{node.name}.{op.lower()}") if out else target
        self.nodes.append(Node(name, op, tuple(inputs), (target,), dict(attrs or {})))
        return target

    def number(self, node: Node, what: str, operand: Operand | float) -> str:
        """Name of a float32 operand."""
        if isinstance(operand, str):
            return operand
        return self.constant(node, what, np.asarray(operand, np.float32))

    def binary(
        self, node: Node, op: str, left: str, right: Operand | float, out: str = "", name: str = ""
    ) -> str:
        """``op(left, right)`` in float32."""
        other = self.number(node, op.lower(), right)
        shape = np.broadcast_shapes(self.shape_of(left), self.shape_of(other))
        return self.emit(node, op, (left, other), TensorType("float32", shape), out=out, name=name)

    def unary(self, node: Node, op: str, value: str, out: str = "") -> str:
        return self.emit(node, op, (value,), TensorType("float32", self.shape_of(value)), out=out)

    def cast(self, node: Node, value: str, dtype: str, out: str = "") -> str:
        """The value in another element type."""
        from mpqc.onnx_nodes import element_type

        kind = TensorType(dtype, self.shape_of(value))
        return self.emit(node, "Cast", (value,), kind, out=out, attrs={"to": element_type(dtype)})

    def reshape(self, node: Node, value: str, shape: tuple[int, ...]) -> str:
        """The value in another shape."""
        wanted = self.constant(node, "shape", np.asarray(shape, np.int64))
        return self.emit(node, "Reshape", (value, wanted), TensorType(self._dtype(value), shape))

    def as_float(self, node: Node, value: str) -> str:
        """The value in float32, which quantizers read."""
        return value if self._dtype(value) == "float32" else self.cast(node, value, "float32")

    def _dtype(self, value: str) -> str:
        if value in self.types:
            return self.types[value].dtype
        if value in self.constants:
            return str(self.constants[value].dtype)
        return container(self.source.type(value).dtype)

    def shape_of(self, value: str) -> tuple[int, ...]:
        if value in self.types:
            return self.types[value].shape
        if value in self.constants:
            return self.constants[value].shape
        return self.source.shape(value)

    def keep_float(self, node: Node, reason: str) -> None:
        """List a node that stays float."""
        self.kept.append(Kept(node.name, reason))

    # -- constants ------------------------------------------------------------------------------

    def define(self, node: Node, out: str, array: Array) -> None:
        """A value of the file is a constant of the graph."""
        self.constants[out] = array

    def define_weights(
        self, node: Node, out: str, integers: Array, scale: Array, zero_point: Array, bits: int,
        levels: str = "signed",
    ) -> None:  # fmt: skip
        """A quantized constant: integers, and a scale and a zero point that broadcast to them."""
        values = integers.astype(np.float64) - zero_point.astype(np.float64)
        exact = np.asarray(values.astype(np.float32) * scale.astype(np.float32), np.float32)
        varying = [axis for axis, n in enumerate(scale.shape[::-1]) if n > 1]
        fits = not values.size or (np.abs(values).max() <= MAX_WEIGHT and not np.any(values % 1))
        if values.ndim < 2 or bits > 16:
            self.define(node, out, exact)
            return
        if len(varying) > 1 and fits and (common := _common_step(values, scale)) is not None:
            values, scale = common  # powers of two, say: in steps of the smallest
            varying, bits = [], max(bits, Grid.between(int(values.min()), int(values.max())).bits)
        if len(varying) > 1 or not fits:
            reason = "its scales vary along several axes" if fits else "its integers need > 16 bits"
            self.keep_float(node, f"the constant is float: {reason}")
            self.define(node, out, exact)
            return
        axis = values.ndim - 1 - varying[0] if varying else 0
        # blocks of real files have negative scales, and zero where all is zero
        values = np.where(scale == 0, 0, np.where(scale < 0, -values, values))
        flat = np.abs(np.where(scale == 0, 1, scale)).astype(np.float32).reshape(-1)
        self.weights[out] = Weights(values.astype(np.int16), flat, axis, bits, levels)

    def move_weights(self, node: Node) -> bool:
        """Fold a node that only moves elements into the quantized constant that it moves."""
        moved = self.weights.get(node.inputs[0]) if node.inputs else None
        if moved is None:
            return False
        values, shape = moved.values, self.shape(node.output)
        if node.op == "Transpose":
            perm = node.ints_attr("perm", tuple(reversed(range(values.ndim))))
            axis = perm.index(moved.axis)
            self.weights[node.output] = replace(moved, values=values.transpose(perm), axis=axis)
            return True
        if node.op not in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"):
            return False
        before = int(np.prod(values.shape[: moved.axis]))
        axes = [
            axis
            for axis, extent in enumerate(shape)
            if extent == values.shape[moved.axis] and int(np.prod(shape[:axis])) == before
        ]
        if moved.scale.size > 1 and not axes:
            return False
        axis = axes[0] if axes else 0
        self.weights[node.output] = replace(moved, values=values.reshape(shape), axis=axis)
        return True

    def write_weights(self, name: str) -> None:
        """Write a quantized constant as a node, once."""
        found = self.weights[name]
        if name in self._written or name in self.constants:
            return
        self._written[name] = name
        maker = self.source.producer(name)
        base = maker.name if maker is not None else name
        values, scale = self.fresh(f"{base}.integers"), self.fresh(f"{base}.scale")
        self.constants |= {values: found.values, scale: found.scale}
        self.types[name] = TensorType("float32", found.values.shape)
        attrs: dict[str, Attribute] = {
            "axis": found.axis, "bits": found.bits, "levels": found.levels
        }  # fmt: skip
        self.nodes.append(Node(base, "DequantizeWeights", (values, scale), (name,), attrs))

    # -- activations ----------------------------------------------------------------------------

    def quantize(
        self,
        node: Node,
        x: str,
        out: str,
        scale: Operand,
        zero_point: Operand,
        grid: Grid,
        dtype: str,
        name: str = "",
    ) -> None:
        """``clip(rint(x / scale) + zero_point, low, high)``: the value ``out`` of the file.

        Args:
            node: of the file; gives its name to what is written.
            x: float32.
            out: of an integer type in the file.
            scale: broadcasts to x, as zero_point does.
            zero_point: integers, in the file's numbers.
            grid: integers that it gives.
            dtype: the file's element type.
            name: of the Quantize; the node's own by default.
        """
        shape = self.shape_of(x)
        step, offset = _scalar(scale), _scalar(zero_point)
        grid = grid.with_zero(offset, dtype)
        wide = grid.bits > 8
        value = self._codes_name(out, dtype, plain=not wide and grid.shift == 0)
        self.codes[out] = Codes(value, dtype, 0 if wide else grid.shift, wide)
        if wide:
            self.keep_float(node, f"activations of {grid.bits} bits are float: at most 8 are codes")
        elif step is None or offset is None:
            self.keep_float(node, "its scale or zero point is not one number: it divides in float")
        if step is not None and offset is not None and not wide:
            attrs = quantize_attrs(step, int(offset), grid)
        else:
            x = self.binary(node, "Div", x, _along(scale))
            if offset is None or wide:
                x = self.unary(node, "Round", x)
                x = x if offset == 0 else self.binary(node, "Add", x, _along(zero_point))
                offset = 0
            if wide:
                self.clip(node, x, float(grid.low), float(grid.high), value)
                return
            attrs = quantize_attrs(1.0, int(offset), grid)
        kind = TensorType("uint8", shape)
        self.emit(node, "Quantize", (x,), kind, out=value, name=name or node.name, attrs=attrs)

    def dequantize(
        self, node: Node, codes: Codes, out: str, scale: Operand, zero_point: Operand,
        dtype: str = "float32", name: str = "",
    ) -> None:  # fmt: skip
        """``(integer - zero_point) * scale``: the float value ``out`` of the file."""
        step, offset = _scalar(scale), _scalar(zero_point)
        target = out if dtype == "float32" else self.fresh(f"{out}.f32")
        kind = TensorType("float32", self.shape_of(codes.value))
        name = name or node.name
        inside = offset is not None and 0 <= offset + codes.shift <= 255 and offset % 1 == 0
        if not codes.exact and step is not None and inside:
            assert offset is not None
            attrs = {"scale": step, "zero_point": int(offset) + codes.shift}
            self.emit(node, "Dequantize", (codes.value,), kind, out=target, name=name, attrs=attrs)
        else:
            value = self.numbers(node, codes)
            if offset != 0:
                value = self.binary(node, "Sub", value, _along(zero_point))
            self.binary(node, "Mul", value, _along(scale), out=target, name=name)
        if target != out:
            self.cast(node, target, dtype, out)

    def numbers(self, node: Node, codes: Codes) -> str:
        """The file's integers as float32."""
        if codes.exact:
            return codes.value
        known = self._written.get(f"{codes.value}/numbers")
        if known is not None:
            return known
        kind = TensorType("float32", self.shape_of(codes.value))
        attrs: dict[str, Attribute] = {"scale": 1.0, "zero_point": codes.shift}
        base = self.fresh(f"{codes.value}.numbers")
        value = self.emit(node, "Dequantize", (codes.value,), kind, out=base, attrs=attrs)
        self._written[f"{codes.value}/numbers"] = value
        return value

    def clip(self, node: Node, x: str, low: float, high: float, out: str = "") -> str:
        """Clip x, float32, to two bounds."""
        bounds = [self.number(node, "low", low), self.number(node, "high", high)]
        kind = TensorType("float32", self.shape_of(x))
        return self.emit(node, "Clip", (x, *bounds), kind, out=out)

    def _codes_name(self, out: str, dtype: str, *, plain: bool) -> str:
        """Codes take the value's name unless the file's caller gets it in another form."""
        if out in self.source.outputs and not (plain and container(dtype) == "uint8"):
            return self.fresh(f"{out}.codes")
        return out

    def moved_codes(self, out: str, given: Codes) -> Codes:
        """Codes of a value of the file whose integers are those of another, moved."""
        plain = given.shift == 0 and not given.exact
        return replace(given, value=self._codes_name(out, given.dtype, plain=plain))

    def codes_of(self, node: Node, name: str) -> Codes:
        """The codes of any value of an integer type of at most 16 bits, or float32 integers."""
        if name in self.codes:
            return self.codes[name]
        dtype = self.dtype(name)
        known = self.integers.get(name)
        if known is not None:
            made = self._constant_codes(node, known)
        elif container(dtype) == "uint8":
            made = Codes(name, dtype)
        elif container(dtype) == "int8":
            value = self.cast(node, name, "float32")
            kind = TensorType("uint8", self.shape(name))
            attrs = quantize_attrs(1.0, 0, Grid.of("int8"))
            coded = self.emit(node, "Quantize", (value,), kind, attrs=attrs)
            made = Codes(coded, dtype, 128)
        else:
            made = Codes(self.cast(node, name, "float32"), dtype, exact=True)
        self.codes[name] = made
        return made

    def _constant_codes(self, node: Node, known: Integers) -> Codes:
        grid = Grid.of(known.dtype)
        if grid.bits > 8:
            value = self.constant(node, "integers", known.array.astype(np.float32))
            return Codes(value, known.dtype, exact=True)
        codes = (known.array + grid.shift).astype(np.uint8)
        return Codes(self.constant(node, "codes", codes), known.dtype, grid.shift)

    def file_value(self, name: str) -> str:
        """A value as the file's other operators expect it: its own element type, written once."""
        if name in self.weights:
            self.write_weights(name)
            return name
        if name in self.integers:
            known = self.integers[name]
            if name not in self.source.constants:
                self.constants[name] = known.array.astype(container(known.dtype))
            return name
        codes = self.codes.get(name)
        maker = self.source.producer(name)
        if codes is None or maker is None:
            return name
        if name in self._written:
            return self._written[name]
        dtype = container(codes.dtype)
        if dtype == "uint8" and codes.shift == 0 and not codes.exact:
            self._written[name] = codes.value
            return codes.value
        out = name if codes.value != name else self.fresh(f"{name}.{dtype}")
        self._written[name] = self.cast(maker, self.numbers(maker, codes), dtype, out)
        return out


def _common_step(values: Array, scale: Array) -> tuple[Array, Array] | None:
    """The same numbers as integers of at most 8 bits times one scale, where there is one."""
    if not values.size or not (scale > 0).all():
        return None
    step = scale.min()
    times = scale.astype(np.float64) / step
    wide = values * times
    if np.any(times % 1) or np.abs(wide).max() > 2 ** (_KERNEL_BITS - 1) - 1:
        return None
    return wide, np.asarray(step, np.float32).reshape(1)


def quantize_attrs(scale: float, zero_point: int, grid: Grid) -> dict[str, Attribute]:
    """Attributes of a Quantize that gives the grid's integers, shifted to codes."""
    attrs: dict[str, Attribute] = {
        "scale": float(scale), "zero_point": zero_point + grid.shift, "bits": grid.bits
    }  # fmt: skip
    low, high = grid.low + grid.shift, grid.high + grid.shift
    if (low, high) != (0, 2**grid.bits - 1):
        attrs |= {"low": low, "high": high}
    return attrs


def _scalar(operand: Operand) -> float | None:
    """The number that an operand is everywhere, if it is one."""
    if isinstance(operand, str) or not operand.size:
        return None
    flat = operand.reshape(-1)
    return float(flat[0]) if (flat == flat[0]).all() else None


def _along(operand: Operand) -> Operand:
    if isinstance(operand, str):
        return operand
    number = _scalar(operand)
    return operand.astype(np.float32) if number is None else np.asarray(number, np.float32)


def check_scale(node: Node, scale: Array, *, constant: bool = False) -> None:
    """Refuse scales that no quantizer can have; those of constants may have any sign."""
    wide = scale.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ModelError(f"{node.op} {node.name!r} has a scale that is not finite; export it again")
    if not constant and (wide <= 0).any():
        raise ModelError(
            f"{node.op} {node.name!r} has the scale {wide.min():g}; scales must be positive: "
            "export it again"
        )
