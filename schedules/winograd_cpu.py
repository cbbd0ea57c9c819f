"""CPU schedules of Winograd's F(2x2, 3x3): the 16 products of a tile and both transforms."""

from collections.abc import Sequence
from math import prod
from typing import Any

from tvm.s_tir import Schedule

from mpqc.schedules.conv_cpu import Tile, compute_epilogue, pair_vectors, share_out, vectorize_init
from mpqc.schedules.dot_intrinsics import (
    register_dot,
    register_flush,
    register_halves,
    register_widening,
)
from mpqc.schedules.simple_cpu import SMALL, largest_factor


def transform_image(sch: Schedule, vector_bytes: int) -> None:
    """A vector of channels at a time: sixteen loads, sixteen stores."""
    block = sch.get_sblock("tiles")
    n, ty, position, tx, c = sch.get_loops(block)
    channels = int(sch.get(c).extent)
    written = prod(int(sch.get(loop).extent) for loop in (n, ty, position, tx, c))
    c_outer, c_inner = sch.split(c, [None, largest_factor(channels, vector_bytes)])
    sch.reorder(n, ty, tx, c_outer, position, c_inner)
    sch.unroll(position)
    sch.vectorize(c_inner)
    if written >= SMALL:
        sch.parallel(sch.fuse(n, ty))


def winograd_conv(
    sch: Schedule,
    tile: Tile,
    patch: tuple[int, int],
    channels: int,
    epilogue: Sequence[str],
    *,
    instruction: str,
    halves: bool,
    ahead: int = 0,
    bands: int = 1,
) -> None:
    """``tile.pixels`` 2x2 tiles of a row share each load of weights.

    The products of a patch of tiles (rows, columns) are made position by position, so that a
    position's weights stay in L1 meanwhile; then comes the output transform, which takes a vector
    of channels at a time through registers.
    """
    acc, column, product = (sch.get_sblock(name) for name in ("acc", "column", "product"))
    n, y, x, o, lane = sch.get_loops(acc)
    ty, row, i = sch.split(y, [None, patch[0], 2])
    at, tx, j = sch.split(x, [None, patch[1], 2])
    vector, lane = sch.split(lane, [tile.vectors, tile.lanes])
    sch.reorder(o, n, ty, at, row, tx, vector, i, j, lane)
    share_out(sch, o, n, ty, bands)
    compute_epilogue(sch, epilogue, at, channels)

    sch.compute_at(column, vector, preserve_unit_loops=True)
    *_, i_column, q, lane_column = sch.get_loops(column)
    for loop in (i, j, i_column, q):
        sch.unroll(loop)
    sch.vectorize(lane)
    sch.vectorize(lane_column)

    sch.compute_at(product, at, preserve_unit_loops=True)
    if halves:
        _half_products(sch, product, tile, instruction, at, ahead)
    else:
        rows, tiles, _, position, lanes, r, u = sch.get_loops(product)[-7:]
        columns, pixel, vec, part = _tile(sch, tile, tiles, lanes)
        sch.reorder(position, rows, columns, r, pixel, vec, part, u)
        vectorize_init(sch, sch.decompose_reduction(product, r))
        covered, abreast = pair_vectors(
            sch, instruction, vec, part, tile.vectors, at, f"int32x{tile.lanes}"
        )
        sch.tensorize(covered, register_dot(instruction, abreast, ahead))


def _tile(sch: Schedule, tile: Tile, tiles: Any, lanes: Any) -> tuple[Any, Any, Any, Any]:
    columns, pixel = sch.split(tiles, [None, tile.pixels])
    vector, part = sch.split(lanes, [tile.vectors, tile.lanes])
    sch.unroll(pixel)
    return columns, pixel, vector, part


def _half_products(
    sch: Schedule, product: Any, tile: Tile, instruction: str, at: Any, ahead: int
) -> None:
    part = sch.get_sblock("part")
    loops = sch.get_loops(product)
    chunked = len(sch.get(product).iter_vars) > 6
    if chunked:
        rows, tiles, _, position, lanes, c, half = loops[-7:]
    else:
        rows, tiles, _, position, lanes = loops[-5:]
    columns, pixel, vector, lane = _tile(sch, tile, tiles, lanes)
    if chunked:
        sch.reorder(position, rows, columns, c, pixel, vector, lane, half)
        sch.compute_at(part, c, preserve_unit_loops=True)
    else:
        sch.reorder(position, rows, columns, pixel, vector, lane)
        sch.compute_at(part, columns, preserve_unit_loops=True)
    part_pixel, _, _, _, part_lanes, part_half, r, u = sch.get_loops(part)[-8:]
    part_vector, part_lane = sch.split(part_lanes, [tile.vectors, tile.lanes])
    sch.reorder(r, part_pixel, part_vector, part_lane, part_half, u)
    sch.unroll(part_pixel)
    init = sch.decompose_reduction(part, r)
    *_, init_pixel, init_vector, init_lane, init_half = sch.get_loops(init)
    sch.unroll(init_pixel)
    sch.unroll(init_vector)
    sch.vectorize(sch.fuse(init_lane, init_half))
    covered, abreast = pair_vectors(
        sch, instruction, part_vector, part_lane, tile.vectors, at, f"int16x{2 * tile.lanes}"
    )
    sch.tensorize(covered, register_halves(instruction, abreast, ahead))
    if chunked:
        vectorize_init(sch, sch.decompose_reduction(product, c))
        sch.unroll(vector)
        sch.tensorize(lane, register_flush(instruction))
    else:
        sch.unroll(vector)
        sch.tensorize(lane, register_widening(instruction))
