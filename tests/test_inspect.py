"""Preflight: every layer, every problem, exact costs, and kernels as they are chosen later."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import mpqc.demo
from mpqc.cli import app
from mpqc.data import Data, open_data
from mpqc.graph import Precision
from mpqc.inspect_model import inspect_model
from mpqc.pipeline import Options, compile_model, import_model
from mpqc.select_kernel import count_weights
from mpqc.target import find_target, native

MODEL, CALIBRATION, _ = mpqc.demo.files()


def save(
    path: Path, nodes: list[Any], inputs: dict[str, Any], outputs: list[str], *weights: Any
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        list(weights),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def test_layers_and_costs_of_the_demo_model() -> None:
    found = inspect_model(MODEL)
    assert found.compiles
    assert [row.name for row in found.layers] == [
        "stem", "block.conv1", "block.conv2", "down", "depthwise", "pointwise", "classifier",
    ]  # fmt: skip
    assert all(row.quantizable for row in found.layers)
    assert found.operators["Conv"] == 6
    macs = [32 * 64 * 9, *[32 * 64 * 9 * 32] * 2, 64 * 16 * 9 * 32, 64 * 16 * 9, 64 * 16 * 64, 640]
    assert [row.macs for row in found.layers] == macs
    weights = sum(row.weights for row in found.layers)
    costs = {cost.widths: cost for cost in found.costs}
    for bits in (8, 4, 2, 1):
        assert costs[f"w{bits}a{bits}"].bitops == sum(macs) * bits * bits
        assert costs[f"w{bits}a{bits}"].size == weights * bits / 8
    assert costs["float"].size == weights * 4
    assert found.forecast is None


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [
            helper.make_node("MaxUnpool", ["x", "at"], ["y"], name="top", kernel_shape=[2, 2],
                             strides=[2, 2]),
            helper.make_node("MaxUnpool", ["z", "at"], ["u"], name="again", kernel_shape=[2, 2],
                             strides=[2, 2]),
            helper.make_node("Relu", ["x"], ["z"], name="fine"),
        ],
        {"x": [1, 1, 1, 2]},
        ["y", "u"],
        numpy_helper.from_array(np.array([[[[0, 2]]]]), "at"),
    )  # fmt: skip
    result = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    assert result.exit_code == 1, result.output
    problems = {p["node"]: p["reason"] for p in json.loads(result.stdout)["problems"]}
    assert problems.keys() == {"top", "again"}
    assert all("TVM runtime" in reason for reason in problems.values())
    assert "top, again" in result.stderr
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 1
    assert "cannot be compiled" in shown.stdout


def test_layers_that_stay_in_float_say_why(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "z"], ["y"], name="product")],
        {"x": [4, 8], "z": [8, 3]},
        ["y"],
    )
    (row,) = inspect_model(path).layers
    assert not row.quantizable
    assert "not constant" in row.reason
    assert inspect_model(path).compiles


@pytest.mark.parametrize("widths", ["w8a8", "w4a4", "w2a2", "w1a1"])
def test_the_forecast_is_what_compile_chooses(widths: str, tmp_path: Path) -> None:
    graph = import_model(MODEL)
    same_kernels(MODEL, widths, open_data(CALIBRATION, graph), tmp_path)


@pytest.mark.parametrize("widths", ["w2a2", "w1a1"])
def test_the_forecast_of_a_network_beyond_l2(
    widths: str, shared_models: Path, tmp_path: Path
) -> None:
    model = shared_models / "cifar10_resnet8.onnx"
    assert count_weights(import_model(model)) > 65536
    (kind,) = import_model(model).inputs.values()
    np.savez(tmp_path / "data.npz", np.zeros((4, *kind.shape[1:]), np.float32))
    same_kernels(model, widths, open_data(tmp_path / "data.npz", import_model(model)), tmp_path)


def same_kernels(model: Path, widths: str, data: Data, folder: Path) -> None:
    forecast = inspect_model(model, native()).forecast
    assert forecast is not None
    artifact = compile_model(
        model, folder / "out", Options(native()), bits=Precision.parse(widths), ends=None,
        data=data,
    )  # fmt: skip
    ran = {layer["name"]: layer["kernel"] for layer in artifact.manifest["layers"]}
    assert {name: by[widths].kernel for name, by in forecast.layers.items()} == ran


def test_the_forecast_follows_the_target_and_the_widths() -> None:
    result = CliRunner().invoke(app, ["inspect", str(MODEL), "--target", "rpi4"])
    assert result.exit_code == 0, result.output
    assert "rpi4" in result.stdout
    forecast = inspect_model(MODEL, find_target("rpi4")).forecast
    assert forecast is not None
    gains = [forecast.gains[widths] for widths in ("w8a8", "w4a4", "w2a2", "w1a1")]
    assert gains == sorted(gains)
    assert gains[0] >= 1
    assert gains[-1] > 2
    for by in forecast.layers.values():
        assert all(e.gain >= 1 for e in by.values())


def test_dimensions_and_batch_are_bound() -> None:
    assert inspect_model(MODEL, batch=3).inputs["input"].shape == (3, 1, 8, 8)
    with pytest.raises(Exception, match="ghost"):
        inspect_model(MODEL, dims={"ghost": 3})
