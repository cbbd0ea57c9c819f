"""A histogram of unknown range over a stream, in bounded memory, and the ranges it suggests."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mpqc.graph import Array
from mpqc.quantizers import ActivationQuantizer, grid

BINS = 4096  # on each side of zero
MIN_EXPONENT = -80
PERCENTILE = 99.99

Method = Literal["minmax", "percentile", "mse", "entropy"]


@dataclass
class Histogram:
    """Counts of float32 values in bins of width ``2**exponent / BINS`` on both sides of zero.

    The range doubles when a value falls outside, and pairs of bins merge: bins are aligned at
    zero and widths are powers of two, so the counts are those of one batch with the final range.

    Attributes:
        counts: int64 [2 * BINS]; bin i starts at ``(i - BINS) * width``.
        exponent: values lie in ``[-2**exponent, 2**exponent)``.
        zeros: exact zeros, kept out of the bins: every rule represents them exactly.
        low: smallest value seen.
        high: largest value seen.
        total: sum of the values.
    """

    counts: Array = field(default_factory=lambda: np.zeros(2 * BINS, np.int64))
    exponent: int = MIN_EXPONENT
    zeros: int = 0
    low: float = np.inf
    high: float = -np.inf
    total: float = 0.0

    def add(self, values: Array) -> None:
        """Count finite float32 values of any shape."""
        if values.size == 0:
            return
        x = values.reshape(-1)
        low, high = float(x.min()), float(x.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.total += float(x.sum(dtype=np.float64))
        zeros = x.size - int(np.count_nonzero(x))
        reach = max(-low, high)
        if reach > 0:
            self._grow(int(np.frexp(reach)[1]))
        index = np.floor(x * np.float32(BINS * 2.0**-self.exponent)).astype(np.int32) + BINS
        self.counts += np.bincount(index, minlength=2 * BINS)
        self.counts[BINS] -= zeros
        self.zeros += zeros

    def _grow(self, exponent: int) -> None:
        doublings = exponent - self.exponent
        if doublings <= 0:
            return
        merged = (np.arange(2 * BINS) - BINS >> min(doublings, 62)) + BINS
        self.counts = np.bincount(merged, self.counts, 2 * BINS).astype(np.int64)
        self.exponent = exponent

    @property
    def count(self) -> int:
        """Values seen."""
        return int(self.counts.sum()) + self.zeros

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def width(self) -> float:
        """Of one bin."""
        return float(2.0**self.exponent / BINS)

    def points(self) -> tuple[Array, Array]:
        """Centres (float64) and counts (int64) of the bins that hold anything."""
        filled = np.flatnonzero(self.counts)
        centres = np.clip((filled - BINS + 0.5) * self.width, self.low, self.high)
        return centres, self.counts[filled]

    def quantizer(self, bits: int, method: Method = "mse") -> ActivationQuantizer:
        """The rule for that width; affine where a negative value was seen."""
        if not self.count or self.low == self.high == 0:
            return ActivationQuantizer(1.0, 0, bits)
        low, high = _RANGES[method](self, bits)
        return ActivationQuantizer.covering(low, high, bits)


def squared_error(points: tuple[Array, Array], scale: Array, zero: Array, bits: int) -> Array:
    """Sum of squared errors of k rules over n weighted points: float64 [k].

    Args:
        points: values float64 [n] and their counts [n].
        scale: [k].
        zero: [k].
        bits: 1 to 8.
    """
    values, counts = points
    scale, zero = scale.astype(np.float64)[:, None], zero[:, None]
    codes = np.clip(np.rint(values / scale) + zero, 0, 2**bits - 1)
    error: Array = ((codes - zero) * scale - values) ** 2 @ counts.astype(np.float64)
    return error


def _minmax(histogram: Histogram, bits: int) -> tuple[float, float]:
    return histogram.low, histogram.high


def _percentile(histogram: Histogram, bits: int) -> tuple[float, float]:
    """The range that the given share of the values keeps to, each side by itself."""
    values, counts = histogram.points()
    values = np.append(values, 0.0)
    order = np.argsort(values, kind="stable")
    share = np.cumsum(np.append(counts, histogram.zeros)[order]) / histogram.count
    values = values[order]
    cut = 1 - PERCENTILE / 100
    low = values[np.searchsorted(share, cut)] if histogram.low < 0 else 0.0
    high = values[min(int(np.searchsorted(share, 1 - cut)), values.size - 1)]
    half = histogram.width / 2
    return max(low - half, histogram.low), min(high + half, histogram.high)


def _mse(histogram: Histogram, bits: int) -> tuple[float, float]:
    """The range of least squared error: a grid of both ends, made finer twice around the best."""
    points = histogram.points()
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    shares = np.geomspace(1.0, 2.0**-6, 25)
    ends_low = low * shares if low < 0 else np.zeros(1)
    ends_high = high * shares if high > 0 else np.zeros(1)
    best, step = _best_pair(points, ends_low, ends_high, bits), float(shares[1])
    for _ in range(3):
        factors = np.geomspace(step, 1 / step, 7)
        ends_low = np.maximum(best[0] * factors, low) if low < 0 else np.zeros(1)
        ends_high = np.minimum(best[1] * factors, high) if high > 0 else np.zeros(1)
        best, step = _best_pair(points, ends_low, ends_high, bits), step ** (1 / 3)
    return best


def _best_pair(
    points: tuple[Array, Array], lows: Array, highs: Array, bits: int
) -> tuple[float, float]:
    low, high = (axis.reshape(-1) for axis in np.meshgrid(lows, highs, indexing="ij"))
    errors = [
        squared_error(points, *grid(low[i : i + 64], high[i : i + 64], bits), bits)
        for i in range(0, low.size, 64)  # blocks that stay in the cache
    ]
    best = int(np.argmin(np.concatenate(errors)))
    return float(low[best]), float(high[best])


def _entropy(histogram: Histogram, bits: int) -> tuple[float, float]:
    """The clipping threshold of least Kullback-Leibler divergence from the histogram."""
    values, counts = histogram.points()
    reach = max(-histogram.low, histogram.high)
    candidates = [
        (max(histogram.low, -reach * share), min(histogram.high, reach * share))
        for share in np.geomspace(1.0, 2.0**-6, 49)
    ]
    losses = [_divergence(values, counts, low, high, bits) for low, high in candidates]
    return candidates[int(np.argmin(losses))]


def _divergence(values: Array, counts: Array, low: float, high: float, bits: int) -> float:
    """KL(P || Q): P the clipped histogram, Q what is left of it after quantization.

    Q is made of the bins inside the range alone; the clipped mass that P keeps in its end bins
    is what makes narrow ranges lose.
    """
    rule = ActivationQuantizer.covering(low, high, bits)
    inside = (values >= low) & (values <= high)
    if not inside.any():
        return float(np.inf)
    p = counts[inside].astype(np.float64)
    kept = p.copy()
    p[0] += counts[values < low].sum()
    p[-1] += counts[values > high].sum()
    codes = rule.quantize(values[inside].astype(np.float32))
    mass = np.bincount(codes, kept, rule.top + 1)
    bins = np.bincount(codes, minlength=rule.top + 1)
    q = mass[codes] / bins[codes]
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


_RANGES = {"minmax": _minmax, "percentile": _percentile, "mse": _mse, "entropy": _entropy}
