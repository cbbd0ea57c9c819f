"""benchmarks/gpu.py on the emulated GPU: what is compiled ahead runs with nothing but numpy."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import mpqc.demo
from benchmarks import gpu, gpu_build
from mpqc.target import TARGETS
from tests.cuda.emulation import Emulator


@pytest.fixture
def archive(tmp_path: Path, gpu: Emulator) -> Path:
    assert gpu.driver.exists()
    model = mpqc.demo.files().model
    real, networks = [(model, "w2a2", "bitplane")], {"demo": model}
    target = TARGETS["cuda:sm_86"]
    gpu_build.build(tmp_path / "gpu.tar.xz", target, real, networks, [("w1a1", "bitplane")], [1, 2])
    return tmp_path / "gpu.tar.xz"


def measured(archive: Path, patch: pytest.MonkeyPatch, *more: str) -> tuple[int, dict[str, Any]]:
    output = archive.with_name("gpu.json")
    words = ["gpu", "run", str(archive), "--alone", "-o", str(output), *more]
    patch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        gpu.main()
    return int(end.value.code or 0), json.loads(output.read_text("utf-8"))


def test_one_call_verifies_and_measures(
    archive: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = measured(archive, monkeypatch, "--seconds", "60")
    assert code == 0
    assert result["verify"]["digits-w2a2-bitplane"]["logits"] == "exact"
    steps = result["networks"]["demo w1a1-bitplane-2"]["steps"]
    assert {"mma-b1"} <= {step["variant"] for step in steps}
    assert "verified 1 of 1 models" in capsys.readouterr().out
    code, result = measured(archive, monkeypatch, "--seconds", "2")
    assert "demo w1a1-bitplane-1" in result["skipped"]  # time is kept, and what it cost is said


def test_a_gpu_that_is_not_there_is_said(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPQC_CUDA_DRIVER", "/nowhere/libcuda.so.1")
    code, result = measured(archive, monkeypatch, "--seconds", "60")
    assert code == 1
    assert "no CUDA driver" in result["verify"]["digits-w2a2-bitplane"]["error"]
