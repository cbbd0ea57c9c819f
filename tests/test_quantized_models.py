"""Models that are quantized already: true widths, equal codes, their accuracy, real sizes."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from mpqc.artifact import Artifact
from mpqc.bench import bench
from mpqc.cli import app
from mpqc.data import Data, open_data
from mpqc.errors import UsageError
from mpqc.export_model import FORMATS, Format, export_model
from mpqc.graph import Array, Precision
from mpqc.inspect_model import inspect_model
from mpqc.passes.find_layers import find_integer_layers
from mpqc.pipeline import Options, compile_model, import_model, read_model
from mpqc.plan import Plan
from mpqc.preprocess import Preprocess
from mpqc.target import native
from mpqc.verify import input_graph, verify

WIDTHS = {
    "TFC_1W1A": {"w1a1": 4},
    "TFC_2W2A": {"w2a2": 4},
    "cifar10_resnet8_int8_qdq": {"w8a8": 10},
    "espcn_x2_qonnx": {"w8a8": 2, "w4a4": 2},
    "jettagging_qkeras": {"w6a6": 3},
    "mobilenet_v2_1.0_224_uint8_qdq": {"w8a8": 53},
}
SLOW = "mobilenet_v2_1.0_224_uint8_qdq"
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n == SLOW else n for n in WIDTHS]
OPTIONS = Options(native())

Compile = Callable[[str], Artifact]


@pytest.fixture(scope="module")
def compiled(shared_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Artifact of a model of the shared folder, built once."""
    folder = tmp_path_factory.mktemp("quantized")

    def build(name: str) -> Artifact:
        if (folder / name).exists():
            return Artifact.open(folder / name)
        return compile_model(shared_models / f"{name}.onnx", folder / name, OPTIONS)

    return build


@pytest.mark.parametrize("name", NAMES)
def test_widths_are_the_true_ones(shared_models: Path, name: str) -> None:
    found = inspect_model(shared_models / f"{name}.onnx")
    given = Counter(row.widths for row in found.layers if row.widths)
    assert found.compiles
    assert {widths: given[widths] for widths in WIDTHS[name]} == WIDTHS[name]
    assert {row.widths for row in found.layers} - WIDTHS[name].keys() <= {""}
    assert "quantized already" in found.message
    for row in found.layers:  # what stays float says why
        assert row.widths or row.reason or row.name in found.kept


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_the_original(compiled: Compile, name: str) -> None:
    artifact = compiled(name)
    result = verify(artifact, max_samples=4)
    assert result.passed, result.message
    original = result.original
    assert original is not None
    assert original.whole == ("qdq" in name)
    assert len(original.rows) >= len(
        find_integer_layers(read_model(artifact_model(artifact)).graph)
    )
    assert original.codes > 500
    assert original.ties < 1e-4 * original.codes
    ran = Counter(layer["run"] for layer in artifact.manifest["layers"] if layer["run"])
    assert ran == WIDTHS[name]


def artifact_model(artifact: Artifact) -> Path:
    return Path(artifact.report["model"])


def test_a_wrong_weight_is_seen_beside_the_original(
    shared_models: Path, compiled: Compile, tmp_path: Path
) -> None:
    """The original differs from what was compiled in one weight: verify must not pass."""
    artifact = compiled("TFC_2W2A")
    model = onnx.load(shared_models / "TFC_2W2A.onnx")
    weights = next(t for t in model.graph.initializer if t.dims == [64, 784] or t.dims == [784, 64])
    values = numpy_helper.to_array(weights).copy()
    values[:, :8] *= -1
    values[:8] *= -1
    weights.CopyFrom(numpy_helper.from_array(values, weights.name))
    onnx.save(model, tmp_path / "other.onnx")
    result = verify(artifact, max_samples=8, model=tmp_path / "other.onnx")
    assert result.original is not None
    assert not result.original.passed
    assert not result.passed
    assert "codes differ" in result.message


def mnist(folder: Path, artifact: Artifact) -> Data:
    return open_data(
        folder / "mnist_test_a.npz", input_graph(artifact), Preprocess(layout="NHW", scale=1 / 255)
    )


@pytest.mark.parametrize(("name", "least"), [("TFC_1W1A", 0.926), ("TFC_2W2A", 0.964)])
def test_keeps_the_accuracy_of_digits(
    compiled: Compile, shared_data: Path, name: str, least: float
) -> None:
    artifact = compiled(name)
    result = verify(artifact, mnist(shared_data, artifact), max_samples=5001)
    assert result.agreement is not None
    assert result.agreement.accuracy is not None
    assert result.agreement.accuracy >= least
    assert result.agreement.top1 is not None
    assert result.agreement.top1 > 0.999  # argmax of equal logits may differ


def test_keeps_the_accuracy_of_pictures(compiled: Compile, shared_data: Path) -> None:
    artifact = compiled("cifar10_resnet8_int8_qdq")
    data = open_data(shared_data / "cifar10_test_a.npz", input_graph(artifact), Preprocess())
    result = verify(artifact, data, max_samples=1000, seed=0)
    assert result.passed
    agreement = result.agreement
    assert agreement is not None
    assert agreement.accuracy is not None
    assert agreement.float_accuracy is not None
    assert abs(agreement.accuracy - agreement.float_accuracy) <= 0.003
    assert agreement.accuracy > 0.85


@pytest.mark.slow
def test_keeps_the_accuracy_of_mobilenet(compiled: Compile, shared_data: Path) -> None:
    artifact = compiled(SLOW)
    preprocess = Preprocess(scale=1 / 127.5, mean=(1.0, 1.0, 1.0), crop=(224, 224))
    data = open_data(shared_data / "nips17_a.npz", input_graph(artifact), preprocess)
    result = verify(artifact, data, max_samples=500)
    assert result.agreement is not None
    assert result.agreement.accuracy is not None
    assert result.agreement.accuracy >= 0.84


def test_weights_take_their_bits_in_the_library(compiled: Compile) -> None:
    """59,008 weights of two bits are 14,752 bytes; kernels may pad rows to whole vectors."""
    artifact = compiled("TFC_2W2A")
    bits = 2 * (784 * 64 + 2 * 64 * 64 + 64 * 10)
    assert artifact.report["cost"]["size"] == bits / 8
    one = compiled("TFC_1W1A").report["bytes"]["weights"]
    two = artifact.report["bytes"]["weights"]
    scales = 2 * 4 * (3 * 64 + 10)
    assert bits / 8 < two < 1.15 * bits / 8 + scales
    assert one < 0.65 * two


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["TFC_1W1A", "TFC_2W2A", "jettagging_qkeras", "espcn_x2_qonnx",
                                  "cifar10_resnet8_int8_qdq"])  # fmt: skip
def test_exports_read_back_as_the_same_integers(
    shared_models: Path, tmp_path: Path, name: str, form: Format
) -> None:
    source = shared_models / f"{name}.onnx"
    made = export_model(source, tmp_path / "again.onnx", form, OPTIONS)
    before, after = read_model(source).graph, read_model(made.path).graph
    layers = find_integer_layers(before)
    again = {layer.name: widths for layer, widths in find_integer_layers(after).items()}
    for layer, widths in layers.items():
        assert again[layer.name] == widths
        np.testing.assert_array_equal(
            before.constants[before[layer.name].inputs[1]],
            after.constants[after[layer.name].inputs[1]],
        )


def test_two_bit_weights_take_two_bits_in_the_exported_file(
    shared_models: Path, tmp_path: Path
) -> None:
    made = export_model(shared_models / "TFC_2W2A.onnx", tmp_path / "q.onnx", "qdq", OPTIONS)
    assert made.opset == 25
    weights = [
        tensor
        for tensor in onnx.load(made.path).graph.initializer
        if tensor.data_type == TensorProto.INT2 and len(tensor.dims) == 2
    ]
    assert sum(int(np.prod(tensor.dims)) for tensor in weights) == 784 * 64 + 2 * 64 * 64 + 640
    assert sum(len(tensor.raw_data) for tensor in weights) == 14752


def test_widths_for_a_quantized_model_are_refused(shared_models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"quantized already \(w2a2\)"):
        compile_model(
            shared_models / "TFC_2W2A.onnx", tmp_path / "out", OPTIONS, bits=Precision(4, 4)
        )
    assert not (tmp_path / "out").exists()


# Models that need no folder ---------------------------------------------------------------------


def conv_qdq(path: Path) -> Path:
    """Q/DQ -> Conv with int8 weights by channel -> Relu -> Q/DQ -> Gemm int4."""
    rng = np.random.default_rng(0)
    tensors: list[Any] = [
        numpy_helper.from_array(np.float32(0.02), "xs"),
        numpy_helper.from_array(np.uint8(128), "xz"),
        numpy_helper.from_array(rng.integers(-127, 128, (8, 3, 3, 3)).astype(np.int8), "w"),
        numpy_helper.from_array(rng.uniform(0.001, 0.01, 8).astype(np.float32), "ws"),
        numpy_helper.from_array(rng.normal(size=8).astype(np.float32), "b"),
        numpy_helper.from_array(np.float32(0.03), "ys"),
        numpy_helper.from_array(np.uint8(0), "yz"),
        helper.make_tensor("v", TensorProto.INT4, [8, 5], rng.integers(-8, 8, 40)),
        numpy_helper.from_array(np.float32(0.1), "vs"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], name="qx"),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], name="dx"),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], name="dw", axis=0),
        helper.make_node("Conv", ["xd", "wd", "b"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("QuantizeLinear", ["r", "ys", "yz"], ["rq"], name="qr"),
        helper.make_node("DequantizeLinear", ["rq", "ys", "yz"], ["rd"], name="dr"),
        helper.make_node("GlobalMaxPool", ["rd"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("DequantizeLinear", ["v", "vs"], ["vd"], name="dv"),
        helper.make_node("MatMul", ["f", "vd"], ["y"], name="fc"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        tensors,
    )
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_the_command_line_walks_a_quantized_model(tmp_path: Path) -> None:
    model, run = conv_qdq(tmp_path / "m.onnx"), CliRunner()
    shown = run.invoke(app, ["inspect", str(model), "--target", "native"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "w8a8" in shown.stdout
    assert "w4a8" in shown.stdout
    out = tmp_path / "out"
    built = run.invoke(app, ["compile", str(model), "-o", str(out), "--strict"])
    assert built.exit_code == 0, built.output
    result = run.invoke(app, ["verify", str(out)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "m.onnx: " in result.stdout
    assert "quantized values" in result.stdout


def test_the_plan_of_an_artifact_holds_the_widths_it_brought(tmp_path: Path) -> None:
    compile_model(conv_qdq(tmp_path / "m.onnx"), tmp_path / "out", OPTIONS)
    layers = Plan.load(tmp_path / "out" / "plan.json").layers
    assert {name: (p.weight_bits, p.activation_bits) for name, p in layers.items()} == {
        "conv": (8, 8),
        "fc": (4, 8),
    }


@pytest.mark.parametrize("form", FORMATS)
def test_small_models_come_back(tmp_path: Path, form: Format) -> None:
    source = conv_qdq(tmp_path / "m.onnx")
    made = export_model(source, tmp_path / "q.onnx", form, OPTIONS)
    graph = import_model(made.path)
    found = {layer.name: str(widths) for layer, widths in find_integer_layers(graph).items()}
    assert found == {"conv": "w8a8", "fc": "w4a8"}
    if form != "qonnx":
        from mpqc.ort import Session

        feed: dict[str, Array] = {
            "x": np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)
        }
        (wanted,) = Session(source).run(feed).values()
        (found_y,) = Session(made.path).run(feed).values()
        assert float(np.abs(found_y - wanted).max()) <= 0.04 * float(np.abs(wanted).max())


def test_verbs_that_choose_widths_say_that_there_are_none(tmp_path: Path) -> None:
    model, run = conv_qdq(tmp_path / "m.onnx"), CliRunner()
    for verb in (["search", "--method", "eagl", "--budget", "bitops=w4a4"], ["profile"]):
        result = run.invoke(app, [verb[0], str(model), *verb[1:], "-o", str(tmp_path / "out")])
        assert result.exit_code == 2, result.output
        assert "quantized already (w4a8, w8a8)" in result.stderr
        assert not (tmp_path / "out").exists()


def test_competes_with_onnx_runtime_on_the_file_itself(tmp_path: Path) -> None:
    run, out = CliRunner(), tmp_path / "out"
    compile_model(conv_qdq(tmp_path / "m.onnx"), out, OPTIONS)
    result = run.invoke(app, ["bench", str(out), "--repeat", "2", "--json"])
    assert result.exit_code == 0, result.output
    names = [timing["name"] for timing in json.loads(result.stdout)["timings"]]
    assert names == ["mpqc", "ort"]
    refused = run.invoke(app, ["bench", str(out), "--against", "ort-int8"])
    assert refused.exit_code == 2
    assert "quantized already" in refused.stderr


def test_competes_with_standard_operators_where_the_file_does_not_run(compiled: Compile) -> None:
    names = [timing.name for timing in bench(compiled("TFC_2W2A"), repeat=2).timings]
    assert names == ["mpqc", "ort (standard operators)"]
