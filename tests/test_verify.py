"""What ``verify`` says of right, rounded and wrong values; whole models are in test_end_to_end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mpqc import pipeline
from mpqc.artifact import LIBRARY, REFERENCE, REPORT, Artifact
from mpqc.data import open_data
from mpqc.demo import files
from mpqc.errors import ArtifactError, GraphError, ModelError, UsageError
from mpqc.graph import Graph, Precision, TensorType
from mpqc.onnx_export import to_onnx
from mpqc.onnx_parts import expose, extract, operators, quantized_ranges
from mpqc.ort import Session
from mpqc.pipeline import Options, compile_model
from mpqc.runtime import load
from mpqc.target import native
from mpqc.verify import (
    TOLERANCE,
    Row,
    Verification,
    _passes,
    input_graph,
    random_feeds,
    read_tap,
    verify,
)
from tests.graph_runner import parse
from tests.test_lowering import CHAIN

DEMO = files()

FLOATS = """
%x = Input() : f32[1,8,6,6]
%w = Constant() : f32[16,8,3,3]
%v = Constant() : f32[8,16,3,3]
%c1 = Conv(%x, %w) {pads=[1, 1, 1, 1]} : f32[1,16,6,6] @conv1
%s1 = Sigmoid(%c1) : f32[1,16,6,6]
%c2 = Conv(%s1, %v) {pads=[1, 1, 1, 1]} : f32[1,8,6,6] @conv2
%s2 = Sigmoid(%c2) : f32[1,8,6,6]
%c3 = Conv(%s2, %w) {pads=[1, 1, 1, 1]} : f32[1,16,6,6] @conv3
%y = Softmax(%c3) {axis=1} : f32[1,16,6,6]
return %y
"""


def compiled(model: Path, folder: Path, bits: str = "w4a4") -> Artifact:
    graph = pipeline.import_model(model)
    data = open_data(
        {
            name: np.random.default_rng(0).normal(size=(8, *kind.shape[1:])).astype(kind.dtype)
            for name, kind in graph.inputs.items()
        },
        graph,
    )
    options = Options(native(), max_samples=8)
    return compile_model(model, folder, options, bits=Precision.parse(bits), data=data)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compiled(DEMO.model, tmp_path_factory.mktemp("demo") / "out", "w2a2")


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("floats")
    (folder / "model.onnx").write_bytes(to_onnx(Graph.parse(FLOATS)))
    return compiled(folder / "model.onnx", folder / "out")


def copied(artifact: Artifact, folder: Path) -> Artifact:
    shutil.copytree(artifact.folder, folder)
    return Artifact(folder)


# Verdicts ------------------------------------------------------------------------------------


def test_equal_outputs_pass_without_a_look_inside(demo: Artifact) -> None:
    result = verify(demo, max_samples=3)
    assert result.passed
    assert result.layers == ()
    assert result.message == (
        "passed: 1 output equal to reference.onnx bit for bit on 3 samples of random inputs, seed 0"
    )


def test_layers_are_compared_when_asked_for(demo: Artifact) -> None:
    seen: list[int] = []
    result = verify(demo, layers=True, max_samples=2, progress=seen.append)
    layers = {row.layer for row in result.layers}
    assert {"stem", "block.conv1", "block.conv2", "down", "depthwise", "pointwise"} <= layers
    assert {row.status for row in result.rows} == {"exact"}
    assert f"step by step {len(result.layers)} values: {len(result.layers)} exact" in result.message
    assert seen == [1, 2]


def test_float_operators_may_differ_in_the_last_place(floats: Artifact) -> None:
    result = verify(floats, max_samples=4)
    assert result.passed, result.message
    assert result.layers  # outputs differ, so the layers were looked at unasked
    by_status = {row.layer: row.status for row in result.layers}
    assert by_status["conv1"] == "exact"
    kernels = {row.kernel for row in result.layers if row.status == "float"}
    assert kernels <= {"float", ""}
    assert "within 0.001 of reference.onnx" in result.message


def test_a_reference_of_another_plan_is_refused(demo: Artifact, tmp_path: Path) -> None:
    other = compiled(DEMO.model, tmp_path / "other", "w3a3")
    broken = copied(demo, tmp_path / "broken")
    shutil.copyfile(other.folder / REFERENCE, broken.folder / REFERENCE)
    with pytest.raises(GraphError, match="the reference has no value named"):
        verify(broken, layers=True)


def test_a_library_of_other_weights_fails(demo: Artifact, tmp_path: Path) -> None:
    """Same names, other numbers: calibrated on other data."""
    graph = pipeline.import_model(DEMO.model)
    data = open_data(DEMO.calibration, graph)
    options = Options(native(), max_samples=16)
    other = compile_model(DEMO.model, tmp_path / "other", options, bits=Precision(2, 2), data=data)
    broken = copied(demo, tmp_path / "broken")
    shutil.copyfile(other.folder / REFERENCE, broken.folder / REFERENCE)
    result = verify(broken)
    assert not result.passed
    first = next(row for row in result.rows if row.status == "wrong")
    assert result.message.startswith("FAILED")
    assert f"first: {first.value} ({first.layer}): WRONG, max diff" in result.message


def result_of(*rows: Row, passed: bool = True) -> Verification:
    return Verification(passed, rows, (), 1, "the data")


def test_a_difference_that_no_step_made_is_told_apart() -> None:
    step = Row("q", "quantize", "elementwise", "exact on own inputs", 0.0, 3.0)
    drifted = Verification(True, (Row("y", "output", "", "float", 0.5, 1.0),), (step,), 2, "x")
    assert drifted.message.startswith("passed: every step is right on its own inputs")
    assert "0.5 from reference.onnx" in drifted.message
    output = Row("y", "output", "", "wrong", 0.5, 1.0)
    made = Verification(False, (output,), (Row("q", "conv", "int8", "wrong", 1.0, 3.0),), 2, "x")
    assert "first: q (conv): WRONG, max diff 1 of 3" in made.message


def test_drift_passes_only_behind_float_operators_and_with_every_step_right() -> None:
    output = Row("y", "output", "", "wrong", 0.5, 1.0)
    right = Row("q", "conv", "int8", "exact on own inputs")
    wrong = Row("q", "conv", "int8", "wrong", 1.0, 3.0)
    floats, integers = {"steps": [{"kind": "float"}]}, {"steps": [{"kind": "int8"}]}
    assert _passes([output], [right], floats)
    assert not _passes([output], [right], integers)
    assert not _passes([output], [wrong], floats)
    assert not _passes([output], [], floats)


def test_rows_merge_to_the_worst_sample() -> None:
    exact = Row("y", "output", "", "exact", 0.0, 5.0)
    near = Row("y", "output", "", "float", 0.001, 5.0)
    nearer = Row("y", "output", "", "float", 0.0001, 5.0)
    wrong = Row("y", "output", "", "wrong", 0.1, 5.0)
    assert exact.merged(near) is near
    assert near.merged(exact) is near
    assert nearer.merged(near) is near
    assert near.merged(wrong) is wrong
    assert near.verdict == "float, max diff 0.001 of 5"
    assert wrong.verdict == "WRONG, max diff 0.1 of 5"


def test_json_holds_everything_and_no_infinity(demo: Artifact) -> None:
    plain = verify(demo, layers=True, max_samples=1).to_json()
    again = json.loads(json.dumps(plain, allow_nan=False))
    assert again["passed"] is True
    assert again["tolerance"] == TOLERANCE
    assert again["layers"][0].keys() == {
        "value", "layer", "kernel", "status", "difference", "largest",
    }  # fmt: skip
    infinite = result_of(Row("y", "output", "", "wrong", float("inf"), 1.0), passed=False)
    json.dumps(infinite.to_json(), allow_nan=False)


def test_nothing_is_not_a_sample(demo: Artifact) -> None:
    with pytest.raises(UsageError, match="at least one sample"):
        verify(demo, max_samples=0)


def test_missing_parts_are_named(demo: Artifact, tmp_path: Path) -> None:
    broken = copied(demo, tmp_path / "broken")
    (broken.folder / REFERENCE).write_bytes(b"\xff no model")
    with pytest.raises(ModelError):
        verify(broken)
    (broken.folder / REFERENCE).unlink()
    with pytest.raises(ArtifactError, match=r"reference\.onnx is missing"):
        verify(broken)
    shutil.copyfile(demo.folder / REFERENCE, broken.folder / REFERENCE)
    (broken.folder / LIBRARY).write_bytes(b"")
    with pytest.raises(ArtifactError, match="no shared library"):
        verify(broken)


# The float model -----------------------------------------------------------------------------


def test_data_with_labels_give_accuracy(demo: Artifact) -> None:
    data = open_data(DEMO.test, input_graph(demo))
    agreement = verify(demo, data, max_samples=50).agreement
    assert agreement is not None
    assert agreement.samples == 50
    assert agreement.float_accuracy is not None
    assert agreement.float_accuracy > 0.9
    assert agreement.accuracy is not None


def test_the_agreement_counts_what_onnx_runtime_counts(demo: Artifact) -> None:
    data = open_data(DEMO.test, input_graph(demo)).sample(40, 0)
    agreement = verify(demo, data, max_samples=40).agreement
    session = Session(DEMO.model)
    with load(demo.folder) as model:
        got = np.concatenate([model.run(feed)["logits"] for feed in data.feeds()])
    wanted = np.concatenate([session.run(feed)["logits"] for feed in data.feeds()])
    assert agreement is not None
    assert agreement.top1 == np.mean(got.argmax(1) == wanted.argmax(1))
    assert agreement.accuracy == np.mean(got.argmax(1) == data.labels)
    noise = ((wanted.astype(float) - got) ** 2).sum()
    expected = 10 * np.log10((wanted.astype(float) ** 2).sum() / noise)
    assert agreement.sqnr_db["logits"] == pytest.approx(expected)


def test_a_model_that_moved_or_changed_is_no_judge(demo: Artifact, tmp_path: Path) -> None:
    artifact = copied(demo, tmp_path / "copy")
    report = json.loads((artifact.folder / REPORT).read_text(encoding="utf-8"))
    for change, note in (({"model": "/nowhere/model.onnx"}, "the float model is not at"),
                         ({"model_sha256": "0" * 64}, "has changed since")):  # fmt: skip
        (artifact.folder / REPORT).write_text(json.dumps({**report, **change}), encoding="utf-8")
        result = verify(artifact, max_samples=1)
        assert result.passed
        assert result.agreement is None
        assert note in result.note
    assert verify(artifact, max_samples=1, model=DEMO.model).agreement is not None


# Doors ---------------------------------------------------------------------------------------


def test_taps_are_what_the_reference_computes(demo: Artifact) -> None:
    """Read by hand, in another order of samples than verify does."""
    feed = random_feeds(input_graph(demo).inputs, 1, demo.reference.read_bytes(), 3)[0]
    manifest = demo.manifest
    taps = manifest["taps"]
    inner = {n: TensorType(t["dtype"], tuple(t["shape"])) for n, t in taps.items()}
    expected = Session(expose(demo.reference.read_bytes(), inner)).run(feed)
    forms = set()
    with load(demo.folder) as model:
        stepper = model.steps(feed)
        for index in range(len(stepper)):
            stepper.step(index)
            for name, tap in taps.items():
                if tap["step"] == index:
                    np.testing.assert_array_equal(read_tap(stepper, tap), expected[name], name)
                    forms.add(tap["form"])
    assert "plain" in forms


def test_random_inputs_fill_the_range_of_the_quantizer(demo: Artifact) -> None:
    reference = demo.reference.read_bytes()
    low, high = quantized_ranges(reference)["input"]
    feeds = random_feeds(input_graph(demo).inputs, 4, reference, 1)
    values = np.concatenate([feed["input"].reshape(-1) for feed in feeds])
    assert values.min() < low
    assert values.max() > high
    assert values.dtype == np.float32
    again = random_feeds(input_graph(demo).inputs, 4, reference, 1)
    np.testing.assert_array_equal(again[3]["input"], feeds[3]["input"])


def test_random_inputs_of_every_type() -> None:
    kinds = {
        name: TensorType(name, (50,)) for name in ("float32", "float16", "uint8", "int64", "bool")
    }
    feed = random_feeds(kinds, 1)[0]
    assert {name: str(array.dtype) for name, array in feed.items()} == {n: n for n in kinds}
    assert feed["uint8"].max() > 100
    assert set(feed["int64"]) == {0, 1}


def test_parts_start_at_the_nearest_known_values() -> None:
    graph = parse(CHAIN)
    whole = to_onnx(graph)
    known = {name: graph.type(name) for name in ("x", "q1", "c2")}
    part = extract(whole, known, "c2", graph.type("c2"))
    session = Session(part)
    assert session.inputs == ("q1",)
    assert "ConvInteger" in operators(part)
    x = np.random.default_rng(0).integers(0, 4, graph.shape("x")).astype(np.uint8)
    inner = Session(expose(whole, {n: graph.type(n) for n in ("q1", "c2")})).run({"x": x})
    got = session.run({"q1": inner["q1"]})
    np.testing.assert_array_equal(got["c2"], inner["c2"])
    with pytest.raises(GraphError, match="'q1' depends on 'x', which nobody knows"):
        extract(whole, {}, "q1", graph.type("q1"))
    with pytest.raises(GraphError, match="does not compute 'z'"):
        extract(whole, known, "z", graph.type("x"))
    with pytest.raises(GraphError, match="no value named 'z'"):
        expose(whole, {"z": graph.type("x")})
    with pytest.raises(ModelError, match="damaged"):
        operators(b"\xff\xff")
