"""The packing kernel of ARM, spelled out: a bit test, a mask and additions of neighbours.

Of the plain expression (``compute.pack_groups``) LLVM makes up to ten times as many instructions,
and unrolls them; this takes a third of an instruction a bit, in a loop of a few hundred bytes.
"""

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from mpqc.graph import TensorType
from mpqc.schedules.llvm_intrinsics import llvm_intrinsic

STEP = 128  # codes of a step: sixteen bytes of a plane
WORTH_THREADS = 1 << 17  # bits below which waking other threads costs more than it saves
_PAIRS = {"aarch64": "llvm.aarch64.neon.addp.v16i8", "armv7": "llvm.arm.neon.vpadd.v8i8"}


def packs(codes: int, arch: str) -> bool:
    """Whether ``pack`` can."""
    return arch in _PAIRS and codes >= STEP and codes % 8 == 0


def pack(codes: int, bits: int, arch: str) -> tuple[Any, tuple[TensorType, TensorType]]:
    """Codes [codes] -> planes [bits, codes / 8], bit ``t`` of a byte that of code ``8 k + t``.

    The last step overlaps the one before it where the codes are no multiple of a step.
    """
    size, last = codes // 8, codes - STEP
    steps = -(-codes // STEP)
    loop = T.parallel if codes * bits >= WORTH_THREADS else T.serial

    def added(a: Any, b: Any) -> Any:
        """Sums of neighbours of a, then of b; 32-bit ARM adds halves of vectors alone."""
        number = llvm_intrinsic(_PAIRS[arch])
        if arch == "aarch64":
            return T.call_llvm_pure_intrin(number, a, b, dtype="uint8x16")
        halves = [
            T.call_llvm_pure_intrin(
                number, T.vectorlow("uint8x8", v), T.vectorhigh("uint8x8", v), dtype="uint8x8"
            )
            for v in (a, b)
        ]
        return T.vectorcombine("uint8x16", *halves)

    def packed(source: Any, start: Any, plane: Any) -> Any:
        """Sixteen bytes: bit t of code t is kept where it counts 2**t, eight codes are added."""
        powers = tirx.const(0x8040201008040201, "uint64")
        mask = T.reinterpret(T.broadcast(powers, 2), dtype="uint8x16")
        tested = T.broadcast(tirx.const(1, "uint8") << plane.astype("uint8"), 16)
        zero = T.broadcast(tirx.const(0, "uint8"), 16)
        sums = [
            tirx.Select((source.vload([start + k], "uint8x16") & tested) != zero, mask, zero)
            for k in range(0, STEP, 16)
        ]
        while len(sums) > 1:
            sums = [added(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        return sums[0]

    @T.prim_func(s_tir=True)
    def packing(src: T.Buffer((codes,), "uint8"), dst: T.Buffer((bits * size,), "uint8")) -> None:
        T.func_attr({"tirx.noalias": True})
        for step in loop(steps):
            with T.sblock("step"):
                T.reads()
                T.writes()
                for plane in T.unroll(bits):
                    dst.vstore(
                        [plane * size + T.min(step * STEP, last) // 8],
                        packed(src, T.min(step * STEP, last), plane),
                    )

    kinds = (TensorType("uint8", (codes,)), TensorType("uint8", (bits * size,)))
    return packing, kinds
