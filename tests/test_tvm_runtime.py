"""The freestanding library beside the same program under TVM's own runtime."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.runtime import manifest, quantized_program
from mpqc import demo
from mpqc.artifact import Artifact
from mpqc.boards.board import check_freestanding
from mpqc.build import build
from mpqc.elf import read_elf
from mpqc.errors import ArtifactError, UsageError
from mpqc.model_source import Form
from mpqc.program import Program, plan_memory
from mpqc.runtime import LocalModel, load, open_model
from mpqc.target import TARGETS, Target, native
from tests.arm_emulator import cross_compiler
from tests.graph_runner import built, feeds, lower, parse
from tests.mpqc_program import mpqc
from tests.test_lowering import CHAIN, RESIDUAL, SHORTCUTS

FOR_TVM = Form(runtime="tvm")


def under_tvm(program: Program, folder: Path) -> LocalModel:
    library = folder / "tvm.so"
    build(program, plan_memory(program), native(), manifest(program), library, FOR_TVM)
    return open_model(library)


@pytest.mark.parametrize("text", [CHAIN, RESIDUAL, SHORTCUTS])
@pytest.mark.parametrize("kernel", ["bitplane", "bitplane-lut", "int8"])
def test_graphs_give_the_same_bits(text: str, kernel: str, tmp_path: Path) -> None:
    graph = parse(text)
    program = lower(graph, kernel=kernel)
    fed = feeds(graph)
    (tmp_path / "own").mkdir()
    with under_tvm(program, tmp_path) as theirs, built(program, tmp_path / "own") as ours:
        for _ in range(2):
            wanted = theirs.run(fed)
            for name, array in ours.run(fed).items():
                np.testing.assert_array_equal(array, wanted[name])


@pytest.mark.parametrize(
    "name",
    [
        "TFC_2W2A",
        "jettagging_qkeras",
        "mnist_cnn",
        "cifar10_resnet8",
        "magika_standard_v3_3",
        "mobilenet_v1_0.25_224",
        *(pytest.param(name, marks=pytest.mark.slow)
          for name in ("TFC_1W1A", "cifar10_resnet8_int8_qdq", "cifar10_resnet20",
                       "ppocr_v2_angle_cls", "mobilenet_v2_1.0_224", "squeezenet1.0_sparse",
                       "mobilenet_v2_1.0_224_uint8_qdq")),
    ],
)  # fmt: skip
def test_real_models_give_the_same_bits(name: str, shared_models: Path, tmp_path: Path) -> None:
    dims = {"x:2": 48, "x:3": 192} if name.startswith("ppocr") else None
    program, fed = quantized_program(shared_models / f"{name}.onnx", "w2a2", dims)
    (tmp_path / "own").mkdir()
    with under_tvm(program, tmp_path) as theirs, built(program, tmp_path / "own") as ours:
        wanted = theirs.run(fed)
        for output, array in ours.run(fed).items():
            np.testing.assert_array_equal(array, wanted[output])


# The verbs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("digits") / "out"
    made = mpqc("compile", str(demo.files().model), "--bits", "w2a2", "--rounding", "nearest",
                "--data", str(demo.files().calibration), "--runtime", "tvm",
                "-o", str(folder))  # fmt: skip
    assert made.returncode == 0, made.stderr
    return Artifact.open(folder)


def test_the_manifest_says_which_runtime(artifact: Artifact) -> None:
    assert artifact.manifest["runtime"] == "tvm"
    with open_model(artifact.folder) as model:
        assert model.manifest == artifact.manifest
    assert "TVMFFIErrorSetRaisedFromCStrParts" in read_elf(artifact.library.read_bytes()).undefined
    assert not (artifact.folder / "model.h").exists()


def test_verify_sees_every_value(artifact: Artifact) -> None:
    result = mpqc("verify", str(artifact.folder), "--layers", "--max-samples", "3", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["passed"]
    assert {row["value"] for row in found["layers"]} >= artifact.manifest["taps"].keys()
    assert all(row["status"] == "exact" for row in found["layers"])


def test_run_and_bench(artifact: Artifact, tmp_path: Path) -> None:
    ran = mpqc("run", str(artifact.folder), "--input", str(demo.files().test),
               "-o", str(tmp_path / "y.npz"))  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    with np.load(tmp_path / "y.npz") as arrays, np.load(demo.files().test) as test:
        assert np.mean(arrays["logits"].argmax(1) == test["labels"]) > 0.5
    timed = mpqc("bench", str(artifact.folder), "--threads", "2", "--repeat", "3",
                 "--against", "none", "--json")  # fmt: skip
    assert timed.returncode == 0, timed.stderr
    (timing,) = json.loads(timed.stdout)["timings"]
    assert 0 < timing["best"] <= timing["median"] < 1


def test_steps_cannot_be_timed(artifact: Artifact) -> None:
    result = mpqc("bench", str(artifact.folder), "--per-layer")
    assert result.returncode == 2
    assert "--per-layer times freestanding libraries" in result.stderr


def test_boards_measure_freestanding_libraries(artifact: Artifact) -> None:
    with pytest.raises(UsageError, match="boards run freestanding libraries"):
        check_freestanding(artifact)


def test_load_names_the_way(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"mpqc\.runtime\.open_model runs it"):
        load(artifact.library)


@pytest.mark.parametrize(
    "more", [{"static": True}, {"bare": True}, {"ready": True}, {"prefix": "net", "static": True}]
)
def test_other_forms_are_refused(more: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--runtime tvm has one form"):
        Form(runtime="tvm", **more)  # type: ignore[arg-type]


def test_tvm_alone_runs_it(artifact: Artifact) -> None:
    """Without mpqc: what a program that uses TVM already would do."""
    program = (
        "import sys, numpy, tvm\n"
        "from tvm import relax\n"
        "vm = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu())\n"
        "x = tvm.runtime.tensor(numpy.zeros((1, 1, 8, 8), 'float32'))\n"
        "print(vm['main'](x)[0].numpy().shape)\n"
    )
    environment = {"PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", program, str(artifact.library)],
        capture_output=True, text=True, check=False, env=environment, cwd=artifact.folder,
    )  # fmt: skip
    assert result.stdout.strip() == "(1, 10)", result.stderr


def test_boards_have_it_too(tmp_path: Path) -> None:
    target: Target = TARGETS["rpi4"]
    cross_compiler(target)
    graph = parse(CHAIN)
    program, library = lower(graph, target), tmp_path / "model.so"
    build(program, plan_memory(program), target, manifest(program), library, FOR_TVM)
    elf = read_elf(library.read_bytes())
    assert (elf.machine, elf.bits) == (183, 64)
