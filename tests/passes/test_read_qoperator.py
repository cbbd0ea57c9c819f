"""Operators on codes, against ONNX Runtime without its optimisations."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mpqc.errors import ModelError
from mpqc.ort import Session
from mpqc.passes.read_quantizers import Reading
from tests.passes.quantized_files import (
    Array,
    compiled,
    compute,
    file,
    floats,
    info,
    only,
    ops,
    read,
    steps_apart,
    typed,
    weights_of,
)

node = helper.make_node
CONTRIB = {"com.microsoft": 1}
SIGNS = pytest.mark.parametrize("kind", ["INT8", "UINT8"])


def element(kind: str) -> int:
    return int(getattr(TensorProto, kind))


def integers(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> Array:
    bounds = np.iinfo(kind.lower())
    drawn: Array = rng.integers(bounds.min, bounds.max + 1, shape).astype(kind.lower())
    return drawn


def at_most_a_step(reading: Reading, content: bytes, feeds: dict[str, Array]) -> None:
    """The same codes as ONNX Runtime's, but for one step on what nearly is a tie."""
    want = Session(content).run(feeds)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        for got in (compute(reading.graph, feeds), compiled(path, feeds)):
            for name, array in want.items():
                assert got[name].dtype == array.dtype
                wrong, most = steps_apart(got[name], array, 1.0)
                assert most <= 1
                assert wrong <= 0.01 * array.size


@SIGNS
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("auto_pad", [False, True])
def test_qlinear_conv(tmp_path: Path, kind: str, per_channel: bool, auto_pad: bool) -> None:
    rng = np.random.default_rng(0)
    w = integers(rng, "INT8" if per_channel else kind, (4, 3, 3, 3))
    held = element(w.dtype.name.upper())
    scales = rng.uniform(0.001, 0.01, (4,) if per_channel else ()).astype(np.float32)
    zeros = np.zeros(scales.shape, np.int64) + (0 if per_channel else 3)
    padding: dict[str, Any] = {"auto_pad": "SAME_UPPER"} if auto_pad else {"pads": [1, 0, 1, 2]}
    content = file(
        [node("QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["y"], "conv",
              strides=[2, 1], **padding)],
        [floats("xs", 0.05), typed("xz", 7, element(kind)), typed("w", w, held),
         floats("ws", scales), typed("wz", zeros, held),
         floats("ys", 0.3), typed("yz", 9, element(kind)),
         typed("b", rng.integers(-9999, 9999, 4), TensorProto.INT32)],
        [info("x", [2, 3, 6, 7], element(kind))],
        [helper.make_empty_tensor_value_info("y")], 13,
    )  # fmt: skip
    content = with_outputs(content, {"y": ([2, 4, 3, 7], element(kind))})
    reading = read(content, tmp_path)
    assert [n.name for n in reading.graph if n.op == "Conv"] == ["conv"]
    assert only(reading.graph, "DequantizeWeights").attrs["bits"] == 8
    assert reading.kept == ()
    at_most_a_step(reading, content, {"x": integers(rng, kind, (2, 3, 6, 7))})


def with_outputs(content: bytes, outputs: dict[str, tuple[list[int], int]]) -> bytes:
    model = onnx.load_from_string(content)
    del model.graph.output[:]
    model.graph.output.extend(info(name, *kind) for name, kind in outputs.items())
    return bytes(model.SerializeToString())


@SIGNS
@pytest.mark.parametrize("per_column", [False, True])
def test_qlinear_matmul(tmp_path: Path, kind: str, per_column: bool) -> None:
    rng = np.random.default_rng(1)
    shape = (4,) if per_column else ()
    content = file(
        [node("QLinearMatMul", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"], "product")],
        [floats("xs", 0.05), typed("xz", 7, element(kind)),
         typed("w", integers(rng, kind, (6, 4)), element(kind)),
         floats("ws", rng.uniform(0.001, 0.01, shape)),
         typed("wz", np.full(shape, 2), element(kind)), floats("ys", 0.02),
         typed("yz", 9, element(kind))],
        [info("x", [5, 6], element(kind))], [info("y", [5, 4], element(kind))], 13,
    )  # fmt: skip
    reading = read(content, tmp_path)
    assert ops(reading.graph).count("DequantizeWeights") == 1
    at_most_a_step(reading, content, {"x": integers(rng, kind, (5, 6))})


def test_qlinear_matmul_of_two_activations(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    content = file(
        [node("QLinearMatMul", ["x", "s", "z", "w", "s", "z", "ys", "z"], ["y"], "product")],
        [floats("s", 0.05), typed("z", 7, TensorProto.UINT8), floats("ys", 1.5)],
        [info("x", [2, 5, 6], TensorProto.UINT8), info("w", [2, 6, 3], TensorProto.UINT8)],
        [info("y", [2, 5, 3], TensorProto.UINT8)], 13,
    )  # fmt: skip
    reading = read(content, tmp_path)
    feeds = {"x": integers(rng, "UINT8", (2, 5, 6)), "w": integers(rng, "UINT8", (2, 6, 3))}
    at_most_a_step(reading, content, feeds)


@pytest.mark.parametrize("weight", ["INT8", "UINT8"])
@pytest.mark.parametrize("zeros", ["none", "one", "each"])
def test_conv_integer_is_exact(tmp_path: Path, weight: str, zeros: str) -> None:
    rng = np.random.default_rng(2)
    operands = ["x", "w"] + ({"none": [], "one": ["xz", "wz"], "each": ["xz", "wz"]}[zeros])
    offsets = np.asarray(5) if zeros == "one" else np.array([5, 9, 0, 1])
    content = file(
        [node("ConvInteger", operands, ["y"], "conv", pads=[1, 1, 1, 1], group=2)],
        [typed("w", integers(rng, weight, (4, 2, 3, 3)), element(weight)),
         typed("xz", 77, TensorProto.UINT8), typed("wz", offsets, element(weight))],
        [info("x", [1, 4, 5, 5], TensorProto.UINT8)],
        [info("y", [1, 4, 5, 5], TensorProto.INT32)], 13,
    )  # fmt: skip
    graph = read(content, tmp_path).graph
    assert ops(graph) == ["IntConv"]
    feeds = {"x": integers(rng, "UINT8", (1, 4, 5, 5))}
    w = onnx.numpy_helper.to_array(onnx.load_from_string(content).graph.initializer[0])
    shift = np.broadcast_to(0 if zeros == "none" else offsets, 4).reshape(4, 1, 1, 1)
    x = feeds["x"].astype(np.int64) - (0 if zeros == "none" else 77)
    want = grouped_conv(x, w.astype(np.int64) - shift)
    from mpqc import reference

    np.testing.assert_array_equal(reference.run(graph, feeds)["y"], want)


def grouped_conv(x: Array, w: Array) -> Array:
    """Two groups, a border of one, 3x3."""
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
    out = np.zeros((1, 4, 5, 5), np.int64)
    for o in range(4):
        for row in range(5):
            for column in range(5):
                first = o // 2 * 2
                taps = padded[0, first : first + 2, row : row + 3, column : column + 3]
                out[0, o, row, column] = (taps * w[o]).sum()
    return out


@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 2, 0, 1]])
def test_dynamic_zero_points_of_a_convolution_are_exact(tmp_path: Path, pads: list[int]) -> None:
    rng = np.random.default_rng(2)
    shape = [1, 4, 3 + pads[0] + pads[2], 4 + pads[1] + pads[3]]
    content = file(
        [
            node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            node("ConvInteger", ["q", "w", "z"], ["y"], "conv", pads=pads),
        ],
        [typed("w", integers(rng, "UINT8", (4, 3, 3, 3)), TensorProto.UINT8)],
        [info("x", [1, 3, 5, 6])], [info("y", shape, TensorProto.INT32)], 13,
    )  # fmt: skip
    graph = read(content, tmp_path).graph
    assert ops(graph).count("IntConv") == 1
    from mpqc import reference

    for low in (-1, 0.5):
        feeds = {"x": rng.uniform(low, 2, (1, 3, 5, 6)).astype(np.float32)}
        np.testing.assert_array_equal(
            reference.run(graph, feeds)["y"], Session(content).run(feeds)["y"]
        )


def test_matmul_integer_of_two_activations(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    content = file(
        [node("MatMulInteger", ["x", "w", "z", "z"], ["y"], "product")],
        [typed("z", 7, TensorProto.UINT8)],
        [info("x", [5, 6], TensorProto.UINT8), info("w", [6, 3], TensorProto.UINT8)],
        [info("y", [5, 3], TensorProto.INT32)], 13,
    )  # fmt: skip
    reading = read(content, tmp_path)
    assert [kept.node for kept in reading.kept] == ["product"]
    feeds = {"x": integers(rng, "UINT8", (5, 6)), "w": integers(rng, "UINT8", (6, 3))}
    want = (feeds["x"].astype(np.int64) - 7) @ (feeds["w"].astype(np.int64) - 7)
    np.testing.assert_array_equal(compute(reading.graph, feeds)["y"], want)


def test_sums_that_floats_cannot_hold_are_refused(tmp_path: Path) -> None:
    content = file(
        [node("MatMulInteger", ["x", "w"], ["y"], "product")], [],
        [info("x", [1, 600], TensorProto.UINT8), info("w", [600, 1], TensorProto.UINT8)],
        [info("y", [1, 1], TensorProto.INT32)], 13,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"'product'.*600 in a sum"):
        read(content, tmp_path)


# ---- ONNX Runtime's own --------------------------------------------------------------------------


def contrib(op: str, operands: list[str], **attrs: Any) -> Any:
    return node(op, operands, ["y"], "it", domain="com.microsoft", **attrs)


def rules(kind: str) -> list[Any]:
    made = []
    for name, scale, zero in (("a", 0.0512347, 3), ("b", 0.0207, 9), ("y", 0.0297773, 5)):
        made += [floats(f"{name}s", scale), typed(f"{name}z", zero, element(kind))]
    return made


@SIGNS
@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
@pytest.mark.parametrize("constant", [False, True])
def test_binary(tmp_path: Path, op: str, kind: str, constant: bool) -> None:
    rng = np.random.default_rng(3)
    b = integers(rng, kind, (3, 1, 1))
    inputs = [info("a", [2, 3, 4, 4], element(kind))]
    constants = rules(kind)
    if constant:
        constants.append(typed("b", b, element(kind)))
    else:
        inputs.append(info("b", [3, 1, 1], element(kind)))
    content = file(
        [contrib(op, ["a", "as", "az", "b", "bs", "bz", "ys", "yz"])], constants, inputs,
        [info("y", [2, 3, 4, 4], element(kind))], 13, CONTRIB,
    )  # fmt: skip
    reading = read(content, tmp_path)
    feeds = {"a": integers(rng, kind, (2, 3, 4, 4))} | ({} if constant else {"b": b})
    at_most_a_step(reading, content, feeds)


UNARY: dict[str, tuple[dict[str, Any], list[int]]] = {
    "QLinearSigmoid": ({}, [2, 3, 6, 6]),
    "QLinearLeakyRelu": ({"alpha": 0.2}, [2, 3, 6, 6]),
    "QLinearAveragePool": ({"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0]},
                           [2, 3, 3, 3]),
    "QLinearGlobalAveragePool": ({"channels_last": 0}, [2, 3, 1, 1]),
}  # fmt: skip


@SIGNS
@pytest.mark.parametrize("op", sorted(UNARY))
def test_unary(tmp_path: Path, op: str, kind: str) -> None:
    rng = np.random.default_rng(4)
    attrs, shape = UNARY[op]
    content = file(
        [contrib(op, ["a", "as", "az", "ys", "yz"], **attrs)], rules(kind),
        [info("a", [2, 3, 6, 6], element(kind))], [info("y", shape, element(kind))], 13, CONTRIB,
    )  # fmt: skip
    want_shape(content, tmp_path, tuple(shape))
    reading = read(content, tmp_path)
    at_most_a_step(reading, content, {"a": integers(rng, kind, (2, 3, 6, 6))})


def want_shape(content: bytes, folder: Path, shape: tuple[int, ...]) -> None:
    """The importer finds the type itself: real files seldom tell it."""
    model = onnx.load_from_string(content)
    name = model.graph.output[0].name
    kind = model.graph.output[0].type.tensor_type.elem_type
    model.graph.node.append(node("Identity", [name], ["renamed"]))
    model.graph.node.append(node("Cast", ["renamed"], ["end"], to=TensorProto.FLOAT))
    model.graph.output.append(info("end", list(shape)))
    del model.graph.output[0]
    del kind
    assert read(bytes(model.SerializeToString()), folder).graph.shape("end") == shape


def test_global_pool_of_channels_last(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    content = file(
        [contrib("QLinearGlobalAveragePool", ["a", "as", "az", "ys", "yz"], channels_last=1)],
        rules("UINT8"), [info("a", [2, 6, 6, 3], TensorProto.UINT8)],
        [info("y", [2, 1, 1, 3], TensorProto.UINT8)], 13, CONTRIB,
    )  # fmt: skip
    want_shape(content, tmp_path, (2, 1, 1, 3))
    reading = read(content, tmp_path)
    at_most_a_step(reading, content, {"a": integers(rng, "UINT8", (2, 6, 6, 3))})


@pytest.mark.parametrize(("axis", "opset"), [(-1, 13), (1, 12), (2, 13)])
def test_softmax(tmp_path: Path, axis: int, opset: int) -> None:
    rng = np.random.default_rng(4)
    constants = [
        floats("as", 0.05), typed("az", 3, TensorProto.UINT8), floats("ys", 1 / 256),
        typed("yz", 0, TensorProto.UINT8),
    ]  # fmt: skip
    content = file(
        [contrib("QLinearSoftmax", ["a", "as", "az", "ys", "yz"], axis=axis, opset=opset)],
        constants, [info("a", [2, 3, 4], TensorProto.UINT8)],
        [info("y", [2, 3, 4], TensorProto.UINT8)], 13, CONTRIB,
    )  # fmt: skip
    reading = read(content, tmp_path)
    feeds = {"a": integers(rng, "UINT8", (2, 3, 4))}
    got, want = compute(reading.graph, feeds)["y"], Session(content).run(feeds)["y"]
    # ONNX Runtime takes exponentials from a table of integers
    assert steps_apart(got, want, 1.0)[1] <= 1


def test_concat(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    content = file(
        [contrib("QLinearConcat", ["ys", "yz", "a", "as", "az", "b", "bs", "bz"], axis=1)],
        rules("UINT8"),
        [info("a", [2, 3, 4], TensorProto.UINT8), info("b", [2, 2, 4], TensorProto.UINT8)],
        [info("y", [2, 5, 4], TensorProto.UINT8)], 13, CONTRIB,
    )  # fmt: skip
    want_shape(content, tmp_path, (2, 5, 4))
    reading = read(content, tmp_path)
    feeds = {"a": integers(rng, "UINT8", (2, 3, 4)), "b": integers(rng, "UINT8", (2, 2, 4))}
    at_most_a_step(reading, content, feeds)


@pytest.mark.parametrize("codes_out", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_gemm(tmp_path: Path, codes_out: bool, transposed: bool) -> None:
    rng = np.random.default_rng(6)
    b = integers(rng, "UINT8", (4, 6) if transposed else (6, 4))
    out = TensorProto.UINT8 if codes_out else TensorProto.FLOAT
    content = file(
        [contrib("QGemm", ["a", "as", "az", "b", "bs", "bz", "c"] + ["ys", "yz"] * codes_out,
                 transB=int(transposed), alpha=0.5)],
        [*rules("UINT8"), typed("b", b, TensorProto.UINT8),
         typed("c", rng.integers(-999, 999, 4), TensorProto.INT32)],
        [info("a", [5, 6], TensorProto.UINT8)], [info("y", [5, 4], out)], 13, CONTRIB,
    )  # fmt: skip
    reading = read(content, tmp_path)
    assert only(reading.graph, "Gemm").name == "it"
    feeds = {"a": integers(rng, "UINT8", (5, 6))}
    if codes_out:
        at_most_a_step(reading, content, feeds)
    else:
        want = Session(content).run(feeds)["y"]
        np.testing.assert_allclose(compute(reading.graph, feeds)["y"], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("zeros", [False, True])
def test_n_bit_products(tmp_path: Path, bits: int, block: int, zeros: bool) -> None:
    rng = np.random.default_rng(7)
    k, n = 40, 6
    blocks, each = -(-k // block), 8 // bits
    packed = rng.integers(0, 256, (n, blocks, block // each))
    scales = rng.uniform(0.01, 0.1, n * blocks).astype(np.float32)
    row = -(-blocks // each)
    zero = rng.integers(0, 256, n * row)
    operands = ["x", "w", "s"] + ["z"] * zeros
    content = file(
        [contrib("MatMulNBits", operands, K=k, N=n, bits=bits, block_size=block)],
        [typed("w", packed, TensorProto.UINT8), floats("s", scales),
         typed("z", zero, TensorProto.UINT8)][: len(operands) - 1],
        [info("x", [3, k])], [info("y", [3, n])], 13, CONTRIB,
    )  # fmt: skip
    want_shape(content, tmp_path, (3, n))
    reading = read(content, tmp_path)
    (kept,) = reading.kept
    assert f"{bits} bits in blocks of {block}" in kept.reason
    x = rng.standard_normal((3, k)).astype(np.float32)
    try:
        want = Session(content).run({"x": x})["y"]
    except ModelError as error:
        pytest.skip(f"ONNX Runtime has no kernel for {bits} bits: {error}")
    np.testing.assert_allclose(compute(reading.graph, {"x": x})["y"], want, rtol=1e-3, atol=1e-3)


def test_n_bit_products_of_one_block_are_quantized_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    content = file(
        [contrib("MatMulNBits", ["x", "w", "s"], K=30, N=6, bits=4, block_size=32)],
        [typed("w", rng.integers(0, 256, (6, 1, 16)), TensorProto.UINT8),
         floats("s", rng.uniform(0.01, 0.1, 6))],
        [info("x", [3, 30])], [info("y", [3, 6])], 13, CONTRIB,
    )  # fmt: skip
    reading = read(content, tmp_path)
    assert reading.kept == ()
    values, scale = weights_of(reading.graph, only(reading.graph, "DequantizeWeights"))
    assert values.min() >= -8
    assert values.max() <= 7
    assert scale.shape == (6,)
    x = rng.standard_normal((3, 30)).astype(np.float32)
    want = Session(content).run({"x": x})["y"]
    np.testing.assert_allclose(compute(reading.graph, {"x": x})["y"], want, rtol=1e-4, atol=1e-4)


def test_ort_spells_qdq_of_16_bits_in_its_own_domain(tmp_path: Path) -> None:
    domain = {"domain": "com.microsoft"}
    content = file(
        [
            node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize", **domain),
            node("DequantizeLinear", ["q", "s", "z"], ["y"], "dequantize", **domain),
        ],
        [floats("s", 0.01), typed("z", 3, TensorProto.INT16)],
        [info("x", [3, 4])], [info("y", [3, 4])], 13, CONTRIB,
    )  # fmt: skip
    reading = read(content, tmp_path)
    assert [kept.node for kept in reading.kept] == ["quantize"]
    x = np.random.default_rng(0).uniform(-400, 400, (3, 4)).astype(np.float32)
    want = Session(content).run({"x": x})["y"]
    np.testing.assert_array_equal(compute(reading.graph, {"x": x})["y"], want)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("as", floats("as", 0.0), "'it' has the scale 0"),
        ("ys", floats("ys", float("nan")), "'it' has a scale that is not finite"),
        ("az", typed("az", 1, TensorProto.INT8), "'it' has codes of type uint8 and a zero point"),
        ("yz", typed("yz", 1, TensorProto.INT8), "'it' gives codes of type uint8"),
        ("bs", floats("bs", [1.0, 2.0]), r"'it' has 2 numbers as scale"),
    ],
)
def test_bad_rules_are_named(tmp_path: Path, name: str, tensor: Any, message: str) -> None:
    constants = [made for made in rules("UINT8") if made.name != name]
    content = file(
        [contrib("QLinearAdd", ["a", "as", "az", "b", "bs", "bz", "ys", "yz"])],
        [*constants, tensor],
        [info("a", [2, 3], TensorProto.UINT8), info("b", [2, 3], TensorProto.UINT8)],
        [info("y", [2, 3], TensorProto.UINT8)], 13, CONTRIB,
    )  # fmt: skip
    with pytest.raises(ModelError, match=message):
        read(content, tmp_path)


def test_n_bit_weights_of_the_wrong_size_are_named(tmp_path: Path) -> None:
    content = file(
        [contrib("MatMulNBits", ["x", "w", "s"], K=32, N=6, bits=4, block_size=32)],
        [typed("w", np.zeros((6, 1, 15)), TensorProto.UINT8), floats("s", np.ones(6))],
        [info("x", [3, 32])], [info("y", [3, 6])], 13, CONTRIB,
    )  # fmt: skip
    with pytest.raises(ModelError, match="'it' holds 90 bytes and 6 scales"):
        read(content, tmp_path)
