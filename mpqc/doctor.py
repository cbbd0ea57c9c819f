"""What works on this machine, and what to install for the rest.

`Machine.here()` looks around; `checks(machine)` judges, purely. Nothing heavy is imported:
versions come from the packages' metadata.
"""

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from mpqc.errors import EnvironmentLacks
from mpqc.target import TARGETS, native
from mpqc.toolchain import CROSS, find_compiler

PYTHON = (3, 11)
TVM = (0, 27)
FFI_FROM, FFI_BELOW = (0, 1, 14), (0, 1, 15)
DISK = 2 * 10**9  # [bytes] for an artifact, its tuning records and a reference model

# Distribution -> importable module, where they differ.
MODULES = {"apache-tvm": "tvm", "apache-tvm-ffi": "tvm_ffi", "pillow": "PIL"}
PACKAGES = (
    "apache-tvm", "apache-tvm-ffi", "onnx", "onnxruntime", "numpy",
    "matplotlib", "pillow", "torch", "distributed",
)  # fmt: skip

TOOLS: Mapping[str, tuple[str, ...]] = {
    "C compiler": ("cc", "gcc", "clang"),
    "qemu-aarch64": ("qemu-aarch64-static", "qemu-aarch64"),
    "qemu-arm": ("qemu-arm-static", "qemu-arm"),
    "ssh": ("ssh",),
    "nvcc": ("nvcc",),
}

# Extension -> its flag in /proc/cpuinfo, widest first; the kernels ask for these.
EXTENSIONS = {
    "AVX-512 VPOPCNTDQ": "avx512_vpopcntdq",
    "AVX-512 VNNI": "avx512_vnni",
    "AVX-512 BW": "avx512bw",
    "AVX-VNNI": "avx_vnni",
    "AVX2": "avx2",
    "SSE4.2": "sse4_2",
    "POPCNT": "popcnt",
    "SVE": "sve",
    "I8MM": "i8mm",
    "DotProd": "asimddp",
    "NEON": "asimd",
    "NEON (armv7)": "neon",
}


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        found: what is there, in words; why not, where it is not there.
        needed_for: what works only with it.
        cure: what to do when it is missing; empty when it is fine.
        required: without it mpqc cannot compile at all.
    """

    name: str
    ok: bool
    found: str
    needed_for: str
    cure: str = ""
    required: bool = False


@dataclass(frozen=True)
class Machine:
    """The facts that the checks judge.

    Attributes:
        packages: distribution -> version, for those that can be imported.
        tools: name in `TOOLS` -> path, for those that are on the PATH.
        compiler: $CC, which goes before the names in `TOOLS`; empty if unset.
        cross: architecture -> command of the compiler that builds for it.
        extensions: of the instruction set, in the words of `EXTENSIONS`.
        gpus: name and compute capability of each, as the driver says them.
        cores: that this process may use.
        free: [bytes] where the user stands.
    """

    python: tuple[int, int, int] = (0, 0, 0)
    architecture: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    compiler: str = ""
    cross: Mapping[str, str] = field(default_factory=dict)
    extensions: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    cores: int = 1
    free: int = 0

    @classmethod
    def here(cls) -> Self:
        """The machine that this runs on."""
        return cls(
            python=(sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
            architecture=platform.machine(),
            packages={name: found for name in PACKAGES if (found := _version(name))},
            tools={
                name: path
                for name, candidates in TOOLS.items()
                if (path := next(filter(None, map(shutil.which, candidates)), None))
            },
            compiler=os.environ.get("CC", ""),
            cross=_cross(),
            extensions=extensions(_read("/proc/cpuinfo")),
            gpus=_gpus(),
            cores=_cores(),
            free=shutil.disk_usage(Path.cwd()).free,
        )


def checks(machine: Machine | None = None) -> list[Check]:
    """Every check, required ones first."""
    m = machine or Machine.here()
    package = partial(_package, m)
    tool = partial(_tool, m)
    return [
        _python(m),
        _tvm(m),
        _ffi(m),
        package("onnx", "reading models", "pip install 'onnx>=1.21'", required=True),
        package(
            "onnxruntime", "verify, and comparison with ONNX Runtime",
            "pip install onnxruntime", required=True,
        ),
        _compiler(m),
        _instructions(m),
        _cpu_cores(m),
        _disk(m),
        package("matplotlib", "plots", "pip install 'mpqc[report]'"),
        package("pillow", "data given as pictures", "pip install 'mpqc[report]'"),
        package("torch", "finetune and searches that train", "pip install 'mpqc[train]'"),
        package("distributed", "searches on a Dask cluster", "pip install 'mpqc[dask]'"),
        _cross_compiler(m, "aarch64", "targets rpi3 to rpi5, aarch64, jetson-orin"),
        _cross_compiler(m, "armv7", "target armv7"),
        tool("qemu-aarch64", "verifying aarch64 builds without a board", "qemu-user-static"),
        tool("qemu-arm", "verifying armv7 builds without a board", "qemu-user-static"),
        tool("ssh", "verify and bench on a board (--ssh)", "openssh-client"),
        _nvcc(m),
        _gpu(m),
    ]  # fmt: skip


def extensions(cpuinfo: str) -> tuple[str, ...]:
    """Instruction set extensions that /proc/cpuinfo names and the kernels know."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    if not lines:
        return ()
    # Cores may differ (big.LITTLE): a build must run on each of them.
    common = set.intersection(*(set(line.split()) for line in lines))
    return tuple(name for name, flag in EXTENSIONS.items() if flag in common)


def _python(m: Machine) -> Check:
    ok = m.python[:2] >= PYTHON
    cure = "" if ok else "install Python 3.11 or newer and make a new virtual environment"
    return Check("Python", ok, ".".join(map(str, m.python)), "everything", cure, required=True)


def _tvm(m: Machine) -> Check:
    version = m.packages.get("apache-tvm")
    ok = version is not None and _release(version)[:2] == TVM
    cure = "" if ok else "pip install 'apache-tvm>=0.27,<0.28'"
    return Check("TVM", ok, version or "not installed", "compile, tune, run", cure, required=True)


def _ffi(m: Machine) -> Check:
    version = m.packages.get("apache-tvm-ffi")
    ok = version is not None and FFI_FROM <= _release(version) < FFI_BELOW
    found = version or "not installed"
    if version and _release(version) >= FFI_BELOW:
        found = f"{version}, which crashes when tuning records are saved"
    cure = "" if ok else "pip install 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'"
    return Check("TVM FFI", ok, found, "compile, tune, run", cure, required=True)


def _package(m: Machine, name: str, needed_for: str, cure: str, *, required: bool = False) -> Check:
    version = m.packages.get(name)
    return Check(
        name, version is not None, version or "not installed", needed_for,
        "" if version else cure, required,
    )  # fmt: skip


def _compiler(m: Machine) -> Check:
    needed_for = "linking model.so for this machine"
    if not m.compiler:
        path = m.tools.get("C compiler") or m.cross.get(m.architecture)
        cure = "" if path else "apt install gcc; or pip install ziglang; or set CC to a C compiler"
        found = path or "neither cc, gcc, clang nor zig"
        return Check("C compiler", path is not None, found, needed_for, cure, required=True)
    # CC may hold a launcher and options: "ccache gcc -m64".
    words = shlex.split(m.compiler)
    path = shutil.which(words[0]) if words else None
    found = f"{path} (from CC={m.compiler})" if path else f"CC={m.compiler}: no such program"
    cure = "" if path else "correct CC, or unset it"
    return Check("C compiler", path is not None, found, needed_for, cure, required=True)


def _cross_compiler(m: Machine, arch: str, needed_for: str) -> Check:
    name, cross = f"{arch} compiler", CROSS[arch]
    command = m.cross.get(arch, "")
    if not command:
        cure = (
            f"apt install {cross.package}; or, from pip alone, pip install ziglang; or apt install "
            f"clang lld {cross.libraries} (Debian 12); or set {cross.variable} to a compiler"
        )
        return Check(name, False, "no GNU cross compiler, clang with lld, or zig", needed_for, cure)
    words = shlex.split(command)
    path = shutil.which(words[0]) if words else None
    found = shlex.join([path, *words[1:]]) if path else f"{command}: no such program"
    cure = "" if path else f"correct {cross.variable}, or unset it"
    return Check(name, path is not None, found, needed_for, cure)


def _tool(m: Machine, name: str, needed_for: str, debian: str) -> Check:
    path = m.tools.get(name)
    cure = "" if path else f"apt install {debian}"
    return Check(name, path is not None, path or "not on the PATH", needed_for, cure)


def _instructions(m: Machine) -> Check:
    needed_for = "fast kernels on this machine"
    if not m.extensions:
        found = f"{m.architecture}: extensions unknown"
        return Check("CPU", False, found, needed_for, "name the target: compile --target NAME")
    found = f"{m.architecture}: {', '.join(m.extensions)}"
    ok = not {"AVX2", "NEON", "NEON (armv7)"}.isdisjoint(m.extensions)
    cure = "" if ok else "a CPU with AVX2 or NEON; builds run here, but slowly"
    return Check("CPU", ok, found, needed_for, cure)


def _cpu_cores(m: Machine) -> Check:
    ok = m.cores >= 2
    cure = "" if ok else "give the process a second core; one works, timings are noisier"
    return Check("CPU cores", ok, str(m.cores), "tuning and steady timings", cure)


def _disk(m: Machine) -> Check:
    ok = m.free >= DISK
    cure = "" if ok else f"free {(DISK - m.free) / 1e9:.1f} GB, or work on another disk"
    return Check("disk space", ok, f"{m.free / 1e9:.1f} GB free", "artifacts, records", cure)


def _nvcc(m: Machine) -> Check:
    path = m.tools.get("nvcc")
    cure = "" if path else "install NVIDIA's CUDA toolkit and put nvcc on the PATH"
    needed_for = "machine code inside cuda:sm_* builds"
    return Check("nvcc", path is not None, path or "not on the PATH", needed_for, cure)


def _gpu(m: Machine) -> Check:
    cure = "" if m.gpus else "none is needed to compile for cuda:sm_*, only to run it"
    return Check("GPU", bool(m.gpus), "; ".join(m.gpus) or "none", "running cuda builds", cure)


def _release(version: str) -> tuple[int, ...]:
    """The numbers in front: "0.27.0.post1" -> (0, 27, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _cross() -> dict[str, str]:
    """Compilers for this machine and for boards, as a compilation would choose them."""
    found = {}
    for target in (native(), TARGETS["aarch64"], TARGETS["armv7"]):
        with contextlib.suppress(EnvironmentLacks):
            found[target.arch] = shlex.join(find_compiler(target, native().arch))
    return found


def _version(distribution: str) -> str | None:
    """Installed version of a package that can be found for import, else None."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
    return version if find_spec(MODULES.get(distribution, distribution)) else None


def _gpus() -> tuple[str, ...]:
    program = shutil.which("nvidia-smi")
    if not program:
        return ()
    query = [program, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # a driver that is broken serves nobody
        return ()
    return tuple(
        f"{name.strip()} (sm_{capability.strip().replace('.', '')})"
        for name, _, capability in (line.rpartition(",") for line in answer.stdout.splitlines())
        if name
    )


def _cores() -> int:
    # The affinity mask knows about taskset and containers; macOS has none.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
