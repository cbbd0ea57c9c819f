"""What is in a built library, and what is said when it cannot be built."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mpqc.build import _workspace, build
from mpqc.errors import ArtifactError
from mpqc.program import plan_memory
from mpqc.target import TARGETS, native
from tests.graph_runner import lower, parse
from tests.test_lowering import RESIDUAL, SHARED

V2 = TARGETS["x86-64-v2"]


def needs(tool: str) -> str:
    found = shutil.which(tool)
    if not found:
        pytest.skip(f"{tool} (binutils) is not installed")
    return found


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("build") / "model.so"
    program = lower(parse(RESIDUAL))
    return build(program, plan_memory(program), native(), {"a": '"quoted" ü \\n'}, path).library


def symbols(library: Path, *options: str) -> set[str]:
    result = subprocess.run(
        [needs("nm"), "-D", *options, str(library)], capture_output=True, text=True, check=True
    )
    return {line.split()[-1].partition("@")[0] for line in result.stdout.splitlines()}


def test_needs_libc_and_pthreads_alone(library: Path) -> None:
    wanted = {name for name in symbols(library, "--undefined-only") if not name.startswith("_")}
    allowed = re.compile(
        r"pthread_\w+|sched_yield|posix_memalign|free|malloc|mem(cpy|set|move|cmp)|"
        r"(exp|log|pow|tanh|erf|sin|cos|floor|ceil|round|rint|nearbyint|trunc|sqrt)f?"
    )
    assert [name for name in wanted if not allowed.fullmatch(name)] == []
    text = subprocess.run(
        [needs("objdump"), "-p", str(library)], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"NEEDED\s+(\S+)", text))
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2",
                      "ld-linux-aarch64.so.1"}  # fmt: skip
    assert "RPATH" not in text
    assert "RUNPATH" not in text


def test_exports_its_interface_alone(library: Path) -> None:
    defined = symbols(library, "--defined-only")
    assert defined
    assert {name for name in defined if not name.startswith("mpqc_")} <= {"_init", "_fini"}
    header = (Path(__file__).parents[1] / "mpqc/csrc/mpqc.h").read_text(encoding="utf-8")
    declared = set(re.findall(r"MPQC_API [^;]*?\b(mpqc_\w+)\(", header))
    assert {name for name in defined if name.startswith("mpqc_")} == declared


def test_has_no_trace_of_this_machine(library: Path, tmp_path: Path) -> None:
    content = library.read_bytes()
    assert str(Path(__file__).parents[1]).encode() not in content
    assert b"libtvm" not in content


def test_is_the_same_each_time(tmp_path: Path) -> None:
    program = lower(parse(SHARED))
    contents = []
    for name in ("a.so", "b.so"):
        build(program, plan_memory(program), native(), {}, tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]


def test_a_build_for_the_oldest_x86_holds_no_newer_instruction(tmp_path: Path) -> None:
    if native().arch != "x86_64":
        pytest.skip("no x86-64 compiler here")
    program = lower(parse(RESIDUAL), V2)
    build(program, plan_memory(program), V2, {}, tmp_path / "model.so")
    text = subprocess.run(
        [needs("objdump"), "-d", "--no-show-raw-insn", str(tmp_path / "model.so")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    mnemonics = set(re.findall(r"^\s+[0-9a-f]+:\s+(\w+)", text, re.MULTILINE))
    assert {"movaps", "pshufb"} & mnemonics
    assert {name for name in mnemonics if name.startswith("v")} == set()
    assert not re.search(r"%[yz]mm|%k[1-7]\b", text)
    assert not mnemonics & {"andn", "bextr", "pdep", "pext", "shlx", "shrx", "sarx", "rorx",
                            "mulx", "lzcnt", "tzcnt", "movbe"}  # fmt: skip


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'disk quota exceeded' >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    program = lower(parse(SHARED))
    with pytest.raises(ArtifactError, match="disk quota exceeded"):
        build(program, plan_memory(program), native(), {}, tmp_path / "model.so")
    assert not (tmp_path / "model.so").exists()


def test_says_how_large_it_is(tmp_path: Path) -> None:
    program = lower(parse(SHARED), kernel="int8")
    found = build(program, plan_memory(program), native(), {}, tmp_path / "model.so")
    assert 0 < found.weight_bytes < found.library.stat().st_size
    assert found.code_bytes > 0
    assert found.library.stat().st_mode & 0o111


def test_the_runtime_knows_how_long_parallel_loops_are() -> None:
    kernel = (
        "for i in T.parallel(56):\n    pass\nfor j in T.serial(99):\n"
        "    for k in T.parallel(T.int64(12)):\n        pass\n"
    )
    assert _workspace(kernel).turns == 56
    assert _workspace("for j in T.serial(99):\n    pass\n").turns == 0
