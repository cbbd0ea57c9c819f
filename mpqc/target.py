"""Targets: the machines that mpqc builds for, named as users name them.

Each carries the facts that schedules need. A build for a target never contains an instruction
that the target lacks.
"""

import ctypes
import json
import os
import platform
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from mpqc.errors import UsageError


@dataclass(frozen=True)
class Target:
    """One machine.

    Attributes:
        name: as the user writes it.
        arch: "x86_64", "aarch64" or "armv7".
        llvm: the TVM target dict (kind llvm).
        vector_bits: width of the widest vector register that integer kernels should use.
        features: instruction-set extensions that schedules ask for: "ssse3", "avx2", "avx512",
            "vnni", "bitalg", "neon", "dotprod".
        cores: threads that a schedule may count on.
        about: one line for ``mpqc targets``.
        cuda: architecture of its GPU, "sm_90" and the like; empty where the CPU computes. The
            other facts are those of the host then.
    """

    name: str
    arch: str
    llvm: dict[str, Any] = field(hash=False)
    vector_bits: int = 128
    features: frozenset[str] = frozenset()
    cores: int = 4
    about: str = ""
    cuda: str = ""

    def has(self, feature: str) -> bool:
        return feature in self.features

    @property
    def runs_here(self) -> bool:
        """Whether this machine executes every instruction that the target may contain."""
        host = native()
        if self.arch != host.arch or not self.features <= host.features:
            return False
        return not self.cuda or gpu_capability() >= int(self.cuda.removeprefix("sm_"))

    @property
    def why_not_here(self) -> str:
        """What keeps it from running on this machine; empty when nothing does."""
        if self.runs_here:
            return ""
        host = native()
        if not self.cuda or self.arch != host.arch:
            return f"target {self.name} does not run on this machine"
        if not gpu_capability():
            return f"target {self.name} needs a GPU, and no CUDA driver with a GPU is found here"
        return (
            f"target {self.name} does not run on this machine's {gpu().name}, which is "
            f"sm_{gpu_capability()}"
        )


def _x86(name: str, mcpu: str, bits: int, features: str, about: str, *mattr: str) -> Target:
    llvm: dict[str, Any] = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": mcpu}
    if mattr:
        llvm["mattr"] = list(mattr)
    if name == "x86-64-v2":  # 16 short registers: LLVM's last level unrolls, which gains nothing
        llvm["opt-level"] = 2
    return Target(name, "x86_64", llvm, bits, frozenset(features.split()), 2, about)


def _arm64(name: str, mcpu: str, about: str, *, dotprod: bool = False) -> Target:
    mattr = ["+neon", "+dotprod"] if dotprod else ["+neon"]
    llvm = {
        "kind": "llvm", "device": "arm_cpu", "mtriple": "aarch64-linux-gnu",
        "mcpu": mcpu, "mattr": mattr,
    }  # fmt: skip
    features = frozenset({"neon", "dotprod"} if dotprod else {"neon"})
    return Target(name, "aarch64", llvm, 128, features, 4, about)


def _armv7(name: str, mcpu: str, about: str) -> Target:
    llvm = {
        "kind": "llvm", "device": "arm_cpu", "mtriple": "armv7l-unknown-linux-gnueabihf",
        "mcpu": mcpu, "mattr": ["+neon"], "mfloat-abi": "hard",
    }  # fmt: skip
    return Target(name, "armv7", llvm, 128, frozenset({"neon"}), 4, about)


def _gpu(name: str, arch: str, about: str, *, host: str = "x86_64") -> Target:
    llvm = {"kind": "llvm", "mtriple": f"{host}-linux-gnu", "mcpu": "generic"}
    if host == "x86_64":
        llvm["mcpu"] = "x86-64"
    return Target(name, host, llvm, 128, frozenset(), 1, about, arch)


_AVX512 = ("+avx512vnni", "+avx512bitalg", "+avx512vpopcntdq", "+avx512vbmi")

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _x86("x86-64-v2", "x86-64-v2", 128, "ssse3", "SSE4.2, any x86 since 2009"),
        _x86("x86-64-v3", "x86-64-v3", 256, "ssse3 avx2", "AVX2, most x86 since 2015"),
        _x86("x86-64-v4", "x86-64-v4", 512, "ssse3 avx2 avx512", "AVX-512 F/BW/VL/DQ"),
        _x86(
            "x86-64-v4-vnni", "x86-64-v4", 512, "ssse3 avx2 avx512 vnni bitalg",
            "AVX-512 with VNNI and BITALG/VPOPCNTDQ: Ice Lake, Zen 4 and newer", *_AVX512,
        ),
        _arm64("aarch64", "generic", "any 64-bit ARM"),
        _arm64("rpi3", "cortex-a53", "Raspberry Pi 3 (64-bit system), Cortex-A53"),
        _arm64("rpi4", "cortex-a72", "Raspberry Pi 4 (64-bit system), Cortex-A72"),
        _arm64("rpi5", "cortex-a76", "Raspberry Pi 5, Cortex-A76", dotprod=True),
        _arm64("jetson-orin-cpu", "cortex-a78", "Jetson Orin CPU cores", dotprod=True),
        _armv7("armv7", "cortex-a9", "32-bit ARM with NEON, hard float"),
        _gpu("cuda:sm_75", "sm_75", "NVIDIA Turing: T4, RTX 20"),
        _gpu("cuda:sm_80", "sm_80", "NVIDIA A100"),
        _gpu("cuda:sm_86", "sm_86", "NVIDIA Ampere: A10, A40, RTX 30"),
        _gpu("cuda:sm_89", "sm_89", "NVIDIA Ada: L4, L40, RTX 40"),
        _gpu("cuda:sm_90", "sm_90", "NVIDIA Hopper: H100, H200"),
        _gpu("jetson-orin", "sm_87", "Jetson Orin's GPU (sm_87), 64-bit ARM host", host="aarch64"),
    )
}  # fmt: skip


@cache
def host_flags() -> frozenset[str]:
    """CPU flags as Linux reports them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


@dataclass(frozen=True)
class Gpu:
    """This machine's first GPU.

    Attributes:
        name: as the driver says it.
        capability: compute capability, 90 for 9.0; 0 without driver or GPU.
    """

    name: str = ""
    capability: int = 0


@cache
def gpu() -> Gpu:
    """What the driver says of the first GPU."""
    try:
        driver = ctypes.CDLL(os.environ.get("MPQC_CUDA_DRIVER", "libcuda.so.1"))
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(128)
        if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
            return Gpu()
        for value, attribute in ((major, 75), (minor, 76)):  # numbers of cuda.h
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
                return Gpu()
        driver.cuDeviceGetName(name, len(name), device)
    except (OSError, AttributeError):
        return Gpu()
    return Gpu(name.value.decode("utf-8", "replace"), 10 * major.value + minor.value)


def gpu_capability() -> int:
    """Compute capability of this machine's first GPU, 90 for 9.0; 0 without driver or GPU."""
    return gpu().capability


@cache
def native() -> Target:
    """The best named target whose instructions this machine has."""
    machine, flags = platform.machine().lower(), host_flags()
    if machine in ("x86_64", "amd64"):
        base = "x86-64-v2"
        if {"avx2", "fma", "bmi2", "f16c", "movbe"} <= flags:
            base = "x86-64-v3"
            if {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"} <= flags:
                base = "x86-64-v4"
                if {"avx512_vnni", "avx512_bitalg", "avx512_vpopcntdq", "avx512vbmi"} <= flags:
                    base = "x86-64-v4-vnni"
    elif machine in ("aarch64", "arm64"):
        base = "rpi5" if "asimddp" in flags else "aarch64"
    else:
        base = "armv7"
    found = TARGETS[base]
    return replace(found, name="native", cores=os.cpu_count() or 1, about=f"this machine: {base}")


def find_target(name: str) -> Target:
    """Look a target up by name; a JSON object is taken as a TVM target dict.

    Raises:
        UsageError: neither a known name nor a usable dict.
    """
    if name == "native":
        return native()
    if name in TARGETS:
        return TARGETS[name]
    if name.lstrip().startswith("{"):
        return _from_dict(name)
    known = ", ".join(["native", *TARGETS])
    raise UsageError(f"unknown target {name!r}; choose one of {known}, or give a TVM target dict")


def _from_dict(text: str) -> Target:
    try:
        llvm = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"target is not JSON: {error}") from error
    if not isinstance(llvm, dict) or llvm.get("kind") != "llvm":
        raise UsageError('a target dict needs "kind": "llvm"')
    triple = str(llvm.get("mtriple", "x86_64-linux-gnu"))
    arch = {"x86_64": "x86_64", "aarch64": "aarch64"}.get(triple.split("-")[0], "armv7")
    mattr = {str(word).lstrip("+") for word in llvm.get("mattr", [])}
    named = {"avx2", "avx512vnni", "avx512bitalg", "dotprod", "neon", "ssse3"}
    rename = {"avx512vnni": "vnni", "avx512bitalg": "bitalg"}
    features = {rename.get(word, word) for word in mattr & named}
    if arch != "x86_64":
        features.add("neon")
    bits = 512 if "avx512bw" in mattr else 256 if "avx2" in mattr else 128
    if bits == 512:
        features |= {"avx512", "avx2", "ssse3"}
    return Target(text, arch, llvm, bits, frozenset(features), int(llvm.get("num-cores", 4)))


def llvm_target(target: Target) -> Any:
    """The TVM object for a target."""
    import tvm

    return tvm.target.Target({**target.llvm, "num-cores": target.cores})
