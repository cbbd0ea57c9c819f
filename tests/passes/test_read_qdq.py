"""QDQ and QCDQ, against ONNX Runtime without its optimisations and onnx's own packing."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mpqc import reference
from mpqc.errors import ModelError
from mpqc.onnx_export import to_onnx
from mpqc.onnx_files import read_tensor
from mpqc.ort import Session
from mpqc.packing import unpack_elements
from mpqc.passes.quantized_values import Grid
from tests.passes.quantized_files import (
    Array,
    compute,
    file,
    floats,
    info,
    only,
    ops,
    read,
    typed,
    weights_of,
)

node = helper.make_node
SEED = st.integers(0, 2**31)
NARROW = {"INT4": (4, -8, 7), "UINT4": (4, 0, 15), "INT2": (2, -2, 1), "UINT2": (2, 0, 3)}


# ---- packing -------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(NARROW)), st.lists(st.integers(0, 4), max_size=3), SEED)
def test_unpacks_as_onnx_packs(kind: str, shape: list[int], seed: int) -> None:
    bits, low, high = NARROW[kind]
    values = np.random.default_rng(seed).integers(low, high + 1, shape)
    tensor = typed("t", values, getattr(TensorProto, kind))
    packed = np.frombuffer(tensor.raw_data, np.uint8)
    assert packed.size == -(-values.size * bits // 8)
    got = unpack_elements(packed, bits, signed=low < 0)[: values.size].reshape(values.shape)
    np.testing.assert_array_equal(got, values)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int64), values)


@pytest.mark.parametrize("kind", sorted(NARROW))
def test_narrow_types_may_lie_outside_the_file(kind: str, tmp_path: Path) -> None:
    _, low, high = NARROW[kind]
    values = np.resize(np.arange(low, high + 1), (3, 7))
    inside = typed("t", values, getattr(TensorProto, kind))
    (tmp_path / "weights.bin").write_bytes(b"\0" * 5 + inside.raw_data)
    outside = onnx.TensorProto(name="t", data_type=inside.data_type, dims=inside.dims)
    outside.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "5"),
                       ("length", str(len(inside.raw_data)))):  # fmt: skip
        outside.external_data.add(key=key, value=value)
    np.testing.assert_array_equal(read_tensor(outside, tmp_path).astype(np.int64), values)


# ---- weights -------------------------------------------------------------------------------------


def weights_file(
    values: Array, kind: int, scale: Array, zero: Array | None, axis: int, opset: int,
    block: int = 0,
) -> bytes:  # fmt: skip
    attrs: dict[str, Any] = {"axis": axis} if scale.ndim else {}
    if block:
        attrs["block_size"] = block
    constants = [typed("q", values, kind), floats("s", scale)]
    operands = ["q", "s"]
    if zero is not None:
        constants.append(typed("z", zero, kind))
        operands.append("z")
    return file(
        [node("DequantizeLinear", operands, ["w"], "dq", **attrs),
         node("MatMul", ["x", "w"], ["y"])],
        constants, [info("x", [1, values.shape[0]])], [info("y", [1, values.shape[1]])], opset,
    )  # fmt: skip


KINDS = {
    "INT8": (8, -128, 127, 13), "UINT8": (8, 0, 255, 13), "INT16": (16, -32768, 32767, 21),
    "INT4": (4, -8, 7, 21), "UINT4": (4, 0, 15, 21), "INT2": (2, -2, 1, 25), "UINT2": (2, 0, 3, 25),
}  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.sampled_from(sorted(KINDS)), st.booleans(), st.booleans(), SEED)
def test_weights_of_every_type(
    tmp_path: Path, kind: str, per_channel: bool, shifted: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    bits, low, high, opset = KINDS[kind]
    values = rng.integers(low, high + 1, (6, 5))
    shape = (5,) if per_channel else ()
    scale = rng.uniform(0.01, 1, shape).astype(np.float32)
    zero = rng.integers(max(low, -99), min(high, 99) + 1, shape) if shifted else None
    if kind == "INT16":
        zero = np.zeros(shape, np.int64)  # anything else may need 17 bits
    content = weights_file(values, getattr(TensorProto, kind), scale, zero, 1, opset)
    graph = read(content, tmp_path).graph
    made = only(graph, "DequantizeWeights")
    integers, factors = weights_of(graph, made)
    assert (made.name, made.output, made.attrs["bits"]) == ("dq", "w", bits)
    assert integers.dtype == np.int16
    np.testing.assert_array_equal(integers, values - (0 if zero is None else zero))
    np.testing.assert_array_equal(np.broadcast_to(factors, (6, 5)), np.broadcast_to(scale, (6, 5)))
    x = rng.standard_normal((1, 6)).astype(np.float32)
    exact = (values - (0 if zero is None else zero)).astype(np.float32) * scale
    np.testing.assert_allclose(compute(graph, {"x": x})["y"], x @ exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("extent", "block"), [(6, 2), (7, 3)])
def test_blocked_weights_are_float_and_listed(tmp_path: Path, extent: int, block: int) -> None:
    rng = np.random.default_rng(0)
    blocks = -(-extent // block)
    values = rng.integers(-8, 8, (extent, 4))
    scale = rng.uniform(0.1, 1, (blocks, 4)).astype(np.float32)
    content = weights_file(values, TensorProto.INT4, scale, None, 0, 21, block)
    reading = read(content, tmp_path)
    want = values * np.repeat(scale, block, 0)[:extent]
    np.testing.assert_array_equal(reading.graph.constants["w"], want.astype(np.float32))
    (kept,) = reading.kept
    assert kept.node == "dq"
    assert "several axes" in kept.reason


def test_scales_of_weights_may_have_any_sign(tmp_path: Path) -> None:
    values = np.array([[-8, 7, 3], [1, -2, 5]])
    scale = np.array([0.5, -0.25, 0], np.float32)
    content = weights_file(values, TensorProto.INT4, scale, None, 1, 21)
    graph = read(content, tmp_path).graph
    made = only(graph, "DequantizeWeights")
    integers, factors = weights_of(graph, made)
    np.testing.assert_array_equal(factors, [0.5, 0.25, 1])
    np.testing.assert_array_equal(integers, [[-8, -7, 0], [1, 2, 0]])
    np.testing.assert_array_equal(integers * factors, values * scale)


def test_transposed_and_reshaped_weights_stay_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-8, 8, (6, 2, 2))
    scale = rng.uniform(0.1, 1, 6).astype(np.float32)
    content = file(
        [
            node("DequantizeLinear", ["q", "s"], ["w"], "dq", axis=0),
            node("Reshape", ["w", "shape"], ["flat"], "r"),
            node("Transpose", ["flat"], ["t"], "tr", perm=[1, 0]),
            node("MatMul", ["x", "t"], ["y"]),
        ],
        [typed("q", values, TensorProto.INT8), floats("s", scale),
         typed("shape", [6, 4], TensorProto.INT64)],
        [info("x", [1, 4])], [info("y", [1, 6])],
    )  # fmt: skip
    graph = read(content, tmp_path).graph
    assert ops(graph) == ["DequantizeWeights", "MatMul"]
    made = only(graph, "DequantizeWeights")
    assert (made.output, made.attrs["axis"]) == ("t", 1)
    integers, _ = weights_of(graph, made)
    np.testing.assert_array_equal(integers, values.reshape(6, 4).T)
    x = rng.standard_normal((1, 4)).astype(np.float32)
    want = Session(content).run({"x": x})["y"]
    np.testing.assert_allclose(compute(graph, {"x": x})["y"], want, rtol=1e-5)


def test_weights_may_be_quantized_in_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((4, 3)).astype(np.float32)
    content = file(
        [
            node("QuantizeLinear", ["w", "s", "z"], ["q"]),
            node("Clip", ["q", "low", "high"], ["c"]),
            node("DequantizeLinear", ["c", "s", "z"], ["d"], "dq"),
            node("MatMul", ["x", "d"], ["y"]),
        ],
        [floats("w", w), floats("s", 0.25), typed("z", 0, TensorProto.INT8),
         typed("low", -4, TensorProto.INT8), typed("high", 3, TensorProto.INT8)],
        [info("x", [1, 4])], [info("y", [1, 3])],
    )  # fmt: skip
    graph = read(content, tmp_path).graph
    made = only(graph, "DequantizeWeights")
    integers, _ = weights_of(graph, made)
    assert made.attrs["bits"] == 3
    np.testing.assert_array_equal(integers, np.clip(np.rint(w / 0.25), -4, 3))


def test_a_clip_tells_the_width_of_constant_codes(tmp_path: Path) -> None:
    values = np.array([[1, -1], [0, 1]])
    content = file(
        [
            node("Clip", ["q", "low", "high"], ["c"]),
            node("DequantizeLinear", ["c", "s"], ["d"], "dq"),
            node("MatMul", ["x", "d"], ["y"]),
        ],
        [typed("q", values, TensorProto.INT8), floats("s", 0.5),
         typed("low", -1, TensorProto.INT8), typed("high", 1, TensorProto.INT8)],
        [info("x", [1, 2])], [info("y", [1, 2])],
    )  # fmt: skip
    assert only(read(content, tmp_path).graph, "DequantizeWeights").attrs["bits"] == 2


def test_biases_are_float_constants(tmp_path: Path) -> None:
    content = file(
        [
            node("DequantizeLinear", ["q", "s"], ["b"], "dq"),
            node("Add", ["x", "b"], ["y"]),
        ],
        [typed("q", [70000, -3], TensorProto.INT32), floats("s", 0.5)],
        [info("x", [1, 2])], [info("y", [1, 2])],
    )  # fmt: skip
    reading = read(content, tmp_path)
    assert ops(reading.graph) == ["Add"]
    np.testing.assert_array_equal(reading.graph.constants["b"], [35000.0, -1.5])
    assert reading.kept == ()


# ---- activations ---------------------------------------------------------------------------------


def activation_file(
    kind: int, scale: npt.ArrayLike, zero: Array, opset: int, *,
    clip: tuple[int, int] | None = None,
    before: tuple[Any, Any] | None = None, axis: int = 1,
) -> bytes:  # fmt: skip
    constants = [floats("s", scale), typed("z", zero, kind)]
    attrs = {"axis": axis} if np.ndim(scale) else {}
    source, codes, nodes = "x", "q", []
    if before:
        constants += [floats("from", before[0]), floats("to", before[1])]
        nodes.append(node("Clip", ["x", "from", "to"], ["cx"], "clip"))
        source = "cx"
    nodes.append(node("QuantizeLinear", [source, "s", "z"], ["q"], "quantize", **attrs))
    if clip:
        constants += [typed("low", clip[0], kind), typed("high", clip[1], kind)]
        nodes.append(node("Clip", ["q", "low", "high"], ["c"], "clip"))
        codes = "c"
    nodes.append(node("DequantizeLinear", [codes, "s", "z"], ["y"], "dequantize", **attrs))
    return file(nodes, constants, [info("x", [2, 3, 4])], [info("y", [2, 3, 4])], opset)


def data(rng: np.random.Generator, scale: float, span: int) -> Array:
    """Numbers over the range and beyond, ties among them."""
    steps = rng.uniform(-1.5 * span, 1.5 * span, (2, 3, 4))
    ties = rng.integers(-span, span + 1, (2, 3, 4)) + 0.5
    return (np.where(rng.random((2, 3, 4)) < 0.5, steps, ties) * scale).astype(np.float32)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.sampled_from(["INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2"]), SEED)
def test_activations_of_every_type(tmp_path: Path, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits, low, high, opset = KINDS[kind]
    scale = rng.choice([0.25, rng.uniform(0.01, 1)]).astype(np.float32)
    zero = rng.integers(low, high + 1)
    graph = read(
        activation_file(getattr(TensorProto, kind), scale, np.asarray(zero), opset), tmp_path
    ).graph
    assert [(n.name, n.op) for n in graph] == [
        ("quantize", "Quantize"), ("dequantize", "Dequantize"),
    ]  # fmt: skip
    quantize, dequantize = graph
    assert quantize.attrs["bits"] == bits
    assert quantize.attrs["zero_point"] == dequantize.attrs["zero_point"] == zero - low
    x = data(rng, float(scale), high)
    want = (np.clip(np.rint(x / scale) + zero, low, high) - zero).astype(np.float32) * scale
    np.testing.assert_array_equal(compute(graph, {"x": x})["y"], want)


@pytest.mark.parametrize(
    ("kind", "clip", "zero", "attrs"),
    [
        ("INT8", (-8, 7), 0, {"bits": 4, "zero_point": 8}),
        ("INT8", (-7, 7), 0, {"bits": 4, "zero_point": 8, "low": 1, "high": 15}),
        ("UINT8", (0, 15), 3, {"bits": 4, "zero_point": 3}),
        ("UINT8", (0, 6), 0, {"bits": 3, "zero_point": 0, "low": 0, "high": 6}),
        ("INT8", (0, 31), 0, {"bits": 5, "zero_point": 0}),
        ("INT8", (-2, 1), 0, {"bits": 2, "zero_point": 2}),
        ("INT8", (-1, 0), 0, {"bits": 1, "zero_point": 1}),
        # of an odd place: codes start at its lowest integer
        ("UINT8", (120, 135), 128, {"bits": 4, "zero_point": 8}),
        ("UINT8", (121, 135), 128, {"bits": 4, "zero_point": 7, "low": 0, "high": 14}),
        ("INT8", (-3, 12), 0, {"bits": 4, "zero_point": 3}),
        ("INT8", (-100, -97), -98, {"bits": 2, "zero_point": 2}),
        ("UINT8", (2, 5), 0, {"bits": 3, "zero_point": 0, "low": 2, "high": 5}),
        # the zero point has no code at four bits: the type's width, and the bounds as they are
        ("UINT8", (0, 15), 100, {"bits": 8, "zero_point": 100, "low": 0, "high": 15}),
        ("INT8", (-4, 3), -20, {"bits": 8, "zero_point": 108, "low": 124, "high": 131}),
    ],
)
def test_a_clip_between_tells_the_width(
    tmp_path: Path, kind: str, clip: tuple[int, int], zero: int, attrs: dict[str, int]
) -> None:
    element = getattr(TensorProto, kind)
    content = activation_file(element, np.float32(0.5), np.asarray(zero), 13, clip=clip)
    reading = read(content, tmp_path)
    quantize, _ = reading.graph
    assert dict(quantize.attrs) == {"scale": 0.5, **attrs}
    assert reading.kept == ()
    x = data(np.random.default_rng(0), 0.5, 20)
    np.testing.assert_array_equal(
        compute(reading.graph, {"x": x})["y"], Session(content).run({"x": x})["y"]
    )


def test_a_clip_of_floats_before_tells_the_width(tmp_path: Path) -> None:
    scale = np.float32(0.1)
    content = activation_file(
        TensorProto.INT8, scale, np.asarray(0), 13, before=(-8 * scale, 7 * scale)
    )
    graph = read(content, tmp_path).graph
    assert ops(graph) == ["Quantize", "Dequantize"]
    assert only(graph, "Quantize").attrs["bits"] == 4
    x = data(np.random.default_rng(0), 0.1, 20)
    np.testing.assert_array_equal(
        compute(graph, {"x": x})["y"], Session(content).run({"x": x})["y"]
    )


def test_a_relu6_before_is_no_width(tmp_path: Path) -> None:
    content = activation_file(
        TensorProto.INT8, np.float32(6 / 127), np.asarray(0), 13, before=(0, 6)
    )
    graph = read(content, tmp_path).graph
    assert ops(graph) == ["Clip", "Quantize", "Dequantize"]
    assert only(graph, "Quantize").attrs["bits"] == 8


@pytest.mark.parametrize(
    ("kind", "opset", "channels"),
    [("INT16", 21, False), ("INT16", 21, True), ("UINT16", 21, False), ("INT8", 13, True)],
)
def test_what_is_not_codes_is_float_exact_and_listed(
    tmp_path: Path, kind: str, opset: int, channels: bool
) -> None:
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.1, 1, (3,) if channels else ()).astype(np.float32)
    zero = rng.integers(0, 5, scale.shape)
    content = activation_file(getattr(TensorProto, kind), scale, zero, opset)
    reading = read(content, tmp_path)
    assert {kept.node for kept in reading.kept} == {"quantize"}
    x = data(rng, 0.5, 90000 if "16" in kind else 200)
    np.testing.assert_array_equal(
        compute(reading.graph, {"x": x})["y"], Session(content).run({"x": x})["y"]
    )


@pytest.mark.parametrize("kind", ["INT8", "UINT8", "INT16"])
def test_outputs_that_are_codes_have_the_files_type(tmp_path: Path, kind: str) -> None:
    element, opset = getattr(TensorProto, kind), 21
    content = file(
        [
            node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            node("Transpose", ["q"], ["t"], perm=[1, 0]),
        ],
        [floats("s", 0.5), typed("z", 3, element)],
        [info("x", [3, 4])], [info("q", [3, 4], element), info("t", [4, 3], element)], opset,
    )  # fmt: skip
    graph = read(content, tmp_path).graph
    x = np.random.default_rng(0).uniform(-99, 99, (3, 4)).astype(np.float32)
    got, want = compute(graph, {"x": x}), Session(content).run({"x": x})
    for name, array in want.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize("kind", ["INT8", "UINT8"])
def test_inputs_may_be_codes(tmp_path: Path, kind: str) -> None:
    element = getattr(TensorProto, kind)
    content = file(
        [node("DequantizeLinear", ["x", "s", "z"], ["y"], "dq")],
        [floats("s", 0.5), typed("z", 3, element)],
        [info("x", [3, 4], element)], [info("y", [3, 4])],
    )  # fmt: skip
    graph = read(content, tmp_path).graph
    x = np.arange(-6, 6).reshape(3, 4).astype(kind.lower())
    np.testing.assert_array_equal(
        compute(graph, {"x": x})["y"], Session(content).run({"x": x})["y"]
    )


def test_codes_move_through_pools_and_concats(tmp_path: Path) -> None:
    content = file(
        [
            node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            node("MaxPool", ["q"], ["p"], kernel_shape=[2, 2], strides=[2, 2], pads=[1, 1, 0, 0]),
            node("Concat", ["p", "p"], ["c"], axis=1),
            node("Reshape", ["c", "shape"], ["r"]),
            node("DequantizeLinear", ["r", "s", "z"], ["y"]),
        ],
        [floats("s", 0.5), typed("z", -9, TensorProto.INT8),
         typed("shape", [1, -1], TensorProto.INT64)],
        [info("x", [1, 2, 5, 5])], [info("y", [1, 36])], 13,
    )  # fmt: skip
    graph = read(content, tmp_path).graph
    assert ops(graph) == ["Quantize", "MaxPool", "Concat", "Reshape", "Dequantize"]
    x = np.random.default_rng(0).uniform(-9, 9, (1, 2, 5, 5)).astype(np.float32)
    np.testing.assert_array_equal(
        compute(graph, {"x": x})["y"], Session(content).run({"x": x})["y"]
    )


@pytest.mark.parametrize("value", [None, 5])
@pytest.mark.parametrize("kind", ["INT8", "UINT8"])
def test_codes_are_padded_and_enlarged_as_codes(
    tmp_path: Path, kind: str, value: int | None
) -> None:
    element = getattr(TensorProto, kind)
    content = file(
        [
            node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            node("Pad", ["q", "pads"] + ["value"] * (value is not None), ["p"]),
            node("Resize", ["p", "", "factors"], ["r"], mode="nearest", nearest_mode="floor",
                 coordinate_transformation_mode="asymmetric"),
            node("DequantizeLinear", ["r", "s", "z"], ["y"]),
        ],
        [floats("s", 0.5), typed("z", 9, element), floats("factors", [1, 1, 2, 2]),
         typed("pads", [0, 0, 1, 1, 0, 0, 0, 2], TensorProto.INT64),
         typed("value", value or 0, element)],
        [info("x", [1, 2, 3, 3])], [info("y", [1, 2, 8, 12])], 13,
    )  # fmt: skip
    graph = read(content, tmp_path).graph
    assert ops(graph) == ["Quantize", "Pad", "Resize", "Dequantize"]
    x = np.random.default_rng(0).uniform(-9, 9, (1, 2, 3, 3)).astype(np.float32)
    want = Session(content).run({"x": x})["y"]
    np.testing.assert_array_equal(Session(to_onnx(graph)).run({"x": x})["y"], want)
    np.testing.assert_array_equal(reference.run(graph, {"x": x})["y"], want)


def test_tables_of_codes_are_looked_up_as_codes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-128, 128, (5, 3))
    content = file(
        [
            node("Gather", ["table", "x"], ["q"], axis=0),
            node("DequantizeLinear", ["q", "s"], ["y"]),
        ],
        [floats("s", 0.5), typed("table", values, TensorProto.INT8)],
        [info("x", [4], TensorProto.INT64)], [info("y", [4, 3])], 13,
    )  # fmt: skip
    graph = read(content, tmp_path).graph
    assert ops(graph) == ["Gather", "Dequantize"]
    x = np.array([4, 0, 2, 2])
    np.testing.assert_array_equal(compute(graph, {"x": x})["y"], values[x] * np.float32(0.5))


@pytest.mark.parametrize("constant", [False, True])
def test_dynamic_quantization(tmp_path: Path, constant: bool) -> None:
    rng = np.random.default_rng(0)
    w = rng.integers(-128, 128, (4, 3))
    x = rng.standard_normal((2, 4)).astype(np.float32)
    content = file(
        [
            node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], "dynamic"),
            node("MatMulInteger", ["q", "w", "z", "wz"], ["acc"], "product"),
            node("Cast", ["acc"], ["f"], to=TensorProto.FLOAT),
            node("Mul", ["f", "s"], ["told"]),
            node("Add", ["told", "b"], ["y"]),
        ],
        [typed("w", w, TensorProto.INT8), typed("wz", 0, TensorProto.INT8), floats("b", [0.5] * 3)]
        + ([floats("x", x)] if constant else []),
        [] if constant else [info("x", [2, 4])], [info("y", [2, 3])],
    )  # fmt: skip
    reading = read(content, tmp_path)
    assert ops(reading.graph).count("IntMatMul") == 1
    feeds = {} if constant else {"x": x}
    want = Session(content).run(feeds)["y"]
    np.testing.assert_allclose(compute(reading.graph, feeds)["y"], want, rtol=1e-6, atol=1e-6)
    if not constant:
        zeros = {"x": np.zeros((2, 4), np.float32)}
        np.testing.assert_array_equal(
            compute(reading.graph, zeros)["y"], Session(content).run(zeros)["y"]
        )
        assert [kept.node for kept in reading.kept] == ["dynamic"]


def test_numbers_of_a_grid() -> None:
    assert Grid.of("int4") == Grid.between(-8, 7)
    assert Grid.between(0, 0).bits == 1
    assert Grid.between(-1, 0) == Grid(-1, 0, 1, 1)
    assert Grid.between(-129, 3).bits == 9
    assert Grid.of("uint8").within(-5, 300) == Grid.of("uint8")


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "zero", "kind", "message"),
    [
        (0.0, 0, "UINT8", "'quantize' has the scale 0"),
        (-1.0, 0, "UINT8", "'quantize' has the scale -1"),
        (float("nan"), 0, "UINT8", "'quantize' has a scale that is not finite"),
        (float("inf"), 0, "UINT8", "'quantize' has a scale that is not finite"),
        ([1.0, 2.0], [0, 0], "UINT8", r"'quantize' has a scale of shape \[2\] for 3 channels"),
        ([1.0, 2.0, 3.0], [0, 0], "UINT8", r"'quantize' has scales of shape \[3\] and zero points"),
    ],
)
def test_bad_rules_are_named(
    tmp_path: Path, scale: Any, zero: Any, kind: str, message: str
) -> None:
    element = getattr(TensorProto, kind)
    content = activation_file(element, np.asarray(scale, np.float32), np.asarray(zero), 13)
    with pytest.raises(ModelError, match=message):
        read(content, tmp_path)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_of_weights_are_finite(tmp_path: Path, scale: float) -> None:
    content = weights_file(
        np.zeros((2, 3)), TensorProto.INT8, np.asarray(scale, np.float32), None, 1, 21
    )
    with pytest.raises(ModelError, match="'dq' has a scale that is not finite"):
        read(content, tmp_path)


def test_an_axis_that_is_not_there_is_named(tmp_path: Path) -> None:
    scale = np.ones(3, np.float32)
    content = activation_file(TensorProto.UINT8, scale, np.zeros(3, np.int64), 13, axis=5)
    with pytest.raises(ModelError, match="axis"):
        read(content, tmp_path)


def test_zero_points_of_another_type_are_named(tmp_path: Path) -> None:
    content = file(
        [node("DequantizeLinear", ["x", "s", "z"], ["y"], "dq")],
        [floats("s", 0.5), typed("z", 3, TensorProto.UINT8)],
        [info("x", [3, 4], TensorProto.INT8)], [info("y", [3, 4])],
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"dq.*(zero point|type)"):
        read(content, tmp_path)


def test_blocks_that_do_not_divide_are_named(tmp_path: Path) -> None:
    values = np.zeros((6, 4), np.int64)
    scale = np.ones((2, 4), np.float32)
    content = weights_file(values, TensorProto.INT4, scale, None, 0, 21, block=2)
    with pytest.raises(ModelError, match=r"dq.*(blocks of 2|block)"):
        read(content, tmp_path)


def test_clips_the_wrong_way_round_are_named(tmp_path: Path) -> None:
    content = activation_file(TensorProto.INT8, np.float32(1), np.asarray(0), 13, clip=(5, -5))
    with pytest.raises(ModelError, match="clips from 5 to -5"):
        read(content, tmp_path)


def test_float_models_stay_as_they_are(tmp_path: Path) -> None:
    content = file([node("Relu", ["x"], ["y"])], [], [info("x", [3])], [info("y", [3])])
    reading = read(content, tmp_path)
    assert ops(reading.graph) == ["Relu"]
    assert reading.kept == ()
