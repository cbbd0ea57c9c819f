"""From float arrays to codes and scales. Pure numpy; float32 semantics as in ``mpqc.graph``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mpqc import numerics
from mpqc.graph import Array

# Scales stay inside this range, so that products of two and their inverses are normal float32
# numbers: processors that flush subnormals to zero then agree with those that do not.
MIN_SCALE, MAX_SCALE = 2.0**-60, 2.0**60

WeightLevels = Literal["signed", "odd"]


@dataclass(frozen=True)
class ActivationQuantizer:
    """Per-tensor rule ``clip(rint(x / scale) + zero_point, 0, 2**bits - 1)``.

    Attributes:
        scale: positive, a float32 value.
        zero_point: code of 0.0; 0 for non-negative tensors.
        bits: 1 to 8.
    """

    scale: float
    zero_point: int
    bits: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(np.float32(self.scale)))
        if not MIN_SCALE <= self.scale <= MAX_SCALE:
            raise ValueError(f"scale {self.scale} is outside [{MIN_SCALE}, {MAX_SCALE}]")
        if not (1 <= self.bits <= 8 and 0 <= self.zero_point <= self.top):
            raise ValueError(f"zero point {self.zero_point} is not a {self.bits}-bit code")

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def quantize(self, x: Array) -> Array:
        """float32 [...] -> uint8 codes [...]."""
        return numerics.quantize(x, self.scale, self.zero_point, 0, self.top)

    def dequantize(self, codes: Array) -> Array:
        """uint8 codes [...] -> float32 [...]."""
        return numerics.dequantize(codes, self.scale, self.zero_point)

    @classmethod
    def covering(cls, low: float, high: float, bits: int) -> "ActivationQuantizer":
        """The rule whose codes reach from min(low, 0) to max(high, 0)."""
        scales, zeros = grid(np.array([low]), np.array([high]), bits)
        return cls(float(scales[0]), int(zeros[0]), bits)


def grid(low: Array, high: Array, bits: int) -> tuple[Array, Array]:
    """Scales and zero points of ranges; vectorised ``ActivationQuantizer.covering``.

    Args:
        low: float64 [n]; taken as 0 where positive, because 0.0 needs a code.
        high: float64 [n]; taken as 0 where negative.
        bits: 1 to 8.

    Returns:
        float32 [n] and int64 [n].
    """
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    top = 2**bits - 1
    scale = np.clip((high - low) / top, MIN_SCALE, MAX_SCALE)
    scale = np.where(high == low, 1.0, scale).astype(np.float32)
    return scale, np.clip(np.rint(-low / scale), 0, top).astype(np.int64)


@dataclass(frozen=True, eq=False)
class QuantizedWeights:
    """Weights as the integers that the codes stand for.

    Attributes:
        values: int16, shaped as the weights.
        scale: float32 [channels]; weights are about ``values * scale``.
        bits: the widest of the channels.
        levels: ``signed`` for two's complement, ``odd`` for -1 and +1.
    """

    values: Array
    scale: Array
    bits: int
    levels: WeightLevels


def quantize_weights(weights: Array, bits: int | tuple[int, ...], axis: int) -> QuantizedWeights:
    """Per-channel symmetric codes with the scale of least squared error.

    One bit means +-1 times the mean magnitude, no bit zero. Channels of different widths come out
    in the levels of the widest.

    Args:
        weights: float32, finite.
        bits: 1 to 8, or one width a channel, from 0.
        axis: of the output channels.
    """
    rows = np.moveaxis(weights, axis, 0)
    flat = np.ascontiguousarray(rows.reshape(rows.shape[0], -1), np.float32)
    widths = np.broadcast_to(np.asarray(bits), flat.shape[:1])
    values = np.empty(flat.shape, np.int16)
    scale = np.empty(flat.shape[0], np.float32)
    for width in np.unique(widths):
        chosen = widths == width
        values[chosen], scale[chosen] = _one_width(flat[chosen], int(width))
    return QuantizedWeights(
        np.ascontiguousarray(np.moveaxis(values.reshape(rows.shape), 0, axis)),
        scale,
        *stored_levels(widths),
    )


def stored_levels(bits: int | Sequence[int] | Array) -> tuple[int, WeightLevels]:
    """Width and levels that hold channels of these widths; zeros beside +-1 need two bits."""
    widths = np.asarray(bits)
    widest = int(widths.max())
    if widest <= 1 and widths.min() == widest == 1:
        return 1, "odd"
    return max(widest, 2), "signed"


def channel_widths(values: Array) -> Array:
    """The least width that holds each channel: 0 for zeros, 1 for +-1, else two's complement.

    Args:
        values: integers [O, ...].

    Returns:
        int64 [O].
    """
    rows = values.reshape(len(values), -1).astype(np.int64)
    reach = np.maximum(rows.max(1, initial=0), -rows.min(1, initial=0) - 1)
    widths: Array = np.maximum(2, np.ceil(np.log2(reach + 1)).astype(np.int64) + 1)
    widths[(np.abs(rows) == 1).all(1)] = 1
    widths[~rows.any(1)] = 0
    return widths


def conv_shift(error: Array, means: Array, groups: int) -> Array:
    """What an error of the weights adds to the mean of each output, borders aside.

    Args:
        error: [O, I/groups, *kernel], rounded minus exact.
        means: [I] of the input channels.
        groups: of the convolution.

    Returns:
        float64 [O].
    """
    taps = error.reshape(groups, error.shape[0] // groups, error.shape[1], -1).sum(-1, np.float64)
    shift: Array = np.einsum("goi,gi->go", taps, means.reshape(groups, -1)).reshape(-1)
    return shift


def _one_width(rows: Array, bits: int) -> tuple[Array, Array]:
    """int16 [O, K] and float32 [O] for float32 [O, K]."""
    if bits == 0:
        return np.zeros(rows.shape, np.int16), np.ones(len(rows), np.float32)
    if bits == 1:
        scale = _guarded(np.abs(rows).mean(axis=1, dtype=np.float64), zero=MIN_SCALE)
        return np.where(rows < 0, -1, 1).astype(np.int16), scale
    scale = weight_scales(rows, bits)
    return round_weights(rows, scale, bits).astype(np.int16), scale


def round_weights(rows: Array, scale: Array, bits: int) -> Array:
    """Integers, as float32 [O, K], of float32 [O, K] at scales float32 [O]."""
    half = 2 ** (bits - 1)
    return np.clip(np.rint(rows / scale[:, None]), -half, half - 1)


def minmax_scales(rows: Array, bits: int) -> Array:
    """The smallest scales at which no weight is clipped: float32 [O] for float32 [O, K]."""
    half = 2 ** (bits - 1)
    low = -rows.min(axis=1).astype(np.float64) / half
    high = rows.max(axis=1).astype(np.float64) / (half - 1)
    return _guarded(np.maximum(low, high), zero=1.0)


def weight_scales(rows: Array, bits: int) -> Array:
    """Scales of least squared error: float32 [O] for float32 [O, K].

    A grid from the scale that clips nothing down to where half the codes' range is cut at eight
    bits and seven eighths at two; then least squares for the scale given the codes, a few times.
    """
    unclipped = minmax_scales(rows, bits)
    best = unclipped
    best_error = weight_error(rows, best, bits)

    def take(candidate: Array) -> None:
        nonlocal best, best_error
        error = weight_error(rows, candidate, bits)
        better = error < best_error
        best = np.where(better, candidate, best)
        best_error = np.where(better, error, best_error)

    lowest = 0.5 if bits > 4 else 0.125
    for share in np.geomspace(1.0, lowest, 16 if bits > 4 else 40)[1:]:
        take(_guarded(unclipped.astype(np.float64) * share, zero=1.0))
    for _ in range(4):
        codes = round_weights(rows, best, bits)
        power = np.einsum("ok,ok->o", codes, codes, dtype=np.float64)
        match = np.einsum("ok,ok->o", codes, rows, dtype=np.float64)
        fitted = np.divide(match, power, out=best.astype(np.float64), where=power > 0)
        take(_guarded(fitted, zero=1.0))
    return best


def weight_error(rows: Array, scale: Array, bits: int) -> Array:
    """Squared error of each channel: float64 [O]."""
    difference = round_weights(rows, scale, bits) * scale[:, None] - rows
    error: Array = np.einsum("ok,ok->o", difference, difference, dtype=np.float64)
    return error


def _guarded(scale: Array, zero: float) -> Array:
    """float32 scales inside the safe range; ``zero`` for a channel of zeros."""
    return np.where(scale == 0, zero, np.clip(scale, MIN_SCALE, MAX_SCALE)).astype(np.float32)
