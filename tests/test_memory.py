"""Kernels and libraries touch no memory but their own: fenced by pages, and under valgrind.

Kernels may read, and never use, up to ``SLACK`` bytes behind a buffer. Here they run in this
machine's own code; ``test_arm`` runs ARM's in the same harness.
"""

import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mpqc import demo
from mpqc.compute import Window
from mpqc.data import open_data
from mpqc.graph import Array, Precision, TensorType
from mpqc.kernels import WINOGRAD
from mpqc.model_source import Workspace, place_workspaces
from mpqc.pipeline import Options, compile_model, import_model
from mpqc.program import SLACK, Program, Step, plan_memory
from mpqc.rounding import Accuracy
from mpqc.runtime import CompiledModel
from mpqc.target import TARGETS, Target, native
from tests import arm_emulator, kernel_runner
from tests.c_programs import call, compiled, needs
from tests.kernel_runner import Case
from tests.test_kernels import HERE, fits, instructions, kinds
from tests.test_winograd import fits as winograd_fits
from tests.test_winograd import square

HEADERS = Path(__file__).parents[1] / "mpqc/csrc"
RUNNER = Path(__file__).with_name("model_runner.c")
QUICK = Accuracy(rounding="nearest", clipping="mse")


# Kernels -------------------------------------------------------------------------------------


@pytest.fixture
def _fenced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels as programs whose buffers end before a page that cannot be read."""
    arm_emulator.cross_compiler(native())
    monkeypatch.setattr(kernel_runner, "compiled", arm_emulator.Library)
    monkeypatch.setattr(kernel_runner, "_build", cache(kernel_runner._build.__wrapped__))


def check(case: Case, kind: str, target: Target) -> None:
    got, expected = kernel_runner.run(case, kind, target)
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=f"{name} of {case}")


SHAPES = [
    Case(Window(1, 1, 64, 1, 1, 1, 1, 1, 1), 3, 16, 1, 4, 4),  # whole lines, not whole groups
    Case(Window(2, 2, 3, 3, 3, 2, 1, 1, 2), 17, 70, 1, 2, 2, "odd", 1),
    Case(Window(1, 2, 5, 3, 3, 1, 1, 1, 1), 130, 10, 1, 1, 1),
    Case(Window(1, 4, 4, 1, 1, 1, 1, 1, 1), 3, 1, 1, 8, 8, "signed", 7),
    Case(Window(1, 3, 3, 5, 5, 1, 1, 1, 1), 24, 24, 24, 3, 5),
]


@pytest.mark.slow
@pytest.mark.usefixtures("_fenced")
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("target", "kind"),
    [pytest.param(t, kind, id=f"{t.name}-{kind}") for t in HERE for kind in kinds(t)],
)
def test_kernels_stay_inside_their_memory(case: Case, target: Target, kind: str) -> None:
    if not fits(kind, case):
        pytest.skip("never chosen for this layer")
    check(case, kind, target)


@pytest.mark.slow
@pytest.mark.usefixtures("_fenced")
@pytest.mark.parametrize("channels", [4, 12, 64])
@pytest.mark.parametrize(
    ("target", "kind"),
    [pytest.param(t, kind, id=f"{t.name}-{kind}") for t in HERE for kind in instructions(t)],
)
def test_winograd_stays_inside_its_memory(target: Target, kind: str, channels: int) -> None:
    case = Case(square(3, 7), channels, 10, 1, 4, 4)
    if not winograd_fits(kind, case):
        pytest.skip("some integer would not hold: never chosen")
    check(case, WINOGRAD + kind, target)


@pytest.mark.skipif(not HERE, reason="these kernels are built for x86-64")
@pytest.mark.usefixtures("_fenced")
def test_reads_behind_an_image_need_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fence is there: without the slack the same kernel dies."""
    target = HERE[0]
    kind = next(kind for kind in instructions(target) if kind.startswith("vpmaddwd"))
    check(SHAPES[0], kind, target)
    monkeypatch.setattr(arm_emulator, "SLACK", 0)
    monkeypatch.setattr(kernel_runner, "_build", cache(kernel_runner._build.__wrapped__))
    with pytest.raises(subprocess.CalledProcessError, match="SIGSEGV"):
        check(SHAPES[0], kind, target)


# Where kernels have their own memory ---------------------------------------------------------


def test_slack_lies_behind_the_kernels_own_memory() -> None:
    kind = TensorType("uint8", (640,))
    steps = [Step("f", ("x",), ("y",), "", ""), Step("g", ("y",), ("z",), "", "")]
    program = Program({"x": kind}, {"z": kind}, {"z": "z"}, dict.fromkeys("xyz", kind), steps=steps)
    plain = plan_memory(program)
    for once, thread in ((0, 0), (64, 0), (0, 64), (576, 64), (640, 0), (4096, 1024)):
        needs = {"f": Workspace(once, thread), "g": Workspace()}
        memory, places = place_workspaces(program, plain, needs)
        assert memory.size >= plain.size
        for place, need in places:
            total = need.once + need.thread
            assert place % 64 == 0
            assert total == 0 or place + total + SLACK <= memory.size
    assert place_workspaces(program, plain, {"f": Workspace(), "g": Workspace()})[0] == plain


# Whole libraries -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """A library, and a program that runs it."""

    folder: Path
    program: Path
    expected: Array

    def run(self, threads: int, *arguments: str, before: tuple[str, ...] = ()) -> None:
        result = self.folder / "result"
        call([*before, str(self.program), str(self.folder / "in"), str(result), str(threads),
              *arguments], timeout=1200)  # fmt: skip
        np.testing.assert_array_equal(np.fromfile(result, np.uint8), self.expected)

    def check_fenced(self) -> None:
        for threads in (1, 2, 3):
            self.run(threads)

    def check_valgrind(self) -> None:
        """Undefined bytes are read in the slack, and weighed by zeros: only places are checked."""
        if native().arch != "x86_64":
            pytest.skip("built for a processor that valgrind is known to emulate: x86-64-v3")
        for threads in (1, 2):
            before = (needs("valgrind"), "--error-exitcode=9", "--undef-value-errors=no",
                      "--fair-sched=yes", "-q")  # fmt: skip
            self.run(threads, "heap", before=before)


def ran(model: Path, bits: str, folder: Path, target: Target, kernel: str = "auto") -> Ran:
    graph = import_model(model)
    generator = np.random.default_rng(0)
    samples: dict[str, Array] = {
        name: np.asarray(
            generator.uniform(0, 1, (2, *kind.shape[1:]))
            if kind.dtype.startswith("float")
            else generator.integers(0, 256, (2, *kind.shape[1:]))
        ).astype(kind.dtype)
        for name, kind in graph.inputs.items()
    }
    artifact = compile_model(
        model, folder / "out",
        Options(target, kernel, max_samples=2, latencies=None, accuracy=QUICK),
        bits=Precision.parse(bits), data=open_data(samples, graph),
    )  # fmt: skip
    rows = [{name: array[i : i + 1] for name, array in samples.items()} for i in range(2)]
    with CompiledModel(artifact.library) as model_here:
        outputs = [b"".join(y.tobytes() for y in model_here.run(row).values()) for row in rows]
    (folder / "in").write_bytes(b"".join(x.tobytes() for row in rows for x in row.values()))
    program = compiled(
        RUNNER, folder, "-I", str(HEADERS), str(artifact.library),
        f"-Wl,-rpath,{artifact.folder}",
    )  # fmt: skip
    return Ran(folder, program, np.frombuffer(b"".join(outputs), np.uint8))


def test_the_demo_model_stays_inside_its_memory(tmp_path: Path) -> None:
    ran(demo.files().model, "w2a2", tmp_path, native()).check_fenced()


MODELS = ["mnist_cnn", "cifar10_resnet8", "cifar10_resnet20", "ad01_autoencoder",
          "mobilenet_v1_0.25_224"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["w1a1", "w2a2", "w3a5", "w4a4", "w8a8"])
@pytest.mark.parametrize("name", MODELS)
def test_trained_models_stay_inside_their_memory(
    name: str, bits: str, shared_models: Path, tmp_path: Path
) -> None:
    """By fences, for the best of this machine, and for a plainer one under valgrind."""
    for target in {native(), TARGETS["x86-64-v3"]} if native().arch == "x86_64" else {native()}:
        folder = tmp_path / target.name
        folder.mkdir()
        built = ran(shared_models / f"{name}.onnx", bits, folder, target)
        built.check_fenced()
        if target.name == "x86-64-v3":
            built.check_valgrind()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["bitplane", "bitplane-lut", "int8"])
@pytest.mark.parametrize("bits", ["w1a1", "w4a4"])
def test_every_kernel_of_a_library_under_valgrind(kernel: str, bits: str, tmp_path: Path) -> None:
    ran(demo.files().model, bits, tmp_path, TARGETS["x86-64-v3"], kernel).check_valgrind()
