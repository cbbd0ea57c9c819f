"""The oracle itself, against loops that are too plain to be wrong."""

from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqc.errors import DataError, GraphError
from mpqc.graph import Graph
from mpqc.reference import run

Array = npt.NDArray[Any]


def plain_conv(
    q: Array,
    w: Array,
    zero_point: int,
    stride: int,
    dilation: int,
    pads: tuple[int, ...],
    group: int,
) -> Array:
    """Sum of products, one at a time, in Python's integers; a pad counts as the zero point."""
    top, left, bottom, right = pads
    n, _, height, width = q.shape
    o, per_group, kh, kw = w.shape
    out_h = (height + top + bottom - (kh - 1) * dilation - 1) // stride + 1
    out_w = (width + left + right - (kw - 1) * dilation - 1) // stride + 1
    out = np.zeros((n, o, out_h, out_w), np.int64)
    for b, c, y, x in product(range(n), range(o), range(out_h), range(out_w)):
        first = c // (o // group) * per_group
        for i, dy, dx in product(range(per_group), range(kh), range(kw)):
            row, col = y * stride + dy * dilation - top, x * stride + dx * dilation - left
            inside = 0 <= row < height and 0 <= col < width
            code = int(q[b, first + i, row, col]) if inside else zero_point
            out[b, c, y, x] += (code - zero_point) * int(w[c, i, dy, dx])
    return out


@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2]),
    st.tuples(*[st.integers(0, 2)] * 4),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 255),
)
def test_int_conv_is_a_sum_of_products(
    seed: int, stride: int, dilation: int, pads: tuple[int, ...], group: int, zero_point: int
) -> None:
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 256, (2, 4, 6, 5), np.uint8)
    w = rng.integers(-255, 256, (4, 4 // group, 3, 2), np.int16)
    want = plain_conv(q, w, zero_point, stride, dilation, pads, group)
    shape = ",".join(map(str, want.shape))
    graph = Graph.parse(
        f"""
        %q = Input() : u8[2,4,6,5]
        %w = Constant() : i16[4,{4 // group},3,2]
        %y = IntConv(%q, %w) {{zero_point={zero_point}, group={group}, pads={list(pads)}, strides=[{stride}, {stride}], dilations=[{dilation}, {dilation}]}} : i32[{shape}]
        return %y
        """,  # noqa: E501
        {"w": w},
    )
    np.testing.assert_array_equal(run(graph, {"q": q})["y"], want)


def test_int_matmul() -> None:
    graph = Graph.parse(
        """
        %q = Input() : u8[2,2]
        %w = Constant() {value=[1, -2, 3, 4]} : i16[2,2]
        %y = IntMatMul(%q, %w) {zero_point=1} : i32[2,2]
        return %y
        """
    )
    got = run(graph, {"q": np.array([[1, 2], [3, 0]], np.uint8)})["y"]
    np.testing.assert_array_equal(got, [[3, 4], [-1, -8]])


def test_quantize_rounds_half_to_even_and_clips() -> None:
    graph = Graph.parse(
        """
        %x = Input() : f32[6]
        %q = Quantize(%x) {scale=0.5, zero_point=1, bits=2} : u8[6]
        %y = Dequantize(%q) {scale=0.5, zero_point=1} : f32[6]
        return %q, %y
        """
    )
    got = run(graph, {"x": np.array([0.25, 0.75, -0.25, -9, 9, 0.5], np.float32)})
    np.testing.assert_array_equal(got["q"], [1, 3, 1, 0, 3, 2])
    np.testing.assert_array_equal(got["y"], [0, 1, 0, -0.5, 1, 0.5])


def test_affine_rounds_twice() -> None:
    acc, m, b = np.int32(3), np.float32(1 / 3), np.float32(-1)
    graph = Graph.parse(
        """
        %acc = Input() : i32[1,1]
        %m = Constant() : f32[1]
        %b = Constant() : f32[1]
        %y = Affine(%acc, %m, %b) {axis=1} : f32[1,1]
        return %y
        """,
        {"m": m.reshape(1), "b": b.reshape(1)},
    )
    got = run(graph, {"acc": acc.reshape(1, 1)})["y"]
    assert got.item() == float(np.float32(np.float32(3) * m) + b)
    assert float(m) * 3 - 1 != got.item()  # a fused multiply-add would keep the difference


def test_requantize_clips_to_its_own_bounds() -> None:
    graph = Graph.parse(
        """
        %acc = Input() : i32[1,3]
        %m = Constant() {value=[1.0]} : f32[1]
        %b = Constant() {value=[0.5, 0.5, 0.5]} : f32[3]
        %y = Requantize(%acc, %m, %b) {axis=1, zero_point=4, bits=4, low=4, high=9} : u8[1,3]
        return %y
        """
    )
    got = run(graph, {"acc": np.array([[-3, 1, 50]], np.int32)})["y"]
    np.testing.assert_array_equal(got, [[4, 6, 9]])


def test_sums_beyond_int32_are_an_error() -> None:
    graph = Graph.parse(
        """
        %q = Input() : u8[1,40000]
        %w = Constant() : i16[40000,1]
        %y = IntMatMul(%q, %w) {zero_point=0} : i32[1,1]
        return %y
        """,
        {"w": np.full((40000, 1), 255, np.int16)},
    )
    with pytest.raises(GraphError, match="exceed int32"):
        run(graph, {"q": np.full((1, 40000), 255, np.uint8)})


FLOAT = """
%x = Input() : f32[1,2]
%y = Relu(%x) : f32[1,2]
%z = Exp(%y) : f32[1,2]
return %z
"""


def test_gives_any_value() -> None:
    got = run(Graph.parse(FLOAT), {"x": np.array([[-1, 2]], np.float32)}, ["y"])
    assert list(got) == ["y"]
    np.testing.assert_array_equal(got["y"], [[0, 2]])


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "no array for input 'x'"),
        ({"x": np.zeros((1, 2), np.float32), "q": np.zeros(1)}, "no input named 'q'.*: x"),
        ({"x": np.zeros((1, 3), np.float32)}, r"f32\[1,3\], not f32\[1,2\]"),
        ({"x": np.zeros((1, 2))}, r"f64\[1,2\], not f32\[1,2\]"),
    ],
)
def test_refuses_feeds_that_do_not_fit(feeds: dict[str, Array], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(Graph.parse(FLOAT), feeds)


def test_refuses_a_graph_whose_types_lie() -> None:
    graph = Graph.parse(FLOAT.replace("Exp(%y) : f32[1,2]", "Exp(%y) : f32[2,1]"))
    with pytest.raises(GraphError, match=r"Exp 'z' gave f32\[1,2\], not f32\[2,1\]"):
        run(graph, {"x": np.zeros((1, 2), np.float32)})
