"""Winograd's F(2x2, 3x3) in integers: four outputs of a 3x3 window from 16 products, not 36.

    Y = At [ (2G g 2Gt) * (Bt d B) ] A / 4

with the halves of G doubled, so that everything is an integer and the division by four is exact.
A tile reads 4x4 codes d and gives 2x2 outputs; its 16 products are called positions. Numpy, pure.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpqc import accumulators
from mpqc.graph import Array

POSITIONS = 16
# Twice G; At; Bt is spelled out in compute_winograd, where it is sums of two codes.
_TWICE_G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], np.int64)
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.int64)
# Each position is a sum of four codes, of which so many count negative.
_NEGATIVE = np.array([[2, 2, 2, 2], [2, 0, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2]])


@dataclass(frozen=True)
class Bounds:
    """What integers the transformed layer needs.

    Attributes:
        weight: largest magnitude of a transformed weight.
        image: largest value of a transformed code, stored with its offset.
        total: bounds every int32 sum, output transform included.
    """

    weight: int
    image: int
    total: int


def transform_weights(weight: Array) -> npt.NDArray[np.int64]:
    """Weights of the 16 products.

    Args:
        weight: integers [O, C, 3, 3].

    Returns:
        int64 [O, C, 4, 4]; nine times as large as the weights, at most.
    """
    wide = weight.astype(np.int64)
    wanted: npt.NDArray[np.int64] = np.einsum(
        "py,ocyx,qx->ocpq", _TWICE_G, wide, _TWICE_G, optimize=True
    )
    return wanted


def offsets(bits: int, signed: bool) -> npt.NDArray[np.int64]:
    """What is added to transformed codes so that they are stored without a sign.

    Args:
        bits: of a code.
        signed: stored with a sign: nothing is added.

    Returns:
        int64 [4, 4].
    """
    top = 0 if signed else 2**bits - 1
    return (_NEGATIVE * top).astype(np.int64)


def bounds(transformed: npt.NDArray[np.int64], bits: int, signed: bool) -> Bounds:
    """Bounds for these weights and any codes of so many bits.

    Args:
        transformed: of ``transform_weights``.
        bits: of a code.
        signed: whether transformed codes are stored with a sign, or with their offset.
    """
    most = (4 - _NEGATIVE) * (2**bits - 1) + offsets(bits, signed)
    sums = np.abs(transformed).sum(axis=1).max(axis=0, initial=0)  # [4, 4]
    return Bounds(
        int(np.abs(transformed).max(initial=0)),
        int(most.max()),
        int((sums * most).sum()) + int(np.abs(_corrections(transformed, bits, signed)).max()),
    )


def half_chunk(weight: Array, bits: int) -> int:
    """``accumulators.half_chunk`` of the transformed weights [O, C, 3, 3], C a multiple of 4."""
    transformed = transform_weights(weight)
    most = bounds(transformed, bits, signed=False).image
    last = np.moveaxis(transformed, 1, -1)
    return accumulators.half_chunk(last.reshape(*last.shape[:-1], -1, 4), most)


def _corrections(
    transformed: npt.NDArray[np.int64], bits: int, signed: bool
) -> npt.NDArray[np.int64]:
    """What the offsets contribute to 4 Y, negated: int64 [2, 2, O]."""
    sums = transformed.sum(axis=1) * offsets(bits, signed)
    wanted: npt.NDArray[np.int64] = -np.einsum(
        "ip,opq,jq->ijo", _OUTPUT, sums, _OUTPUT, optimize=True
    )
    return wanted


def correction(weight: Array, bits: int, signed: bool, zero_point: int) -> npt.NDArray[np.int32]:
    """Constants of four times each output: they undo the offsets and the zero point.

    Args:
        weight: integers [O, C, 3, 3].
        bits: of a code.
        signed: see ``offsets``.
        zero_point: of the codes.

    Returns:
        int32 [4 * O]: for each place in the 2x2 tile, each channel.
    """
    places = _corrections(transform_weights(weight), bits, signed)
    zero = 4 * zero_point * weight.astype(np.int64).sum(axis=(1, 2, 3))
    wanted: npt.NDArray[np.int32] = (places - zero).reshape(-1).astype(np.int32)
    return wanted


def winograd_weights(weight: Array, block: int, group: int, dtype: str) -> Array:
    """Weights of the Winograd kernels.

    Args:
        weight: integers [O, C, 3, 3].
        block: B, output channels of a tile.
        group: t, products that one instruction adds.
        dtype: int8 or int16.

    Returns:
        [ceil(O/B), 16, ceil(C/t), B, t].
    """
    moved = transform_weights(weight).transpose(0, 2, 3, 1)  # [O, 4, 4, C]
    out, channels = moved.shape[0], moved.shape[3]
    padded = np.pad(moved, [(0, -out % block), (0, 0), (0, 0), (0, -channels % group)])
    split = padded.reshape(-1, block, POSITIONS, padded.shape[3] // group, group)
    return np.ascontiguousarray(split.transpose(0, 2, 3, 1, 4)).astype(dtype)
