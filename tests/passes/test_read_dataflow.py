"""Quantizers that sit apart from their layers: what lies between moves codes, and is exact."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from mpqc import pipeline
from mpqc.calibration import Calibration
from mpqc.graph import Graph
from mpqc.ort import Session
from mpqc.plan import Plan
from tests.passes.quantized_files import file, floats, info, library, steps_apart, typed

node = helper.make_node
SHAPE = [1, 4, 6, 6]
STEP = 0.025


def whole(name: str, *values: int) -> Any:
    return typed(name, values, TensorProto.INT64)


def resize(**attrs: Any) -> tuple[list[Any], list[Any], int]:
    return (
        [node("Resize", ["d", "", "factor"], ["m"], "op", mode="nearest", **attrs)],
        [floats("factor", [1, 1, 2, 2])],
        4,
    )


PADS = whole("pads", 0, 0, 1, 1, 0, 0, 1, 1)
WINDOW = [whole("start", 1, 1), whole("end", 5, 5), whole("axes", 2, 3)]

# What lies between two layers: nodes from d to m, their constants, and the channels of m.
BETWEEN: dict[str, tuple[list[Any], list[Any], int]] = {
    "Resize": resize(),
    "Resize asymmetric": resize(
        coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    ),
    "Pad": ([node("Pad", ["d", "pads"], ["m"], "op")], [PADS], 4),
    "Pad of a value": (
        [node("Pad", ["d", "pads", "around"], ["m"], "op")], [PADS, floats("around", 0.5)], 4
    ),
    "Pad reflected": ([node("Pad", ["d", "pads"], ["m"], "op", mode="reflect")], [PADS], 4),
    "Slice": ([node("Slice", ["d", "start", "end", "axes"], ["m"], "op")], WINDOW, 4),
    "Gather": ([node("Gather", ["d", "which"], ["m"], "op", axis=1)],
               [whole("which", 2, 0, 3, 1)], 4),
    "Split": ([node("Split", ["d"], ["m1", "m2"], "op", axis=1),
               node("Concat", ["m2", "m1"], ["m"], "join", axis=1)], [], 4),
    "Concat": ([node("Concat", ["d", "d"], ["m"], "op", axis=1)], [], 8),
    "DepthToSpace": ([node("DepthToSpace", ["d"], ["m"], "op", blocksize=2)], [], 1),
    "SpaceToDepth": ([node("SpaceToDepth", ["d"], ["m"], "op", blocksize=2)], [], 16),
    "Transpose": ([node("Transpose", ["d"], ["m"], "op", perm=[0, 1, 3, 2])], [], 4),
    "Reshape": ([node("Reshape", ["d", "shape"], ["m"], "op")], [whole("shape", 1, 4, 4, 9)], 4),
    "Unsqueeze": ([node("Unsqueeze", ["d", "two"], ["m0"], "op"),
                   node("Squeeze", ["m0", "two"], ["m"], "back")], [whole("two", 2)], 4),
    "Tile": ([node("Tile", ["d", "times"], ["m"], "op")], [whole("times", 1, 1, 2, 1)], 4),
    "Expand": ([node("MaxPool", ["d"], ["m1"], "column", kernel_shape=[6, 1]),
                node("Expand", ["m1", "shape"], ["m"], "op")], [whole("shape", 1, 4, 3, 6)], 4),
    "MaxPool": ([node("MaxPool", ["d"], ["m"], "op", kernel_shape=[3, 3], strides=[2, 2],
                      pads=[1, 1, 1, 1])], [], 4),
    "Relu": ([node("Relu", ["d"], ["m"], "op")], [], 4),
    "Clip": ([node("Clip", ["d", "low", "high"], ["m"], "op")],
             [floats("low", -1), floats("high", 1.5)], 4),
    "Clip beyond": ([node("Clip", ["d", "low", "high"], ["m"], "op")],
                    [floats("low", -9), floats("high", 9)], 4),
}  # fmt: skip

COMPUTED: dict[str, list[Any]] = {
    "AveragePool": [node("AveragePool", ["d"], ["m"], "op", kernel_shape=[2, 2])],
    "Add": [node("Add", ["d", "xd"], ["m"], "op")],
    "LeakyRelu": [node("LeakyRelu", ["d"], ["m"], "op", alpha=0.3)],
    "Sigmoid": [node("Sigmoid", ["d"], ["m"], "op")],
}


def pair(x: str, y: str, rule: str) -> list[Any]:
    operands = [f"{rule}.scale", f"{rule}.zero"]
    return [
        node("QuantizeLinear", [x, *operands], [f"{y}.q"], f"{y}.quantize"),
        node("DequantizeLinear", [f"{y}.q", *operands], [y], f"{y}.dequantize"),
    ]


def model(
    between: list[Any], constants: list[Any], channels: int, kind: str, *, again: bool
) -> bytes:
    """Two layers and what lies between, behind which there is a quantizer again, or none."""
    rng = np.random.default_rng(0)
    zero = typed("in.zero", 0 if kind == "INT8" else 128, getattr(TensorProto, kind))
    same = typed("out.zero", 0 if kind == "INT8" else 128, getattr(TensorProto, kind))
    read = "e" if again else "m"
    nodes = [
        *pair("x", "xd", "in"), node("DequantizeLinear", ["w1", "ws"], ["v1"]),
        node("Conv", ["xd", "v1"], ["c1"], "first", pads=[1, 1, 1, 1]), *pair("c1", "d", "out"),
        *between, *(pair("m", "e", "out") if again else []),
        node("DequantizeLinear", ["w2", "ws"], ["v2"]),
        node("Conv", [read, "v2"], ["c2"], "second"), *pair("c2", "y", "out"),
    ]  # fmt: skip
    weights = [
        typed(name, rng.integers(-127, 128, shape), TensorProto.INT8)
        for name, shape in (("w1", (4, 4, 3, 3)), ("w2", (5, channels, 1, 1)))
    ]
    rules = [floats("ws", 0.0037), floats("in.scale", 0.02), zero, floats("out.scale", STEP), same]
    return file(nodes, [*constants, *weights, *rules], [info("x", SHAPE)],
                [info("y", ["n", "c", "h", "w"])], 13)  # fmt: skip


def lowered(path: Path) -> Graph:
    """The graph of integers that is compiled."""
    graph = pipeline.import_model(path)
    plan = Plan.of(graph, {}, model_sha256="0" * 64)
    return pipeline.quantize(graph, plan, Calibration({}, samples=0))


def assert_as_onnxruntime(path: Path) -> None:
    """Equal but for a step where a sum lies on a tie, of which there are few."""
    session, rng = Session(path.read_bytes()), np.random.default_rng(1)
    apart, elements = 0, 0
    with library(path) as compiled:
        for _ in range(4):
            x = rng.standard_normal(SHAPE).astype(np.float32)
            got, want = compiled.run({"x": x})["y"], session.run({"x": x})["y"]
            count, largest = steps_apart(got, want, STEP)
            assert largest < 1.5
            apart, elements = apart + count, elements + got.size
    assert apart <= 0.01 * elements


@pytest.mark.parametrize("again", [True, False], ids=["again", "once"])
@pytest.mark.parametrize("name", sorted(BETWEEN))
def test_codes_move(tmp_path: Path, name: str, again: bool) -> None:
    nodes, constants, channels = BETWEEN[name]
    path = tmp_path / "model.onnx"
    path.write_bytes(model(nodes, constants, channels, "UINT8" if again else "INT8", again=again))
    assert pipeline.read_model(path).kept == {}
    graph = lowered(path)
    products = [node.op for node in graph if node.op in ("IntConv", "Requantize")]
    assert products == ["IntConv", "Requantize"] * 2
    computed = [value for node in graph for value in node.outputs
                if graph.type(value).dtype == "float32"]  # fmt: skip
    assert computed == ["y"]
    assert_as_onnxruntime(path)


@pytest.mark.parametrize("name", sorted(COMPUTED))
def test_values_that_no_code_tells_are_requantized(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model(COMPUTED[name], [], 4, "UINT8", again=True))
    assert pipeline.read_model(path).kept == {}
    assert [n.op for n in lowered(path)].count("IntConv") == 2
    assert_as_onnxruntime(path)


@pytest.mark.parametrize("name", sorted(COMPUTED))
def test_layers_on_values_that_no_code_tells_are_float_and_listed(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model(COMPUTED[name], [], 4, "UINT8", again=False))
    assert pipeline.read_model(path).kept == {
        "second": f"its input is computed by {name} 'op' in float"
    }
    assert_as_onnxruntime(path)


@pytest.mark.parametrize(
    ("nodes", "constants", "reason"),
    [
        (
            [node("Clip", ["d", "low"], ["m"], "op")],
            [floats("low", 0.01)],
            "Clip 'op' clips values between two codes",
        ),
        (
            [node("Pad", ["d", "pads", "around"], ["m"], "op")],
            [PADS, floats("around", 0.01)],
            "Pad 'op' pads with a value that has no code",
        ),
        (
            [node("Pad", ["d", "pads", "around"], ["m"], "op")],
            [PADS, floats("around", 99)],
            "Pad 'op' pads with a value that has no code",
        ),
        (
            [node("Resize", ["d", "", "factor"], ["m"], "op", mode="linear")],
            [floats("factor", [1, 1, 2, 2])],
            "its input is computed by Resize 'op' in float",
        ),
    ],
)
def test_values_between_two_codes_are_float_and_listed(
    tmp_path: Path, nodes: list[Any], constants: list[Any], reason: str
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model(nodes, constants, 4, "UINT8", again=False))
    assert pipeline.read_model(path).kept == {"second": reason}
    assert_as_onnxruntime(path)
