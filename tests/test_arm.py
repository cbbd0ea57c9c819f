"""ARM kernels and whole models under qemu-user, bit for bit; nothing here measures time."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from signal import SIGSEGV

import numpy as np
import pytest

from mpqc import kernels, packing, program
from mpqc.artifact import Artifact
from mpqc.compute import Window
from mpqc.data import open_data
from mpqc.demo import files
from mpqc.graph import Array, Precision, TensorType
from mpqc.ort import Session
from mpqc.pipeline import Options, compile_model, import_model
from mpqc.program import SLACK, Program, Step
from mpqc.schedules import pack_script
from mpqc.schedules.arm_intrinsics import most_product
from mpqc.schedules.dot_intrinsics import DOTS
from mpqc.select_kernel import MOST_LUT_BITS
from mpqc.target import TARGETS, Target
from tests import arm_emulator, kernel_runner
from tests.arm_emulator import SIGILL, command, cross_compiler
from tests.kernel_runner import Case, assembly, run

ARM = [target for target in TARGETS.values() if target.arch != "x86_64" and not target.cuda]
RPI4, RPI5, V7 = TARGETS["rpi4"], TARGETS["rpi5"], TARGETS["armv7"]
LONG = [name for name, dot in DOTS.items() if dot.chain and dot.llvm == "aarch64"]
LONG_V7 = [name for name, dot in DOTS.items() if dot.chain and dot.llvm == "arm"]
SMALL = Window(1, 2, 4, 3, 3, 1, 1, 1, 1)
DEMO = files()


def kinds(target: Target) -> list[str]:
    found = ["bitplane", "multiply-add"]
    if target.arch == "aarch64":
        found += ["bitplane-lut", *LONG]
    if target.arch == "armv7":
        found += LONG_V7
    if target.has("dotprod"):
        found += ["sdot", "sdot-offset"]
    return found


def fits(kind: str, case: Case) -> bool:
    """Whether the selector would ever ask this kernel for this layer."""
    if kind == "bitplane-lut":
        return case.groups == 1 and case.activation_bits <= MOST_LUT_BITS
    if kind not in DOTS:
        return True
    dot = DOTS[kind]
    if case.groups > 1 or (case.levels == "odd" and case.weight_bits == 8):
        return False
    if case.activation_bits == 8 and not dot.offset:
        return False
    most = 2**case.weight_bits - 1 if case.levels == "odd" else 2 ** (case.weight_bits - 1)
    code = dot.offset or 2**case.activation_bits - 1
    return not dot.chain or most * code <= most_product(dot.chain)


def check(case: Case, kind: str, target: Target) -> None:
    got, expected = run(case, kind, target)
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=f"{name} of {case}")


# Kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "kind"),
    [pytest.param(t, kind, id=f"{t.name}-{kind}") for t in (RPI4, RPI5, V7) for kind in kinds(t)
     if t is not RPI5 or kind not in LONG],
)  # fmt: skip
def test_every_kernel(target: Target, kind: str) -> None:
    """Odd channels, a batch, a step and a zero point; the widest codes that the kernel takes."""
    window = Window(2, 2, 4, 3, 3, 2, 1, 1, 1)
    widths = [(w, a) for w in (8, 7, 4) for a in (8, 7, 6, 4)]
    weight, activation = next(
        (w, a) for w, a in widths if fits(kind, Case(window, 17, 32, 1, w, a))
    )
    if kind == "bitplane":
        weight, activation = 3, 2
    check(Case(window, 17, 32, 1, weight, activation, zero_point=1), kind, target)


@pytest.mark.parametrize("extreme", ["most", "least"])
@pytest.mark.parametrize("kind", [*LONG, *LONG_V7])
def test_sums_in_int16_do_not_overflow(kind: str, extreme: str) -> None:
    """At the largest product that ``most_product`` allows, in every lane."""
    for weight, activation in ((8, 8), (8, 7), (7, 8), (7, 7), (6, 6)):
        case = Case(Window(1, 1, 4, 1, 1, 1, 1, 1, 1), 64, 8, 1, weight, activation,
                    extreme=extreme)  # fmt: skip
        if fits(kind, case):
            check(case, kind, RPI4 if kind in LONG else V7)
            return
    pytest.fail(f"no case fits {kind}")


@pytest.mark.parametrize(
    "case",
    [
        Case(Window(1, 1, 1, 1, 1, 1, 1, 1, 1), 1, 1, 1, 1, 1),
        Case(Window(1, 3, 5, 1, 1, 1, 1, 1, 1), 130, 24, 1, 1, 1, "odd"),
        Case(Window(1, 2, 7, 3, 3, 1, 1, 2, 2), 8, 40, 1, 2, 2, "odd"),
        Case(Window(1, 3, 3, 3, 3, 2, 2, 1, 1), 24, 24, 3, 2, 1),
        Case(Window(1, 2, 2, 5, 5, 1, 1, 1, 1), 3, 70, 1, 4, 4),
        Case(Window(1, 1, 2, 3, 3, 1, 1, 1, 1), 1000, 8, 1, 1, 1),  # counts of 16 bits overflow
    ],
    ids=lambda case: f"{case.channels}-{case.out}-w{case.weight_bits}a{case.activation_bits}",
)
def test_bitplanes_of_every_shape(case: Case) -> None:
    check(case, "bitplane", RPI4)


def test_long_runs_are_counted_in_bytes() -> None:
    wide = Case(Window(1, 1, 2, 3, 3, 1, 1, 1, 1), 8192, 8, 1, 1, 1, extreme="most")
    assert kernels.popcount_instruction(wide.layer, RPI4) == "and-popcount"
    assert kernels.popcount_instruction(Case(SMALL, 64, 8).layer, RPI4) == "uadalp"
    assert kernels.popcount_instruction(Case(SMALL, 64, 8).layer, V7) == "vpadal"
    check(wide, "bitplane", RPI4)


def test_the_arena_ends_behind_all_that_kernels_read() -> None:
    """Whole groups are read: of the last run of an image up to a group less an element too much.

    ``arm_emulator`` and ``model_runner.c`` put a page that cannot be read behind that memory.
    """
    for name, dot in DOTS.items():
        width = np.dtype(dot.data).itemsize
        assert (dot.group - 1) * width <= SLACK, name
    images = program.plan_memory(
        Program(
            {"x": TensorType("uint8", (1,))}, {"y": TensorType("uint8", (1,))}, {"y": "y"},
            {"x": TensorType("uint8", (1,)), "y": TensorType("uint8", (1,))},
            steps=[Step("kernel", ("x",), ("y",), "", "")],
        )
    )  # fmt: skip
    last = max(images.ends.values()) + 1
    assert images.size - last >= SLACK


def test_reads_behind_an_image_need_that_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """63 bytes: the last pixel's group of 32 ends in the next line of 64, which is the slack."""
    case = Case(Window(1, 1, 3, 1, 1, 1, 1, 1, 1), 21, 16, 1, 4, 4)
    check(case, "smlal32", RPI4)
    monkeypatch.setattr(arm_emulator, "SLACK", 0)
    with pytest.raises(subprocess.CalledProcessError) as error:
        check(replace(case, out=32), "smlal32", RPI4)  # not the one that is built
    assert error.value.returncode in (-SIGSEGV, 128 + SIGSEGV)


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize(("pixels", "channels"), [(1, 128), (49, 8), (7, 24), (3, 1000), (1, 40)])
@pytest.mark.parametrize("target", [RPI4, V7], ids=lambda t: t.name)
def test_codes_are_packed(target: Target, pixels: int, channels: int, bits: int) -> None:
    """Whole steps, a last one that overlaps, and too few codes for a step."""
    kernel = kernels.pack_kernel(pixels, channels, 1, bits, target.arch)
    assert pack_script.packs(pixels * channels, target.arch) == (pixels * channels >= 128)
    codes = np.random.default_rng(bits).integers(0, 2**bits, (pixels, channels)).astype(np.uint8)
    result = kernel_runner.tensor(np.zeros(kernel.outputs[0].shape, np.uint8))
    flat = codes.reshape(kernel.inputs[0].shape)
    kernel_runner.compiled(kernel, target)["main"](kernel_runner.tensor(flat), result)
    expected = packing.bits_to_bytes(codes, bits)
    np.testing.assert_array_equal(result.numpy().reshape(expected.shape), expected)


def generated(seed: int) -> Case:
    """A random small layer."""
    generator = np.random.default_rng(seed)

    def pick(*values: int) -> int:
        return int(generator.choice(values))

    kh, kw = ((1, 1), (3, 3), (5, 5), (1, 3), (2, 1))[seed % 5]
    window = Window(
        pick(1, 2), pick(1, 2, 3), pick(1, 3, 4, 7, 8), kh, kw,
        pick(1, 2), pick(1, 2), pick(1, 2), pick(1, 2),
    )  # fmt: skip
    activation = pick(*range(1, 9))
    return Case(
        window, pick(1, 3, 16, 17, 40), pick(1, 3, 8, 16, 48), 1, pick(*range(1, 9)), activation,
        "odd" if pick(0, 1) else "signed", pick(0, 1, 2**activation - 1), seed,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("target", "kind"),
    [pytest.param(t, kind, id=f"{t.name}-{kind}") for t in ARM for kind in kinds(t)],
)
def test_every_kernel_on_generated_layers(target: Target, kind: str, seed: int) -> None:
    case = generated(seed)
    if not fits(kind, case):
        pytest.skip("never chosen for this layer")
    check(case, kind, target)


@pytest.mark.slow
@pytest.mark.parametrize("weight", range(1, 9))
@pytest.mark.parametrize("activation", range(1, 9))
@pytest.mark.parametrize("kind", ["bitplane", "bitplane-lut", "smlal16", "smlal32-small"])
def test_every_width_pair(kind: str, weight: int, activation: int) -> None:
    case = Case(SMALL, 17, 16, 1, weight, activation, "signed", 1)
    if not fits(kind, case):
        pytest.skip("never chosen for these widths")
    check(case, kind, RPI4)


# Instructions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "kind", "wanted"),
    [
        (RPI4, "bitplane", r"uadalp\s+v\d+\.8h"),
        (RPI4, "bitplane-lut", r"tbl\s+v\d+\.16b"),
        (RPI4, "smlal16", r"smlal2\s+v\d+\.8h"),
        (RPI5, "sdot", r"sdot\s+v\d+\.4s"),
        (V7, "bitplane", r"vpa(dal|ddl)\.u8"),
    ],
)
def test_the_instruction_is_there(target: Target, kind: str, wanted: str) -> None:
    text = assembly(Case(SMALL, 64, 32, 1, 2, 2), kind, target)
    assert re.search(wanted, text)


@pytest.mark.parametrize("target", ARM, ids=lambda t: t.name)
def test_products_are_rounded_on_their_own(target: Target) -> None:
    """A fused multiply-add in the epilogue would give other bits than the reference."""
    text = assembly(Case(SMALL, 17, 32, 1, 2, 2), "bitplane", target)
    assert re.search(r"v?fmul|vmul\.f32", text)
    assert not re.search(r"\b(v?fml[as]|vml[as]\.f32|vfm[as]|fn?m(add|sub))\b", text)


@pytest.mark.parametrize("kind", ["sdot", "sdot-offset"])
def test_dot_products_die_where_there_are_none(kind: str) -> None:
    """What a wrong target would do on a board: the emulator holds cores to their instructions."""
    case = Case(SMALL, 17, 32, 1, 4, 4)
    check(case, kind, RPI5)
    library = kernel_runner.build(case, kind, RPI5).library
    built = kernel_runner.build(case, kind, RPI5).kernel
    memory = [kernel_runner.tensor(np.zeros(t.shape, t.dtype)) for t in built.inputs]
    memory += [kernel_runner.tensor(np.zeros(t.shape, t.dtype)) for t in built.outputs]
    with pytest.raises(subprocess.CalledProcessError) as error:
        library.run(*memory, cpu="cortex-a72")
    assert error.value.returncode in (-SIGILL, 128 + SIGILL)


# Whole models --------------------------------------------------------------------------------


def demo(target: Target, bits: str, folder: Path, kernel: str = "auto") -> Artifact:
    data = open_data(DEMO.calibration, import_model(DEMO.model))
    options = Options(target, kernel, max_samples=16)
    return compile_model(DEMO.model, folder / "out", options, bits=Precision.parse(bits), data=data)


def emulated(
    folder: Path, target: Target, inputs: Array, *, threads: int = 1, cpu: str = ""
) -> Array:
    """Outputs of an artifact's library for each input, float32."""
    runner = folder / "runner"
    header = Path(__file__).parents[1] / "mpqc/csrc"
    subprocess.run(
        [*cross_compiler(target), "-O1", "-I", str(header), "-o", str(runner),
         str(Path(__file__).with_name("model_runner.c")), str(folder / "model.so"),
         f"-Wl,-rpath,{folder}"],
        check=True,
    )  # fmt: skip
    inputs.tofile(folder / "in")
    arguments = [str(runner), str(folder / "in"), str(folder / "result"), str(threads)]
    subprocess.run(command(target, *arguments, cpu=cpu), check=True)
    return np.fromfile(folder / "result", np.float32)


def samples(count: int) -> Array:
    with np.load(DEMO.test) as arrays:
        images: Array = arrays["input"][:count]
    return images


def reference(folder: Path, images: Array, value: str = "input") -> Array:
    session = Session((folder / "reference.onnx").read_bytes())
    rows = [session.run({value: images[i : i + 1]}) for i in range(len(images))]
    return np.concatenate([next(iter(row.values())).reshape(-1) for row in rows])


def demo_check(target: Target, bits: str, tmp_path: Path, kernel: str = "auto") -> Artifact:
    arm_emulator.emulator(target.arch)
    cross_compiler(target)
    artifact, images = demo(target, bits, tmp_path, kernel), samples(8)
    folder = tmp_path / "out"
    expected = reference(folder, images)
    np.testing.assert_array_equal(emulated(folder, target, images), expected)
    np.testing.assert_array_equal(emulated(folder, target, images, threads=2), expected)
    return artifact


@pytest.mark.parametrize(
    ("name", "bits"),
    [("rpi4", "w2a2"), ("rpi5", "w4a4"), ("armv7", "w1a2"), ("rpi3", "w8a8")],
)
def test_the_demo_model_gives_the_bits_of_its_reference(
    name: str, bits: str, tmp_path: Path
) -> None:
    demo_check(TARGETS[name], bits, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2", "w1a1", "w3a5"])
@pytest.mark.parametrize("kernel", ["auto", "bitplane", "bitplane-lut", "int8"])
@pytest.mark.parametrize("target", ARM, ids=lambda t: t.name)
def test_the_demo_model_on_every_target(
    target: Target, kernel: str, bits: str, tmp_path: Path
) -> None:
    demo_check(target, bits, tmp_path, kernel)


@pytest.mark.parametrize(
    ("model", "name", "bits"),
    [
        ("cifar10_resnet8", "rpi4", "w2a2"),
        pytest.param("mobilenet_v1_0.25_224", "rpi4", "w2a2", marks=pytest.mark.slow),
        pytest.param("mobilenet_v1_0.25_224", "rpi3", "w4a4", marks=pytest.mark.slow),
        pytest.param("mobilenet_v1_0.25_224", "rpi5", "w8a8", marks=pytest.mark.slow),
        pytest.param("cifar10_resnet20", "armv7", "w2a2", marks=pytest.mark.slow),
        pytest.param("cifar10_resnet20", "aarch64", "w1a1", marks=pytest.mark.slow),
    ],
)
def test_trained_models_give_the_bits_of_their_reference(
    model: str, name: str, bits: str, shared_models: Path, tmp_path: Path
) -> None:
    target, path = TARGETS[name], shared_models / f"{model}.onnx"
    arm_emulator.emulator(target.arch)
    cross_compiler(target)
    graph = import_model(path)
    [(value, kind)] = graph.inputs.items()
    generator = np.random.default_rng(0)
    arrays = generator.normal(size=(4, *kind.shape[1:])).astype(kind.dtype)
    options = Options(target, max_samples=4)
    data = open_data({value: arrays}, graph)
    compile_model(path, tmp_path / "out", options, bits=Precision.parse(bits), data=data)
    images = arrays[:2]
    expected = reference(tmp_path / "out", images, value)
    np.testing.assert_array_equal(emulated(tmp_path / "out", target, images), expected)


def test_a_library_refuses_a_core_that_lacks_its_instructions(tmp_path: Path) -> None:
    """The right build runs on both cores; the wrong one says so instead of dying."""
    arm_emulator.emulator("aarch64")
    cross_compiler(RPI5)
    demo(RPI5, "w4a4", tmp_path)
    with pytest.raises(subprocess.CalledProcessError) as error:
        emulated(tmp_path / "out", RPI5, samples(1), cpu="cortex-a72")
    assert error.value.returncode == 10 + 6  # MPQC_WRONG_MACHINE
    emulated(tmp_path / "out", RPI5, samples(1), cpu="cortex-a76")


def test_a_board_library_loads_on_old_systems(tmp_path: Path) -> None:
    from mpqc.toolchain import OLDEST_GLIBC, check_library

    cross_compiler(RPI4)
    demo(RPI4, "w2a2", tmp_path)
    found = check_library(tmp_path / "out/model.so", RPI4)
    assert found.glibc <= OLDEST_GLIBC
    assert not found.executable_stack
