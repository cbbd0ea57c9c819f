"""Default CUDA schedules of float kernels: a thread for every element, sums in a register.

``apply`` binds each stage of a fused, unscheduled PrimFunc to a grid of its own. No rule reorders
a float sum. What TVM refuses to bind runs on one thread: slow, but it runs on the device.
"""

from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

THREADS = 128


def apply(func: Any) -> Any:
    """Bind one PrimFunc of static shapes to blocks and threads."""
    return (_bound(func) or _single(func)).without_attr("global_symbol")


def _bound(func: Any) -> Any | None:
    schedule = _schedule(func)
    try:
        for block in _blocks(schedule):
            _inline(schedule, block)
        for block in _blocks(schedule):
            _bind(schedule, block)
    except s_tir.ScheduleError:
        return None
    return schedule.mod["main"]


def _schedule(func: Any) -> Any:
    return s_tir.Schedule(
        tvm.IRModule({"main": func}), debug_mask="none", error_render_level="none"
    )


def _blocks(s: Any) -> list[Any]:
    return list(s.get_child_blocks(s.get_sblock("root")))


def _is_reduction(s: Any, block: Any) -> bool:
    return any(v.iter_type != 0 for v in s.get(block).iter_vars)


def _inline(s: Any, block: Any) -> None:
    """Into its only reader; what several read, or is marked, is computed once."""
    kept = "mpqc.keep" in s.get(block).annotations or len(s.get_consumers(block)) > 1
    if kept or _is_reduction(s, block):
        return
    try:
        s.compute_inline(block)
    except s_tir.ScheduleError:
        return  # a result, or read at several places


def _bind(s: Any, block: Any) -> None:
    """One thread an element of the block's result."""
    inner = None
    if _is_reduction(s, block):
        inner, block = block, s.cache_write(block, 0, "local")
    loops = s.get_loops(block)
    if not loops:
        loops = [s.add_unit_loop(block)]
    whole = s.fuse(*loops) if len(loops) > 1 else loops[0]
    at, thread = s.split(whole, [None, THREADS])
    s.bind(at, "blockIdx.x")
    s.bind(thread, "threadIdx.x")
    if inner is not None:
        s.compute_at(inner, thread)


def _single(func: Any) -> Any:
    """Everything on one thread, loop after loop as written."""
    body = tvm_ffi.structural_map(func.body, (tirx.For, _serial))
    for tag in ("threadIdx.x", "blockIdx.x"):
        index = tirx.Var(tag[:-2], "int32")
        thread = tirx.IterVar(tvm.ir.Range(0, 1), index, tirx.IterVar.ThreadIndex, tag)
        zero, one = tirx.const(0, "int32"), tirx.const(1, "int32")
        body = tirx.For(index, zero, one, tirx.ForKind.THREAD_BINDING, body, thread)
    return func.with_body(body)


def _serial(loop: Any) -> Any:
    if loop.kind not in (tirx.ForKind.PARALLEL, tirx.ForKind.VECTORIZED):
        return loop
    return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)
