"""Layers that compute on codes: quantizers attached to the interpreter, from a plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from mpqc.calibration import Calibration
from mpqc.errors import UsageError
from mpqc.graph import Graph
from mpqc.histogram import Method
from mpqc.passes.drop_dead import DropDead
from mpqc.passes.fold_batch_norm import FoldBatchNorm, affine_chain, batch_norm_affine
from mpqc.plan import Plan
from mpqc.quantizers import ActivationQuantizer
from mpqc.rounding import RoundedLayer
from mpqc.train.fake_quant import (
    DoReFaWeights,
    InputQuantizer,
    LsqInput,
    LsqWeights,
    PactInput,
    WeightQuantizer,
)
from mpqc.train.module import GraphModule, LayerHook, Product

WeightScheme: TypeAlias = Literal["lsq", "lsq-odd", "dorefa", "dorefa-modified", "dorefa-centered"]
InputScheme: TypeAlias = Literal["lsq", "pact"]
INSIDE = 0.25  # steps between a weight and its code where training starts, at most


class QuantizedLayer(LayerHook):
    """A layer whose weights and input are quantized.

    Args:
        weight: quantizer of the weights.
        data: of the input; layers that read one value share it.

    Attributes:
        offset: float32 [O] added to the bias, where the network has no place for one.
    """

    plain = True

    def __init__(self, weight: WeightQuantizer, data: InputQuantizer) -> None:
        super().__init__()
        self.weight = weight
        self.data = data
        self.offset: nn.Parameter | None = None

    def forward(self, product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(self.data(x), self.weight(weight), self._bias(bias))

    def rounded(self, weight: Tensor, bias: Tensor | None) -> RoundedLayer:
        total = self._bias(bias)
        numbers = np.zeros(len(weight), np.float32) if total is None else total.cpu().numpy()
        return RoundedLayer(self.weight.integers(weight), numbers, self.data.rule())

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        if self.offset is None:
            return bias
        return self.offset if bias is None else bias + self.offset


@dataclass(frozen=True)
class Quantizers:
    """Which quantizers train.

    Attributes:
        weights: ``lsq`` two's complement with a learned step a channel; ``lsq-odd`` symmetric
            levels without zero; DoReFa's three forms. One bit is +-1 in all of them, eight bits
            are two's complement.
        inputs: ``lsq`` learns a step, ``pact`` a clip of non-negative values; values of both
            signs always take ``lsq``.
    """

    weights: WeightScheme = "lsq"
    inputs: InputScheme = "lsq"

    def __post_init__(self) -> None:
        if self.weights not in ("lsq", "lsq-odd", "dorefa", "dorefa-modified", "dorefa-centered"):
            raise UsageError(f"no weight quantizer {self.weights!r}")
        if self.inputs not in ("lsq", "pact"):
            raise UsageError(f"no input quantizer {self.inputs!r}")

    @property
    def compensated(self) -> bool:
        """Whether weights can start as rounding with compensation leaves them."""
        return self.weights == "lsq"

    def weight(self, weight: Tensor, bits: int | tuple[int, ...]) -> WeightQuantizer:
        """A fresh quantizer for float weights, output channels first."""
        if self.weights.startswith("dorefa"):
            if not isinstance(bits, int) and len(set(bits)) > 1:
                raise UsageError("DoReFa's quantizer has one width a layer: take lsq")
            width = bits if isinstance(bits, int) else bits[0]
            if width == 8:  # what 8-bit types hold
                return LsqWeights.fitted(weight, 8)
            _, _, scheme = self.weights.partition("-")
            return DoReFaWeights(width, weight, scheme or "original")  # type: ignore[arg-type]
        same = isinstance(bits, int) or len(set(bits)) == 1
        odd = self.weights == "lsq-odd" and same and np.max(bits) < 8
        return LsqWeights.fitted(weight, bits, odd)

    def data(self, rule: ActivationQuantizer, values: int = 1) -> InputQuantizer:
        """A fresh quantizer that starts with a rule."""
        if self.inputs == "pact" and rule.zero_point == 0:
            return PactInput(rule.bits, rule.scale * rule.top)
        return LsqInput(rule, values)


def folded(graph: Graph) -> Graph:
    """The float graph that the compiler quantizes, of a graph for training."""
    return DropDead()(FoldBatchNorm()(graph))


def quantize_module(
    module: GraphModule,
    plan: Plan,
    calibration: Calibration,
    rounded: Mapping[str, RoundedLayer] | None = None,
    quantizers: Quantizers = Quantizers(),
    method: Method = "mse",
) -> None:
    """Give every planned layer its quantizers.

    Args:
        module: gets the hooks; BatchNormalization behind planned layers keeps a positive scale.
        plan: widths.
        calibration: of the values that ``tensors_to_calibrate`` names.
        rounded: what ``round_layers`` found for the folded graph: with ``lsq`` the module then
            starts exactly where training-free quantization ends.
        quantizers: kinds.
        method: how ranges follow from histograms, where ``rounded`` has none.
    """
    plan.check(folded(module.graph), None)
    made = rounded or {}
    for name in plan.layers:
        module.make_positive(name)
    for value, tensor in plan.tensors.items():
        rule = calibration.quantizer(value, tensor.bits, method)
        module.tensors.put(value, quantizers.data(rule, _values(module, value)))
    data: dict[str, InputQuantizer] = {}
    graph = module.to_graph()
    for name, planned in plan.layers.items():
        value = module.layers[name].input
        start = made.get(name)
        if value not in data:
            shared = module.tensors.find(value)
            if shared is not None and shared.bits == planned.activation_bits:
                data[value] = shared
            else:
                rule = start.rule if start else calibration.quantizer(
                    value, planned.activation_bits, method
                )  # fmt: skip
                data[value] = quantizers.data(rule, _values(module, value))
        weight = module.weight(name).detach()
        if start is not None and quantizers.compensated:
            quantizer: WeightQuantizer = _resume(module, graph, name, planned.weight_bits, start)
        else:
            quantizer = quantizers.weight(weight, planned.weight_bits)
        hook = QuantizedLayer(quantizer, data[value])
        if start is not None and quantizers.compensated:
            _start_bias(module, graph, name, hook, start)
        module.hooks.put(name, hook)


def _values(module: GraphModule, value: str) -> int:
    """Elements of one sample."""
    shape = module.graph.shape(value)
    return int(np.prod(shape[1:], dtype=np.int64)) if shape else 1


def _resume(
    module: GraphModule, graph: Graph, name: str, bits: int | tuple[int, ...], start: RoundedLayer
) -> LsqWeights:
    """Steps, weights and bias with which the layer computes what ``start`` says.

    Weights move no further than into the middle half of the cells of their codes: a weight on
    the border would lose what compensation chose with the first small step.
    """
    _, scale, _ = affine_chain(graph, graph[name])
    convolution = module.layers[name].op == "Conv"
    integers = start.weights.values if convolution else start.weights.values.T
    live = np.abs(scale) > 1e-12
    step = start.weights.scale.astype(np.float64) / np.where(live, np.abs(scale), 1.0)
    weight = module.weight(name).detach()
    quantizer = LsqWeights(bits, step.astype(np.float32), weight.shape)
    quantizer.to(weight.device)
    with torch.no_grad():
        signs = torch.from_numpy(np.where(scale < 0, -1.0, 1.0).astype(np.float32))
        shape = (-1, *[1] * (weight.dim() - 1))
        codes = torch.from_numpy(np.array(integers, np.float32, order="C")) * signs.reshape(shape)
        codes = codes.to(weight.device)
        levels, steps = quantizer.levels, quantizer.step
        odd = (
            levels.odd if levels.odd is not None else torch.zeros_like(levels.low, dtype=torch.bool)
        )
        reach = torch.where(odd, 2 * INSIDE, INSIDE)
        low = torch.where(codes <= levels.low, -torch.inf, codes - reach)
        high = torch.where(codes >= levels.high, torch.inf, codes + reach)
        moved = torch.minimum(torch.maximum(weight / steps, low), high) * steps
        _write_rows(module, name, moved)
    return quantizer


def _write_rows(module: GraphModule, name: str, rows: Tensor) -> None:
    """Set the weights of a layer, output channels first."""
    node = module.graph[name]
    raw = module.raw(node.inputs[1])
    if node.op == "Conv":
        raw.copy_(rows)
        return
    alpha = float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0  # type: ignore[arg-type]
    transposed = node.op == "Gemm" and node.int_attr("transB", 0)
    raw.copy_((rows if transposed else rows.T) / alpha)


def _start_bias(
    module: GraphModule, graph: Graph, name: str, hook: QuantizedLayer, start: RoundedLayer
) -> None:
    """Let the layer, with what it absorbs, have the bias of ``start``."""
    chain, scale, shift = affine_chain(graph, graph[name])
    bias = module.bias(name)
    own = np.zeros(len(scale)) if bias is None else bias.detach().cpu().numpy().astype(np.float64)
    missing = start.bias.astype(np.float64) - (own * scale + shift)
    norm = chain[0] if chain and chain[0].op == "BatchNormalization" else None
    if norm is not None and len(graph.consumers(norm.inputs[2])) == 1:
        found = batch_norm_affine(graph, norm)
        assert found is not None
        behind = np.divide(scale, found[0], out=np.ones_like(scale), where=found[0] != 0)
        target, change = module.raw(norm.inputs[2]), missing / np.where(behind, behind, 1.0)
    else:
        hook.offset = nn.Parameter(torch.zeros(len(scale), device=module.weight(name).device))
        target, change = hook.offset, missing / np.where(np.abs(scale) > 1e-12, scale, 1.0)
    with torch.no_grad():
        target += torch.from_numpy(change.astype(np.float32)).to(target.device)
