"""Libraries for GPUs: nvcc's machine code inside, the driver's errors in words, whole models."""

import ctypes
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import mpqc.demo
from benchmarks import gpu_build
from mpqc import pipeline, reference
from mpqc.build import build
from mpqc.cli import app
from mpqc.cuda import codegen, toolkit
from mpqc.cuda.select import RATES
from mpqc.data import Data, open_data
from mpqc.elf import read_elf
from mpqc.errors import ArtifactError, EnvironmentLacks, UsageError
from mpqc.graph import Graph, Precision
from mpqc.model_source import Form
from mpqc.passes.find_layers import find_layers
from mpqc.pipeline import Options
from mpqc.program import plan_memory
from mpqc.runtime import CompiledModel
from mpqc.target import TARGETS, Target
from mpqc.toolchain import OLDEST_GLIBC
from mpqc.verify import verify
from tests.cuda.emulation import Emulator
from tests.cuda.test_kernels import convolution
from tests.graph_runner import built, feeds, lower, parse
from tests.test_lowering import RESIDUAL

SM86 = TARGETS["cuda:sm_86"]
GPUS = {target.cuda: target for target in TARGETS.values() if target.cuda}
PTX, ELF = 1, 2


def require_nvcc() -> str:
    try:
        return toolkit.find_nvcc()
    except EnvironmentLacks as lack:
        pytest.skip(str(lack))


def contents(fat_binary: bytes) -> set[tuple[int, int]]:
    """Kind and architecture of everything in a fat binary."""
    found, at = set(), fat_binary.index(struct.pack("<I", 0xBA55ED50))
    header, size = struct.unpack_from("<HQ", fat_binary, at + 6)
    at, end = at + header, at + header + size
    while at < end:
        kind, _, header, size = struct.unpack_from("<HHIQ", fat_binary, at)
        found.add((kind, struct.unpack_from("<I", fat_binary, at + 28)[0]))
        at += header + size
    return found


def instructions(graph: Graph, target: Target, kernel: str, folder: Path) -> str:
    """PTX of the graph's kernels."""
    source = codegen.generate(lower(graph, target, kernel).kernels, target.cuda).source
    (folder / "kernels.cu").write_text(source, "utf-8")
    command = [
        require_nvcc(), "-std=c++17", *toolkit.EXACT, f"-arch={target.cuda}", "-ptx",
        "-diag-suppress=128,177", "kernels.cu", "-o", "kernels.ptx",
    ]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "kernels.ptx").read_text("utf-8")


@pytest.mark.parametrize("arch", RATES)
def test_nvcc_makes_machine_code_for_every_architecture(arch: str, tmp_path: Path) -> None:
    require_nvcc()
    kernels = {
        **lower(convolution((1, 40, 5, 6), 24, levels="odd"), GPUS[arch], "bitplane").kernels,
        **lower(parse(RESIDUAL), GPUS[arch], "int8").kernels,
    }
    code = codegen.generate(kernels, arch)
    made = toolkit.compile_fat_binary(code.source, arch, tmp_path)
    number = int(arch.removeprefix("sm_"))
    assert contents(made) == {(ELF, number), (PTX, number)}


@pytest.mark.parametrize(
    ("arch", "kernel", "expected"),
    [
        ("sm_75", "bitplane", "popc.b32"),
        ("sm_75", "int8", "dp4a.u32.s32"),
        ("sm_80", "bitplane", "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"),
        ("sm_90", "bitplane", "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"),
        ("sm_86", "int8", "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"),
    ],
)
def test_the_expected_instructions_are_generated(
    arch: str, kernel: str, expected: str, tmp_path: Path
) -> None:
    ptx = instructions(convolution((1, 64, 8, 8), 64), GPUS[arch], kernel, tmp_path)
    assert expected in ptx
    assert "fma.rn.f32" not in ptx  # products are rounded before they are added


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_no_kernel_spills_registers(arch: str, tmp_path: Path) -> None:
    nvcc = require_nvcc()
    kernels: dict[str, Any] = {}
    for bits in [(1, 1), (2, 2), (3, 3), (4, 4), (8, 8), (1, 8), (8, 1)]:
        for kind in ("bitplane", "int8") if bits == (2, 2) else ("bitplane",):
            for shape, out in [((32, 128, 28, 28), 128), ((1, 512, 7, 7), 512)]:
                program = lower(convolution(shape, out, bits=bits), GPUS[arch], kind)
                name = f"{kind}_{bits[0]}_{bits[1]}_{shape[0]}"
                kernels |= {f"{k}_{name}": v for k, v in program.kernels.items() if kind in k}
    (tmp_path / "k.cu").write_text(codegen.generate(kernels, arch).source, "utf-8")
    command = [
        nvcc, "-std=c++17", "-O3", *toolkit.EXACT, f"-arch={arch}", "-Xptxas", "-v", "-cubin",
        "-diag-suppress=128,177", "-o", "k.cubin", "k.cu",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    stored = [int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", done.stderr)]
    assert len(stored) == len(kernels) >= 14
    assert not any(stored)
    assert max(shared) <= 48 * 1024  # more needs an attribute that nobody sets


def test_the_library_holds_the_code_and_needs_no_cuda(tmp_path: Path) -> None:
    require_nvcc()
    program = lower(parse(RESIDUAL), SM86)
    library = tmp_path / "model.so"
    made = build(program, plan_memory(program), SM86, {"steps": []}, library)
    data = library.read_bytes()
    assert contents(data) == {(ELF, 86), (PTX, 86)}
    assert made.code_bytes > 1000
    assert not [name for name in read_elf(data).needed if "cuda" in name]
    assert made.header is not None
    assert "mpqc_device_seconds" in made.header.read_text("utf-8")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["bitplane", "int8"])
def test_a_gpu_computes_what_the_graph_means(kernel: str, tmp_path: Path) -> None:
    target = next((t for t in reversed(GPUS.values()) if t.runs_here), None)
    if target is None:
        pytest.skip("no GPU and driver here")
    require_nvcc()
    graph = parse(RESIDUAL)
    with built(lower(graph, target, kernel), tmp_path, target) as model:
        got, expected = model.run(feeds(graph)), reference.run(graph, feeds(graph))
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array)


def test_without_nvcc_the_cure_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpqc.cuda.toolkit.shutil.which", lambda _: None)
    monkeypatch.delenv(toolkit.VARIABLE, raising=False)
    with pytest.raises(EnvironmentLacks, match=r"CUDA toolkit.*pip install nvidia-cuda-nvcc"):
        toolkit.find_nvcc()
    monkeypatch.setenv(toolkit.VARIABLE, "/nowhere/nvcc")
    with pytest.raises(EnvironmentLacks, match="names /nowhere/nvcc"):
        toolkit.require(Form(), SM86)


@pytest.mark.parametrize("form", [Form(static=True), Form(bare=True)])
def test_forms_for_boards_without_a_driver_are_refused(form: Form) -> None:
    with pytest.raises(UsageError, match="is for CPUs"):
        toolkit.require(form, SM86)


# ---- the runtime, under the emulated driver


@pytest.fixture
def library(tmp_path: Path, gpu: Emulator) -> Path:
    program = lower(parse(RESIDUAL), SM86)
    build(program, plan_memory(program), SM86, {"steps": []}, tmp_path / "model.so")
    assert gpu.sources
    return tmp_path / "model.so"


def test_graph_and_single_launches_agree(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = parse(RESIDUAL)
    fed, expected = feeds(graph), reference.run(graph, feeds(graph))
    for wanted in ("1", "0"):
        monkeypatch.setenv("MPQC_CUDA_GRAPH", wanted)
        with CompiledModel(library) as model, CompiledModel(library, threads=3) as second:
            for each in (model, second, model):
                for name, array in each.run(fed).items():
                    np.testing.assert_array_equal(array, expected[name])
            assert model.device_seconds > 0
            steps = model.steps(fed)
            for index in range(len(steps)):
                steps.step(index)
            for array, name in zip(steps.results, model.outputs, strict=True):
                np.testing.assert_array_equal(array, expected[name])


def test_the_library_for_a_jetson_loads_on_old_systems(tmp_path: Path, gpu: Emulator) -> None:
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.skip("no aarch64-linux-gnu-gcc")
    target = TARGETS["jetson-orin"]
    program = lower(parse(RESIDUAL), target)
    build(program, plan_memory(program), target, {"steps": []}, tmp_path / "model.so")
    found = read_elf((tmp_path / "model.so").read_bytes())
    assert found.machine_name == "aarch64"
    assert found.glibc <= OLDEST_GLIBC
    assert "libdl.so.2" in found.needed
    assert gpu.sources


def test_no_driver_is_said(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPQC_CUDA_DRIVER", "/nowhere/libcuda.so.1")
    with pytest.raises(EnvironmentLacks, match=r"no CUDA driver.*nvidia-smi"):
        CompiledModel(library)


@pytest.mark.parametrize(
    ("plan", "kind", "said"),
    [
        ("cuInit:100", EnvironmentLacks, "finds no GPU"),
        ("cuDeviceGetCount:100", EnvironmentLacks, "CUDA_VISIBLE_DEVICES"),
        ("cuModuleLoadData:209", ArtifactError, "cannot run code for sm_86"),
        ("cuModuleLoadData:222", ArtifactError, "update the driver"),
        ("cuModuleGetFunction:500", ArtifactError, "CUDA error 500"),
        ("cuMemAlloc_v2:2", ArtifactError, "out of GPU memory"),
        ("cuMemAllocHost_v2:2", ArtifactError, "out of GPU memory"),
        ("cuLaunchKernel:701", ArtifactError, "the GPU failed"),
        ("cuStreamSynchronize:700", ArtifactError, "the GPU failed"),
        ("cuGraphInstantiateWithFlags:999", ArtifactError, "making a graph"),
        ("cuStreamCreate:700", ArtifactError, "the GPU failed"),
    ],
)
def test_what_fails_at_the_start_is_said_and_can_be_tried_again(
    plan: str, kind: type[Exception], said: str, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPQC_EMULATED_FAIL", plan)
    with pytest.raises(kind, match=said):
        CompiledModel(library)
    monkeypatch.delenv("MPQC_EMULATED_FAIL")
    with CompiledModel(library) as model:
        model.run(feeds(parse(RESIDUAL)))


def test_an_older_gpu_is_refused_by_name(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPQC_EMULATED_CAPABILITY", "75")
    with pytest.raises(ArtifactError, match=r"Emulated GPU is sm_75.*--target cuda:sm_75"):
        CompiledModel(library)


@pytest.mark.parametrize("call", ["cuGraphLaunch", "cuStreamSynchronize"])
def test_a_gpu_lost_in_the_middle_writes_nothing(
    call: str, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = feeds(parse(RESIDUAL))
    with CompiledModel(library) as model:
        model.run(fed)
        steps = model.steps(fed)
        marked = [np.full_like(array, 77) for array in steps.results]
        arrays = [np.ascontiguousarray(fed[name]) for name in model.inputs]
        pointers = ctypes.c_void_p * 2
        monkeypatch.setenv("MPQC_EMULATED_FAIL", f"{call}:719")
        status = model._library.mpqc_run(
            model._handle,
            pointers(*[array.ctypes.data for array in arrays]),
            None,
            pointers(*[array.ctypes.data for array in marked]),
            None,
        )
        assert status == 8
        assert all((array == 77).all() for array in marked)
        monkeypatch.delenv("MPQC_EMULATED_FAIL")
        with pytest.raises(ArtifactError, match="earlier run"):
            model.run(fed)


def test_verbs_that_lose_the_gpu_leave_nothing_half_written(
    tmp_path: Path, gpu: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calibration, test = mpqc.demo.files()
    out, results = tmp_path / "out", tmp_path / "y.npz"
    words = ("compile", model, "--bits", "w2a2", "--data", calibration, "--target", SM86.name)
    assert CliRunner().invoke(app, [*map(str, words), "-o", str(out)]).exit_code == 0
    assert gpu.sources
    monkeypatch.setenv("MPQC_EMULATED_FAIL", "cuGraphLaunch:719:2")
    verbs: list[tuple[object, ...]] = [
        ("run", out, "--input", test, "-o", results), ("verify", out, "--data", test),
        ("bench", out, "--against", "none"),
    ]  # fmt: skip
    for verb in verbs:
        said = CliRunner().invoke(app, list(map(str, verb)))
        assert said.exit_code == 2, said.output
        assert "the GPU failed" in said.stderr
        assert "Traceback" not in said.output
    assert not results.exists()
    assert not [path for path in tmp_path.iterdir() if path != out]
    monkeypatch.setenv("MPQC_EMULATED_FAIL", "cuMemAlloc_v2:2:1")
    said = CliRunner().invoke(app, ["run", str(out), "--input", str(test), "-o", str(results)])
    assert said.exit_code == 2
    assert "smaller --batch" in " ".join(said.stderr.split())
    assert not results.exists()


# ---- whole models


@pytest.mark.parametrize(
    ("name", "bits", "kernel"),
    [
        pytest.param("cifar10_resnet8", "w2a2", "auto", marks=pytest.mark.slow),
        pytest.param("cifar10_resnet8", "w1a1", "bitplane", marks=pytest.mark.slow),
        pytest.param("ultraface_rfb320", "w4a4", "auto", marks=pytest.mark.slow),
        ("cifar10_resnet8_int8_qdq", "", "auto"),
        ("TFC_1W1A", "", "auto"),
        ("jettagging_qkeras", "", "auto"),
    ],
)
def test_real_models_verify_on_the_emulated_gpu(
    name: str, bits: str, kernel: str, shared_models: Path, tmp_path: Path, gpu: Emulator
) -> None:
    def data(graph: Graph) -> Data:
        generator = np.random.default_rng(0)
        return open_data(
            {
                name: generator.normal(size=(4, *kind.shape[1:])).astype(kind.dtype)
                for name, kind in graph.inputs.items()
            },
            graph,
        )

    artifact = pipeline.compile_model(
        shared_models / f"{name}.onnx",
        tmp_path / "out",
        Options(SM86, kernel=kernel),
        bits=Precision.parse(bits) if bits else None,
        data=data,
    )
    assert gpu.sources
    found = verify(artifact, layers=True, max_samples=2)
    assert found.passed
    assert len(found.rows) > 1


def test_the_verbs_work_with_a_gpu(tmp_path: Path, gpu: Emulator) -> None:
    model, calibration, test = mpqc.demo.files()
    out = tmp_path / "out"

    def call(*words: object) -> dict[str, Any]:
        result = CliRunner().invoke(app, [*map(str, words), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)  # type: ignore[no-any-return]

    call(
        "compile", model, "--bits", "w2a2", "--data", calibration, "--target", SM86.name, "-o", out
    )
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    assert manifest["target"]["cuda"] == "sm_86"
    assert {layer["kernel"] for layer in manifest["layers"]} <= {"bitplane", "int8"}
    assert call("verify", out, "--data", test, "--max-samples", 4)["passed"]
    call("bench", out, "--repeat", 2)
    feeds_file, results = tmp_path / "x.npz", tmp_path / "y.npz"
    np.savez(feeds_file, input=np.load(test)["input"][:1])
    call("run", out, "--input", feeds_file, "--output", results)
    assert np.load(results)["logits"].shape == (1, 10)
    call("inspect", model, "--target", SM86.name)
    report = tmp_path / "report"
    widths = ("--uniform", "w2a2", "--against", "none", "--no-plot", "--max-samples", 2)
    found = call(
        "compare",
        model,
        "--data",
        test,
        *widths,
        "--target",
        SM86.name,
        "--repeat",
        1,
        "-o",
        report,
    )
    assert found["passed"]
    assert found["builds"][0]["latency"] > 0
    assert gpu.sources


# What an emulated GPU must notice: lines of the shared code, and what breaks them.
WRONG = {
    "a tap too far": ("const int tap = k /", "const int tap = 1 + k /"),
    "the wrong padding": ("held[i][e][v] = used ? whole & mask", "held[i][e][v] = used ? ~whole"),
    "fragments of other rows": ("a[m][1] = row[8 * T::STRIDE]", "a[m][1] = row[4 * T::STRIDE]"),
    "a plane's weight": ("-(1 << (i + j))", "-(1 << i)"),
    "multiplies what is not there yet": (
        "columns.store(words + DATA);\n  __syncthreads();", "columns.store(words + DATA);",
    ),
    "overwrites what others multiply": (
        "}\n    __syncthreads();\n  }\n  sums.write", "}\n  }\n  sums.write",
    ),
    "reads results too early": ("  __syncthreads();\n}\n\n// One result", "}\n\n// One result"),
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, marks=[] if index in (0, 5) else [pytest.mark.slow])
        for index, change in enumerate(WRONG)
    ],
)
def test_the_emulator_notices_wrong_kernels(change: str, tmp_path: Path, gpu: Emulator) -> None:
    """The emulated GPU is itself under test."""
    graph = convolution((1, 64, 12, 11), 64)
    plain, (old, new) = gpu.fat_binary, WRONG[change]

    def broken(source: str, arch: str, work: Path) -> bytes:
        assert old in source
        return plain(source.replace(old, new), arch, work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolkit, "compile_fat_binary", broken)
        with built(lower(graph, SM86, "bitplane"), tmp_path, SM86) as model:
            got, expected = model.run(feeds(graph)), reference.run(graph, feeds(graph))
    assert any(not np.array_equal(got[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_86", "sm_90"])
def test_every_real_model_becomes_machine_code(
    arch: str, shared_models: Path, tmp_path: Path
) -> None:
    """What compiles for CPUs compiles for GPUs; some three minutes."""
    require_nvcc()
    models = sorted(shared_models.glob("*.onnx"))
    assert models
    for model in models:
        graph = pipeline.import_model(model, gpu_build.DIMS.get(model.stem))
        bits = "w4a4" if find_layers(graph) else ""
        artifact = gpu_build.compile_for(model, tmp_path / "out", GPUS[arch], bits, "auto", 1)
        found = contents(artifact.library.read_bytes())
        assert found == {(ELF, int(arch[3:])), (PTX, int(arch[3:]))}, model.stem
