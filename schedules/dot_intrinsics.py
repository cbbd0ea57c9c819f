"""Dot-product instructions as tensor intrinsics, each with its meaning as plain loops beside it.

All compute ``C[i] += sum_k A[k] * B[i, k]`` in int32, exact for the operand ranges stated.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from mpqc.schedules import arm_intrinsics
from mpqc.schedules.llvm_intrinsics import (
    add_products,
    llvm_intrinsic,
    prefetch,
    store,
)


@dataclass(frozen=True)
class Dot:
    """One instruction.

    Attributes:
        lanes: int32 accumulators of a vector.
        group: products added per accumulator.
        data, weight: element types of the broadcast operand and of the vector operand.
        llvm: intrinsic name.
        accumulates: whether the instruction adds to its accumulator operand itself.
        halves: int16 accumulators of a lane; 0 where the instruction sums in int32.
        flush: LLVM intrinsic that adds the halves in int32.
        offset: what is taken from every code before it is multiplied, so that it fits ``data``.
        chain: products that are summed in int16, of a step of several instructions
            (``arm_intrinsics.long_dot`` for the instruction set ``llvm``); 0 where ``llvm`` is it.
    """

    lanes: int
    group: int
    data: str
    weight: str
    llvm: str
    accumulates: bool = False
    halves: int = 0
    flush: str = ""
    offset: int = 0
    chain: int = 0


_SDOT = "llvm.aarch64.neon.sdot.v4i32.v16i8"

# vpmaddwd adds two int16 products exactly: |a|, |w| <= 2**15 - 1 never overflows here, where codes
# have at most 8 bits. vpdpbusd adds four u8*s8 products to int32 without saturation.
DOTS: dict[str, Dot] = {
    "vpmaddwd128": Dot(4, 2, "int16", "int16", "llvm.x86.sse2.pmadd.wd"),
    "vpmaddwd256": Dot(8, 2, "int16", "int16", "llvm.x86.avx2.pmadd.wd"),
    "vpmaddwd512": Dot(16, 2, "int16", "int16", "llvm.x86.avx512.pmaddw.d.512"),
    # vpmaddubsw adds two u8*s8 products in int16: exact while the schedule widens in time.
    "vpmaddubsw128": Dot(
        4,
        4,
        "uint8",
        "int8",
        "llvm.x86.ssse3.pmadd.ub.sw.128",
        halves=2,
        flush="llvm.x86.sse2.pmadd.wd",
    ),
    "vpmaddubsw256": Dot(
        8,
        4,
        "uint8",
        "int8",
        "llvm.x86.avx2.pmadd.ub.sw",
        halves=2,
        flush="llvm.x86.avx2.pmadd.wd",
    ),
    "vpmaddubsw512": Dot(
        16,
        4,
        "uint8",
        "int8",
        "llvm.x86.avx512.pmaddubs.w.512",
        halves=2,
        flush="llvm.x86.avx512.pmaddw.d.512",
    ),
    "vpdpbusd512": Dot(16, 4, "uint8", "int8", "llvm.x86.avx512.vpdpbusd.512", accumulates=True),
    # NEON multiplies bytes of equal sign alone. Codes of up to 7 bits are int8 as they are; wider
    # ones are stored less 128, and the correction of each channel puts 128 * sum(w) back.
    "sdot": Dot(4, 4, "uint8", "int8", _SDOT, accumulates=True),
    "sdot-offset": Dot(4, 4, "int8", "int8", _SDOT, accumulates=True, offset=128),
    "smlal16": Dot(4, 16, "uint8", "int8", "aarch64", chain=16),
    "smlal16-offset": Dot(4, 16, "int8", "int8", "aarch64", offset=128, chain=16),
    "smlal32": Dot(4, 32, "uint8", "int8", "aarch64", chain=16),
    "smlal32-offset": Dot(4, 32, "int8", "int8", "aarch64", offset=128, chain=16),
    # -128 * -128 twice does not fit int16: each product is widened on its own.
    "smull16-offset": Dot(4, 16, "int8", "int8", "aarch64", offset=128, chain=8),
    "smull32-offset": Dot(4, 32, "int8", "int8", "aarch64", offset=128, chain=8),
    "vmlal16": Dot(4, 16, "uint8", "int8", "arm", chain=16),
    "vmlal16-offset": Dot(4, 16, "int8", "int8", "arm", offset=128, chain=16),
    "vmull16-offset": Dot(4, 16, "int8", "int8", "arm", offset=128, chain=8),
    "smlal32-small": Dot(4, 32, "uint8", "int8", "aarch64", chain=32),  # products of up to 13 bits
}


@cache
def register_dot(name: str, vectors: int, ahead: int) -> str:
    """Register the intrinsic with TVM once; return the name that ``tensorize`` takes.

    ``ahead``: as for ``llvm_intrinsics.prefetch``.
    """
    dot = DOTS[name]
    folded = (
        arm_intrinsics.long_dot(dot.group, dot.chain, dot.data, dot.llvm) if dot.chain else None
    )
    symbol = f"mpqc.{name}.{vectors}.{ahead}"
    made = folded or _instruction(dot, vectors, ahead)
    TensorIntrin.register(symbol, _meaning(dot, vectors), made)
    return symbol


def _meaning(dot: Dot, vectors: int) -> Any:
    lanes, group, data, weight = vectors * dot.lanes, dot.group, dot.data, dot.weight

    @T.prim_func(s_tir=True)
    def meaning(
        A: T.Buffer((group,), data, offset_factor=1),  # noqa: N803
        B: T.Buffer((lanes, group), weight, offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:group], B[0:lanes, 0:group])
            T.writes(C[0:lanes])
            for i, k in T.grid(lanes, group):
                with T.sblock("update"):
                    vi, vk = T.axis.remap("SR", [i, k])
                    C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32")

    return meaning


def _instruction(dot: Dot, vectors: int, ahead: int) -> Any:
    lanes, group, data, weight = dot.lanes, dot.group, dot.data, dot.weight
    total, places = vectors * lanes, [[v * lanes] for v in range(vectors)]
    vector, wide, broadcast = f"int32x{lanes}", lanes * group, f"{data}x{group}"

    def spread(a: Any) -> Any:
        word = T.broadcast(T.reinterpret(a, dtype="int32"), lanes)
        return T.reinterpret(word, dtype=f"{data}x{wide}")

    def product(a: Any, b: Any) -> Any:
        return T.call_llvm_pure_intrin(llvm_intrinsic(dot.llvm), spread(a), b, dtype=vector)

    def update(A: Any, B: Any, C: Any) -> None:  # noqa: N803
        data_of = A.vload([0], broadcast)
        weights = [B.vload([*place, 0], f"{weight}x{wide}") for place in places]
        prefetch(B, [0, 0], ahead)
        if not dot.accumulates:
            products = [product(data_of, w) for w in weights]
            add_products(C, vector, places, products)
            return
        for place, w in zip(places, weights, strict=True):
            intrinsic, c = llvm_intrinsic(dot.llvm), C.vload(place, vector)
            value = T.call_llvm_pure_intrin(intrinsic, c, spread(data_of), w, dtype=vector)
            store(C, place, value)

    @T.prim_func(s_tir=True)
    def instruction(
        A: T.Buffer((group,), data, offset_factor=1),  # noqa: N803
        B: T.Buffer((total, group), weight, offset_factor=1),  # noqa: N803
        C: T.Buffer((total,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:total], A[0:group], B[0:total, 0:group])
            T.writes(C[0:total])
            update(A, B, C)

    return instruction


@cache
def register_halves(name: str, vectors: int, ahead: int) -> str:
    """Register an int16-accumulating instruction; return its name.

    ``ahead``: as for ``llvm_intrinsics.prefetch``.
    """
    symbol = f"mpqc.{name}.{vectors}.{ahead}"
    TensorIntrin.register(symbol, *_halves(DOTS[name], vectors, ahead))
    return symbol


@cache
def register_flush(name: str) -> str:
    """Register what adds the int16 sums of an instruction to int32; return its name."""
    TensorIntrin.register(f"mpqc.{name}.flush", *_flush(DOTS[name]))
    return f"mpqc.{name}.flush"


@cache
def register_widening(name: str) -> str:
    """Register the flush that stores instead of adding; return its name."""
    TensorIntrin.register(f"mpqc.{name}.widen", *_widening(DOTS[name]))
    return f"mpqc.{name}.widen"


def _halves(dot: Dot, vectors: int, ahead: int) -> tuple[Any, Any]:
    """``C[i, h] += A[2h] * B[i, 2h] + A[2h+1] * B[i, 2h+1]`` in int16: meaning and instruction."""
    lanes, wide = dot.lanes, 4 * dot.lanes
    total, places = vectors * lanes, [[v * lanes, 0] for v in range(vectors)]
    vector = f"int16x{2 * lanes}"

    @T.prim_func(s_tir=True)
    def meaning(
        A: T.Buffer((4,), "uint8", offset_factor=1),  # noqa: N803
        B: T.Buffer((total, 4), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((total, 2), "int16", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:total, 0:2], A[0:4], B[0:total, 0:4])
            T.writes(C[0:total, 0:2])
            for i, h, k in T.grid(total, 2, 2):
                with T.sblock("update"):
                    vi, vh, vk = T.axis.remap("SSR", [i, h, k])
                    C[vi, vh] = C[vi, vh] + T.cast(A[vh * 2 + vk], "int16") * T.cast(
                        B[vi, vh * 2 + vk], "int16"
                    )

    def product(a: Any, b: Any) -> Any:
        word = T.broadcast(T.reinterpret(a, dtype="int32"), lanes)
        spread = T.reinterpret(word, dtype=f"uint8x{wide}")
        return T.call_llvm_pure_intrin(llvm_intrinsic(dot.llvm), spread, b, dtype=vector)

    def update(A: Any, B: Any, C: Any) -> None:  # noqa: N803
        data = A.vload([0], "uint8x4")
        products = [product(data, B.vload(place, f"int8x{wide}")) for place in places]
        prefetch(B, [0, 0], ahead)
        add_products(C, vector, places, products)

    @T.prim_func(s_tir=True)
    def instruction(
        A: T.Buffer((4,), "uint8", offset_factor=1),  # noqa: N803
        B: T.Buffer((total, 4), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((total, 2), "int16", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:total, 0:2], A[0:4], B[0:total, 0:4])
            T.writes(C[0:total, 0:2])
            update(A, B, C)

    return meaning, instruction


def _flush(dot: Dot) -> tuple[Any, Any]:
    """``C[i] += P[i, 0] + P[i, 1]``, int16 to int32: meaning and instruction."""
    lanes = dot.lanes
    narrow, vector = f"int16x{2 * lanes}", f"int32x{lanes}"

    @T.prim_func(s_tir=True)
    def meaning(
        P: T.Buffer((lanes, 2), "int16", offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], P[0:lanes, 0:2])
            T.writes(C[0:lanes])
            for i, h in T.grid(lanes, 2):
                with T.sblock("update"):
                    vi, vh = T.axis.remap("SR", [i, h])
                    C[vi] = C[vi] + T.cast(P[vi, vh], "int32")

    def widened(p: Any) -> Any:
        ones = T.broadcast(T.int16(1), 2 * lanes)
        return T.call_llvm_pure_intrin(llvm_intrinsic(dot.flush), p, ones, dtype=vector)

    @T.prim_func(s_tir=True)
    def instruction(
        P: T.Buffer((lanes, 2), "int16", offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], P[0:lanes, 0:2])
            T.writes(C[0:lanes])
            C.vstore([0], C.vload([0], vector) + widened(P.vload([0, 0], narrow)))

    return meaning, instruction


def _widening(dot: Dot) -> tuple[Any, Any]:
    """``C[i] = P[i, 0] + P[i, 1]``, int16 to int32: meaning and instruction."""
    lanes = dot.lanes
    narrow, vector = f"int16x{2 * lanes}", f"int32x{lanes}"

    @T.prim_func(s_tir=True)
    def meaning(
        P: T.Buffer((lanes, 2), "int16", offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(P[0:lanes, 0:2])
            T.writes(C[0:lanes])
            for i in T.serial(lanes):
                with T.sblock("update"):
                    vi = T.axis.remap("S", [i])
                    C[vi] = T.cast(P[vi, 0], "int32") + T.cast(P[vi, 1], "int32")

    def widened(p: Any) -> Any:
        ones = T.broadcast(T.int16(1), 2 * lanes)
        return T.call_llvm_pure_intrin(llvm_intrinsic(dot.flush), p, ones, dtype=vector)

    @T.prim_func(s_tir=True)
    def instruction(
        P: T.Buffer((lanes, 2), "int16", offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(P[0:lanes, 0:2])
            T.writes(C[0:lanes])
            C.vstore([0], widened(P.vload([0, 0], narrow)))

    return meaning, instruction
