"""Which kernel runs a layer: the fastest by a model of the target's instructions, or as asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from mpqc import winograd
from mpqc.accumulators import half_chunk
from mpqc.compute import Window
from mpqc.errors import UsageError
from mpqc.graph import Array, Graph, Node, Precision
from mpqc.kernels import (
    WINOGRAD,
    Layer,
    Shape,
    bitplane_tiles,
    dot_tiles,
    flatten_pixels,
    grouped_tile,
    largest_divisor,
    lut_instruction,
    lut_slices,
    lut_tiles,
    pairs_pixels,
    popcount_instruction,
    reads_patterns,
    winograd_layer,
    winograd_tiles,
)
from mpqc.latency import Geometry, LatencyTable
from mpqc.packing import dot_weights
from mpqc.schedules.arm_intrinsics import most_product
from mpqc.schedules.conv_cpu import Tile
from mpqc.schedules.dot_intrinsics import DOTS
from mpqc.target import Target

Pads = tuple[int, int, int, int]
KERNELS = ("auto", "bitplane", "bitplane-lut", "int8")


@dataclass(frozen=True)
class Choice:
    """How one layer runs.

    Attributes:
        kind: "bitplane", "bitplane-lut" or "int8".
        variant: instruction, "and-popcount", or "multiply-add" for grouped convolutions.
        layer: geometry as the kernel sees it.
        tile: register tile.
        pads: top, left, bottom, right.
        source: (n, h, w, c) of the image before padding.
        rates: multiply-accumulates a cycle that the model expects of each kernel.
        reason: why not the kernel that was asked for; empty when it is.
        chosen: what the choice rests on: "asked", "measured" or "model".
        chunk: steps that an int8 kernel sums in int16; 0 where it does not.
    """

    kind: str
    variant: str
    layer: Layer
    tile: Tile
    pads: Pads
    source: Shape
    rates: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    chosen: str = "model"
    chunk: int = 0

    @property
    def form(self) -> str:
        """The tile as tables write it: pixels x vectors x lanes."""
        return f"{self.tile.pixels}x{self.tile.vectors}x{self.tile.lanes}"

    @property
    def winograd(self) -> bool:
        return self.variant.startswith(WINOGRAD)

    @property
    def instruction(self) -> str:
        """That multiplies, of an int8 kernel."""
        return self.variant.removeprefix(WINOGRAD)


@dataclass(frozen=True)
class Selector:
    """Chooses kernels for a target.

    Attributes:
        target: machine.
        kernel: "auto", or the kind to force.
        by_layer: layer name -> kind, from the plan; "auto" leaves it to the table or the model.
        table: latencies that were measured on the target; None: the model of its instructions.
        place: among the forms that a kernel has for a layer; 0 is the default.
        weights: of the network, where graphs that are asked about are single layers of it; None:
            they are whole.
    """

    target: Target
    kernel: str = "auto"
    by_layer: Mapping[str, str] = field(default_factory=dict)
    table: LatencyTable | None = None
    place: int = 0
    weights: int | None = None

    def __post_init__(self) -> None:
        for name in (self.kernel, *self.by_layer.values()):
            if name not in KERNELS:
                raise UsageError(f"unknown kernel {name!r}; choose one of {', '.join(KERNELS)}")

    def choose(self, graph: Graph, node: Node) -> Choice:
        """Decide for an IntConv or IntMatMul node of a channels-last graph."""
        if self.target.cuda:
            from mpqc.cuda.select import CudaSelector

            return CudaSelector(self.target.cuda, self).choose(graph, node)
        forms = self.forms(graph, node)
        if 0 < self.place < len(forms):
            return forms[self.place]
        if self.table is None:
            return forms[0]
        layer, pads, source = geometry(graph, node)
        where = table_geometry(node.op, layer, pads, source)
        precision = Precision(layer.weight_bits, layer.activation_bits)
        row = self.table.best_row(where, precision, forms[0].kind)
        named = (
            form for form in forms if row and (form.variant, form.form) == (row.variant, row.tile)
        )
        return next(named, forms[0])

    def forms(self, graph: Graph, node: Node) -> list[Choice]:
        """Variants and tiles of the kind of kernel that is best or asked for, the default first.

        ``node`` is an IntConv or IntMatMul of a channels-last graph; not for GPUs.
        """
        layer, pads, source = geometry(graph, node)
        weight = graph.constants[node.inputs[1]]
        asked = self.by_layer.get(node.name, "auto")
        asked = self.kernel if asked == "auto" else asked
        multiplies = _int8_multiplies(layer, weight, self.target)
        kept = (count_weights(graph) if self.weights is None else self.weights) <= _SMALL
        rates = expected_rates(layer, multiplies[0], self.target, kept)
        coded = has_codes(node, weight)
        if not coded:
            rates = {"int8": rates["int8"]}
        kind, reason, chosen = asked, "", "asked"
        where = table_geometry(node.op, layer, pads, source)
        if asked == "auto":
            kind, chosen = self._fastest(where, layer, rates)
        elif asked not in rates and not coded:
            kind, reason = "int8", f"no {asked} kernel: its weights have no code of eight bits"
        elif asked not in rates:
            kind, reason = "bitplane", f"no {asked} kernel: {_no_lut(layer, self.target)}"
        return [
            replace(form, rates=rates, reason=reason, chosen=chosen)
            for form in self._shaped(kind, layer, multiplies, pads, source)
        ]

    def _fastest(
        self, shape: Geometry, layer: Layer, rates: Mapping[str, float]
    ) -> tuple[str, str]:
        """Kind, and what says so: a table that has measured what the model expects, or the model.

        Tables of ARM have no lookup kernels.
        """
        timed = [kind for kind in rates if kind != "bitplane-lut" or self.target.arch == "x86_64"]
        expected = max(timed, key=rates.__getitem__)
        if self.table is not None and self.table.decides(shape, expected):
            precision = Precision(layer.weight_bits, layer.activation_bits)
            kind, measured = self.table.best_kernel(shape, precision)
            if kind in rates:
                return kind, "measured" if measured else "model"
        return max(rates, key=rates.__getitem__), "model"

    def _shaped(
        self, kind: str, layer: Layer, multiplies: Sequence["Multiply"], pads: Pads, source: Shape
    ) -> list[Choice]:
        if kind == "int8":
            return [
                form
                for multiply in multiplies
                for form in self._int8_forms(layer, multiply, pads, source)
            ]
        shaped = flatten_pixels(layer, 14)
        if kind == "bitplane":
            how = popcount_instruction(shaped, self.target)
            tiles = bitplane_tiles(shaped, self.target)
        else:
            tiles = lut_tiles(shaped, self.target)
            how = lut_instruction(shaped, tiles[0], self.target)
        return [Choice(kind, how, shaped, tile, pads, source) for tile in tiles]

    def _int8_forms(
        self, layer: Layer, multiply: "Multiply", pads: Pads, source: Shape
    ) -> list[Choice]:
        variant, chunk = multiply.variant, multiply.chunk
        if variant == "multiply-add":
            tile = grouped_tile(layer, self.target)
            return [Choice("int8", variant, layer, tile, pads, source)]
        if variant.startswith(WINOGRAD):
            tiles = winograd_tiles(layer, self.target, variant.removeprefix(WINOGRAD))
            shaped = winograd_layer(layer)
            grown = (shaped.image[1] - layer.image[1], shaped.image[2] - layer.image[2])
            pads = (*pads[:2], pads[2] + grown[0], pads[3] + grown[1])
        else:
            shaped = flatten_pixels(layer, 14)
            tiles = dot_tiles(shaped, self.target, variant)
        return [Choice("int8", variant, shaped, t, pads, source, chunk=chunk) for t in tiles]


@dataclass(frozen=True)
class Multiply:
    """How the int8 kernel multiplies.

    Attributes:
        variant: instruction, behind ``WINOGRAD`` if it multiplies transformed tiles.
        kept: multiply-accumulates of the layer a cycle that are expected with weights in L2.
        rate: those with weights from beyond it.
        chunk: steps of four products that int16 sums, where it does.
    """

    variant: str
    kept: float
    rate: float
    chunk: int = 0


def has_codes(node: Node, weight: Array) -> bool:
    """Whether the weights are what codes of their width stand for: planes hold codes.

    Unsigned weights of other tools reach beyond, their zero point taken off.
    """
    if node.str_attr("weight_levels") == "odd" or not weight.size:
        return True
    half = 2 ** (node.int_attr("weight_bits") - 1)
    return bool(-half <= weight.min() and weight.max() < half)


def count_weights(graph: Graph) -> int:
    """Weights of all layers of a graph, in float or on codes."""
    weights = {node.inputs[1] for node in graph if node.op in _LAYERS} & graph.constants.keys()
    return sum(graph.constants[weight].size for weight in weights)


_LAYERS = ("Conv", "Gemm", "MatMul", "IntConv", "IntMatMul")
_SMALL = 65536  # weights of a network that L2 keeps, also as Winograd's 16 int16 for 9 of them


def _int8_multiplies(layer: Layer, weight: Array, target: Target) -> list[Multiply]:
    """Ways that are exact for these weights, the fastest by the model first.

    For this, weights of small networks count as read from beyond L2, too: Winograd's of 16 bits,
    3.6 times as many bytes, gain less there than expected (w8a8 of the demo: 6 % slower).
    """
    found = [_direct_multiply(layer, weight, target), *_winograd_multiplies(layer, weight, target)]
    return sorted(found, key=lambda multiply: -multiply.rate)


def _winograd_multiplies(layer: Layer, weight: Array, target: Target) -> list[Multiply]:
    """Winograd variants that are exact: no sum leaves its integer type, whatever the codes."""
    w, channels = layer.window, layer.image[3]
    plain = (w.kh, w.kw, w.sy, w.sx, w.dy, w.dx) == (3, 3, 1, 1, 1, 1) and layer.groups == 1
    if target.arch != "x86_64" or not plain or channels % 4 or weight.ndim != 4:
        return []
    transformed = winograd.transform_weights(weight)
    found: list[tuple[str, int]] = []
    bits, width = layer.activation_bits, target.vector_bits
    words = winograd.bounds(transformed, bits, signed=True)
    if words.total < 2**31 and words.weight < 2**15:
        found.append((f"vpmaddwd{width}", 0))
    narrow = winograd.bounds(transformed, bits, signed=False)
    if narrow.total < 2**31 and narrow.weight <= 127 and narrow.image <= 255:
        if target.has("vnni"):
            found.append(("vpdpbusd512", 0))
        elif chunk := winograd.half_chunk(weight, bits):
            found.append((f"vpmaddubsw{width}", chunk))
    return [_winograd_multiply(layer, name, chunk, target) for name, chunk in found]


# Bytes of weights a cycle that one core reads from L2, and from beyond it.
_STREAM_L2, _STREAM = 16.0, 5.0
# Cycles of 256-bit vectors, a 2x2 tile: output transform by channel, input transform by channel.
_WINOGRAD_OUTPUT, _WINOGRAD_IMAGE = 1.7, 2.0
_ODD_COLUMNS = 1.2  # times the products' cycles where 2x2 tiles of a row do not pair


def _winograd_multiply(layer: Layer, name: str, chunk: int, target: Target) -> Multiply:
    w, inside, out = layer.window, layer.image[3], layer.out_channels
    filled = w.oh * w.ow / (4 * -(-w.oh // 2) * -(-w.ow // 2))
    wide = 256 / target.vector_bits
    inner = 16 * inside * out / _multiply_rate(name, chunk)
    if -(-w.ow // 2) % 2:  # tiles of one vector: a load for each product
        inner *= _ODD_COLUMNS
    around = wide * (_WINOGRAD_OUTPUT * out + _WINOGRAD_IMAGE * inside)
    lanes = min(1.0, out / (target.vector_bits / 32))
    rate = 36 * inside * out * filled * lanes / (inner + around)
    stored = 16 * inside * out * (2 if DOTS[name].weight == "int16" else 1)
    return _multiply(WINOGRAD + name, rate, layer, stored, chunk)


def _multiply(variant: str, rate: float, layer: Layer, stored: float, chunk: int) -> Multiply:
    """``rate``: with weights, ``stored`` bytes of them, in L1."""
    kept, beyond = (_streamed(rate, layer, stored, kept) for kept in (True, False))
    return Multiply(variant, kept, beyond, chunk)


def _streamed(rate: float, layer: Layer, stored: float, kept: bool) -> float:
    """The rate when all the weights come from L2 (``kept``) or, in large networks, from beyond."""
    stream = _STREAM_L2 if kept else _STREAM
    return 1 / (1 / rate + stored / (stream * prod(layer.out_shape) * layer.reduction))


def _direct_variant(layer: Layer, weight: Array, target: Target) -> tuple[str, int]:
    """Instruction of the kernel without transforms, and the steps that it sums in int16."""
    fits = weight.min(initial=0) >= -128 and weight.max(initial=0) <= 127
    if layer.groups > 1:
        return "multiply-add", 0
    if target.has("vnni") and fits:
        return "vpdpbusd512", 0
    if target.arch != "x86_64":
        largest = int(np.abs(weight.astype(np.int64)).max(initial=0))
        return _neon_variant(layer, largest, target) if fits else "multiply-add", 0
    if fits:
        runs = weight.reshape(*weight.shape, 1, 1) if weight.ndim == 2 else weight
        if weight.ndim == 2:
            runs = runs.swapaxes(0, 1)
        steps = dot_weights(runs, layer.taps, 1, 4, "int16")
        chunk = half_chunk(steps[..., 0, :], 2**layer.activation_bits - 1)
        if chunk >= min(steps.shape[3], WORTH_HALVES):
            return f"vpmaddubsw{target.vector_bits}", chunk
    return f"vpmaddwd{target.vector_bits}", 0


def _neon_variant(layer: Layer, largest: int, target: Target) -> str:
    """The int8 instruction of an ARM core; codes of 8 bits are stored less 128."""
    wide = layer.activation_bits > 7
    offset = "-offset" if wide else ""
    if target.has("dotprod"):
        return f"sdot{offset}"
    product = largest * (128 if wide else 2**layer.activation_bits - 1)
    multiply = "smlal" if product <= most_product(16) else "smull"
    if target.arch == "armv7":
        return f"v{multiply[1:]}16{offset}"
    run = layer.run_pixels * layer.image[3]
    if -(-run // 32) * 32 > 1.2 * -(-run // 16) * 16:
        return f"{multiply}16{offset}"
    if product <= most_product(32) and not wide:
        return "smlal32-small"
    return f"{multiply}32{offset}"


@dataclass(frozen=True)
class _Core:
    """Multiply-accumulates a cycle of an ARM core, as benchmarks/arm.py estimates them.

    Attributes:
        popcount: of one plane pair.
        shuffle: of one weight plane; 0 where there is no lookup kernel.
        int8: by instruction, without its group and offset.
        table: cycles that making one table takes.
    """

    popcount: float
    shuffle: float
    int8: Mapping[str, float]
    table: float


_CORES: Mapping[str, _Core] = {
    "cortex-a53": _Core(
        31.0, 21.0,
        {"smull16": 2.7, "smlal16": 3.0, "smull32": 2.9, "smlal32": 3.3, "multiply-add": 1.1}, 24,
    ),
    "cortex-a72": _Core(
        75.0, 35.0,
        {"smull16": 6.0, "smlal16": 6.8, "smull32": 6.5, "smlal32": 7.5, "multiply-add": 2.9}, 14,
    ),
    "cortex-a76": _Core(70.0, 58.0, {"sdot": 19.5, "multiply-add": 2.9}, 10),
    "cortex-a9": _Core(17.0, 0.0, {"vmull16": 2.6, "vmlal16": 3.0, "multiply-add": 0.8}, 0),
}  # fmt: skip


def _core(target: Target) -> _Core:
    """Rates of the target's core, or of its kind where nothing is known of it."""
    known = _CORES.get(str(target.llvm.get("mcpu", "")))
    kind = "cortex-a76" if target.has("dotprod") else "cortex-a72"
    return known or _CORES[kind if target.arch == "aarch64" else "cortex-a9"]


# Multiply-accumulates a cycle, measured with the kernels of this project (benchmarks/layers.py):
# popcount of one plane pair, by vector unit; the int8 kernels by instruction.
_POPCOUNT = {"bitalg": 215.0, "avx512": 130.0, "avx2": 115.0, "ssse3": 45.0}
_INT8 = {
    "vpdpbusd512": 62.0, "vpmaddubsw512": 66.0, "vpmaddubsw256": 49.0, "vpmaddubsw128": 24.0,
    "vpmaddwd512": 40.0, "vpmaddwd256": 24.5, "vpmaddwd128": 12.0, "multiply-add": 6.0,
}  # fmt: skip


_SHUFFLE = {256: 178.0, 128: 89.0}  # products a cycle of vpshufb + vpaddb for one weight plane
_PAIRED = 1.2  # times that when a byte sums two pixels
_TABLE, _PLACE = 2.5, 0.5  # cycles that a table takes in memory, and its place among all
_SHARED_PLACE = {1: 0.7, 2: 0.93}  # times that when so many vectors share a place's load
_SLICED = 1.07  # times that when rows of the output share tables and weights in L1
MOST_LUT_BITS = 6
WORTH_HALVES = 4  # steps of int16 sums that pay for the widening
HALF_FLUSH = 2.0  # steps that one widening costs


def _multiply_rate(variant: str, chunk: int) -> float:
    """Of an x86 instruction, widening included."""
    return _INT8[variant] * (chunk / (chunk + HALF_FLUSH) if chunk else 1.0)


def _direct_multiply(layer: Layer, weight: Array, target: Target) -> Multiply:
    """The int8 kernel without transforms."""
    variant, chunk = _direct_variant(layer, weight, target)
    if target.arch == "x86_64":
        multiply = _multiply_rate(variant, chunk)
    else:
        core = _core(target)
        known = {name: core.int8.get(name) for name in (variant, variant.partition("-")[0])}
        multiply = next(filter(None, known.values()), core.int8["multiply-add"])
    int8 = multiply * min(1.0, layer.out_channels / (target.vector_bits / 32))
    if target.arch == "x86_64":
        wide = 2 if variant in DOTS and DOTS[variant].weight == "int16" else 1
        stored = layer.out_channels * layer.reduction * wide
        return _multiply(variant, int8, layer, stored, chunk)
    if variant in DOTS:  # runs are filled up to whole steps
        run = layer.run_pixels * layer.image[3]
        int8 *= run / (-(-run // DOTS[variant].group) * DOTS[variant].group)
    return Multiply(variant, int8, int8, chunk)


def expected_rates(
    layer: Layer, multiply: Multiply, target: Target, kept: bool = False
) -> dict[str, float]:
    """Multiply-accumulates a cycle of each kernel: the model where nothing was measured.

    ``kept``: weights are in L2; else they come from beyond it.
    """
    if target.arch == "x86_64":
        popcount = _POPCOUNT[next((name for name in _POPCOUNT if target.has(name)), "ssse3")]
    else:
        popcount = _core(target).popcount
    filled = layer.group_in / (8 * layer.group_bytes)  # bits of a byte that carry a channel
    lanes_used = min(1.0, layer.group_out / (target.vector_bits / 8))
    pairs = layer.weight_bits * layer.activation_bits
    bitplane = popcount * filled * max(lanes_used, 1 / 64) / pairs
    rates = {"bitplane": bitplane, "int8": multiply.kept if kept else multiply.rate}
    if not _no_lut(layer, target):
        rates["bitplane-lut"] = _lut_rate(layer, target, kept)
    return rates


def _no_lut(layer: Layer, target: Target) -> str:
    """Why the lookup kernel cannot run the layer; empty when it can."""
    if target.arch == "armv7":
        return "armv7 has no lookup kernel"
    if layer.groups > 1:
        return "a grouped convolution has too few channels to share a table"
    if layer.activation_bits > MOST_LUT_BITS:
        return f"sums of four {layer.activation_bits}-bit codes overflow a byte"
    return ""


def _lut_rate(layer: Layer, target: Target, kept: bool) -> float:
    """Shuffles and additions, the flush of uint8 sums, and the tables, which all channels share."""
    steps = largest_divisor(
        layer.run_pixels * -(-layer.image[3] // 4), 255 // (4 * (2**layer.activation_bits - 1))
    )
    arm = target.arch != "x86_64"
    flush = steps / (steps + 2) if arm else steps / (steps + 2.5) * min(1.0, steps / 8)
    shuffle = _core(target).shuffle if arm else _SHUFFLE[min(target.vector_bits, 256)]
    if pairs_pixels(layer, target.arch):
        shuffle *= _PAIRED
    if lut_slices(layer, target.arch) > 1:
        shuffle *= _SLICED
    rate = shuffle * flush / layer.weight_bits
    used = layer.image[3] / (4 * -(-layer.image[3] // 4))
    lanes = min(32, target.vector_bits // 8)
    filled = layer.out_channels / (-(-layer.out_channels // lanes) * lanes)
    rate *= used * max(filled, 1 / lanes)
    taps = layer.window.kh * layer.window.kw / (layer.window.sy * layer.window.sx)
    making = _core(target).table if arm else _TABLE
    if reads_patterns(layer, target.arch):
        making = _PLACE
        rate *= _SHARED_PLACE.get(lut_tiles(layer, target)[0].vectors, 1.0)
    table = making / (4 * taps * layer.out_channels)  # cycles a table, spread over its products
    rate = 1 / (1 / rate + table)
    stored = layer.weight_bits * layer.out_channels * layer.reduction / 4
    return rate if arm else _streamed(rate, layer, stored, kept)


def geometry(graph: Graph, node: Node) -> tuple[Layer, Pads, Shape]:
    """The layer over its padded image, the padding, and the image before it.

    A column of pixels (width 1) is taken as a row: the bytes are the same, and kernels tile rows.
    """
    weight = graph.constants[node.inputs[1]]
    shape, out = graph.shape(node.inputs[0]), graph.shape(node.output)
    bits = node.int_attr("weight_bits"), node.int_attr("activation_bits")
    odd = node.str_attr("weight_levels") == "odd"
    zero = node.int_attr("zero_point", 0) != 0
    if node.op == "IntMatMul":
        rows = prod(shape[:-1])
        window = Window(1, 1, rows, 1, 1, 1, 1, 1, 1)
        image = (1, 1, rows, shape[-1])
        return Layer(window, image, weight.shape[1], 1, *bits, odd, zero), (0, 0, 0, 0), image
    rank = len(shape) - 2
    kernel = weight.shape[2:]
    ones = (1,) * rank
    strides, dilations = node.ints_attr("strides", ones), node.ints_attr("dilations", ones)
    before, after = _pads(node, shape[1:-1], out[1:-1], kernel, strides, dilations)
    turn = rank == 2 and shape[2] + before[1] + after[1] == 1
    k, s, d = (_plane(values, turn) for values in (kernel, strides, dilations))
    o, i = _plane(out[1:-1], turn), _plane(shape[1:-1], turn)
    top_left, bottom_right = _plane(before, turn, 0), _plane(after, turn, 0)
    window = Window(shape[0], *o, *k, *s, *d)
    height, width = (
        size + first + last for size, first, last in zip(i, top_left, bottom_right, strict=True)
    )
    image = (shape[0], height, width, shape[-1])
    layer = Layer(window, image, out[-1], node.int_attr("group", 1), *bits, odd, zero)
    return layer, (*top_left, *bottom_right), (shape[0], *i, shape[-1])


def table_geometry(op: str, layer: Layer, pads: Pads, source: Shape) -> Geometry:
    """The same as latency tables write it."""
    w = layer.window
    return Geometry(
        "matmul" if op == "IntMatMul" else "conv", *source, layer.out_channels,
        w.kh, w.kw, w.sy, w.sx, w.dy, w.dx, layer.groups, *pads,
    )  # fmt: skip


def _plane(values: tuple[int, ...], turn: bool, missing: int = 1) -> tuple[int, int]:
    """One or two spatial values as (vertical, horizontal): a 1-D convolution is one row."""
    if len(values) == 1:
        return missing, values[0]
    return (values[1], values[0]) if turn else (values[0], values[1])


def _pads(
    node: Node,
    size: tuple[int, ...],
    out: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rank = len(size)
    auto = node.str_attr("auto_pad", "NOTSET")
    if auto in ("", "NOTSET"):
        pads = node.ints_attr("pads", (0,) * (2 * rank))
        return pads[:rank], pads[rank:]
    if auto == "VALID":
        return (0,) * rank, (0,) * rank
    total = [
        max(0, (o - 1) * s + (k - 1) * d + 1 - i)
        for o, s, k, d, i in zip(out, strides, kernel, dilations, size, strict=True)
    ]
    small = tuple(t // 2 for t in total)
    large = tuple(t - t // 2 for t in total)
    return (small, large) if auto == "SAME_UPPER" else (large, small)
