"""The command line: one clear message, the right exit code, and nothing left where it fails."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.main import get_command
from typer.testing import CliRunner

import mpqc
import mpqc.demo
from mpqc import cli
from mpqc.cli import app
from mpqc.histogram import Method
from mpqc.select_kernel import KERNELS
from mpqc.target import TARGETS

ROOT = Path(__file__).parents[1]
MODEL, CALIBRATION, TEST = mpqc.demo.files()
HEAVY = {"tvm", "onnx", "onnxruntime", "numpy", "networkx", "scipy", "pydantic", "torch"}
COMMAND: Any = get_command(app)
VERBS: Mapping[str, Any] = COMMAND.commands


def call(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def python(*words: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment,
        timeout=600, **options,
    )  # fmt: skip


def processor_seconds() -> float:
    """Processor time of the child processes that have ended so far, in seconds."""
    spent = os.times()
    return spent.children_user + spent.children_system


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below, with contents: a file that changed is seen as well as one that came."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(result: Any, code: int, *parts: str) -> None:
    """One message that names the thing; no traceback, nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("mpqc: ")]
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model at w4a4; read it, do not write there."""
    folder = tmp_path_factory.mktemp("cli") / "w4a4"
    result = call("compile", MODEL, "--bits", "w4a4", "--data", CALIBRATION, "-o", folder)
    assert result.exit_code == 0, result.output
    return folder


# Start-up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["-c", "import mpqc"], ["-m", "mpqc", "--help"]])
def test_starts_at_once(words: list[str]) -> None:
    """Under half a second on a quiet machine. Counted is processor time: a busy one adds none."""
    seconds = []
    for _ in range(3):
        start = processor_seconds()
        assert python(*words).returncode == 0
        seconds.append(processor_seconds() - start)
    assert min(seconds) < 1.0


@pytest.mark.parametrize(
    "code",
    ["import mpqc", "from mpqc.cli import app; from typer.main import get_command as g; g(app)"],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    found = python("-c", f"{code}; import sys; print(*sys.modules)")
    assert found.returncode == 0, found.stderr
    assert not HEAVY & set(found.stdout.split())


def test_lazy_names_are_the_real_ones() -> None:
    from mpqc import graph, pipeline, plan, runtime

    assert mpqc.load is runtime.load
    assert mpqc.compile_model is pipeline.compile_model
    assert mpqc.import_model is pipeline.import_model
    assert (mpqc.Graph, mpqc.Precision, mpqc.Plan) == (graph.Graph, graph.Precision, plan.Plan)
    assert mpqc.__version__
    assert set(mpqc.__all__) <= set(dir(mpqc))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = mpqc.nonsense


# Every verb ----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_that_parses(verb: str) -> None:
    shown = call(verb, "--help")
    assert shown.exit_code == 0
    example = VERBS[verb].epilog
    assert example.startswith("Example: mpqc ")
    program, name, *words = shlex.split(example.removeprefix("Example: "))
    assert (program, name) == ("mpqc", verb)
    VERBS[verb].make_context(verb, words)  # raises on an option that does not exist


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_the_common_options(verb: str) -> None:
    options = {word for parameter in VERBS[verb].params for word in parameter.opts}
    assert {"--json", "-v", "--seed"} <= options
    assert ("--output" not in options) or verb == "demo" or "--overwrite" in options


def test_choices_of_the_command_line_are_those_of_the_code() -> None:
    assert set(get_args(get_type_hints(cli.compile_)["calibration"])) == set(get_args(Method))
    (kernel,) = [option for option in VERBS["compile"].params if option.name == "kernel"]
    for name in KERNELS:
        assert name == "auto" or name in kernel.help


@pytest.mark.parametrize(
    "words", [["fly"], ["compile"], ["compile", "m.onnx"], ["targets", "--wings"],
              ["compile", "m.onnx", "-o", "x", "--batch", "0"]]
)  # fmt: skip
def test_wrong_usage_is_2(words: list[str]) -> None:
    result = call(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage" in result.stderr


def test_version() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"mpqc {mpqc.__version__}\n")


# Bad input -----------------------------------------------------------------------------------


def unknown_operator(folder: Path) -> Path:
    graph = helper.make_graph(
        [
            helper.make_node("Levitate", ["x"], ["y"], name="up", domain="magic"),
            helper.make_node("Land", ["y"], ["z"], name="down", domain="magic"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "yz"],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("magic", 1)]
    path = folder / "unknown.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    )
    return path


def data_outside(folder: Path) -> Path:
    inside = folder / "inside"
    inside.mkdir()
    (folder / "secret.bin").write_bytes(bytes(64))
    model = onnx.load(MODEL)
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", "../secret.bin"
    path = inside / "outside.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def written(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("verb", ["compile", "inspect"])
@pytest.mark.parametrize(
    ("make", "part"),
    [
        (written("cut.onnx", MODEL.read_bytes()[:40_000]), "cut.onnx"),
        (written("random.onnx", np.random.default_rng(0).bytes(5000)), "random.onnx"),
        (written("empty.onnx", b""), "empty.onnx"),
        (lambda folder: folder / "missing.onnx", "missing.onnx"),
        (lambda folder: folder, "folder"),
        (data_outside, "secret.bin"),
    ],
    ids=["cut", "random", "empty", "missing", "a folder", "data outside"],
)
def test_bad_models_are_refused(
    verb: str, make: Callable[[Path], Path], part: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    words = [verb, make(folder)]
    before = listing(tmp_path)
    if verb == "compile":
        words += ["--bits", "w2a2", "--data", CALIBRATION, "-o", tmp_path / "deep/er/out"]
    refused(call(*words), 2, part)
    assert listing(tmp_path) == before


def test_unknown_operators_are_refused_by_name(tmp_path: Path) -> None:
    """Found by importing alone: before data are read, and every node at once."""
    path = unknown_operator(tmp_path)
    before = listing(tmp_path)
    result = call("compile", path, "--bits", "w2a2", "--data", "missing.npz", "-o", tmp_path / "o")
    refused(result, 2, "2 nodes cannot be compiled")
    assert "up: operator magic::Levitate" in result.stderr
    assert "down: operator magic::Land" in result.stderr
    inspected = call("inspect", path, "--json")
    assert inspected.exit_code == 1
    assert [problem["node"] for problem in json.loads(inspected.stdout)["problems"]] == [
        "up",
        "down",
    ]
    assert "up, down" in inspected.stderr
    assert listing(tmp_path) == before


def pictures(**change: Any) -> dict[str, Any]:
    with np.load(CALIBRATION) as stored:
        arrays = {"input": stored["input"][:8], "labels": stored["labels"][:8]}
    return {name: array for name, array in (arrays | change).items() if array is not None}


NAN = pictures()["input"].copy()
NAN[3, 0, 2, 2] = np.nan
BAD_DATA = {
    "wrong name": (pictures(input=None, image=pictures()["input"], more=np.ones(3)), "input"),
    "wrong shape": (pictures(input=np.ones((8, 1, 9, 8), np.float32)), "expected"),
    "wrong dtype": (pictures(input=np.ones((8, 1, 8, 8))), "float64"),
    "NaN": (pictures(input=NAN), "NaN"),
    "no samples": (pictures(input=np.ones((0, 1, 8, 8), np.float32), labels=None), "empty"),
}


@pytest.mark.parametrize("case", BAD_DATA)
@pytest.mark.parametrize("verb", ["compile", "run", "verify"])
def test_bad_data_is_refused(verb: str, case: str, artifact: Path, tmp_path: Path) -> None:
    arrays, part = BAD_DATA[case]
    data = tmp_path / "data.npz"
    np.savez(data, **arrays)
    before = listing(tmp_path)
    words = {
        "compile": ["compile", MODEL, "--bits", "w2a2", "--data", data, "-o", tmp_path / "a/b"],
        "run": ["run", artifact, "--input", data, "--output", tmp_path / "c/d.npz"],
        "verify": ["verify", artifact, "--data", data],
    }
    refused(call(*words[verb]), 2, part)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--bits", "w2a2"], "--data"),
        (["--bits", "w9a2"], "from 1 to 8"),
        (["--bits", "2"], "w2a4"),
        (["--bits", "w2a2", "--plan", "p.json"], "exclude"),
        (["--bits", "w2a2", "--first-last", "both"], "both"),
        (["--plan", "missing.json"], "missing.json"),
        (["--bits", "w2a2", "--target", "toaster"], "rpi4"),
        (["--bits", "w2a2", "--kernel", "magic", "--data", CALIBRATION], "bitplane"),
        (["--bits", "w2a2", "--data", "missing.npz"], "missing.npz"),
        (["--bits", "w2a2", "--data", CALIBRATION, "--preprocess", "missing.toml"], "missing.toml"),
        (["--dim", "batch"], "NAME=VALUE"),
        (["--dim", "N=0"], "NAME=VALUE"),
        (["--dim", "ghost=4"], "ghost"),
    ],
    ids=lambda value: " ".join(map(str, value[:4])) if isinstance(value, list) else "",
)
def test_contradictory_or_wrong_options_are_refused(
    words: list[object], part: str, tmp_path: Path
) -> None:
    refused(call("compile", MODEL, "-o", tmp_path / "out", *words), 2, part)
    assert listing(tmp_path) == {}


def test_a_plan_for_another_model_is_refused_unless_forced(artifact: Path, tmp_path: Path) -> None:
    model = onnx.load(MODEL)
    model.doc_string = "another file, the same layers"
    other = tmp_path / "other.onnx"
    onnx.save(model, other)
    before = listing(tmp_path)
    words = ["compile", other, "--plan", artifact / "plan.json", "--data", CALIBRATION]
    words += ["-o", tmp_path / "out"]
    refused(call(*words), 2, "the plan was made for the model")
    assert listing(tmp_path) == before
    assert call(*words, "--force").exit_code == 0


@pytest.mark.parametrize("place", ["file/out", "/proc/mpqc/out", "locked/out"])
def test_an_unwritable_output_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "locked").mkdir()
    if place.startswith("locked"):
        (tmp_path / "locked").chmod(0o500)
        if os.access(tmp_path / "locked", os.W_OK):
            pytest.skip("nothing is locked for this user")
    before = listing(tmp_path)
    output = tmp_path / place
    refused(
        call("compile", MODEL, "--bits", "w2a2", "--data", CALIBRATION, "-o", output),
        2, f"cannot write {output}",
    )  # fmt: skip
    assert listing(tmp_path) == before


def test_outputs_are_replaced_only_when_asked_and_only_ours(artifact: Path, tmp_path: Path) -> None:
    own, foreign = tmp_path / "own", tmp_path / "foreign"
    shutil.copytree(artifact, own)
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("ten years of work")
    before = listing(tmp_path)
    words = ["compile", MODEL, "--bits", "w8a8", "--data", CALIBRATION, "-o"]
    refused(call(*words, own), 2, "--overwrite")
    refused(call(*words, foreign), 2, "--overwrite")
    refused(call(*words, foreign, "--overwrite"), 2, "not replaced")
    assert listing(tmp_path) == before
    assert call(*words, own, "--overwrite").exit_code == 0
    assert json.loads((own / "plan.json").read_text())["layers"]["down"]["weight_bits"] == 8
    assert sorted(os.listdir(tmp_path)) == ["foreign", "own"]


def test_an_output_is_kept_when_its_replacement_fails(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "own")
    before = listing(tmp_path)
    result = call("compile", MODEL, "--bits", "w8a8", "-o", tmp_path / "own", "--overwrite")
    refused(result, 2, "--data")
    assert listing(tmp_path) == before


# Whose fault ---------------------------------------------------------------------------------


def test_a_missing_compiler_is_3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    result = call("compile", MODEL, "--bits", "w4a4", "--data", CALIBRATION, "-o", tmp_path / "out")
    refused(result, 3, "compiler")
    assert listing(tmp_path) == {}
    doctor = call("doctor")
    assert doctor.exit_code == 3
    assert "C compiler" in doctor.stderr


def test_verbose_adds_the_traceback() -> None:
    result = call("compile", "missing.onnx", "-o", "out", "-v")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "mpqc: " in result.stderr.splitlines()[-1]


def test_a_bug_is_told_apart_from_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("wrong turn")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 70
    assert "bug in mpqc" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    words = ["-m", "mpqc", "compile", MODEL, "--bits", "w2a2", "--data", CALIBRATION, "-o", "a/out"]
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    deadline = time.monotonic() + 300
    # the working folder has appeared, so that there is something to leave
    while not any(tmp_path.rglob(".out-*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 130, told
    assert "interrupted" in told
    assert "Traceback" not in told
    assert listing(tmp_path) == {}


# What the verbs do ---------------------------------------------------------------------------


def test_compile_as_json(tmp_path: Path) -> None:
    output, dump = tmp_path / "out", tmp_path / "dump"
    result = call(
        "compile", MODEL, "--bits", "w2a4", "--first-last", "same", "--data", CALIBRATION,
        "--kernel", "bitplane", "--batch", 2, "--calibration", "minmax", "--max-samples", 20,
        "--seed", 3, "-o", output, "--debug-dump", dump, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["manifest"] == json.loads((output / "manifest.json").read_text())
    assert {layer["run"] for layer in told["manifest"]["layers"]} == {"w2a4"}
    assert {layer["kernel"] for layer in told["manifest"]["layers"]} == {"bitplane"}
    assert told["manifest"]["inputs"]["input"]["shape"] == [2, 1, 8, 8]
    calibration = told["manifest"]["calibration"]
    assert calibration["accuracy"]["rounding"] == "gptq"
    assert {key: calibration[key] for key in ("method", "max_samples", "seed")} == {
        "method": "minmax",
        "max_samples": 20,
        "seed": 3,
    }
    texts = sorted(dump.iterdir())
    assert [path.name[:2] for path in texts] == [f"{n:02d}" for n in range(1, len(texts) + 1)]
    assert texts[0].name == "01-read-quantizers.txt"
    first, last = texts[0].read_text(), texts[-1].read_text()
    assert "Conv(" in first
    assert "IntConv(" in last
    assert first.splitlines()[-1] == "return %logits"


def test_compile_prints_layers_kernels_sizes_and_seconds(tmp_path: Path) -> None:
    result = call("compile", MODEL, "-o", tmp_path / "float")
    assert result.exit_code == 0
    for part in ("depthwise", "float", "170 kB", "1.61 G BitOPs", "model.so", "import"):
        assert part in result.stdout
    assert "fallback the plan leaves it in float: stem, block.conv1" in result.stdout
    assert "neither --plan nor --bits" in result.stderr


@pytest.mark.parametrize("batch", [1, 4])
def test_run_loops_over_batches(batch: int, artifact: Path, tmp_path: Path) -> None:
    folder = artifact
    if batch > 1:
        folder = tmp_path / "batched"
        words = ["--bits", "w4a4", "--data", CALIBRATION, "--batch", batch, "-o", folder]
        assert call("compile", MODEL, *words).exit_code == 0
    data = pictures()["input"][:7]
    np.savez(tmp_path / "x.npz", input=data)
    output = tmp_path / "y.npz"
    words = ["run", folder, "--input", tmp_path / "x.npz", "--output", output, "--threads", 2]
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["samples"] == 7
    assert told["outputs"] == {"logits": {"dtype": "float32", "shape": [7, 10]}}
    with mpqc.load(artifact) as model, np.load(output) as found:
        expected = [model.run({"input": data[i : i + 1]})["logits"][0] for i in range(7)]
        if batch == 1:
            np.testing.assert_array_equal(found["logits"], expected)
        else:  # ranges are chosen from other histograms: the same classes
            np.testing.assert_array_equal(found["logits"].argmax(1), np.asarray(expected).argmax(1))
    refused(call(*words), 2, "--overwrite")
    assert call(*words, "--overwrite").exit_code == 0


def test_verify_passes_and_fails(artifact: Path, tmp_path: Path) -> None:
    good = call("verify", artifact, "--data", TEST, "--layers", "--json")
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout)["passed"] is True
    broken = tmp_path / "broken"
    shutil.copytree(artifact, broken)
    reference = onnx.load(broken / "reference.onnx")
    offset = next(t for t in reference.graph.initializer if t.name.endswith("/b"))
    values = numpy_helper.to_array(offset) + np.float32(3)
    offset.CopyFrom(numpy_helper.from_array(values, offset.name))
    onnx.save(reference, broken / "reference.onnx")
    bad = call("verify", broken, "--data", TEST, "--json")
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["passed"] is False
    assert "does not compute what its reference says" in bad.stderr


def test_bench(artifact: Path) -> None:
    result = call("bench", artifact, "--repeat", 3, "--per-layer", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [timing["name"] for timing in told["timings"]] == ["mpqc", "ort-fp32"]
    assert told["speedups"].keys() == {"ort-fp32"}
    assert "block.conv1" in {layer["layer"] for layer in told["layers"]}
    alone = call("bench", artifact, "--repeat", 1, "--against", "none")
    assert "mpqc" in alone.stdout
    assert "ort-fp32" not in alone.stdout
    refused(call("bench", artifact, "--against", "hare"), 2, "hare")


@pytest.mark.parametrize("verb", ["verify", "bench", "run"])
def test_what_is_no_artifact_is_refused(verb: str, tmp_path: Path) -> None:
    more = ["--input", TEST, "--output", tmp_path / "y.npz"] if verb == "run" else []
    refused(call(verb, tmp_path, *more), 2, "not a compiled model")
    assert listing(tmp_path) == {}


def test_an_artifact_of_another_machine_is_refused(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = json.loads((artifact / "manifest.json").read_text())["target"]["features"]
    if not features:
        pytest.skip("this machine has no extension that another could lack")
    poor = next(target for target in TARGETS.values() if not set(features) <= target.features)
    monkeypatch.setattr("mpqc.runtime.native", lambda: poor)
    refused(call("bench", artifact), 2, "was built for native and needs")


def test_doctor_and_targets_as_json() -> None:
    found = call("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(found.stdout)["checks"]}
    assert checks["TVM"]["ok"]
    failed = any(check["required"] and not check["ok"] for check in checks.values())
    assert found.exit_code == (3 if failed else 0)
    shown = call("targets", "--json")
    targets = {target["name"]: target for target in json.loads(shown.stdout)["targets"]}
    assert targets.keys() == {"native", *TARGETS}
    assert targets["native"]["runs_here"] is True
    assert call("targets").stdout.count("Raspberry") == 3
