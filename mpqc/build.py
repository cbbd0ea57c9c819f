"""Build a program into one freestanding shared library: kernels, weights and manifest inside.

TVM compiles the kernels to an object with a raw C interface (``int kernel(void*, ...)``); a
generated ``model.c`` lists the calls over one arena, and the C compiler links them with
``csrc/runtime.c``. The library needs libc (and pthreads), no TVM.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from mpqc.errors import ArtifactError, EnvironmentLacks
from mpqc.graph import TensorType
from mpqc.program import MemoryPlan, Program
from mpqc.target import Target, llvm_target, native

CSRC = Path(__file__).parent / "csrc"
MOST_TENSORS = 256

# GNU prefix and Debian package of the compiler that makes libraries for an architecture.
CROSS = {
    "x86_64": ("x86_64-linux-gnu", "gcc-x86-64-linux-gnu"),
    "aarch64": ("aarch64-linux-gnu", "gcc-aarch64-linux-gnu"),
    "armv7": ("arm-linux-gnueabihf", "gcc-arm-linux-gnueabihf"),
}

# CPU features that the library asks the processor for before it runs, by mpqc's feature names.
_CPU_CHECKS = {
    "x86_64": {
        "ssse3": ("ssse3", "sse4.2", "popcnt"),
        "avx2": ("avx2", "fma"),
        "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
        "vnni": ("avx512vnni",),
        "bitalg": ("avx512bitalg", "avx512vpopcntdq", "avx512vbmi"),
    }
}


@dataclass(frozen=True)
class Built:
    """A linked library.

    Attributes:
        library: path of the shared library.
        weight_bytes: constants inside.
        code_bytes: size of the kernels' object.
    """

    library: Path
    weight_bytes: int
    code_bytes: int


def find_compiler(target: Target, host_arch: str) -> list[str]:
    """The C compiler for a target.

    Raises:
        EnvironmentLacks: none is installed; says how to get one.
    """
    if target.arch == host_arch:
        if os.environ.get("CC"):
            return os.environ["CC"].split()
        for name in ("cc", "gcc", "clang"):
            if shutil.which(name):
                return [name]
        raise EnvironmentLacks("no C compiler found: install gcc or clang, or set CC")
    prefix, package = CROSS[target.arch]
    name = f"{prefix}-gcc"
    if shutil.which(name):
        return [name]
    raise EnvironmentLacks(
        f"no cross compiler for {target.arch}: install {name} (Debian: apt install {package})"
    )


def build(
    program: Program, memory: MemoryPlan, target: Target, manifest: Mapping[str, Any], output: Path
) -> Built:
    """Compile and link.

    Args:
        program: lowered and scheduled.
        memory: where its temporaries lie.
        target: machine.
        manifest: embedded as JSON.
        output: the shared library to write.

    Raises:
        EnvironmentLacks: no C compiler.
        ArtifactError: the compiler refused; its message is included.
    """
    compiler = find_compiler(target, native().arch)
    with tempfile.TemporaryDirectory(prefix="mpqc-") as folder:
        work = Path(folder)
        objects = _compile_kernels(program, target, work)
        offsets, size = _write_weights(program, work / "weights.bin")
        (work / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        (work / "exports.map").write_text(_exports(), "utf-8")
        (work / "model.c").write_text(_model_source(program, memory, offsets, target), "utf-8")
        command = [
            *compiler, "-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden",
            "-Wall", "-Wextra", "-Werror=implicit-function-declaration",
            "-I", str(CSRC), "-I", str(work),
            "-o", str(work / "model.so"), str(CSRC / "runtime.c"), str(work / "model.c"),
            *map(str, objects),
            "-Wl,-Bsymbolic", "-Wl,--version-script=exports.map", "-Wl,-z,noexecstack",
            "-Wl,--gc-sections", "-lpthread", "-lm",
        ]  # fmt: skip
        result = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        if result.returncode:
            raise ArtifactError(f"{compiler[0]} failed to link the model:\n{result.stderr[-2000:]}")
        code = sum(path.stat().st_size for path in objects)
        shutil.copyfile(work / "model.so", output)
    output.chmod(0o755)
    return Built(output, size, code)


# ------------------------------------------------------------------------------------- kernels


def _compile_kernels(program: Program, target: Target, work: Path) -> list[Path]:
    if not program.kernels:
        return []
    module = tvm.IRModule(
        {
            name: func.with_attr("global_symbol", name).with_attr("tirx.noalias", True)
            for name, func in program.kernels.items()
        }
    )
    with _raw_interface():
        library = tvm.compile(module, target=llvm_target(target))
    archive = work / "kernels.tar"
    library.export_library(str(archive))
    folder = work / "kernels"
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return sorted(folder.rglob("*.o"))


@contextlib.contextmanager
def _raw_interface() -> Iterator[None]:
    """Replace TVM's packed calling convention by plain C pointers while compiling."""
    packed = tirx.transform.MakePackedAPI
    tirx.transform.MakePackedAPI = _make_raw_api
    try:
        yield
    finally:
        tirx.transform.MakePackedAPI = packed


def _make_raw_api() -> Any:
    def transform(module: Any, _context: Any) -> Any:
        return tvm.IRModule(
            {
                name: _raw(func) if isinstance(func, tirx.PrimFunc) else func
                for name, func in module.functions.items()
            }
        )

    return tvm.transform.module_pass(transform, opt_level=0, name="mpqc.MakeRawAPI")


def _raw(func: Any) -> Any:
    """``int f(void* a, void* b, ...)``: each buffer parameter becomes its data pointer."""
    if int(func.attrs.get("calling_conv", 0)) or "global_symbol" not in func.attrs:
        return func  # a device function or a parallel body that was split off already
    params, declarations = [], []
    for param in func.params:
        if not hasattr(param.ty, "shape"):
            params.append(param)
            continue
        element = tvm.ir.PrimType(str(param.ty.dtype))
        pointer = tirx.Var(f"{param.name}_data", tvm.ir.PointerType(element, "global"))
        params.append(pointer)
        declarations.append(tirx.DeclBuffer(param, data=pointer))
    body = tirx.SeqStmt([func.body, tirx.Return(tirx.const(0, "int32"))])
    for key, value in (("device_type", 1), ("device_id", 0)):  # parallel lowering asks for them
        body = tirx.AttrStmt("default", key, tirx.const(value, "int32"), body)
    attrs = dict(func.attrs)
    target = attrs["target"]
    attrs |= {
        "calling_conv": 1,
        "tirx.noalias": True,
        "target": target.host if target.host is not None else target,
    }
    whole = tirx.SeqStmt([*declarations, body]) if declarations else body
    return tirx.PrimFunc(params, whole, tvm.ir.PrimType("int32"), None).with_attr(attrs)


# ------------------------------------------------------------------------------------- model.c


def _exports() -> str:
    """Linker script: the C interface is visible, kernels and helpers are not."""
    header = (CSRC / "mpqc.h").read_text("utf-8")
    names = re.findall(r"^MPQC_API .*?\b(mpqc_\w+)\(", header, re.MULTILINE)
    return f"{{ global: {'; '.join(names)}; local: *; }};\n"


def _write_weights(program: Program, path: Path) -> tuple[dict[str, int], int]:
    """Concatenate the constants that steps read, each aligned to 64 bytes."""
    used = {
        program.root(name)
        for step in program.steps
        for name in step.inputs
        if program.root(name) in program.constants
    }
    offsets: dict[str, int] = {}
    with path.open("wb") as file:
        for name in sorted(used):
            offsets[name] = file.tell()
            data = np.ascontiguousarray(program.constants[name]).tobytes()
            file.write(data + bytes(-len(data) % 64))
        file.write(bytes(64))
        return offsets, file.tell()


def _model_source(
    program: Program, memory: MemoryPlan, weights: Mapping[str, int], target: Target
) -> str:
    inputs = {name: index for index, name in enumerate(program.inputs)}
    outputs = {program.results[name]: index for index, name in enumerate(program.outputs)}
    if max(len(inputs), len(outputs)) > MOST_TENSORS:
        raise ArtifactError(f"more than {MOST_TENSORS} inputs or outputs")

    def place(name: str) -> str:
        root = program.root(name)
        if root in weights:
            return f"(void*)(mpqc_weights + {weights[root]})"
        if root in inputs:
            return f"b->inputs[{inputs[root]}]"
        if root in outputs:
            return f"b->outputs[{outputs[root]}]"
        return f"b->arena + {memory.offsets[root]}"

    arity = {step.kernel: len(step.inputs) + len(step.outputs) for step in program.steps}
    lines = ['#include "runtime.h"', ""]
    lines += [f"int {name}({', '.join(['void*'] * count)});" for name, count in arity.items()]
    for index, step in enumerate(program.steps):
        args = ", ".join(place(name) for name in (*step.inputs, *step.outputs))
        lines.append(
            f"static int step_{index}(struct mpqc_bindings* b) "
            f"{{ (void)b; return {step.kernel}({args}); }}"
        )
    names = [f"step_{index}" for index in range(len(program.steps))]
    lines += [
        f"const mpqc_step_fn mpqc_steps[] = {{{', '.join(names) or '0'}}};",
        f"const int mpqc_steps_n = {len(names)};",
        f"const size_t mpqc_arena_bytes = {memory.size};",
        *_tensor_table("inputs", program.inputs),
        *_tensor_table("outputs", program.outputs),
        _machine_check(target),
        _embed("mpqc_weights", "weights.bin", 64),
        _embed("mpqc_manifest_begin", "manifest.json", 1, "mpqc_manifest_end"),
    ]
    return "\n".join(lines) + "\n"


def _tensor_table(name: str, tensors: Mapping[str, TensorType]) -> list[str]:
    rows, shapes = [], []
    for index, (tensor, kind) in enumerate(tensors.items()):
        extents = ", ".join(map(str, kind.shape)) or "0"
        shapes.append(f"static const int64_t {name}_shape_{index}[] = {{{extents}}};")
        rows.append(
            f'{{{json.dumps(tensor)}, "{kind.dtype}", {len(kind.shape)}, '
            f"{name}_shape_{index}, {kind.nbytes}}}"
        )
    return [
        *shapes,
        f"const mpqc_tensor mpqc_{name}[] = {{{', '.join(rows) or '{0}'}}};",
        f"const int mpqc_{name}_n = {len(rows)};",
    ]


def _machine_check(target: Target) -> str:
    table = _CPU_CHECKS.get(target.arch, {})
    flags = [flag for feature in sorted(target.features) for flag in table.get(feature, ())]
    tests = " && ".join(f'__builtin_cpu_supports("{flag}")' for flag in flags) or "1"
    prepare = "__builtin_cpu_init(); " if flags else ""
    return f"int mpqc_machine_fits(void) {{ {prepare}return {tests}; }}"


def _embed(symbol: str, file: str, align: int, end: str = "") -> str:
    tail = f'".global {end}\\n.hidden {end}\\n{end}:\\n"' if end else ""
    return (
        f'__asm__(".section .rodata\\n.balign {align}\\n.global {symbol}\\n.hidden {symbol}\\n'
        f'{symbol}:\\n.incbin \\"{file}\\"\\n" {tail} ".byte 0\\n.previous\\n");'
    )
