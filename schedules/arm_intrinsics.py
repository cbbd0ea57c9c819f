"""NEON instructions as tensor intrinsics, where one instruction alone is not the whole step.

``tbl``, ``sdot`` and their like are entries of ``lut_intrinsics`` and ``dot_intrinsics``. A chip
without dot products has long multiplications: 8 products of bytes in int16, added pairwise.
"""

from functools import cache, partial, reduce
from operator import add
from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from mpqc.schedules.llvm_intrinsics import llvm_intrinsic

LANES = 4
_PRODUCTS = {"aarch64": "llvm.aarch64.neon.smull.v8i16", "arm": "llvm.arm.neon.vmulls.v8i16"}
_WIDEN = {
    "aarch64": "llvm.aarch64.neon.saddlp.v4i32.v8i16",
    "arm": "llvm.arm.neon.vpaddls.v4i32.v8i16",
}
_PAIRS = {"aarch64": "llvm.aarch64.neon.addp.v4i32", "arm": "llvm.arm.neon.vpadd.v2i32"}


# Adds neighbouring bytes of its operand in uint16; LLVM joins it with the addition to uadalp.
POPCOUNTS = {
    "uadalp": "llvm.aarch64.neon.uaddlp.v8i16.v16i8",
    "vpadal": "llvm.arm.neon.vpaddlu.v8i16.v16i8",
}


@cache
def register_popcount(name: str) -> str:
    """Register ``C[i] += popcount(A[0] & B[i, 0]) + popcount(A[1] & B[i, 1])`` in uint16.

    Returns:
        The name that ``tensorize`` takes.
    """
    lanes = 8

    @T.prim_func(s_tir=True)
    def meaning(
        A: T.Buffer((2,), "uint8", offset_factor=1),  # noqa: N803
        B: T.Buffer((lanes, 2), "uint8", offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "uint16", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:2], B[0:lanes, 0:2])
            T.writes(C[0:lanes])
            for i, k in T.grid(lanes, 2):
                with T.sblock("update"):
                    vi, vk = T.axis.remap("SR", [i, k])
                    C[vi] = C[vi] + T.cast(T.popcount(A[vk] & B[vi, vk]), "uint16")

    def counted(a: Any, b: Any) -> Any:
        spread = T.reinterpret(
            T.broadcast(T.reinterpret(a, dtype="uint16"), lanes), dtype="uint8x16"
        )
        number = llvm_intrinsic(POPCOUNTS[name])
        return T.call_llvm_pure_intrin(number, T.popcount(spread & b), dtype="uint16x8")

    @T.prim_func(s_tir=True)
    def instruction(
        A: T.Buffer((2,), "uint8", offset_factor=1),  # noqa: N803
        B: T.Buffer((lanes, 2), "uint8", offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "uint16", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:2], B[0:lanes, 0:2])
            T.writes(C[0:lanes])
            C.vstore(
                [0],
                C.vload([0], "uint16x8")
                + counted(A.vload([0], "uint8x2"), B.vload([0, 0], "uint8x16")),
            )

    TensorIntrin.register(f"mpqc.{name}", meaning, instruction)
    return f"mpqc.{name}"


def most_product(chain: int) -> int:
    """Largest |a * b| of ``long_dot``: chain / 8 products add up in an int16 lane."""
    return (2**15 - 1) // (chain // 8)


def _sum(values: list[Any]) -> Any:
    return reduce(add, values)


def long_dot(group: int, chain: int, data: str, arch: str) -> Any:
    """``C[i] += sum_k A[k] * B[i, k]`` over four channels by smull, smlal and saddlp.

    Exact while ``|a * b| <= most_product(chain)`` and codes fit int8. The four channels' sums are
    folded into one vector at the end of the step, which needs no second kind of accumulator.

    Args:
        group: products of a channel, a multiple of 16.
        chain: of them, those that are summed in int16 before they are widened; a multiple of 8
            that divides the group.
        data: element type of the codes.
        arch: LLVM's name of the instruction set, "aarch64" or "arm".

    Returns:
        The instruction side of the intrinsic; its meaning is that of every dot product.
    """
    eights = chain // 8

    def widened(codes: list[Any], weights: list[Any]) -> Any:
        """int32x4 whose sum is that of a chain."""
        number = llvm_intrinsic(_PRODUCTS[arch])
        products = [
            T.call_llvm_pure_intrin(number, code, weight, dtype="int16x8")
            for code, weight in zip(codes, weights, strict=True)
        ]
        return T.call_llvm_pure_intrin(
            llvm_intrinsic(_WIDEN[arch]), _sum(products), dtype="int32x4"
        )

    def channel(codes: list[Any], weights: list[Any]) -> Any:
        """int32x4 whose sum is the channel's."""
        starts = range(0, group // 8, eights)
        return _sum([widened(codes[i : i + eights], weights[i : i + eights]) for i in starts])

    def pairs(a: Any, b: Any, lanes: int) -> Any:
        number = llvm_intrinsic(_PAIRS[arch])
        return T.call_llvm_pure_intrin(number, a, b, dtype=f"int32x{lanes}")

    def fold(a: Any, b: Any) -> Any:
        """Sums of neighbours of a, then of b; 32-bit ARM adds halves of vectors alone."""
        if arch == "aarch64":
            return pairs(a, b, 4)
        sums = [pairs(T.vectorlow("int32x2", v), T.vectorhigh("int32x2", v), 2) for v in (a, b)]
        return T.vectorcombine("int32x4", *sums)

    def halves(load: Any, kind: str) -> list[Any]:
        """Vectors of eight, loaded by sixteens from an offset in elements."""
        whole = [load(k) for k in range(0, group, 16)]
        return [half for v in whole for half in (T.vectorlow(kind, v), T.vectorhigh(kind, v))]

    def total(codes: Any, weights: Any) -> Any:
        left = halves(codes, f"{data}x8")
        sums = [channel(left, halves(partial(weights, c), "int8x8")) for c in range(LANES)]
        return fold(fold(sums[0], sums[1]), fold(sums[2], sums[3]))

    @T.prim_func(s_tir=True)
    def instruction(
        A: T.Buffer((group,), data, offset_factor=1),  # noqa: N803
        B: T.Buffer((LANES, group), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((LANES,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:LANES], A[0:group], B[0:LANES, 0:group])
            T.writes(C[0:LANES])
            C.vstore(
                [0],
                C.vload([0], "int32x4")
                + total(
                    lambda k: A.vload([k], f"{data}x16"), lambda c, k: B.vload([c, k], "int8x16")
                ),
            )

    return instruction
