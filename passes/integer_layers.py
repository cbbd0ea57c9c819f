"""integer-layers: layers between quantizers compute on the codes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from mpqc.errors import PassError
from mpqc.graph import Array, Attribute, Graph, Node, TensorType
from mpqc.numerics import along, odd_bits
from mpqc.passes.base import Pass, fresh
from mpqc.passes.drop_dead import DropDead
from mpqc.passes.fold_batch_norm import Vector, next_affine
from mpqc.passes.fuse_requantize import clip_bounds
from mpqc.passes.moves import moves

LAYERS = ("Conv", "Gemm", "MatMul")
INTEGER_LAYERS = ("IntConv", "IntMatMul")
ACCUMULATOR = 2**31  # int32


@dataclass(frozen=True)
class FloatLayer:
    """A layer of a quantized model that computes in float.

    Attributes:
        node: its name.
        reason: half a sentence for the user.
    """

    node: str
    reason: str


@dataclass(frozen=True)
class IntegerLayers(Pass):
    """Before: what other tools call a fake-quantized model. After: layers on codes.

        %d = Dequantize(%q)
        %v = DequantizeWeights(%w, %s)
        %y = Conv(%d, %v, %b)
        =>
        %y.acc = IntConv(%q, %w)
        %y = Affine(%y.acc, %m, %b)

    Codes are followed through operators that only move them, and scales and shifts by channel
    behind a layer (BatchNormalization) become part of its Affine. Values of one sign bit,
    ``s * (2 u - 1)``, have no integer zero point: what their shift adds to a sum is constant and
    goes into the bias; where a convolution pads, the codes are doubled instead. Weights that no
    layer takes as integers become float constants.
    """

    name = "integer-layers"

    def rewrite(self, graph: Graph) -> Graph:
        return integer_layers(graph)[0]


def integer_layers(graph: Graph) -> tuple[Graph, tuple[FloatLayer, ...]]:
    """The graph with its layers on codes, and those that stay in float, with the reasons."""
    writer = _Writer(graph)
    for node in graph:
        if node.name not in writer.absorbed:
            writer.write(node)
    return DropDead().rewrite(writer.graph()), tuple(writer.floats)


@dataclass(frozen=True)
class _Codes:
    """A float value told by codes: ``scale * (code - zero_point) + shift``.

    Attributes:
        value: name of the uint8 codes.
        scale: of one step; times ``channels`` where they are given.
        zero_point: integer.
        shift: of the whole tensor.
        bits: width.
        channels: float32 [C] factors along axis 1, or None.
    """

    value: str
    scale: float
    zero_point: int
    bits: int
    shift: float = 0.0
    channels: Array | None = None


class _NotCodes(Exception):  # noqa: N818 - a reason, not an error
    """Why a value or a layer cannot compute on codes."""


@dataclass
class _Writer:
    source: Graph
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    types: dict[str, TensorType] = field(default_factory=dict)
    floats: list[FloatLayer] = field(default_factory=list)
    absorbed: set[str] = field(default_factory=set)
    known: dict[str, _Codes] = field(default_factory=dict)

    def write(self, node: Node) -> None:
        if node.op == "DequantizeWeights":
            self._plain_weights(node)
            return
        if node.op in LAYERS and self._is_quantized(node):
            try:
                self._layer(node)
                return
            except _NotCodes as reason:
                self.floats.append(FloatLayer(node.name, str(reason)))
        self.nodes.append(self._narrowed(node) if node.op in INTEGER_LAYERS else node)

    def graph(self) -> Graph:
        types = {**self.source.types, **self.types}
        kept = {name: types[name] for node in self.nodes for name in node.outputs if name}
        return self.source.with_(self.nodes, constants=self.constants, types=kept)

    def _is_quantized(self, node: Node) -> bool:
        """Whether anything at the node is quantized; others are nobody's disappointment."""
        makers = [self.source.producer(name) for name in node.inputs if name]
        return any(m is not None and m.op in ("Dequantize", "DequantizeWeights") for m in makers)

    def _plain_weights(self, node: Node) -> None:
        """The constant that it stands for, under its name; dead where the layer takes codes."""
        values, scale = (self.source.constants[name] for name in node.inputs)
        axis = node.int_attr("axis", 0)
        self.constants[node.output] = np.asarray(
            values.astype(np.float32) * along(scale.reshape(-1), axis, values.ndim), np.float32
        )

    # Layers ----------------------------------------------------------------------------------

    def _narrowed(self, node: Node) -> Node:
        """ConvInteger as the width of its operands: its types say 8 bits, whatever they hold."""
        values = self.source.constants.get(node.inputs[1])
        if values is None or node.str_attr("weight_levels", "signed") != "signed":
            return node
        attrs = dict(node.attrs)
        brought = node.int_attr("activation_bits", 8)
        attrs["activation_bits"] = min(brought, self._bits(node.inputs[0]))
        if (odd := odd_bits(values)) is not None:
            return replace(node, attrs={**attrs, "weight_bits": odd, "weight_levels": "odd"})
        low, high = int(values.min(initial=0)), int(values.max(initial=0))
        bits = max(2, (-low - 1).bit_length() + 1 if low < 0 else 2, high.bit_length() + 1)
        attrs["weight_bits"] = min(node.int_attr("weight_bits", 8), bits)
        return replace(node, attrs=attrs)

    def _layer(self, node: Node) -> None:
        values, scale, bits, levels = self._weights(node)
        codes = self._codes(node.inputs[0])
        convolution = node.op == "Conv"
        scale = self._with_channels(node, codes, values, scale)
        shape = self.source.shape(node.output)
        axis = 1 if convolution else len(shape) - 1
        bias = self._bias(node, shape[axis])
        factor = np.float32(codes.scale) * scale
        if codes.shift:
            codes, factor, bias = self._unshifted(node, codes, values, scale, factor, bias)
        self._check_sums(node, values, codes)
        output, factor, bias = self._absorb(node, axis, factor, bias)
        self._emit(node, codes, values, factor, bias, output, axis, bits, levels)

    def _weights(self, node: Node) -> tuple[Array, Array, int, str]:
        """Integers as the integer operators take them, scale [O], width, levels."""
        name = node.inputs[1]
        made = self.source.producer(name)
        if made is None or made.op != "DequantizeWeights":
            if name in self.source.constants:
                raise _NotCodes("its weights are not quantized")
            raise _NotCodes(f"its weights are computed by {made.op}" if made else "no weights")
        values, scale = (self.source.constants[n] for n in made.inputs)
        scale, axis = scale.reshape(-1), made.int_attr("axis", 0) % max(values.ndim, 1)
        ranks = (3, 4) if node.op == "Conv" else (2,)
        if values.ndim not in ranks:
            raise _NotCodes(f"its weights have {values.ndim} dimensions")
        if node.op == "Gemm":
            if node.int_attr("transA", 0):
                raise _NotCodes("transA is set")
            if node.int_attr("transB", 0):
                values, axis = values.T, 1 - axis
            scale = scale * np.float32(node.float_attr("alpha") if "alpha" in node.attrs else 1)
        channels = 0 if node.op == "Conv" else 1
        if scale.size > 1 and axis != channels:
            raise _NotCodes("the scales of its weights do not go by output channel")
        scale = np.broadcast_to(scale, values.shape[channels : channels + 1])
        bits, levels = made.int_attr("bits"), made.str_attr("levels", "signed")
        if (odd := odd_bits(values)) is not None:
            return values, np.array(scale, np.float32), odd, "odd"
        low, high = int(values.min(initial=0)), int(values.max(initial=0))
        if bits > 8 or high - low > 255:
            raise _NotCodes(f"its weights have {max(bits, 9)} bits, kernels take 8")
        if levels == "signed":  # codes around another zero point may need one bit more
            while bits < 8 and not -(2 ** (bits - 1)) <= low <= high < 2 ** (bits - 1):
                bits += 1
        return values, np.array(scale, np.float32), bits, levels

    def _bias(self, node: Node, channels: int) -> Array:
        """float32 [O]; zeros where there is none."""
        name = node.inputs[2] if len(node.inputs) > 2 else ""
        if not name:
            return np.zeros(channels, np.float32)
        bias = self.source.constants.get(name)
        if bias is None:
            raise _NotCodes("its bias is computed")
        if bias.size not in (1, channels) or (bias.ndim > 1 and bias.shape[-1] != bias.size):
            raise _NotCodes(f"its bias has shape {list(bias.shape)}, not one value a channel")
        beta = np.float32(node.float_attr("beta") if "beta" in node.attrs else 1)
        return np.array(np.broadcast_to(bias.reshape(-1), (channels,)), np.float32) * beta

    def _with_channels(self, node: Node, codes: _Codes, values: Array, scale: Array) -> Array:
        """Scales of the weights, the input's scales by channel in them where these fit."""
        if codes.channels is None:
            return scale
        depthwise = node.op == "Conv" and values.shape[1] == 1
        if not depthwise or node.int_attr("group", 1) != codes.channels.size:
            raise _NotCodes("its input has a scale for each channel, which it sums over")
        per_group = values.shape[0] // codes.channels.size
        return np.asarray(np.repeat(codes.channels, per_group) * scale, np.float32)

    def _unshifted(
        self, node: Node, codes: _Codes, values: Array, scale: Array, factor: Array, bias: Array
    ) -> tuple[_Codes, Array, Array]:
        """The same sums over codes without a shift."""
        padded = node.op == "Conv" and any(node.ints_attr("pads", (0,)))
        padded |= node.op == "Conv" and node.str_attr("auto_pad", "NOTSET") not in (
            "NOTSET", "VALID"
        )  # fmt: skip
        if not padded:
            taps = tuple(range(1, values.ndim)) if node.op == "Conv" else 0
            sums = values.astype(np.int64).sum(axis=taps) * scale.astype(np.float64)
            return replace(codes, shift=0.0), factor, (bias + codes.shift * sums).astype(np.float32)
        # x = scale * (u - z) + shift with shift = scale * (k + 1/2): in half steps it has a zero.
        halves = 2 * (codes.zero_point - codes.shift / codes.scale)
        if halves != np.rint(halves) or not 0 <= halves <= 2 * (2**codes.bits - 1) <= 255:
            raise _NotCodes("its padding lies between two codes of its input")
        doubled = fresh(self.source, f"{codes.value}.doubled")
        if doubled not in self.types:
            self.types[doubled] = TensorType("uint8", self._shape(codes.value))
            self.nodes.append(Node(doubled, "Add", (codes.value, codes.value), (doubled,)))
        codes = _Codes(doubled, codes.scale / 2, int(halves), codes.bits + 1)
        return codes, np.float32(0.5) * factor, bias

    def _check_sums(self, node: Node, values: Array, codes: _Codes) -> None:
        axis = tuple(range(1, values.ndim)) if node.op == "Conv" else 0
        reach = max(codes.zero_point, 2**codes.bits - 1 - codes.zero_point)
        largest = int(np.abs(values.astype(np.int64)).sum(axis=axis).max(initial=0)) * reach
        if largest >= ACCUMULATOR:
            raise _NotCodes(f"its sums can reach {largest}, beyond int32")

    def _absorb(
        self, node: Node, axis: int, factor: Array, bias: Array
    ) -> tuple[str, Array, Array]:
        """Output, scale and bias with what scales and shifts the channels behind the layer."""
        value = node.output
        scale: Vector = factor.astype(np.float64)
        shift: Vector = bias.astype(np.float64)
        while (step := next_affine(self.source, value, axis)) is not None:
            behind, by, plus = step
            with np.errstate(over="ignore", invalid="ignore"):
                wider = np.stack([scale * by, shift * by + plus]).astype(np.float32)
            if not np.isfinite(wider).all():
                break
            scale, shift = scale * by, shift * by + plus
            self.absorbed.add(behind.name)
            value = behind.output
        return value, scale.astype(np.float32), shift.astype(np.float32)

    def _emit(
        self,
        node: Node,
        codes: _Codes,
        values: Array,
        factor: Array,
        bias: Array,
        output: str,
        axis: int,
        bits: int,
        levels: str,
    ) -> None:
        w, m, b, acc = (
            fresh(self.source, f"{node.name}.{suffix}") for suffix in ("codes", "m", "b", "acc")
        )
        self.constants |= {w: np.ascontiguousarray(values, np.int16), m: factor, b: bias}
        self.types[acc] = TensorType("int32", self.source.shape(node.output))
        attrs: dict[str, Attribute] = dict(node.attrs) if node.op == "Conv" else {}
        attrs |= {
            "zero_point": codes.zero_point,
            "activation_bits": codes.bits,
            "weight_bits": bits,
            "weight_levels": levels,
        }
        op = "IntConv" if node.op == "Conv" else "IntMatMul"
        affine = fresh(self.source, f"{node.name}.affine")
        self.nodes += [
            Node(node.name, op, (codes.value, w), (acc,), attrs),
            Node(affine, "Affine", (acc, m, b), (output,), {"axis": axis}),
        ]

    # Codes -----------------------------------------------------------------------------------

    def _codes(self, value: str) -> _Codes:
        """The codes that tell a float value, moved as the value was."""
        if value not in self.known:
            self.known[value] = self._find(value)
        return self.known[value]

    def _find(self, value: str) -> _Codes:
        node = self.source.producer(value)
        if node is None:
            raise _NotCodes(f"its input {value!r} is not quantized")
        if node.op == "Dequantize":
            bits = self._bits(node.inputs[0])
            return _Codes(
                node.inputs[0], node.float_attr("scale"), node.int_attr("zero_point"), bits
            )
        if node.op == "GlobalMaxPool":  # ONNX has none of codes
            extents = self.source.shape(node.inputs[0])[2:]
            node = replace(node, op="MaxPool", attrs={"kernel_shape": extents})
        if moves(node):
            return self._moved(node, value)
        if node.op == "Concat":
            return self._joined(node)
        if node.op == "Pad":
            return self._padded(node)
        if node.op in ("Relu", "Clip"):
            return self._clipped(node)
        if node.op in ("Add", "Sub", "Mul"):
            return self._shifted(node)
        raise _NotCodes(f"its input is computed by {node.op} {node.name!r} in float")

    def _bits(self, codes: str) -> int:
        """Width of codes, through what moves them."""
        node = self.source.producer(codes)
        while node is not None and (moves(node) or node.op in ("Concat", "Pad")):
            if node.op == "Concat":
                return max(self._bits(name) for name in node.inputs)
            node = self.source.producer(node.inputs[0])
        if node is None or node.op not in ("Quantize", "Requantize"):
            return 8  # an input of the model in codes
        return node.int_attr("bits")

    def _moved(self, node: Node, value: str) -> _Codes:
        codes = self._codes(node.inputs[0])
        if codes.channels is not None and not self._keeps_channels(node, codes.channels):
            raise _NotCodes(f"{node.op} {node.name!r} moves values with a scale for each channel")
        if len(node.outputs) == 1:
            return self._emit_moved(node, value, (codes.value, *node.inputs[1:]), codes)
        for output in filter(None, node.outputs):
            name = fresh(self.source, f"{output}.codes")
            self.types[name] = TensorType("uint8", self.source.shape(output))
            self.known[output] = replace(codes, value=name)
        outputs = tuple(name and self.known[name].value for name in node.outputs)
        name = fresh(self.source, f"{node.name}.codes")
        inputs = (codes.value, *node.inputs[1:])
        self.nodes.append(replace(node, name=name, inputs=inputs, outputs=outputs))
        return self.known[value]

    def _keeps_channels(self, node: Node, factors: Array) -> bool:
        """Whether each value stays in its channel, where an order is the same as of its codes."""
        if node.op not in ("MaxPool", "Resize", "Identity"):
            return False
        before, after = (self.source.shape(name) for name in (node.inputs[0], node.output))
        return before[:2] == after[:2] and bool((factors > 0).all())

    def _padded(self, node: Node) -> _Codes:
        """A Pad with values that have a code."""
        codes = self._codes(node.inputs[0])
        inputs = [codes.value, *node.inputs[1:]]
        if node.str_attr("mode", "constant") == "constant":
            given = node.inputs[2] if len(node.inputs) > 2 else ""
            around = self.source.constants.get(given) if given else np.zeros(())
            if around is None or codes.channels is not None:
                raise _NotCodes(f"Pad {node.name!r} pads with a value that has no code")
            code = self._code(codes, float(around.reshape(())))
            if code is None or not 0 <= code < 2**codes.bits:
                raise _NotCodes(f"Pad {node.name!r} pads with a value that has no code")
            value = fresh(self.source, f"{node.output}.around")
            self.constants[value] = np.array(code, np.uint8)
            inputs[2:3] = [value]
        elif codes.channels is not None:
            raise _NotCodes(f"Pad {node.name!r} moves values with a scale for each channel")
        return self._emit_moved(node, node.output, tuple(inputs), codes)

    def _code(self, codes: _Codes, value: float) -> int | None:
        """The code of a value of the whole tensor, out of range too; None between two codes."""
        steps = float(np.rint((value - codes.shift) / codes.scale))
        if abs(steps) > 2**24:
            return None
        told = np.float32(codes.scale) * np.float32(steps) + np.float32(codes.shift)
        return int(steps) + codes.zero_point if told == np.float32(value) else None

    def _joined(self, node: Node) -> _Codes:
        parts = [self._codes(name) for name in node.inputs]
        first = parts[0]
        rules = {(p.scale, p.zero_point, p.shift) for p in parts}
        if len(rules) > 1 or any(part.channels is not None for part in parts):
            raise _NotCodes(f"Concat {node.name!r} joins values of different scales")
        widest = replace(first, bits=max(part.bits for part in parts))
        inputs = tuple(part.value for part in parts)
        return self._emit_moved(node, node.output, inputs, widest)

    def _emit_moved(
        self, node: Node, value: str, inputs: tuple[str, ...], codes: _Codes, like: str = ""
    ) -> _Codes:
        """The node once more, on codes: they tell ``value``, of the shape of ``like``."""
        name = fresh(self.source, f"{value}.codes")
        self.types[name] = TensorType("uint8", self.source.shape(like or value))
        self.nodes.append(replace(node, name=name, inputs=inputs, outputs=(name,)))
        return replace(codes, value=name)

    def _clipped(self, node: Node) -> _Codes:
        """A Relu or Clip at values that have codes, or that no value is beyond."""
        codes = self._codes(node.inputs[0])
        limits = clip_bounds(self.source, node)
        if limits is None or codes.channels is not None:
            raise _NotCodes(f"{node.op} {node.name!r} clips values between two codes")
        low, high = (self._limit(node, codes, limit) for limit in limits)
        for op, limit, reached in (
            ("Max", low, low <= 0),
            ("Min", high, high >= 2**codes.bits - 1),
        ):
            if not reached:
                bound = fresh(self.source, f"{node.output}.{op.lower()}")
                self.constants[bound] = np.array(limit, np.uint8)
                made = Node(f"{node.name}.{op.lower()}", op, (codes.value, bound))
                codes = self._emit_moved(made, bound, made.inputs, codes, node.output)
        return codes

    def _limit(self, node: Node, codes: _Codes, limit: float) -> int:
        """The code at which a Clip cuts; the nearest end where that is beyond all codes."""
        top = 2**codes.bits - 1
        ends = (codes.scale * (end - codes.zero_point) + codes.shift for end in (0, top))
        lowest, highest = ends
        if limit <= lowest or limit >= highest:
            return 0 if limit <= lowest else top
        code = self._code(codes, limit)
        if code is None:
            raise _NotCodes(f"{node.op} {node.name!r} clips values between two codes")
        return code

    def _shifted(self, node: Node) -> _Codes:
        """A constant added to all values, or channels of them multiplied."""
        given = [name for name in node.inputs if name in self.source.constants]
        told = [name for name in node.inputs if name not in self.source.constants]
        if len(given) != 1 or len(told) != 1 or (node.op == "Sub" and node.inputs[0] != told[0]):
            raise _NotCodes(f"its input is computed by {node.op} {node.name!r} in float")
        constant, codes = self.source.constants[given[0]], self._codes(told[0])
        if self.source.shape(node.output) != self.source.shape(told[0]):
            raise _NotCodes(f"its input is computed by {node.op} {node.name!r} in float")
        if node.op == "Mul":
            return self._multiplied(node, codes, constant)
        if constant.size != 1 or codes.channels is not None:
            raise _NotCodes(f"{node.op} {node.name!r} shifts the channels of its input")
        shift = float(constant.reshape(())) * (-1 if node.op == "Sub" else 1)
        return replace(codes, shift=codes.shift + shift)

    def _multiplied(self, node: Node, codes: _Codes, constant: Array) -> _Codes:
        rank = len(self.source.shape(node.output))
        extents = (1,) * (rank - constant.ndim) + constant.shape
        by_channel = all(extent == 1 for i, extent in enumerate(extents) if i != 1)
        if codes.shift or codes.channels is not None or not by_channel or constant.size == 1:
            raise _NotCodes(f"its input is scaled by Mul {node.name!r} in float")
        return replace(codes, channels=constant.reshape(-1).astype(np.float32))

    def _shape(self, value: str) -> tuple[int, ...]:
        kind = self.types.get(value) or self.source.type(value)
        return kind.shape


def widths(graph: Graph) -> Mapping[str, tuple[int, int]]:
    """Weight and activation bits of the integer layers of a graph."""
    return {
        node.name: (node.int_attr("weight_bits"), node.int_attr("activation_bits"))
        for node in graph
        if node.op in ("IntConv", "IntMatMul")
    }


def check(graph: Graph) -> None:
    """Raise PassError where a DequantizeWeights is left: float constants have to replace them."""
    left = [node.name for node in graph if node.op == "DequantizeWeights"]
    if left:
        raise PassError(f"{left[0]!r} is still a quantized constant")
