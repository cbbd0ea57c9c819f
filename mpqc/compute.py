"""What the kernels compute, as tensor expressions: no loop order, no target.

Layouts (all row-major; pixels outside channels, so that a 1x1 layer may view its rows freely):

* codes: uint8 ``[N, H, W, C]``.
* planes: uint8 ``[A, N, H, W, C/8]``; plane i holds bit i of each code, channel ``8*k + b`` in bit
  b of byte k. Channels are padded to a multiple of 8 with zero bits.
* rows: a spatially padded image whose (W, C) axes are one: ``[..., H, W*C + slack]``, so that the
  kernel's window of one image row is one contiguous run.
* accumulators: int32 ``[N, OH, OW, O/B, B]``, B output channels a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    j = te.reduce_axis((0, j_bits), "j")
    i = te.reduce_axis((0, a_bits), "i")

    def weigh(n: Expr, y: Expr, x: Expr, o: Expr, lane: Expr) -> Expr:
        count = pair[n, y, x, o, j, i, lane].astype("int32") << (i + j).astype("int32")
        signed = tirx.Select(j == j_bits - 1, -count, count) if negative_top else count
        return te.sum(signed, axis=[j, i])

    return te.compute((window.n, window.oh, window.ow, blocks, lanes), weigh, name="acc")


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

    pixel = te.compute((batch, height, width, groups), pixel_of, name="pixel_sum")
    ky = te.reduce_axis((0, window.kh), "ky")
    kx = te.reduce_axis((0, window.kw), "kx")
    return te.compute(
        (window.n, window.oh, window.ow, groups),
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


def grouped_conv(
    codes: te.Tensor, weight: te.Tensor, window: Window, image: tuple[int, int, int, int],
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
        value = _affine(operands) if node.op == "Requantize" else x / literal(node.float_attr("scale"))
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
