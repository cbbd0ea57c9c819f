"""Quantized files with something missing, or of the wrong type or size: errors, no crashes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpqc import pipeline
from mpqc.errors import MpqcError
from tests.passes.quantized_files import file, floats, info, typed

node = helper.make_node
U8, I8, I32, I64 = TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32, TensorProto.INT64
MS, QONNX = "com.microsoft", "qonnx.custom_op.general"
DOMAINS = {MS: 1, QONNX: 2}
RULES = [
    floats("s", 0.5), typed("z", 3, U8), floats("ws", 0.25), typed("wz", 0, I8),
    floats("ys", 0.5), typed("yz", 7, U8),
]  # fmt: skip


def contrib(op: str, operands: list[str], **attrs: Any) -> Any:
    return node(op, operands, ["y"], "layer7", domain=MS, **attrs)


def quant(op: str, operands: list[str], **attrs: Any) -> Any:
    return node(op, operands, ["y"], "layer7", domain=QONNX, **attrs)


W = typed("w", np.arange(72).reshape(2, 4, 3, 3) - 30, I8)
MATRIX = typed("w", np.arange(12).reshape(4, 3) - 6, I8)
PICTURE, ROWS = info("x", [1, 4, 5, 5], U8), info("x", [2, 4], U8)
MAPS, PRODUCT = info("y", [1, 2, 3, 3], U8), info("y", [2, 3], U8)

# operator -> the node, its constants beside the rules, input, output
FILES: dict[str, tuple[Any, list[Any], Any, Any]] = {
    "QuantizeLinear": (node("QuantizeLinear", ["x", "s", "z"], ["y"], "layer7"), [],
                       info("x", [2, 4]), info("y", [2, 4], U8)),
    "DequantizeLinear": (node("DequantizeLinear", ["x", "s", "z"], ["y"], "layer7"), [],
                         ROWS, info("y", [2, 4])),
    "QLinearConv": (node("QLinearConv", ["x", "s", "z", "w", "ws", "wz", "ys", "yz", "b"], ["y"],
                         "layer7"), [W, typed("b", [1, 2], I32)], PICTURE, MAPS),
    "QLinearMatMul": (node("QLinearMatMul", ["x", "s", "z", "w", "ws", "wz", "ys", "yz"], ["y"],
                           "layer7"), [MATRIX], ROWS, PRODUCT),
    "ConvInteger": (node("ConvInteger", ["x", "w", "z", "wz"], ["y"], "layer7"), [W], PICTURE,
                    info("y", [1, 2, 3, 3], I32)),
    "MatMulInteger": (node("MatMulInteger", ["x", "w", "z", "wz"], ["y"], "layer7"), [MATRIX], ROWS,
                      info("y", [2, 3], I32)),
    "QGemm": (contrib("QGemm", ["x", "s", "z", "w", "ws", "wz", "b", "ys", "yz"], alpha=1.0),
              [MATRIX, typed("b", [1, 2, 3], I32)], ROWS, PRODUCT),
    "QLinearAdd": (contrib("QLinearAdd", ["x", "s", "z", "w", "s", "z", "ys", "yz"]),
                   [typed("w", [[1, 2, 3, 4]], U8)], ROWS, info("y", [2, 4], U8)),
    "QLinearConcat": (contrib("QLinearConcat", ["ys", "yz", "x", "s", "z", "x", "s", "z"], axis=1),
                      [], ROWS, info("y", [2, 8], U8)),
    "QLinearSoftmax": (contrib("QLinearSoftmax", ["x", "s", "z", "ys", "yz"], axis=1, opset=13),
                       [], ROWS, info("y", [2, 4], U8)),
    "QLinearSigmoid": (contrib("QLinearSigmoid", ["x", "s", "z", "ys", "yz"]), [], ROWS,
                       info("y", [2, 4], U8)),
    "QLinearAveragePool": (contrib("QLinearAveragePool", ["x", "s", "z", "ys", "yz"],
                                   kernel_shape=[2, 2]), [], PICTURE, info("y", [1, 4, 4, 4], U8)),
    "QLinearGlobalAveragePool": (contrib("QLinearGlobalAveragePool", ["x", "s", "z", "ys", "yz"]),
                                 [], PICTURE, info("y", [1, 4, 1, 1], U8)),
    "QLinearReduceMean": (contrib("QLinearReduceMean", ["x", "s", "z", "ys", "yz"], axes=[1],
                                  keepdims=1), [], ROWS, info("y", [2, 1], U8)),
    "MatMulNBits": (contrib("MatMulNBits", ["x", "w", "scales", "zeros"], K=32, N=6, bits=4,
                            block_size=16),
                    [typed("w", np.ones((6, 2, 8)), U8), floats("scales", np.ones(12)),
                     typed("zeros", np.ones(6), U8)], info("x", [3, 32]), info("y", [3, 6])),
    "Quant": (quant("Quant", ["x", "s", "qz", "bits"], signed=1, narrow=0, rounding_mode="ROUND"),
              [floats("qz", 0), floats("bits", 4)], info("x", [2, 4]), info("y", [2, 4])),
    "BipolarQuant": (quant("BipolarQuant", ["x", "s"]), [], info("x", [2, 4]), info("y", [2, 4])),
    "Trunc": (quant("Trunc", ["x", "s", "qz", "bits", "ys", "bits"], rounding_mode="FLOOR"),
              [floats("qz", 0), floats("bits", 4)], info("x", [2, 4]), info("y", [2, 4])),
}  # fmt: skip


def whole(op: str) -> onnx.ModelProto:
    made, constants, given, result = FILES[op]
    used = {name for name in made.input}
    rules = [tensor for tensor in RULES if tensor.name in used]
    return onnx.load_from_string(file([made], [*rules, *constants], [given], [result], 21, DOMAINS))


def copies(model: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    return made


def broken(op: str) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The file with each operand, constant and attribute wrong in each way."""
    model = whole(op)
    count = len(model.graph.node[0].input)
    for left in range(count):
        made = copies(model)
        del made.graph.node[0].input[left:]
        yield f"{left} operands", made
    for index in range(count):
        made = copies(model)
        made.graph.node[0].input[index] = ""
        yield f"without operand {index}", made
        made = copies(model)
        made.graph.node[0].input[index] = "nobody"
        yield f"unknown operand {index}", made
        made = copies(model)
        made.graph.node[0].input[index] = "x"
        yield f"data as operand {index}", made
    made = copies(model)
    made.graph.node[0].input.append("x")
    yield "one operand more", made
    for index, tensor in enumerate(model.graph.initializer):
        array = numpy_helper.to_array(tensor)
        wrong: dict[str, Any] = {
            "empty": array.reshape(-1)[:0], "longer": np.repeat(array.reshape(-1), 5),
            "of more axes": array[None, None], "a number": array.reshape(-1)[0],
            "double": array.astype(np.float64), "wide": array.astype(np.int64),
            "one less": array.reshape(-1)[1:], "bytes": array.astype(np.uint8),
            "negative": -np.abs(array.astype(np.float32)), "zero": np.zeros_like(array),
            "huge": np.full_like(array, np.inf if array.dtype.kind == "f" else 127),
            "missing": np.full(array.shape, np.nan, np.float32),
        }  # fmt: skip
        for what, value in wrong.items():
            made = copies(model)
            made.graph.initializer[index].CopyFrom(
                numpy_helper.from_array(
                    np.ascontiguousarray(value).reshape(value.shape), tensor.name
                )
            )
            yield f"{tensor.name} {what}", made
    for index, attribute in enumerate(model.graph.node[0].attribute):
        made = copies(model)
        del made.graph.node[0].attribute[index]
        yield f"without {attribute.name}", made
        for value in (-1, 0, 1000):
            if attribute.type == onnx.AttributeProto.INT:
                made = copies(model)
                made.graph.node[0].attribute[index].i = value
                yield f"{attribute.name}={value}", made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", sorted(FILES))
def test_broken_files_are_errors(tmp_path: Path, op: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(whole(op).SerializeToString())
    pipeline.read_model(path)
    refused, crashes = 0, []
    for what, model in broken(op):
        path.write_bytes(model.SerializeToString())
        try:
            pipeline.read_model(path)
        except MpqcError as error:
            refused += 1
            if "layer7" not in str(error):
                crashes.append(f"{what}: {error}")
        except Exception as error:
            crashes.append(f"{what}: {type(error).__name__}: {str(error)[:100]}")
    assert crashes == []
    assert refused >= 5
