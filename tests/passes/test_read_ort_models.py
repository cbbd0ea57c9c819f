"""Files that ONNX Runtime's own quantizer writes, read and compared with ONNX Runtime."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from mpqc import importer, pipeline
from mpqc.ort import Session
from mpqc.passes.read_quantizers import Reading, read_quantizers
from tests.passes.quantized_files import (
    Array,
    compiled,
    compute,
    file,
    floats,
    info,
    library,
    steps_apart,
)

node = helper.make_node

quantization = pytest.importorskip("onnxruntime.quantization")
pytestmark = pytest.mark.filterwarnings("ignore")


def network() -> bytes:
    """A residual network with what the quantizer has operators for."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> Any:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    return file(
        [
            node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
            node("Relu", ["c1"], ["r1"], "relu1"),
            node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1, 1, 1, 1]),
            node("Add", ["c2", "r1"], ["a"], "add"),
            node("LeakyRelu", ["a"], ["l"], "leaky", alpha=0.1),
            node("Concat", ["l", "r1"], ["cat"], "concat", axis=1),
            node("MaxPool", ["cat"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
            node("Conv", ["p", "w3"], ["c3"], "depthwise", pads=[1, 1, 1, 1], group=16),
            node("Sigmoid", ["c3"], ["s"], "sigmoid"),
            node("Mul", ["c3", "s"], ["m"], "swish"),
            node("AveragePool", ["m"], ["av"], "mean", kernel_shape=[2, 2], strides=[2, 2]),
            node("GlobalAveragePool", ["av"], ["g"], "global"),
            node("Flatten", ["g"], ["f"], "flatten"),
            node("Gemm", ["f", "w4", "b4"], ["h"], "gemm", transB=1),
            node("Relu", ["h"], ["hr"], "relu2"),
            node("MatMul", ["hr", "w5"], ["y"], "matmul"),
        ],
        [floats("w1", weights(8, 3, 3, 3)), floats("b1", weights(8)),
         floats("w2", weights(8, 8, 3, 3)), floats("b2", weights(8)),
         floats("w3", weights(16, 1, 3, 3)),
         floats("w4", weights(12, 16)), floats("b4", weights(12)), floats("w5", weights(12, 10))],
        [info("x", [1, 3, 8, 8])], [info("y", [1, 10])], 13,
    )  # fmt: skip


class Pictures:
    """What calibrates; ONNX Runtime calls this a data reader."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self._feeds: Iterator[dict[str, Array]] = iter(
            [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(20)]
        )

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


def quantized(folder: Path, how: Callable[[str, str], None]) -> Path:
    source, target = folder / "float.onnx", folder / "quantized.onnx"
    source.write_bytes(network())
    how(str(source), str(target))
    return target


KINDS = {
    "int8": quantization.QuantType.QInt8, "uint8": quantization.QuantType.QUInt8,
    "int16": quantization.QuantType.QInt16, "uint16": quantization.QuantType.QUInt16,
    "int4": quantization.QuantType.QInt4, "uint4": quantization.QuantType.QUInt4,
}  # fmt: skip


def static(form: str, activations: str, weights: str, **options: Any) -> Callable[[str, str], None]:
    def run(source: str, target: str) -> None:
        quantization.quantize_static(
            source, target, Pictures(), quant_format=getattr(quantization.QuantFormat, form),
            activation_type=KINDS[activations], weight_type=KINDS[weights], **options,
        )  # fmt: skip

    return run


def compare(path: Path) -> tuple[Reading, list[float], float]:
    """Largest differences from ONNX Runtime, and how large its outputs are."""
    reading = read_quantizers(importer.load(path))
    session = Session(path.read_bytes())
    rng = np.random.default_rng(2)
    gaps, size = [], 0.0
    for _ in range(4):
        x = rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
        want, got = session.run({"x": x})["y"], compute(reading.graph, {"x": x})["y"]
        gaps.append(float(np.abs(want - got).max()))
        size = max(size, float(np.abs(want).max()))
    return reading, gaps, size


def compare_compiled(path: Path, step: float, *, ties: float = 0.02) -> None:
    """The library is ONNX Runtime but for a step where a sum lies on a tie, or is rounded."""
    session, rng = Session(path.read_bytes()), np.random.default_rng(3)
    apart, largest, elements = 0, 0.0, 0
    with library(path) as model:
        for _ in range(8):
            x = rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
            got, want = model.run({"x": x})["y"], session.run({"x": x})["y"]
            count, gap = steps_apart(got, want, step)
            apart, largest, elements = apart + count, max(largest, gap), elements + got.size
    assert largest < 2.5
    assert apart <= ties * elements


def last_step(reading: Reading) -> float:
    """Scale of the output."""
    made = reading.graph.producer("y")
    assert made is not None
    assert made.op == "Dequantize"
    return made.float_attr("scale")


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
@pytest.mark.parametrize(
    ("activations", "weights"), [("uint8", "int8"), ("int8", "int8"), ("uint8", "uint8")]
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_static_quantization(
    tmp_path: Path, form: str, activations: str, weights: str, per_channel: bool
) -> None:
    if per_channel and weights == "uint8":
        per_channel = False  # ONNX Runtime wants symmetric weights there
    path = quantized(tmp_path, static(form, activations, weights, per_channel=per_channel))
    reading, gaps, size = compare(path)
    graph = reading.graph
    layers = [n for n in graph if n.op in ("Conv", "Gemm", "MatMul")]
    assert len(layers) == 5
    for layer in layers:
        data, weight = map(graph.producer, layer.inputs[:2])
        assert data is not None
        assert weight is not None
        assert (data.op in ("Dequantize", "Flatten"), weight.op) == (True, "DequantizeWeights")
        assert weight.attrs["bits"] == 8
        assert len(graph.constants[weight.inputs[1]]) in (1, *graph.shape(weight.output))
    assert reading.kept == ()
    # a step of the output, which one tie on the way may cost
    assert np.median(gaps) <= 0.02 * size
    assert max(gaps) <= 0.1 * size
    assert pipeline.read_model(path).kept == {}
    compare_compiled(path, last_step(reading))


def test_reduced_range(tmp_path: Path) -> None:
    path = quantized(tmp_path, static("QDQ", "uint8", "int8", reduce_range=True))
    compare_compiled(path, last_step(read_quantizers(importer.load(path))))


@pytest.mark.parametrize(("kind", "bits"), [("int4", 4), ("uint4", 4), ("int16", 16)])
def test_weights_of_other_widths(tmp_path: Path, kind: str, bits: int) -> None:
    activations = "uint16" if bits == 16 else "uint8"
    path = quantized(tmp_path, static("QDQ", activations, kind))
    reading, gaps, size = compare(path)
    made = [n for n in reading.graph if n.op == "DequantizeWeights"]
    assert len(made) == 5
    assert {n.attrs["bits"] for n in made} == {bits}
    assert bool(reading.kept) == (bits == 16)
    assert np.median(gaps) <= 0.02 * size
    assert max(gaps) <= 0.2 * size
    layers = {n.op for n in pipeline.import_model(path)} & {"IntConv", "Conv"}
    assert layers == ({"Conv"} if bits == 16 else {"IntConv"})
    compare_compiled(path, 0.01 * size if bits == 16 else last_step(reading))


@pytest.mark.parametrize("weights", ["uint8", "int8"])
def test_dynamic_quantization(tmp_path: Path, weights: str) -> None:
    def run(source: str, target: str) -> None:
        quantization.quantize_dynamic(source, target, weight_type=KINDS[weights])

    path = quantized(tmp_path, run)
    reading, gaps, size = compare(path)
    found = [n.op for n in reading.graph if n.op in ("IntConv", "IntMatMul")]
    assert len(found) == 5
    assert all("its scale follows from the data" in kept.reason for kept in reading.kept)
    assert max(gaps) <= 1e-3 * size
    compare_compiled(path, 1e-3 * size, ties=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
def test_blocked_weights(tmp_path: Path, symmetric: bool, form: str) -> None:
    module = pytest.importorskip(
        "onnxruntime.quantization.matmul_nbits_quantizer",
        reason="ONNX Runtime's quantizer of blocks needs onnx_ir",
        exc_type=ImportError,
    )
    rng = np.random.default_rng(0)
    content = file(
        [node("MatMul", ["x", "w"], ["y"], "layer")],
        [floats("w", rng.standard_normal((64, 24)))], [info("x", [3, 64])], [info("y", [3, 24])],
        21,
    )  # fmt: skip
    config = module.DefaultWeightOnlyQuantConfig(
        block_size=32, is_symmetric=symmetric, quant_format=getattr(quantization.QuantFormat, form)
    )
    tool = module.MatMulNBitsQuantizer(onnx.load_from_string(content), algo_config=config)
    tool.process()
    path = tmp_path / "blocks.onnx"
    path.write_bytes(tool.model.model.SerializeToString())
    reading = read_quantizers(importer.load(path))
    assert len(reading.kept) >= 1
    x = rng.standard_normal((3, 64)).astype(np.float32)
    want = Session(path.read_bytes()).run({"x": x})
    (name,) = want
    got = compute(reading.graph, {"x": x})[name]
    np.testing.assert_allclose(got, want[name], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(compiled(path, {"x": x})[name], got, rtol=1e-5, atol=1e-5)
