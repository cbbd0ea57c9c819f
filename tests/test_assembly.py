"""What the compiled libraries of single layers consist of: the loops that the time goes to.

Each kind of kernel is built once for a network of convolutions side by side, one for each kind of
register tile that is shipped; the library is disassembled, and its innermost loops are looked at.
"""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpqc import pipeline, select_kernel
from mpqc.data import open_data
from mpqc.graph import Precision
from mpqc.rounding import Accuracy
from mpqc.schedules.conv_cpu import Tile
from mpqc.target import find_target, native
from tests.test_build import needs

pytestmark = pytest.mark.skipif(native().arch != "x86_64", reason="builds for x86 take an x86 host")

SIZES = (56, 14, 12)  # pixels of a row: each takes another tile
CHANNELS = 64
# Share of a loop's instructions that makes it a microkernel: a broadcast, the instruction and an
# addition for each accumulator, and a few more for loads of weights and the loop itself.
HOT = 0.2

Build = Callable[[str, str, str, int], Path]
Code = list[tuple[int, str]]  # addresses, instructions


@dataclass(frozen=True)
class Loop:
    """Instructions of an innermost loop, the branch back included."""

    body: tuple[str, ...]

    def share(self, pattern: str) -> float:
        return sum(bool(re.match(pattern, line)) for line in self.body) / len(self.body)

    @property
    def spills(self) -> list[str]:
        """Vector instructions that touch the stack."""
        return [line for line in self.body if re.search(r"\(%rsp|\(%rbp", line) and "mm" in line]


def parse(text: str) -> Code:
    """Addresses and instructions of what objdump prints, comments taken off."""
    lines = (re.match(r"\s*([0-9a-f]+):\s+(\S.*)$", line) for line in text.splitlines())
    found = ((line[1], re.sub(r"\s*[#<].*", "", line[2]).strip()) for line in lines if line)
    return [(int(address, 16), instruction) for address, instruction in found]


@cache
def code(library: Path) -> Code:
    tool = needs("objdump")
    command = [tool, "-d", "--no-show-raw-insn", str(library)]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def innermost_loops(instructions: Code) -> list[Loop]:
    """Straight code between a branch's target and the branch back to it, with no other inside.

    A base pointer that addresses data looks like a frame; it is renamed where nobody makes frames.
    """
    place = {address: index for index, (address, _) in enumerate(instructions)}
    found = set()
    for index, (address, instruction) in enumerate(instructions):
        jump = re.match(r"j\w+\s+([0-9a-f]+)$", instruction)
        if jump and int(jump[1], 16) <= address and int(jump[1], 16) in place:
            found.add((place[int(jump[1], 16)], index))
    ends = sorted(found, key=lambda loop: loop[1])
    innermost = [
        (first, last)
        for number, (first, last) in enumerate(ends)
        if not any(first <= other for other, _ in ends[:number])
    ]
    frames = any(re.match(r"mov\s+%rsp,%rbp", line) for _, line in instructions)
    return [
        Loop(
            tuple(
                line if frames else line.replace("%rbp", "%base")
                for _, line in instructions[first : last + 1]
            )
        )
        for first, last in innermost
    ]


def hot_loops(library: Path, pattern: str) -> list[Loop]:
    """Innermost loops that consist of an instruction and what feeds it, the fullest first."""
    loops = [loop for loop in innermost_loops(code(library)) if loop.share(pattern) >= HOT]
    return sorted(loops, key=lambda loop: loop.share(pattern), reverse=True)


def beyond_sse42(instructions: Code) -> list[str]:
    """Instructions that x86-64-v2 lacks: VEX and EVEX encodings, wide registers, BMI."""
    bmi = "andn|bextr|blsi|blsmsk|blsr|bzhi|lzcnt|movbe|mulx|pdep|pext|rorx|sarx|shlx|shrx"
    pattern = re.compile(rf"v(?!erw|err)[a-z]+[a-z0-9]*\s|.*%[yz]mm|(?:{bmi})[lq]?\s")
    return [line for _, line in instructions if pattern.match(line)]


def network(kernel: int) -> bytes:
    """Convolutions of every size side by side; they share one weight."""
    random, tensor = np.random.default_rng(0), helper.make_tensor_value_info
    weight = random.normal(0, 0.06, (CHANNELS, CHANNELS, kernel, kernel)).astype(np.float32)
    shapes = {size: [1, CHANNELS, size, size] for size in SIZES}
    pads = [kernel // 2] * 4
    graph = helper.make_graph(
        [
            helper.make_node("Conv", [f"x{size}", "w"], [f"y{size}"], f"c{size}", pads=pads)
            for size in SIZES
        ],
        "sizes",
        [tensor(f"x{size}", TensorProto.FLOAT, shape) for size, shape in shapes.items()],
        [tensor(f"y{size}", TensorProto.FLOAT, shape) for size, shape in shapes.items()],
        [numpy_helper.from_array(weight, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(proto.SerializeToString())


def compiled(folder: Path, target: str, bits: str, kind: str, kernel: int) -> Path:
    """Library of the network at one width, by one kind of kernel."""
    model = folder.with_suffix(".onnx")
    model.write_bytes(network(kernel))
    random = np.random.default_rng(1)
    feeds = {
        f"x{size}": random.normal(size=(1, CHANNELS, size, size)).astype(np.float32)
        for size in SIZES
    }
    options = pipeline.Options(
        find_target(target),
        kernel=kind,
        latencies=None,
        accuracy=Accuracy(rounding="nearest", clipping="mse"),
    )
    data = open_data(feeds, pipeline.import_model(model))
    precision = Precision.parse(bits)
    artifact = pipeline.compile_model(model, folder, options, bits=precision, ends=None, data=data)
    assert {layer["kernel"] for layer in artifact.manifest["layers"]} == {kind}
    return artifact.library


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """(target, widths, kind, window) -> library, each built once."""
    folder = tmp_path_factory.mktemp("assembly")

    @cache
    def made(target: str, bits: str, kind: str, kernel: int) -> Path:
        return compiled(folder / f"{target}-{bits}-{kind}-{kernel}", target, bits, kind, kernel)

    return made


KERNELS = [
    ("x86-64-v3", "w1a1", "bitplane-lut", 3, r"vpshufb .*%ymm"),
    ("x86-64-v3", "w2a2", "bitplane-lut", 3, r"vpshufb .*%ymm"),
    ("x86-64-v3", "w4a4", "int8", 3, r"vpmadd(ubsw|wd) .*%ymm"),
    ("x86-64-v3", "w4a4", "int8", 5, r"vpmaddubsw .*%ymm"),
    ("x86-64-v3", "w8a8", "int8", 5, r"vpmaddwd .*%ymm"),
    ("x86-64-v4-vnni", "w1a1", "bitplane", 3, r"vpopcnt[bdq] .*%zmm"),
    ("x86-64-v4-vnni", "w8a8", "int8", 5, r"vpdpbusd .*%zmm"),
]


@pytest.mark.parametrize(("target", "bits", "kind", "kernel", "pattern"), KERNELS)
def test_hot_loops_consist_of_the_instruction_and_keep_to_registers(
    build: Build, target: str, bits: str, kind: str, kernel: int, pattern: str
) -> None:
    loops = hot_loops(build(target, bits, kind, kernel), pattern)
    assert len(loops) >= len(SIZES)
    assert [loop.spills for loop in loops if loop.spills] == []


@pytest.mark.parametrize("kind", ["bitplane", "bitplane-lut", "int8"])
def test_the_oldest_target_has_nothing_newer(build: Build, kind: str) -> None:
    instructions = code(build("x86-64-v2", "w2a2", kind, 3))
    assert any("%xmm" in line for _, line in instructions)
    assert beyond_sse42(instructions) == []


def test_a_target_with_avx2_is_seen_to_have_it(build: Build) -> None:
    found = beyond_sse42(code(build("x86-64-v3", "w2a2", "bitplane-lut", 3)))
    assert any("%ymm" in line for line in found)
    assert any(line.startswith("vmov") and "%xmm" in line for line in found)


def test_a_tile_of_more_accumulators_than_registers_is_seen_to_spill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, bits, kind, kernel, pattern = KERNELS[1]
    monkeypatch.setattr(select_kernel, "lut_tiles", lambda layer, _: [Tile(layer.window.ow, 2, 32)])
    loops = innermost_loops(code(compiled(tmp_path / "large", target, bits, kind, kernel)))
    assert any(loop.spills for loop in loops if loop.share(pattern) > 0)


LOOP = """
0000000000001000 <f>:
    1000:\tvpxor  %xmm0,%xmm0,%xmm0
    1004:\tvmovdqu (%rsi),%ymm1
    1008:\tvpshufb %ymm1,%ymm2,%ymm3{SPILL}
    100d:\tvpaddb %ymm3,%ymm0,%ymm0        # 2000 <table>
    1011:\tdec    %rax
    1014:\tjne    1004 <f+0x4>
    1016:\tcmp    %rbx,%rcx
    1019:\tjne    1000 <f>
    101b:\tjmp    1030 <f+0x30>
"""


@pytest.mark.parametrize(
    ("added", "spills"),
    [
        ("", 0),
        ("\n    100a:\tvmovdqu %ymm3,0x20(%rsp)", 1),
        ("\n    100a:\tvpaddb -0x40(%rsp,%rax,1),%ymm3,%ymm3", 1),
        ("\n    100a:\tmov    0x8(%rsp),%rdx", 0),  # a pointer
        ("\n    100a:\tvmovdqu 0x20(%rbp),%ymm3", 0),  # no frame
        ("\n    1009:\tmov    %rsp,%rbp\n    100a:\tvmovdqu 0x20(%rbp),%ymm3", 1),
    ],
)
def test_the_innermost_loop_and_its_spills(added: str, spills: int) -> None:
    (loop,) = innermost_loops(parse(LOOP.replace("{SPILL}", added)))
    assert loop.body[0] == "vmovdqu (%rsi),%ymm1"
    assert loop.body[-1] == "jne    1004"
    assert len(loop.spills) == spills
    assert loop.share("vpshufb .*%ymm") == 1 / len(loop.body)
    assert loop.share("vpshufb .*%zmm") == 0


@pytest.mark.parametrize(
    ("line", "newer"),
    [
        ("pshufb %xmm0,%xmm1", False),
        ("verw   (%rax)", False),
        ("movdqu (%rax),%xmm1", False),
        ("vmovd  %eax,%xmm0", True),
        ("vpaddb %ymm0,%ymm1,%ymm2", True),
        ("shlx   %eax,%ecx,%edx", True),
        ("blsr   %eax,%eax", True),
        ("shl    %cl,%eax", False),
    ],
)
def test_what_is_newer_than_the_oldest_target(line: str, newer: bool) -> None:
    assert bool(beyond_sse42([(0, line)])) == newer
