"""Build a program into one freestanding shared library: kernels, weights and manifest inside.

TVM compiles the kernels to an object with a raw C interface (``int kernel(void*, ...)``); a
generated ``model.c`` lists the calls over one arena, and the C compiler links them with
``csrc/runtime.c``. The library needs libc (and pthreads), no TVM.
"""

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from mpqc.errors import ArtifactError
from mpqc.model_source import (
    CSRC,
    DEFAULT_PREFIX,
    Form,
    Workspace,
    collect_weights,
    exports,
    functions,
    model_source,
    place_workspaces,
    public_header,
    scratch_bytes,
    sizes_header,
)
from mpqc.program import MemoryPlan, Program
from mpqc.target import Target, llvm_target, native
from mpqc.toolchain import check_library, find_binutil, find_compiler, old_glibc


@dataclass(frozen=True)
class Built:
    """A linked library.

    Attributes:
        library: path of the shared library.
        header: of its C interface; None for TVM's runtime.
        archive: static library; None unless asked for.
        weight_bytes: constants inside.
        shared_bytes: memory that all instances share, for weights that are stored narrower.
        scratch_bytes: memory of an instance of one thread.
        code_bytes: size of the kernels' object.
    """

    library: Path
    header: Path | None
    archive: Path | None
    weight_bytes: int
    shared_bytes: int
    scratch_bytes: int
    code_bytes: int


def build(
    program: Program,
    memory: MemoryPlan,
    target: Target,
    manifest: Mapping[str, Any],
    output: Path,
    form: Form | None = None,
) -> Built:
    """Compile and link.

    Args:
        program: lowered and scheduled.
        memory: where its buffers lie.
        target: machine.
        manifest: embedded as JSON.
        output: the shared library to write; its header goes beside it.
        form: kind of library; by default shared, with threads.

    Raises:
        EnvironmentLacks: no C compiler.
        ArtifactError: the compiler refused; its message is included. Or what it made would not
            run on the target.
    """
    if target.cuda:
        from mpqc.cuda import build as cuda_build

        return cuda_build.build(program, memory, target, manifest, output, form)
    form = form or Form()
    if form.runtime == "tvm":
        from mpqc.build_relax import build_relax

        return build_relax(program, target, manifest, output)
    compiler = find_compiler(target, native().arch)
    with tempfile.TemporaryDirectory(prefix="mpqc-") as folder:
        work = Path(folder)
        objects, greed = _compile_kernels(program, target, work)
        memory, workspaces = place_workspaces(program, memory, greed)
        workspace = max((need.thread for need in greed.values()), default=0)
        code = sum(path.stat().st_size for path in objects)
        weights = collect_weights(program, form)
        (work / "weights.bin").write_bytes(weights.data)
        (work / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")), "utf-8")
        (work / "exports.map").write_text(exports(form), "utf-8")
        (work / "model.c").write_text(
            model_source(program, memory, workspaces, weights, target, manifest), "utf-8"
        )
        gcc = Compiler(compiler, target, work)
        gcc.sizes(sizes_header(program, memory, weights, workspace, form, DEFAULT_PREFIX))
        libraries = [] if form.bare else [*old_glibc(compiler, target, work), "-lpthread"]
        gcc.run(
            "-shared", *SOURCES, *map(str, objects), "-o", "model.so", "-nostartfiles",
            "-Wl,-Bsymbolic", "-Wl,--version-script=exports.map", "-Wl,-z,noexecstack",
            "-Wl,--gc-sections", "-Wl,-s", *linker_layout(target), *libraries, "-lm",
        )  # fmt: skip
        archive = None
        if form.static:
            gcc.sizes(sizes_header(program, memory, weights, workspace, form, form.prefix))
            archive = _static_library(gcc, objects, form, output)
        name = str(manifest.get("model", {}).get("file", output.name))

        def header(prefix: str) -> str:
            return public_header(program, memory, workspace, form, prefix, name)

        output.with_suffix(".h").write_text(header(DEFAULT_PREFIX), "utf-8")
        if archive is not None and form.prefix != DEFAULT_PREFIX:
            archive.with_suffix(".h").write_text(header(form.prefix), "utf-8")
        check_library(work / "model.so", target)
        shutil.copyfile(work / "model.so", output)
    output.chmod(0o755)
    return Built(
        output,
        output.with_suffix(".h"),
        archive,
        len(weights.data),
        weights.shared,
        scratch_bytes(program, memory, workspace, target, form),
        code,
    )


def linker_layout(target: Target) -> list[str]:
    """Options of the linker for a small file.

    Pages of aarch64 may have 64 KiB, and GNU ld fills up to one of them with zeros so that the
    loader can write-protect what it has relocated: here the dynamic section and a few pointers to
    names and shapes. It would protect no pointer to code: the kernels' hooks are plain data.
    """
    return ["-Wl,-z,norelro"] if target.arch == "aarch64" else []


SOURCES = (str(CSRC / "runtime.c"), "model.c")


@dataclass(frozen=True)
class Compiler:
    """The C compiler at work in a folder."""

    command: list[str]
    target: Target
    work: Path

    def sizes(self, text: str) -> None:
        (self.work / "sizes.h").write_text(text, "utf-8")

    def run(self, *arguments: str) -> None:
        """Compile or link.

        Raises:
            ArtifactError: it refused.
        """
        # no helpers of libgcc that ask for the atomics there are; no libgcc_s for unwinding
        flags = {"aarch64": ["-mno-outline-atomics"], "armv7": ["-static-libgcc"]}.get(
            self.target.arch, []
        )
        command = [
            *self.command, "-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", *flags,
            "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-Wall", "-Wextra",
            "-Werror=implicit-function-declaration", "-I", ".", "-I", str(CSRC), *arguments,
        ]  # fmt: skip
        self._call(command, "link the model")

    def tool(self, name: str, *arguments: str) -> None:
        """A program of the compiler's binutils.

        Raises:
            EnvironmentLacks: there is none.
            ArtifactError: it failed.
        """
        path = find_binutil(name, self.command, self.target, native().arch)
        self._call([path, *arguments], "make the static library")

    def _call(self, command: list[str], what: str) -> None:
        result = subprocess.run(command, cwd=self.work, capture_output=True, text=True, check=False)
        if result.returncode:
            raise ArtifactError(f"{command[0]} failed to {what}:\n{result.stderr[-2000:]}")


def _static_library(gcc: Compiler, objects: list[Path], form: Form, output: Path) -> Path:
    """One object in which the interface alone is global: others may be linked beside it."""
    parts = []
    for source in SOURCES:
        parts.append(f"{Path(source).stem}.o")
        gcc.run("-c", source, "-o", parts[-1])
    gcc.run("-r", "-nostdlib", *parts, *map(str, objects), "-o", "whole.o")
    names = [name.replace("mpqc_", f"{form.prefix}_", 1) for name in functions(form)]
    (gcc.work / "api.txt").write_text("\n".join(names) + "\n", "utf-8")
    gcc.tool("objcopy", "--strip-debug", "--keep-global-symbols=api.txt", "whole.o", "model.o")
    gcc.tool("ar", "rcsD", "model.a", "model.o")
    name = output.stem if form.prefix == DEFAULT_PREFIX else form.prefix
    archive = output.with_name(f"{name}.a")
    shutil.copyfile(gcc.work / "model.a", archive)
    return archive


# ------------------------------------------------------------------------------------- kernels


def _compile_kernels(
    program: Program, target: Target, work: Path
) -> tuple[list[Path], dict[str, Workspace]]:
    """Objects, and the working memory of each kernel."""
    if not program.kernels:
        return [], {}
    module = tvm.IRModule(
        {
            name: func.with_attr("global_symbol", name).with_attr("tirx.noalias", True)
            for name, func in program.kernels.items()
        }
    )
    with _raw_interface() as workspaces:
        library = tvm.compile(module, target=llvm_target(target))
    folder = work / "kernels"
    folder.mkdir()

    def leave(_output: str, _objects: list[str], **_options: object) -> None:
        """Link later, with everything else."""

    library.export_library(str(folder / "unused"), fcompile=leave, workspace_dir=str(folder))
    return sorted(folder.glob("*.o")), workspaces


@contextlib.contextmanager
def _raw_interface() -> Iterator[dict[str, Workspace]]:
    """Replace TVM's packed calling convention by plain C pointers while compiling.

    Yields:
        Working memory of each kernel; filled by the compilation.
    """
    packed, lower = tirx.transform.MakePackedAPI, tirx.transform.LowerTVMBuiltin
    workspaces: dict[str, Workspace] = {}

    def lower_and_count() -> Any:
        lowering = lower()

        def transform(module: Any, _context: Any) -> Any:
            lowered = lowering(module)
            for name, func in lowered.functions.items():
                workspaces[name.name_hint] = _workspace(str(func))
            return lowered

        return tvm.transform.module_pass(transform, opt_level=0, name="mpqc.LowerTVMBuiltin")

    tirx.transform.MakePackedAPI = _make_raw_api
    tirx.transform.LowerTVMBuiltin = lower_and_count
    try:
        yield workspaces
    finally:
        tirx.transform.MakePackedAPI = packed
        tirx.transform.LowerTVMBuiltin = lower


_TURNS = re.compile(r"T\.parallel\((?:T\.int64\()?(\d+)\)")
_ALLOCATION = re.compile(r"TVMBackendAllocWorkspace\([^,]+, [^,]+, T\.uint64\((\d+)\)")


def _workspace(kernel: str) -> Workspace:
    """Working memory that a lowered kernel may hold at once, and its loops, from its text.

    Raises:
        ArtifactError: the size is not known before it runs.
    """
    once = thread = turns = 0
    loops: list[int] = []  # indents of the parallel loops around a line
    for line in kernel.splitlines():
        indent = len(line) - len(line.lstrip())
        loops = [loop for loop in loops if indent > loop]
        sizes = [-(-int(size) // 64) * 64 for size in _ALLOCATION.findall(line)]
        if len(sizes) != line.count("TVMBackendAllocWorkspace("):
            raise ArtifactError("a kernel wants working memory of a size that is not constant")
        if loops:
            thread += sum(sizes)
        else:
            once += sum(sizes)
        if "T.parallel(" in line:
            loops.append(indent)
            turns = max(turns, *map(int, _TURNS.findall(line)), 0)
    return Workspace(once, thread, turns)


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
