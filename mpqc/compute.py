"""What the kernels compute, as tensor expressions: no loop order, no target.

Layouts (all row-major; pixels outside channels, so that a 1x1 layer may view its rows freely):

* codes: uint8 ``[N, H, W, C]``.
* planes: uint8 ``[A, N, H, W, C/8]``; plane i holds bit i of each code, channel ``8*k + b`` in bit
  b of byte k. Channels are padded to a multiple of 8 with zero bits.
* rows: a spatially padded image whose (W, C) axes are one: ``[..., H, W*C + slack]``, so that the
  kernel's window of one image row is one contiguous run.
* accumulators: int32 ``[N, OH, OW, O/B, B]``, B output channels a block.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from tvm import te, tirx

from mpqc.graph import Node

Expr = Any
Image = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution over an image that is padded already.

    Attributes:
        n, oh, ow: output batch, height, width.
        kh, kw: kernel extents.
        sy, sx: strides. dy, dx: dilations.
    """

    n: int
    oh: int
    ow: int
    kh: int
    kw: int
    sy: int
    sx: int
    dy: int
    dx: int

    @property
    def ih(self) -> int:
        """Rows of the padded input that the window touches."""
        return (self.oh - 1) * self.sy + (self.kh - 1) * self.dy + 1

    @property
    def iw(self) -> int:
        return (self.ow - 1) * self.sx + (self.kw - 1) * self.dx + 1


@dataclass(frozen=True)
class Padded:
    """An image of codes, and the border that kernels shall see around it.

    Attributes:
        images, height, width, channels: of the codes that lie in memory, without border.
        pads: top, left, bottom, right.
        fill: code of the border.
    """

    images: int
    height: int
    width: int
    channels: int
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    fill: int = 0

    @property
    def codes(self) -> int:
        return self.images * self.height * self.width * self.channels

    @property
    def rows(self) -> int:
        """Of an image with its border."""
        return self.pads[0] + self.height + self.pads[2]

    @property
    def columns(self) -> int:
        """Of an image with its border."""
        return self.pads[1] + self.width + self.pads[3]

    def inside(self, row: Expr) -> Expr:
        """Whether a row, counted through all images with their borders, is none of a border."""
        row = row % self.rows
        return tirx.all(row >= self.pads[0], row < self.pads[0] + self.height)

    def source(self, row: Expr) -> Expr:
        """First pixel in memory of a row inside."""
        return (row // self.rows * self.height + row % self.rows - self.pads[0]) * self.width


def fence(value: Expr) -> Expr:
    """Keep the product rounded on its own: no fused multiply-add across this point.

    LLVM's ``arithmetic.fence`` survives every optimisation; TVM allows contraction otherwise.
    """
    return tirx.call_llvm_pure_intrin("float32", "llvm.arithmetic.fence", value)


def bitplane_conv(
    planes: te.Tensor,
    weight: te.Tensor,
    window: Window,
    image: Image,
    group_bytes: int,
    blocks_a_group: int,
    negative_top: bool,
    chunk: int,
    pair_dtype: str = "uint16",
) -> te.Tensor:
    """Convolve bitplanes by AND and popcount.

        acc[n,y,x,o] = sum_ij  +-2**(i+j) * popcount(planes[i, ...] & weight[o, j, ...])

    ``part`` sums ``chunk`` bytes in uint8 (at most 31 * 8 = 248), ``pair`` sums a plane pair in
    ``pair_dtype`` (the caller proves that K fits), ``acc`` weighs the pairs in int32.

    Args:
        planes: uint8 flat [A, N, H, W, groups * group_bytes], the padded image.
        weight: uint8 [O/B, J, KH, taps, run bytes, B], plane j holds bit j of the codes. A run is
            the adjacent bytes of a window row: all taps when they touch, else one.
        window: geometry.
        image: (A, N, H, W, bytes of a pixel) of ``planes``.
        group_bytes: bytes of one pixel and group.
        blocks_a_group: blocks of B output channels in a group.
        negative_top: the last weight plane counts negative (two's complement).
        chunk: bytes that a uint8 partial sum covers; divides the run.
        pair_dtype: uint16 where K < 2**16, else uint32.

    Returns:
        int32 [N, OH, OW, O/B, B].
    """
    a_bits, batch, height, width, pixel_bytes = image
    blocks, j_bits, kh, taps, run, lanes = (int(extent) for extent in weight.shape)
    byte = te.reduce_axis((0, chunk), "byte")

    def part_of(n: Expr, y: Expr, x: Expr, o: Expr, j: Expr, i: Expr, *rest: Expr) -> Expr:
        ky, kx, c, lane = rest
        r = c * chunk + byte
        row = (i * batch + n) * height + y * window.sy + ky * window.dy
        column = (x * window.sx + kx * window.dx) * pixel_bytes
        group = (o // blocks_a_group) * group_bytes if blocks > blocks_a_group else 0
        data = planes[row * (width * pixel_bytes) + column + group + r]
        return te.sum(
            tirx.popcount(data & weight[o, j, ky, kx, r, lane]).astype("uint8"), axis=[byte]
        )

    part = te.compute(
        (window.n, window.oh, window.ow, blocks, j_bits, a_bits, kh, taps, run // chunk, lanes),
        part_of,
        name="part",
    )
    ky = te.reduce_axis((0, kh), "ky")
    kx = te.reduce_axis((0, taps), "kx")
    c = te.reduce_axis((0, run // chunk), "c")
    pair = te.compute(
        (window.n, window.oh, window.ow, blocks, j_bits, a_bits, lanes),
        lambda n, y, x, o, j, i, lane: te.sum(
            part[n, y, x, o, j, i, ky, kx, c, lane].astype(pair_dtype), axis=[ky, kx, c]
        ),
        name="pair",
    )
    return _weigh_pairs(pair, negative_top)


def popcount_conv(
    planes: te.Tensor,
    weight: te.Tensor,
    window: Window,
    image: Image,
    group_bytes: int,
    blocks_a_group: int,
    negative_top: bool,
) -> te.Tensor:
    """``bitplane_conv`` for machines that add neighbouring bytes: no sums in uint8.

    A run may end up to a byte behind the window's row: the weights there are zero.

    Args:
        planes: as there.
        weight: uint8 [O/B, J, KH, taps, run/2, B, 2]; K < 2**16.
        window: geometry.
        image: (A, N, H, W, bytes of a pixel) of ``planes``.
        group_bytes: bytes of one pixel and group.
        blocks_a_group: blocks of B output channels in a group.
        negative_top: the last weight plane counts negative (two's complement).

    Returns:
        int32 [N, OH, OW, O/B, B].
    """
    a_bits, batch, height, width, pixel_bytes = image
    blocks, j_bits, kh, taps, run, lanes, group = (int(extent) for extent in weight.shape)
    ky = te.reduce_axis((0, kh), "ky")
    kx = te.reduce_axis((0, taps), "kx")
    r = te.reduce_axis((0, run), "r")
    u = te.reduce_axis((0, group), "u")

    def pair_of(n: Expr, y: Expr, x: Expr, o: Expr, j: Expr, i: Expr, lane: Expr) -> Expr:
        row = (i * batch + n) * height + y * window.sy + ky * window.dy
        column = (x * window.sx + kx * window.dx) * pixel_bytes
        first = (o // blocks_a_group) * group_bytes if blocks > blocks_a_group else 0
        data = planes[row * (width * pixel_bytes) + column + first + r * group + u]
        count = tirx.popcount(data & weight[o, j, ky, kx, r, lane, u])
        return te.sum(count.astype("uint16"), axis=[ky, kx, r, u])

    pair = te.compute(
        (window.n, window.oh, window.ow, blocks, j_bits, a_bits, lanes), pair_of, name="pair"
    )
    return _weigh_pairs(pair, negative_top)


def _weigh_pairs(pair: te.Tensor, negative_top: bool) -> te.Tensor:
    """Sum of plane pairs [N, OH, OW, O/B, J, A, B] by their weights 2**(i+j)."""
    *_, j_bits, a_bits, lanes = (int(extent) for extent in pair.shape)
    j = te.reduce_axis((0, j_bits), "j")
    i = te.reduce_axis((0, a_bits), "i")

    def weigh(n: Expr, y: Expr, x: Expr, o: Expr, lane: Expr) -> Expr:
        factor = _plane_factor(i + j, j == j_bits - 1 if negative_top else None)
        weighed = pair[n, y, x, o, j, i, lane].astype("uint32") * factor
        return te.sum(weighed.astype("int32"), axis=[j, i])

    return te.compute((*pair.shape[:4], lanes), weigh, name="acc")


def _plane_factor(shift: Expr, negative: Expr | None) -> Expr:
    """+-2**shift modulo 2**32: a scalar, which LLVM would not make of a shift of vectors.

    Unsigned: TVM widens int32 arithmetic with indices to int64, which costs vectors twice.
    """
    one = tirx.const(1, "uint32")
    if negative is not None:
        one = tirx.Select(negative, tirx.const(2**32 - 1, "uint32"), one)
    return one << shift.astype("uint32")


def lut_conv(
    rows: te.Tensor,
    weight: te.Tensor,
    window: Window,
    image: tuple[int, int, int, int],
    negative_top: bool,
    chunk: int,
    pair_dtype: str = "uint16",
    vector: int = 0,
) -> te.Tensor:
    """Convolve by tables of partial sums: a weight plane's nibble picks the sum of its channels.

        acc[n,y,x,o] = sum_j  +-2**j * sum_k  rows[pixel, k, nibble[o, j, k]]
        rows[pixel, k, i] = sum_t  bit_t(i) * code[pixel, 4*k + t]

    Written without the gather, as the sum over the four bits of the nibble: entry 2**t of a row is
    the code of channel t, as is the difference of entries 15 and 7 for the last; entry 0 is zero.
    That is the meaning of the shuffle instructions that ``lut_intrinsics`` puts in its place.

    Args:
        rows: uint8 [S * N * H * W * C/S/4, 16], tables of the padded image, one slice of its
            channels after the other; entries fit: a <= 6.
        weight: uint8 [O/B, J, S, KH, taps, run, B], nibbles of plane j; a run is the adjacent
            tables of a window row.
        window: geometry.
        image: (N, H, W, tables of a pixel).
        negative_top: the last weight plane counts negative (two's complement).
        chunk: tables that a uint8 partial sum covers; divides the run.
        pair_dtype: of the sum over all K of one plane.
        vector: bytes of which the even ones are the first half of their channels; 0: in order.

    Returns:
        int32 [N, OH, OW, O/B, B].
    """
    batch, height, width, tables = image
    blocks, j_bits, slices, kh, taps, run, lanes = (int(extent) for extent in weight.shape)
    t = te.reduce_axis((0, chunk), "t")

    def part_of(n: Expr, y: Expr, x: Expr, o: Expr, j: Expr, *rest: Expr) -> Expr:
        s, ky, kx, c, lane = rest
        r = c * chunk + t
        line = ((s * batch + n) * height + y * window.sy + ky * window.dy) * width
        row = (line + x * window.sx + kx * window.dx) * (tables // slices) + r
        return te.sum(_looked_up(rows, row, weight[o, j, s, ky, kx, r, lane]), axis=[t])

    part = te.compute(
        (window.n, window.oh, window.ow, blocks, j_bits, slices, kh, taps, run // chunk, lanes),
        part_of,
        name="part",
    )
    return _weigh_planes(part, negative_top, pair_dtype, vector)


def _looked_up(rows: te.Tensor, row: Expr, nibble: Expr) -> Expr:
    """Entry of a table, as the sum over the bits of its number."""
    total = rows[row, 0]
    for bit in range(4):
        picked = (nibble >> tirx.const(bit, "uint8")) & tirx.const(1, "uint8")
        code = rows[row, 1 << bit] if bit < 3 else rows[row, 15] - rows[row, 7]
        total = total + picked * code
    return total


def _weigh_planes(part: te.Tensor, negative_top: bool, pair_dtype: str, vector: int) -> te.Tensor:
    """Sum uint8 [N, OH, OW, O/B, J, S, KH, taps, chunks, B] over the window, then the planes."""
    n, oh, ow, blocks, j_bits, slices, *window, lanes = (int(extent) for extent in part.shape)
    kh, taps, chunks = window
    s = te.reduce_axis((0, slices), "s")
    ky = te.reduce_axis((0, kh), "ky")
    kx = te.reduce_axis((0, taps), "kx")
    c = te.reduce_axis((0, chunks), "c")
    planes, half = (j_bits,) if j_bits > 1 else (), vector // 2
    vectors = (lanes // vector,) if vector and lanes > vector else ()

    def sum_of(n: Expr, y: Expr, x: Expr, o: Expr, *rest: Expr) -> Expr:
        lane = rest[-1]
        if vector:
            lane = lane * 2 + rest[-2] + (rest[-3] * vector if vectors else 0)
        byte = part[n, y, x, o, rest[0] if planes else 0, s, ky, kx, c, lane]
        return te.sum(byte.astype(pair_dtype), axis=[s, ky, kx, c])

    order = (*vectors, 2, half) if vector else (lanes,)
    pair = te.compute((n, oh, ow, blocks, *planes, *order), sum_of, name="pair")

    def read(*place: Expr) -> Expr:
        *outer, lane = place
        if not vector:
            return pair[place]
        first = (lane // vector,) if vectors else ()
        return pair[(*outer, *first, lane % vector // half, lane % half)]

    if not planes:  # nothing to weigh: a stage that the schedule inlines

        def signed(*place: Expr) -> Expr:
            value = read(*place).astype("int32")
            return -value if negative_top else value

        return te.compute((n, oh, ow, blocks, lanes), signed, name="acc")
    j = te.reduce_axis((0, j_bits), "j")

    def weigh(n: Expr, y: Expr, x: Expr, o: Expr, lane: Expr) -> Expr:
        factor = _plane_factor(j, j == j_bits - 1 if negative_top else None)
        weighed = read(n, y, x, o, j, lane).astype("uint32") * factor
        return te.sum(weighed.astype("int32"), axis=[j])

    return te.compute((n, oh, ow, blocks, lanes), weigh, name="acc")


NIBBLE_STEPS = 3  # tables of four codes of one bit whose sum fits four bits


def lut_pair_conv(
    rows: te.Tensor,
    weight: te.Tensor,
    window: Window,
    image: tuple[int, int, int, int],
    negative_top: bool,
    chunk: int,
    pair_dtype: str = "uint16",
    vector: int = 0,
) -> te.Tensor:
    """``lut_conv`` for codes of one bit: two neighbouring output pixels in a byte, half each.

    Args:
        rows: uint8 [S * N * H * W * C/S/4, 16]; an entry is that of a pixel plus 16 times that of
            the pixel ``window.sx`` to the right.
        weight: as for ``lut_conv``, and so are the others.
        window: geometry.
        image: (N, H, W, tables of a pixel).
        negative_top: the last weight plane counts negative.
        chunk: a multiple of ``NIBBLE_STEPS``; divides the run.
        pair_dtype: of the sum over all K of one plane.
        vector: bytes of which the even ones are the first half of their channels; 0: in order.
    """
    batch, height, width, tables = image
    blocks, j_bits, slices, kh, taps, run, lanes = (int(extent) for extent in weight.shape)
    steps = chunk // NIBBLE_STEPS
    t = te.reduce_axis((0, NIBBLE_STEPS), "t")

    def part_of(n: Expr, y: Expr, x: Expr, o: Expr, j: Expr, *rest: Expr) -> Expr:
        s, ky, kx, c, g, lane = rest
        r = c * chunk + g * NIBBLE_STEPS + t
        line = ((s * batch + n) * height + y * window.sy + ky * window.dy) * width
        row = (line + x * (2 * window.sx) + kx * window.dx) * (tables // slices) + r
        return te.sum(_looked_up(rows, row, weight[o, j, s, ky, kx, r, lane]), axis=[t])

    reduction = (slices, kh, taps, run // chunk)
    part = te.compute(
        (window.n, window.oh, window.ow // 2, blocks, j_bits, *reduction, steps, lanes),
        part_of,
        name="part",
    )
    g = te.reduce_axis((0, steps), "g")
    low = tirx.const(15, "uint8")

    def half_of(n: Expr, y: Expr, x: Expr, o: Expr, j: Expr, *rest: Expr) -> Expr:
        *place, lane = rest
        both = part[n, y, x // 2, o, j, *place, g, lane]
        return te.sum((both >> (x % 2 * 4).astype("uint8")) & low, axis=[g])

    half = te.compute(
        (window.n, window.oh, window.ow, blocks, j_bits, *reduction, lanes),
        half_of,
        name="half",
    )
    return _weigh_planes(half, negative_top, pair_dtype, vector)


def rows_of_patterns(patterns: te.Tensor, tables: te.Tensor) -> te.Tensor:
    """What ``lut_conv`` reads, never in memory: the schedule computes it in registers.

    Args:
        patterns: uint16 [R], places of tables: 16 times a pattern.
        tables: uint8 [256 * 16], ``packing.pattern_tables``.

    Returns:
        uint8 [R, 16].
    """
    return te.compute(
        (int(patterns.shape[0]), 16),
        lambda r, i: tables[patterns[r].astype("int64") + i],
        name="rows",
    )


def expand_rows(codes: te.Tensor, channels: int) -> te.Tensor:
    """Tables of partial sums for ``lut_conv``.

    Args:
        codes: uint8 flat [P * channels].
        channels: of a pixel; missing ones of the last four count as zero.

    Returns:
        uint8 [P * ceil(channels/4), 16].
    """
    tables = -(-channels // 4)
    pixels = int(codes.shape[0]) // channels

    def entry(row: Expr, i: Expr) -> Expr:
        total = None
        for t in range(4):
            within = (row % tables) * 4 + t
            code = codes[(row // tables) * channels + within]
            if channels % 4 and t >= channels % 4:
                code = tirx.if_then_else(within < channels, code, tirx.const(0, "uint8"))
            picked = tirx.Select((i >> t) % 2 == 1, code, tirx.const(0, "uint8"))
            total = picked if total is None else total + picked
        return total

    return te.compute((pixels * tables, 16), entry, name="rows")


def row_sum(rows: te.Tensor, window: Window, image: tuple[int, int, int, int]) -> te.Tensor:
    """``window_sum`` from tables: entry 15 is the sum of a table's four codes.

    Returns:
        int32 [N, OH, OW, 1].
    """
    batch, height, width, tables = image
    k = te.reduce_axis((0, tables), "k")
    pixel = te.compute(
        (batch, height, width, 1),
        lambda n, y, x, g: te.sum(
            rows[((n * height + y) * width + x) * tables + k, 15].astype("int32"), axis=[k]
        ),
        name="pixel_sum",
    )
    return _box(pixel, window)


def sums_under(pixels: te.Tensor, window: Window, rows: int, columns: int) -> te.Tensor:
    """Sums of pixels under each window, written out for a schedule that inlines them.

    Args:
        pixels: int32 flat [N * rows * columns].
        window: geometry.
        rows: of the padded image.
        columns: of the padded image.

    Returns:
        int32 [N, OH, OW, 1].
    """

    def total(n: Expr, y: Expr, x: Expr, _: Expr) -> Expr:
        first = (n * rows + y * window.sy) * columns + x * window.sx
        return reduce(
            operator.add,
            [
                pixels[first + ky * window.dy * columns + kx * window.dx]
                for ky in range(window.kh)
                for kx in range(window.kw)
            ],
        )

    return te.compute((window.n, window.oh, window.ow, 1), total, name="sums")


def window_sum(planes: te.Tensor, window: Window, image: Image, groups: int) -> te.Tensor:
    """Sum of all codes under the window, as two cheap stages: pixels first, then the box.

    Returns:
        int32 [N, OH, OW, groups], ``sum_k u_k``: what levels w = 2v - (2**b - 1) need beside 2 D.
    """
    a_bits, batch, height, width, pixel_bytes = image
    group_bytes = pixel_bytes // groups
    i = te.reduce_axis((0, a_bits), "i")
    byte = te.reduce_axis((0, group_bytes), "byte")

    def pixel_of(n: Expr, y: Expr, x: Expr, g: Expr) -> Expr:
        first = (((i * batch + n) * height + y) * width + x) * pixel_bytes + g * group_bytes
        count = tirx.popcount(planes[first + byte]).astype("int32")
        return te.sum(count << i.astype("int32"), axis=[i, byte])

    return _box(te.compute((batch, height, width, groups), pixel_of, name="pixel_sum"), window)


def _box(pixel: te.Tensor, window: Window) -> te.Tensor:
    """Sum of pixel sums [N, H, W, G] under the window."""
    ky = te.reduce_axis((0, window.kh), "ky")
    kx = te.reduce_axis((0, window.kw), "kx")
    return te.compute(
        (window.n, window.oh, window.ow, int(pixel.shape[3])),
        lambda n, y, x, g: te.sum(
            pixel[n, y * window.sy + ky * window.dy, x * window.sx + kx * window.dx, g],
            axis=[ky, kx],
        ),
        name="window_sum",
    )


def dot_conv(
    codes: te.Tensor, weight: te.Tensor, window: Window, image: tuple[int, int, int, int]
) -> te.Tensor:
    """Convolve integer codes by groups of t adjacent products, as dot instructions do.

    A run may end up to t - 1 elements behind the window's row: the weights there are zero.

    Args:
        codes: uint8 or int16 flat [N, H, W, C], the padded image.
        weight: int8 or int16 [O/B, KH, taps, run/t, B, t].
        window: geometry.
        image: (N, H, W, C) of ``codes``.

    Returns:
        int32 [N, OH, OW, O/B, B].
    """
    _, height, width, channels = image
    blocks, kh, taps, run, lanes, group = (int(extent) for extent in weight.shape)
    ky = te.reduce_axis((0, kh), "ky")
    kx = te.reduce_axis((0, taps), "kx")
    r = te.reduce_axis((0, run), "r")
    u = te.reduce_axis((0, group), "u")

    def cell(n: Expr, y: Expr, x: Expr, o: Expr, lane: Expr) -> Expr:
        row = (n * height + y * window.sy + ky * window.dy) * (width * channels)
        column = (x * window.sx + kx * window.dx) * channels + r * group + u
        data = codes[row + column].astype("int32")
        return te.sum(data * weight[o, ky, kx, r, lane, u].astype("int32"), axis=[ky, kx, r, u])

    return te.compute((window.n, window.oh, window.ow, blocks, lanes), cell, name="acc")


def half_conv(
    codes: te.Tensor,
    weight: te.Tensor,
    window: Window,
    image: tuple[int, int, int, int],
    chunk: int,
) -> te.Tensor:
    """``dot_conv`` with products summed in int16 over ``chunk`` steps of four before int32.

    Args:
        codes: uint8 flat [N, H, W, C], the padded image.
        weight: int8 [O/B, KH, taps, run/4, B, 4].
        window: geometry.
        image: (N, H, W, C) of ``codes``.
        chunk: divides run/4; the caller proves ``2 * chunk * max|code| * max|w| < 2**15``.

    Returns:
        int32 [N, OH, OW, O/B, B].
    """
    _, height, width, channels = image
    blocks, kh, taps, run, lanes, _ = (int(extent) for extent in weight.shape)
    r = te.reduce_axis((0, chunk), "r")
    u = te.reduce_axis((0, 2), "u")

    def part_of(n: Expr, y: Expr, x: Expr, o: Expr, ky: Expr, kx: Expr, *rest: Expr) -> Expr:
        c, lane, half = rest
        step = c * chunk + r
        row = (n * height + y * window.sy + ky * window.dy) * (width * channels)
        column = (x * window.sx + kx * window.dx) * channels + step * 4 + half * 2 + u
        data = codes[row + column].astype("int16")
        return te.sum(
            data * weight[o, ky, kx, step, lane, half * 2 + u].astype("int16"), axis=[r, u]
        )

    part = te.compute(
        (window.n, window.oh, window.ow, blocks, kh, taps, run // chunk, lanes, 2),
        part_of,
        name="part",
    )
    ky = te.reduce_axis((0, kh), "ky")
    kx = te.reduce_axis((0, taps), "kx")
    c = te.reduce_axis((0, run // chunk), "c")
    half = te.reduce_axis((0, 2), "half")
    return te.compute(
        (window.n, window.oh, window.ow, blocks, lanes),
        lambda n, y, x, o, lane: te.sum(
            part[n, y, x, o, ky, kx, c, lane, half].astype("int32"), axis=[ky, kx, c, half]
        ),
        name="acc",
    )


def grouped_conv(
    codes: te.Tensor,
    weight: te.Tensor,
    window: Window,
    image: tuple[int, int, int, int],
    group_out: int,
) -> te.Tensor:
    """Convolve integer codes with few channels a group (depthwise: one).

    Args:
        codes: uint8 flat [N, H, W, C], the padded image.
        weight: int16 [KH, KW, C/groups, O/B, B].
        window: geometry.
        image: (N, H, W, C) of ``codes``.
        group_out: O / groups.

    Returns:
        int32 [N, OH, OW, O/B, B].
    """
    _, height, width, channels = image
    kh, kw, group_in, blocks, lanes = (int(extent) for extent in weight.shape)
    ky = te.reduce_axis((0, kh), "ky")
    kx = te.reduce_axis((0, kw), "kx")
    c = te.reduce_axis((0, group_in), "c")

    def cell(n: Expr, y: Expr, x: Expr, o: Expr, lane: Expr) -> Expr:
        out = o * lanes + lane
        first = out if group_in == group_out == 1 else (out // group_out) * group_in
        row = (n * height + y * window.sy + ky * window.dy) * (width * channels)
        column = (x * window.sx + kx * window.dx) * channels + first + c
        data = codes[row + column].astype("int32")
        return te.sum(data * weight[ky, kx, c, o, lane].astype("int32"), axis=[ky, kx, c])

    return te.compute((window.n, window.oh, window.ow, blocks, lanes), cell, name="acc")


def pack_planes(codes: te.Tensor, bits: int, name: str = "planes") -> te.Tensor:
    """Codes to planes.

    Args:
        codes: uint8 [N, H, W, C], C a multiple of 8.
        bits: A.
        name: of the stage.

    Returns:
        uint8 [A, N, H, W, C/8].
    """
    n, h, w, channels = (int(extent) for extent in codes.shape)

    def byte_of(i: Expr, b: Expr, y: Expr, x: Expr, k: Expr) -> Expr:
        total = None
        for t in range(8):
            bit = (codes[b, y, x, k * 8 + t] >> i.astype("uint8")) & tirx.const(1, "uint8")
            bit = bit << tirx.const(t, "uint8") if t else bit
            total = bit if total is None else total | bit
        return total

    return te.compute((bits, n, h, w, channels // 8), byte_of, name=name)


def pack_groups(codes: te.Tensor, groups: int, bits: int) -> te.Tensor:
    """Codes to planes with every group of channels padded to whole bytes.

    Args:
        codes: uint8 [P, C].
        groups: G.
        bits: A.

    Returns:
        uint8 [A, P, G * ceil(C/G/8)].
    """
    pixels, channels = (int(extent) for extent in codes.shape)
    inside = channels // groups
    group_bytes = -(-inside // 8)

    def byte_of(i: Expr, p: Expr, k: Expr) -> Expr:
        total = tirx.const(0, "uint8")
        for t in range(8):
            within = (k % group_bytes) * 8 + t
            code = codes[p, (k // group_bytes) * inside + within]
            bit = ((code >> i.astype("uint8")) & tirx.const(1, "uint8")) << tirx.const(t, "uint8")
            if inside % 8:
                bit = tirx.if_then_else(within < inside, bit, tirx.const(0, "uint8"))
            total = total | bit
        return total

    return te.compute((bits, pixels, groups * group_bytes), byte_of, name="planes")


def requantize(value: Expr, zero_point: int, low: int, high: int) -> Expr:
    """float32 -> uint8 code: ``clip(rint(value) + zero_point, low, high)``.

    Clipped first, which commutes with rounding. Adding 1.5 * 2**23 then leaves the integer, rounded
    half to even by the addition itself, in the low bits of the float: no rounding instruction, and
    the same bits on every machine.
    """
    bounded = clip(value, low - zero_point, high - zero_point)
    code = tirx.reinterpret("int32", bounded + literal(1.5 * 2**23)).astype("uint8")
    return code + tirx.const(zero_point, "uint8") if zero_point else code


def literal(value: float) -> Expr:
    """A float32 constant."""
    return tirx.const(float(value), "float32")


def clip(value: Expr, low: float, high: float) -> Expr:
    """Infinite bounds bound nothing."""
    value = value if low == float("-inf") else tirx.max(value, literal(low))
    return value if high == float("inf") else tirx.min(value, literal(high))


def apply(node: Node, operands: Sequence[Expr]) -> Expr:
    """One elementwise operator of the IR, each product rounded on its own.

    Args:
        node: one of ``lowering.EXACT`` but Clip.
        operands: element of each input, in order.
    """
    x = operands[0]
    if node.op == "Affine":
        return _affine(operands)
    if node.op in ("Requantize", "Quantize"):
        top = 2 ** node.int_attr("bits") - 1
        value = (
            _affine(operands) if node.op == "Requantize" else x / literal(node.float_attr("scale"))
        )
        return requantize(
            value, node.int_attr("zero_point"), node.int_attr("low", 0), node.int_attr("high", top)
        )
    if node.op == "Dequantize":
        code = x.astype("int32") - node.int_attr("zero_point")
        return fence(code.astype("float32") * literal(node.float_attr("scale")))
    if node.op == "LeakyRelu":
        slope = literal(float(node.attrs.get("alpha", 0.01)))  # type: ignore[arg-type]
        return tirx.Select(x < literal(0), fence(x * slope), x)
    return _ARITHMETIC[node.op](*operands)


def _affine(operands: Sequence[Expr]) -> Expr:
    acc, m, b = operands
    return fence(acc.astype("float32") * m) + b


_ARITHMETIC: dict[str, Callable[..., Expr]] = {
    "Identity": lambda x: x,
    "Relu": lambda x: tirx.max(x, literal(0)),
    "Neg": lambda x: literal(0) - x,
    "Abs": lambda x: tirx.max(x, literal(0) - x),
    "Add": lambda x, y: x + y,
    "Sub": lambda x, y: x - y,
    "Mul": lambda x, y: fence(x * y),
    "Div": lambda x, y: x / y,
}
