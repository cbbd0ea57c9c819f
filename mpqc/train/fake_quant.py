"""Fake quantization in the compiler's arithmetic: codes as ``mpqc.graph`` defines them.

Forward, a quantizer gives ``integer * step``: exactly the integers that the compiled network
computes with. Backward, rounding is passed straight through and steps learn as in LSQ. Weights
come with the output channels first. ``bits`` may be a width for each output channel; width 0
makes a channel zero.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from mpqc.errors import UsageError
from mpqc.graph import Array
from mpqc.quantizers import (
    MAX_SCALE,
    MIN_SCALE,
    ActivationQuantizer,
    QuantizedWeights,
    WeightLevels,
    quantize_weights,
)

Bits: TypeAlias = int | Sequence[int]
DoReFaScheme: TypeAlias = Literal["original", "modified", "centered"]
Rescale: TypeAlias = Literal["none", "gain", "sat"]


class _Lsq(torch.autograd.Function):
    """``integer(x / step) * step``; gradients of LSQ.

    In range x gets the gradient and the step ``integer - x / step``; out of range x gets none
    and the step the bound that holds.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, low: Tensor, high: Tensor, odd: Tensor | None, scale: Any
    ) -> Tensor:
        steps = x / step
        integers = to_integers(steps, low, high, odd)
        below = low if odd is None else torch.where(odd, low - 1, low)
        above = high if odd is None else torch.where(odd, high + 1, high)
        inside = (steps >= below) & (steps <= above)
        ctx.save_for_backward(inside, torch.where(inside, integers - steps, integers))
        ctx.step_shape, ctx.scale = step.shape, scale
        return integers * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inside, slope = ctx.saved_tensors
        grad = grads[0]
        to_step = None
        if ctx.needs_input_grad[1]:
            to_step = (grad * slope).sum_to_size(ctx.step_shape) * ctx.scale
        to_x = torch.where(inside, grad, 0.0) if ctx.needs_input_grad[0] else None
        return to_x, to_step, None, None, None, None


class _LsqOfOneStep(torch.autograd.Function):
    """``_Lsq`` with one step for the whole tensor, in few passes over memory, for CPUs.

    The sum of ``grad * (integer - x / step)`` is taken as a difference of two products, so that
    only x and the result are kept. The bounds are numbers of the host: a GPU would be waited for.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: float, high: float, scale: float) -> Tensor:
        made = (x / step).clamp_(low, high).round_().mul_(step)
        ctx.save_for_backward(x, made, step)
        ctx.bounds, ctx.scale = (low, high), scale
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, made, step = ctx.saved_tensors
        grad, size = grads[0], np.float32(float(step))
        # the kernel leaves out the bounds themselves; zeros, as ReLU makes them, are inside
        low = np.nextafter(np.float32(ctx.bounds[0]) * size, np.float32(-np.inf))
        high = np.nextafter(np.float32(ctx.bounds[1]) * size, np.float32(np.inf))
        low, high = min(low, -_NORMAL), max(high, _NORMAL)
        to_x = torch.ops.aten.hardtanh_backward(grad, x, float(low), float(high))
        to_step = None
        if ctx.needs_input_grad[1]:
            slope = (_dot(grad, made) - _dot(to_x, x)) / step
            to_step = slope.reshape(step.shape) * ctx.scale
        return to_x if ctx.needs_input_grad[0] else None, to_step, None, None, None


_NORMAL = np.finfo(np.float32).tiny


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products, without copies where both lie in memory alike."""
    if a.stride() == b.stride():
        if a.is_contiguous():
            return torch.dot(a.view(-1), b.view(-1))
        if a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last):
            return torch.dot(a.permute(0, 2, 3, 1).view(-1), b.permute(0, 2, 3, 1).view(-1))
    return (a * b).sum()


def to_integers(steps: Tensor, low: Tensor, high: Tensor, odd: Tensor | None = None) -> Tensor:
    """Nearest integers in [low, high], half to even; where ``odd``, nearest odd ones.

    Args:
        steps: values in units of their steps.
        low: least integer, broadcast to the steps.
        high: greatest.
        odd: bool, broadcast likewise; of two equally near odd integers the greater is taken.
    """
    near = steps.round()
    if odd is not None:
        near = torch.where(odd, 2 * torch.floor(steps / 2) + 1, near)
    return torch.minimum(torch.maximum(near, low), high)


def lsq(
    x: Tensor,
    step: Tensor,
    low: Tensor,
    high: Tensor,
    odd: Tensor | None = None,
    gradient_scale: float | Tensor = 1.0,
) -> Tensor:
    """Quantize with a learned step.

    Args:
        x: float32.
        step: positive, broadcast to x; its gradient is multiplied by
        gradient_scale: LSQ takes ``1 / sqrt(values a step * high)``.
        low: least integer.
        high: greatest.
        odd: where the integers are odd, as DoReFa's and bipolar levels are.
    """
    made: Tensor = _Lsq.apply(x, step, low, high, odd, gradient_scale)
    return made


class _RoundThrough(torch.autograd.Function):
    """The value of the second operand, the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0], None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, whose gradient goes to x."""
    made: Tensor = _RoundThrough.apply(x, rounded)
    return made


# Weights ---------------------------------------------------------------------------------------


class WeightQuantizer(nn.Module, ABC):
    """From float weights to integers times a scale for each output channel.

    Attributes:
        bits: width, of the widest channel.
    """

    bits: int

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """Quantized weights as floats: ``integers(weight)`` times their scales."""

    @abstractmethod
    def integers(self, weight: Tensor) -> QuantizedWeights:
        """What the compiler gets; values with the output channels first."""


class _Levels(nn.Module):
    """Integers that each output channel may take.

    Args:
        bits: 0 to 8.
        channels: output channels.
        odd: levels -N, -N + 2 .. N with N = 2**bits - 1 at every width; else at one bit only.
        rank: of the weights.
    """

    low: Tensor
    high: Tensor
    odd: Tensor | None

    def __init__(self, bits: Bits, channels: int, odd: bool, rank: int) -> None:
        super().__init__()
        widths = np.broadcast_to(np.asarray(bits, np.int64), (channels,))
        if widths.min() < 0 or widths.max() > 8:
            raise UsageError(f"weights have 0 to 8 bits, not {sorted(set(widths.tolist()))}")
        self.bits = int(widths.max())
        mask = (widths > 0) & (odd | (widths == 1))
        half = np.where(widths > 0, 2.0 ** (widths - 1), 0)
        low = np.where(mask, 1 - 2.0**widths, -half)
        high = np.where(mask, 2.0**widths - 1, np.maximum(half - 1, 0))
        shape = (-1, *[1] * (rank - 1))
        self.register_buffer("low", torch.from_numpy(low.astype(np.float32)).reshape(shape))
        self.register_buffer("high", torch.from_numpy(high.astype(np.float32)).reshape(shape))
        self.register_buffer("odd", torch.from_numpy(mask).reshape(shape) if mask.any() else None)
        uniform = bool((widths == widths[0]).all())
        self.kind: WeightLevels = "odd" if mask.all() and uniform else "signed"
        if self.kind == "signed" and self.bits == 1 and mask.any():
            self.bits = 2  # -1, 0 and 1
        if self.kind == "signed" and mask.any() and odd:
            raise UsageError("odd levels want one width for all channels of a layer")


class LsqWeights(WeightQuantizer):
    """Levels with a learned step for each output channel (LSQ); at one bit +-1.

    Args:
        bits: one width, or one an output channel.
        step: float32 [O], where the steps start.
        shape: of the weights.
        odd: -N, -N + 2 .. N in place of two's complement: symmetric, without zero.
    """

    def __init__(self, bits: Bits, step: Array, shape: Sequence[int], odd: bool = False) -> None:
        super().__init__()
        self.levels = _Levels(bits, shape[0], odd, len(shape))
        self.bits = self.levels.bits
        steps = np.clip(np.asarray(step, np.float64), MIN_SCALE, MAX_SCALE)
        logs = torch.from_numpy(np.log(steps).astype(np.float32))
        self.log_step = nn.Parameter(logs.reshape(-1, *[1] * (len(shape) - 1)))
        each = np.prod(shape[1:], dtype=np.int64)
        self._scale = 1.0 / np.sqrt(float(each)) / np.sqrt(max(1.0, float(self.levels.high.max())))

    @property
    def step(self) -> Tensor:
        """Positive, float32 [O, 1, ...]."""
        return self.log_step.exp()

    def forward(self, weight: Tensor) -> Tensor:
        levels = self.levels
        return lsq(weight, self.step, levels.low, levels.high, levels.odd, self._scale)

    def integers(self, weight: Tensor) -> QuantizedWeights:
        with torch.no_grad():
            levels, step = self.levels, self.step
            made = to_integers(weight / step, levels.low, levels.high, levels.odd)
        return _quantized(made, step, levels)

    @classmethod
    def fitted(cls, weight: Tensor, bits: Bits, odd: bool = False) -> "LsqWeights":
        """Steps of least squared error."""
        array = weight.detach().cpu().numpy()
        return cls(bits, fit_steps(array, bits, odd), array.shape, odd)


def fit_steps(weight: Array, bits: Bits, odd: bool = False) -> Array:
    """Steps of least squared error, float32 [O], of weights [O, ...]."""
    widths = np.broadcast_to(np.asarray(bits), (len(weight),))
    # channels of no bits need some step
    known = quantize_weights(weight, tuple(np.maximum(widths, 1).tolist()), 0).scale
    if not odd or int(widths.max()) <= 1:
        return known
    rows: Array = weight.reshape(len(weight), -1).astype(np.float64)
    top: Array = 2.0 ** np.maximum(widths, 1)[:, None] - 1
    whole = np.maximum(np.abs(rows).max(1, keepdims=True), MIN_SCALE) / top
    best, error = whole, np.full_like(whole, np.inf)
    for share in np.geomspace(1.0, 0.2, 40):
        step = whole * share
        integers = np.clip(2 * np.floor(rows / step / 2) + 1, -top, top)
        wrong = np.square(integers * step - rows).sum(1, keepdims=True)
        best, error = np.where(wrong < error, step, best), np.minimum(wrong, error)
    fitted: Array = best[:, 0].astype(np.float32)
    return fitted


class DoReFaWeights(WeightQuantizer):
    """DoReFa: ``t = tanh(w) / max|tanh(w)|`` on 2**bits levels of [-1, 1], and its relatives.

    Args:
        bits: 1 to 8, one width.
        scheme: ``original`` rounds to 2v/N - 1, v = round(N (t + 1) / 2); ``modified`` truncates,
            v = min(floor(2**b (t + 1) / 2), N), to v / 2**(b-1) - 1, so that codes of fewer bits
            are the first bits of those of more; ``centered`` adds half a step to that.
        rescale: what the levels are multiplied by: nothing; ``gain``, a learned factor for each
            channel that starts where the float weights are met best; ``sat``, 1 / (sqrt(n) std),
            n weights an input channel, as scale-adjusted training does.
        weight: the float weights, for ``gain``.
    """

    def __init__(
        self,
        bits: int,
        weight: Tensor,
        scheme: DoReFaScheme = "original",
        rescale: Rescale = "gain",
    ) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise UsageError(f"weights have 1 to 8 bits, not {bits}")
        self.bits, self.scheme, self.rescale = bits, scheme, rescale
        self.gain: nn.Parameter | None = None
        if rescale == "gain":
            with torch.no_grad():
                levels = self._unit(weight).reshape(len(weight), -1)
                rows = weight.reshape(len(weight), -1)
                power = levels.square().sum(1).clamp_min(1e-12)
                gain = ((levels * rows).sum(1) / power).clamp_min(1e-6)
            shape = (-1, *[1] * (weight.dim() - 1))
            self.gain = nn.Parameter(gain.reshape(shape).clone())

    def _value(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Position in [0, 1] and the code v."""
        squashed = weight.tanh()
        place = (squashed / squashed.detach().abs().max().clamp_min(1e-30) + 1) / 2
        top = float(2**self.bits - 1)
        if self.scheme == "original":
            code = (place.detach() * top).round()
        else:
            code = (place.detach() * (top + 1)).floor().clamp_max(top)
        return place, code

    def _unit(self, weight: Tensor) -> Tensor:
        """Levels in [-1, 1], gradients straight through."""
        place, code = self._value(weight)
        return straight_through(2 * place - 1, self._integers(code) * self._step)

    def _integers(self, code: Tensor) -> Tensor:
        if self.scheme == "modified" and self.bits > 1:
            return code - 2.0 ** (self.bits - 1)
        return 2 * code - float(2**self.bits - 1)

    @property
    def _step(self) -> float:
        if self.scheme == "original" or self.bits == 1:
            return 1.0 / float(2**self.bits - 1)
        return float(2.0 ** (1 - self.bits) if self.scheme == "modified" else 2.0**-self.bits)

    def _factor(self, weight: Tensor) -> Tensor:
        """Float32 [O, 1, ...] or a scalar."""
        if self.gain is not None:
            return self.gain.abs()
        if self.rescale == "sat":
            return sat_factor(self._unit(weight)).detach()
        return torch.ones((), device=weight.device)

    def forward(self, weight: Tensor) -> Tensor:
        return self._unit(weight) * self._factor(weight)

    def integers(self, weight: Tensor) -> QuantizedWeights:
        with torch.no_grad():
            made = self._integers(self._value(weight)[1])
            step = (self._factor(weight) * self._step).expand(
                len(weight), *[1] * (weight.dim() - 1)
            )
        signed = self.scheme == "modified" and self.bits > 1
        values = made.cpu().numpy().astype(np.int16)
        scale = _safe(step.reshape(-1).cpu().numpy())
        return QuantizedWeights(values, scale, self.bits, "signed" if signed else "odd")


def sat_factor(weight: Tensor) -> Tensor:
    """``1 / (sqrt(n) std)`` of quantized weights, n = output channels times kernel positions."""
    n = weight.shape[0] * int(np.prod(weight.shape[2:], dtype=np.int64))
    deviation = weight.std(unbiased=False).clamp_min(1e-12)
    return 1.0 / (float(np.sqrt(n)) * deviation)


def _quantized(integers: Tensor, step: Tensor, levels: _Levels) -> QuantizedWeights:
    values = integers.cpu().numpy().astype(np.int16)
    scale = _safe(step.detach().reshape(-1).cpu().numpy())
    return QuantizedWeights(values, scale, max(levels.bits, 1), levels.kind)


def _safe(scale: Array) -> Array:
    clipped: Array = np.clip(scale, MIN_SCALE, MAX_SCALE).astype(np.float32)
    return clipped


# Activations -----------------------------------------------------------------------------------


class InputQuantizer(nn.Module, ABC):
    """Unsigned codes of one tensor: ``clip(rint(x / scale) + zero_point, 0, 2**bits - 1)``."""

    bits: int

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """What the codes stand for."""

    @abstractmethod
    def rule(self) -> ActivationQuantizer:
        """The compiler's rule."""


class LsqInput(InputQuantizer):
    """A learned step (LSQ); the zero point stays.

    Args:
        rule: where it starts.
        values: elements of one sample's tensor, for the scale of the step's gradient.
    """

    low: Tensor
    high: Tensor

    def __init__(self, rule: ActivationQuantizer, values: int = 1) -> None:
        super().__init__()
        self.bits, self.zero_point = rule.bits, rule.zero_point
        self.log_step = nn.Parameter(torch.tensor([np.log(rule.scale)], dtype=torch.float32))
        self.register_buffer("low", torch.tensor([-float(rule.zero_point)]))
        self.register_buffer("high", torch.tensor([float(rule.top - rule.zero_point)]))
        self._scale = 1.0 / np.sqrt(float(values) * rule.top)

    @property
    def step(self) -> Tensor:
        """Positive, float32 [1]."""
        return self.log_step.exp()

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.float32:
            low, high = -float(self.zero_point), float(2**self.bits - 1 - self.zero_point)
            made: Tensor = _LsqOfOneStep.apply(x, self.step, low, high, self._scale)
            return made
        return lsq(x, self.step, self.low, self.high, None, self._scale)

    def rule(self) -> ActivationQuantizer:
        scale = float(np.clip(float(self.step.detach()), MIN_SCALE, MAX_SCALE))
        return ActivationQuantizer(scale, self.zero_point, self.bits)


class PactInput(InputQuantizer):
    """PACT: a learned clip of non-negative values, codes of ``|alpha| / (2**bits - 1)``.

    Args:
        bits: 1 to 8.
        alpha: where the clip starts.
        calibrated: inside the range alpha gets the gradient ``q - x / alpha`` (CG-PACT) and not
            the classic zero; beyond it 1 either way.
    """

    def __init__(self, bits: int, alpha: float, calibrated: bool = True) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise UsageError(f"activations have 1 to 8 bits, not {bits}")
        self.bits, self.calibrated = bits, calibrated
        self.alpha = nn.Parameter(torch.tensor([float(alpha)]))

    def forward(self, x: Tensor) -> Tensor:
        top = float(2**self.bits - 1)
        alpha = self.alpha.abs()
        step = (alpha / top).detach()
        rounded = (x.detach() / step).round().clamp(0, top) * step
        if self.calibrated:
            through = straight_through((x / alpha).clamp(0, 1), rounded / alpha.detach())
            return straight_through(through * alpha, rounded)
        return straight_through(torch.minimum(x.clamp_min(0), alpha), rounded)

    def rule(self) -> ActivationQuantizer:
        alpha = np.float32(abs(float(self.alpha.detach())))
        scale = float(np.clip(alpha / np.float32(2**self.bits - 1), MIN_SCALE, MAX_SCALE))
        return ActivationQuantizer(scale, 0, self.bits)
