"""Dot-product instructions as tensor intrinsics, each with its meaning as plain loops beside it.

All compute ``C[i] += sum_k A[k] * B[i, k]`` in int32, exact for the operand ranges stated.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T


@dataclass(frozen=True)
class Dot:
    """One instruction.

    Attributes:
        lanes: int32 accumulators of a vector.
        group: products added per accumulator.
        data, weight: element types of the broadcast operand and of the vector operand.
        llvm: intrinsic name.
        accumulates: whether the instruction adds to its accumulator operand itself.
    """

    lanes: int
    group: int
    data: str
    weight: str
    llvm: str
    accumulates: bool = False


# vpmaddwd adds two int16 products exactly: |a|, |w| <= 2**15 - 1 never overflows here, where codes
# have at most 8 bits. vpdpbusd adds four u8*s8 products to int32 without saturation.
DOTS: dict[str, Dot] = {
    "vpmaddwd128": Dot(4, 2, "int16", "int16", "llvm.x86.sse2.pmadd.wd"),
    "vpmaddwd256": Dot(8, 2, "int16", "int16", "llvm.x86.avx2.pmadd.wd"),
    "vpmaddwd512": Dot(16, 2, "int16", "int16", "llvm.x86.avx512.pmaddw.d.512"),
    "vpdpbusd512": Dot(16, 4, "uint8", "int8", "llvm.x86.avx512.vpdpbusd.512", accumulates=True),
}


@cache
def register_dot(name: str) -> str:
    """Register the intrinsic with TVM once; return the name that ``tensorize`` takes."""
    dot = DOTS[name]
    TensorIntrin.register(f"mpqc.{name}", _meaning(dot), _instruction(dot))
    return f"mpqc.{name}"


def _meaning(dot: Dot) -> Any:
    lanes, group, data, weight = dot.lanes, dot.group, dot.data, dot.weight

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


def _instruction(dot: Dot) -> Any:
    lanes, group, data, weight = dot.lanes, dot.group, dot.data, dot.weight
    vector, wide, broadcast = f"int32x{lanes}", lanes * group, f"{data}x{group}"

    def product(a: Any, b: Any, c: Any) -> Any:
        intrinsic = T.llvm_lookup_intrinsic_id(dot.llvm)
        word = T.broadcast(T.reinterpret(a, dtype="int32"), lanes)
        spread = T.reinterpret(word, dtype=f"{data}x{wide}")
        if dot.accumulates:
            return T.call_llvm_pure_intrin(intrinsic, c, spread, b, dtype=vector)
        return c + T.call_llvm_pure_intrin(intrinsic, spread, b, dtype=vector)

    @T.prim_func(s_tir=True)
    def instruction(
        A: T.Buffer((group,), data, offset_factor=1),  # noqa: N803
        B: T.Buffer((lanes, group), weight, offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:group], B[0:lanes, 0:group])
            T.writes(C[0:lanes])
            C.vstore(
                [0],
                product(A.vload([0], broadcast), B.vload([0, 0], f"{weight}x{wide}"), C.vload([0], vector)),
            )

    return instruction
