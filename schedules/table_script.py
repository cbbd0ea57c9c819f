"""What the lookup kernel of x86 needs beside weights, spelled out: tables and sums of codes.

Of the plain expressions (``compute.expand_rows``, ``compute.row_sum``) LLVM makes two to three
times as many instructions.
"""

from functools import reduce
from typing import Any, TypeAlias

from tvm import tirx
from tvm.script import tirx as T

from mpqc.compute import Padded, Window
from mpqc.graph import TensorType
from mpqc.schedules.llvm_intrinsics import llvm_intrinsic
from mpqc.schedules.simple_cpu import SMALL, largest_factor

PatternKernel: TypeAlias = tuple[Any, tuple[TensorType, ...]]

STEP = 16  # codes of a step: four tables, or the bytes that one psadbw adds up
MOST_LOADS = 64  # of a pixel: they are unrolled
_TABLES = 64  # bytes that a step makes


def expands(codes: int, channels: int) -> bool:
    """Whether ``expand`` can: whole tables, and a step of them."""
    return channels % 4 == 0 and codes >= STEP


def expand(
    codes: int, ahead: int = 0, slices: tuple[int, int] = (1, 0)
) -> tuple[Any, tuple[TensorType, TensorType]]:
    """Codes [codes] of at most six bits -> tables [codes / 4, 16], as ``compute.expand_rows``.

    ``slices``: number and codes of the slices of a pixel; all pixels' first slices come first.

    Entry ``b`` of a table is a sum of the first two codes, chosen by ``b % 4``, and one of the last
    two, chosen by ``b // 4``; the four sums of two codes are four bytes. The last step overlaps the
    one before it where the codes are no multiple of a step.
    """
    steps, last = -(-codes // STEP), codes - STEP
    inner = largest_factor(steps, 256)
    loop = T.parallel if codes * _TABLES // STEP >= SMALL else T.serial
    first = [4 * table + b % 4 for table in (0, 2) for b in range(16)]
    second = [4 * table + b // 4 for table in (1, 3) for b in range(16)]

    def sums(source: Any, start: Any) -> Any:
        """The sums of two codes, eight times: 0, a, b, a + b."""
        read = source.vload([start], "uint8x16")
        if ahead:
            next_ = source.vload([T.min(start + ahead, last)], "uint8x16")
            read = read + (next_ << T.broadcast(tirx.const(4, "uint8"), STEP))
        pairs = T.reinterpret(read, dtype="uint16x8")
        pairs = T.Cast("uint32x8", pairs)  # a + 2**8 b

        def shifted(bits: int) -> Any:
            return pairs << T.broadcast(tirx.const(bits, "uint32"), 8)

        top = T.broadcast(tirx.const(0xFF000000, "uint32"), 8)
        return T.reinterpret(shifted(8) + shifted(24) + (shifted(16) & top), dtype="uint8x32")

    def tables(four: Any, half: int) -> Any:
        """Two tables of the four."""
        picked = [T.Shuffle([four], [half * 16 + i for i in places]) for places in (first, second)]
        return picked[0] + picked[1]

    count, size = slices
    apart = codes // count  # codes between neighbouring slices of a pixel

    def place(start: Any) -> Any:
        """Of the tables of codes from ``start`` on."""
        if count == 1:
            return start * 4
        pixel, within = start // (count * size), start % (count * size)
        return (within // size * apart + pixel * size + within % size) * 4

    @T.prim_func(s_tir=True)
    def expanding(
        codes_: T.Buffer((codes,), "uint8"), rows: T.Buffer((codes // 4, 16), "uint8")
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        flat = T.decl_buffer((codes * 4,), "uint8", data=rows.data)
        for outer in loop(steps // inner):
            with T.sblock("steps"):
                T.reads()
                T.writes()
                for step in T.serial(inner):
                    start = T.min((outer * inner + step) * STEP, last)
                    to = place(start)
                    flat.vstore([to], tables(sums(codes_, start), 0))
                    flat.vstore([to + _TABLES // 2], tables(sums(codes_, start), 1))

    return expanding, (TensorType("uint8", (codes,)), TensorType("uint8", (codes // 4, 16)))


def patterns(image: Padded, bits: int, beside: int = 0, *, summed: bool = False) -> PatternKernel:
    """Codes -> places of their tables among those of all patterns, a border around them.

    Four codes of ``bits`` are a pattern of a byte; its table is 16 bytes.

    Args:
        image: of the codes.
        bits: of a code, 1 or 2.
        beside: the upper half of a pattern of one bit's codes is that of the pixel so many columns
            to the right.
        summed: the sums of the pixels' codes, too.

    Returns:
        Kernel from uint8 [N * H * W * C] to uint16 [N * rows * columns * C / 4] and, if summed,
        int32 [N * rows * columns], with the types of its arguments.
    """
    if not (any(image.pads) or beside or summed):  # no rows: one plain loop is less code
        steps = image.codes // STEP
        image = Padded(1, steps // largest_factor(steps, 256), largest_factor(steps, 256), STEP)
    channels, columns = image.channels, image.columns
    tables, inner = channels // 4, image.width * channels
    left, row = image.pads[1] * tables, columns * tables
    right = row - left - inner // 4
    count = image.images * image.rows * row
    # one product brings the four codes of 32 bits together in the highest byte
    gather = sum(1 << 24 + t * (bits - 8) for t in range(4))
    mask = (2 ** (4 * bits) - 1) << 4
    border = sum(image.fill << t * bits for t in range(4)) << 4
    paired = beside > 0
    edge = border + (border << 4 if paired else 0)
    loop = T.parallel if image.codes >= SMALL else T.serial

    def places(source: Any, start: Any) -> Any:
        """Of the tables of the codes from ``start`` on."""
        fours = T.reinterpret(source.vload([start], f"uint8x{STEP}"), dtype="uint32x4")
        packed = fours * T.broadcast(tirx.const(gather, "uint32"), 4)
        packed = packed >> T.broadcast(tirx.const(20, "uint32"), 4)
        return T.Cast("uint16x4", packed & T.broadcast(tirx.const(mask, "uint32"), 4))

    @T.inline
    def fill(result: Any, start: Any, size: Any, value: Any) -> None:
        for r in T.serial(size):
            result[start + r] = value

    @T.inline
    def place_line(codes: Any, result: Any, line: Any) -> None:
        if image.inside(line):
            if paired:
                own = T.alloc_buffer((row + beside * tables,), "uint16")
                fill(own, 0, left, T.uint16(border))
                for step in T.serial(inner // STEP):
                    start = image.source(line) * channels + step * STEP
                    own.vstore([left + step * 4], places(codes, start))
                fill(own, left + inner // 4, right + beside * tables, T.uint16(border))
                for r in T.serial(row):
                    result[line * row + r] = own[r] + (own[r + beside * tables] << T.uint16(4))
            else:
                fill(result, line * row, left, T.uint16(edge))
                for step in T.serial(inner // STEP):
                    start = image.source(line) * channels + step * STEP
                    result.vstore([line * row + left + step * 4], places(codes, start))
                fill(result, line * row + left + inner // 4, right, T.uint16(edge))
        else:
            fill(result, line * row, row, T.uint16(edge))

    @T.inline
    def sum_line(codes: Any, sums: Any, line: Any) -> None:
        if image.inside(line):
            fill(sums, line * columns, image.pads[1], image.fill * channels)
            for x in T.serial(image.width):
                sums[line * columns + image.pads[1] + x] = pixel_sum(
                    codes, image.source(line) + x, channels
                )
            fill(
                sums,
                line * columns + image.pads[1] + image.width,
                image.pads[3],
                image.fill * channels,
            )
        else:
            fill(sums, line * columns, columns, image.fill * channels)

    @T.inline
    def each_line(codes: Any, result: Any, sums: Any) -> None:
        for line in loop(image.images * image.rows):
            with T.sblock("line"):
                T.reads()
                T.writes()
                place_line(codes, result, line)
                if summed:
                    sum_line(codes, sums, line)

    kinds = (TensorType("uint8", (image.codes,)), TensorType("uint16", (count,)))
    if not summed:

        @T.prim_func(s_tir=True)
        def placing(
            codes: T.Buffer((image.codes,), "uint8"), result: T.Buffer((count,), "uint16")
        ) -> None:
            T.func_attr({"tirx.noalias": True})
            each_line(codes, result, None)

        return placing, kinds

    @T.prim_func(s_tir=True)
    def placing_and_summing(
        codes: T.Buffer((image.codes,), "uint8"),
        result: T.Buffer((count,), "uint16"),
        sums: T.Buffer((count // tables,), "int32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        each_line(codes, result, sums)

    return placing_and_summing, (*kinds, TensorType("int32", (count // tables,)))


def adds(channels: int) -> bool:
    """Whether ``code_sum`` can."""
    return channels % STEP == 0 and channels <= MOST_LOADS * STEP


def pixel_sum(codes: Any, pixel: Any, channels: int) -> Any:
    """Sum of a pixel's codes, int32."""
    absolute = llvm_intrinsic("llvm.x86.sse2.psad.bw")
    zero = T.broadcast(tirx.const(0, "uint8"), STEP)
    eights = [
        T.call_llvm_pure_intrin(
            absolute, codes.vload([pixel * channels + c], "uint8x16"), zero, dtype="uint64x2"
        )
        for c in range(0, channels, STEP)
    ]
    total = reduce(lambda a, b: a + b, eights)
    return T.Cast("int32", T.Shuffle([total], [0]) + T.Shuffle([total], [1]))


def code_sum(
    window: Window, image: tuple[int, int, int, int]
) -> tuple[Any, tuple[TensorType, TensorType]]:
    """Codes [N * H * W * C] -> int32 [N, OH, OW, 1], their sum under each window.

    Sums of pixels first, then of the window's: both fit int32.
    """
    n, height, width, channels = image
    oh, ow, kh, kw = window.oh, window.ow, window.kh, window.kw
    loop = T.parallel if n * height * width * channels >= SMALL else T.serial

    def of_window(pixels: Any, image_: Any, y: Any, x: Any) -> Any:
        line = image_ * height + y * window.sy
        places = [
            (line + ky * window.dy) * width + x * window.sx + kx * window.dx
            for ky in range(kh)
            for kx in range(kw)
        ]
        return reduce(lambda a, b: a + b, [pixels[place] for place in places])

    @T.prim_func(s_tir=True)
    def summing(
        codes: T.Buffer((n * height * width * channels,), "uint8"),
        sums: T.Buffer((n, oh, ow, 1), "int32"),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        pixels = T.alloc_buffer((n * height * width,), "int32")
        for line in loop(n * height):
            with T.sblock("pixels"):
                T.reads()
                T.writes()
                for x in T.serial(width):
                    pixels[line * width + x] = pixel_sum(codes, line * width + x, channels)
        for row in loop(n * oh):
            with T.sblock("windows"):
                T.reads()
                T.writes()
                for x in T.serial(ow):
                    sums[row // oh, row % oh, x, 0] = of_window(pixels, row // oh, row % oh, x)

    kinds = (
        TensorType("uint8", (n * height * width * channels,)),
        TensorType("int32", (n, oh, ow, 1)),
    )
    return summing, kinds
