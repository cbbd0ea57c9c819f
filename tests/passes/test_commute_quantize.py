import numpy as np
import pytest

from mpqc import reference
from mpqc.graph import Graph
from mpqc.passes.commute_quantize import CommuteQuantize
from mpqc.passes.drop_dead import DropDead

QUANTIZE = "{bits=3, scale=0.25, zero_point=2}"


def check(before: Graph) -> Graph:
    """Commute, and compare both sides on random and extreme values."""
    after = CommuteQuantize()(before)
    rng = np.random.default_rng(0)
    for spread in (0.3, 1.0, 50.0):
        feeds = {
            name: (rng.standard_normal(kind.shape) * spread).astype(np.float32)
            for name, kind in before.inputs.items()
        }
        old, new = reference.run(before, feeds), reference.run(after, feeds)
        assert old.keys() == new.keys()
        for name in old:
            np.testing.assert_array_equal(old[name], new[name])
    return after


def test_pooling_moves_codes() -> None:
    after = check(
        Graph.parse(
            f"""
            %x = Input() : f32[1,2,5,5]
            %y = MaxPool(%x) {{kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]}} : f32[1,2,3,3]
            %q = Quantize(%y) {QUANTIZE} : u8[1,2,3,3]
            %z = Dequantize(%q) {{scale=0.25, zero_point=2}} : f32[1,2,3,3]
            return %z
            """
        )
    )
    assert str(after).splitlines()[1:3] == [
        "%x.q3 = Quantize(%x) {bits=3, scale=0.25, zero_point=2} : u8[1,2,5,5]",
        "%q = MaxPool(%x.q3) {kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]} "
        ": u8[1,2,3,3] @y",
    ]


@pytest.mark.parametrize(
    ("line", "shape"),
    [
        ("%y = Transpose(%x) {perm=[0,2,3,1]}", "[1,3,4,2]"),
        ("%y = Flatten(%x) {axis=1}", "[1,24]"),
        ("%y = Reshape(%x, %shape)", "[2,12]"),
        ("%y = Unsqueeze(%x, %zero)", "[1,1,2,3,4]"),
        ("%y = Squeeze(%x, %zero)", "[2,3,4]"),
        ("%y = Slice(%x, %one, %three, %two)", "[1,2,2,4]"),
        ("%y = Identity(%x)", "[1,2,3,4]"),
        ("%y = Pad(%x, %pads)", "[1,2,4,5]"),
        ("%y = Pad(%x, %pads, %value)", "[1,2,4,5]"),
        ('%y = Pad(%x, %pads) {mode="reflect"}', "[1,2,4,5]"),
        ("%y = Concat(%x, %x) {axis=1}", "[1,4,3,4]"),
        ("%y = Gather(%x, %zero) {axis=1}", "[1,1,3,4]"),
        ("%y = Tile(%x, %times)", "[1,2,6,4]"),
        ("%y = Expand(%x, %wide)", "[2,2,3,4]"),
        ("%y = Resize(%x, %none, %twice)", "[1,2,6,8]"),
        ("%y = DepthToSpace(%x) {blocksize=1}", "[1,2,3,4]"),
    ],
)
def test_moves_commute(line: str, shape: str) -> None:
    after = check(
        Graph.parse(
            f"""
            %x = Input() : f32[1,2,3,4]
            %shape = Constant() {{value=[2,12]}} : i64[2]
            %zero = Constant() {{value=[0]}} : i64[1]
            %one = Constant() {{value=[1]}} : i64[1]
            %two = Constant() {{value=[2]}} : i64[1]
            %three = Constant() {{value=[3]}} : i64[1]
            %pads = Constant() {{value=[0,0,1,0,0,0,0,1]}} : i64[8]
            %value = Constant() {{value=[0.4]}} : f32[]
            %times = Constant() {{value=[1,1,2,1]}} : i64[4]
            %wide = Constant() {{value=[2,1,1,1]}} : i64[4]
            %none = Constant() {{value=[]}} : f32[0]
            %twice = Constant() {{value=[1.0,1.0,2.0,2.0]}} : f32[4]
            {line} : f32{shape} @moved
            %q = Quantize(%y) {QUANTIZE} : u8{shape}
            %z = Dequantize(%q) {{scale=0.25, zero_point=2}} : f32{shape}
            return %z
            """
        )
    )
    assert [node.name for node in after] == ["x.q3", "moved", "z"]
    assert after.type(after["moved"].output).dtype == "uint8"


@pytest.mark.parametrize(
    "line",
    [
        '%y = Resize(%x, %none, %twice) {mode="linear"}',
        '%y = Resize(%x, %none, %twice) {coordinate_transformation_mode="tf_crop_and_resize"}',
    ],
)
def test_a_resize_that_makes_up_values_stays_where_it_is(line: str) -> None:
    graph = Graph.parse(
        f"""
        %x = Input() : f32[1,1,2,2]
        %none = Constant() {{value=[]}} : f32[0]
        %twice = Constant() {{value=[1.0,1.0,2.0,2.0]}} : f32[4]
        {line} : f32[1,1,4,4]
        %q = Quantize(%y) {QUANTIZE} : u8[1,1,4,4]
        return %q
        """
    )
    assert str(CommuteQuantize()(graph)) == str(graph)


def test_a_table_of_constants_is_looked_up_before_it_is_quantized() -> None:
    graph = Graph.parse(
        f"""
        %i = Input() : i64[2]
        %table = Constant() {{value=[0.5, 1.0, 1.5]}} : f32[3]
        %y = Gather(%table, %i) : f32[2]
        %q = Quantize(%y) {QUANTIZE} : u8[2]
        %z = Dequantize(%q) {{scale=0.25, zero_point=2}} : f32[2]
        return %z
        """
    )
    assert str(CommuteQuantize()(graph)) == str(graph)


@pytest.mark.parametrize(
    ("attrs", "ops"),
    [
        ("{bits=3, scale=0.3, zero_point=2}", []),
        ("{bits=8, scale=0.3, zero_point=2}", []),
        ("{bits=2, scale=0.3, zero_point=2}", ["Min"]),
        ("{bits=3, scale=0.3, zero_point=2, low=2}", ["Max"]),
        ("{bits=3, scale=0.3, zero_point=2, low=1, high=6}", ["Max", "Min"]),
        ("{bits=3, scale=0.25, zero_point=2}", ["Dequantize", "Quantize"]),
        ("{bits=3, scale=0.3, zero_point=1}", ["Dequantize", "Quantize"]),
    ],
)
def test_codes_that_are_quantized_as_they_were_stay_codes(attrs: str, ops: list[str]) -> None:
    after = check(
        Graph.parse(
            f"""
            %x = Input() : f32[3,8]
            %c = Quantize(%x) {{bits=3, scale=0.3, zero_point=2}} : u8[3,8]
            %d = Dequantize(%c) {{scale=0.3, zero_point=2}} : f32[3,8]
            %t = Transpose(%d) {{perm=[1,0]}} : f32[8,3]
            %q = Quantize(%t) {attrs} : u8[8,3]
            %z = Dequantize(%q) {{scale=1.0, zero_point=0}} : f32[8,3]
            return %z
            """
        )
    )
    found = [node.op for node in DropDead()(after)]
    assert [op for op in found if op != "Transpose"] == ["Quantize", *ops, "Dequantize"]


def test_padding_takes_the_zero_point() -> None:
    after = CommuteQuantize()(
        Graph.parse(
            f"""
            %x = Input() : f32[2]
            %pads = Constant() {{value=[1,1]}} : i64[2]
            %y = Pad(%x, %pads) : f32[4]
            %q = Quantize(%y) {QUANTIZE} : u8[4]
            %z = Dequantize(%q) {{scale=0.25, zero_point=2}} : f32[4]
            return %z
            """
        )
    )
    assert after.constants["y.value"] == np.uint8(2)


def test_split_moves_when_all_its_parts_are_quantized_alike() -> None:
    text = """
        %x = Input() : f32[4]
        %s = Constant() {{value=[1,3]}} : i64[2]
        %a, %b = Split(%x, %s) {{axis=0}} : f32[1], f32[3] @split
        %p = Quantize(%a) {{bits=3, scale=0.25, zero_point=2}} : u8[1]
        %q = Quantize(%b) {{bits=3, scale={scale}, zero_point=2}} : u8[3]
        %u = Dequantize(%p) {{scale=0.25, zero_point=2}} : f32[1]
        %v = Dequantize(%q) {{scale=0.25, zero_point=2}} : f32[3]
        return %u, %v
    """
    assert check(Graph.parse(text.format(scale=0.25)))["split"].outputs == ("p", "q")
    different = Graph.parse(text.format(scale=0.5))
    assert str(CommuteQuantize()(different)) == str(different)


@pytest.mark.parametrize(
    ("line", "zero_point", "attrs"),
    [
        ("%y = Relu(%x) : f32[5]", 0, {}),
        ("%y = Relu(%x) : f32[5]", 2, {"low": 2}),
        ("%y = Clip(%x, %lo, %hi) : f32[5]", 2, {"low": 1, "high": 4}),
    ],
)
def test_relu_and_clip_become_bounds(line: str, zero_point: int, attrs: dict[str, int]) -> None:
    after = check(
        Graph.parse(
            f"""
            %x = Input() : f32[5]
            %lo = Constant() {{value=[-0.25]}} : f32[1]
            %hi = Constant() {{value=[0.5]}} : f32[1]
            {line}
            %q = Quantize(%y) {{bits=3, scale=0.25, zero_point={zero_point}}} : u8[5]
            %z = Dequantize(%q) {{scale=0.25, zero_point={zero_point}}} : f32[5]
            return %z
            """
        )
    )
    assert [node.name for node in after] == ["q", "z"]
    assert {k: v for k, v in after["q"].attrs.items() if k in ("low", "high")} == attrs


def test_moves_chain_and_share_codes() -> None:
    after = check(
        Graph.parse(
            f"""
            %x = Input() : f32[1,2,4,4]
            %r = Relu(%x) : f32[1,2,4,4]
            %p = MaxPool(%r) {{kernel_shape=[2,2], strides=[2,2]}} : f32[1,2,2,2]
            %c = Concat(%p, %p) {{axis=1}} : f32[1,4,2,2]
            %f = Flatten(%c) : f32[1,16]
            %q = Quantize(%f) {QUANTIZE} : u8[1,16]
            %z = Dequantize(%q) {{scale=0.25, zero_point=2}} : f32[1,16]
            return %z
            """
        )
    )
    assert [node.op for node in after] == ["Quantize", "MaxPool", "Concat", "Flatten", "Dequantize"]


@pytest.mark.parametrize(
    "body",
    [
        "%y = Flatten(%x) : f32[1,4]\n%q = Quantize(%y) {0} : u8[1,4]\n%z = Relu(%y) : f32[1,4]\n"
        "return %q, %z",
        "%y = Flatten(%x) : f32[1,4]\n%q = Quantize(%y) {0} : u8[1,4]\nreturn %q, %y",
        "%y = Sigmoid(%x) : f32[1,4]\n%q = Quantize(%y) {0} : u8[1,4]\nreturn %q",
        "%y = Flatten(%x) : f32[1,4]\n%q = Quantize(%y) {0} : u8[1,4]\n"
        "%p = Quantize(%y) {{bits=2, scale=0.25, zero_point=2}} : u8[1,4]\nreturn %q, %p",
    ],
)
def test_leaves_values_that_others_read(body: str) -> None:
    before = Graph.parse(
        "%x = Input() : f32[1,4]\n"
        + body.replace("{0}", QUANTIZE).replace("{{", "{").replace("}}", "}")
    )
    assert str(CommuteQuantize()(before)) == str(before)
