"""Winograd's F(2x2, 3x3) as tensor expressions; the arithmetic is that of ``winograd``."""

from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from mpqc.compute import Window
from mpqc.winograd import POSITIONS

Expr = Any


def tiles(window: Window) -> tuple[int, int]:
    """Rows and columns of 2x2 tiles that cover the output."""
    return -(-window.oh // 2), -(-window.ow // 2)


def transform_image(
    codes: te.Tensor, window: Window, image: tuple[int, int, int, int], dtype: str, offset: int
) -> te.Tensor:
    """``Bt d B`` of every 4x4 tile: each position is a sum of four codes.

    In uint8 the sums are modulo 256, which is exact where they fit with their offset.

    Args:
        codes: uint8 flat [N, H, W, C]; H and W are two more than twice the tiles.
        window: geometry.
        image: (N, H, W, C).
        dtype: uint8 or int16.
        offset: added to every position but the one whose codes all count positive.

    Returns:
        [N, TY, 16, TX, C].
    """
    batch, height, width, channels = image
    rows, columns = tiles(window)

    def value(n: Expr, ty: Expr, position: Expr, tx: Expr, c: Expr) -> Expr:
        def code(y: int, x: int) -> Expr:
            pixel = (n * height + ty * 2 + y) * width + tx * 2 + x
            return codes[pixel * channels + c].astype(dtype)

        total = _turn(
            position // 4,
            lambda y: _turn(position % 4, lambda x: code(y, x)),
        )
        if not offset:
            return total
        return total + tirx.Select(position == 5, tirx.const(0, dtype), tirx.const(offset, dtype))

    return te.compute((batch, rows, POSITIONS, columns, channels), value, name="tiles")


def _turn(p: Expr, d: Callable[[int], Expr]) -> Expr:
    """Row p of Bt applied to d(0) .. d(3)."""
    last = tirx.Select(p == 2, d(2) - d(1), d(1) - d(3))
    return tirx.Select(p == 0, d(0) - d(2), tirx.Select(p == 1, d(1) + d(2), last))


def winograd_conv(
    values: te.Tensor, weight: te.Tensor, window: Window, chunk: int | None = None
) -> te.Tensor:
    """Products of every position over the channels, and the output transform.

    Args:
        values: [N, TY, 16, TX, C], of ``transform_image``.
        weight: [O/B, 16, C/t, B, t].
        window: geometry.
        chunk: steps of four products that int16 holds (a divisor of C/4; the caller proves
            ``2 * chunk * max|value| * max|w| < 2**15``); None sums in int32.

    Returns:
        int32 [N, 2 TY, 2 TX, O/B, B], four times the result.
    """
    batch, rows, _, columns, _ = (int(extent) for extent in values.shape)
    blocks, _, steps, lanes, group = (int(extent) for extent in weight.shape)
    space = (batch, rows, columns, blocks, POSITIONS)
    if chunk is None:
        product = _product(values, weight, (*space, lanes), steps, group)
    else:
        product = _half_product(values, weight, space, lanes, steps, chunk)

    def column(n: Expr, ty: Expr, tx: Expr, o: Expr, i: Expr, q: Expr, lane: Expr) -> Expr:
        return _collect(i, lambda p: product[n, ty, tx, o, p * 4 + q, lane])

    half = te.compute((batch, rows, columns, blocks, 2, 4, lanes), column, name="column")

    def output(n: Expr, y: Expr, x: Expr, o: Expr, lane: Expr) -> Expr:
        return _collect(x % 2, lambda q: half[n, y // 2, x // 2, o, y % 2, q, lane])

    return te.compute((batch, 2 * rows, 2 * columns, blocks, lanes), output, name="acc")


def _collect(i: Expr, m: Callable[[int], Expr]) -> Expr:
    """Row i of At applied to m(0) .. m(3)."""
    return tirx.Select(i == 0, m(0) + m(1) + m(2), m(1) - m(2) - m(3))


def _product(
    values: te.Tensor, weight: te.Tensor, shape: tuple[int, ...], steps: int, group: int
) -> te.Tensor:
    r = te.reduce_axis((0, steps), "r")
    u = te.reduce_axis((0, group), "u")
    return te.compute(
        shape,
        lambda n, ty, tx, o, p, lane: te.sum(
            values[n, ty, p, tx, r * group + u].astype("int32")
            * weight[o, p, r, lane, u].astype("int32"),
            axis=[r, u],
        ),
        name="product",
    )


def _half_product(
    values: te.Tensor,
    weight: te.Tensor,
    space: tuple[int, ...],
    lanes: int,
    steps: int,
    chunk: int,
) -> te.Tensor:
    r = te.reduce_axis((0, chunk), "r")
    u = te.reduce_axis((0, 2), "u")

    def part_of(n: Expr, ty: Expr, tx: Expr, o: Expr, p: Expr, *rest: Expr) -> Expr:
        c, lane, half = rest
        step, k = c * chunk + r, half * 2 + u
        data = values[n, ty, p, tx, step * 4 + k].astype("int16")
        return te.sum(data * weight[o, p, step, lane, k].astype("int16"), axis=[r, u])

    part = te.compute((*space, steps // chunk, lanes, 2), part_of, name="part")
    if steps == chunk:
        return te.compute(
            (*space, lanes),
            lambda *at: (
                part[(*at[:-1], 0, at[-1], 0)].astype("int32")
                + part[(*at[:-1], 0, at[-1], 1)].astype("int32")
            ),
            name="product",
        )
    c = te.reduce_axis((0, steps // chunk), "c")
    half = te.reduce_axis((0, 2), "half")
    return te.compute(
        (*space, lanes),
        lambda *at: te.sum(part[(*at[:-1], c, at[-1], half)].astype("int32"), axis=[c, half]),
        name="product",
    )
