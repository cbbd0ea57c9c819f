"""The CUDA compiler: where it is, and what it makes of a source."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mpqc.errors import ArtifactError, EnvironmentLacks, UsageError
from mpqc.model_source import Form
from mpqc.target import Target, native
from mpqc.toolchain import find_compiler

VARIABLE = "MPQC_NVCC"
# Products are rounded before they are added, as on every other target; the rest is nvcc's default
# (no flushing to zero, IEEE division and square root), stated because bit-exactness rests on it.
EXACT = ("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")


def find_nvcc() -> str:
    """Path of nvcc: the variable's, the PATH's, the toolkit's usual places, NVIDIA's wheel.

    Raises:
        EnvironmentLacks: there is none; says how to get one.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if found := shutil.which(named):
            return found
        raise EnvironmentLacks(f"{VARIABLE} names {named}, which is no program")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    wheels = [f"{folder}/nvidia/cu13" for folder in sys.path if folder]
    for folder in ("", *homes, "/usr/local/cuda", *wheels):
        if found := shutil.which(f"{folder}/bin/nvcc" if folder else "nvcc"):
            return found
    raise EnvironmentLacks(
        "no CUDA compiler: install NVIDIA's CUDA toolkit (11.8 or newer) and put nvcc on the PATH, "
        f"or pip install nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime, or set "
        f"{VARIABLE}; no GPU is needed to compile"
    )


def check_form(form: Form, target: Target) -> None:
    """Refuse what a library for GPUs cannot be.

    Raises:
        UsageError: static, or without heap and threads.
    """
    if form.static or form.bare or form.runtime == "tvm":
        asked = "--static" if form.static else "--bare" if form.bare else "--runtime tvm"
        raise UsageError(f"{asked} is for CPUs: a library for {target.name} loads the CUDA driver")


def require(form: Form, target: Target) -> None:
    """What building for a GPU needs, asked for before the work.

    Raises:
        UsageError: a form that GPUs do not have.
        EnvironmentLacks: no nvcc, or no C compiler for the host.
    """
    check_form(form, target)
    find_nvcc()
    find_compiler(target, native().arch)


def compile_fat_binary(source: str, arch: str, work: Path) -> bytes:
    """Machine code for an architecture, and PTX from which newer drivers make theirs.

    Args:
        source: CUDA C++.
        arch: "sm_90" and the like.
        work: folder for the files.

    Raises:
        EnvironmentLacks: no nvcc, or one that does not know the architecture.
        ArtifactError: it refused the source.
    """
    nvcc, number = find_nvcc(), arch.removeprefix("sm_")
    (work / "kernels.cu").write_text(source, "utf-8")
    command = [
        nvcc, "-std=c++17", "-O3", *EXACT, "--threads=0",
        f"-gencode=arch=compute_{number},code=[{arch},compute_{number}]",
        "-diag-suppress=128,177", "-fatbin", "-o", "kernels.fatbin", "kernels.cu",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=work, capture_output=True, text=True, check=False, env=_environment()
    )
    if done.returncode:
        said = done.stderr[-2000:] or done.stdout[-2000:]
        if "nsupported gpu architecture" in said:
            raise EnvironmentLacks(f"{nvcc} does not compile for {arch}: {said.strip()}")
        raise ArtifactError(f"{nvcc} failed to compile the kernels:\n{said}")
    return (work / "kernels.fatbin").read_bytes()


def _environment() -> Mapping[str, str]:
    """Without flags of the user's that would change results."""
    drop = ("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS")
    return {name: value for name, value in os.environ.items() if name not in drop}
