import numpy as np
import pytest

from mpqc import reference
from mpqc.graph import Array, Graph
from mpqc.passes.find_layers import find_layers
from mpqc.patches import Geometry

CONVOLUTIONS = [
    "%x = Input() : f32[2,4,7,6]\n%w = Constant() : f32[3,4,3,3]\n"
    "%y = Conv(%x, %w) {pads=[1,0,2,1], strides=[2,1]} : f32[2,3,4,5]",
    "%x = Input() : f32[1,4,8,8]\n%w = Constant() : f32[6,2,2,3]\n"
    "%y = Conv(%x, %w) {group=2, dilations=[2,1]} : f32[1,6,6,6]",
    "%x = Input() : f32[2,5,6,6]\n%w = Constant() : f32[10,1,3,3]\n"
    "%y = Conv(%x, %w) {group=5, pads=[1,1,1,1], strides=[2,2]} : f32[2,10,3,3]",
    "%x = Input() : f32[2,3,9]\n%w = Constant() : f32[4,3,3]\n"
    "%y = Conv(%x, %w) {pads=[1,1], dilations=[2]} : f32[2,4,7]",
]
PRODUCTS = [
    "%x = Input() : f32[3,5]\n%w = Constant() : f32[4,5]\n%y = Gemm(%x, %w) {transB=1} : f32[3,4]",
    "%x = Input() : f32[2,3,5]\n%w = Constant() : f32[5,4]\n%y = MatMul(%x, %w) : f32[2,3,4]",
]


def draw(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("text", CONVOLUTIONS + PRODUCTS)
def test_rows_times_weights_are_the_outputs(text: str) -> None:
    graph = Graph.parse(text + "\nreturn %y")
    (layer,) = find_layers(graph)
    geometry = Geometry.of(graph, layer)
    x = draw(*graph.shape("x"))
    y = reference.run(graph, {"x": x})["y"]
    weights = graph.constants["w"]
    if layer.op == "MatMul":
        weights = weights.T
    count = geometry.positions(x)
    at = np.random.default_rng(1).permutation(count)[: count - 1]

    rows = geometry.inputs(x, at)
    expected = geometry.outputs(y, at)

    assert count == y.size // layer.channels_out
    flat = weights.reshape(layer.groups, layer.channels_out // layer.groups, -1)
    got = (rows @ flat.swapaxes(1, 2)).swapaxes(0, 1).reshape(expected.shape)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
