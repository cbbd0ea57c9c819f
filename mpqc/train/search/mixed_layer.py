"""Layers at several widths at once: quantized weights and inputs mixed by shares."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from mpqc.train.fake_quant import InputQuantizer, PactInput, WeightQuantizer
from mpqc.train.module import LayerHook, Product
from mpqc.train.quantized_layer import Quantizers
from mpqc.train.search.base import Ground

Shares: TypeAlias = Callable[[], Tensor]
"""The shares of the widths as they were drawn last: float32 [widths], sum 1."""


class Strengths:
    """Logits by variable, and the shares drawn from them.

    Args:
        sizes: variable -> its candidates.
        device: of the logits.
        start: all of them.

    Attributes:
        logits: variable -> parameter [candidates].
        shares: variable -> softmax of the logits, or a Gumbel-softmax sample of it.
    """

    def __init__(self, sizes: Mapping[str, int], device: torch.device, start: float = 0.01) -> None:
        self.logits = {
            name: nn.Parameter(torch.full((size,), start, device=device))
            for name, size in sizes.items()
        }
        self.shares: dict[str, Tensor] = {}
        self.draw()

    def draw(self, temperature: float = 1.0, noisy: bool = False, hard: bool = False) -> None:
        """New shares: softmax((logits + g) / temperature).

        Args:
            temperature: of the softmax.
            noisy: g is Gumbel noise of torch's CPU generator; else 0.
            hard: one-hot forward, soft backward.
        """
        self.shares = {
            name: gumbel_softmax(logits, temperature, noisy, hard)
            for name, logits in self.logits.items()
        }

    def find(self, name: str) -> Shares:
        """The shares of a variable, whenever they are asked for."""
        return lambda: self.shares[name]

    def set(self, choice: Mapping[str, int]) -> None:
        """One-hot shares: the given candidate of each variable."""
        for name, logits in self.logits.items():
            one = torch.zeros_like(logits.detach())
            one[choice[name]] = 1.0
            self.shares[name] = one

    def log(self, name: str) -> list[float]:
        """Log probabilities."""
        found: list[float] = self.logits[name].detach().double().log_softmax(0).tolist()
        return found

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.logits.values())


def gumbel_softmax(
    logits: Tensor, temperature: float = 1.0, noisy: bool = True, hard: bool = False
) -> Tensor:
    """``softmax((logits + g) / temperature)`` over the last axis; g = -log(-log U) or 0."""
    total = logits
    if noisy:
        uniform = torch.rand(logits.shape).clamp(1e-10, 1 - 1e-7)
        total = logits - (-uniform.log()).log().to(logits.device)
    soft = (total / temperature).softmax(-1)
    if not hard:
        return soft
    one = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return one + soft - soft.detach()


class MixedInput(nn.Module):
    """``sum of p_j Q_j(x)`` over activation widths.

    Args:
        quantizers: one a width.
        shares: of them.
    """

    def __init__(self, quantizers: Sequence[InputQuantizer], shares: Shares) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)
        self.shares = shares

    def forward(self, x: Tensor) -> Tensor:
        return mixed([q(x) for q in self.quantizers], self.shares())


class MixedLayer(LayerHook):
    """One convolution of mixed weights and mixed inputs: one set of weights, all widths.

    Args:
        weights: quantizers, one a width.
        shares: of them.
        data: of the input; layers that read one value share it.
    """

    def __init__(self, weights: Sequence[WeightQuantizer], shares: Shares, data: MixedInput):
        super().__init__()
        self.weights = nn.ModuleList(weights)
        self.shares = shares
        self.data = data

    def forward(self, product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(self.data(x), mixed([q(weight) for q in self.weights], self.shares()), bias)


def mixed(values: Sequence[Tensor], shares: Tensor) -> Tensor:
    """``sum of p_i v_i``; exactly v_i where p is one-hot."""
    total = values[0] * shares[0]
    for value, share in zip(values[1:], shares[1:], strict=True):
        total = total + value * share
    return total


def input_quantizers(
    ground: Ground, value: str, widths: Sequence[int], quantizers: Quantizers, shared: bool = False
) -> list[InputQuantizer]:
    """Quantizers of a value, each calibrated for its width.

    Args:
        ground: has the calibration.
        value: that layers read.
        widths: of the codes.
        quantizers: kinds.
        shared: one alpha for all widths (of ``pact``), which starts at the widest's.
    """
    shape = ground.module.graph.shape(value)
    count = 1
    for size in shape[1:]:
        count *= size
    made = [
        quantizers.data(ground.calibration.quantizer(value, bits, "mse"), count) for bits in widths
    ]
    clips = [q for q in made if isinstance(q, PactInput)]
    for quantizer in clips if shared else []:
        quantizer.alpha = clips[-1].alpha
    return made
