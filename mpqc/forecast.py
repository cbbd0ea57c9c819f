"""What the kernel selection expects of a layer before anything is compiled."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mpqc.graph import Graph, Node, Precision, TensorType
from mpqc.passes.find_layers import Layer, find_layers
from mpqc.select_kernel import Selector, count_weights


@dataclass(frozen=True)
class Expectation:
    """What is expected of one layer at one precision.

    Attributes:
        kernel: that would be chosen.
        gain: how many times faster than the int8 kernel, by the model of the instructions.
        rate: multiply-accumulates a cycle, by the same model.
        chosen: what the choice rests on: "asked", "measured" or "model".
    """

    kernel: str
    gain: float
    rate: float
    chosen: str


def expect(graph: Graph, layer: Layer, widths: Precision, selector: Selector) -> Expectation:
    """The kernel of one layer.

    Args:
        graph: channels first.
        layer: of the graph, float or on codes already.
        widths: of the layer.
        selector: of a target, with the latencies that are known of it.
    """
    lone = _lone_layer(graph, graph[layer.name], widths)
    of_all = replace(selector, weights=count_weights(graph))
    choice = of_all.choose(lone, lone[layer.name])
    rate = choice.rates[choice.kind]
    return Expectation(choice.kind, rate / choice.rates["int8"], rate, choice.chosen)


def expect_plan(
    graph: Graph, widths: Mapping[str, Precision], selector: Selector
) -> dict[str, Expectation]:
    """The kernels of the layers that ``widths`` names."""
    return {
        layer.name: expect(graph, layer, widths[layer.name], selector)
        for layer in find_layers(graph)
        if layer.name in widths
    }


def total_gain(expected: Mapping[Layer, Expectation]) -> float:
    """How many times faster than on int8 kernels layers are together."""
    own = sum(layer.macs / found.rate for layer, found in expected.items())
    int8 = sum(layer.macs / found.rate * found.gain for layer, found in expected.items())
    return int8 / own if own else 1.0


def _lone_layer(graph: Graph, node: Node, widths: Precision) -> Graph:
    """The layer as the kernel selector sees it: quantized, channels last, alone.

    Only shapes and the largest weight matter, so that all weights are that one.
    """
    weight = graph.constants[node.inputs[1]]
    shape, out = graph.shape(node.inputs[0]), graph.shape(node.output)
    attrs = {
        **node.attrs,
        "zero_point": node.attrs.get("zero_point", 0),
        "weight_bits": widths.weight,
        "activation_bits": widths.activation,
        "weight_levels": "odd" if widths.weight == 1 else "signed",
    }
    if node.op in ("Conv", "IntConv"):
        op, stored = "IntConv", weight.shape
        shape, out = (shape[0], *shape[2:], shape[1]), (out[0], *out[2:], out[1])
    else:
        op = "IntMatMul"
        stored = (shape[-1], out[-1])
    largest = max(1, 2 ** (widths.weight - 1) - 1)
    return Graph(
        {"codes": TensorType("uint8", shape)},
        ["sums"],
        [Node(node.name, op, ("codes", "weights"), ("sums",), attrs)],
        {"weights": np.broadcast_to(np.int16(largest), stored)},
        {"sums": TensorType("int32", out)},
    )
