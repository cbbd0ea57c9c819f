import numpy as np
import pytest

from mpqc.graph import Graph
from mpqc.passes.find_layers import (
    bias_vector,
    find_float_layers,
    find_layers,
    first_layers,
    last_layers,
    tied_groups,
    weight_matrix,
)

NET = Graph.parse(
    """
    %x = Input() : f32[1,4,9,9]
    %w1 = Constant() : f32[8,4,3,3]
    %b1 = Constant() : f32[8]
    %w2 = Constant() : f32[8,1,3,3]
    %w3 = Constant() : f32[8,8,1,1]
    %wf = Constant() : f32[5,8]
    %bf = Constant() : f32[5]
    %c1 = Conv(%x, %w1, %b1) {pads=[1,1,1,1], strides=[2,2]} : f32[1,8,5,5]
    %r1 = Relu(%c1) : f32[1,8,5,5]
    %c2 = Conv(%r1, %w2) {group=8, pads=[1,1,1,1]} : f32[1,8,5,5]
    %c3 = Conv(%r1, %w3) : f32[1,8,5,5]
    %s = Add(%c2, %c3) : f32[1,8,5,5]
    %p = GlobalAveragePool(%s) : f32[1,8,1,1]
    %f = Flatten(%p) : f32[1,8]
    %y = Gemm(%f, %wf, %bf) {transB=1} : f32[1,5] @fc
    return %y
    """
)


def test_counts_macs_and_weights() -> None:
    layers = {layer.name: layer for layer in find_layers(NET)}

    assert list(layers) == ["c1", "c2", "c3", "fc"]
    assert layers["c1"].macs == 8 * 5 * 5 * 4 * 3 * 3
    assert layers["c2"].macs == 8 * 5 * 5 * 3 * 3
    assert (layers["c2"].groups, layers["c2"].channels_in, layers["c2"].channels_out) == (8, 8, 8)
    assert (layers["c1"].kernel, layers["c1"].stride, layers["c1"].biases) == ((3, 3), (2, 2), 8)
    assert (layers["fc"].macs, layers["fc"].weights, layers["fc"].channels_in) == (40, 40, 8)


def test_layers_with_one_input_are_tied() -> None:
    assert tied_groups(find_layers(NET)) == (("c1",), ("c2", "c3"), ("fc",))


def test_ends_are_the_layers_that_no_layer_feeds_or_that_feed_none() -> None:
    assert first_layers(NET) == ("c1",)
    assert last_layers(NET) == ("fc",)


def test_every_head_of_a_detector_is_a_last_layer() -> None:
    heads = Graph.parse(
        """
        %x = Input() : f32[1,4]
        %w = Constant() : f32[4,4]
        %a = MatMul(%x, %w) : f32[1,4]
        %b = Relu(%a) : f32[1,4]
        %h1 = MatMul(%b, %w) : f32[1,4]
        %h2 = MatMul(%b, %w) : f32[1,4]
        %o = Concat(%h1, %h2) {axis=1} : f32[1,8]
        return %o, %b
        """
    )
    assert first_layers(heads) == ("a",)
    assert last_layers(heads) == ("h1", "h2")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("%y = MatMul(%x, %z) : f32[2,2]", "an input of the model"),
        ("%y = MatMul(%w, %x) : f32[2,2]", "on the left"),
        ("%y = MatMul(%x, %w3) : f32[3,2,2]", "3 dimensions"),
        ("%y = MatMul(%x, %nan) : f32[2,2]", "NaN"),
        ("%y = MatMul(%d, %wd) : f64[2,2]", "float64"),
        ("%y = Gemm(%x, %w) {transA=1} : f32[2,2]", "transA"),
        ("%y = Gemm(%x, %w, %z) : f32[2,2]", "bias is computed"),
        ("%y = Gemm(%x, %w, %w) : f32[2,2]", "not one value a channel"),
        ("%y = ConvTranspose(%i, %k) : f32[1,1,4,4]", "no integer kernel"),
    ],
)
def test_says_why_a_product_stays_float(line: str, reason: str) -> None:
    graph = Graph.parse(
        f"""
        %x = Input() : f32[2,2]
        %z = Input() : f32[2,2]
        %d = Input() : f64[2,2]
        %i = Input() : f32[1,1,2,2]
        %w = Constant() : f32[2,2]
        %w3 = Constant() : f32[3,2,2]
        %wd = Constant() : f64[2,2]
        %nan = Constant() : f32[2,2]
        %k = Constant() : f32[1,1,3,3]
        {line}
        return %y
        """,
        {"nan": np.full((2, 2), np.nan, np.float32)},
    )
    assert find_layers(graph) == ()
    (layer,) = find_float_layers(graph)
    assert layer.name == "y"
    assert reason in layer.reason


def test_gemm_is_read_as_a_plain_product() -> None:
    graph = Graph.parse(
        """
        %x = Input() : f32[1,2]
        %w = Constant() {value=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]} : f32[3,2]
        %c = Constant() {value=[8.0]} : f32[1]
        %y = Gemm(%x, %w, %c) {alpha=2.0, beta=0.5, transB=1} : f32[1,3]
        return %y
        """
    )
    np.testing.assert_array_equal(weight_matrix(graph, graph["y"]), [[2, 6, 10], [4, 8, 12]])
    np.testing.assert_array_equal(bias_vector(graph, graph["y"]), [4, 4, 4])
