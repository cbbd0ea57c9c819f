"""ONNX's own node tests of the quantized operators: read, and compiled to a library that runs.

Every input but the first becomes a constant, as models have it; the first is what callers feed.
"""

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from mpqc import importer, pipeline, reference
from mpqc.errors import ModelError
from mpqc.graph import Graph
from mpqc.passes.quantized_values import container
from mpqc.passes.read_quantizers import read_quantizers
from tests.passes.quantized_files import compiled

Array = npt.NDArray[Any]

OPERATORS = {
    "quantizelinear": "QuantizeLinear",
    "dequantizelinear": "DequantizeLinear",
    "dynamicquantizelinear": "DynamicQuantizeLinear",
    "qlinearconv": "QLinearConv",
    "qlinearmatmul": "QLinearMatMul",
    "convinteger": "ConvInteger",
    "matmulinteger": "MatMulInteger",
    "cast": "Cast",
}

LAYERS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")

# Products that stay float: a stack of matrices is no layer.
FLOAT_PRODUCTS = re.compile("test_qlinearmatmul_3D_.*")

# Cases that cannot pass: what the error says, which is the reason.
REFUSED = {
    r"test_quantizelinear_(e4m3fn|e5m2|float4e2m1)": "element type FLOAT(8|4).* is not compiled",
    r"test_dequantizelinear_(e4m3fn|e5m2|float4e2m1).*": "element type that cannot be compiled",
}


def _cases() -> list[Any]:
    """The installed onnx's cases; importing their modules makes them."""
    import onnx.backend.test.case.node as registry

    registry._TargetOpType = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in OPERATORS:
            importlib.import_module(f"onnx.backend.test.case.node.{module}")
    narrow = re.compile(r"test_cast_.*U?INT[24]")
    return [
        case
        for case in registry._NodeTestCases
        if case.model.graph.node[0].op_type != "Cast" or narrow.match(case.name)
        if re.match(f"test_({'|'.join(OPERATORS)})", case.name.replace("basic_", ""))
    ]


CASES = {case.name: case for case in _cases()}


def _array(value: Any) -> Array:
    return np.asarray(
        numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
    )


def _tensor(name: str, value: Any) -> onnx.TensorProto:
    if isinstance(value, onnx.TensorProto):
        made = onnx.TensorProto()
        made.CopyFrom(value)
        made.name = name
        return made
    return numpy_helper.from_array(np.asarray(value), name)


def _contained(array: Array) -> Array:
    """As numpy holds what is narrower than a byte."""
    return array.astype(container(str(array.dtype)))


def _model(case: Any, folder: Path) -> tuple[Path, dict[str, Array]]:
    """The case with its parameters as constants, and what to feed."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    inputs, _ = case.data_sets[0]
    infos = list(model.graph.input)
    del model.graph.input[1:]
    model.graph.initializer.extend(
        _tensor(info.name, value) for info, value in zip(infos[1:], inputs[1:], strict=True)
    )
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path, {infos[0].name: _contained(_array(inputs[0]))}


def _matches(case: Any, got: dict[str, Array]) -> None:
    _, expected = case.data_sets[0]
    for info, value in zip(case.model.graph.output, expected, strict=True):
        want = _contained(_array(value))
        assert got[info.name].dtype == want.dtype
        if want.dtype.kind == "f":
            np.testing.assert_allclose(got[info.name], want, rtol=case.rtol, atol=case.atol)
        else:
            np.testing.assert_array_equal(got[info.name], want)


def _ops(graph: Graph) -> set[str]:
    return {node.op for node in graph}


def _refusal(name: str) -> str | None:
    return next(
        (reason for pattern, reason in REFUSED.items() if re.fullmatch(pattern, name)), None
    )


@pytest.mark.parametrize("name", sorted(CASES))
def test_gives_what_onnx_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path, feeds = _model(case, tmp_path)
    reason = _refusal(name)
    if reason is not None:
        with pytest.raises(ModelError, match=reason):
            read_quantizers(importer.load(path))
        return
    graph = read_quantizers(importer.load(path)).graph
    assert not any("Linear" in op or "Integer" in op for op in _ops(graph))
    _matches(case, reference.run(graph, feeds))
    if case.model.graph.node[0].op_type in LAYERS and not FLOAT_PRODUCTS.match(name):
        lowered = _ops(pipeline.import_model(path))
        assert lowered & {"IntConv", "IntMatMul"}
        assert not lowered & {"Conv", "MatMul"}
    _matches(case, compiled(path, feeds))


def test_every_operator_has_cases() -> None:
    found = {case.model.graph.node[0].op_type for case in CASES.values()}
    assert set(OPERATORS.values()) <= found
    assert sum("INT4" in name for name in CASES) >= 10
    assert sum("INT2" in name for name in CASES) >= 10
