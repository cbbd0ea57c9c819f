"""Layers between quantizers compute on codes, and give what the float operators would."""

import numpy as np
import pytest

from mpqc.graph import Array, Graph
from mpqc.passes.commute_quantize import CommuteQuantize
from mpqc.passes.drop_dead import DropDead
from mpqc.passes.fold_batch_norm import FoldBatchNorm
from mpqc.passes.fold_bias import FoldBias
from mpqc.passes.fuse_requantize import FuseRequantize
from mpqc.passes.integer_layers import FloatLayer, integer_layers, widths
from mpqc.reference import run

RNG = np.random.default_rng(0)


def integers(shape: tuple[int, ...], low: int, high: int) -> Array:
    return RNG.integers(low, high + 1, shape).astype(np.int16)


def parse(text: str, **constants: Array) -> Graph:
    return Graph.parse(text, constants)


def on_codes(graph: Graph) -> Graph:
    made, floats = integer_layers(graph)
    assert floats == ()
    assert not [node for node in made if node.op in ("Conv", "Gemm", "MatMul")]
    return made


def assert_same(graph: Graph, made: Graph, **feeds: Array) -> None:
    wanted, found = run(graph, feeds), run(made, feeds)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=2e-5, atol=2e-5)


CONV = """
    %x = Input() : f32[1,4,5,5]
    %w = Constant() : i16[6,4,3,3]
    %s = Constant() {{value=[0.5, 0.25, 1.0, 2.0, 0.125, 0.5]}} : f32[6]
    %b = Constant() {{value=[1.0, -1.0, 0.0, 2.0, 0.5, 0.25]}} : f32[6]
    %c = Quantize(%x) {{scale=0.25, zero_point=3, bits=4}} : u8[1,4,5,5]
    %d = Dequantize(%c) {{scale=0.25, zero_point=3}} : f32[1,4,5,5]
    %v = DequantizeWeights(%w, %s) {{axis=0, bits=3, levels="signed"}} : f32[6,4,3,3]
    %y = Conv(%d, %v, %b) {{pads=[1,1,1,1]}} : f32[1,6,5,5] @layer
    {behind}
    return %{out}
"""
IMAGE = RNG.normal(size=(1, 4, 5, 5)).astype(np.float32)


def conv(behind: str = "", out: str = "y", low: int = -4, high: int = 3) -> Graph:
    return parse(CONV.format(behind=behind, out=out), w=integers((6, 4, 3, 3), low, high))


def test_a_convolution() -> None:
    graph = conv()
    made = on_codes(graph)
    assert [node.op for node in made] == ["Quantize", "IntConv", "Affine"]
    assert widths(made) == {"layer": (3, 4)}
    np.testing.assert_array_equal(
        made.constants[made["layer.affine"].inputs[1]],
        np.float32(0.25) * np.array([0.5, 0.25, 1, 2, 0.125, 0.5], np.float32),
    )
    assert_same(graph, made, x=IMAGE)


def test_what_scales_and_shifts_the_channels_becomes_part_of_the_layer() -> None:
    behind = """
    %g = Constant() {value=[0.5, 1.0, 2.0, 1.0, 1.5, 1.0]} : f32[6]
    %o = Constant() {value=[0.5, 0.0, 2.0, 1.0, 1.0, 1.0]} : f32[6]
    %k = Constant() {value=[2.0]} : f32[1]
    %n = BatchNormalization(%y, %g, %o, %o, %g) {epsilon=0.00001} : f32[1,6,5,5]
    %m = Mul(%n, %k) : f32[1,6,5,5]
    """
    graph = conv(behind, "m")
    made = on_codes(graph)
    assert [node.op for node in made] == ["Quantize", "IntConv", "Affine"]
    assert_same(graph, made, x=IMAGE)


@pytest.mark.parametrize(
    ("low", "high", "bits"), [(-4, 3, 3), (0, 7, 4), (-1, 6, 4), (-2, 1, 3), (-5, -1, 4)]
)
def test_widths_hold_the_weights_whatever_their_zero_point(low: int, high: int, bits: int) -> None:
    graph = conv(low=low, high=high)
    made = on_codes(graph)
    assert widths(made)["layer"] == (bits, 4)
    assert_same(graph, made, x=IMAGE)


def test_weights_of_plus_and_minus_one_have_one_bit() -> None:
    weights = integers((6, 4, 3, 3), 0, 1) * 2 - 1
    graph = parse(CONV.format(behind="", out="y"), w=weights.astype(np.int16))
    made = on_codes(graph)
    assert made["layer"].attrs["weight_levels"] == "odd"
    assert widths(made)["layer"] == (1, 4)
    assert_same(graph, made, x=IMAGE)


@pytest.mark.parametrize(("told", "bits"), [(8, 2), (3, 2), (8, 4), (8, 7)])
def test_weights_that_are_all_odd_have_the_width_of_odd_levels(told: int, bits: int) -> None:
    """Files have no type for them: DoReFa's levels come as integers of more bits."""
    top = 2**bits - 1
    weights = integers((6, 4, 3, 3), 0, top) * 2 - top
    weights[0, 0, 0, :2] = -top, top
    text = CONV.format(behind="", out="y").replace("bits=3, levels", f"bits={told}, levels")
    graph = parse(text, w=weights.astype(np.int16))
    made = on_codes(graph)
    assert made["layer"].attrs["weight_levels"] == "odd"
    assert widths(made)["layer"] == (bits, 4)
    assert_same(graph, made, x=IMAGE)


def test_one_even_weight_makes_no_odd_levels() -> None:
    weights = integers((6, 4, 3, 3), 0, 3) * 2 - 3
    weights[1, 2, 0, 1] = 0
    made = on_codes(parse(CONV.format(behind="", out="y"), w=weights.astype(np.int16)))
    assert made["layer"].attrs["weight_levels"] == "signed"
    assert widths(made)["layer"] == (3, 4)


MOVED = """
    %x = Input() : f32[1,2,4,4]
    %w = Constant() : i16[{k},3]
    %s = Constant() {{value=[0.5]}} : f32[1]
    %c = Quantize(%x) {{scale=0.25, zero_point={zero}, bits=4}} : u8[1,2,4,4]
    %d = Dequantize(%c) {{scale=0.25, zero_point={zero}}} : f32[1,2,4,4]
    {moves}
    %v = DequantizeWeights(%w, %s) {{axis=1, bits=4, levels="signed"}} : f32[{k},3]
    %y = MatMul(%m, %v) : f32[1,3] @layer
    return %y
"""


@pytest.mark.parametrize(
    ("moves", "k", "zero"),
    [
        ("%m = Flatten(%d) {axis=1} : f32[1,32]", 32, 3),
        (
            "%p = MaxPool(%d) {kernel_shape=[2,2], strides=[2,2]} : f32[1,2,2,2]\n"
            "%m = Flatten(%p) {axis=1} : f32[1,8]",
            8,
            3,
        ),
        (
            "%t = Transpose(%d) {perm=[0,2,3,1]} : f32[1,4,4,2]\n"
            "%m = Flatten(%t) {axis=1} : f32[1,32]",
            32,
            3,
        ),
        ("%r = Relu(%d) : f32[1,2,4,4]\n%m = Flatten(%r) {axis=1} : f32[1,32]", 32, 0),
        ("%r = Relu(%d) : f32[1,2,4,4]\n%m = Flatten(%r) {axis=1} : f32[1,32]", 32, 3),
        (
            "%j = Concat(%d, %d) {axis=1} : f32[1,4,4,4]\n%m = Flatten(%j) {axis=1} : f32[1,64]",
            64,
            3,
        ),
    ],
)
def test_codes_are_followed_through_what_moves_them(moves: str, k: int, zero: int) -> None:
    graph = parse(MOVED.format(moves=moves, k=k, zero=zero), w=integers((k, 3), -8, 7))
    made = on_codes(graph)
    assert not [node for node in made if node.op == "Dequantize"]
    assert_same(graph, made, x=IMAGE.reshape(-1)[:32].reshape(1, 2, 4, 4))


SIGNS = """
    %x = Input() : f32[1,2,4,4]
    %w = Constant() : i16[3,2,3,3]
    %s = Constant() {{value=[0.5]}} : f32[1]
    %k = Constant() {{value=[-0.75]}} : f32[1]
    %c = Quantize(%x) {{scale=1e-18, zero_point=1, bits=1}} : u8[1,2,4,4]
    %d = Dequantize(%c) {{scale=1.5, zero_point=0}} : f32[1,2,4,4]
    %e = Add(%d, %k) : f32[1,2,4,4]
    %v = DequantizeWeights(%w, %s) {{axis=0, bits=1, levels="odd"}} : f32[3,2,3,3]
    %y = Conv(%e, %v) {{pads=[{pad},{pad},{pad},{pad}]}} : f32[1,3,{n},{n}] @layer
    return %y
"""


@pytest.mark.parametrize(("pad", "size", "bits"), [(0, 2, 1), (1, 4, 2)])
def test_signs_keep_one_bit_where_nothing_is_padded(pad: int, size: int, bits: int) -> None:
    weights = (integers((3, 2, 3, 3), 0, 1) * 2 - 1).astype(np.int16)
    graph = parse(SIGNS.format(pad=pad, n=size), w=weights)
    made = on_codes(graph)
    assert widths(made)["layer"] == (1, bits)
    x = RNG.normal(size=(1, 2, 4, 4)).astype(np.float32)
    x[0, 0, 0, 0] = 0  # the sign of zero is plus
    assert_same(graph, made, x=x)


def test_scales_by_channel_fit_a_depthwise_convolution_alone() -> None:
    text = """
    %x = Input() : f32[1,4,5,5]
    %w = Constant() : i16[{o},{i},3,3]
    %s = Constant() {{value=[0.5]}} : f32[1]
    %f = Constant() {{value=[0.5, 1.0, 2.0, 4.0]}} : f32[4,1,1]
    %q = Div(%x, %f) : f32[1,4,5,5]
    %c = Quantize(%q) {{scale=1.0, zero_point=3, bits=3}} : u8[1,4,5,5]
    %d = Dequantize(%c) {{scale=1.0, zero_point=3}} : f32[1,4,5,5]
    %e = Mul(%d, %f) : f32[1,4,5,5]
    %v = DequantizeWeights(%w, %s) {{axis=0, bits=4, levels="signed"}} : f32[{o},{i},3,3]
    %p = MaxPool(%e) {{kernel_shape=[3,3], pads=[1,1,1,1]}} : f32[1,4,5,5]
    %y = Conv(%{data}, %v) {{group={g}}} : f32[1,{o},3,3] @layer
    return %y
    """
    for data in ("e", "p"):
        depthwise = parse(text.format(o=8, i=1, g=4, data=data), w=integers((8, 1, 3, 3), -8, 7))
        assert_same(depthwise, on_codes(depthwise), x=4 * IMAGE)
    dense = parse(text.format(o=8, i=4, g=1, data="e"), w=integers((8, 4, 3, 3), -8, 7))
    made, floats = integer_layers(dense)
    assert [layer.node for layer in floats] == ["layer"]
    assert "scale for each channel" in floats[0].reason
    assert_same(dense, made, x=4 * IMAGE)


@pytest.mark.parametrize(
    ("data", "weights", "reason"),
    [
        ("x", "v", "input 'x' is not quantized"),
        ("d", "f", "weights are not quantized"),
        ("e", "v", "computed by Sigmoid"),
        ("d", "rows", "do not go by output channel"),
    ],
)
def test_reasons_of_layers_that_stay_float(data: str, weights: str, reason: str) -> None:
    graph = parse(
        f"""
    %x = Input() : f32[2,3]
    %w = Constant() : i16[3,4]
    %f = Constant() : f32[3,4]
    %s = Constant() {{value=[0.5]}} : f32[1]
    %r = Constant() {{value=[0.5, 0.25, 1.0]}} : f32[3]
    %c = Quantize(%x) {{scale=0.25, zero_point=3, bits=4}} : u8[2,3]
    %d = Dequantize(%c) {{scale=0.25, zero_point=3}} : f32[2,3]
    %e = Sigmoid(%d) : f32[2,3]
    %v = DequantizeWeights(%w, %s) {{axis=1, bits=4, levels="signed"}} : f32[3,4]
    %rows = DequantizeWeights(%w, %r) {{axis=0, bits=4, levels="signed"}} : f32[3,4]
    %y = MatMul(%{data}, %{weights}) : f32[2,4] @layer
    return %y
    """,
        w=integers((3, 4), -8, 7),
    )
    made, floats = integer_layers(graph)
    assert floats == (FloatLayer("layer", floats[0].reason),)
    assert reason in floats[0].reason
    assert not [node for node in made if node.op == "DequantizeWeights"]
    assert_same(graph, made, x=RNG.normal(size=(2, 3)).astype(np.float32))


def test_a_gemm_with_its_factors() -> None:
    graph = parse(
        """
    %x = Input() : f32[2,3]
    %w = Constant() : i16[4,3]
    %s = Constant() {value=[0.5, 0.25, 1.0, 2.0]} : f32[4]
    %b = Constant() {value=[1.0, 2.0, 3.0, 4.0]} : f32[4]
    %c = Quantize(%x) {scale=0.25, zero_point=3, bits=4} : u8[2,3]
    %d = Dequantize(%c) {scale=0.25, zero_point=3} : f32[2,3]
    %v = DequantizeWeights(%w, %s) {axis=0, bits=4, levels="signed"} : f32[4,3]
    %y = Gemm(%d, %v, %b) {alpha=0.5, beta=3.0, transB=1} : f32[2,4] @layer
    return %y
    """,
        w=integers((4, 3), -8, 7),
    )
    assert_same(graph, on_codes(graph), x=RNG.normal(size=(2, 3)).astype(np.float32))


def test_two_layers_meet_on_codes() -> None:
    """No float is left between the layers, whose accumulators become codes at once."""
    behind = """
    %r = Relu(%y) : f32[1,6,5,5]
    %c2 = Quantize(%r) {scale=0.5, zero_point=0, bits=4} : u8[1,6,5,5]
    %d2 = Dequantize(%c2) {scale=0.5, zero_point=0} : f32[1,6,5,5]
    %w2 = Constant() : i16[2,6,1,1]
    %s2 = Constant() {value=[0.5, 0.25]} : f32[2]
    %v2 = DequantizeWeights(%w2, %s2) {axis=0, bits=4, levels="signed"} : f32[2,6,1,1]
    %z = Conv(%d2, %v2) : f32[1,2,5,5] @second
    """
    weights = {"w": integers((6, 4, 3, 3), -4, 3), "w2": integers((2, 6, 1, 1), -8, 7)}
    graph = parse(CONV.format(behind=behind, out="z"), **weights)
    made = on_codes(graph)
    for step in (FoldBatchNorm(), FoldBias(), CommuteQuantize(), FuseRequantize(), DropDead()):
        made = step(made)
    assert [node.op for node in made] == [
        "Quantize", "IntConv", "Requantize", "IntConv", "Affine"
    ]  # fmt: skip
    assert_same(graph, made, x=IMAGE)


@pytest.mark.parametrize(
    ("values", "clipped", "told"),
    [
        ([-1, 1, 1, -1], 3, (1, 2, "odd")),
        ([-3, 1, 3, -1], 3, (2, 2, "odd")),
        ([-2, 1, 0, 1], 1, (2, 1, "signed")),
        ([0, 2, 1, 0], 15, (3, 4, "signed")),
        ([-128, 127, 1, 0], 255, (8, 8, "signed")),
    ],
)
def test_integer_products_are_as_wide_as_what_they_hold(
    values: list[int], clipped: int, told: tuple[int, int, str]
) -> None:
    """ConvInteger and MatMulInteger have 8-bit types, whatever the integers need."""
    graph = Graph.parse(
        f"""
        %x = Input() : f32[1,2]
        %w = Constant() : i16[2,2]
        %c = Quantize(%x) {{scale=0.5, zero_point=0, bits={clipped.bit_length()}}} : u8[1,2]
        %y = IntMatMul(%c, %w) {{zero_point=0, weight_bits=8, activation_bits=8}} : i32[1,2]
        return %y
        """,
        {"w": np.array(values, np.int16).reshape(2, 2)},
    )
    made = integer_layers(graph)[0]["y"]
    bits = (made.int_attr("weight_bits"), made.int_attr("activation_bits"))
    assert (*bits, made.str_attr("weight_levels", "signed")) == told
