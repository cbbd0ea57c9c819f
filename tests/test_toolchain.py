"""Which C compiler makes a library, and what is refused of what it makes."""

import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpqc import reference, toolchain
from mpqc.elf import read_elf
from mpqc.errors import ArtifactError, EnvironmentLacks
from mpqc.runtime import load
from mpqc.target import TARGETS, Target, native
from mpqc.toolchain import check_library, find_binutil, find_compiler, old_glibc
from tests.c_programs import library
from tests.graph_runner import feeds, parse
from tests.test_lowering import CHAIN

V2, RPI4, V7 = TARGETS["x86-64-v2"], TARGETS["rpi4"], TARGETS["armv7"]
HERE = TARGETS["rpi4"] if native().arch == "aarch64" else V2


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that these programs alone are installed."""
    for name in ("CC", "MPQC_CC_AARCH64", "MPQC_CC_ARMV7", "MPQC_CC_X86_64"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", [])

    def install(*names: str) -> None:
        monkeypatch.setattr(shutil, "which", lambda name: name if name in names else None)

    install()
    return install


def test_a_missing_compiler_is_named_with_its_cure(tools: Callable[..., None]) -> None:
    with pytest.raises(EnvironmentLacks, match=r"install gcc or clang, .* or set CC"):
        find_compiler(V2, "x86_64")
    with pytest.raises(EnvironmentLacks, match="apt install gcc-aarch64-linux-gnu") as error:
        find_compiler(RPI4, "x86_64")
    assert "pip install ziglang" in str(error.value)
    assert "MPQC_CC_AARCH64" in str(error.value)
    with pytest.raises(EnvironmentLacks, match="gcc-arm-linux-gnueabihf"):
        find_compiler(V7, "x86_64")


def test_the_environment_chooses_the_compiler(
    tools: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "ccache my-gcc")
    assert find_compiler(V2, "x86_64") == ["ccache", "my-gcc"]
    with pytest.raises(EnvironmentLacks):
        find_compiler(RPI4, "x86_64")  # CC is this machine's
    monkeypatch.setenv("MPQC_CC_AARCH64", "zig cc -target aarch64-linux-gnu.2.27")
    assert find_compiler(RPI4, "x86_64")[:2] == ["zig", "cc"]


def test_the_order_is_gnu_clang_zig(
    tools: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(toolchain, "_compiles", lambda command: True)
    tools("aarch64-linux-gnu-gcc", "clang", "ld.lld", "zig")
    assert find_compiler(RPI4, "x86_64") == ["aarch64-linux-gnu-gcc"]
    tools("clang", "ld.lld", "zig")
    assert find_compiler(RPI4, "x86_64") == [
        "clang", "--target=aarch64-linux-gnu", "-fuse-ld=lld"
    ]  # fmt: skip
    tools("clang", "zig")  # clang without a linker for the target
    assert find_compiler(RPI4, "x86_64") == ["zig", "cc", "-target", "aarch64-linux-gnu.2.27"]
    assert find_compiler(V2, "x86_64")[0] == "clang"
    tools("zig")  # also for this machine, where nothing else is
    assert find_compiler(V2, "x86_64") == ["zig", "cc", "-target", "x86_64-linux-gnu.2.27"]
    tools()
    (tmp_path / "ziglang").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert find_compiler(RPI4, "x86_64") == [
        sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.27"
    ]  # fmt: skip
    assert find_compiler(V7, "x86_64")[-1] == "arm-linux-gnueabihf.2.27"


def test_binutils_know_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zig answers nothing, clang a bare name; this machine's tools would not read the objects."""
    installed = {"objcopy": "/usr/bin/objcopy", "aarch64-linux-gnu-objcopy": "/usr/bin/cross",
                 "llvm-objcopy": "/usr/bin/llvm"}  # fmt: skip
    monkeypatch.setattr(shutil, "which", installed.get)
    silent, bare = ["false"], ["echo", "objcopy #"]
    assert find_binutil("objcopy", bare, V2, "x86_64") == "/usr/bin/objcopy"
    assert find_binutil("objcopy", silent, RPI4, "x86_64") == "/usr/bin/cross"
    assert find_binutil("objcopy", bare, V7, "x86_64") == "/usr/bin/llvm"
    script = tmp_path / "compiler"
    script.write_text(f"#!/bin/sh\necho {script}\n", "utf-8")
    script.chmod(0o755)
    assert find_binutil("objcopy", [str(script)], V7, "x86_64") == str(script)
    installed.clear()
    with pytest.raises(EnvironmentLacks, match="apt install binutils-arm-linux-gnueabihf, or llvm"):
        find_binutil("objcopy", silent, V7, "x86_64")


def test_zig_makes_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler that pip alone can install: whole libraries, for old systems, and correct."""
    if not toolchain._zig(toolchain.CROSS["aarch64"]):
        pytest.skip("zig is not installed: pip install ziglang")
    graph = parse(CHAIN)
    fed = feeds(graph)
    for target in (RPI4, V7, V2):
        cross = toolchain.CROSS[target.arch]
        monkeypatch.setenv(cross.variable, shlex.join(toolchain._zig(cross)))
        built = library(graph, tmp_path / f"{target.arch}.so", target=target)
        found = check_library(built.library, target)
        assert (0, 0) < found.glibc <= toolchain.OLDEST_GLIBC
        if target.arch == native().arch:
            with load(built.library, threads=2) as model:
                for name, wanted in reference.run(graph, fed).items():
                    np.testing.assert_array_equal(model.run(fed)[name], wanted)


def test_clang_without_the_targets_library_is_passed_over(
    tools: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "_compiles", lambda command: False)
    tools("clang", "ld.lld")
    with pytest.raises(EnvironmentLacks):
        find_compiler(RPI4, "x86_64")


# The library ---------------------------------------------------------------------------------

SOURCE = """
#include <pthread.h>
#include <stdlib.h>
static void* work(void* data) { return data; }
int run(void* data) {
  pthread_t t;
  return pthread_create(&t, 0, work, data) || pthread_join(t, 0) || malloc(8) == 0;
}
"""


def link(target: Target, folder: Path, *options: str, source: str = SOURCE) -> Path:
    try:
        compiler = find_compiler(target, native().arch)
    except EnvironmentLacks as error:
        pytest.skip(str(error))
    (folder / "m.c").write_text(source, encoding="utf-8")
    command = [*compiler, "-fPIC", "-shared", "m.c", "-o", "m.so", *options, "-lpthread"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "m.so"


@pytest.mark.parametrize("target", [HERE, RPI4, V7], ids=lambda t: t.name)
def test_a_good_library_passes(target: Target, tmp_path: Path) -> None:
    compiler = find_compiler(target, native().arch) if target.runs_here else None
    compiler = compiler or _compiler(target)
    path = link(target, tmp_path, "-Wl,-z,noexecstack", *old_glibc(compiler, target, tmp_path))
    found = check_library(path, target)
    assert "libc.so.6" in found.needed
    assert {"pthread_create", "pthread_join", "malloc"} <= set(found.undefined)
    assert (0, 0) < found.glibc <= toolchain.OLDEST_GLIBC
    assert found.hard_float == (target is V7)


def _compiler(target: Target) -> list[str]:
    try:
        return find_compiler(target, native().arch)
    except EnvironmentLacks as error:
        pytest.skip(str(error))


def test_binutils_read_the_same(tmp_path: Path) -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf (binutils) is not installed")
    path = link(RPI4, tmp_path)
    found = read_elf(path.read_bytes())
    text = subprocess.run(
        [readelf, "-W", "-h", "-d", "-l", "--dyn-syms", str(path)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "AArch64" in text
    assert all(f"[{name}]" in text for name in found.needed)
    lines = [line.split() for line in text.splitlines() if " UND " in line]
    strong = {line[-2 if line[-1].startswith("(") else -1] for line in lines if "WEAK" not in line}
    assert {name.partition("@")[0] for name in strong if name != "UND"} == set(found.undefined)


def test_another_machines_library_is_refused(tmp_path: Path) -> None:
    path = link(RPI4, tmp_path)
    with pytest.raises(ArtifactError, match="aarch64 with 64-bit addresses, not x86_64"):
        check_library(path, V2)
    with pytest.raises(ArtifactError, match="not armv7"):
        check_library(path, V7)


def test_an_executable_stack_is_refused(tmp_path: Path) -> None:
    path = link(RPI4, tmp_path, "-Wl,-z,execstack")
    with pytest.raises(ArtifactError, match="executable stack"):
        check_library(path, RPI4)


def test_foreign_libraries_and_symbols_are_refused(tmp_path: Path) -> None:
    source = "int TVMFFIErrorSet(void); int f(void) { return TVMFFIErrorSet(); }"
    path = link(RPI4, tmp_path, source=source)
    with pytest.raises(ArtifactError, match="nothing defines TVMFFIErrorSet"):
        check_library(path, RPI4)
    path = link(
        RPI4, tmp_path, source="int __divsi3(int, int); int f(void) { return __divsi3(6, 2); }"
    )
    with pytest.raises(ArtifactError, match="nothing defines __divsi3"):
        check_library(path, RPI4)
    path = link(RPI4, tmp_path, "-Wl,--no-as-needed", "-l:libdl.so.2")
    with pytest.raises(ArtifactError, match=r"it needs libdl\.so\.2"):
        check_library(path, RPI4)


def test_a_glibc_that_boards_do_not_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = link(RPI4, tmp_path)
    monkeypatch.setattr(toolchain, "OLDEST_GLIBC", (2, 5))
    with pytest.raises(ArtifactError, match=r"needs glibc 2\.\d+, boards may have 2\.5 .*ziglang"):
        check_library(path, RPI4)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not an ELF file"),
        (b"MZ" + bytes(100), "not an ELF file"),
        (b"\x7fELF\x02\x02" + bytes(100), "big-endian"),
        (b"\x7fELF\x02\x01" + bytes(26) + struct.pack("<Q", 1 << 40) + b"\xff" * 30, "damaged"),
    ],
)
def test_other_files_are_refused(content: bytes, why: str) -> None:
    with pytest.raises(ArtifactError, match=why):
        read_elf(content)


def test_a_truncated_library_never_crashes_the_reader(tmp_path: Path) -> None:
    content = link(RPI4, tmp_path).read_bytes()
    for size in range(0, len(content), 97):
        try:
            read_elf(content[:size])
        except ArtifactError:
            continue
