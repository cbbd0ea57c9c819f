"""CPU schedules of what moves data between layers: elementwise stages, packing, padding."""

from collections.abc import Sequence
from math import gcd
from typing import Any

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T

from mpqc.graph import TensorType

LANES = 16
SMALL = 1 << 15  # elements below which waking other threads costs more than it saves


def elementwise(sch: Schedule, names: Sequence[str]) -> None:
    """Stages over [N, H, W, C], in dataflow order, computed together a pixel row at a time."""
    first = sch.get_sblock(names[0])
    n, y, x, c = sch.get_loops(first)
    extents = [int(sch.get(loop).extent) for loop in (n, y, x, c)]
    row = sch.fuse(n, y)
    if extents[0] * extents[1] * extents[2] * extents[3] >= SMALL:
        sch.parallel(row)
    for name in names[1:]:
        sch.reverse_compute_at(sch.get_sblock(name), row, preserve_unit_loops=True)
    for name in names:
        if name.startswith("planes"):
            continue
        channel = sch.get_loops(sch.get_sblock(name))[-1]
        _, inner = sch.split(channel, [None, gcd(int(sch.get(channel).extent), LANES)])
        sch.vectorize(inner)


def pack(sch: Schedule) -> None:
    plane, pixel, byte = sch.get_loops(sch.get_sblock("planes"))
    del byte
    if int(sch.get(pixel).extent) * int(sch.get(plane).extent) >= SMALL // 8:
        sch.parallel(sch.fuse(plane, pixel))


def expand(sch: Schedule) -> None:
    row, entry = sch.get_loops(sch.get_sblock("rows"))
    sch.vectorize(entry)
    outer, inner = sch.split(row, [None, largest_factor(int(sch.get(row).extent), 256)])
    if int(sch.get(outer).extent) * int(sch.get(inner).extent) >= SMALL // 16:
        sch.parallel(outer)


def largest_factor(extent: int, most: int) -> int:
    return max(d for d in range(1, min(extent, most) + 1) if extent % d == 0)


def window_sum(sch: Schedule) -> None:
    for name in ("pixel_sum", "window_sum"):
        n, y, *_ = sch.get_loops(sch.get_sblock(name))
        sch.parallel(sch.fuse(n, y))


def pad(
    images: int,
    size: tuple[int, int, int],
    pads: tuple[int, int, int, int],
    fill: tuple[int, ...],
    dtypes: tuple[str, str],
    last_mask: int,
) -> tuple[Any, tuple[TensorType, TensorType]]:
    """Rows of a bordered image: three plain loops each, which LLVM turns into memset and memcpy."""
    height, width, channels = size
    top, left, bottom, right = pads
    rows, row = top + height + bottom, (left + width + right) * channels
    inner, before, after = width * channels, left * channels, right * channels
    source, result = dtypes
    images_a_fill = images // len(fill)

    def border(image: Any, column: Any) -> Any:
        value = tirx.const(fill[0], result)
        for index, other in enumerate(fill[1:], start=1):
            value = tirx.Select(image >= index * images_a_fill, tirx.const(other, result), value)
        if last_mask != 255:
            last = tirx.const(last_mask, result)
            value = tirx.Select(column % channels == channels - 1, value & last, value)
        return value

    loop = T.parallel if images * rows * row >= SMALL else T.serial

    @T.prim_func(s_tir=True)
    def bordered(
        src: T.Buffer((images * height * inner,), source),
        dst: T.Buffer((images * rows * row,), result),
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        for line in loop(images * rows):
            with T.sblock("line"):
                T.reads()
                T.writes()
                if T.And(line % rows >= top, line % rows < top + height):
                    for r in T.serial(before):
                        dst[line * row + r] = border(line // rows, r)
                    for r in T.serial(inner):
                        dst[line * row + before + r] = T.Cast(
                            result,
                            src[(line // rows * height + line % rows - top) * inner + r],
                        )
                    for r in T.serial(after):
                        dst[line * row + before + inner + r] = border(line // rows, r)
                else:
                    for r in T.serial(row):
                        dst[line * row + r] = border(line // rows, r)

    kinds = (
        TensorType(source, (images * height * inner,)),
        TensorType(result, (images * rows * row,)),
    )
    return bordered, kinds
