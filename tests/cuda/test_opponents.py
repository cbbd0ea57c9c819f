"""Opponents on a GPU: what is said without one, and ONNX Runtime's calls against a fake of it."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import mpqc.demo
from mpqc import bench
from mpqc.cli import app
from mpqc.errors import EnvironmentLacks, ModelError, UsageError
from mpqc.graph import Array
from mpqc.ort_cuda import PROVIDER, CudaSession
from mpqc.target import gpu as gpu_here
from tests.cuda.emulation import Emulator

MODEL = Path("model.onnx")


class FakeValue:
    """Of arrays "on the GPU": copies."""

    def __init__(self, array: Array) -> None:
        self.array = array.copy()

    @staticmethod
    def ortvalue_from_numpy(array: Array, device: str, number: int) -> "FakeValue":
        assert (device, number) == ("cuda", 0)
        assert array.flags.c_contiguous
        return FakeValue(array)

    def update_inplace(self, array: Array) -> None:
        assert array.shape == self.array.shape
        self.array[...] = array

    def numpy(self) -> Array:
        return self.array.copy()


class FakeBinding:
    def __init__(self) -> None:
        self.inputs: dict[str, FakeValue] = {}
        self.outputs: dict[str, FakeValue] = {}

    def bind_ortvalue_input(self, name: str, value: FakeValue) -> None:
        self.inputs[name] = value

    def bind_ortvalue_output(self, name: str, value: FakeValue) -> None:
        self.outputs[name] = value


class Entry:
    def __init__(self, name: str) -> None:
        self.name = name


class FakeSession:
    """Doubles its input."""

    graphs: list[str] = []  # noqa: RUF012 - of the test that runs
    falls_back = refuses = cannot_record = False

    def __init__(self, model: str, options: object, providers: Sequence[Any]) -> None:
        (name, settings), cpu = providers
        assert (name, cpu) == (PROVIDER, "CPUExecutionProvider")
        if self.refuses:
            raise RuntimeError("bad model")
        self.graph = settings["enable_cuda_graph"]
        if self.graph == "1" and self.cannot_record:
            raise RuntimeError("nodes have not been partitioned to the CUDAExecutionProvider")
        self.graphs.append(self.graph)

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"] if self.falls_back else [PROVIDER, "CPUExecutionProvider"]

    def get_outputs(self) -> list[Entry]:
        return [Entry("y")]

    def run(self, names: list[str], arrays: Mapping[str, Array]) -> list[Array]:
        return [2 * arrays["x"] for _ in names]

    def io_binding(self) -> FakeBinding:
        return FakeBinding()

    def run_with_iobinding(self, binding: FakeBinding) -> None:
        binding.outputs["y"].update_inplace(2 * binding.inputs["x"].array)


class FakeOptions:
    log_severity_level = 2


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    class Session(FakeSession):
        graphs: list[str] = []  # noqa: RUF012

    module = ModuleType("onnxruntime")
    found: dict[str, Any] = {
        "InferenceSession": Session, "SessionOptions": FakeOptions, "OrtValue": FakeValue,
        "get_available_providers": lambda: [PROVIDER, "CPUExecutionProvider"],
        "set_default_logger_severity": lambda _: None, "preload_dlls": lambda: None,
    }  # fmt: skip
    for name, value in found.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    return Session


@pytest.mark.parametrize("cannot_record", [False, True])
def test_it_runs_on_the_gpu_as_a_graph_if_it_can(
    cannot_record: bool, runtime: type[FakeSession]
) -> None:
    runtime.cannot_record = cannot_record
    session = CudaSession(MODEL)
    for value in (1.0, 3.0):
        x = np.full((2, 3), value, np.float32)
        np.testing.assert_array_equal(session.run({"x": x})["y"], 2 * x)
    assert runtime.graphs == (["0"] if cannot_record else ["0", "1"])
    assert len(session.seconds({"x": x}, 4)) == 4
    wide = np.ones((5, 3), np.float32)
    np.testing.assert_array_equal(session.run({"x": wide})["y"], 2 * wide)


def test_a_provider_that_falls_back_to_the_cpu_is_no_opponent(runtime: type[FakeSession]) -> None:
    runtime.falls_back = True
    with pytest.raises(EnvironmentLacks, match=r"falls back to the CPU: pip install"):
        CudaSession(MODEL)
    runtime.falls_back, runtime.refuses = False, True
    with pytest.raises(ModelError, match="bad model"):
        CudaSession(MODEL)


def test_an_installation_without_the_provider_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    ort = pytest.importorskip("onnxruntime")
    if PROVIDER in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has it")
    with pytest.raises(EnvironmentLacks, match="pip install onnxruntime-gpu"):
        CudaSession(MODEL)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EnvironmentLacks, match="needs ONNX Runtime with its CUDA provider"):
        CudaSession(MODEL)


def test_without_pytorch_its_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "mpqc.train.opponent", raising=False)
    for name in ("torch-fp16", "torch-int8"):
        with pytest.raises(EnvironmentLacks, match=f"{name} needs PyTorch: pip install torch"):
            bench.opponent(name, MODEL, [{}], 1)


def test_opponents_on_a_gpu_need_one(monkeypatch: pytest.MonkeyPatch, gpu: Emulator) -> None:
    bench.check_opponents(["ort-fp32", "ort-cuda"])
    assert gpu.driver.exists()
    with monkeypatch.context() as patch:
        patch.setenv("MPQC_CUDA_DRIVER", "/nowhere/libcuda.so.1")
        gpu_here.cache_clear()
        for name in bench.ON_GPU:
            with pytest.raises(EnvironmentLacks, match=f"{name} runs on a GPU, and no CUDA driver"):
                bench.check_opponents(["ort-fp32", name])
        with pytest.raises(UsageError, match=r"choose from ort-fp32, .*ort-cuda, torch-fp16"):
            bench.check_opponents(["tensorrt"])


def test_bench_and_compare_take_opponents_on_the_gpu(
    gpu: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verbs' way to an opponent; it is ONNX Runtime on the CPU in disguise."""
    assert gpu.driver.exists()
    opened: list[Path] = []

    def disguised(model: Path) -> Any:
        from mpqc.ort import Session

        opened.append(model)
        return Session(model)

    monkeypatch.setattr("mpqc.ort_cuda.CudaSession", disguised)
    files, out = mpqc.demo.files(), tmp_path / "out"

    def call(*words: object) -> str:
        result = CliRunner().invoke(app, [*map(str, words), "--json"])
        assert result.exit_code == 0, result.output
        return result.stdout

    call("compile", files.model, "--bits", "w2a2", "--data", files.calibration, "--target",
         "cuda:sm_86", "-o", out)  # fmt: skip
    said = call("bench", out, "--against", "ort-cuda", "--repeat", 1, "--per-layer")
    assert '"ort-cuda"' in said
    assert "Emulated GPU (" in said
    said = call("compare", files.model, "--data", files.test, "--uniform", "w2a2", "--against",
                "ort-cuda", "--no-plot", "--max-samples", 2, "--repeat", 1, "--target",
                "cuda:sm_86", "-o", tmp_path / "report")  # fmt: skip
    assert '"ort-cuda"' in said
    assert len(opened) == 2
