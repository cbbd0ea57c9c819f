"""The arithmetic that every backend repeats bit for bit, in numpy: pure functions.

Float steps are IEEE float32, one rounding each: nothing is contracted or reassociated.
"""

import numpy as np
import numpy.typing as npt

from mpqc.errors import GraphError
from mpqc.graph import Array

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]


def quantize(x: Array, scale: float, zero_point: int, low: int, high: int) -> UInt8:
    """``clip(rint(x / scale) + zero_point, low, high)``; x float32 of any shape, codes uint8."""
    with np.errstate(over="ignore"):
        steps = np.rint(x.astype(np.float32) / np.float32(scale))
    codes: UInt8 = np.clip(steps + np.float32(zero_point), low, high).astype(np.uint8)
    return codes


def dequantize(q: Array, scale: float, zero_point: int) -> Float32:
    """``float32(q - zero_point) * scale``."""
    return (q.astype(np.int32) - zero_point).astype(np.float32) * np.float32(scale)


def dequantize_weights(w: Array, scale: Array, axis: int) -> Float32:
    """``float32(w) * scale``, scale float32 along ``axis`` of w or of one element."""
    product: Float32 = w.astype(np.float32) * along(scale.astype(np.float32), axis, w.ndim)
    return product


def affine(acc: Array, m: Array, b: Array, axis: int) -> Float32:
    """``float32(acc) * m + b`` in two roundings; m and b float32 along ``axis`` of acc."""
    product = acc.astype(np.float32) * along(m, axis, acc.ndim)
    return product + along(b, axis, acc.ndim)


def requantize(
    acc: Array, m: Array, b: Array, axis: int, zero_point: int, low: int, high: int
) -> UInt8:
    """``clip(rint(float32(acc) * m + b) + zero_point, low, high)``, codes uint8."""
    steps = np.rint(affine(acc, m, b, axis)) + np.float32(zero_point)
    codes: UInt8 = np.clip(steps, low, high).astype(np.uint8)
    return codes


def along(vector: Array, axis: int, rank: int) -> Array:
    """Shape a vector so that it broadcasts along one axis; one element serves all."""
    if vector.size == 1:
        return vector.reshape(())
    shape = [1] * rank
    shape[axis] = vector.size
    return vector.reshape(shape)


def weight_codes(w: Array, bits: int, levels: str) -> UInt8:
    """Codes v in [0, 2**bits) of the integers w; see ``mpqc.graph`` for the two kinds of levels.

    Raises:
        GraphError: an integer that the levels do not have.
    """
    wide = w.astype(np.int64)
    codes: Int64 = wide & (2**bits - 1) if levels == "signed" else (wide + 2**bits - 1) // 2
    if codes.size and (codes.min() < 0 or codes.max() >= 2**bits):
        raise GraphError(f"integer weights exceed {bits} bits of {levels} levels")
    if not np.array_equal(weight_values(codes, bits, levels), wide):
        raise GraphError(f"integer weights are not {levels} levels of {bits} bits")
    return np.asarray(codes, np.uint8)


def weight_values(codes: Array, bits: int, levels: str) -> npt.NDArray[np.int16]:
    """Integers that the codes stand for."""
    wide = codes.astype(np.int64)
    if levels == "signed":
        values = wide - 2**bits * (wide >= 2 ** (bits - 1))
    elif levels == "odd":
        values = 2 * wide - (2**bits - 1)
    else:
        raise GraphError(f"no weight levels named {levels!r}: signed or odd")
    return np.asarray(values, np.int16)


def odd_bits(values: Array) -> int | None:
    """Width of the odd levels -(2**b - 1), .., -1, 1, .., 2**b - 1 that integers take.

    None where an integer is even, where there are none, and beyond seven bits, which no byte
    holds. The same integers in two's complement need a bit more.
    """
    if not values.size or np.any(values % 2 == 0):
        return None
    bits = int(np.abs(values.astype(np.int64)).max()).bit_length()
    return bits if bits < 8 else None


def tree_sum(x: Array) -> Float32:
    """Sum the last axis pairwise by halves, in float32, in an order that never changes.

    With n elements left and h = ceil(n/2): ``x[i] = x[i] + x[i+h]`` for i < n-h, the rest of the
    lower half stays; then n = h, until one is left.

    Args:
        x: float32 [..., n], n >= 1; windows list their elements in row-major order.

    Returns:
        float32 [...].
    """
    x = x.astype(np.float32)
    while (n := x.shape[-1]) > 1:
        half = (n + 1) // 2
        x = np.concatenate([x[..., : n - half] + x[..., half:], x[..., n - half : half]], axis=-1)
    return x[..., 0]


def tree_mean(x: Array, count: Array | int | None = None) -> Float32:
    """``tree_sum(x) * float32(1 / count)``: the average that all backends agree on.

    Args:
        x: float32 [..., n]; padding contributes zeros.
        count: elements that count, if not n: broadcasts against [...].
    """
    divisor = np.asarray(x.shape[-1] if count is None else count, np.float64)
    return tree_sum(x) * (1 / divisor).astype(np.float32)
