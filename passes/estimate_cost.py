"""estimate-cost: BitOPs and size of a model under a plan, exact."""

from dataclasses import dataclass

from mpqc.graph import Graph, Precision
from mpqc.passes.find_layers import Layer, find_integer_layers, find_layers
from mpqc.plan import Plan

FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer.

    Attributes:
        bitops: multiply-accumulates times weight bits times activation bits.
        weight_bits: bits of all its weights.
        scale_bytes: float32, one a channel; 0 while the layer computes in float.
        bias_bytes: float32, one a channel.
    """

    bitops: int
    weight_bits: int
    scale_bytes: int
    bias_bytes: int


@dataclass(frozen=True)
class Cost:
    """Costs by layer, and their sums. A layer outside the plan counts 32 x 32 bits."""

    layers: dict[str, LayerCost]

    @property
    def bitops(self) -> int:
        return sum(layer.bitops for layer in self.layers.values())

    @property
    def size(self) -> float:
        """Weights in bytes; scales and biases apart."""
        return sum(layer.weight_bits for layer in self.layers.values()) / 8

    @property
    def scale_bytes(self) -> int:
        return sum(layer.scale_bytes for layer in self.layers.values())

    @property
    def bias_bytes(self) -> int:
        return sum(layer.bias_bytes for layer in self.layers.values())


def estimate_cost(graph: Graph, plan: Plan | None) -> Cost:
    """Cost of the quantizable layers of ``graph``; without a plan, that of the float model.

    Layers that compute on codes already count at their own widths.
    """
    fixed = find_integer_layers(graph)
    costs = {layer.name: layer_cost(layer, precision) for layer, precision in fixed.items()}
    costs |= {layer.name: _planned(layer, plan) for layer in find_layers(graph)}
    return Cost({node.name: costs[node.name] for node in graph if node.name in costs})


def layer_cost(layer: Layer, precision: Precision) -> LayerCost:
    """Cost of one layer at one precision: the entries of a search's cost table."""
    return LayerCost(
        bitops=layer.macs * precision.weight * precision.activation,
        weight_bits=layer.weights * precision.weight,
        scale_bytes=4 * layer.channels_out,
        bias_bytes=4 * layer.biases,
    )


def _planned(layer: Layer, plan: Plan | None) -> LayerCost:
    planned = plan.layers.get(layer.name) if plan else None
    if planned is None:
        bits = FLOAT_BITS
        return LayerCost(layer.macs * bits * bits, layer.weights * bits, 0, 4 * layer.biases)
    channels = planned.channel_bits(layer.channels_out)
    total = sum(channels)  # exact: every channel has as many weights and MACs as the next
    return LayerCost(
        bitops=layer.macs // layer.channels_out * total * planned.activation_bits,
        weight_bits=layer.weights // layer.channels_out * total,
        scale_bytes=4 * layer.channels_out,
        bias_bytes=4 * layer.biases,
    )
