"""Build a program into one shared library that runs on a GPU.

Device code is compiled ahead by nvcc and lies inside of the library; the host's part is C, finds
the CUDA driver when the first instance is made, and needs no CUDA library to link or to load.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpqc.build import Built, Compiler, linker_layout
from mpqc.cuda import toolkit
from mpqc.cuda.codegen import DeviceCode, generate
from mpqc.cuda.source import DEVICE_CODE, header, model_source, on_host, sizes_header
from mpqc.model_source import (
    CSRC,
    Form,
    collect_weights,
    functions,
    scratch_bytes,
)
from mpqc.program import MemoryPlan, Program, free_place
from mpqc.target import Target, native
from mpqc.toolchain import check_library, find_compiler, old_glibc

OWN_FUNCTIONS = ("mpqc_device_seconds", "mpqc_time_step")  # beside those of every library


def build(
    program: Program,
    memory: MemoryPlan,
    target: Target,
    manifest: Mapping[str, Any],
    output: Path,
    form: Form | None = None,
) -> Built:
    """Compile and link; arguments and errors as ``mpqc.build.build``.

    Raises:
        EnvironmentLacks: no C compiler or no nvcc.
        ArtifactError: one of them refused.
        UsageError: a form that GPUs do not have.
    """
    form = form or Form()
    toolkit.check_form(form, target)
    compiler = find_compiler(target, native().arch)
    code = generate(program.kernels, target.cuda)
    memory, workspaces = place_workspaces(program, memory, code)
    weights = collect_weights(program, form)
    with tempfile.TemporaryDirectory(prefix="mpqc-") as folder:
        work = Path(folder)
        binary = toolkit.compile_fat_binary(code.source, target.cuda, work)
        (work / DEVICE_CODE).write_bytes(binary)
        (work / "weights.bin").write_bytes(weights.data)
        (work / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")), "utf-8")
        names = "; ".join((*functions(form), *OWN_FUNCTIONS))
        (work / "exports.map").write_text(f"{{ global: {names}; local: *; }};\n", "utf-8")
        (work / "model.c").write_text(
            model_source(program, memory, workspaces, weights, code, target, manifest), "utf-8"
        )
        gcc = Compiler(compiler, target, work)
        gcc.sizes(sizes_header(program, memory, weights, form))
        gcc.run(
            "-shared", str(CSRC / "cuda_runtime.c"), "model.c", "-o", "model.so", "-nostartfiles",
            "-Wl,-Bsymbolic", "-Wl,--version-script=exports.map", "-Wl,-z,noexecstack",
            "-Wl,--gc-sections", "-Wl,-s", *linker_layout(target),
            *_loader(compiler, target, work), "-lpthread",
        )  # fmt: skip
        check_library(work / "model.so", target)
        shutil.copyfile(work / "model.so", output)
    output.chmod(0o755)
    name = str(manifest.get("model", {}).get("file", output.name))
    interface = output.with_suffix(".h")
    interface.write_text(header(program, memory, form, name), "utf-8")
    host = scratch_bytes(program, on_host(memory), 0, target, form)
    return Built(output, interface, None, len(weights.data), weights.shared, host, len(binary))


# Version of dlopen and its kin before glibc 2.34 moved them into libc.so.6.
_OLD_LOADER = {"x86_64": "GLIBC_2.2.5", "aarch64": "GLIBC_2.17"}


def _loader(compiler: list[str], target: Target, work: Path) -> list[str]:
    """Options that link dlopen, by its old name where the C library has moved it."""
    threads = old_glibc(compiler, target, work)
    if not threads:
        return ["-ldl"]
    version = _OLD_LOADER[target.arch]
    names = ("dlopen", "dlsym", "dlclose", "dlerror")
    lines = "".join(f'__asm__(".symver {name},{name}@{version}");\n' for name in names)
    (work / "old_loader.h").write_text(lines, "utf-8")
    return [*threads, "-include", "old_loader.h", "-Wl,--no-as-needed", "-l:libdl.so.2",
            "-Wl,--as-needed"]  # fmt: skip


def place_workspaces(
    program: Program, memory: MemoryPlan, code: DeviceCode
) -> tuple[MemoryPlan, dict[str, int]]:
    """An arena that also holds what the kernels of one step hand over to each other."""
    places: dict[str, int] = {}
    size = memory.size
    for index, step in enumerate(program.steps):
        needs = {
            name: -(-need // 64) * 64
            for name, need in code.functions[step.kernel].workspaces.items()
        }
        if not needs:
            continue
        place = free_place(program, memory, index, sum(needs.values()))
        for name, need in needs.items():
            places[f"{index} {name}"] = place
            place += need
        size = max(size, place)
    return replace(memory, size=size), places
