"""Constants at the width that their values need; the library widens them once it is loaded.

Kernels that multiply bytes want two-bit weights as bytes. In the file they take two bits.
"""

from dataclasses import dataclass

import numpy as np

from mpqc.graph import Array

LEAST_SAVING = 256  # bytes; below, the code and the table would not pay


@dataclass(frozen=True)
class Narrow:
    """An array of small integers: ``value = low + scale * code``.

    Attributes:
        low, scale: of the values.
        bits: of a code.
        count: codes.
        width: bytes of a value.
        data: the codes, lowest bit first, without gaps.
    """

    low: int
    scale: int
    bits: int
    count: int
    width: int
    data: bytes

    def widen(self, dtype: str) -> Array:
        """The values again, flat: what the library does in C."""
        stream = np.unpackbits(np.frombuffer(self.data, np.uint8), bitorder="little")
        codes = stream[: self.count * self.bits].reshape(self.count, self.bits).astype(np.int64)
        values: Array = (self.low + self.scale * (codes @ (1 << np.arange(self.bits)))).astype(
            dtype
        )
        return values


def narrow(array: Array) -> Narrow | None:
    """Fewer bits for the same values; None where that saves nothing worth it."""
    width = array.dtype.itemsize
    if array.dtype.kind not in "iu" or width > 2 or not array.size:
        return None
    values = np.unique(array).astype(np.int64)
    low = int(values[0])
    scale = int(np.gcd.reduce(values - low)) or 1
    codes = (array.reshape(-1).astype(np.int64) - low) // scale
    bits = max(1, int(codes.max()).bit_length())
    if array.size * (8 * width - bits) < 8 * LEAST_SAVING:
        return None
    planes = (codes[:, None] >> np.arange(bits)) & 1
    data = np.packbits(planes.astype(np.uint8).reshape(-1), bitorder="little").tobytes()
    return Narrow(low, scale, bits, array.size, width, data)
