"""Widths of other tools, written for the embedded model in each of their formats."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnxruntime.quantization import QuantType
from typer.testing import CliRunner

from mpqc.cli import app
from mpqc.demo import files
from mpqc.errors import PlanError
from mpqc.foreign_plan import ForeignPlan, load_plan
from mpqc.plan import Plan

MODEL = files().model
# layer -> (weights, input), as the file names them
TENSORS = {
    node.name: (node.input[1], node.input[0])
    for node in onnx.load(MODEL).graph.node
    if node.op_type in ("Conv", "Gemm")
}
FIRST, SECOND, *REST = TENSORS
WIDTHS = {name: (4, 8) for name in TENSORS} | {SECOND: (2, 4)}


def read(tmp_path: Path, content: Any) -> tuple[Plan, ForeignPlan]:
    path = tmp_path / "widths.json"
    path.write_text(json.dumps(content))
    plan, foreign = load_plan(path, MODEL)
    assert foreign is not None
    return plan, foreign


def weights() -> dict[str, int]:
    return {TENSORS[name][0]: bits for name, (bits, _) in WIDTHS.items()}


def inputs() -> dict[str, int]:
    """The widest wish of all that read a tensor."""
    found: dict[str, int] = {}
    for name, (_, bits) in WIDTHS.items():
        value = TENSORS[name][1]
        found[value] = max(bits, found.get(value, 0))
    return found


def assert_widths(plan: Plan) -> None:
    for name, (weight, _) in WIDTHS.items():
        assert plan.layers[name].weight_bits == weight
        assert plan.layers[name].activation_bits == inputs()[TENSORS[name][1]]


def overrides() -> dict[str, Any]:
    kinds = {2: "QInt2", 4: "QInt4", 8: "QUInt8"}
    return {
        name: [{"quant_type": kinds[bits], "symmetric": True}]
        for name, bits in {**weights(), **inputs()}.items()
    }


def aimet_mappings() -> dict[str, Any]:
    def entries(tensors: dict[str, int], channels: int) -> dict[str, Any]:
        one = {"dtype": "int", "is_symmetric": "True", "max": 1.0, "min": -1.0, "offset": -8,
               "scale": 0.1}  # fmt: skip
        return {name: [{**one, "bitwidth": bits}] * channels for name, bits in tensors.items()}

    return {
        "version": "0.6.1",
        "activation_encodings": entries(inputs(), 1),
        "param_encodings": entries(weights(), 3),
    }


def aimet_lists() -> dict[str, Any]:
    def entries(tensors: dict[str, int]) -> list[dict[str, Any]]:
        return [
            {"name": name, "dtype": "INT", "enc_type": "PER_TENSOR", "bw": bits, "is_sym": True,
             "scale": [0.1], "offset": [-8]}
            for name, bits in tensors.items()
        ]  # fmt: skip

    return {
        "version": "1.0.0",
        "activation_encodings": entries(inputs()),
        "param_encodings": entries(weights()),
    }


def aimet_types() -> dict[str, Any]:
    tensors = {**{n: f"int{b}" for n, b in weights().items()},
               **{n: f"uint{b}" for n, b in inputs().items()}}  # fmt: skip
    return {
        "version": "2.0.0",
        "encodings": [
            {"name": name, "output_dtype": kind, "y_scale": 0.1} for name, kind in tensors.items()
        ],
    }


@pytest.mark.parametrize("content", [overrides, aimet_mappings, aimet_lists, aimet_types])
def test_every_format_gives_the_same_plan(tmp_path: Path, content: Any) -> None:
    plan, foreign = read(tmp_path, content())
    assert_widths(plan)
    assert not foreign.floats
    assert plan.search is not None
    assert plan.search.method in foreign.message
    assert_widths(Plan.parse(plan.text()))


def test_types_as_onnx_runtime_prints_them(tmp_path: Path) -> None:
    spelled = overrides()
    for entries in spelled.values():
        entries[0]["quant_type"] = f"QuantType.{QuantType.QInt4.name}"
    plan, _ = read(tmp_path, spelled)
    assert {layer.weight_bits for layer in plan.layers.values()} == {4}


def test_an_entry_without_a_type_has_eight_bits(tmp_path: Path) -> None:
    spelled = overrides()
    spelled[TENSORS[FIRST][0]] = [{"symmetric": True}]
    assert read(tmp_path, spelled)[0].layers[FIRST].weight_bits == 8


def test_what_has_no_width_stays_in_float_and_is_told(tmp_path: Path) -> None:
    spelled = overrides()
    del spelled[TENSORS[SECOND][0]]
    plan, foreign = read(tmp_path, spelled)
    assert SECOND not in plan.layers
    assert TENSORS[SECOND][0] in foreign.floats[SECOND]
    assert SECOND in foreign.message


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "float", "bitwidth": 16}, "float"),
        ({"dtype": "int", "bitwidth": 16}, "16 bits"),
    ],
)
def test_what_no_kernel_has_stays_in_float(
    tmp_path: Path, entry: dict[str, Any], reason: str
) -> None:
    spelled = aimet_mappings()
    spelled["param_encodings"][TENSORS[FIRST][0]] = [entry]
    plan, foreign = read(tmp_path, spelled)
    assert FIRST not in plan.layers
    assert reason in foreign.floats[FIRST]


def test_widths_of_channels(tmp_path: Path) -> None:
    channels = onnx.load(MODEL)
    shape = next(t.dims for t in channels.graph.initializer if t.name == TENSORS[FIRST][0])
    spelled = aimet_mappings()
    bits = [2 + i % 2 for i in range(shape[0])]
    spelled["param_encodings"][TENSORS[FIRST][0]] = [{"bitwidth": b} for b in bits]
    assert read(tmp_path, spelled)[0].layers[FIRST].weight_bits == tuple(bits)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no plan.json"),
        ({"encodings": 3}, "neither a mapping nor a list"),
        ({"param_encodings": {"w": []}}, "without entries"),
        ({"param_encodings": {"w": [{"dtype": "int"}]}}, "bitwidth"),
        ({"other": [{"quant_type": "QInt4"}]}, "no width for its weights"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read(tmp_path, content)


def test_a_plan_of_ours_is_just_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan(model_sha256="0" * 64, layers={}).save(path)
    assert load_plan(path, MODEL) == (Plan.load(path), None)


def test_not_json(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text("{")
    with pytest.raises(PlanError, match="not JSON"):
        load_plan(path, MODEL)


def test_compile_and_export_take_them(tmp_path: Path) -> None:
    path, output = tmp_path / "widths.json", tmp_path / "out.onnx"
    path.write_text(json.dumps(overrides()))
    done = CliRunner().invoke(app, [
        "export", str(MODEL), "--plan", str(path), "--data", str(files().calibration),
        "--max-samples", "4", "--rounding", "nearest", "-o", str(output), "--json",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["layers"][SECOND]["weight_bits"] == 2
