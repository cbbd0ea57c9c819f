import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mpqc import doctor
from mpqc.doctor import Check, Machine, checks, extensions

GOOD = Machine(
    python=(3, 11, 7),
    architecture="x86_64",
    packages={name: "1.0" for name in doctor.PACKAGES}
    | {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post0"},
    tools={name: f"/usr/bin/{candidates[0]}" for name, candidates in doctor.TOOLS.items()},
    cross={"aarch64": "true -x c", "armv7": "true"},
    extensions=("AVX2", "POPCNT"),
    gpus=("NVIDIA H200 (sm_90)",),
    cores=2,
    free=10**11,
)


def find(name: str, machine: Machine) -> Check:
    (check,) = [check for check in checks(machine) if check.name == name]
    return check


def without(name: str) -> Machine:
    return replace(
        GOOD,
        packages={k: v for k, v in GOOD.packages.items() if k != name},
        tools={k: v for k, v in GOOD.tools.items() if k != name},
        cross={k: v for k, v in GOOD.cross.items() if name != f"{k} compiler"},
    )


def test_nothing_to_cure_on_a_good_machine() -> None:
    assert [check for check in checks(GOOD) if not check.ok or check.cure] == []


def test_every_failure_names_a_cure_and_what_it_is_needed_for() -> None:
    failing = checks(Machine())
    assert [check.name for check in failing if check.ok] == []
    assert all(check.cure and check.needed_for and check.found for check in failing)


def test_required_ones_are_what_compiling_needs() -> None:
    required = [check.name for check in checks(GOOD) if check.required]
    assert required == ["Python", "TVM", "TVM FFI", "onnx", "onnxruntime", "C compiler"]


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("onnx", "pip install 'onnx>=1.21'"),
        ("matplotlib", "mpqc[report]"),
        ("torch", "mpqc[train]"),
        ("distributed", "mpqc[dask]"),
        ("C compiler", "set CC"),
        ("C compiler", "pip install ziglang"),
        ("aarch64 compiler", "apt install gcc-aarch64-linux-gnu"),
        ("aarch64 compiler", "pip install ziglang"),
        ("aarch64 compiler", "apt install clang lld libc6-dev-arm64-cross"),
        ("aarch64 compiler", "set MPQC_CC_AARCH64"),
        ("armv7 compiler", "apt install gcc-arm-linux-gnueabihf"),
        ("armv7 compiler", "set MPQC_CC_ARMV7"),
        ("ssh", "apt install openssh-client"),
        ("qemu-arm", "apt install qemu-user-static"),
        ("nvcc", "CUDA toolkit"),
    ],
)
def test_names_the_cure(name: str, cure: str) -> None:
    check = find(name, without(name))
    assert not check.ok
    assert cure in check.cure


@pytest.mark.parametrize(
    ("version", "ok"),
    [("0.26.0", False), ("0.27.0", True), ("0.27.0.post1", True), ("0.28.0", False), ("?", False)],
)
def test_tvm_version(version: str, ok: bool) -> None:
    machine = replace(GOOD, packages={**GOOD.packages, "apache-tvm": version})
    assert find("TVM", machine).ok is ok


@pytest.mark.parametrize(
    ("version", "ok"),
    [("0.1.13", False), ("0.1.14.post0", True), ("0.1.14.post1", True), ("0.1.15.post2", False)],
)
def test_ffi_pin(version: str, ok: bool) -> None:
    machine = replace(GOOD, packages={**GOOD.packages, "apache-tvm-ffi": version})
    assert find("TVM FFI", machine).ok is ok


def test_says_why_a_newer_ffi_is_refused() -> None:
    machine = replace(GOOD, packages={**GOOD.packages, "apache-tvm-ffi": "0.1.15.post2"})
    assert "crashes" in find("TVM FFI", machine).found


def test_old_python() -> None:
    check = find("Python", replace(GOOD, python=(3, 10, 13)))
    assert not check.ok
    assert check.found == "3.10.13"


def test_cc_wins_over_the_path(tmp_path: Path) -> None:
    compiler = tmp_path / "my cc"
    compiler.touch(mode=0o755)
    check = find("C compiler", replace(GOOD, compiler=f"'{compiler}' -m64"))
    assert check.ok
    assert str(compiler) in check.found


def test_cc_that_does_not_exist_is_not_papered_over() -> None:
    check = find("C compiler", replace(GOOD, compiler="no-such-compiler-at-all -O2"))
    assert not check.ok
    assert "CC=no-such-compiler-at-all" in check.found


def test_says_which_compiler_builds_for_boards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("aarch64 compiler", GOOD).found.endswith("/true -x c")
    monkeypatch.setenv("MPQC_CC_ARMV7", "no-such-compiler-at-all -O2")
    check = find("armv7 compiler", Machine.here())
    assert (check.ok, check.found) == (False, "no-such-compiler-at-all -O2: no such program")
    assert check.cure == "correct MPQC_CC_ARMV7, or unset it"


def test_extensions_of_x86() -> None:
    assert extensions("processor\t: 0\nflags\t\t: fpu popcnt avx2 sse4_2\n") == (
        "AVX2", "SSE4.2", "POPCNT",
    )  # fmt: skip


def test_extensions_are_those_that_all_cores_share() -> None:
    little, big = "Features\t: fp asimd\n", "Features\t: fp asimd asimddp i8mm\n"
    assert extensions(big + little) == ("NEON",)
    assert extensions(big) == ("I8MM", "DotProd", "NEON")


def test_extensions_unknown_without_cpuinfo() -> None:
    assert extensions("") == ()
    assert "unknown" in find("CPU", replace(GOOD, extensions=())).found


def test_little_disk() -> None:
    check = find("disk space", replace(GOOD, free=5 * 10**8))
    assert not check.ok
    assert "free 1.5 GB" in check.cure


def test_looks_at_the_machine_it_runs_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "gcc"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "gcc -O1")
    here = Machine.here()
    assert here.python == sys.version_info[:3]
    assert here.tools == {"C compiler": str(compiler)}
    assert here.compiler == "gcc -O1"
    assert here.gpus == ()
    assert here.packages["numpy"]
    assert here.cores >= 1
    assert here.free > 0


def test_zig_alone_compiles_for_this_machine() -> None:
    machine = replace(without("C compiler"), architecture="x86_64")
    assert not find("C compiler", machine).ok
    check = find("C compiler", replace(machine, cross={"x86_64": "python -m ziglang cc"}))
    assert (check.ok, check.found) == (True, "python -m ziglang cc")


def test_asks_the_driver_for_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA A10, 8.6'\necho 'NVIDIA H200, 9.0'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Machine.here().gpus == ("NVIDIA A10 (sm_86)", "NVIDIA H200 (sm_90)")


def test_a_broken_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'driver mismatch'\nexit 9\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Machine.here().gpus == ()
