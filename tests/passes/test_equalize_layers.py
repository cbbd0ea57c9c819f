import numpy as np
import pytest

from mpqc import reference
from mpqc.graph import Array, Graph
from mpqc.passes.equalize_layers import EqualizeLayers

PRODUCTS = """
    %x = Input() : f32[1,2]
    %w = Constant() {value=[16.0, 0.0, 0.0, 1.0]} : f32[2,2]
    %b = Constant() {value=[4.0, 1.0]} : f32[2]
    %v = Constant() {value=[1.0, 16.0]} : f32[2,1]
    %y = Gemm(%x, %w, %b) : f32[1,2] @first
    %r = Relu(%y) : f32[1,2]
    %z = MatMul(%r, %v) : f32[1,1] @second
    return %z
"""


def test_both_layers_use_each_channel_alike() -> None:
    after = EqualizeLayers(everywhere=True)(Graph.parse(PRODUCTS))
    assert str(after).splitlines() == [
        "%x = Input() : f32[1,2]",
        "%first.weight = Constant() {value=[4.0, 0.0, 0.0, 4.0]} : f32[2,2]",
        "%first.bias = Constant() {value=[1.0, 4.0]} : f32[2]",
        "%second.weight = Constant() {value=[4.0, 4.0]} : f32[2,1]",
        "%y = Gemm(%x, %first.weight, %first.bias) : f32[1,2] @first",
        "%r = Relu(%y) : f32[1,2]",
        "%z = MatMul(%r, %second.weight) : f32[1,1] @second",
        "return %z",
    ]


CONVOLUTIONS = """
    %x = Input() : f32[2,4,6,6]
    %w = Constant() : f32[8,2,3,3]
    %b = Constant() : f32[8]
    %d = Constant() : f32[8,1,3,3]
    %p = Constant() : f32[5,8,1,1]
    %q = Constant() : f32[6,4,3,3]
    %c = Conv(%x, %w, %b) {group=2, pads=[1,1,1,1]} : f32[2,8,6,6] @first
    %r = Relu(%c) : f32[2,8,6,6]
    %e = Conv(%r, %d) {group=8, pads=[1,1,1,1]} : f32[2,8,6,6] @depthwise
    %s = LeakyRelu(%e) {alpha=0.1} : f32[2,8,6,6]
    %m = MaxPool(%s) {kernel_shape=[2,2], strides=[2,2]} : f32[2,8,3,3]
    %f = Conv(%m, %p) : f32[2,5,3,3] @pointwise
    %g = Conv(%m, %q) {group=2, pads=[1,1,1,1]} : f32[2,6,3,3] @grouped
    return %f, %g
"""


def uneven() -> Graph:
    """Channels whose weights differ by orders of magnitude, one of them dead."""
    graph = Graph.parse(CONVOLUTIONS)
    rng = np.random.default_rng(0)
    uneven: dict[str, Array] = {
        name: graph.constants[name]
        * np.exp(rng.normal(0, 2, (8, *[1] * (graph.constants[name].ndim - 1)))).astype(np.float32)
        for name in ("w", "d")
    }
    uneven["w"][3] = 0
    return graph.with_(constants=uneven)


@pytest.mark.parametrize("everywhere", [False, True])
def test_no_bit_of_the_outputs_changes(everywhere: bool) -> None:
    graph = uneven()
    after = EqualizeLayers(everywhere)(graph)
    x = np.random.default_rng(1).standard_normal(graph.shape("x")).astype(np.float32)
    want, got = (reference.run(g, {"x": x}) for g in (graph, after))
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)
    assert [node.name for node in after] == [node.name for node in graph]


def test_channels_come_to_have_one_range() -> None:
    graph = uneven()
    after = EqualizeLayers()(graph)

    def spread(g: Graph) -> float:
        reach = np.abs(g.constants[g["first"].inputs[1]]).reshape(8, -1).max(1)
        own = np.abs(g.constants[g["depthwise"].inputs[1]]).reshape(8, -1).max(1)
        ratio = np.log2(reach[reach > 0] / own[reach > 0])
        return float(ratio.max() - ratio.min())

    assert spread(graph) > 5
    assert spread(after) <= 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Relu(%y)", "Clip(%y)"),
        ("Relu(%y)", "Sigmoid(%y)"),
        ("return %z", "return %z, %r"),
        ("return %z", "%t = Exp(%r) : f32[1,2]\nreturn %z, %t"),
    ],
)
def test_what_does_not_scale_stays(old: str, new: str) -> None:
    graph = Graph.parse(PRODUCTS.replace(old, new))
    assert str(EqualizeLayers(everywhere=True)(graph)) == str(graph)


def test_layers_without_a_depthwise_neighbour_stay_unless_asked() -> None:
    graph = Graph.parse(PRODUCTS)
    assert str(EqualizeLayers()(graph)) == str(graph)


def test_constants_that_others_share_stay_theirs() -> None:
    text = PRODUCTS.replace("return %z", "%u = Gemm(%x, %w, %b) : f32[1,2] @third\nreturn %z, %u")
    graph = Graph.parse(text)
    after = EqualizeLayers(everywhere=True)(graph)
    assert after["third"].inputs == ("x", "w", "b")
    x = np.array([[0.3, -0.7]], np.float32)
    want, got = (reference.run(g, {"x": x}) for g in (graph, after))
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)
