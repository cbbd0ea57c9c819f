"""Error-compensated rounding of one layer's weights: pure numpy, no retraining.

The layer's outputs ``Y = W X`` of the float model are to be met by ``s Q X'``, where X' are the
inputs that the quantized layer really reads, Q integers and s a scale for each output channel.
For every output channel that is least squares over integers,

    (s q - v)' H (s q - v) + constant,    H = X' X'' + lambda I,    v = (Y X'' + lambda w) H^-1,

with lambda holding v near the float weights w where the data say little. ``compensate`` looks for
q by successive rounding: each column takes over what the columns rounded before it did wrong
(GPTQ; the same as Babai's nearest plane), then by descent over single weights and scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from mpqc.errors import UsageError
from mpqc.graph import Array
from mpqc.quantizers import (
    MAX_SCALE,
    MIN_SCALE,
    ActivationQuantizer,
    QuantizedWeights,
    quantize_weights,
)

Rounding: TypeAlias = Literal["gptq", "nearest"]
Clipping: TypeAlias = Literal["mse", "output"]
Equalize: TypeAlias = Literal["auto", "on", "off"]

BLOCK = 64  # columns between two matrix products
# Products of a pass over a layer's weights -> shares of the scale of least squared error that are
# tried below 5 bits, and sweeps of the descent: large layers have less to gain and cost the most.
EFFORT: tuple[tuple[float, tuple[float, ...], int], ...] = (
    (4e8, (1.0, 0.9, 0.8, 0.7, 0.6), 4),
    (3e9, (1.0, 0.8), 2),
    (np.inf, (0.9,), 1),
)


@dataclass(frozen=True)
class Accuracy:
    """How quantization is kept accurate without retraining.

    Attributes:
        rounding: ``gptq`` compensates rounding errors on the calibration data, layer after
            layer, each on what the quantized layers before it give; ``nearest`` does not.
        bias_correction: each channel keeps the mean that it has in the float model.
        clipping: of activations: least squared error of the values (``mse``, or what the
            calibration method says), or of the outputs of the layers that read them.
        equalize: move scale between the channels of neighbouring layers before quantizing:
            everywhere, or around depthwise convolutions alone (``auto``). With a weight scale
            for each channel it seldom helps.
        samples: of the calibration data, for all but the histograms.
        damping: lambda over the mean square of the inputs.
        order: round columns of large inputs first.
    """

    rounding: Rounding = "gptq"
    bias_correction: bool = True
    clipping: Clipping = "output"
    equalize: Equalize = "off"
    samples: int = 128
    damping: float = 0.01
    order: bool = True

    def __post_init__(self) -> None:
        for name, known in (
            ("rounding", ("gptq", "nearest")),
            ("clipping", ("mse", "output")),
            ("equalize", ("auto", "on", "off")),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} {getattr(self, name)!r}: one of {', '.join(known)}")
        if self.samples < 1 or not self.damping > 0:
            raise UsageError("samples and damping of the rounding must be positive")

    @property
    def reads_data(self) -> bool:
        """Whether layers have to be seen at work, beyond histograms and means."""
        return self.rounding == "gptq" or self.clipping == "output"


@dataclass(frozen=True, eq=False)
class RoundedLayer:
    """What a layer computes with.

    Attributes:
        weights: as integers.
        bias: float32 [O].
        rule: of the layer's input.
    """

    weights: QuantizedWeights
    bias: Array
    rule: ActivationQuantizer


@dataclass(frozen=True, eq=False)
class Objective:
    """Least squares of one layer by groups: ``(r - target)' gram (r - target)`` for each row r.

    Attributes:
        gram: float64 [G, K, K], positive definite.
        target: float64 [G, O, K], where each row would best be.
    """

    gram: Array
    target: Array

    @classmethod
    def exact(cls, weights: Array, gram: Array, damping: float) -> "Objective":
        """Keep to given weights: ``gram`` float64 [G, K, K] of the inputs, weights [G, O, K]."""
        return cls(_damped(gram, damping)[0], weights.astype(np.float64))

    @classmethod
    def fitted(cls, weights: Array, gram: Array, cross: Array, damping: float) -> "Objective":
        """Meet given outputs.

        Args:
            weights: [G, O, K] of the float layer, which the damping draws to.
            gram: float64 [G, K, K], mean of inputs times inputs.
            cross: float64 [G, O, K], mean of outputs times inputs.
            damping: over the mean square of the inputs.
        """
        wide = weights.astype(np.float64)
        damped, extra = _damped(gram, damping)
        right = np.swapaxes(cross + extra[:, None, None] * wide, 1, 2)
        return cls(damped, np.swapaxes(np.linalg.solve(damped, right), 1, 2))

    def error(self, rows: Array) -> Array:
        """float64 [G, O] of weights [G, O, K], the constant left out."""
        difference = rows - self.target
        found: Array = np.einsum("gok,gok->go", difference @ self.gram, difference)
        return found


def _damped(gram: Array, damping: float) -> tuple[Array, Array]:
    """The gram with lambda [G] on its diagonal; inputs that are always zero get one too."""
    mean = np.trace(gram, axis1=1, axis2=2) / gram.shape[1]
    # a dead group, and one whose squares underflow, has nothing to say: stay at the weights
    extra = np.where(mean > 1e-200, damping * mean, 1.0)
    damped = gram + extra[:, None, None] * np.eye(gram.shape[1])
    return damped, extra


@dataclass(frozen=True, eq=False)
class _Levels:
    """Integers that each row may take: [low, high], or -1 and +1.

    Attributes:
        low: float64 [G, O, 1].
        high: float64 [G, O, 1].
        binary: bool [G, O, 1].
    """

    low: Array
    high: Array
    binary: Array

    @classmethod
    def of(cls, bits: Array) -> "_Levels":
        """Of widths [G, O]."""
        wide = bits[..., None]
        half = np.where(wide > 0, 2.0 ** (wide - 1), 0)
        binary = wide == 1
        high = np.where(binary, 1, np.maximum(half - 1, 0))
        return cls(np.where(binary, -1, -half), high, binary)

    def nearest(self, steps: Array) -> Array:
        """Of [G, O, n] weights in units of their scales."""
        near = np.clip(np.rint(steps), self.low, self.high)
        if not self.binary.any():
            return near
        return np.where(self.binary, np.where(steps < 0, -1.0, 1.0), near)


def compensate(
    weights: Array,
    bits: int | Sequence[int],
    objective: Objective,
    order: bool = True,
) -> tuple[Array, Array]:
    """Integers and scales of small error; never more than rounding to nearest has.

    Args:
        weights: float32 [G, O, K].
        bits: 1 to 8, or one width for each of the G * O channels; 0 makes a channel zero.
        objective: of the layer.
        order: round columns of large inputs first.

    Returns:
        int16 [G, O, K] and float32 [G, O].
    """
    groups, rows, columns = weights.shape
    widths = np.broadcast_to(np.asarray(bits), (groups * rows,)).reshape(groups, rows)
    levels = _Levels.of(widths)
    if order:
        rank = np.argsort(np.diagonal(objective.gram, axis1=1, axis2=2), axis=1, kind="stable")
    else:
        rank = np.broadcast_to(np.arange(columns), (groups, columns))
    gram = np.take_along_axis(objective.gram, rank[:, :, None], 1)
    gram = np.take_along_axis(gram, rank[:, None, :], 2)
    target = np.take_along_axis(objective.target, rank[:, None, :], 2)
    start = _nearest(np.take_along_axis(weights, rank[:, None, :], 2), widths)
    search = _Search(gram, target, levels)
    search.take(*start)  # what is returned is at least this good
    fitted = _nearest(target.astype(np.float32), widths)
    search.take(*fitted)
    upper = np.swapaxes(np.linalg.cholesky(gram), 1, 2)
    work = groups * rows * columns**2
    shares, sweeps = next((shares, sweeps) for most, shares, sweeps in EFFORT if work <= most)
    for share in shares if widths.min() <= 4 else (1.0,):
        scale = _guarded(fitted[1] * share)
        search.take(_successive(target, upper, scale, levels), scale)
    for _ in range(sweeps):
        if not search.improve():
            break
    back = np.argsort(rank, axis=1)
    codes = np.take_along_axis(search.codes, back[:, None, :], 2)
    return codes.astype(np.int16), search.scale.astype(np.float32)


def _nearest(weights: Array, widths: Array) -> tuple[Array, Array]:
    """Codes [G, O, K] and scales [G, O] of least squared error of the weights."""
    flat = np.ascontiguousarray(weights.reshape(-1, weights.shape[2]), np.float32)
    found = quantize_weights(flat, tuple(widths.reshape(-1).tolist()), 0)
    return (
        found.values.reshape(weights.shape).astype(np.float64),
        found.scale.reshape(widths.shape).astype(np.float64),
    )


def _successive(target: Array, upper: Array, scale: Array, levels: _Levels) -> Array:
    """Round from the last column to the first, each knowing the errors of those behind it.

    ``upper' upper`` is the gram, so the error is a sum over columns k of
    ``(upper[k, k] * (r[k] - c[k]))**2``, where c[k] depends on columns behind k alone.
    """
    columns = target.shape[2]
    wrong = np.zeros_like(target)  # target - rounded, of the columns done
    codes = np.empty_like(target)
    scale = scale[..., None]
    diagonal = np.diagonal(upper, axis1=1, axis2=2)
    for stop in range(columns, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        carried = wrong[:, :, stop:] @ np.swapaxes(upper[:, start:stop, stop:], 1, 2)
        for k in range(stop - 1, start - 1, -1):
            inner = wrong[:, :, k + 1 : stop] @ upper[:, k, k + 1 : stop, None]
            shift = (carried[:, :, k - start, None] + inner) / diagonal[:, None, k, None]
            column = slice(k, k + 1)
            codes[:, :, column] = levels.nearest((target[:, :, column] + shift) / scale)
            wrong[:, :, column] = target[:, :, column] - codes[:, :, column] * scale
    return codes


class _Search:
    """The best codes and scales so far, for each row by itself."""

    def __init__(self, gram: Array, target: Array, levels: _Levels) -> None:
        self.gram, self.target, self.levels = gram, target, levels
        self.codes = np.zeros_like(target)
        self.scale = np.ones(target.shape[:2])
        self.error = np.full(target.shape[:2], np.inf)
        self._pull = target @ gram
        self._power = np.einsum("gok,gok->go", self._pull, target)

    def take(self, codes: Array, scale: Array) -> None:
        """Keep the rows that are better than what is there, each at its scale of least error.

        Args:
            codes: [G, O, K].
            scale: [G, O], for rows that no positive scale suits.
        """
        power = np.einsum("gok,gok->go", codes @ self.gram, codes)
        match = np.einsum("gok,gok->go", codes, self._pull)
        fitted = np.divide(match, power, out=scale.copy(), where=(power > 0) & (match > 0))
        scale = _guarded(fitted)
        error = self._power + scale * (scale * power - 2 * match)
        better = error < self.error
        self.codes = np.where(better[..., None], codes, self.codes)
        self.scale = np.where(better, scale, self.scale)
        self.error = np.where(better, error, self.error)

    def improve(self) -> bool:
        """One descent over all columns, each weight to its best level while the others stay."""
        before = self.error.sum()
        columns = self.target.shape[2]
        codes, scale = self.codes.copy(), self.scale[..., None]
        diagonal = np.diagonal(self.gram, axis1=1, axis2=2)
        wrong = codes * scale - self.target
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            slope = wrong @ self.gram[:, :, start:stop]
            for k in range(start, stop):
                column = slice(k, k + 1)
                old = codes[:, :, column] * scale
                best = old - slope[:, :, k - start, None] / diagonal[:, None, k, None]
                new = self.levels.nearest(best / scale)
                change = new * scale - old
                if not change.any():
                    continue
                codes[:, :, column] = new
                wrong[:, :, column] += change
                slope += change * self.gram[:, k, None, start:stop]
        self.take(codes, self.scale)
        return bool(self.error.sum() < before * (1 - 1e-4))


def _guarded(scale: Array) -> Array:
    """Scales that float32 holds, inside the safe range."""
    inside: Array = np.clip(scale, MIN_SCALE, MAX_SCALE).astype(np.float32).astype(np.float64)
    return inside
