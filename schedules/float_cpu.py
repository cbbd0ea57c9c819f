"""Default CPU schedules of float kernels: a ladder of rules from special to general.

``apply`` gives a fused, unscheduled PrimFunc to each rule in turn. A rule answers None for a
function that is not its own; a primitive that TVM refuses also sends the function to the next
rule, and ``fallback`` takes every function. No rule reorders a float sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

WEIGHTS_IN_CACHE = 256 * 1024  # bytes of packed weights that a row of outputs may stream
SMALL_WORK = 1 << 14  # innermost iterations below which a parallel loop costs more than it gains
UNROLLED_TAPS = 32
_ROUNDINGS = frozenset({"tirx.nearbyint", "tirx.round", "tirx.floor", "tirx.ceil", "tirx.trunc"})


@dataclass(frozen=True)
class Facts:
    """What the rules know of the machine."""

    vector_bits: int
    cores: int

    def lanes(self, dtype: str) -> int:
        """Elements of a vector register."""
        bits = int(tvm.DataType(dtype).bits)
        return max(1, self.vector_bits // max(8, bits))


Rule = Callable[[Any, Facts], Any]


def apply(func: Any, vector_bits: int, cores: int) -> Any:
    """Schedule one PrimFunc.

    Args:
        func: unscheduled, with static shapes.
        vector_bits: width of a vector register.
        cores: 1 leaves every loop serial.
    """
    schedule, _ = _climb(func, Facts(vector_bits, cores))
    result = schedule.mod["main"].with_attr("tirx.is_scheduled", True)
    if cores == 1:  # some operators of TVM are born with parallel loops
        result = tvm_ffi.structural_map(result, (tirx.For, _serial))
    if _names_roundings(result):
        result = tvm_ffi.structural_map(result, (tirx.For, _scalar))
    if func.attrs and "global_symbol" in func.attrs:
        return result.with_attr("global_symbol", func.attrs["global_symbol"])
    return result.without_attr("global_symbol")


def _names_roundings(func: Any) -> bool:
    """Whether a let names what a rounding gives, such as of quantized values before an exp."""

    def rounding(call: Any) -> Any:
        found = getattr(call.op, "name", "") in _ROUNDINGS
        return tvm_ffi.VisitInterrupt(None) if found else None

    def visit(let: Any) -> Any:
        return tvm_ffi.structural_walk(let.value, (tvm.ir.Call, rounding))

    return tvm_ffi.structural_walk(func, (tirx.Let, visit)) is not None


def _scalar(loop: Any) -> Any:
    """TVM 0.27 vectorises a call's operands twice, and refuses two copies of such a let.

    LLVM vectorises the plain loop.
    """
    if loop.kind != tirx.ForKind.VECTORIZED:
        return loop
    return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)


def _serial(loop: Any) -> Any:
    if loop.kind != tirx.ForKind.PARALLEL:
        return loop
    return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)


def rule_for(func: Any, vector_bits: int, cores: int) -> str:
    """Name of the rule that ``apply`` would use."""
    return _climb(func, Facts(vector_bits, cores))[1]


def _climb(func: Any, facts: Facts) -> tuple[Any, str]:
    """The first rule that takes the function, with the finished schedule."""
    for rule in RULES:
        schedule = s_tir.Schedule(
            tvm.IRModule({"main": func}), debug_mask="none", error_render_level="none"
        )
        try:
            done = rule(schedule, facts)
        except s_tir.ScheduleError:
            continue
        if done is not None:
            return done, rule.__name__
    raise AssertionError("the fallback rule refuses nothing")


def register_tile(s: Any, facts: Facts) -> Any:
    """Convolution and matrix product over packed weights: rows x channels held in registers.

    The block's loops are n.., ob, place.., rows, oi | taps.., rc; what follows it is computed
    on the finished tile.
    """
    block = next((x for x in _blocks(s) if "mpqc.rows" in s.get(x).annotations), None)
    if block is None:
        return None
    rows = int(s.get(block).annotations["mpqc.rows"])
    last = _inline_after(s, block)
    _inline_before(s, block)

    loops = s.get_loops(block)
    kinds = [v.iter_type for v in s.get(block).iter_vars]
    spatial = [x for x, k in zip(loops, kinds, strict=True) if k == 0]
    reduced = [x for x, k in zip(loops, kinds, strict=True) if k != 0]
    lead, (row, lane) = spatial[:-2], spatial[-2:]
    where = 1 if s.get(block).name_hint == "conv" else 0
    ob, place = lead[where], [*lead[:where], *lead[where + 1 :]]

    b = _extent(s, lane)
    blocks_of_out = _extent(s, ob)
    wide = max(1, b * 32 // facts.vector_bits)
    limit = max(
        1, (14 if facts.vector_bits >= 512 else 12 if facts.vector_bits == 256 else 20) // wide
    )
    abreast = max(f for f in range(1, max(1, limit // rows) + 1) if blocks_of_out % f == 0)
    ob_out, ob_in = s.split(ob, [None, abreast])
    row_out, row_in = s.split(row, [None, rows])
    weights = 4 * b * abreast * prod(_extent(s, x) for x in reduced) * blocks_of_out // abreast
    order = [*place, ob_out] if weights <= WEIGHTS_IN_CACHE else [ob_out, *place]
    s.reorder(*order, row_out, *reduced, ob_in, row_in, lane)
    _vectorise(s, lane, facts.lanes("float32"))
    s.unroll(ob_in)
    s.unroll(row_in)
    if last is not None:
        s.reverse_compute_at(last, row_out)
        tail = s.get_loops(last)[len(order) + 1 :]
        _finish_tile(s, last, tail, facts)
    outer = s.fuse(*order) if len(order) > 1 else order[0]
    if facts.cores > 1 and _extent(s, outer) > 1:
        s.parallel(outer)
    s.decompose_reduction(block, reduced[0])
    return s


def _finish_tile(s: Any, last: Any, tail: list[Any], facts: Facts) -> None:
    """The tile's epilogue: vectors along the innermost axis when it divides."""
    if not tail:
        return
    lanes = facts.lanes(_dtype(s, last))
    if _extent(s, tail[-1]) % lanes == 0 or _extent(s, tail[-1]) <= lanes:
        _vectorise(s, tail[-1], lanes)


def injective(s: Any, facts: Facts) -> Any:
    """Everything without a reduction: elementwise, transposes, pools and depthwise convolution.

    All producers are inlined; each result is one nest with vectors along its last axis.
    """
    blocks = _blocks(s)
    if any(_is_reduction(s, block) for block in blocks):
        return None
    for block in _inline_all(s, blocks):
        _spatial_nest(s, block, facts)
    return s


def _spatial_nest(s: Any, block: Any, facts: Facts) -> None:
    loops = list(s.get_loops(block))
    if not loops:
        return
    lanes = facts.lanes(_dtype(s, block))
    total = prod(_extent(s, x) for x in loops)
    if _extent(s, loops[-1]) % lanes and _is_elementwise(s, block):
        loops = [s.fuse(*loops)] if len(loops) > 1 else loops
    inner = loops.pop()
    extent = _extent(s, inner)
    if extent > lanes and extent % lanes == 0:
        outer, vector = s.split(inner, [None, lanes])
        if loops and _gathers(s, block):  # the lines read by a vector serve the next rows too
            s.reorder(outer, loops[-1])
            loops.insert(-1, outer)
        else:
            loops.append(outer)
        s.vectorize(vector)
    elif extent <= lanes and extent > 1 and loops:
        s.vectorize(inner)
    elif extent > 4 * lanes and not loops:
        pieces = max(1, min(facts.cores, extent // (SMALL_WORK // 2)))
        if pieces > 1:
            outer, _ = s.split(inner, [pieces, None])
            s.parallel(outer)
        return
    _parallel(s, loops, total, facts)


def reduction(s: Any, facts: Facts) -> Any:
    """Chains with reductions: softmax, normalisations, Reduce*, products of two activations.

    A single reduction over axes that are not innermost keeps its order per element and is
    vectorised across elements; longer chains run row by row.
    """
    blocks = _blocks(s)
    if not any(_is_reduction(s, block) for block in blocks):
        return None
    for block in blocks:
        kept = "mpqc.keep" in s.get(block).annotations or len(s.get_consumers(block)) > 1
        if not kept and not _is_reduction(s, block):
            _try(s.compute_inline, block)
    blocks = _blocks(s)
    if len(blocks) > 1 and _row_by_row(s, blocks, facts):
        return s
    for block in blocks:
        if _is_reduction(s, block):
            _reduction_nest(s, block, facts)
        else:
            _spatial_nest(s, block, facts)
    return s


def _row_by_row(s: Any, blocks: list[Any], facts: Facts) -> bool:
    """Run a chain in one loop over the leading axes that all its blocks share."""
    last = blocks[-1]
    if _is_reduction(s, last):
        return False
    loops = s.get_loops(last)
    shared = min(_leading(s, block) for block in blocks)
    extents = [_extent(s, loop) for loop in loops]
    for block in blocks:
        mine = [_extent(s, loop) for loop in s.get_loops(block)]
        while mine[:shared] != extents[:shared]:
            shared -= 1
    if shared == 0:
        return False
    outer = s.fuse(*loops[:shared]) if shared > 1 else loops[0]
    for block in reversed(blocks[:-1]):
        s.compute_at(block, outer, preserve_unit_loops=True)
    sums = []
    for block in blocks:
        inner = s.get_loops(block)[1:]
        kinds = [v.iter_type for v in s.get(block).iter_vars][-len(inner) :] if inner else []
        lanes = facts.lanes(_dtype(s, block))
        if not inner:
            continue
        if not _is_reduction(s, block):
            if _extent(s, inner[-1]) % lanes == 0:
                _vectorise_long(s, inner[-1], lanes)
        elif kinds[-2:] == [0, 2] and _extent(s, inner[-2]) % lanes == 0:
            lane, k = inner[-2:]
            s.reorder(k, lane)
            _vectorise(s, lane, lanes)
            sums.append((block, k))
    if facts.cores > 1 and _extent(s, outer) > 1:
        s.parallel(outer)
    for block, k in sums:  # last: TVM refuses to move loops around a split sum
        s.decompose_reduction(block, k)
    return True


def _reduction_nest(s: Any, block: Any, facts: Facts) -> None:
    loops = list(s.get_loops(block))
    kinds = [v.iter_type for v in s.get(block).iter_vars]
    if len(kinds) != len(loops):
        return
    spatial = [x for x, k in zip(loops, kinds, strict=True) if k == 0]
    reduced = [x for x, k in zip(loops, kinds, strict=True) if k != 0]
    total = prod(_extent(s, x) for x in loops)
    if not spatial or not reduced:
        return
    lanes = facts.lanes(_dtype(s, block))
    inner: list[Any] = []
    if loops[-1] is not spatial[-1] and _contiguous(s, block) and _extent(s, spatial[-1]) >= lanes:
        width = next(
            (w for w in (4 * lanes, 2 * lanes, lanes) if _extent(s, spatial[-1]) % w == 0), 0
        )
        if width:
            outer, vector = s.split(spatial.pop(), [None, width])
            rows = []
            if spatial:
                tall = next((r for r in (4, 3, 2) if _extent(s, spatial[-1]) % r == 0), 1)
                row_out, row_in = s.split(spatial.pop(), [None, tall])
                spatial.append(row_out)
                rows = [row_in]
            spatial.append(outer)
            inner = [*rows, vector]
    s.reorder(*spatial, *reduced, *inner)
    if inner:
        _vectorise(s, inner[-1], lanes)
        for row in inner[:-1]:
            s.unroll(row)
    _parallel(s, spatial, total, facts)
    s.decompose_reduction(block, reduced[0])


def fallback(s: Any, facts: Facts) -> Any:
    """Plain loops, the outermost of each nest in parallel where that is safe."""
    try:
        blocks = _blocks(s)
    except s_tir.ScheduleError:
        return s  # written as plain statements
    for block in blocks:
        loops = s.get_loops(block)
        kinds = [v.iter_type for v in s.get(block).iter_vars]
        if facts.cores > 1 and loops and len(kinds) == len(loops) and kinds[0] == 0:
            _try(s.parallel, loops[0])
    return s


RULES: tuple[Rule, ...] = (register_tile, injective, reduction, fallback)


# ---- moves ---------------------------------------------------------------------------------------


def _blocks(s: Any) -> list[Any]:
    return list(s.get_child_blocks(s.get_sblock("root")))


def _extent(s: Any, loop: Any) -> int:
    return int(s.get(loop).extent)


def _dtype(s: Any, block: Any) -> str:
    return str(s.get(block).writes[0].source.ty.dtype)


def _is_reduction(s: Any, block: Any) -> bool:
    return any(v.iter_type != 0 for v in s.get(block).iter_vars)


def _leading(s: Any, block: Any) -> int:
    """How many leading axes of the block are spatial."""
    count = 0
    for v in s.get(block).iter_vars:
        if v.iter_type != 0:
            break
        count += 1
    return count


def _is_elementwise(s: Any, block: Any) -> bool:
    """Whether every buffer is read and written at the block's own axes, in order."""
    body = s.get(block)
    axes = [v.var for v in body.iter_vars]
    regions = [*body.reads, *body.writes]
    return all(
        len(region.region) == len(axes)
        and all(
            r.min.same_as(v) and int(r.extent) == 1
            for r, v in zip(region.region, axes, strict=True)
        )
        for region in regions
        if len(region.source.ty.shape)
    )


def _contiguous(s: Any, block: Any) -> bool:
    """Whether the last spatial axis is the last index of the result and of a read buffer."""
    body = s.get(block)
    axis = [v.var for v in body.iter_vars if v.iter_type == 0][-1]
    written = body.writes[0].region
    if not written or not written[-1].min.same_as(axis):
        return False
    return any(
        region.region and region.region[-1].min.same_as(axis)
        for region in body.reads
        if not region.source.same_as(body.writes[0].source)
    )


def _gathers(s: Any, block: Any) -> bool:
    """Whether some buffer has the block's last axis in another place than its last index."""
    body = s.get(block)
    axis = body.iter_vars[-1].var
    return any(any(r.min.same_as(axis) for r in list(region.region)[:-1]) for region in body.reads)


def _try(move: Callable[..., Any], *args: Any) -> bool:
    try:
        move(*args)
    except s_tir.ScheduleError:
        return False
    return True


def _inline_all(s: Any, blocks: list[Any]) -> list[Any]:
    """Inline what can be; the blocks that are left."""
    for block in blocks:
        _try(s.compute_inline, block)
    return _blocks(s)


def _inline_after(s: Any, block: Any) -> Any | None:
    """Inline the chain behind a block into its last member, which is returned."""
    blocks = _blocks(s)
    names = [s.get(x).name_hint for x in blocks]
    after = blocks[names.index(s.get(block).name_hint) + 1 :]
    for middle in after[:-1]:
        s.compute_inline(middle)
    return after[-1] if after else None


def _inline_before(s: Any, block: Any) -> None:
    names = [s.get(x).name_hint for x in _blocks(s)]
    for early in _blocks(s)[: names.index(s.get(block).name_hint)]:
        s.compute_inline(early)


def _vectorise(s: Any, loop: Any, lanes: int) -> None:
    """Vectors of at most the machine's width, the rest of the loop unrolled."""
    extent = _extent(s, loop)
    if extent > lanes and extent % lanes == 0:
        outer, inner = s.split(loop, [None, lanes])
        s.unroll(outer)
        s.vectorize(inner)
    elif 1 < extent <= lanes:
        s.vectorize(loop)


def _vectorise_long(s: Any, loop: Any, lanes: int) -> None:
    """Vectors under a plain loop."""
    if _extent(s, loop) > lanes:
        _, loop = s.split(loop, [None, lanes])
    s.vectorize(loop)


def _parallel(s: Any, loops: list[Any], work: int, facts: Facts) -> None:
    """Run outer loops in parallel: as few as give every core some pieces."""
    if facts.cores == 1 or work < SMALL_WORK or not loops:
        return
    taken, pieces = [], 1
    for loop in loops:
        taken.append(loop)
        pieces *= _extent(s, loop)
        if pieces >= 4 * facts.cores:
            break
    if pieces > 1:
        s.parallel(s.fuse(*taken) if len(taken) > 1 else taken[0])
