"""Quantized models of half precision run on integers, and in float32 between them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from mpqc import pipeline, reference
from mpqc.graph import Graph
from mpqc.ort import Session
from mpqc.passes.read_quantizers import read_quantizers
from mpqc.passes.widen_floats import WidenFloats
from tests.passes.quantized_files import compiled, file, info, typed

node = helper.make_node
HALF, I8 = TensorProto.FLOAT16, TensorProto.INT8


def network(*, folded: bool) -> bytes:
    """As ModelOpt writes it: half precision around quantizers of 8 bits."""
    rng = np.random.default_rng(0)

    def half(name: str, values: Any) -> Any:
        return typed(name, values, HALF)

    weights = rng.standard_normal((4, 3, 3, 3)) / 5
    scales = np.abs(weights).max(axis=(1, 2, 3)).astype(np.float16) / np.float16(127)
    codes = np.clip(np.rint(weights / scales.reshape(-1, 1, 1, 1)), -127, 127)
    constants = [
        half("s", 0.05), typed("z", 0, I8), half("ws", scales), half("b", rng.standard_normal(4)),
        typed("wz", np.zeros(4), I8), half("k", 0.5),
        typed("w", codes, I8) if folded else half("w", weights),
    ]  # fmt: skip
    quantize = [] if folded else [node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], axis=0)]
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize"),
        node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"),
        *quantize,
        node("DequantizeLinear", ["w" if folded else "wq", "ws", "wz"], ["v"], axis=0),
        node("Conv", ["d", "v", "b"], ["c"], "layer"),
        node("Relu", ["c"], ["r"], "relu"),
        node("Mul", ["r", "k"], ["y"], "scale"),
    ]
    return file(nodes, constants, [info("x", [1, 3, 6, 6], HALF)], [info("y", [1, 4, 4, 4], HALF)],
                19)  # fmt: skip


@pytest.mark.parametrize("folded", [False, True])
def test_layers_run_on_integers(tmp_path: Path, folded: bool) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(network(folded=folded))
    imported = pipeline.read_model(path)
    assert imported.kept == {}
    assert [n.op for n in imported.graph if n.op in ("Conv", "IntConv")] == ["IntConv"]
    assert {kind.dtype for kind in imported.graph.inputs.values()} == {"float16"}
    x = np.random.default_rng(1).standard_normal((1, 3, 6, 6)).astype(np.float16)
    got, want = compiled(path, {"x": x})["y"], Session(path.read_bytes()).run({"x": x})["y"]
    assert got.dtype == want.dtype == np.float16
    np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_ends_keep_their_types(dtype: str) -> None:
    number = {"f16": 10, "bf16": 16}[dtype]
    graph = Graph.parse(
        f"""
        %x = Input() : {dtype}[2,3]
        %i = Input() : f32[2,3]
        %h = Cast(%i) {{to={number}}} : {dtype}[2,3]
        %a = Add(%x, %h) : {dtype}[2,3]
        %y = Relu(%a) : {dtype}[2,3]
        %c = Cast(%y) {{to=1}} : f32[2,3]
        return %y, %c, %x
        """
    )
    made = WidenFloats()(graph)
    assert {name: made.type(name) for name in made.outputs} == {
        name: graph.type(name) for name in graph.outputs
    }
    assert dict(made.inputs) == dict(graph.inputs)
    assert made.type(made["a"].output).dtype == "float32"
    feeds = {
        "x": np.arange(6).reshape(2, 3).astype(np.float32), "i": np.full((2, 3), 0.5, np.float32)
    }  # fmt: skip
    if dtype == "f16":
        feeds["x"] = feeds["x"].astype(np.float16)
        got, want = reference.run(made, feeds), reference.run(graph, feeds)
        for name, array in want.items():
            assert got[name].dtype == array.dtype
            np.testing.assert_array_equal(got[name], array)


def test_other_models_stay_as_they_are() -> None:
    graph = Graph.parse("%x = Input() : f16[2]\n%y = Relu(%x) : f16[2]\nreturn %y", {})
    assert read_quantizers(graph).graph is graph
    wide = Graph.parse("%x = Input() : f32[2]\n%y = Relu(%x) : f32[2]\nreturn %y", {})
    assert WidenFloats()(wide) is wide
