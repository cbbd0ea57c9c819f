"""The programs of examples/c and examples/cpp: built with their own Makefiles, and run."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mpqc import demo
from mpqc.data import open_data
from mpqc.graph import Array, Precision
from mpqc.model_source import Form
from mpqc.pipeline import Options, compile_model
from mpqc.runtime import load
from mpqc.target import TARGETS, Target, native
from mpqc.toolchain import CROSS
from tests.arm_emulator import command, emulator
from tests.c_programs import call, needs

EXAMPLES = Path(__file__).parents[1] / "examples"


def compiled_for(target: Target, folder: Path) -> Path:
    model, calibration, _ = demo.files()
    options = Options(target, max_samples=50, latencies=None, form=Form(static=True))
    compile_model(
        model, folder / "build", options,
        bits=Precision(4, 4), data=lambda graph: open_data(str(calibration), graph),
    )  # fmt: skip
    return folder / "build"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled_for(native(), tmp_path_factory.mktemp("digits"))


def make(example: str, artifact: Path, folder: Path, *variables: str) -> Path:
    """Build in a copy, so that the checkout stays clean."""
    needs("make")
    work = folder / example
    shutil.copytree(EXAMPLES / example, work)
    flags = "-O2 -Wall -Wextra -Werror"
    call(["make", "-C", str(work), f"MODEL={artifact}", f"CFLAGS={flags}", f"CXXFLAGS={flags}",
          *variables])  # fmt: skip
    return work


@pytest.fixture(scope="module")
def classify(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("c", artifact, tmp_path_factory.mktemp("c")) / "classify"


def picture(seed: int = 0) -> Array:
    """A digit of the demo as bytes, 16 by 16."""
    with np.load(demo.files()[2]) as arrays:
        digit = arrays["input"][seed, 0]
    scaled = np.clip((digit - digit.min()) / np.ptp(digit) * 255, 0, 255)
    return np.kron(scaled, np.ones((2, 2))).astype(np.uint8)


def expected(artifact: Path, pixels: Array, mean: float, std: float) -> list[int]:
    x = ((pixels[::2, ::2].astype(np.float32) - np.float32(mean)) / np.float32(std))[None, None]
    with load(artifact) as model:
        (scores,) = model.run({"input": np.ascontiguousarray(x)}).values()
    return [int(i) for i in np.argsort(-scores.reshape(-1), kind="stable")[:5]]


def classes(program: list[str], path: Path) -> list[int]:
    lines = call([*program, "20", "16", str(path)]).splitlines()
    return [int(line.split()[1].rstrip(":")) for line in lines]


def test_the_example_is_as_short_as_promised() -> None:
    assert len((EXAMPLES / "c/classify.c").read_text("utf-8").splitlines()) < 100


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_classifies_grey_pictures(
    classify: Path, artifact: Path, tmp_path: Path, seed: int
) -> None:
    pixels = picture(seed)
    path = tmp_path / "digit.pgm"
    path.write_bytes(b"P5\n# a digit\n16 16 # wide, high\n255\n" + pixels.tobytes())
    assert classes([str(classify)], path) == expected(artifact, pixels, 20, 16)


def test_classifies_colour_pictures(classify: Path, artifact: Path, tmp_path: Path) -> None:
    pixels = picture(3)
    path = tmp_path / "digit.ppm"
    path.write_bytes(b"P6 16 16 255\n" + np.repeat(pixels[..., None], 3, axis=-1).tobytes())
    assert classes([str(classify)], path) == expected(artifact, pixels, 20, 16)


@pytest.mark.parametrize("name", ["rpi4", "armv7"])
def test_both_run_on_an_emulated_board(
    artifact: Path, classify: Path, tmp_path: Path, name: str
) -> None:
    """The digits and the bits of this machine, by the same Makefiles and a cross compiler."""
    target = TARGETS[name]
    prefix = CROSS[target.arch].prefix
    emulator(target.arch)
    compilers = [f"CC={needs(f'{prefix}-gcc')}", f"CXX={needs(f'{prefix}-g++')}"]
    board = compiled_for(target, tmp_path)

    path = tmp_path / "digit.pgm"
    path.write_bytes(b"P5 16 16 255\n" + picture().tobytes())
    there = command(target, str(make("c", board, tmp_path, *compilers) / "classify"))
    assert classes(there, path) == classes([str(classify)], path)

    with np.load(demo.files()[2]) as arrays:
        x = arrays["input"][:1]
    x.tofile(tmp_path / "x.bin")
    there = command(target, str(make("cpp", board, tmp_path, *compilers) / "run_file"))
    call([*there, str(tmp_path / "x.bin"), str(tmp_path / "y.bin")])
    with load(artifact) as model:
        (wanted,) = model.run({"input": x}).values()
    assert (tmp_path / "y.bin").read_bytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a binary PPM or PGM"),
        (b"P3 1 1 255 0 0 0", "not a binary PPM or PGM"),
        (b"P5", "not a PPM or PGM"),
        (b"P5 # endless comment", "not a PPM or PGM"),
        (b"P5 99999999999999999999 1 255 x", "too large"),
        (b"P5 0 4 255\n", "only pictures"),
        (b"P5 4 4 65535\n", "too large"),
        (b"P5 4 4 15\n", "only pictures"),
        (b"P6 16 16 255\n" + bytes(100), "cut off"),
    ],
)
def test_says_what_is_wrong_with_a_picture(
    classify: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.ppm"
    path.write_bytes(content)
    result = subprocess.run(
        [str(classify), "0", "1", str(path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert message in result.stderr


def test_the_class_runs_raw_tensors(artifact: Path, tmp_path: Path) -> None:
    program = make("cpp", artifact, tmp_path) / "run_file"
    with np.load(demo.files()[2]) as arrays:
        x = arrays["input"][:1]
    x.tofile(tmp_path / "x.bin")
    said = call([str(program), str(tmp_path / "x.bin"), str(tmp_path / "y.bin")])
    with load(artifact) as model:
        (wanted,) = model.run({"input": x}).values()
    assert said == f"logits: {wanted.nbytes} bytes\n"
    assert (tmp_path / "y.bin").read_bytes() == wanted.tobytes()
    (tmp_path / "x.bin").write_bytes(x.tobytes()[:-1])
    result = subprocess.run(
        [str(program), str(tmp_path / "x.bin"), str(tmp_path / "y.bin")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (2, "run_file: too short for input input\n")
