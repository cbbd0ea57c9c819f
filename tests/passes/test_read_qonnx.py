"""QONNX, against its definitions in numpy; and those, and whole models, against the qonnx package.

The package comes with the dev extra; without it the tests that need it are skipped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from mpqc import importer, pipeline
from mpqc.errors import ModelError
from mpqc.graph import Precision
from mpqc.passes.find_layers import find_integer_layers
from mpqc.passes.read_quantizers import Reading, read_quantizers
from tests.passes.quantized_files import (
    Array,
    compiled,
    compute,
    file,
    floats,
    info,
    library,
    only,
    ops,
    read,
    typed,
    weights_of,
)

node = helper.make_node
DOMAIN = "qonnx.custom_op.general"
MODES = ("ROUND", "HALF_EVEN", "CEIL", "FLOOR", "UP", "DOWN", "HALF_UP", "HALF_DOWN")
SEED = st.integers(0, 2**31)
ALL = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)

# ---- the definitions -----------------------------------------------------------------------------

ROUNDED: dict[str, Callable[[Array], Array]] = {
    "ROUND": np.round,
    "HALF_EVEN": np.round,
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "UP": lambda x: np.sign(x) * np.ceil(np.abs(x)),
    "DOWN": np.fix,
    "HALF_UP": lambda x: np.sign(x) * np.floor(np.abs(x) + 0.5),
    "HALF_DOWN": lambda x: np.sign(x) * np.ceil(np.abs(x) - 0.5),
}


def limits(bits: Array, signed: bool, narrow: bool) -> tuple[Array, Array]:
    bits = bits.astype(np.int64)
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0 * bits, 2**bits - 1 - narrow


def int_quant(
    x: Array, scale: Any, zero: Any, bits: Array, signed: bool, narrow: bool, mode: str
) -> Array:
    steps = x / scale + zero
    if signed and (bits == 1).all():
        codes = np.where(steps >= 0, 1, -1)
    else:
        low, high = limits(bits, signed, narrow)
        clipped = np.minimum(np.maximum(steps, low.astype(np.float32)), high.astype(np.float32))
        codes = ROUNDED[mode](clipped)
    return np.asarray((codes - zero) * scale, np.float32)


def trunc_v2(
    x: Array, scale: Any, zero: Any, out_scale: Any, bits: Array, signed: bool, narrow: bool,
    mode: str,
) -> Array:  # fmt: skip
    steps = np.round(x / scale + zero)
    factor = 2 ** np.round(np.log2(out_scale / scale))
    low, high = limits(bits, signed, narrow)
    steps = np.minimum(np.maximum(steps / factor, low), high)
    return np.asarray((ROUNDED[mode](steps) - zero / factor) * out_scale, np.float32)


# ---- files ---------------------------------------------------------------------------------------


def quant_file(
    x: Any, scale: Any, zero: Any, bits: Any, *, op: str = "Quant", domain: str = DOMAIN,
    constant: bool = False, **attrs: Any,
) -> bytes:  # fmt: skip
    constants = [floats("s", scale), floats("z", zero), floats("b", bits)]
    shape = list(np.shape(x))
    made = node(op, ["x", "s", "z", "b"], ["y"], "quant", domain=domain, **attrs)
    if not constant:
        return file([made], constants, [info("x", shape)], [info("y", shape)], 13, {domain: 1})
    layer = node("MatMul", ["d", "y"], ["out"], "layer")
    return file(
        [made, layer], [*constants, floats("x", x)], [info("d", [1, shape[0]])],
        [info("out", [1, shape[1]])], 13, {domain: 1},
    )  # fmt: skip


def data(rng: np.random.Generator, shape: tuple[int, ...], scale: Any, span: float) -> Array:
    """Ties, integers and anything between, over the range and beyond."""
    steps = rng.uniform(-1.5 * span, 1.5 * span, shape)
    whole = np.floor(steps)
    kind = rng.integers(0, 3, shape)
    picked = np.where(kind == 0, whole, np.where(kind == 1, whole + 0.5, steps))
    drawn: Array = (picked * scale).astype(np.float32)
    return drawn


# ---- activations ---------------------------------------------------------------------------------


@ALL
@given(
    st.sampled_from(MODES), st.integers(1, 9), st.booleans(), st.booleans(),
    st.sampled_from(["one", "channel", "element"]), st.sampled_from([1.0, 0.25, 0.3]), SEED,
)  # fmt: skip
def test_activations(
    tmp_path: Path, mode: str, bits: int, signed: bool, narrow: bool, shape: str, scale: float,
    seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    shapes = {"one": (), "channel": (3, 1), "element": (2, 3, 4)}
    factors = np.float32(scale) * (2.0 ** rng.integers(-2, 3, shapes[shape])).astype(np.float32)
    zero = np.zeros((), np.float32)
    x = data(rng, (2, 3, 4), factors, 2.0**bits)
    content = quant_file(
        x, factors, zero, bits, signed=int(signed), narrow=int(narrow), rounding_mode=mode
    )
    reading = read(content, tmp_path)
    got = compute(reading.graph, {"x": x})["y"]
    want = int_quant(x, factors, zero, np.array(bits), signed, narrow, mode)
    np.testing.assert_array_equal(got, want)
    direct = shape == "one" and bits <= 8 and (mode in MODES[:2] or (bits == 1 and signed))
    assert bool(reading.kept) != direct or float(np.ptp(factors)) == 0
    if bits <= 8:
        assert only(reading.graph, "Quantize").attrs["bits"] == bits


@ALL
@given(st.integers(2, 8), st.booleans(), SEED)
def test_zero_points(tmp_path: Path, bits: int, signed: bool, seed: int) -> None:
    """Codes of asymmetric activations, the same but for ties, which an odd zero point moves."""
    rng = np.random.default_rng(seed)
    low, high = limits(np.array(bits), signed, False)
    zero = np.float32(rng.integers(low, high + 1))
    scale = np.float32(0.25)
    x = rng.uniform(-(2.0**bits), 2.0**bits, (2, 3, 4)).astype(np.float32)
    content = quant_file(x, scale, zero, bits, signed=int(signed), narrow=0)
    graph = read(content, tmp_path).graph
    assert ops(graph) == ["Quantize", "Dequantize"]
    got = compute(graph, {"x": x})["y"]
    want = int_quant(x, scale, zero, np.array(bits), signed, False, "ROUND")
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("zero", [0.5, 300.0, -3.0])
def test_zero_points_without_a_code_are_exact_and_listed(tmp_path: Path, zero: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-99, 99, (2, 3, 4)).astype(np.float32)
    reading = read(quant_file(x, 0.25, zero, 8, signed=0, narrow=0), tmp_path)
    assert [kept.node for kept in reading.kept] == ["quant"]
    want = int_quant(x, np.float32(0.25), np.float32(zero), np.array(8), False, False, "ROUND")
    np.testing.assert_array_equal(compute(reading.graph, {"x": x})["y"], want)


def test_widths_may_differ_by_channel(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bits = np.array([2, 4, 8], np.float32).reshape(3, 1)
    x = data(rng, (2, 3, 4), np.float32(0.5), 200)
    reading = read(quant_file(x, 0.5, 0, bits, signed=1, narrow=0), tmp_path)
    want = int_quant(x, np.float32(0.5), np.float32(0), bits, True, False, "ROUND")
    np.testing.assert_array_equal(compute(reading.graph, {"x": x})["y"], want)
    assert only(reading.graph, "Quantize").attrs["bits"] == 8


@pytest.mark.parametrize("bits", [12, 16, 24, 32])
def test_wide_activations_are_float_and_listed(tmp_path: Path, bits: int) -> None:
    rng = np.random.default_rng(0)
    x = data(rng, (2, 3, 4), np.float32(0.5), 2.0**bits)
    reading = read(quant_file(x, 0.5, 0, bits, signed=1, narrow=1), tmp_path)
    want = int_quant(x, np.float32(0.5), np.float32(0), np.array(bits), True, True, "ROUND")
    np.testing.assert_array_equal(compute(reading.graph, {"x": x})["y"], want)
    (kept,) = reading.kept
    assert f"{bits} bits" in kept.reason


@pytest.mark.parametrize("scale", [np.float32(1), np.float32(0.3), np.ones((3, 1)) * 0.7])
def test_bipolar_activations(tmp_path: Path, scale: Any) -> None:
    content = file(
        [node("BipolarQuant", ["x", "s"], ["y"], "quant", domain="onnx.brevitas")],
        [floats("s", scale)], [info("x", [2, 3, 4])], [info("y", [2, 3, 4])], 13,
        {"onnx.brevitas": 1},
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    x.flat[:6] = 0, -0.0, 1e-15, -1e-15, 3e38, -3e38
    reading = read(content, tmp_path)
    got = compute(reading.graph, {"x": x})["y"]
    factor = np.asarray(scale, np.float32)
    np.testing.assert_array_equal(got, np.where(x >= 0, factor, -factor))
    assert only(reading.graph, "Quantize").attrs["bits"] == 1
    assert reading.kept == ()


def test_scales_that_data_decide(tmp_path: Path) -> None:
    content = file(
        [
            node("ReduceMax", ["x"], ["m"], keepdims=0),
            node("Mul", ["m", "part"], ["s"]),
            node("Quant", ["x", "s", "z", "b"], ["y"], "quant", domain=DOMAIN, signed=1, narrow=0),
        ],
        [floats("z", 0), floats("b", 4), floats("part", 1 / 8)],
        [info("x", [2, 3, 4])], [info("y", [2, 3, 4])], 13, {DOMAIN: 1},
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    reading = read(content, tmp_path)
    want = int_quant(x, x.max() / 8, np.float32(0), np.array(4), True, False, "ROUND")
    np.testing.assert_array_equal(compute(reading.graph, {"x": x})["y"], want)
    assert [kept.node for kept in reading.kept] == ["quant"]


# ---- weights -------------------------------------------------------------------------------------


@ALL
@given(
    st.sampled_from(MODES), st.integers(1, 12), st.booleans(), st.booleans(),
    st.sampled_from([(), (1,), (1, 5), (5,), (6, 1)]), SEED,
)  # fmt: skip
def test_weights(
    tmp_path: Path, mode: str, bits: int, signed: bool, narrow: bool, shape: tuple[int, ...],
    seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.01, 1, shape).astype(np.float32)
    w = data(rng, (6, 5), np.broadcast_to(scale, (6, 5)), 2.0 ** (bits - 1))
    zero = np.float32(0 if signed else rng.integers(0, 3))
    content = quant_file(
        w, scale, zero, bits, constant=True, signed=int(signed), narrow=int(narrow),
        rounding_mode=mode, op="IntQuant",
    )  # fmt: skip
    graph = read(content, tmp_path).graph
    made = only(graph, "DequantizeWeights")
    values, factors = weights_of(graph, made)
    want = int_quant(w, scale, zero, np.array(bits), signed, narrow, mode)
    assert made.attrs["bits"] == bits
    assert made.attrs["levels"] == ("odd" if bits == 1 and signed else "signed")
    assert factors.size == max(1, scale.size)
    told = compute(graph.with_(outputs=[made.output]), {"d": np.zeros((1, 6), np.float32)})
    np.testing.assert_array_equal(told[made.output], want)
    assert values.dtype == np.int16


def test_weights_of_several_scales_are_float_and_listed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.1, 1, (6, 5)).astype(np.float32)
    w = rng.standard_normal((6, 5)).astype(np.float32)
    reading = read(quant_file(w, scale, 0, 4, constant=True, signed=1, narrow=0), tmp_path)
    assert ops(reading.graph) == ["MatMul"]
    (kept,) = reading.kept
    assert (kept.node, "several axes" in kept.reason) == ("quant", True)
    want = int_quant(w, scale, np.float32(0), np.array(4), True, False, "ROUND")
    np.testing.assert_array_equal(reading.graph.constants["y"], want)


def test_weights_of_scales_that_are_multiples_are_integers(tmp_path: Path) -> None:
    """What HGQ trains: a width and a power of two for each weight."""
    rng = np.random.default_rng(0)
    scale = (2.0 ** rng.integers(-3, 0, (6, 5))).astype(np.float32)
    w = rng.uniform(-2, 2, (6, 5)).astype(np.float32)
    bits = rng.integers(2, 5, (6, 5)).astype(np.float32)
    reading = read(quant_file(w, scale, 0, bits, constant=True, signed=1, narrow=0), tmp_path)
    made = only(reading.graph, "DequantizeWeights")
    values, factors = weights_of(reading.graph, made)
    want = int_quant(w, scale, np.float32(0), bits, True, False, "ROUND")
    np.testing.assert_array_equal(values * factors, want)
    assert factors.tolist() == [0.125]
    assert made.attrs["bits"] == 6
    assert reading.kept == ()


def test_bipolar_weights(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    w[0, 0] = 0
    content = file(
        [
            node("BipolarQuant", ["w", "s"], ["q"], "quant", domain=DOMAIN),
            node("Transpose", ["q"], ["t"], "transpose", perm=[1, 0]),
            node("MatMul", ["x", "t"], ["y"], "layer"),
        ],
        [floats("w", w), floats("s", 0.5)], [info("x", [1, 5])], [info("y", [1, 6])], 13,
        {DOMAIN: 1},
    )  # fmt: skip
    graph = read(content, tmp_path).graph
    made = only(graph, "DequantizeWeights")
    values, scale = weights_of(graph, made)
    assert (made.attrs["bits"], made.attrs["levels"]) == (1, "odd")
    np.testing.assert_array_equal(values, np.where(w >= 0, 1, -1).T)
    np.testing.assert_array_equal(scale, [0.5])


def test_quantized_biases_are_constants(tmp_path: Path) -> None:
    content = file(
        [
            node("Quant", ["w", "s", "z", "b"], ["q"], "quant", domain=DOMAIN),
            node("Add", ["x", "q"], ["y"], "layer"),
        ],
        [floats("w", [0.3, -9, 0.24]), floats("s", 0.5), floats("z", 0), floats("b", 4)],
        [info("x", [1, 3])], [info("y", [1, 3])], 13, {DOMAIN: 1},
    )  # fmt: skip
    graph = read(content, tmp_path).graph
    assert ops(graph) == ["Add"]
    np.testing.assert_array_equal(graph.constants["q"], np.array([0.5, -3.5, 0], np.float32))


# ---- Trunc ---------------------------------------------------------------------------------------


@ALL
@given(st.sampled_from(MODES), st.integers(1, 8), st.booleans(), st.booleans(), SEED)
def test_trunc_of_version_2(
    tmp_path: Path, mode: str, bits: int, signed: bool, narrow: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    if bits == 1 and (narrow or signed):
        return  # one code
    scale, out_scale = np.float32(0.25), np.float32(0.25 * 2.0 ** rng.integers(0, 5))
    zero = np.float32(0)
    x = data(rng, (2, 3, 4), scale, 2.0**bits)
    content = file(
        [node("Trunc", ["x", "s", "z", "ib", "os", "ob"], ["y"], "trunc", domain=DOMAIN,
              signed=int(signed), narrow=int(narrow), rounding_mode=mode)],
        [floats("s", scale), floats("z", zero), floats("ib", bits + 4), floats("os", out_scale),
         floats("ob", bits)],
        [info("x", [2, 3, 4])], [info("y", [2, 3, 4])], 13, {DOMAIN: 2},
    )  # fmt: skip
    reading = read(content, tmp_path)
    got = compute(reading.graph, {"x": x})["y"]
    want = trunc_v2(x, scale, zero, out_scale, np.array(bits), signed, narrow, mode)
    np.testing.assert_array_equal(got, want)
    made = only(reading.graph, "Quantize")
    assert made.attrs["bits"] <= bits


@pytest.mark.parametrize("mode", MODES)
def test_trunc_of_version_1(tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    x = data(rng, (2, 3, 4), np.float32(0.5), 200)
    content = file(
        [node("Trunc", ["x", "s", "z", "ib", "ob"], ["y"], "trunc", domain="onnx.brevitas",
              rounding_mode=mode)],
        [floats("s", 0.5), floats("z", 3), floats("ib", 8), floats("ob", 5)],
        [info("x", [2, 3, 4])], [info("y", [2, 3, 4])], 13, {"onnx.brevitas": 1},
    )  # fmt: skip
    reading = read(content, tmp_path)
    steps = np.round(x / np.float32(0.5) + np.float32(3)) / np.float32(8)
    want = (ROUNDED[mode](steps) - np.float32(3)) * np.float32(0.5)
    np.testing.assert_array_equal(compute(reading.graph, {"x": x})["y"], want)
    assert [kept.node for kept in reading.kept] == ["trunc"]


# ---- compiled --------------------------------------------------------------------------------

# rounding, weight bits, activation bits, signed, narrow, scale of the activations, zero point
LAYERS = [
    ("ROUND", 4, 4, True, False, 0.25, 0),
    ("HALF_EVEN", 3, 2, False, False, 0.3, 0),
    ("CEIL", 2, 3, True, True, 0.25, 0),
    ("FLOOR", 8, 8, True, False, 0.3, 0),
    ("UP", 5, 6, False, True, 0.25, 0),
    ("DOWN", 7, 5, True, False, 0.1, 0),
    ("HALF_UP", 1, 4, True, False, 0.25, 0),
    ("HALF_DOWN", 6, 7, True, True, 0.3, 0),
    ("ROUND", 4, 8, False, False, 0.25, 100),
    ("ROUND", 4, 1, True, False, 0.25, 0),
    ("FLOOR", 3, 4, True, False, 0.25, 3),
]


@pytest.mark.parametrize(
    ("mode", "weight_bits", "bits", "signed", "narrow", "scale", "zero"), LAYERS
)
def test_layers_run_on_integers(
    tmp_path: Path, mode: str, weight_bits: int, bits: int, signed: bool, narrow: bool,
    scale: float, zero: int,
) -> None:  # fmt: skip
    """Quantizers of any rounding, and between them a layer, from file to library."""
    rng = np.random.default_rng(bits)
    w = rng.uniform(-1, 1, (6, 4, 3, 3)).astype(np.float32)
    channels = rng.uniform(0.1, 0.3, (6, 1, 1, 1)).astype(np.float32)
    content = file(
        [
            node("Quant", ["x", "s", "z", "b"], ["q"], "data", domain=DOMAIN,
                 signed=int(signed), narrow=int(narrow), rounding_mode=mode),
            node("Quant", ["w", "ws", "wz", "wb"], ["v"], "weights", domain=DOMAIN, signed=1,
                 narrow=1, rounding_mode=mode),
            node("Conv", ["q", "v"], ["y"], "layer"),
        ],
        [floats("s", scale), floats("z", zero), floats("b", bits), floats("w", w),
         floats("ws", channels), floats("wz", 0), floats("wb", weight_bits)],
        [info("x", [1, 4, 6, 6])], [info("y", [1, 6, 4, 4])], 13, {DOMAIN: 1},
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    found = find_integer_layers(pipeline.import_model(path))
    assert {layer.name: precision for layer, precision in found.items()} == {
        "layer": Precision(weight_bits, bits)
    }
    x = data(rng, (1, 4, 6, 6), np.float32(scale), 2.0**bits)
    codes = int_quant(x, np.float32(scale), np.float32(zero), np.array(bits), signed, narrow, mode)
    weights = int_quant(w, channels, np.float32(0), np.array(weight_bits), True, True, mode)
    windows = np.lib.stride_tricks.sliding_window_view(codes[0].astype(np.float64), (3, 3), (1, 2))
    want = np.einsum("chwyx,ocyx->ohw", windows, weights.astype(np.float64))[None]
    np.testing.assert_allclose(compiled(path, {"x": x})["y"], want, rtol=1e-5, atol=1e-4)


def test_scales_by_channel_run_in_depthwise_layers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scale = np.array([0.5, 0.25, 1, 0.125], np.float32).reshape(1, 4, 1, 1)
    w = rng.uniform(-1, 1, (4, 1, 3, 3)).astype(np.float32)
    content = file(
        [
            node("Quant", ["x", "s", "z", "b"], ["q"], "data", domain=DOMAIN, signed=1, narrow=0),
            node("Quant", ["w", "ws", "z", "b"], ["v"], "weights", domain=DOMAIN, signed=1,
                 narrow=0),
            node("Conv", ["q", "v"], ["y"], "layer", group=4),
        ],
        [floats("s", scale), floats("z", 0), floats("b", 4), floats("w", w), floats("ws", 0.125)],
        [info("x", [1, 4, 6, 6])], [info("y", [1, 4, 4, 4])], 13, {DOMAIN: 1},
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    imported = pipeline.read_model(path)
    assert [n.op for n in imported.graph if n.op in ("Conv", "IntConv")] == ["IntConv"]
    assert list(imported.kept) == ["data"]
    x = data(rng, (1, 4, 6, 6), scale, 16)
    want = compute(read_quantizers(importer.load(path)).graph, {"x": x})["y"]
    np.testing.assert_allclose(compiled(path, {"x": x})["y"], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
def test_truncated_means_run(tmp_path: Path, version: int) -> None:
    """What Brevitas writes for an average: the sum of codes, of which the low bits go."""
    operands = ["m", "s", "z", "ib", *(["os"] if version == 2 else []), "ob"]
    content = file(
        [
            node("Quant", ["x", "s", "z", "b"], ["q"], "data", domain=DOMAIN, signed=0, narrow=0),
            node("AveragePool", ["q"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
            node("Mul", ["p", "four"], ["m"], "sum"),
            node("Trunc", operands, ["t"], "trunc", domain=DOMAIN, signed=0, narrow=0,
                 rounding_mode="FLOOR"),
        ],
        [floats("s", 0.5), floats("z", 0), floats("b", 4), floats("four", 4), floats("ib", 6),
         floats("ob", 4), floats("os", 2)],
        [info("x", [1, 2, 4, 4])], [info("t", [1, 2, 2, 2])], 13, {DOMAIN: version},
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    x = np.random.default_rng(0).uniform(0, 8, (1, 2, 4, 4)).astype(np.float32)
    codes = np.clip(np.round(x / np.float32(0.5)), 0, 15)
    sums = codes.reshape(1, 2, 2, 2, 2, 2).sum(axis=(3, 5))
    want = np.floor(sums / 4) * (2 if version == 2 else 0.5)
    np.testing.assert_array_equal(compiled(path, {"x": x})["t"], want)


# ---- bad input -----------------------------------------------------------------------------------

X = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("scale", "zero", "bits", "attrs", "message"),
    [
        (0, 0, 4, {}, "'quant' has the scale 0"),
        (-2, 0, 4, {}, "'quant' has the scale -2"),
        (np.nan, 0, 4, {}, "'quant' has a scale that is not finite"),
        (np.inf, 0, 4, {}, "'quant' has a scale that is not finite"),
        (1, np.nan, 4, {}, "'quant' has a zero point that is not finite"),
        (1, 0, 0, {}, "'quant' has the bit width 0"),
        (1, 0, 33, {}, "'quant' has the bit width 33"),
        (1, 0, 2.5, {}, "'quant' has the bit width 2.5"),
        (1, 0, np.nan, {}, "'quant' has the bit width nan"),
        (np.ones(5), 0, 4, {}, r"'quant' has a scale of shape \[5\], which does not broadcast"),
        (1, 0, 4, {"rounding_mode": "STOCHASTIC"}, "'quant' rounds by 'STOCHASTIC'"),
    ],
)
@pytest.mark.parametrize("constant", [False, True])
def test_bad_quantizers_are_named(
    tmp_path: Path, scale: Any, zero: Any, bits: Any, attrs: dict[str, Any], message: str,
    constant: bool,
) -> None:  # fmt: skip
    content = quant_file(X, scale, zero, bits, constant=constant, signed=1, narrow=0, **attrs)
    with pytest.raises(ModelError, match=message):
        read(content, tmp_path)


def test_floats_of_few_bits_are_refused(tmp_path: Path) -> None:
    content = quant_file(X, 1, 0, 4, op="FloatQuant")
    with pytest.raises(ModelError, match="FloatQuant 'quant' rounds to floats of few bits"):
        read(content, tmp_path)


def test_missing_operands_are_named(tmp_path: Path) -> None:
    content = file(
        [node("Quant", ["x", "s"], ["y"], "quant", domain=DOMAIN)], [floats("s", 1)],
        [info("x", [2, 3])], [info("y", [2, 3])], 13, {DOMAIN: 1},
    )  # fmt: skip
    with pytest.raises(ModelError, match="'quant' lacks its operand 3 of 4"):
        read(content, tmp_path)


def test_a_quantizer_that_nobody_reads_goes(tmp_path: Path) -> None:
    content = file(
        [
            node("Quant", ["x", "s", "z", "b"], ["q"], "quant", domain=DOMAIN),
            node("Relu", ["x"], ["y"], "relu"),
        ],
        [floats("s", 1), floats("z", 0), floats("b", 4)],
        [info("x", [2, 3])], [info("y", [2, 3])], 13, {DOMAIN: 1},
    )  # fmt: skip
    assert ops(read(content, tmp_path).graph) == ["Relu"]


def test_a_quantizer_that_no_layer_reads_computes_what_it_says(tmp_path: Path) -> None:
    content = file(
        [
            node("Quant", ["x", "s", "z", "b"], ["q"], "data", domain=DOMAIN, signed=1, narrow=0),
            node("Quant", ["w", "s", "z", "b"], ["v"], "shift", domain=DOMAIN, signed=1, narrow=0),
            node("Add", ["q", "v"], ["a"], "add"),
            node("Abs", ["a"], ["y"], "size"),
        ],
        [floats("s", 0.25), floats("z", 0), floats("b", 4), floats("w", [[0.3, -9, 0.13]])],
        [info("x", [2, 3])], [info("y", [2, 3])], 13, {DOMAIN: 1},
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert pipeline.read_model(path).kept == {}
    x = data(np.random.default_rng(0), (2, 3), np.float32(0.25), 8)
    given = np.array([[0.3, -9, 0.13]], np.float32)
    rule = (np.float32(0.25), np.float32(0), np.array(4), True, False, "ROUND")
    want = np.abs(int_quant(x, *rule) + int_quant(given, *rule))
    np.testing.assert_array_equal(compiled(path, {"x": x})["y"], want)


# ---- the qonnx package ---------------------------------------------------------------------------


@ALL
@given(
    st.sampled_from(MODES), st.integers(1, 10), st.booleans(), st.booleans(), st.integers(0, 3),
    SEED,
)  # fmt: skip
def test_the_definitions_are_the_packages(
    mode: str, bits: int, signed: bool, narrow: bool, offset: int, seed: int
) -> None:
    package = pytest.importorskip("qonnx.custom_op.general.intquant", reason="qonnx is missing")
    rng = np.random.default_rng(seed)
    scale, zero = np.float32(rng.uniform(0.1, 1)), np.float32(offset)
    x = data(rng, (50,), scale, 2.0**bits)
    want = package.int_quant(x, scale, zero, np.array(bits), signed, narrow, mode)
    got = int_quant(x, scale, zero, np.array(bits), signed, narrow, mode)
    np.testing.assert_array_equal(got, want.astype(np.float32))
    trunc = pytest.importorskip("qonnx.custom_op.general.trunc", reason="qonnx is missing")
    out_scale = np.float32(scale * 4)
    want = trunc.trunc_v2(x, scale, zero, bits, narrow, signed, out_scale, np.array(bits), mode)
    got = trunc_v2(x, scale, zero, out_scale, np.array(bits), signed, narrow, mode)
    np.testing.assert_array_equal(got, want.astype(np.float32))


MODELS = {
    "TFC_1W1A.onnx": (1, 28, 28), "TFC_2W2A.onnx": (1, 28, 28), "jettagging_qkeras.onnx": (16,),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(MODELS))
def test_real_models_give_what_the_package_gives(
    name: str, shared_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = pytest.importorskip("qonnx.core.onnx_exec", reason="qonnx is missing")
    wrapper = pytest.importorskip("qonnx.core.modelwrapper", reason="qonnx is missing")
    shapes = pytest.importorskip("qonnx.transformation.infer_shapes", reason="qonnx is missing")
    made = executor.qonnx_make_model

    def readable(*args: Any, **options: Any) -> Any:  # ONNX Runtime lags behind onnx
        model = made(*args, **options)
        model.ir_version = 9
        return model

    monkeypatch.setattr(executor, "qonnx_make_model", readable)
    model = wrapper.ModelWrapper(str(shared_models / name)).transform(shapes.InferShapes())
    graph = read_quantizers(importer.load(shared_models / name)).graph
    (source,), (target,) = graph.inputs, graph.outputs
    rng = np.random.default_rng(0)
    with library(shared_models / name) as built:
        for _ in range(3):
            x = rng.uniform(0, 1, (1, *MODELS[name])).astype(np.float32)
            want = executor.execute_onnx(model, {source: x})[target]
            np.testing.assert_allclose(
                compute(graph, {source: x})[target], want, rtol=1e-5, atol=1e-6
            )
            got = built.run({source: x})[target]
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [
        ("TFC_1W1A.onnx", [1] * 4, [1] * 4),
        ("TFC_2W2A.onnx", [2] * 4, [2] * 4),
        ("jettagging_qkeras.onnx", [6] * 4, [6] * 3),
        ("espcn_x2_qonnx.onnx", [8, 4, 4, 8], [8, 4, 4, 8, 8]),
    ],
)
def test_real_models_are_read_to_their_true_widths(
    name: str, weights: list[int], activations: list[int], shared_models: Path
) -> None:
    reading: Reading = read_quantizers(importer.load(shared_models / name))
    bits = {
        op: [n.attrs["bits"] for n in reading.graph if n.op == op]
        for op in ("DequantizeWeights", "Quantize")
    }
    layers = [n for n in reading.graph if n.op in ("MatMul", "Conv")]
    made = [reading.graph.producer(layer.inputs[1]) for layer in layers]
    assert [n.attrs["bits"] for n in made if n is not None] == weights
    assert len(bits["DequantizeWeights"]) == len(weights)
    assert bits["Quantize"] == activations
    assert reading.kept == ()
    assert not any("::" in n.op for n in reading.graph)


def test_typed_parameters(tmp_path: Path) -> None:
    """QKeras writes zero points and widths as integers."""
    content = file(
        [node("Quant", ["x", "s", "z", "b"], ["y"], "quant", domain=DOMAIN, signed=1, narrow=0)],
        [floats("s", 0.5), typed("z", 0, TensorProto.INT64), typed("b", 4, TensorProto.INT32)],
        [info("x", [2, 3])], [info("y", [2, 3])], 13, {DOMAIN: 1},
    )  # fmt: skip
    assert onnx.load_from_string(content).graph.node[0].op_type == "Quant"
    assert ops(read(content, tmp_path).graph) == ["Quantize", "Dequantize"]
