"""fake-quantize-layers: the planned layers stay float operators, between their quantizers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mpqc.graph import Attribute, Graph, Node
from mpqc.passes.base import fresh
from mpqc.passes.find_layers import Layer
from mpqc.passes.quantize_layers import LayerWriter, QuantizeLayers
from mpqc.rounding import RoundedLayer


@dataclass(frozen=True)
class FakeQuantizeLayers(QuantizeLayers):
    """Before: float. After: what other tools call a fake-quantized model.

        %y = Conv(%x, %w, %b)
        =>
        %x.q4 = Quantize(%x)
        %x.d4 = Dequantize(%x.q4)
        %y.w = DequantizeWeights(%y.codes, %y.scale)
        %y = Conv(%x.d4, %y.w, %y.b)

    The numbers are those of ``QuantizeLayers``: reading the quantizers of the result gives the
    same integer layers. A MatMul gets its bias by an Add behind it.
    """

    name = "fake-quantize-layers"

    def writer(self, graph: Graph) -> LayerWriter:
        return _FakeWriter(graph)


class _FakeWriter(LayerWriter):
    def layer(
        self, node: Node, layer: Layer, made: RoundedLayer, narrowed: Mapping[str, str]
    ) -> None:
        rule, weights = made.rule, made.weights
        values, scale, told, bias = (
            fresh(self.source, f"{node.name}.{suffix}") for suffix in ("codes", "scale", "w", "b")
        )
        data = self.narrow(self.data(layer, rule, narrowed), rule)
        self.constants |= {
            values: weights.values,
            scale: weights.scale,
            bias: np.array(made.bias, np.float32),
        }
        axis = 0 if node.op == "Conv" else 1
        attrs: dict[str, Attribute] = {
            "axis": axis, "bits": weights.bits, "levels": weights.levels
        }  # fmt: skip
        self.nodes.append(Node(told, "DequantizeWeights", (values, scale), (told,), attrs))
        self.types[told] = replace(self.type(layer.weight), shape=weights.values.shape)
        if node.op == "MatMul":
            product = fresh(self.source, f"{layer.output}.product")
            self.types[product] = self.type(layer.output)
            self.nodes += [
                replace(node, inputs=(data, told), outputs=(product,)),
                Node(fresh(self.source, f"{node.name}.bias"), "Add", (product, bias),
                     (layer.output,)),
            ]  # fmt: skip
            return
        kept = dict(node.attrs) if node.op == "Conv" else {}  # of Gemm all is in the weights
        self.nodes.append(replace(node, inputs=(data, told, bias), attrs=kept))
