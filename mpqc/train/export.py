"""A trained network as a file: ONNX with its quantizers, in standard operators."""

import numpy as np

from mpqc.calibration import Calibration
from mpqc.graph import Graph
from mpqc.onnx_quantized import to_dialect
from mpqc.passes.drop_dead import DropDead
from mpqc.passes.fake_quantize_layers import FakeQuantizeLayers
from mpqc.plan import Plan
from mpqc.train.module import GraphModule
from mpqc.train.quantized_layer import folded


def fake_quantized(module: GraphModule, plan: Plan, graph: Graph | None = None) -> Graph:
    """The trained float operators between the trained quantizers, BatchNorm folded.

    Args:
        module: trained, with quantizers for all layers and tensors of the plan.
        plan: that it was trained for.
        graph: the same model at another batch; by default the module's own.
    """
    quantize = FakeQuantizeLayers(
        plan, Calibration({}, 0), rounded=module.rounded(), rules=module.rules()
    )
    return DropDead()(quantize(folded(module.to_graph(graph))))


def to_qcdq(module: GraphModule, plan: Plan, graph: Graph | None = None) -> bytes:
    """The same as an ONNX model: QDQ in 8-bit types, with Clips that tell narrower widths."""
    return to_dialect(fake_quantized(module, plan, graph), "qcdq")


def batch_is_open(one: Graph, two: Graph) -> bool:
    """Whether the same nodes and constants serve any batch: the graph at two batch sizes."""
    if one.constants.keys() != two.constants.keys() or len(one) != len(two):
        return False
    same = all(np.array_equal(array, two.constants[name]) for name, array in one.constants.items())
    return same and all(
        a.op == b.op and a.inputs == b.inputs and str(dict(a.attrs)) == str(dict(b.attrs))
        for a, b in zip(one, two, strict=True)
    )
