"""Kernels of the GPU: one skeleton, in which blocks and threads are bound from the start.

A kernel makes cells of an image [N, H, W, C], each an expression over an accumulator (which a
device function of ``cuda_kernels.cuh`` leaves in shared memory or in a register) and operands.
Layouts:

* codes: uint8 ``[N, H, W, C]``.
* planes: uint32 ``[A, N, H, W, G * ceil(C/G/32)]``; plane i holds bit i of each code, channel
  ``32*k + b`` of a group in bit b of word k; bits without a channel are zero.
* quads: uint32 ``[N, H, W, G * ceil(C/G/4)]``: four codes a word.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as script

from mpqc.cuda.codegen import device_source
from mpqc.errors import UsageError
from mpqc.graph import TensorType
from mpqc.kernels import Kernel, Layer, Operand, Output, Shape
from mpqc.schedules.cuda_product import ProductTile

Expr = Any
Pads = tuple[int, int, int, int]

THREADS = 256
WARP = 32
WORD = 32  # codes of a plane's word
QUAD = 4  # codes of a byte each in a word
MOST_ELEMENTS = 2**31 - 2**16  # places are int32, also those of threads behind the last element


def words_of(channels: int, groups: int, each: int) -> int:
    """Words of a pixel, every group on whole words of ``each`` codes."""
    return groups * -(-(channels // groups) // each)


@dataclass
class _Body:
    """What is known inside of a kernel's loops."""

    buffers: dict[str, Any]
    block: Expr
    thread: Expr

    def local(self, dtype: str) -> Any:
        return script.sblock_alloc_buffer((1,), dtype, scope="local")

    def call(self, name: str, *arguments: Expr) -> None:
        """A device function."""
        script.evaluate(script.cuda.func_call(name, *arguments, source_code=device_source()))


def _build(
    parameters: Sequence[tuple[str, TensorType]],
    blocks: int,
    threads: int,
    body: Callable[[_Body], None],
) -> Any:
    with IRBuilder() as builder, script.prim_func(s_tir=True):
        script.func_name("kernel")
        buffers = {
            name: script.arg(name, script.Buffer((max(1, kind.elements),), kind.dtype))
            for name, kind in parameters
        }
        with (
            script.thread_binding(0, max(1, blocks), thread="blockIdx.x") as block,
            script.thread_binding(0, threads, thread="threadIdx.x") as thread,
            script.sblock("cells"),
        ):
            script.reads()
            script.writes()
            body(_Body(buffers, block, thread))
    return builder.get()


def _when(condition: Expr | None, body: Callable[[], None]) -> None:
    if condition is None:
        body()
        return
    with script.If(condition), script.Then():
        body()


def _int(value: int) -> Expr:
    return tirx.const(value, "int32")


@dataclass(frozen=True)
class _Cells:
    """An image of cells and what is written of it."""

    shape: Shape
    operands: Sequence[Operand]
    outputs: Sequence[Output]

    @property
    def rows(self) -> int:
        return prod(self.shape[:3])

    @property
    def channels(self) -> int:
        return self.shape[3]

    @property
    def words(self) -> int:
        return -(-self.channels // WORD)

    @property
    def packs(self) -> bool:
        return any(output.planes for output in self.outputs)

    def inputs(self) -> list[tuple[str, TensorType]]:
        return [
            (
                f"operand{index}",
                TensorType(
                    operand.dtype, (self.channels,) if operand.per_channel else self.shape
                ),
            )
            for index, operand in enumerate(self.operands)
        ]  # fmt: skip

    def results(self, types: Sequence[str]) -> list[tuple[str, TensorType]]:
        found = []
        for index, (output, dtype) in enumerate(zip(self.outputs, types, strict=True)):
            if output.keep:
                found.append((f"result{index}", TensorType(dtype, self.shape)))
            if output.planes:
                shape = (output.bits, *self.shape[:3], self.words)
                found.append((f"planes{index}", TensorType("uint32", shape)))
        return found

    def types(self, accumulator: str) -> list[str]:
        """Element types of the outputs, from their expressions over anything."""
        kinds = {operand.name: operand.dtype for operand in self.operands} | {"acc": accumulator}
        found = []
        for output in self.outputs:
            value = output.cell(lambda name: tirx.Var("x", kinds[name]))
            kinds[output.name] = str(value.ty)
            found.append(kinds[output.name])
        return found

    def emit(
        self, body: _Body, row: Expr, channel: Expr, valid: Expr | None,
        accumulator: Callable[[], Expr] | None, lane: Expr,
    ) -> None:  # fmt: skip
        """The cell at (row, channel); 32 lanes hold adjacent channels where planes are packed."""
        packed = [index for index, output in enumerate(self.outputs) if output.planes]
        codes = {index: body.local("int32") for index in packed}
        words = [body.local("uint32") for _ in packed[:1]]
        for code in codes.values():
            script.buffer_store(code, _int(0), [0])

        def cell() -> None:
            known: dict[str, Expr] = {}
            if accumulator is not None:
                known["acc"] = script.bind(accumulator())
            readers = {o.name: (i, o) for i, o in enumerate(self.operands)}

            def read(name: str) -> Expr:
                if name not in known:
                    index, operand = readers[name]
                    at = channel if operand.per_channel else row * self.channels + channel
                    known[name] = script.bind(body.buffers[f"operand{index}"][at])
                return known[name]

            for index, output in enumerate(self.outputs):
                value = known[output.name] = script.bind(output.cell(read))
                if output.keep:
                    at = row * self.channels + channel
                    script.buffer_store(body.buffers[f"result{index}"], value, [at])
                if index in codes:
                    script.buffer_store(codes[index], value.astype("int32"), [0])

        _when(valid, cell)
        first = tirx.all(lane == 0, row < self.rows, channel < self.words * WORD)
        for index in packed:
            _vote(
                codes[index], self.outputs[index].bits, words[0], first,
                body.buffers[f"planes{index}"],
                lambda bit: (bit * self.rows + row) * self.words + channel // WORD,
            )  # fmt: skip


def _vote(
    code: Expr, bits: int, word: Expr, first: Expr, planes: Any, place: Callable[[int], Expr]
) -> None:
    """Gather each bit of a warp's codes into a word, which one lane writes."""
    for bit in range(bits):
        vote = tirx.call_extern("uint32", "mpqc::vote", (code[0] >> bit) & 1)
        script.buffer_store(word, vote, [0])
        with script.If(first), script.Then():
            script.buffer_store(planes, word[0], [place(bit)])


def _kernel(
    inputs: Sequence[tuple[str, TensorType]],
    results: Sequence[tuple[str, TensorType]],
    blocks: int,
    threads: int,
    body: Callable[[_Body], None],
    variant: str,
) -> Kernel:
    largest = max(kind.elements for _, kind in [*inputs, *results])
    if largest >= MOST_ELEMENTS:
        raise UsageError(
            f"a tensor of {largest} elements is beyond what GPU kernels index: choose a smaller "
            "--batch"
        )
    func = _build([*inputs, *results], blocks, threads, body)
    return Kernel(func, tuple(t for _, t in inputs), tuple(t for _, t in results), variant)


def _pull_in_device_code(body: _Body) -> None:
    """Kernels that vote without a product need the shared source too."""
    body.call("mpqc::begin")


def elementwise_kernel(
    shape: Shape, operands: Sequence[Operand], outputs: Sequence[Output]
) -> Kernel:
    """Arguments: operands; outputs."""
    cells = _Cells(shape, operands, outputs)

    def body(at: _Body) -> None:
        _pull_in_device_code(at)
        lane = at.thread % WARP
        if cells.packs:
            unit = at.block * (THREADS // WARP) + at.thread // WARP
            row, channel = unit // cells.words, unit % cells.words * WORD + lane
            valid = tirx.all(row < cells.rows, channel < cells.channels)
        else:
            index = at.block * THREADS + at.thread
            row, channel = index // cells.channels, index % cells.channels
            valid = index < cells.rows * cells.channels
        cells.emit(at, row, channel, valid, None, lane)

    lanes = cells.words * WORD if cells.packs else cells.channels
    return _kernel(
        cells.inputs(), cells.results(cells.types("int32")), -(-cells.rows * lanes // THREADS),
        THREADS, body, "elementwise",
    )  # fmt: skip


def copy_kernel(size: int, dtype: str) -> Kernel:
    """Arguments: source [size]; result [size]."""
    operand = Operand("x", False, dtype)
    output = Output("y", lambda read: read("x"))
    return elementwise_kernel((1, 1, 1, size), [operand], [output])


def pack_kernel(pixels: int, channels: int, groups: int, bits: int) -> Kernel:
    """Codes [pixels, channels] -> planes [bits, pixels, groups * ceil(channels/groups/32)]."""
    inside, words = channels // groups, words_of(channels, groups, WORD)
    each = words // groups

    def body(at: _Body) -> None:
        _pull_in_device_code(at)
        unit, lane = at.block * (THREADS // WARP) + at.thread // WARP, at.thread % WARP
        pixel, place = unit // words, unit % words
        within = place % each * WORD + lane
        code, word = at.local("int32"), at.local("uint32")
        script.buffer_store(code, _int(0), [0])
        source = pixel * channels + place // each * inside + within
        _when(
            tirx.all(pixel < pixels, within < inside),
            lambda: script.buffer_store(code, at.buffers["codes"][source].astype("int32"), [0]),
        )
        first = tirx.all(lane == 0, pixel < pixels)
        _vote(
            code, bits, word, first, at.buffers["planes"], lambda bit: bit * pixels * words + unit
        )

    return _kernel(
        [("codes", TensorType("uint8", (pixels, channels)))],
        [("planes", TensorType("uint32", (bits, pixels, words)))],
        -(-pixels * words * WARP // THREADS), THREADS, body, "pack",
    )  # fmt: skip


def quad_kernel(pixels: int, channels: int, groups: int) -> Kernel:
    """Codes [pixels, channels] -> bytes [pixels, groups * ceil(channels/groups/4) * 4]."""
    inside, words = channels // groups, words_of(channels, groups, QUAD)
    each = words // groups * QUAD
    total = pixels * words * QUAD

    def body(at: _Body) -> None:
        index = at.block * THREADS + at.thread
        pixel, place = index // (words * QUAD), index % (words * QUAD)
        within = place % each
        source = pixel * channels + place // each * inside + within
        used = tirx.if_then_else(
            within < inside, at.buffers["codes"][source], tirx.const(0, "uint8")
        )
        _when(index < total, lambda: script.buffer_store(at.buffers["quads"], used, [index]))

    return _kernel(
        [("codes", TensorType("uint8", (pixels, channels)))],
        [("quads", TensorType("uint8", (pixels, words * QUAD)))],
        -(-total // THREADS), THREADS, body, "quads",
    )  # fmt: skip


@dataclass(frozen=True)
class ProductLayer:
    """An integer layer as the product kernels see it.

    Attributes:
        layer: geometry and widths.
        source: (n, h, w, c) of the image before padding.
        pads: top, left, bottom, right.
        zero_point: code of the padding.
        planes: words hold planes of bits, not four codes each.
        wide: weights have nine bits: bytes w0 + 2 w1, w0 their lowest bit.
    """

    layer: Layer
    source: Shape
    pads: Pads
    zero_point: int
    planes: bool
    wide: bool = False

    @property
    def group_words(self) -> int:
        each = WORD if self.planes else QUAD
        return words_of(self.layer.group_in, 1, each)

    @property
    def words(self) -> int:
        return self.group_words * self.layer.groups

    @property
    def depth(self) -> int:
        """Words of the reduction."""
        return self.layer.window.kh * self.layer.window.kw * self.group_words

    @property
    def rows(self) -> int:
        return prod(self.layer.out_shape[:3])

    @property
    def data_planes(self) -> int:
        return self.layer.activation_bits if self.planes else 1

    @property
    def weight_planes(self) -> int:
        return self.layer.weight_bits if self.planes else 2 if self.wide else 1

    @property
    def sums(self) -> bool:
        """Levels 2v - (2**b - 1) need the sum of the codes under each window."""
        return self.planes and self.layer.odd

    def window(self, words: int, group_words: int) -> str:
        """The C++ type of the geometry."""
        w, (n, h, width, _), (top, left, *_) = self.layer.window, self.source, self.pads
        numbers = (
            n, h, width, words, group_words, w.oh, w.ow, w.kh, w.kw, w.sy, w.sx, w.dy, w.dx, top,
            left,
        )  # fmt: skip
        return f"mpqc::window<{', '.join(map(str, numbers))}>"

    def codes(self) -> str:
        """The C++ type of the words."""
        last = self.layer.group_in - (self.group_words - 1) * WORD
        mask = 2**last - 1 if self.planes else 2**32 - 1
        negative = self.planes and not self.layer.odd
        numbers = (
            "mpqc::BITS" if self.planes else "mpqc::BYTES", self.data_planes, self.weight_planes,
            str(negative).lower(), f"{self.zero_point}u", f"{mask}u", str(self.sums).lower(),
        )  # fmt: skip
        return f"mpqc::codes<{', '.join(map(str, numbers))}>"

    def blocks(self, tile: ProductTile) -> tuple[int, int]:
        """Blocks over rows, and over the channels of a group."""
        return -(-self.rows // tile.rows), -(-self.layer.group_out // tile.columns)

    def weight_type(self, tile: ProductTile) -> TensorType:
        """[G * columns, chunks, J, N, K] words, as ``packing.product_weights`` lays them."""
        _, across = self.blocks(tile)
        chunks = -(-self.depth // tile.depth)
        shape = (self.layer.groups * across, chunks, self.weight_planes, tile.columns, tile.depth)
        return TensorType("uint32", shape)


def product_kernel(
    shape: ProductLayer,
    operands: Sequence[Operand],
    outputs: Sequence[Output],
    tile: ProductTile,
    variant: str,
) -> Kernel:
    """Implicit matrix product with its epilogue.

    Arguments: planes or quads, weight, [correction int32 [O]], operands; outputs. Planes can be
    packed where no group of output channels ends within a word.
    """
    layer = shape.layer
    cells = _Cells(layer.out_shape, operands, outputs)
    down, across = shape.blocks(tile)
    threads, columns = tile.threads, tile.columns
    device = (
        f"mpqc::product<{shape.window(shape.words, shape.group_words)}, {shape.codes()}, "
        f"mpqc::tile<{str(tile.mma).lower()}, {tile.rows}, {columns}, {tile.depth}, {threads}, "
        f"{tile.warp_rows}, {tile.warp_columns}>, {across}, {layer.groups}>"
    )
    top = 2**layer.weight_bits - 1

    def body(at: _Body) -> None:
        words = tile.shared_words(shape.data_planes, shape.weight_planes, shape.sums)
        shared = script.sblock_alloc_buffer((words,), "int32", scope="shared")
        at.call(device, shared.data, at.buffers["data"].data, at.buffers["weight"].data, at.block)
        per_row = across * layer.groups
        first_row = at.block // per_row * tile.rows
        group, column = at.block // across % layer.groups, at.block % across * columns
        with script.serial(0, tile.rows * columns // threads) as turn:
            index = turn * threads + at.thread
            row, within = first_row + index // columns, column + index % columns
            channel = group * layer.group_out + within

            def accumulator() -> Expr:
                value = shared[index]
                if shape.sums:
                    value = value * 2 - shared[tile.rows * columns + index // columns] * top
                return value + at.buffers["correction"][channel] if layer.zero_point else value

            conditions = []
            if shape.rows % tile.rows:
                conditions.append(row < shape.rows)
            if layer.group_out % columns:
                conditions.append(within < layer.group_out)
            valid = tirx.all(*conditions) if conditions else None
            cells.emit(at, row, channel, valid, accumulator, at.thread % WARP)

    inputs = [
        ("data", TensorType("uint32", (shape.data_planes, *shape.source[:3], shape.words))),
        ("weight", shape.weight_type(tile)),
    ]
    if layer.zero_point:
        inputs.append(("correction", TensorType("int32", (layer.out_channels,))))
    return _kernel(
        [*inputs, *cells.inputs()], cells.results(cells.types("int32")),
        down * across * layer.groups, threads, body, variant,
    )  # fmt: skip


def direct_kernel(
    shape: ProductLayer, operands: Sequence[Operand], outputs: Sequence[Output], weight: str
) -> Kernel:
    """Plain multiply-add, a thread a cell.

    Arguments: codes, weight [KH, KW, C/G, O] of type ``weight``, [correction], operands; outputs.
    """
    layer = shape.layer
    cells = _Cells(layer.out_shape, operands, outputs)
    c_type = {"int8": "signed char", "int16": "short"}[weight]
    device = (
        f"mpqc::direct<{shape.window(shape.source[3], layer.group_in)}, {shape.zero_point}, "
        f"{layer.out_channels}, {layer.group_out}, {c_type}>"
    )

    def body(at: _Body) -> None:
        lane = at.thread % WARP
        sum_ = at.local("int32")
        if cells.packs:
            unit = at.block * (THREADS // WARP) + at.thread // WARP
            row, channel = unit // cells.words, unit % cells.words * WORD + lane
            valid = tirx.all(row < cells.rows, channel < cells.channels)
        else:
            index = at.block * THREADS + at.thread
            row, channel = index // cells.channels, index % cells.channels
            valid = index < cells.rows * cells.channels

        def accumulator() -> Expr:
            at.call(
                device, sum_.data, at.buffers["data"].data, at.buffers["weight"].data, row, channel
            )
            value = sum_[0]
            return value + at.buffers["correction"][channel] if layer.zero_point else value

        cells.emit(at, row, channel, valid, accumulator, lane)

    w = layer.window
    inputs = [
        ("data", TensorType("uint8", shape.source)),
        ("weight", TensorType(weight, (w.kh, w.kw, layer.group_in, layer.out_channels))),
    ]
    if layer.zero_point:
        inputs.append(("correction", TensorType("int32", (layer.out_channels,))))
    lanes = cells.words * WORD if cells.packs else cells.channels
    return _kernel(
        [*inputs, *cells.inputs()], cells.results(cells.types("int32")),
        -(-cells.rows * lanes // THREADS), THREADS, body, "multiply-add",
    )  # fmt: skip
