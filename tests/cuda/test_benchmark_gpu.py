"""benchmarks/gpu.py on the emulated GPU: what is compiled ahead runs with nothing but numpy."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

import mpqc.demo
from benchmarks import gpu, gpu_build, gpu_floor, gpu_run, gpu_torch
from mpqc.cuda import toolkit
from mpqc.cuda.select import RATES
from mpqc.errors import EnvironmentLacks
from mpqc.target import TARGETS
from tests.cuda.emulation import Emulator

SM86 = TARGETS["cuda:sm_86"]
# As an H200 might answer.
PRINTED = (
    '{"gpu": "made up", "capability": 90, "multiprocessors": 132, "mma-b1": 12000.0, '
    '"mma-s8": 2000.0, "dp4a": 256.0, "and-popcount": 510.0, "hertz": 1.9e9, '
    '"bytes_a_second": 4e12}'
)


@pytest.fixture(scope="module")
def archive(emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = mpqc.demo.files().model
    real, networks = [(model, "w2a2", "bitplane")], {"demo": model}
    path = tmp_path_factory.mktemp("archive") / "gpu.tar.xz"
    with pytest.MonkeyPatch.context() as patch:
        emulator.install(patch)
        patch.setattr(gpu_build, "compile_rates", made_up_rates)
        widths = [("w1a1", "bitplane"), ("w8a8", "int8")]
        gpu_build.build(path, SM86, real, networks, widths, [1, 2])
    return path


def made_up_rates(output: Path, _target: object) -> None:
    output.write_text(f"#!/bin/sh\necho '{PRINTED}'\n", "utf-8")


def measured(archive: Path, patch: pytest.MonkeyPatch, *more: str) -> tuple[int, dict[str, Any]]:
    output = archive.with_name("gpu.json")
    output.unlink(missing_ok=True)
    quick = ("--each", "0.02", "--together", "1")
    words = ["gpu", "run", str(archive), "-o", str(output), *quick, *more]
    patch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        gpu.main()
    return int(end.value.code or 0), json.loads(output.read_text("utf-8"))


def test_one_call_verifies_and_measures(
    archive: Path,
    gpu: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gpu.driver.exists()
    code, result = measured(archive, monkeypatch, "--seconds", "200", "--alone")
    assert code == 0, result
    assert result["verify"]["digits-w2a2-bitplane"]["logits"] == "exact"
    assert "finds no GPU" in result["errors"]["no GPU"]
    steps = result["networks"]["demo w1a1-bitplane-2"]["steps"]
    assert {"mma-b1"} <= {step["variant"] for step in steps}
    table = result["table"]
    forms = {(row["form"], row["batch"]) for row in table}
    assert forms == {
        (f"{form}-{batch}", batch) for form in ("w1a1-bitplane", "w8a8-int8") for batch in (1, 2)
    }
    assert all(row["memory_floor"] > 0 and row["arithmetic_floor"] > 0 for row in table)
    said = capsys.readouterr().out
    assert "verified 1 of 1 models" in said
    assert "binary tensor-core products run at 6.00 times the rate of bytes: at speed" in said
    assert "layers are slower than our int8" in said


def test_what_does_not_fit_into_the_time_is_said(
    archive: Path, gpu: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu.driver.exists()
    _, result = measured(archive, monkeypatch, "--seconds", "2", "--alone")
    assert "network demo w1a1-bitplane-1" in result["skipped"]


def test_a_gpu_that_is_not_there_is_said(
    archive: Path, gpu: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu.driver.exists()
    monkeypatch.setenv("MPQC_CUDA_DRIVER", "/nowhere/libcuda.so.1")
    code, result = measured(archive, monkeypatch, "--seconds", "200", "--alone")
    assert code == 1
    assert "no CUDA driver" in result["verify"]["digits-w2a2-bitplane"]["error"]
    assert "no CUDA driver" in result["networks"]["demo w8a8-int8-1"]["error"]


def test_a_section_that_crashes_or_hangs_costs_only_itself(
    archive: Path, gpu: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu.driver.exists()
    monkeypatch.setenv("MPQC_EMULATED_FAIL", "cuGraphLaunch:719")
    code, result = measured(archive, monkeypatch, "--seconds", "200")
    assert code == 1
    assert "the GPU failed" in result["verify"]["digits-w2a2-bitplane"]["error"]
    assert all("the GPU failed" in found["error"] for found in result["networks"].values())
    assert result["rates"]["mma-b1"] == 12000
    torch = result["torch"]["demo 1"]["layers"]  # without PyTorch, or without its GPU
    assert "error" in torch or not any(map(any, map(dict.values, torch["layers"].values())))
    found = gpu_run.isolated("network", "/nowhere/model.so", 0.02, 1, seconds=60)
    assert "does not exist" in found["error"]
    assert "no section" in gpu_run.isolated("nothing", "x", seconds=60)["error"]
    assert "not done after" in gpu_run.isolated("rates", "/", seconds=0.01)["error"]
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "ended with status 1" in gpu_run.isolated("rates", "/", seconds=60)["error"]


def test_the_run_needs_numpy_alone(archive: Path, gpu: Emulator, tmp_path: Path) -> None:
    """A PyTorch image has no TVM, no onnx and no typer."""
    assert gpu.driver.exists()
    code = (
        "import sys\n"
        "for name in ('tvm', 'tvm_ffi', 'onnx', 'onnxruntime', 'typer', 'rich', 'pydantic', "
        "'scipy', 'networkx', 'matplotlib'):\n    sys.modules[name] = None\n"
        "from benchmarks import gpu\n"
        "gpu.main()\n"
    )
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    library = str(tmp_path / "networks/demo/w8a8-int8-1.so")
    for section, *words in (
        ("verify", str(tmp_path / "verify/digits-w2a2-bitplane")),
        ("network", library, "0.02", "1"),
        ("errors", library),
        ("rates", str(tmp_path)),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, "section", section, *words],
            cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "error" not in json.loads(done.stdout), done.stdout


def test_the_program_for_rates_compiles_for_every_gpu(tmp_path: Path) -> None:
    try:
        toolkit.find_nvcc()
    except EnvironmentLacks as lack:
        pytest.skip(str(lack))
    for name in ("cuda:sm_75", "cuda:sm_90"):
        gpu_build.compile_rates(tmp_path / "rates", TARGETS[name])
        assert (tmp_path / "rates").is_file()
        (tmp_path / "rates").unlink()


def test_floors_are_bytes_and_products() -> None:
    rates = json.loads(PRINTED)
    layer = {
        "name": "conv", "input": [1, 64, 56, 56], "weight": [128, 64, 3, 3], "groups": 1,
        "macs": 28 * 28 * 128 * 64 * 9,
    }  # fmt: skip
    assert gpu_floor.results(layer) == 28 * 28 * 128
    found = gpu_floor.floor(layer, 8, "w2a1", "bitplane", rates)
    assert found is not None
    moved = (8 * (64 * 56 * 56 + 128 * 28 * 28) * 1 + 2 * 128 * 64 * 9) / 8
    assert found.memory == pytest.approx(moved / 4e12)
    assert found.arithmetic == pytest.approx(8 * layer["macs"] * 2 / (12000 * 132 * 1.9e9))  # type: ignore[operator]
    int8 = gpu_floor.floor(layer, 8, "w2a1", "int8", rates)
    assert int8 is not None
    assert int8.arithmetic == pytest.approx(3 * found.arithmetic)
    assert gpu_floor.floor(layer, 8, "w2a1", "int8", {"error": "none"}) is None
    dense = {"name": "fc", "input": [1, 512], "weight": [512, 1000], "macs": 512000}
    assert gpu_floor.results(dense) == 1000
    assert gpu_floor.bits("w2+4a3") == (4, 3)


def test_assumed_rates_are_those_of_the_selection() -> None:
    for arch, known in RATES.items():
        assert gpu_floor.ASSUMED[arch.removeprefix("sm_")] == {
            "and-popcount": known.popcount, "dp4a": known.dot,
            "mma-b1": known.bits, "mma-s8": known.bytes,
        }  # fmt: skip


def test_wrong_numbers_are_told_from_rounding() -> None:
    import numpy as np

    one = np.array([1.0, -2.0], np.float32)
    assert gpu_run.judge(one, one) == "exact"
    assert gpu_run.judge(one * np.float32(1.0001), one).startswith("float")
    assert gpu_run.judge(one + 1, one).startswith("WRONG")


def test_an_opponent_that_fails_is_said_once() -> None:
    def fails() -> float:
        raise RuntimeError("no int8 here\nmore")

    errors: list[str] = []
    assert gpu_torch.attempt(fails, errors) is None
    assert gpu_torch.attempt(fails, errors) is None
    assert errors == ["RuntimeError: no int8 here"]
    assert gpu_torch.attempt(lambda: 1.0, errors) == 1.0
