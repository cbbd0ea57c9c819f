"""What is exported computes, in ONNX Runtime, the very bits of the numpy oracle."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqc import reference
from mpqc.errors import GraphError
from mpqc.graph import Attribute, Graph, Node, TensorType
from mpqc.numerics import weight_values
from mpqc.onnx_export import to_onnx
from mpqc.ort import Session

Array = npt.NDArray[Any]

SEEDS = st.integers(0, 2**31)
WIDTHS = st.integers(1, 8)
LEVELS = st.sampled_from(["signed", "odd"])


def same(graph: Graph, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Assert that both compute the same bits, and return them."""
    want = reference.run(graph, feeds)
    got = Session(to_onnx(graph)).run(feeds)
    assert list(got) == list(want)
    for name, array in want.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    return want


def weights(rng: np.random.Generator, shape: tuple[int, ...], bits: int, levels: str) -> Array:
    codes = rng.integers(0, 2**bits, shape)
    codes.flat[0], codes.flat[-1] = 0, 2**bits - 1
    return weight_values(codes, bits, levels)


def codes(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> Array:
    """uint8 codes that often sit at the ends, where kernels saturate."""
    drawn = rng.integers(0, 2**bits, shape)
    ends = rng.choice([0, 2**bits - 1], shape)
    return np.where(rng.random(shape) < 0.5, drawn, ends).astype(np.uint8)


@settings(max_examples=200)
@given(st.data())
def test_int_conv_and_requantize(data: st.DataObject) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(SEEDS))
    a_bits, w_bits, levels = draw(WIDTHS), draw(WIDTHS), draw(LEVELS)
    rank = draw(st.sampled_from([1, 2]))
    group = draw(st.sampled_from([1, 2, 4, 17]))
    channels = group * draw(st.sampled_from([1, 3] if group < 17 else [1]))
    out_channels = group * draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    strides = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    dilations = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    pads = tuple(draw(st.integers(0, 2)) for _ in range(2 * rank))
    spatial = tuple(draw(st.integers(5, 8)) for _ in range(rank))
    zero_point = draw(st.integers(0, 2**a_bits - 1))
    out_bits = draw(WIDTHS)
    out = tuple(
        (spatial[i] + pads[i] + pads[i + rank] - (kernel[i] - 1) * dilations[i] - 1) // strides[i]
        + 1
        for i in range(rank)
    )
    attrs: dict[str, Attribute] = {
        "zero_point": zero_point, "weight_bits": w_bits, "activation_bits": a_bits,
        "weight_levels": levels, "group": group, "strides": strides, "dilations": dilations,
        "pads": pads, "kernel_shape": kernel,
    }  # fmt: skip
    m = rng.normal(0, 0.02, out_channels).astype(np.float32)
    b = rng.normal(0, 2, out_channels).astype(np.float32)
    batch = draw(st.integers(1, 2))
    shape = (batch, out_channels, *out)
    graph = Graph(
        {"q": TensorType("uint8", (batch, channels, *spatial))},
        ["acc", "y", "f"],
        [
            Node("conv", "IntConv", ("q", "w"), ("acc",), attrs),
            Node("r", "Requantize", ("acc", "m", "b"), ("y",),
                 {"zero_point": 2 ** (out_bits - 1), "bits": out_bits, "axis": 1}),
            Node("a", "Affine", ("acc", "m", "b"), ("f",), {"axis": 1}),
        ],
        {"w": weights(rng, (out_channels, channels // group, *kernel), w_bits, levels),
         "m": m, "b": b},
        {"acc": TensorType("int32", shape), "y": TensorType("uint8", shape),
         "f": TensorType("float32", shape)},
    )  # fmt: skip
    same(graph, {"q": codes(rng, (batch, channels, *spatial), a_bits)})


@given(SEEDS, WIDTHS, WIDTHS, LEVELS, st.integers(1, 300), st.integers(1, 20), st.data())
def test_int_matmul(
    seed: int, a_bits: int, w_bits: int, levels: str, k: int, n: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    zero_point = data.draw(st.integers(0, 2**a_bits - 1))
    rows = data.draw(st.sampled_from([(1,), (5,), (2, 3)]))
    shape = (*rows, n)
    axis = len(rows)
    graph = Graph(
        {"q": TensorType("uint8", (*rows, k))},
        ["acc", "y"],
        [
            Node("matmul", "IntMatMul", ("q", "w"), ("acc",), {"zero_point": zero_point}),
            Node("a", "Affine", ("acc", "m", "b"), ("y",), {"axis": axis}),
        ],
        {"w": weights(rng, (k, n), w_bits, levels),
         "m": rng.normal(0, 1, n).astype(np.float32), "b": rng.normal(0, 9, n).astype(np.float32)},
        {"acc": TensorType("int32", shape), "y": TensorType("float32", shape)},
    )  # fmt: skip
    same(graph, {"q": codes(rng, (*rows, k), a_bits)})


@given(SEEDS, WIDTHS, st.floats(1e-6, 1e3), st.data())
def test_quantize_and_dequantize(seed: int, bits: int, scale: float, data: st.DataObject) -> None:
    zero_point = data.draw(st.integers(0, 2**bits - 1))
    rng = np.random.default_rng(seed)
    graph = Graph.parse(
        f"""
        %x = Input() : f32[200]
        %q = Quantize(%x) {{scale={scale}, zero_point={zero_point}, bits={bits}}} : u8[200]
        %y = Dequantize(%q) {{scale={scale}, zero_point={zero_point}}} : f32[200]
        return %q, %y
        """
    )
    ties = (rng.integers(-300, 300, 200) / 2).astype(np.float32) * np.float32(scale)
    near = (rng.normal(0, 100, 200) * scale).astype(np.float32)
    x = np.where(rng.random(200) < 0.5, ties, near)
    x[:4] = [3e38, -3e38, 0.0, -0.0]
    same(graph, {"x": x})


def test_saturation_does_not_happen() -> None:
    graph = Graph.parse(
        """
        %q = Input() : u8[1,512]
        %w = Constant() : i16[512,8]
        %y = IntMatMul(%q, %w) {zero_point=0} : i32[1,8]
        return %y
        """,
        {"w": np.full((512, 8), 127, np.int16)},
    )
    got = same(graph, {"q": np.full((1, 512), 255, np.uint8)})
    assert got["y"].max() == 512 * 255 * 127


POOLS = [
    ("GlobalAveragePool(%f)", "", (1, 1)),
    ("ReduceMean(%f)", "axes=[2, 3], keepdims=1", (1, 1)),
    ("ReduceMean(%f)", "axes=[-1, -2], keepdims=0", ()),
    ("AveragePool(%f)", "kernel_shape=[2, 2], strides=[2, 2]", (3, 2)),
    ("AveragePool(%f)", "kernel_shape=[3, 3], strides=[2, 1], pads=[1, 1, 1, 1]", (4, 5)),
    (
        "AveragePool(%f)",
        "kernel_shape=[3, 2], pads=[2, 0, 1, 1], strides=[2, 2], count_include_pad=1",
        (4, 3),
    ),
    ("AveragePool(%f)", "kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1", (3, 2)),
    (
        "AveragePool(%f)",
        "kernel_shape=[4, 2], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1, count_include_pad=1",
        (4, 3),
    ),
]


@pytest.mark.parametrize(("call", "attrs", "out"), POOLS)
def test_means_near_quantizers_have_a_fixed_order(
    call: str, attrs: str, out: tuple[int, ...]
) -> None:
    shape = ",".join(map(str, (2, 3, *out)))
    text = f"""
        %q = Input() : u8[2,3,7,5]
        %f = Dequantize(%q) {{scale=0.37, zero_point=3}} : f32[2,3,7,5]
        %y = {call} {{{attrs}}} : f32[{shape}]
        return %y
        """
    graph = Graph.parse(text)
    graph = Graph(graph.inputs, graph.outputs, graph, {}, graph.types, opset=17)
    q = np.random.default_rng(0).integers(0, 256, (2, 3, 7, 5), np.uint8)
    fixed = same(graph, {"q": q})["y"]
    floats = Graph.parse(text.replace("%q = Input() : u8", "%f = Input() : f32").replace(
        "%f = Dequantize(%q) {scale=0.37, zero_point=3} : f32[2,3,7,5]", ""
    ))  # fmt: skip
    floats = Graph(floats.inputs, floats.outputs, floats, {}, floats.types, opset=17)
    f = reference.run(graph, {"q": q}, ["f"])["f"]
    np.testing.assert_allclose(Session(to_onnx(floats)).run({"f": f})["y"], fixed, rtol=1e-5)


def test_float_graphs_keep_their_pools() -> None:
    graph = Graph.parse(
        """
        %x = Input() : f32[1,2,4,4]
        %y = GlobalAveragePool(%x) : f32[1,2,1,1] @pool
        return %y
        """
    )
    (node,) = onnx.load_from_string(to_onnx(graph)).graph.node
    assert (node.name, node.op_type) == ("pool", "GlobalAveragePool")


def test_is_a_valid_model_in_standard_operators() -> None:
    graph = Graph.parse(
        """
        %x = Input() : f32[1,4]
        %w = Constant() {value=[1, -1, 1, 1]} : i16[4,1]
        %m = Constant() {value=[0.5]} : f32[1]
        %b = Constant() {value=[0.5]} : f32[1]
        %q = Quantize(%x) {scale=0.5, zero_point=0, bits=2} : u8[1,4]
        %acc = IntMatMul(%q, %w) {zero_point=0} : i32[1,1]
        %y = Affine(%acc, %m, %b) {axis=1} : f32[1,1] @layer
        return %y
        """
    )
    model = onnx.load_from_string(to_onnx(graph))
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert model.graph.node[-1].name == "layer"


def test_gives_inner_values() -> None:
    graph = Graph.parse(
        "%x = Input() : f32[1]\n%a = Relu(%x) : f32[1]\n%y = Exp(%a) : f32[1]\nreturn %y"
    )
    got = Session(to_onnx(graph, ["a", "y"])).run({"x": np.ones(1, np.float32)})
    assert list(got) == ["a", "y"]
    with pytest.raises(GraphError, match="no value named 'q'"):
        to_onnx(graph, ["q"])


def test_is_deterministic() -> None:
    graph = Graph.parse("%x = Input() : f32[1]\n%y = Relu(%x) {b=1, a=2} : f32[1]\nreturn %y")
    assert to_onnx(graph) == to_onnx(graph)


def test_refuses_weights_beyond_eight_bits() -> None:
    graph = Graph.parse(
        """
        %q = Input() : u8[1,2]
        %w = Constant() {value=[130, -128]} : i16[2,1]
        %y = IntMatMul(%q, %w) {zero_point=0} : i32[1,1]
        return %y
        """
    )
    with pytest.raises(GraphError, match="weights of 'y' exceed 8 bits"):
        to_onnx(graph)


@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([0, 1, 2]), st.sampled_from([8, 9]))
def test_weights_are_integers_times_scales(seed: int, one: bool, axis: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (3, 4, 5)
    values = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int16)
    scale = rng.uniform(0.01, 2, 1 if one else shape[axis]).astype(np.float32)
    graph = Graph.parse(
        f"""
        %x = Input() : f32[3,4,5]
        %w = Constant() : i16[3,4,5]
        %s = Constant() : f32[{scale.size}]
        %d = DequantizeWeights(%w, %s) {{axis={axis}, bits={bits}, levels="signed"}} : f32[3,4,5]
        %y = Add(%x, %d) : f32[3,4,5]
        return %y, %d
        """,
        {"w": values, "s": scale},
    )
    want = np.moveaxis(np.moveaxis(values.astype(np.float32), axis, -1) * scale, -1, axis)
    feeds = {"x": np.zeros(shape, np.float32)}
    for got in (reference.run(graph, feeds), Session(to_onnx(graph)).run(feeds)):
        np.testing.assert_array_equal(got["d"], want)
        np.testing.assert_array_equal(got["y"], want)
