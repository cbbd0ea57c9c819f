"""Exported models say the numbers that the compiled ones compute."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from typer.testing import CliRunner

from mpqc.calibration import Calibration
from mpqc.cli import app
from mpqc.data import open_data
from mpqc.demo import files
from mpqc.errors import OutputError, UsageError
from mpqc.export_model import Exported, Format, export_model
from mpqc.graph import Array, Graph, Precision, TensorType
from mpqc.onnx_quantized import to_dialect
from mpqc.pipeline import Options, import_model, prepare, quantize
from mpqc.plan import Plan
from mpqc.reference import run
from mpqc.rounding import Accuracy
from mpqc.target import find_target

DEMO = files()
FAST = Options(
    find_target("native"), max_samples=16, accuracy=Accuracy(rounding="nearest", clipping="mse")
)


def exported(folder: Path, form: Format, bits: str) -> Exported:
    data = open_data(DEMO.calibration, import_model(DEMO.model))
    return export_model(
        DEMO.model, folder / "q.onnx", form, FAST, bits=Precision.parse(bits), data=data
    )


def integers(bits: str) -> Graph:
    """The integer graph that compiling would lower."""
    data = open_data(DEMO.calibration, import_model(DEMO.model))
    made = prepare(DEMO.model, FAST, bits=Precision.parse(bits), data=data)
    return quantize(made.graph, made.plan, made.calibration, FAST.method, None, made.rounded)


def in_onnx_runtime(model: bytes, feeds: dict[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, feeds)
    return found


@pytest.mark.parametrize("form", ["qdq", "qcdq", "integer"])
@pytest.mark.parametrize("bits", ["w2a2", "w4a4", "w3a5", "w1a8", "w8a8"])
def test_gives_the_results_of_the_integer_graph(tmp_path: Path, form: Format, bits: str) -> None:
    path = exported(tmp_path, form, bits).path
    onnx.checker.check_model(onnx.load(path), full_check=True)
    graph = integers(bits)
    test = np.load(DEMO.test)["input"]
    errors = []
    for picture in test[:20]:
        feeds = {"input": picture[None]}
        (found,) = in_onnx_runtime(path.read_bytes(), feeds)
        (wanted,) = run(graph, feeds).values()
        errors.append(float(np.abs(found - wanted).max() / np.ptp(wanted)))
    # float sums in another order cross a rounding border once in a while; integers never do
    assert np.sort(errors)[15] < 1e-5
    assert max(errors) < (1e-5 if form == "integer" else 0.1)


@pytest.mark.parametrize("form", ["qdq", "qcdq", "qonnx", "integer"])
@pytest.mark.parametrize("bits", ["w2a3", "w1a2", "w4a4", "w8a8", "w5a6"])
def test_reads_back_as_the_same_integers(tmp_path: Path, form: Format, bits: str) -> None:
    """Weights, widths, scales and outputs of the read model are those of the compiled one."""
    path = exported(tmp_path, form, bits).path
    given, graph = integers(bits), import_model(path)
    again = quantize(graph, Plan.of(graph, {}), Calibration({}, 0))
    layers = {node.name: node for node in given if node.op in ("IntConv", "IntMatMul")}
    assert len(layers) == 7
    for name, node in layers.items():
        read = again[name]
        np.testing.assert_array_equal(
            given.constants[node.inputs[1]], again.constants[read.inputs[1]]
        )
        for key in ("weight_bits", "activation_bits", "zero_point", "weight_levels"):
            assert read.attrs[key] == node.attrs[key], (name, key)
    feeds = {"input": np.load(DEMO.test)["input"][:1]}
    (wanted,) = run(given, feeds).values()
    (found,) = run(again, feeds).values()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_qonnx_holds_the_same_numbers_as_qdq(tmp_path: Path) -> None:
    """Stock ONNX Runtime has no Quant; its operands must say what QuantizeLinear's say."""
    (tmp_path / "a").mkdir()
    qdq = onnx.load(exported(tmp_path / "a", "qcdq", "w2a3").path)
    qonnx = onnx.load(exported(tmp_path, "qonnx", "w2a3").path)
    linear = {t.name: numpy_helper.to_array(t) for t in qdq.graph.initializer}
    plain = {t.name: numpy_helper.to_array(t) for t in qonnx.graph.initializer}
    by_name = {node.name: node for node in qdq.graph.node}
    quants = [node for node in qonnx.graph.node if node.op_type == "Quant"]
    weights = [node for node in quants if node.input[0] in plain]
    assert len(weights) == 7
    assert len(quants) > len(weights)
    for node in weights:
        value, scale, zero, bits = (plain[name] for name in node.input)
        told = by_name[node.name]  # DequantizeLinear of the codes, behind a Clip below 8 bits
        source = told.input[0]
        clip = next((n for n in qdq.graph.node if n.output[0] == source), None)
        codes = linear[source if clip is None else clip.input[0]]
        np.testing.assert_array_equal(np.rint(value / scale), codes)
        assert zero == 0
        assert bits == (2 if clip is not None else 8)


@pytest.mark.parametrize(("bits", "kind"), [(2, TensorProto.INT2), (4, TensorProto.INT4)])
def test_weights_take_their_bits_in_the_file(tmp_path: Path, bits: int, kind: int) -> None:
    model = onnx.load(exported(tmp_path, "qdq", f"w{bits}a{bits}").path)
    narrow = [tensor for tensor in model.graph.initializer if tensor.data_type == kind]
    assert len(narrow) == 5  # the body; the ends have eight bits
    for tensor in narrow:
        assert len(tensor.raw_data) == -(-np.prod(tensor.dims) * bits // 8)


@pytest.mark.parametrize("form", ["qdq", "qcdq", "qonnx", "integer"])
def test_keeps_names_and_tells_widths(tmp_path: Path, form: Format) -> None:
    made = exported(tmp_path, form, "w2a4")
    original = {n.name for n in onnx.load(DEMO.model).graph.node if n.op_type in ("Conv", "Gemm")}
    assert original <= made.widths.keys()
    nodes = {node.name: node for node in onnx.load(made.path).graph.node}
    widths = [
        [made.widths[name]["weight_bits"], made.widths[name]["activation_bits"]]
        for name in original
    ]
    assert sorted(widths) == [[2, 4]] * 5 + [[8, 8]] * 2
    for name in original:
        told = {p.key: p.value for p in nodes[name].metadata_props}
        text = " ".join(f"{key}={value}" for key, value in told.items()) + nodes[name].doc_string
        assert f"mpqc.weight_bits={made.widths[name]['weight_bits']}" in text


def test_old_operators_are_brought_to_the_opset_of_the_types() -> None:
    """Dropout with a ratio attribute and axes as attributes ended before opset 21."""
    graph = Graph.parse(
        """
        %x = Input() : f32[1,1,6]
        %w = Constant() : i16[6,4]
        %s = Constant() {value=[0.5, 0.25, 1.0, 2.0]} : f32[4]
        %d = Squeeze(%x) {axes=[0]} : f32[1,6]
        %c = Quantize(%d) {scale=0.5, zero_point=3, bits=4} : u8[1,6]
        %y = Dequantize(%c) {scale=0.5, zero_point=3} : f32[1,6]
        %v = DequantizeWeights(%w, %s) {axis=1, bits=4, levels="signed"} : f32[6,4]
        %z = MatMul(%y, %v) : f32[1,4]
        return %z
        """,
        {"w": np.random.default_rng(0).integers(-8, 8, (6, 4)).astype(np.int16)},
    )
    old = Graph(graph.inputs, graph.outputs, graph, graph.constants, graph.types, 9)
    model = to_dialect(old, "qdq")
    assert onnx.load_from_string(model).opset_import[0].version == 21
    x = np.linspace(-3, 6, 6, dtype=np.float32).reshape(1, 1, 6)
    codes = np.clip(np.rint(x[0] / 0.5) + 3, 0, 15)
    wanted = ((codes - 3) * 0.5) @ (graph.constants["w"] * graph.constants["s"])
    np.testing.assert_allclose(in_onnx_runtime(model, {"x": x})[0], wanted, rtol=1e-5)


def test_asymmetric_weights_become_unsigned() -> None:
    values = np.array([[-3, 12], [0, 7], [12, -3]], np.int16)
    graph = Graph.parse(
        """
        %x = Input() : f32[1,3]
        %w = Constant() : i16[3,2]
        %s = Constant() {value=[0.5]} : f32[1]
        %c = Quantize(%x) {scale=1.0, zero_point=0, bits=2} : u8[1,3]
        %y = Dequantize(%c) {scale=1.0, zero_point=0} : f32[1,3]
        %v = DequantizeWeights(%w, %s) {axis=1, bits=4, levels="signed"} : f32[3,2]
        %z = MatMul(%y, %v) : f32[1,2]
        return %z
        """,
        {"w": values},
    )
    assert graph.type("w") == TensorType("int16", (3, 2))
    model = to_dialect(graph, "qdq")
    kinds = [tensor.data_type for tensor in onnx.load_from_string(model).graph.initializer]
    assert TensorProto.UINT4 in kinds
    x = np.array([[0, 1, 3]], np.float32)
    np.testing.assert_array_equal(in_onnx_runtime(model, {"x": x})[0], x @ values * 0.5)


def test_nothing_to_export() -> None:
    with pytest.raises(UsageError, match="no quantized layer"):
        export_model(DEMO.model, "never.onnx", "qdq", FAST)
    assert not Path("never.onnx").exists()


def test_does_not_overwrite(tmp_path: Path) -> None:
    exported(tmp_path, "qcdq", "w8a8")
    before = (tmp_path / "q.onnx").read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        exported(tmp_path, "qdq", "w2a2")
    assert (tmp_path / "q.onnx").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.onnx"]


def test_the_verb(tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    done = CliRunner().invoke(app, [
        "export", str(DEMO.model), "--bits", "w4a4", "--data", str(DEMO.calibration),
        "--max-samples", "8", "--rounding", "nearest", "-o", str(output), "--json",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["format"], told["opset"], len(told["layers"])) == ("qdq", 21, 7)
    assert told["bytes"] == output.stat().st_size
