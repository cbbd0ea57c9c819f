"""Kernels of the quantized layers: tensor expression + epilogue + schedule -> PrimFunc.

A kernel is built for one layer's geometry; equal kernels are shared by the caller. All buffers
that hold images are flat, so that a 1x1 layer may cut its pixels into rows as it likes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

from tvm import te, tirx
from tvm.s_tir import Schedule

from mpqc import compute, compute_winograd
from mpqc.compute import Padded, Window
from mpqc.graph import TensorType
from mpqc.packing import PATTERN_BITS
from mpqc.schedules import (
    conv_cpu,
    pack_script,
    pad_script,
    simple_cpu,
    table_script,
    winograd_cpu,
)
from mpqc.schedules.arm_intrinsics import POPCOUNTS
from mpqc.schedules.conv_cpu import Tile
from mpqc.schedules.dot_intrinsics import DOTS
from mpqc.schedules.lut_intrinsics import lookup_of
from mpqc.target import Target
from mpqc.winograd import POSITIONS

Expr = Any
Shape = tuple[int, int, int, int]
# An epilogue maps (accumulator or None, channel-aware operand reader, index) to an expression.
Reader = Callable[[str], Expr]


@dataclass(frozen=True)
class Output:
    """One result of a kernel.

    Attributes:
        name: unique in the kernel; later outputs may read it.
        cell: reader -> expression of one element; the reader resolves ``"acc"``, operands and
            earlier outputs at the element's index.
        bits: planes of a code; 0 for floats.
        keep: the plain array is a result.
        planes: its packed planes are a result (needs a multiple of 8 channels).
    """

    name: str
    cell: Callable[[Reader], Expr]
    bits: int = 0
    keep: bool = True
    planes: bool = False


@dataclass(frozen=True)
class Operand:
    """A tensor that the epilogue reads.

    Attributes:
        name: as the output cells ask for it.
        per_channel: a vector over the channels, else an image like the output.
        dtype: numpy name.
    """

    name: str
    per_channel: bool
    dtype: str


@dataclass(frozen=True)
class Kernel:
    """A scheduled PrimFunc and the types of its arguments: inputs, then outputs."""

    func: Any
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    variant: str = ""


def _image(name: str, shape: Shape, dtype: str) -> tuple[Any, Any]:
    """A flat placeholder and a reader of it by [n, y, x, c]."""
    n, h, w, c = shape
    flat = te.placeholder((n * h * w * c,), dtype, name)
    return flat, lambda b, y, x, k: flat[((b * h + y) * w + x) * c + k]


def _cell(output: Output, readers: dict[str, Callable[..., Expr]]) -> Callable[..., Expr]:
    return lambda b, y, x, c: output.cell(lambda name: readers[name](b, y, x, c))


def _stages(
    shape: Shape,
    accumulator: Callable[..., Expr] | None,
    operands: Sequence[Operand],
    outputs: Sequence[Output],
) -> tuple[list[Any], list[Any], list[str]]:
    """Placeholders, result tensors and the stage names of an epilogue, in dataflow order."""
    holders: list[Any] = []
    readers: dict[str, Callable[..., Expr]] = {}
    for index, operand in enumerate(operands):
        if operand.per_channel:
            holder = te.placeholder((shape[3],), operand.dtype, f"operand{index}")
            readers[operand.name] = lambda b, y, x, c, t=holder: t[c]
        else:
            holder, readers[operand.name] = _image(f"operand{index}", shape, operand.dtype)
        holders.append(holder)
    if accumulator is not None:
        readers["acc"] = accumulator

    results, names = [], []
    for index, output in enumerate(outputs):
        names.append(f"{'codes' if output.bits else 'plain'}{index}")
        stage = te.compute(shape, _cell(output, readers), name=names[-1])
        readers[output.name] = lambda b, y, x, c, t=stage: t[b, y, x, c]
        if output.keep:
            results.append(stage)
        if output.planes:
            names.append(f"planes{index}")
            results.append(compute.pack_planes(stage, output.bits, names[-1]))
    return holders, results, names


def _kernel(
    args: Sequence[Any], results: Sequence[Any], schedule: Callable[[Schedule], None], variant: str
) -> Kernel:
    func = te.create_prim_func([*args, *results], index_dtype_override="int64")
    sch = Schedule(func, seed=1)
    schedule(sch)
    return Kernel(
        sch.mod["main"],
        tuple(TensorType(str(t.dtype), tuple(int(e) for e in t.shape)) for t in args),
        tuple(TensorType(str(t.dtype), tuple(int(e) for e in t.shape)) for t in results),
        variant,
    )


# ---------------------------------------------------------------------------- convolution kernels


@dataclass(frozen=True)
class Layer:
    """Integer layer as the kernels see it.

    Attributes:
        window: geometry; the image is padded already.
        image: (n, h, w, c) of the padded input codes.
        out_channels, groups: as in ONNX.
        weight_bits, activation_bits: planes.
        odd: weight levels are 2v - (2**b - 1) instead of two's complement.
        zero_point: whether activation codes have a non-zero zero point.
    """

    window: Window
    image: Shape
    out_channels: int
    groups: int
    weight_bits: int
    activation_bits: int
    odd: bool
    zero_point: bool

    @property
    def group_in(self) -> int:
        return self.image[3] // self.groups

    @property
    def group_out(self) -> int:
        return self.out_channels // self.groups

    @property
    def group_bytes(self) -> int:
        """Bytes of one pixel, plane and group."""
        return -(-self.group_in // 8)

    @property
    def reduction(self) -> int:
        """K: products per output."""
        return self.window.kh * self.window.kw * self.group_in

    @property
    def taps(self) -> int:
        """Separate runs of a window row: one when its pixels are adjacent in memory."""
        return 1 if self.window.dx == 1 and self.groups == 1 else self.window.kw

    @property
    def run_pixels(self) -> int:
        return self.window.kw // self.taps

    @property
    def out_shape(self) -> Shape:
        return (self.window.n, self.window.oh, self.window.ow, self.out_channels)


def largest_divisor(extent: int, most: int) -> int:
    """The largest divisor of ``extent`` that is at most ``most``, at least 1."""
    return max(d for d in range(1, max(1, min(extent, most)) + 1) if extent % d == 0)


def flatten_pixels(layer: Layer, most: int) -> Layer:
    """View the pixels of a 1x1, stride 1 layer as rows of a convenient length."""
    w = layer.window
    if (w.kh, w.kw, w.sy, w.sx) != (1, 1, 1, 1):
        return layer
    pixels = w.n * w.oh * w.ow
    row = largest_divisor(pixels, most)
    window = Window(1, pixels // row, row, 1, 1, 1, 1, 1, 1)
    return replace(layer, window=window, image=(1, pixels // row, row, layer.image[3]))


# Tiles that were fastest over 3x3 layers of 56, 28, 14 and 7 pixels (benchmarks/layers.py), by
# (pixels, vectors), in the order in which they are tried: the first that divides the layer fits.
_TILES: dict[tuple[str, int], tuple[tuple[int, int], ...]] = {
    ("bitplane", 512): ((7, 1), (4, 1), (8, 1), (2, 2)),
    ("bitplane", 256): ((7, 1), (2, 2), (4, 1)),
    ("lut", 512): ((7, 1), (4, 2), (2, 4), (2, 2), (4, 1)),
    ("lut", 256): ((4, 2), (2, 4), (7, 1), (2, 2), (4, 1)),
    ("patterns", 512): ((2, 4), (4, 2), (1, 8), (1, 4), (2, 2), (4, 1), (7, 1)),
    ("patterns", 256): ((2, 4), (4, 2), (1, 8), (1, 4), (2, 2), (4, 1), (7, 1)),
    ("half", 512): ((7, 1), (4, 2), (2, 2), (4, 1)),
    ("half", 256): ((4, 2), (2, 4), (7, 1), (2, 2), (4, 1)),
    ("dot", 512): ((7, 2), (4, 2), (8, 2), (2, 4), (7, 1), (5, 2), (3, 4)),
    ("dot", 256): ((4, 2), (2, 4), (7, 1), (14, 1), (8, 1), (5, 2), (3, 2)),
    ("winograd", 512): ((14, 1), (7, 1), (4, 1), (8, 1), (2, 2)),
    ("winograd", 256): ((4, 2), (2, 4), (7, 1), (2, 2), (4, 1)),
}
# For NEON's 32 registers, by the estimates of benchmarks/arm.py: a broadcast costs as much as an
# addition, so that several vectors share it.
_NEON_TILES: dict[str, tuple[tuple[int, int], ...]] = {
    "bitplane": ((4, 4), (2, 8), (5, 4), (3, 4), (2, 4), (7, 2), (4, 2), (8, 2), (7, 1)),
    "lut": ((2, 2), (7, 2), (4, 4), (8, 2), (5, 2), (3, 4), (4, 1), (7, 1), (8, 1)),
    "dot": ((4, 4), (2, 8), (8, 2), (2, 4), (7, 2), (5, 4), (4, 2), (3, 4), (7, 1)),
    "long": ((8, 1), (4, 2), (7, 1), (4, 1), (5, 1), (2, 4), (2, 1)),
}
PREFETCHED = 1 << 21  # bytes of weights that lie in no L2: each is read from far away, once
PATCH = 512  # tiles x channels of a Winograd patch: sixteen int32 of each, 32 KiB
PAIRS = "-pairs"  # behind the instruction of the lookup kernel that sums pairs of pixels
WINOGRAD = "winograd-"  # before the instruction, in the names of variants
_REGISTERS = {512: 26, 256: 12}  # accumulators, with some left for operands
_WEIGHTS_IN_L1 = 24 << 10  # bytes, which leave room for tables
_TABLES_IN_L1 = 22 << 10  # bytes, which leave room for weights and sums
_SLICED = 64 << 10  # bytes of tables and weights of a window, from which on slices are faster
SLICE = 64  # channels of a slice
_ROWS_OF_PIXELS = 56  # that share weights: their sums, two bytes each for 128 channels, lie in L1
_LUT_LANES = 32  # two 256-bit shuffles are as fast as one of 512 bits, and waste fewer channels


def _tiles(kind: str, layer: Layer, target: Target, lanes: int) -> list[Tile]:
    """Tiles that divide the layer, the default first."""
    width = 512 if target.vector_bits == 512 or target.arch == "aarch64" else 256
    blocks = -(-layer.group_out // lanes)
    if target.arch == "aarch64":
        pairs = _NEON_TILES[kind]
    elif kind == "long":  # 16 registers, twice as many halves
        pairs = ((2, 1), (4, 1), (1, 1))
    elif kind == "lut" and layer.window.ow >= 56 and blocks % 2 == 0:  # tables come from L2
        pairs = ((4, 2), (2, 2))
    else:
        pairs = _TILES[kind, width]
    row = layer.window.ow
    found = [
        Tile(pixels, vectors, lanes)
        for pixels, vectors in pairs
        if row % pixels == 0 and blocks % vectors == 0
    ]
    registers = _REGISTERS[width]
    pixels = largest_divisor(row, min(14, registers))
    vectors = max(v for v in (1, 2, 3, 4, 6) if pixels * v <= registers and blocks % v == 0)
    filling = Tile(pixels, vectors, lanes)
    return found if filling in found else [*found, filling]


def _channel_lanes(channels: int, most: int) -> int:
    """Vector length in bytes: fewer wasted channels are worth narrower vectors."""
    lanes = most
    while lanes > 16 and _round_up(channels, lanes // 2) < _round_up(channels, lanes):
        lanes //= 2
    return lanes


def popcount_instruction(layer: Layer, target: Target) -> str:
    """How the popcount kernel adds: "and-popcount" in bytes, or an instruction of the machine."""
    counts = 8 * layer.window.kh * layer.taps * layer.run_pixels * layer.group_bytes
    if target.arch == "x86_64" or counts >= 2**16 or layer.group_out % 8:
        return "and-popcount"
    return "uadalp" if target.arch == "aarch64" else "vpadal"


def bitplane_tile(layer: Layer, target: Target) -> Tile:
    """Default tile of the popcount kernel."""
    return bitplane_tiles(layer, target)[0]


def bitplane_tiles(layer: Layer, target: Target) -> list[Tile]:
    """Tiles of the popcount kernel, the default first."""
    most = target.vector_bits // 8
    if popcount_instruction(layer, target) in POPCOUNTS:
        return _tiles("bitplane", layer, target, 8)
    if layer.groups > 1:
        lanes = largest_divisor(layer.group_out, most)
        return [Tile(largest_divisor(layer.window.ow, 7), 1, lanes)]
    return _tiles("bitplane", layer, target, _channel_lanes(layer.group_out, most))


def lut_tile(layer: Layer, target: Target) -> Tile:
    """Default tile of the lookup kernel."""
    return lut_tiles(layer, target)[0]


def lut_tiles(layer: Layer, target: Target) -> list[Tile]:
    """Tiles of the lookup kernel, the default first."""
    lanes = _channel_lanes(layer.out_channels, min(target.vector_bits // 8, _LUT_LANES))
    if not pairs_pixels(layer, target.arch):
        kind = "patterns" if reads_patterns(layer, target.arch) else "lut"
        return _tiles(kind, layer, target, lanes)
    blocks, panel = -(-layer.out_channels // lanes), layer.reduction // 4 * lanes
    order = (4, 2, 1) if 2 * panel > _WEIGHTS_IN_L1 else (2, 4, 1)
    return [Tile(2, vectors, lanes) for vectors in order if blocks % vectors == 0]


def dot_tile(layer: Layer, target: Target, instruction: str) -> Tile:
    """Default tile of the dot kernel."""
    return dot_tiles(layer, target, instruction)[0]


def dot_tiles(layer: Layer, target: Target, instruction: str) -> list[Tile]:
    """Tiles of the dot kernel, the default first."""
    dot = DOTS[instruction]
    kind = "half" if dot.halves else "long" if dot.chain else "dot"
    return _tiles(kind, layer, target, dot.lanes)


def winograd_tile(layer: Layer, target: Target, instruction: str) -> Tile:
    """Default tile of the Winograd kernels, in 2x2 tiles of a row."""
    return winograd_tiles(layer, target, instruction)[0]


def winograd_tiles(layer: Layer, target: Target, instruction: str) -> list[Tile]:
    """Tiles of the Winograd kernels, the default first."""
    dot = DOTS[instruction]
    columns = compute_winograd.tiles(layer.window)[1]
    blocks = -(-layer.out_channels // dot.lanes)
    pairs = _TILES["winograd", 512 if target.vector_bits == 512 else 256]
    if dot.data == "int16" and target.vector_bits < 512:
        pairs = ((2, 4), *pairs)  # four tiles of values would fill L1
    found = [
        Tile(pixels, vectors, dot.lanes)
        for pixels, vectors in dict.fromkeys(pairs)
        if columns % pixels == 0 and blocks % vectors == 0
    ]
    narrow = Tile(largest_divisor(columns, 8), 1, dot.lanes)
    return found if narrow in found else [*found, narrow]


def winograd_patch(layer: Layer, tile: Tile) -> tuple[int, int]:
    """Rows and columns of 2x2 tiles whose products lie in cache together.

    Weights that stay in L1 anyway need no large patch: it would only be working memory.
    """
    rows, columns = compute_winograd.tiles(layer.window)
    stay = 16 * layer.group_in * layer.out_channels <= _WEIGHTS_IN_L1
    most = max(1, (PATCH // 4 if stay else PATCH) // tile.block)
    abreast = tile.pixels * largest_divisor(columns // tile.pixels, max(1, most // tile.pixels))
    return (largest_divisor(rows, max(1, most // abreast)) if abreast == columns else 1), abreast


def grouped_tile(layer: Layer, target: Target) -> Tile:
    """Default tile of the multiply-add kernel: the block divides the channels."""
    lanes = target.vector_bits // 32
    block = largest_divisor(layer.out_channels, 4 * lanes)
    if layer.group_in == layer.group_out == 1:
        vector = lanes if block % lanes == 0 else block
        return Tile(largest_divisor(layer.window.ow, 4), block // vector, vector)
    inside = largest_divisor(layer.group_out, 2 * lanes)
    return Tile(largest_divisor(layer.window.ow, 7), 1, inside)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


# Multiply-accumulates below which waking other threads costs more than it saves: a few
# microseconds of work.
WORTH_THREADS = 1 << 18
MOST_BANDS = 8  # of rows: a thread's part of the image stays in its cache from layer to layer
BANDED = 512 << 10  # bytes of weights that may be read again for each band
THREADS_SHARE = 32  # rows, at least, of what has no shape of its own


def _bands(layer: Layer, weight: Any, rows: int = 1, *, pairs: bool = False) -> int:
    """Of rows, for the threads; 0: not worth any. See ``conv_cpu.share_out``.

    Args:
        layer: geometry.
        weight: placeholder of the packed weights.
        rows: of a patch.
        pairs: whether work grows with the product of the widths.
    """
    work = prod(layer.out_shape) * layer.reduction
    if work * (layer.weight_bits * layer.activation_bits if pairs else 1) < WORTH_THREADS:
        return 0
    size = prod(int(extent) for extent in weight.shape) * (2 if weight.dtype == "int16" else 1)
    return largest_divisor(-(-layer.window.oh // rows), MOST_BANDS) if size <= BANDED else 1


def _exact(
    layer: Layer, acc: Any, block: int, correction: Any = None, sums: Any = None
) -> Callable[..., Expr]:
    """Reader of the exact integer result: D, or 2 D - N S, plus the zero point's constant."""
    top = 2**layer.weight_bits - 1

    def read(n: Expr, y: Expr, x: Expr, c: Expr) -> Expr:
        value = acc[n, y, x, c // block, c % block]
        if sums is not None:
            value = value * 2 - sums[n, y, x, c // layer.group_out] * top
        return value if correction is None else value + correction[c]

    return read


def _correction(layer: Layer, offset: int = 0) -> list[Any]:
    """Placeholder of ``(offset - z) * sum_k w``, what codes less their offset still need."""
    if not (layer.zero_point or offset):
        return []
    return [te.placeholder((layer.out_channels,), "int32", "correction")]


def bitplane_kernel(
    layer: Layer,
    operands: Sequence[Operand],
    outputs: Sequence[Output],
    tile: Tile,
    instruction: str = "and-popcount",
) -> Kernel:
    """Popcount kernel.

    Arguments: planes, weight [O/B, J, KH, taps, run, B] (or [.., run/2, B, 2] for an instruction
    of ``arm_intrinsics``), [correction], [sums], operands; outputs.
    """
    pairwise = instruction in POPCOUNTS
    window, groups = layer.window, layer.groups
    n, h, w, _ = layer.image
    image = (layer.activation_bits, n, h, w, layer.group_bytes * groups)
    run = layer.run_pixels * layer.group_bytes
    blocks = -(-layer.group_out // tile.block) * groups
    planes = te.placeholder((prod(image),), "uint8", "planes")
    packed = (-(-run // 2), tile.block, 2) if pairwise else (run, tile.block)
    weight = te.placeholder(
        (blocks, layer.weight_bits, window.kh, layer.taps, *packed), "uint8", "weight"
    )
    geometry = (planes, weight, window, image, layer.group_bytes, blocks // groups)
    if pairwise:
        acc = compute.popcount_conv(*geometry, negative_top=not layer.odd)
    else:
        acc = compute.bitplane_conv(
            *geometry,
            negative_top=not layer.odd,
            chunk=largest_divisor(run, 31),
            pair_dtype="uint16" if window.kh * layer.taps * run * 8 < 2**16 else "uint32",
        )
    sums = []
    if layer.odd:
        sums = [te.placeholder((window.n, window.oh, window.ow, groups), "int32", "sums")]
    correction = _correction(layer)
    read = _exact(layer, acc, tile.block, *correction or [None], *sums)
    holders, results, names = _stages(layer.out_shape, read, operands, outputs)
    schedule = conv_cpu.bitplane_conv
    if pairwise:
        schedule = partial(conv_cpu.popcount_conv, instruction=instruction)
    return _kernel(
        [planes, weight, *correction, *sums, *holders],
        results,
        lambda sch: schedule(
            sch, tile, layer.out_channels, names, bands=_bands(layer, weight, pairs=True)
        ),
        instruction,
    )


def lut_image(layer: Layer) -> Shape:
    """(n, h, w, tables of a pixel) of the tables that the lookup kernel reads."""
    n, h, w, c = layer.image
    return (n, h, w, -(-c // 4))


def pairs_pixels(layer: Layer, arch: str) -> bool:
    """Whether the lookup kernel sums two output pixels in a byte: codes of one bit."""
    run = layer.run_pixels * -(-layer.image[3] // 4)
    return (
        arch == "x86_64"
        and layer.activation_bits == 1
        and layer.window.ow % 2 == 0
        and run % compute.NIBBLE_STEPS == 0
        and table_script.adds(layer.image[3])
    )


def reads_patterns(layer: Layer, arch: str) -> bool:
    """Whether the lookup kernel finds its tables among those of all patterns of four codes.

    They are not made in memory then, and looking one up is a scalar load more for each plane of the
    weights: with several, tables that slices keep in L1 are faster.
    """
    return (
        arch == "x86_64"
        and 4 * layer.activation_bits <= PATTERN_BITS
        and table_script.adds(layer.image[3])
        and (layer.weight_bits == 1 or _table_slices(layer) == 1)
    )


def lut_slices(layer: Layer, arch: str) -> int:
    """Slices of the channels that the lookup kernel takes one after the other; 1: all at once.

    Where a window's tables and the weights of a block overflow L1, rows of the output share what
    is there of both (``lut_rows``).
    """
    return 1 if arch != "x86_64" or reads_patterns(layer, arch) else _table_slices(layer)


def _table_slices(layer: Layer) -> int:
    """Of tables that lie in memory."""
    w, channels = layer.image[2:]
    whole = channels % SLICE == 0 and table_script.adds(channels)
    if not whole or layer.window.kh == 1 or layer.taps > 1:
        return 1
    if pairs_pixels(layer, "x86_64") and layer.run_pixels * SLICE // 4 % compute.NIBBLE_STEPS:
        return 1
    window = (layer.window.kh * w + _LUT_LANES) * channels // 4 * 16
    return channels // SLICE if window > _SLICED and _sliced_rows(layer) > 1 else 1


def lut_rows(layer: Layer, arch: str) -> int:
    """Rows of the output that go through weights and tables together while these lie in L1."""
    window = layer.window
    if reads_patterns(layer, arch):
        return largest_divisor(window.oh, _ROWS_OF_PIXELS // window.ow) if window.kh > 1 else 1
    return _sliced_rows(layer) if lut_slices(layer, arch) > 1 else 1


def _sliced_rows(layer: Layer) -> int:
    """Rows of the output whose tables of one slice lie in L1 together."""
    window = layer.window
    rows = _TABLES_IN_L1 // (layer.image[2] * SLICE // 4 * 16)
    return largest_divisor(window.oh, max(1, (rows - window.kh) // window.sy + 1))


def lut_instruction(layer: Layer, tile: Tile, target: Target) -> str:
    """What the lookup kernel runs on."""
    name = lookup_of(target.arch, tile.lanes)
    return name + PAIRS if pairs_pixels(layer, target.arch) else name


def lut_vector(layer: Layer, tile: Tile, instruction: str) -> int:
    """Bytes of a vector whose even ones are the first half of its channels; 0: all in order.

    Sums of bytes in 16 bits come as even and odd bytes, without shuffles.
    """
    return tile.lanes if instruction.startswith("vp") and _lut_bound(layer) < 2**16 else 0


def _lut_bound(layer: Layer) -> int:
    """Of the sum over all channels of a plane under a window."""
    tables = layer.window.kh * layer.taps * layer.run_pixels * lut_image(layer)[3]
    return int(tables * 4 * (2**layer.activation_bits - 1))


def lut_kernel(
    layer: Layer,
    operands: Sequence[Operand],
    outputs: Sequence[Output],
    tile: Tile,
    instruction: str,
) -> Kernel:
    """Lookup kernel; ``instruction`` as ``lut_instruction`` names it.

    Arguments: rows, or patterns and the tables of all; weight [O/B, J, S, KH, taps, run, B] in the
    order of ``lut_vector``, [correction], [sums, of pixels where there are patterns], operands;
    outputs.
    """
    window, image = layer.window, lut_image(layer)
    arch = "x86_64" if instruction.startswith("vp") else ""
    slices, patterns = lut_slices(layer, arch), reads_patterns(layer, arch)
    run = layer.run_pixels * image[3] // slices
    top = 2**layer.activation_bits - 1
    if patterns:
        tables = te.placeholder((16 * 2**PATTERN_BITS,), "uint8", "tables")
        data = [te.placeholder((prod(image),), "uint16", "patterns"), tables]
        rows = compute.rows_of_patterns(*data)
    else:
        rows = te.placeholder((prod(image), 16), "uint8", "rows")
        data = [rows]
    blocks = -(-layer.out_channels // tile.block)
    weight = te.placeholder(
        (blocks, layer.weight_bits, slices, window.kh, layer.taps, run, tile.block),
        "uint8",
        "weight",
    )
    halves, shuffle = instruction.endswith(PAIRS), instruction.removesuffix(PAIRS)
    steps = compute.NIBBLE_STEPS if halves else 1
    acc = (compute.lut_pair_conv if halves else compute.lut_conv)(
        rows, weight, window, image,
        negative_top=not layer.odd,
        chunk=steps * largest_divisor(run // steps, 255 // (4 * top * steps)),
        pair_dtype="uint16" if _lut_bound(layer) < 2**16 else "uint32",
        vector=lut_vector(layer, tile, instruction),
    )  # fmt: skip
    sums = []
    if layer.odd and patterns:
        height, width = layer.image[1:3]
        sums = [te.placeholder((window.n * height * width,), "int32", "pixels")]
        under = [compute.sums_under(sums[0], window, height, width)]
    elif layer.odd:
        under = sums = [te.placeholder((window.n, window.oh, window.ow, 1), "int32", "sums")]
    else:
        under = []
    correction = _correction(layer)
    read = _exact(layer, acc, tile.block, *correction or [None], *under)
    holders, results, names = _stages(layer.out_shape, read, operands, outputs)
    return _kernel(
        [*data, weight, *correction, *sums, *holders],
        results,
        lambda sch: conv_cpu.lut_conv(
            sch, tile, layer.out_channels, names, instruction=shuffle, halves=halves,
            evens=lut_vector(layer, tile, instruction) > 0, patterns=patterns,
            summed=patterns and layer.odd, rows=lut_rows(layer, arch),
            bands=_bands(layer, weight, lut_rows(layer, arch)),
        ),
        instruction,
    )  # fmt: skip


def expand_kernel(
    pixels: int, channels: int, arch: str = "", beside: int = 0, slices: int = 1
) -> Kernel:
    """Codes [pixels * channels] -> tables [slices * pixels * ceil(channels/slices/4), 16].

    ``beside``: pixels to the right of which each entry holds 16 times that pixel's; 0: none.
    """
    if arch == "x86_64" and table_script.expands(pixels * channels, channels):
        cut = (slices, channels // slices)
        func, kinds = table_script.expand(pixels * channels, beside * channels, cut)
        return Kernel(func, (kinds[0],), (kinds[1],), "expand")
    codes = te.placeholder((pixels * channels,), "uint8", "codes")
    return _kernel([codes], [compute.expand_rows(codes, channels)], simple_cpu.expand, "expand")


def pattern_kernel(layer: Layer, image: Padded, beside: int) -> Kernel:
    """Codes [N * H * W * C] -> places of the tables of their patterns, and what odd levels need.

    See ``table_script.patterns``.
    """
    bits, summed = layer.activation_bits, layer.odd
    func, kinds = table_script.patterns(image, bits, beside, summed=summed)
    return Kernel(func, kinds[:1], kinds[1:], "pack")


def code_sum_kernel(layer: Layer, arch: str) -> Kernel | None:
    """Arguments: codes; int32 [N, OH, OW, 1]. None where ``row_sum_kernel`` is faster."""
    if arch != "x86_64" or not table_script.adds(layer.image[3]):
        return None
    func, kinds = table_script.code_sum(layer.window, layer.image)
    return Kernel(func, (kinds[0],), (kinds[1],), "window sum")


def row_sum_kernel(layer: Layer) -> Kernel:
    """Arguments: rows; int32 [N, OH, OW, 1]."""
    image = lut_image(layer)
    rows = te.placeholder((prod(image), 16), "uint8", "rows")
    sums = compute.row_sum(rows, layer.window, image)
    return _kernel([rows], [sums], simple_cpu.window_sum, "window sum")


def window_sum_kernel(layer: Layer) -> Kernel:
    """Arguments: planes; int32 [N, OH, OW, groups], what odd weight levels need beside D."""
    n, h, w, _ = layer.image
    image = (layer.activation_bits, n, h, w, layer.group_bytes * layer.groups)
    planes = te.placeholder((prod(image),), "uint8", "planes")
    sums = compute.window_sum(planes, layer.window, image, layer.groups)
    return _kernel([planes], [sums], simple_cpu.window_sum, "window sum")


def dot_kernel(
    layer: Layer,
    operands: Sequence[Operand],
    outputs: Sequence[Output],
    tile: Tile,
    instruction: str,
    chunk: int = 0,
) -> Kernel:
    """Arguments: codes, weight [O/B, KH, taps, run/t, B, t], [correction], operands; outputs.

    ``chunk`` steps are summed in int16 by instructions that do so; ``accumulators`` proves it.
    """
    dot = DOTS[instruction]
    run = -(-layer.run_pixels * layer.image[3] // dot.group)
    codes = te.placeholder((prod(layer.image),), dot.data, "codes")
    weight = te.placeholder(
        (
            -(-layer.out_channels // tile.block),
            layer.window.kh,
            layer.taps,
            run,
            tile.block,
            dot.group,
        ),
        dot.weight,
        "weight",
    )
    if dot.halves:
        if not chunk:
            raise ValueError(f"{instruction} would overflow int16")
        acc = compute.half_conv(codes, weight, layer.window, layer.image, chunk)
    else:
        acc = compute.dot_conv(codes, weight, layer.window, layer.image)
    correction = _correction(layer, dot.offset)
    read = _exact(layer, acc, tile.block, *correction or [None])
    holders, results, names = _stages(layer.out_shape, read, operands, outputs)
    return _kernel(
        [codes, weight, *correction, *holders],
        results,
        lambda sch: (conv_cpu.half_conv if dot.halves else conv_cpu.dot_conv)(
            sch,
            tile,
            layer.out_channels,
            names,
            instruction=instruction,
            bands=_bands(layer, weight),
        ),
        instruction,
    )


def winograd_layer(layer: Layer) -> Layer:
    """The layer over an image that whole tiles cover."""
    n, _, _, channels = layer.image
    rows, columns = compute_winograd.tiles(layer.window)
    return replace(layer, image=(n, 2 * rows + 2, 2 * columns + 2, channels))


def winograd_values(layer: Layer, instruction: str) -> tuple[int, ...]:
    """Shape of the transformed image, its channels filled up to whole instructions."""
    rows, columns = compute_winograd.tiles(layer.window)
    channels = _round_up(layer.image[3], DOTS[instruction].group)
    return (layer.window.n, rows, POSITIONS, columns, channels)


def winograd_image_kernel(layer: Layer, instruction: str, target: Target) -> Kernel:
    """Codes [N * H * W * C] of whole tiles -> transformed codes [N, TY, 16, TX, C]."""
    dtype = DOTS[instruction].data
    offset = 0 if dtype == "int16" else 2 * (2**layer.activation_bits - 1)
    codes = te.placeholder((prod(layer.image),), "uint8", "codes")
    values = compute_winograd.transform_image(codes, layer.window, layer.image, dtype, offset)
    lanes = target.vector_bits // (16 if dtype == "int16" else 8)
    return _kernel(
        [codes], [values], lambda sch: winograd_cpu.transform_image(sch, lanes), "winograd image"
    )


def winograd_kernel(
    layer: Layer,
    operands: Sequence[Operand],
    outputs: Sequence[Output],
    tile: Tile,
    instruction: str,
    chunk: int = 0,
) -> Kernel:
    """3x3 windows by Winograd's F(2x2, 3x3).

    Arguments: values [N, TY, 16, TX, C], weight [O/B, 16, C/t, B, t], correction [4 * O],
    operands; outputs. ``chunk``: as for ``dot_kernel``.
    """
    dot = DOTS[instruction]
    values = te.placeholder(winograd_values(layer, instruction), dot.data, "values")
    steps = int(values.shape[4]) // dot.group
    shape = (-(-layer.out_channels // tile.block), POSITIONS, steps, tile.block, dot.group)
    weight = te.placeholder(shape, dot.weight, "weight")
    if dot.halves and not chunk:
        raise ValueError(f"{instruction} would overflow int16")
    acc = compute_winograd.winograd_conv(
        values, weight, layer.window, chunk if dot.halves else None
    )
    channels = layer.out_channels
    correction = te.placeholder((4 * channels,), "int32", "correction")

    def read(n: Expr, y: Expr, x: Expr, c: Expr) -> Expr:
        place = (y % 2 * 2 + x % 2) * channels
        total = acc[n, y, x, c // tile.block, c % tile.block] + correction[place + c]
        return total >> tirx.const(2, "int32")

    # the weights of the next position, while those of this one are used several times
    panel = steps * tile.block * dot.group
    ahead = panel if dot.weight == "int8" and panel * POSITIONS * shape[0] > PREFETCHED else 0
    holders, results, names = _stages(layer.out_shape, read, operands, outputs)
    return _kernel(
        [values, weight, correction, *holders],
        results,
        lambda sch: winograd_cpu.winograd_conv(
            sch, tile,
            winograd_patch(layer, tile), channels, names,
            instruction=instruction, halves=bool(dot.halves), ahead=ahead,
            bands=_bands(layer, weight, 2 * winograd_patch(layer, tile)[0]),
        ),
        f"{WINOGRAD}{instruction}",
    )  # fmt: skip


def grouped_kernel(
    layer: Layer, operands: Sequence[Operand], outputs: Sequence[Output], tile: Tile
) -> Kernel:
    """Arguments: codes, weight [KH, KW, C/G, O/B, B], [correction], operands; outputs."""
    window = layer.window
    codes = te.placeholder((prod(layer.image),), "uint8", "codes")
    shape = (window.kh, window.kw, layer.group_in, layer.out_channels // tile.block, tile.block)
    weight = te.placeholder(shape, "int16", "weight")
    acc = compute.grouped_conv(codes, weight, window, layer.image, layer.group_out)
    correction = _correction(layer)
    read = _exact(layer, acc, tile.block, *correction or [None])
    holders, results, names = _stages(layer.out_shape, read, operands, outputs)
    return _kernel(
        [codes, weight, *correction, *holders],
        results,
        lambda sch: conv_cpu.grouped_conv(
            sch, tile, layer.out_channels, names, bands=_bands(layer, weight)
        ),
        "multiply-add",
    )


# ---------------------------------------------------------------------------- simple kernels


def elementwise_kernel(
    shape: Shape, operands: Sequence[Operand], outputs: Sequence[Output]
) -> Kernel:
    """Arguments: operands; outputs. Without vectors and planes the shape is only a view."""
    flat = not any(operand.per_channel for operand in operands)
    if flat and not any(output.planes for output in outputs):
        total = prod(shape)
        lanes = largest_divisor(total, 64)
        most = min(4096, total // lanes // THREADS_SHARE)
        rows = largest_divisor(total // lanes, max(1, most))
        shape = (1, total // lanes // rows, rows, lanes)
    holders, results, names = _stages(shape, None, operands, outputs)
    return _kernel(holders, results, lambda sch: simple_cpu.elementwise(sch, names), "elementwise")


def pack_kernel(pixels: int, channels: int, groups: int, bits: int, arch: str = "") -> Kernel:
    """Codes [pixels, channels] -> planes [bits, pixels, groups * ceil(channels/groups/8)]."""
    if channels // groups % 8 == 0 and pack_script.packs(pixels * channels, arch):
        func, kinds = pack_script.pack(pixels * channels, bits, arch)
        return Kernel(func, (kinds[0],), (kinds[1],), "pack")
    codes = te.placeholder((pixels, channels), "uint8", "codes")
    planes = compute.pack_groups(codes, groups, bits)
    return _kernel([codes], [planes], simple_cpu.pack, "pack")


def pad_kernel(
    images: int,
    size: tuple[int, int, int],
    pads: tuple[int, int, int, int],
    fill: Sequence[int],
    dtypes: tuple[str, str],
    last_mask: int = 255,
    offset: int = 0,
) -> Kernel:
    """Copy images [images, h, w, c] into a border of constants, converting the element type.

    Args:
        images: batch, times planes (plane-major) for planes.
        size: (h, w, c) of the source.
        pads: top, left, bottom, right.
        fill: border value; one, or one a plane.
        dtypes: of source and result.
        last_mask: ANDed into the fill of the last byte of a pixel (unused bits stay zero).
        offset: taken from every inner value.
    """
    func, kinds = pad_script.pad(images, size, pads, tuple(fill), dtypes, last_mask, offset)
    return Kernel(func, (kinds[0],), (kinds[1],), "pad")
