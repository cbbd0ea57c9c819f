from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from mpqc import reference
from mpqc.graph import Array, Graph, Node, TensorType
from mpqc.passes.channels_last import ChannelsLast, first, last
from mpqc.passes.drop_dead import DropDead

CONSTANTS: dict[str, Array] = {
    "m": np.linspace(0.01, 0.05, 8, dtype=np.float32),
    "b": np.linspace(-1, 1, 8, dtype=np.float32),
    "w": np.random.default_rng(0).integers(-2, 2, (8, 4, 3, 3)).astype(np.int16),
}

INTEGER = """
%x = Input() : u8[1,4,5,6]
%w = Constant() : i16[8,4,3,3]
%m = Constant() : f32[8]
%b = Constant() : f32[8]
%acc = IntConv(%x, %w) {activation_bits=2, pads=[1, 1, 1, 1], weight_bits=2, weight_levels="signed", zero_point=1} : i32[1,8,5,6] @conv
%y = Requantize(%acc, %m, %b) {axis=1, bits=2, zero_point=0} : u8[1,8,5,6]
%p = MaxPool(%y) {kernel_shape=[2, 2], strides=[2, 2]} : u8[1,8,2,3]
return %p
"""  # noqa: E501

BROADCAST = """
%x = Input() : f32[1,4,5,6]
%s = Constant() : f32[4,1,1]
%row = Constant() : f32[6]
%one = Constant() {value=[2.0]} : f32[1]
%k = Constant() : f32[2,4,1,1]
%c = Conv(%x, %k) : f32[1,2,5,6]
%r = Relu(%c) : f32[1,2,5,6]
%j = Concat(%r, %c) {axis=1} : f32[1,4,5,6]
%t = Mul(%j, %s) : f32[1,4,5,6]
%u = Add(%row, %t) : f32[1,4,5,6]
%v = Div(%u, %one) : f32[1,4,5,6]
%sh = Constant() {value=[1, 120]} : i64[2]
%f = Reshape(%v, %sh) : f32[1,120]
return %f, %r
"""

ONE_PIXEL = """
%x = Input() : f32[1,4,1,1]
%k = Constant() : f32[2,4,1,1]
%c = Conv(%x, %k) : f32[1,2,1,1]
return %c
"""

MOVED = """
%x = Input() : f32[1,2,6,6]
%k = Constant() : f32[4,2,3,3]
%c = Conv(%x, %k) : f32[1,4,4,4]
%st = Constant() {value=[0, 1]} : i64[2]
%en = Constant() {value=[3, 4]} : i64[2]
%ax = Constant() {value=[2, -3]} : i64[2]
%s = Slice(%c, %st, %en, %ax) : f32[1,3,3,4]
%pd = Constant() {value=[0, 1, 2, 0, 0, 0, 0, 3]} : i64[8]
%q = Pad(%s, %pd) : f32[1,4,5,7]
return %q
"""

ONE_DIMENSION = """
%x = Input() : u8[1,4,9]
%w1 = Constant() {value=[1, -1, 0, 1, 1, -1, 0, 1]} : i16[2,4,1]
%acc = IntConv(%x, %w1) {activation_bits=2, weight_bits=2, weight_levels="signed", zero_point=0} : i32[1,2,9] @conv
return %acc
"""  # noqa: E501


def after(text: str) -> Graph:
    return DropDead()(ChannelsLast()(parsed(text)))


def parsed(text: str) -> Graph:
    return Graph.parse(text, {n: a for n, a in CONSTANTS.items() if f"%{n} =" in text})


def evaluate(graph: Graph, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Node by node; ``layout="NHWC"`` means: turn, compute as ever, turn back."""
    values: dict[str, Array] = {**graph.constants, **feeds}
    for node in graph:
        nhwc = node.attrs.get("layout") == "NHWC"
        operands = {name: values[name] for name in node.inputs if name}
        attrs = {key: value for key, value in node.attrs.items() if key != "layout"}
        kind = graph.type(node.output)
        if nhwc:
            x = operands[node.inputs[0]]
            operands[node.inputs[0]] = x.transpose(first(x.ndim))
            shape = tuple(kind.shape[axis] for axis in first(len(kind.shape)))
            kind = TensorType(kind.dtype, shape)
        result = alone(replace(node, attrs=attrs), operands, kind, graph.opset)
        values[node.output] = result.transpose(last(result.ndim)) if nhwc else result
    return {name: values[name] for name in graph.outputs}


def alone(node: Node, operands: Mapping[str, Array], kind: TensorType, opset: int) -> Array:
    fed = {node.inputs[0]: operands[node.inputs[0]]}
    others = {name: array for name, array in operands.items() if name not in fed}
    types = {name: TensorType.of(array) for name, array in fed.items()}
    graph = Graph(types, [node.output], [node], others, {node.output: kind}, opset)
    return reference.run(graph, fed)[node.output]


@pytest.mark.parametrize("text", [INTEGER, BROADCAST, ONE_PIXEL, MOVED, ONE_DIMENSION])
def test_the_meaning_stays(text: str) -> None:
    before = parsed(text)
    kind = before.inputs["x"]
    generator = np.random.default_rng(1)
    x = generator.normal(size=kind.shape).astype(np.float32)
    if kind.dtype == "uint8":
        x = generator.integers(0, 4, kind.shape).astype(np.uint8)
    got, expected = evaluate(after(text), {"x": x}), reference.run(before, {"x": x})
    assert list(got) == list(expected)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)


def lines(graph: Graph) -> list[str]:
    return [line for line in str(graph).splitlines() if "Constant(" not in line]


def test_codes_stay_channels_last_from_layer_to_layer() -> None:
    assert lines(after(INTEGER)) == [
        "%x = Input() : u8[1,4,5,6]",
        "%x.nhwc = Transpose(%x) {perm=[0, 2, 3, 1]} : u8[1,5,6,4] @x.nhwc.turn",
        '%acc.nhwc = IntConv(%x.nhwc, %w) {activation_bits=2, layout="NHWC", pads=[1, 1, 1, 1], '
        'weight_bits=2, weight_levels="signed", zero_point=1} : i32[1,5,6,8] @conv',
        "%y.nhwc = Requantize(%acc.nhwc, %m, %b) {axis=3, bits=2, zero_point=0} : u8[1,5,6,8] @y",
        '%p.nhwc = MaxPool(%y.nhwc) {kernel_shape=[2, 2], layout="NHWC", strides=[2, 2]} '
        ": u8[1,2,3,8] @p",
        "%p = Transpose(%p.nhwc) {perm=[0, 3, 1, 2]} : u8[1,8,2,3] @p.turn",
        "return %p",
    ]


def test_broadcast_constants_turn_and_readers_get_their_layout() -> None:
    turned = after(BROADCAST)
    assert turned.shape("s.nhwc") == (1, 1, 1, 4)
    assert turned.shape("row.nhwc") == (1, 1, 6, 1)
    assert [node.op for node in turned] == [
        "Transpose", "Conv", "Relu", "Concat", "Mul", "Add", "Div", "Transpose", "Reshape",
        "Transpose",
    ]  # fmt: skip
    assert turned["j"].int_attr("axis") == 3
    assert turned["v"].inputs == ("u.nhwc", "one")


def test_axes_of_extent_one_turn_without_moving_a_byte() -> None:
    assert [node.op for node in after(ONE_PIXEL)] == ["Reshape", "Conv", "Reshape"]


def test_slices_and_pads_follow_their_axes() -> None:
    turned = after(MOVED)
    assert [node.op for node in turned] == ["Transpose", "Conv", "Slice", "Pad", "Transpose"]
    np.testing.assert_array_equal(turned.constants["s.axes.nhwc"], [1, 3])
    np.testing.assert_array_equal(turned.constants["q.pads.nhwc"], [0, 2, 0, 1, 0, 0, 3, 0])


def test_one_dimensional_images_turn_too() -> None:
    assert lines(after(ONE_DIMENSION))[1] == (
        "%x.nhwc = Transpose(%x) {perm=[0, 2, 1]} : u8[1,9,4] @x.nhwc.turn"
    )


def test_what_holds_no_image_stays() -> None:
    text = "%x = Input() : f32[2,3]\n%y = Relu(%x) : f32[2,3]\nreturn %y"
    assert str(after(text)) == text


@pytest.mark.parametrize("rank", [3, 4])
def test_first_undoes_last(rank: int) -> None:
    x = np.empty(range(2, 2 + rank))
    assert x.transpose(last(rank)).transpose(first(rank)).shape == x.shape
    assert x.transpose(last(rank)).shape[-1] == x.shape[1]
