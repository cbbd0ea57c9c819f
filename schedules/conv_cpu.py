"""CPU schedules of the quantized convolutions: register tiles of pixels by output channels.

Every kernel has the same skeleton. A tile of ``pixels`` x (``vectors`` * ``lanes``) accumulators
stays in registers or L1 while the reduction runs; the epilogue (requantize, pack) follows at the
tile, so that no int32 goes to memory. Blocks of output channels are the outer loop: a block's
weights stay in cache while the packed image, which is small, streams by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from tvm.s_tir import Schedule

from mpqc.schedules.arm_intrinsics import register_popcount
from mpqc.schedules.dot_intrinsics import register_dot, register_flush, register_halves
from mpqc.schedules.llvm_intrinsics import products_first
from mpqc.schedules.lut_intrinsics import register_bytes, register_lookup

ACC_AXES = 5  # n, y, x, block, lane of the accumulators
EPILOGUE_LANES = 16  # float32 lanes of an epilogue vector: one zmm, two ymm, four NEON registers


@dataclass(frozen=True)
class Tile:
    """Tunables of a convolution kernel.

    Attributes:
        pixels: output pixels of a row that share each weight load; divides OW.
        vectors: vectors of output channels that share each activation broadcast.
        lanes: output channels of one vector.
    """

    pixels: int
    vectors: int
    lanes: int

    @property
    def block(self) -> int:
        """Output channels of a tile."""
        return self.vectors * self.lanes


def share_out(sch: Schedule, o: Any, n: Any, y: Any, bands: int) -> Any:
    """Fuse the loops over blocks, images and rows, which follow each other, and share them out.

    Args:
        sch: schedule.
        o: loop over blocks of output channels.
        n: loop over images.
        y: loop over rows.
        bands: of rows, outermost, so that a thread has its part of the image in its own cache;
            1: blocks are outermost, and their weights are read once; 0: no threads.
    """
    if bands > 1:
        band, y = sch.split(y, [bands, None])
        sch.reorder(n, band, o, y)
        fused = sch.fuse(n, band, o, y)
    else:
        fused = sch.fuse(o, n, y)
    if bands:
        sch.parallel(fused)
    return fused


def _outer(sch: Schedule, acc: Any, tile: Tile, bands: int) -> tuple[Any, list[Any]]:
    """Tile the accumulator block; return the tile loop and [pixel, vector, lane, *reduction]."""
    n, y, x, o, lane, *reduction = sch.get_loops(acc)
    x_tile, pixel = sch.split(x, [None, tile.pixels])
    vector, lane = sch.split(lane, [tile.vectors, tile.lanes])
    sch.reorder(o, n, y, x_tile, pixel, vector, lane, *reduction)
    share_out(sch, o, n, y, bands)
    return x_tile, [pixel, vector, lane, *reduction]


def compute_epilogue(sch: Schedule, names: Sequence[str], at: Any, channels: int) -> None:
    """Compute the named stages, in dataflow order, at the tile; no vector straddles the end."""
    for name in names:
        sch.reverse_compute_at(sch.get_sblock(name), at, preserve_unit_loops=True)
    for name in names:
        *outer, channel = sch.get_loops(sch.get_sblock(name))
        if name.startswith("planes"):
            plane = outer[-4]  # [plane, n, y, x, byte]
            sch.unroll(plane)
            continue
        width = gcd(int(sch.get(channel).extent), EPILOGUE_LANES, channels)
        _, inner = sch.split(channel, [None, width])
        sch.vectorize(inner)


def bitplane_conv(
    sch: Schedule, tile: Tile, channels: int, epilogue: Sequence[str], *, bands: int = 1
) -> None:
    """AND + popcount in uint8 lanes; LLVM finds vpopcntb, vpshufb or cnt."""
    acc, pair, part = (sch.get_sblock(name) for name in ("acc", "pair", "part"))
    at, (pixel, vector, lane, j, i) = _outer(sch, acc, tile, bands)
    sch.reorder(j, i, pixel, vector, lane)
    compute_epilogue(sch, epilogue, at, channels)

    sch.compute_at(pair, i, preserve_unit_loops=True)
    _, _, pair_pixel, _, _, _, pair_lanes, ky, kx, c = sch.get_loops(pair)[-10:]
    pair_vector, pair_lane = sch.split(pair_lanes, [tile.vectors, tile.lanes])
    sch.reorder(ky, kx, c, pair_pixel, pair_vector, pair_lane)

    sch.compute_at(part, c, preserve_unit_loops=True)
    part_pixel, *_, part_lanes, byte = sch.get_loops(part)[-9:]
    part_vector, part_lane = sch.split(part_lanes, [tile.vectors, tile.lanes])
    sch.reorder(byte, part_pixel, part_vector, part_lane)

    for row, column, vec in (
        (pixel, vector, lane),
        (pair_pixel, pair_vector, pair_lane),
        (part_pixel, part_vector, part_lane),
    ):
        sch.unroll(row)
        sch.unroll(column)
        sch.vectorize(vec)
    sch.decompose_reduction(part, byte)
    sch.decompose_reduction(pair, ky)
    sch.decompose_reduction(acc, j)


def popcount_conv(
    sch: Schedule,
    tile: Tile,
    channels: int,
    epilogue: Sequence[str],
    *,
    instruction: str,
    bands: int = 1,
) -> None:
    """AND, popcount and pairwise addition through a tensor intrinsic; see ``arm_intrinsics``."""
    acc, pair = sch.get_sblock("acc"), sch.get_sblock("pair")
    at, (pixel, vector, lane, j, i) = _outer(sch, acc, tile, bands)
    sch.reorder(j, i, pixel, vector, lane)
    compute_epilogue(sch, epilogue, at, channels)

    sch.compute_at(pair, i, preserve_unit_loops=True)
    _, _, pair_pixel, _, _, _, pair_lanes, ky, kx, r, u = sch.get_loops(pair)[-11:]
    pair_vector, pair_lane = sch.split(pair_lanes, [tile.vectors, tile.lanes])
    sch.reorder(ky, kx, r, pair_pixel, pair_vector, pair_lane, u)
    for loop in (pixel, vector, pair_pixel, pair_vector):
        sch.unroll(loop)
    sch.vectorize(lane)
    vectorize_init(sch, sch.decompose_reduction(pair, ky))
    sch.decompose_reduction(acc, j)
    sch.tensorize(pair_lane, register_popcount(instruction))


def lut_conv(
    sch: Schedule,
    tile: Tile,
    channels: int,
    epilogue: Sequence[str],
    *,
    instruction: str,
    halves: bool = False,
    evens: bool = False,
    patterns: bool = False,
    summed: bool = False,
    rows: int = 1,
    bands: int = 1,
) -> None:
    """Byte shuffles through a tensor intrinsic; see ``lut_intrinsics``.

    ``halves``: the kernel is ``compute.lut_pair_conv``. ``evens``: even bytes of a vector are the
    first half of its channels. ``patterns``: tables are looked up among those of all patterns.
    ``summed``: the epilogue adds the pixels under a window up.
    ``rows`` of the output go through each piece of weights and tables while it lies in L1; their
    16-bit sums lie there, too.
    """
    acc, pair, part = (sch.get_sblock(name) for name in ("acc", "pair", "part"))
    if summed:
        sch.compute_inline(sch.get_sblock("sums"))
    one_plane = len(sch.get_loops(acc)) == ACC_AXES
    tiles = []
    if one_plane:  # nothing to weigh: the epilogue reads the 16-bit sums
        sch.compute_inline(acc)
        n, y, x, o, *lanes, s, ky, kx, c = sch.get_loops(pair)
        at, row, column, pair_pixel = _patch(sch, (o, n, y, x), rows, tile, bands)
        sch.reorder(s, ky, kx, c, row, column, pair_pixel, *lanes)
    else:
        n, y, x, o, lane, j = sch.get_loops(acc)
        vector, lane = sch.split(lane, [tile.vectors, tile.lanes])
        at, row, column, pixel = _patch(sch, (o, n, y, x), rows, tile, bands)
        sch.reorder(j, row, column, pixel, vector, lane)
        sch.compute_at(pair, j, preserve_unit_loops=True)
        axes = 1 if not evens else 2 if tile.vectors == 1 else 3
        row, pixels, _, _, *lanes, s, ky, kx, c = sch.get_loops(pair)[-8 - axes :]
        column, pair_pixel = sch.split(pixels, [None, tile.pixels])
        sch.reorder(s, ky, kx, c, row, column, pair_pixel, *lanes)
        tiles.append((pixel, vector, lane))
    compute_epilogue(sch, epilogue, at, channels)
    sch.unroll(pair_pixel)
    if evens:
        *vectors, even, _ = lanes
    else:
        *vectors, pair_lane = sch.split(lanes[0], [tile.vectors, tile.lanes])
        sch.vectorize(pair_lane)
    for loop in vectors:
        sch.unroll(loop)

    if halves:
        half = sch.get_sblock("half")
        sch.compute_at(half, column, preserve_unit_loops=True)
        half_pixel, *_, half_lanes, g = sch.get_loops(half)[-9:]
        half_vector, half_lane = sch.split(half_lanes, [tile.vectors, tile.lanes])
        sch.reorder(g, half_pixel, half_vector, half_lane)
        tiles.append((half_pixel, half_vector, half_lane))
    sch.compute_at(part, g if halves else column, preserve_unit_loops=True)
    part_pixel, *_, part_lanes, t = sch.get_loops(part)[-10 if halves else -9 :]
    part_vector, part_lane = sch.split(part_lanes, [tile.vectors, tile.lanes])
    sch.reorder(t, part_pixel, part_vector, part_lane)

    for row, column, vec in tiles:
        sch.unroll(row)
        sch.unroll(column)
        sch.vectorize(vec)
    sch.unroll(part_pixel)
    vectorize_init(sch, sch.decompose_reduction(part, t))
    if halves:
        sch.unroll(t)
        sch.decompose_reduction(half, g)
    init = sch.decompose_reduction(pair, s)
    if evens:
        *unrolled, last = sch.get_loops(init)[-1 - len(lanes) :]
        for loop in unrolled:
            sch.unroll(loop)
        sch.vectorize(last)
        sch.tensorize(even, register_bytes(tile.lanes))
    if not one_plane:
        sch.decompose_reduction(acc, j)
    if patterns:
        gather = sch.get_sblock("rows")
        sch.compute_at(gather, part_pixel, preserve_unit_loops=True)
        sch.vectorize(sch.get_loops(gather)[-1])
    covered, abreast = pair_vectors(
        sch, instruction, part_vector, part_lane, tile.vectors, at, f"uint8x{tile.lanes}"
    )
    sch.tensorize(covered, register_lookup(instruction, abreast))


def _patch(
    sch: Schedule, loops: tuple[Any, ...], rows: int, tile: Tile, bands: int
) -> tuple[Any, ...]:
    """Cut [o, n, y, x] into patches, and these into [row, tile of a row, pixel].

    A patch is whole rows, or one tile.
    """
    o, n, y, x = loops
    outer, row = sch.split(y, [None, rows])
    tiles = int(sch.get(x).extent) // tile.pixels if rows > 1 else 1
    at, column, pixel = sch.split(x, [None, tiles, tile.pixels])
    sch.reorder(o, n, outer, at, row, column, pixel)
    share_out(sch, o, n, outer, bands)
    return at, row, column, pixel


def pair_vectors(
    sch: Schedule, instruction: str, vector: Any, lane: Any, vectors: int, at: Any, kind: str
) -> tuple[Any, int]:
    """Loop over the lanes that one intrinsic covers, and its vectors.

    Args:
        sch: schedule.
        instruction: that the intrinsic stands for.
        vector: loop over the vectors of a tile.
        lane: loop over the lanes of a vector, inside of it.
        vectors: extent of ``vector``.
        at: loop around the tile.
        kind: type of the vector that products are added to.
    """
    abreast = 2 if instruction.startswith("vp") and vectors % 2 == 0 else 1
    if abreast == 1:
        sch.unroll(vector)
        return lane, 1
    outer, inner = sch.split(vector, [None, 2])
    sch.unroll(outer)
    products_first(sch, at, kind)
    return sch.fuse(inner, lane), 2


def vectorize_init(sch: Schedule, init: Any) -> None:
    """Clear a tile of accumulators a vector at a time."""
    *_, pixel, vector, lane = sch.get_loops(init)
    sch.unroll(pixel)
    sch.unroll(vector)
    sch.vectorize(lane)


def dot_conv(
    sch: Schedule,
    tile: Tile,
    channels: int,
    epilogue: Sequence[str],
    *,
    instruction: str,
    bands: int = 1,
) -> None:
    """Dot instructions through a tensor intrinsic; see ``dot_intrinsics``."""
    acc = sch.get_sblock("acc")
    at, (pixel, vector, lane, ky, kx, r, u) = _outer(sch, acc, tile, bands)
    sch.reorder(ky, kx, r, pixel, vector, lane, u)
    compute_epilogue(sch, epilogue, at, channels)
    sch.unroll(pixel)
    vectorize_init(sch, sch.decompose_reduction(acc, ky))
    covered, abreast = pair_vectors(
        sch, instruction, vector, lane, tile.vectors, at, f"int32x{tile.lanes}"
    )
    sch.tensorize(covered, register_dot(instruction, abreast, 0))


def half_conv(
    sch: Schedule,
    tile: Tile,
    channels: int,
    epilogue: Sequence[str],
    *,
    instruction: str,
    bands: int = 1,
) -> None:
    """Products summed in int16 for as long as the bound allows, then widened."""
    acc, part = sch.get_sblock("acc"), sch.get_sblock("part")
    at, (pixel, vector, lane, ky, kx, c, half) = _outer(sch, acc, tile, bands)
    sch.reorder(ky, kx, c, pixel, vector, lane, half)
    compute_epilogue(sch, epilogue, at, channels)

    sch.compute_at(part, c, preserve_unit_loops=True)
    part_pixel, *_, part_lanes, part_half, r, u = sch.get_loops(part)[-9:]
    part_vector, part_lane = sch.split(part_lanes, [tile.vectors, tile.lanes])
    sch.reorder(r, part_pixel, part_vector, part_lane, part_half, u)
    for loop in (pixel, vector, part_pixel):
        sch.unroll(loop)
    init = sch.decompose_reduction(part, r)
    *_, init_pixel, init_vector, init_lane, init_half = sch.get_loops(init)
    sch.unroll(init_pixel)
    sch.unroll(init_vector)
    sch.vectorize(sch.fuse(init_lane, init_half))
    vectorize_init(sch, sch.decompose_reduction(acc, ky))
    covered, abreast = pair_vectors(
        sch, instruction, part_vector, part_lane, tile.vectors, at, f"int16x{2 * tile.lanes}"
    )
    sch.tensorize(covered, register_halves(instruction, abreast, 0))
    sch.tensorize(lane, register_flush(instruction))


def grouped_conv(
    sch: Schedule, tile: Tile, channels: int, epilogue: Sequence[str], *, bands: int = 1
) -> None:
    """Plain widening multiply-add, channels in the vector (depthwise) or broadcast."""
    acc = sch.get_sblock("acc")
    at, (pixel, vector, lane, ky, kx, c) = _outer(sch, acc, tile, bands)
    sch.reorder(ky, kx, c, pixel, vector, lane)
    compute_epilogue(sch, epilogue, at, channels)
    sch.unroll(pixel)
    sch.unroll(vector)
    sch.vectorize(lane)
    sch.decompose_reduction(acc, ky)
