"""Byte shuffles as tensor intrinsics: many lanes look into one table of sixteen sums.

All compute ``C[i] += T[B[i]]`` in uint8 for nibbles B and a table whose entries are subset sums,
``T[b] = sum_t bit_t(b) * T[2**t]``; the meaning is written that way, because TVM does not match a
gather. ``T[15] - T[7]`` for ``T[8]`` shows TVM that the whole table is read.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from mpqc.schedules.llvm_intrinsics import add_products, llvm_intrinsic


@dataclass(frozen=True)
class Lookup:
    """One instruction: ``lanes`` bytes shuffle a table of 16 bytes in every 128-bit part."""

    lanes: int
    llvm: str


LOOKUPS: dict[str, Lookup] = {
    "vpshufb128": Lookup(16, "llvm.x86.ssse3.pshuf.b.128"),
    "vpshufb256": Lookup(32, "llvm.x86.avx2.pshuf.b"),
    "vpshufb512": Lookup(64, "llvm.x86.avx512.pshuf.b.512"),
    "tbl128": Lookup(16, "llvm.aarch64.neon.tbl1.v16i8"),
}


def lookup_of(arch: str, lanes: int) -> str:
    """Name of the shuffle of an architecture for vectors of so many bytes."""
    return f"{'vpshufb' if arch == 'x86_64' else 'tbl'}{lanes * 8}"


ENTRIES = 16  # of a table


@cache
def register_lookup(name: str, vectors: int) -> str:
    """Register the intrinsic with TVM once; return the name that ``tensorize`` takes."""
    lookup, symbol = LOOKUPS[name], f"mpqc.{name}.{vectors}"
    TensorIntrin.register(symbol, _meaning(vectors * lookup.lanes), _instruction(lookup, vectors))
    return symbol


def _meaning(lanes: int) -> Any:
    @T.prim_func(s_tir=True)
    def meaning(
        A: T.Buffer((ENTRIES,), "uint8", offset_factor=1),  # noqa: N803
        B: T.Buffer((lanes,), "uint8", offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "uint8", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:ENTRIES], B[0:lanes])
            T.writes(C[0:lanes])
            for i in T.serial(lanes):
                with T.sblock("update"):
                    vi = T.axis.remap("S", [i])
                    C[vi] = C[vi] + (
                        A[0]
                        + ((B[vi] >> T.uint8(0)) & T.uint8(1)) * A[1]
                        + ((B[vi] >> T.uint8(1)) & T.uint8(1)) * A[2]
                        + ((B[vi] >> T.uint8(2)) & T.uint8(1)) * A[4]
                        + ((B[vi] >> T.uint8(3)) & T.uint8(1)) * (A[15] - A[7])
                    )

    return meaning


def _instruction(lookup: Lookup, vectors: int) -> Any:
    lanes, vector = lookup.lanes, f"uint8x{lookup.lanes}"
    total, places = vectors * lanes, [[v * lanes] for v in range(vectors)]

    def picked(table: Any, nibbles: Any) -> Any:
        intrinsic = llvm_intrinsic(lookup.llvm)
        if lanes > 16:
            table = T.Shuffle([table] * (lanes // 16), [T.int32(i) for i in range(lanes)])
        return T.call_llvm_pure_intrin(intrinsic, table, nibbles, dtype=vector)

    def update(A: Any, B: Any, C: Any) -> None:  # noqa: N803
        table = A.vload([0], "uint8x16")
        entries = [picked(table, B.vload(place, vector)) for place in places]
        add_products(C, vector, places, entries)

    @T.prim_func(s_tir=True)
    def instruction(
        A: T.Buffer((ENTRIES,), "uint8", offset_factor=1),  # noqa: N803
        B: T.Buffer((total,), "uint8", offset_factor=1),  # noqa: N803
        C: T.Buffer((total,), "uint8", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:total], A[0:ENTRIES], B[0:total])
            T.writes(C[0:total])
            update(A, B, C)

    return instruction


@cache
def register_bytes(lanes: int) -> str:
    """Register what adds bytes to 16-bit sums: ``C[h, k] += P[2 k + h]``; return its name."""
    narrow, wide = f"uint8x{lanes}", f"uint16x{lanes // 2}"
    half = lanes // 2

    @T.prim_func(s_tir=True)
    def meaning(
        P: T.Buffer((lanes,), "uint8", offset_factor=1),  # noqa: N803
        C: T.Buffer((2, half), "uint16", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:2, 0:half], P[0:lanes])
            T.writes(C[0:2, 0:half])
            for h, k in T.grid(2, half):
                with T.sblock("update"):
                    vh, vk = T.axis.remap("SS", [h, k])
                    C[vh, vk] = C[vh, vk] + T.cast(P[vk * 2 + vh], "uint16")

    def words(p: Any) -> Any:
        return T.reinterpret(p, dtype=wide)

    def times(value: int) -> Any:
        return T.broadcast(T.uint16(value), half)

    @T.prim_func(s_tir=True)
    def instruction(
        P: T.Buffer((lanes,), "uint8", offset_factor=1),  # noqa: N803
        C: T.Buffer((2, half), "uint16", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:2, 0:half], P[0:lanes])
            T.writes(C[0:2, 0:half])
            C.vstore([0, 0], C.vload([0, 0], wide) + (words(P.vload([0], narrow)) & times(255)))
            C.vstore([1, 0], C.vload([1, 0], wide) + (words(P.vload([0], narrow)) >> times(8)))

    TensorIntrin.register(f"mpqc.bytes.{lanes}", meaning, instruction)
    return f"mpqc.bytes.{lanes}"
