"""CPU schedules of what moves data between layers: elementwise stages, packing, padding."""

from collections.abc import Sequence
from math import gcd

from tvm.s_tir import Schedule

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
    """Planes and pixels over the threads."""
    plane, pixel, byte = sch.get_loops(sch.get_sblock("planes"))
    del byte
    if int(sch.get(pixel).extent) * int(sch.get(plane).extent) >= SMALL // 8:
        sch.parallel(sch.fuse(plane, pixel))


def expand(sch: Schedule) -> None:
    """One vector a table."""
    row, entry = sch.get_loops(sch.get_sblock("rows"))
    sch.vectorize(entry)
    outer, inner = sch.split(row, [None, largest_factor(int(sch.get(row).extent), 256)])
    if int(sch.get(outer).extent) * int(sch.get(inner).extent) >= SMALL // 16:
        sch.parallel(outer)


def largest_factor(extent: int, most: int) -> int:
    """The largest divisor of ``extent`` that is at most ``most``."""
    return max(d for d in range(1, min(extent, most) + 1) if extent % d == 0)


def window_sum(sch: Schedule) -> None:
    """Rows over the threads, for the pixels and then for the box."""
    for name in ("pixel_sum", "window_sum"):
        n, y, *_ = sch.get_loops(sch.get_sblock(name))
        sch.parallel(sch.fuse(n, y))
