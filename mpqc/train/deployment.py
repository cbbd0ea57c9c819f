"""From trained quantizers to what the compiler computes: BatchNorm folded, exact integers."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mpqc.graph import Array
from mpqc.quantizers import MAX_SCALE, MIN_SCALE, ActivationQuantizer, QuantizedWeights
from mpqc.rounding import RoundedLayer

EXACT = 2**22  # sums below it are exact in float32, in any order of summation


def deploy(layer: RoundedLayer, scale: Array, shift: Array, convolution: bool) -> RoundedLayer:
    """Fold ``scale * y + shift`` by channel into a layer, in float64, rounded once.

    Args:
        layer: weights with the output channels first.
        scale: float64 [O].
        shift: float64 [O].
        convolution: else the weights become [K, N].
    """
    wide = layer.weights.scale.astype(np.float64) * scale
    sign = np.where(wide < 0, -1.0, 1.0)
    folded = sign * np.clip(np.abs(wide), MIN_SCALE, MAX_SCALE)
    values = layer.weights.values
    values = values if convolution else np.ascontiguousarray(values.T)
    weights = replace(layer.weights, values=values, scale=folded.astype(np.float32))
    bias = layer.bias.astype(np.float64) * scale + shift
    return RoundedLayer(weights, bias.astype(np.float32), layer.rule)


@dataclass(frozen=True, eq=False)
class Deployed:
    """A layer's integer arithmetic as tensors.

    Attributes:
        weight: integers as float32, output channels first.
        m: float32 [O]: scale of input times scale of weights.
        b: float32 [O].
        step: float32 [1], of the input's codes.
        rule: of the input.
        wide: sums may reach beyond what float32 adds exactly.
    """

    weight: Tensor
    m: Tensor
    b: Tensor
    step: Tensor
    rule: ActivationQuantizer
    wide: bool

    @classmethod
    def of(cls, layer: RoundedLayer, convolution: bool, device: torch.device) -> "Deployed":
        """Of what the compiler gets."""
        weights: QuantizedWeights = layer.weights
        values = weights.values if convolution else weights.values.T
        largest = np.abs(values.astype(np.int64)).reshape(len(values), -1).sum(1).max()
        rule = layer.rule
        reach = max(rule.zero_point, rule.top - rule.zero_point)
        return cls(
            torch.from_numpy(np.array(values, np.float32, order="C")).to(device),
            torch.from_numpy(np.float32(rule.scale) * weights.scale).to(device),
            torch.from_numpy(np.array(layer.bias)).to(device),
            torch.tensor([rule.scale], dtype=torch.float32, device=device),
            rule,
            bool(largest * reach >= EXACT),
        )

    def codes(self, x: Tensor) -> Tensor:
        """Codes minus the zero point, as float32."""
        low, high = -self.rule.zero_point, self.rule.top - self.rule.zero_point
        return (x / self.step).round().clamp(low, high)
