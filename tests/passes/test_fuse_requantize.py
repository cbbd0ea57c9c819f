import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqc import numerics, reference
from mpqc.graph import Array, Graph
from mpqc.passes.fuse_requantize import FuseRequantize

HEAD = """
%acc = Input() : i32[1,2,3]
%m = Constant() {value=[0.5, -2.0]} : f32[2]
%b = Constant() {value=[1.0, 0.25]} : f32[2]
%lo = Constant() {value=[-1.0]} : f32[1]
%hi = Constant() {value=[6.0]} : f32[1]
%y = Affine(%acc, %m, %b) {axis=1} : f32[1,2,3]
"""


def codes(graph: Graph, acc: Array) -> Array:
    return reference.run(graph, {"acc": acc})[graph.outputs[0]]


def test_the_scale_moves_into_the_affine() -> None:
    after = FuseRequantize()(
        Graph.parse(
            HEAD
            + """
            %r = Relu(%y) : f32[1,2,3]
            %q = Quantize(%r) {bits=4, scale=0.5, zero_point=0} : u8[1,2,3]
            return %q
            """
        )
    )
    assert str(after) == "\n".join(
        [
            "%acc = Input() : i32[1,2,3]",
            "%q.m = Constant() {value=[1.0, -4.0]} : f32[2]",
            "%q.b = Constant() {value=[2.0, 0.5]} : f32[2]",
            "%q = Requantize(%acc, %q.m, %q.b) {axis=1, bits=4, zero_point=0} : u8[1,2,3]",
            "return %q",
        ]
    )


@pytest.mark.parametrize(
    ("line", "zero_point", "bounds"),
    [
        ("%r = Relu(%y) : f32[1,2,3]", 0, {}),
        ("%r = Relu(%y) : f32[1,2,3]", 3, {"low": 3}),
        ("%r = Clip(%y, %lo, %hi) : f32[1,2,3]", 3, {"low": 1}),
        ("%r = Clip(%y, _, %hi) : f32[1,2,3]", 0, {"high": 12}),
        (
            "%t = Clip(%y, %lo, %hi) : f32[1,2,3]\n%r = Relu(%t) : f32[1,2,3]",
            1,
            {"low": 1, "high": 13},
        ),
        ("%r = Identity(%y) : f32[1,2,3]", 3, None),
    ],
)
def test_clips_become_bounds_on_the_codes(
    line: str, zero_point: int, bounds: dict[str, int] | None
) -> None:
    before = Graph.parse(
        f"{HEAD}\n{line}\n"
        f"%q = Quantize(%r) {{bits=4, scale=0.5, zero_point={zero_point}}} : u8[1,2,3]\nreturn %q"
    )
    after = FuseRequantize()(before)
    if bounds is None:
        assert str(after) == str(before)
        return
    written = {k: v for k, v in after["q"].attrs.items() if k in ("low", "high")}
    assert written == bounds
    # scale, m and b are powers of two or short: no rounding differs
    acc = np.arange(-30, 30, dtype=np.int32).reshape(10, 1, 2, 3)
    for block in acc:
        np.testing.assert_array_equal(codes(before, block), codes(after, block))


@pytest.mark.parametrize(
    "body",
    [
        "%q = Quantize(%y) {bits=4, scale=0.5, zero_point=0} : u8[1,2,3]\nreturn %q, %y",
        "%q = Quantize(%y) {bits=4, scale=0.5, zero_point=0} : u8[1,2,3]\n"
        "%z = Add(%y, %y) : f32[1,2,3]\nreturn %q, %z",
        "%r = Relu(%y) : f32[1,2,3]\n"
        "%q = Quantize(%r) {bits=4, scale=0.5, zero_point=0} : u8[1,2,3]\nreturn %q, %r",
        "%r = LeakyRelu(%y) : f32[1,2,3]\n"
        "%q = Quantize(%r) {bits=4, scale=0.5, zero_point=0} : u8[1,2,3]\nreturn %q",
        "%z = Input() : f32[]\n%r = Clip(%y, %z) : f32[1,2,3]\n"
        "%q = Quantize(%r) {bits=4, scale=0.5, zero_point=0} : u8[1,2,3]\nreturn %q",
    ],
)
def test_leaves_values_that_others_read(body: str) -> None:
    before = Graph.parse(f"{HEAD}\n{body}")
    assert str(FuseRequantize()(before)) == str(before)


def test_two_widths_read_one_accumulator() -> None:
    before = Graph.parse(
        HEAD
        + """
        %q = Quantize(%y) {bits=4, scale=0.5, zero_point=0} : u8[1,2,3]
        %p = Quantize(%y) {bits=2, scale=2.0, zero_point=1} : u8[1,2,3]
        return %q, %p
        """
    )
    after = FuseRequantize()(before)
    assert sorted(node.op for node in after) == ["Requantize", "Requantize"]
    acc = np.arange(-3, 3, dtype=np.int32).reshape(1, 2, 3)
    np.testing.assert_array_equal(
        reference.run(after, {"acc": acc})["p"], reference.run(before, {"acc": acc})["p"]
    )


@given(st.data())
def test_codes_move_only_at_ties(data: st.DataObject) -> None:
    """Dividing first or last differs in the last place, so at most by one code beside a tie."""
    number = st.floats(-4, 4, width=32, allow_subnormal=False)
    m, b = (np.array(data.draw(st.lists(number, min_size=2, max_size=2)), "f4") for _ in "mb")
    scale = float(np.float32(data.draw(st.floats(0.01, 10))))
    acc = np.array(data.draw(st.lists(st.integers(-999, 999), min_size=6, max_size=6)), "i4")
    acc = acc.reshape(1, 2, 3)
    before = Graph.parse(
        f"{HEAD}\n%q = Quantize(%y) {{bits=8, scale={scale!r}, zero_point=9}} : u8[1,2,3]\n"
        "return %q"
    ).with_(constants={"m": m, "b": b})

    old, new = codes(before, acc), codes(FuseRequantize()(before), acc)

    exact = numerics.affine(acc, m, b, 1).astype(np.float64) / scale
    slack = 1e-5 * (np.abs(acc * m[:, None].astype(np.float64)) + np.abs(b[:, None])) / scale
    beside_a_tie = np.abs(exact - np.floor(exact) - 0.5) <= slack + 1e-6
    difference = np.abs(old.astype(int) - new)
    assert (difference <= beside_a_tie).all()


def test_tiny_factors_become_zero_and_huge_ones_stay_apart() -> None:
    tail = "\n%q = Quantize(%y) {bits=4, scale=0.0009765625, zero_point=5} : u8[1,2,3]\nreturn %q"
    tiny = Graph.parse(HEAD + tail).with_(constants={"m": np.array([1e-35, 1], np.float32)})
    np.testing.assert_array_equal(
        FuseRequantize()(tiny).constants["q.m"], np.array([0, 1024], np.float32)
    )
    huge = Graph.parse(HEAD + tail).with_(constants={"b": np.array([3e38, 1], np.float32)})
    assert str(FuseRequantize()(huge)) == str(huge)
