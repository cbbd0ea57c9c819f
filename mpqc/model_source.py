"""Generated C of a library: model.c, sizes.h, and model.h for whoever uses it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mpqc.errors import UsageError
from mpqc.graph import TensorType
from mpqc.narrow import Narrow, narrow
from mpqc.program import SLACK, MemoryPlan, Program, free_place
from mpqc.target import Target

CSRC = Path(__file__).parent / "csrc"
DEFAULT_PREFIX = "mpqc"
LOOPS = {"elementwise", "float", "pad", "copy"}  # kinds of steps that read just what they should

# Bytes of an instance and of a thread, without threads and with; runtime.c checks that they fit.
STRUCTS: Mapping[bool, tuple[int, int]] = {True: (128, 64), False: (384, 128)}

# What the library asks an x86 processor for before it runs, by mpqc's feature names: the leaf of
# cpuid, the register, its bits; and the state that the system must save (xgetbv). Compilers' own
# __builtin_cpu_supports is not used: zig's says no to everything.
_X86_CHECKS: Mapping[str, Sequence[tuple[int, str, tuple[int, ...]]]] = {
    "ssse3": [(1, "ecx", (9, 20, 23))],  # with sse4.2 and popcnt
    "avx2": [(1, "ecx", (12, 27)), (7, "ebx", (3, 5, 8)), (0, "xcr", (1, 2))],  # fma, bmi, bmi2
    "avx512": [(7, "ebx", (16, 17, 30, 31)), (0, "xcr", (5, 6, 7))],  # f, dq, bw, vl
    "vnni": [(7, "ecx", (11,))],
    "bitalg": [(7, "ecx", (1, 12, 14))],  # vbmi, bitalg, vpopcntdq
}

_C_TYPES = {
    "float32": "float", "float64": "double", "int8": "int8_t", "int16": "int16_t",
    "int32": "int32_t", "int64": "int64_t", "uint8": "uint8_t", "uint16": "uint16_t",
    "uint32": "uint32_t", "uint64": "uint64_t", "bool": "uint8_t", "float16": "uint16_t",
    "bfloat16": "uint16_t",
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """What kind of library is built.

    Attributes:
        static: also a static library ``model.a``, or ``NAME.a`` with its own ``NAME.h``.
        prefix: of the static library's functions, so that several fit into one program.
        bare: no threads and no heap: the caller gives the memory; needs memcpy and memset alone.
        ready: weights lie in the library as the kernels read them: larger, but nothing is widened
            in memory at the first start.
        runtime: "none": freestanding; "tvm": a Relax executable for TVM's runtime.
    """

    static: bool = False
    prefix: str = DEFAULT_PREFIX
    bare: bool = False
    ready: bool = False
    runtime: Literal["none", "tvm"] = "none"

    def __post_init__(self) -> None:
        if self.runtime == "tvm" and replace(self, runtime="none") != Form():
            raise UsageError(
                "--runtime tvm has one form: --static, --prefix, --bare and --ready-weights are "
                "for freestanding libraries"
            )
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.prefix):
            raise UsageError(
                f"--prefix wants a C name in lower case, as my_model, got {self.prefix!r}"
            )
        if self.prefix != DEFAULT_PREFIX and not self.static:
            raise UsageError("--prefix names the functions of a static library: add --static")


@dataclass(frozen=True)
class Workspace:
    """What a kernel needs of the runtime.

    Attributes:
        once: bytes that the kernel allocates; they lie in the arena, where nothing lives meanwhile.
        thread: bytes that every thread of its parallel loops allocates.
        turns: of its longest parallel loop; 0: it has none.
    """

    once: int = 0
    thread: int = 0
    turns: int = 0


def place_workspaces(
    program: Program, memory: MemoryPlan, needs: Mapping[str, Workspace]
) -> tuple[MemoryPlan, list[tuple[int, Workspace]]]:
    """An arena that holds the kernels' own memory too, and the offset of every step's.

    It has what a kernel wants once and what the first thread wants in its loops, one behind the
    other; further threads bring their own. Kernels may read a little behind it, as behind buffers.
    """
    places, size = [], memory.size
    for index, step in enumerate(program.steps):
        need = needs[step.kernel]
        total = need.once + need.thread
        place = free_place(program, memory, index, total) if total else 0
        places.append((place, need))
        size = max(size, place + total + SLACK)
    return replace(memory, size=size), places


@dataclass
class Weights:
    """Constants as they lie in the library.

    Attributes:
        data: all of them, each aligned to 64 bytes.
        fixed: constant -> offset in ``data``, for those that kernels read there.
        narrows: those that are widened first: (source, target, what).
        widened: constant -> offset in the memory that they are widened into.
        shared: size of that memory.
    """

    data: bytearray = field(default_factory=bytearray)
    fixed: dict[str, int] = field(default_factory=dict)
    narrows: list[tuple[int, int, Narrow]] = field(default_factory=list)
    widened: dict[str, int] = field(default_factory=dict)
    shared: int = 0


def collect_weights(program: Program, form: Form) -> Weights:
    """The constants that steps read."""
    used = {program.root(name) for step in program.steps for name in step.inputs}
    weights = Weights()
    for name in sorted(used & program.constants.keys()):
        array = np.ascontiguousarray(program.constants[name])
        small = None if form.ready else narrow(array)
        place = len(weights.data)
        if small is None:
            weights.fixed[name] = place
            _append(weights.data, array.tobytes(), 64)
        else:
            weights.narrows.append((place, weights.shared, small))
            weights.widened[name] = weights.shared
            weights.shared += -(-array.nbytes // 64) * 64
            _append(weights.data, small.data, 64)
    weights.data += bytes(64)  # kernels may read a little behind the last
    weights.shared += 64 if weights.shared else 0
    return weights


def _append(data: bytearray, new: bytes, align: int) -> None:
    data += new + bytes(-len(new) % align)


def functions(form: Form) -> list[str]:
    """Names of the interface, as mpqc.h has them."""
    return re.findall(r"^MPQC_API .*?\b(mpqc_\w+)\(", _interface(form), re.MULTILINE)


def _interface(form: Form) -> str:
    """mpqc.h, without what the form does not have."""
    text = (CSRC / "mpqc.h").read_text("utf-8")
    if form.bare:
        return re.sub(r"#ifndef MPQC_NO_HEAP\n.*?#endif\n", "", text, flags=re.DOTALL)
    return re.sub(r"#ifndef MPQC_NO_HEAP\n(.*?)#endif\n", r"\1", text, flags=re.DOTALL)


def exports(form: Form) -> str:
    """Linker script: the C interface is visible, kernels and helpers are not."""
    return f"{{ global: {'; '.join(functions(form))}; local: *; }};\n"


def sizes_header(
    program: Program, memory: MemoryPlan, weights: Weights, workspace: int, form: Form, prefix: str
) -> str:
    """sizes.h: what runtime.c is compiled for; ``workspace`` is that of each thread."""
    instance, worker = STRUCTS[form.bare]
    facts = {
        "ARENA_BYTES": memory.size,
        "ARENA_LEAST": memory.lower_bound,
        "WORKSPACE_BYTES": workspace,
        "WEIGHT_BYTES": len(weights.data),
        "SHARED_BYTES": weights.shared,
        "INSTANCE_BYTES": instance,
        "WORKER_BYTES": worker,
    }
    lines = [f"#define MPQC_{name} {value}" for name, value in facts.items()]
    scratch = scratch_expression(program, memory, workspace, form)
    lines.append(f"#define MPQC_SCRATCH_BYTES(threads) {scratch}")
    if form.bare:
        lines += ["#define MPQC_NO_THREADS", "#define MPQC_NO_HEAP"]
    if prefix != DEFAULT_PREFIX:
        lines += [f"#define {name} {_renamed(name, prefix)}" for name in functions(form)]
    return "\n".join(lines) + "\n"


def scratch_expression(program: Program, memory: MemoryPlan, workspace: int, form: Form) -> str:
    """Bytes of an instance as a C expression of ``threads``; runtime.c divides them the same."""
    fixed, each, more = _scratch_parts(memory, workspace, form)
    buffers = len(program.inputs) + len(program.outputs)
    pointers = f"(sizeof(void*) * {buffers} + 63) / 64 * 64"
    return (
        f"((size_t){fixed} + {pointers} + (size_t){each} * (size_t)(threads)"
        f" + (size_t){more} * (size_t)((threads)-1))"
    )


def scratch_bytes(
    program: Program, memory: MemoryPlan, workspace: int, target: Target, form: Form
) -> int:
    """The same for an instance of one thread."""
    pointer = 4 if target.arch == "armv7" else 8
    pointers = -(-pointer * (len(program.inputs) + len(program.outputs)) // 64) * 64
    return sum(_scratch_parts(memory, workspace, form)[:2]) + pointers


def _scratch_parts(memory: MemoryPlan, workspace: int, form: Form) -> tuple[int, int, int]:
    """Of the instance, of each thread, and of each but the first."""
    instance, worker = STRUCTS[form.bare]
    return instance + _whole_lines(memory.size), worker, _whole_lines(workspace)


def _whole_lines(size: int) -> int:
    return -(-size // 64) * 64


def _renamed(name: str, prefix: str) -> str:
    return name.replace("mpqc_", f"{prefix}_", 1)


def public_header(
    program: Program, memory: MemoryPlan, workspace: int, form: Form, prefix: str, model: str
) -> str:
    """model.h: the interface, and the model's names and sizes as constants."""
    text = _interface(form)
    for name in (*functions(form), "mpqc_model"):
        text = re.sub(rf"\b{name}\b", _renamed(name, prefix), text)
    upper = prefix.upper()
    text = re.sub(r"\bMPQC_H\b", f"{upper}_H", text)
    lines = [f"/* Constants of this model: {_comment(model)} */"]
    for side, tensors in (("INPUT", program.inputs), ("OUTPUT", program.outputs)):
        lines.append(f"#define {upper}_{side}S {len(tensors)}")
        for index, (name, kind) in enumerate(tensors.items()):
            start = f"#define {upper}_{side}_{index}"
            shape = ", ".join(map(str, kind.shape))
            lines += [
                f"{start}_NAME {_c_string(name)}",
                f'{start}_DTYPE "{kind.dtype}"',
                f"{start}_TYPE {_C_TYPES.get(kind.dtype, 'uint8_t')}",
                f"{start}_RANK {len(kind.shape)}",
                f"{start}_SHAPE {{{shape}}}",
                f"{start}_ELEMENTS {prod(kind.shape)}",
                f"{start}_BYTES {kind.nbytes}",
            ]
    lines += [
        "/* What mpqc_scratch_bytes returns, for memory that is laid out at compile time. */",
        f"#define {upper}_SCRATCH_BYTES(threads) "
        + scratch_expression(program, memory, workspace, form),
        "#endif",
    ]
    body = text.rstrip()
    assert body.endswith("#endif")
    return body.removesuffix("#endif") + "\n" + "\n".join(lines) + "\n"


def _c_string(text: str) -> str:
    """A C string literal of the text's UTF-8."""
    plain = {ord(c) for c in '"\\?'}  # quotes, escapes and trigraphs
    body = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in plain else f"\\{byte:03o}"
        for byte in text.encode("utf-8", "surrogatepass")
    )
    return f'"{body}"'


def _comment(text: str) -> str:
    return re.sub(r"[^\w .+-]", "_", text)


def model_source(
    program: Program,
    memory: MemoryPlan,
    workspaces: Sequence[tuple[int, Workspace]],
    weights: Weights,
    target: Target,
    manifest: Mapping[str, Any],
) -> str:
    """model.c: tables and one call a step."""
    places = {**memory.offsets, **memory.ends}

    def place(name: str) -> str:
        root = program.root(name)
        if root in weights.fixed:
            return f"(void*)(mpqc_weights + {weights.fixed[root]})"
        if root in weights.widened:
            return f"mpqc_shared + {weights.widened[root]}"
        if root in program.inputs:
            return f"mpqc_find_input({list(program.inputs).index(root)}, a, s)"
        return f"a + {places[root]}"

    arity = {step.kernel: len(step.inputs) + len(step.outputs) for step in program.steps}
    lines = ['#include "runtime.h"', ""]
    lines += [f"int {name}({', '.join(['void*'] * count)});" for name, count in arity.items()]
    # a switch, not a table of pointers: those would be writable until the loader has set them
    lines += [
        "int mpqc_call_step(int index, uint8_t* a, const void* const* s) {",
        "  (void)a, (void)s;",
        "  switch (index) {",
    ]
    for index, step in enumerate(program.steps):
        args = ", ".join(place(name) for name in (*step.inputs, *step.outputs))
        lines.append(f"    case {index}: return {step.kernel}({args});")
    lines += ["    default: return 1;", "  }", "}"]
    results = {name: program.root(buffer) for name, buffer in program.results.items()}
    lines += [
        f"const int mpqc_steps_n = {len(program.steps)};",
        "const size_t mpqc_workspaces[][4] = {"
        + (", ".join(f"{{{at}, {n.once}, {n.thread}, {n.turns}}}" for at, n in workspaces) or "{0}")
        + "};",
        *tensor_table("input", program.inputs, [places[name] for name in program.inputs]),
        *tensor_table("output", program.outputs, [places[results[n]] for n in program.outputs]),
        input_alignments(program),
        *narrow_table(weights),
        identity(target, manifest),
        _machine_check(target),
        embed("mpqc_weights", "weights.bin", 64),
        embed("mpqc_manifest_begin", "manifest.json", 1, "mpqc_manifest_end"),
    ]
    return "\n".join(lines) + "\n"


def tensor_table(side: str, tensors: Mapping[str, TensorType], places: list[int]) -> list[str]:
    """Names, types and places of the inputs or the outputs."""
    rows, shapes = [], []
    for index, (tensor, kind) in enumerate(tensors.items()):
        extents = ", ".join(map(str, kind.shape)) or "0"
        shapes.append(f"static const int64_t {side}_shape_{index}[] = {{{extents}}};")
        rows.append(
            f'{{{_c_string(tensor)}, "{kind.dtype}", {len(kind.shape)}, '
            f"{side}_shape_{index}, {kind.nbytes}}}"
        )
    return [
        *shapes,
        f"const mpqc_tensor mpqc_{side}s[] = {{{', '.join(rows) or '{0}'}}};",
        f"const size_t mpqc_{side}_offsets[] = {{{', '.join(map(str, places)) or '0'}}};",
        f"const int mpqc_{side}s_n = {len(rows)};",
    ]


def input_alignments(program: Program) -> str:
    """Inputs that plain loops alone read are read at the caller's, if aligned like their type."""
    readers: dict[str, set[str]] = {name: set() for name in program.inputs}
    for step in program.steps:
        for name in step.inputs:
            if (root := program.root(name)) in readers:
                readers[root].add(step.kind)
    wanted = [
        np.dtype(kind.dtype).itemsize if readers[name] <= LOOPS else 0
        for name, kind in program.inputs.items()
    ]
    numbers = ", ".join(map(str, wanted)) or "0"
    return f"const size_t mpqc_input_alignments[] = {{{numbers}}};"


def narrow_table(weights: Weights) -> list[str]:
    """What is widened, and the memory for it."""
    memory = f"uint8_t mpqc_shared[{max(weights.shared, 1)}] __attribute__((aligned(64)));"
    return [*narrow_rows(weights), memory]


def narrow_rows(weights: Weights) -> list[str]:
    """What is widened."""
    rows = [
        f"{{{source}, {target}, {n.count}, {n.low}, {n.scale}, {n.bits}, {n.width}}}"
        for source, target, n in weights.narrows
    ]
    return [
        f"const struct mpqc_narrow mpqc_narrows[] = {{{', '.join(rows) or '{0}'}}};",
        f"const int mpqc_narrows_n = {len(rows)};",
    ]


def identity(target: Target, manifest: Mapping[str, Any]) -> str:
    """Which model the library is of."""
    model, versions = manifest.get("model", {}), manifest.get("versions", {})
    texts = (model.get("file"), model.get("sha256"), versions.get("mpqc"), target.name)
    words = ", ".join(_c_string(text or "") for text in texts)
    return f"const mpqc_about mpqc_identity = {{MPQC_ABI_VERSION, 0, {words}}};"


def _machine_check(target: Target) -> str:
    if target.arch == "aarch64" and target.has("dotprod"):
        # the kernel lists the instruction sets; HWCAP_ASIMDDP has no name in older headers
        return (
            "#include <sys/auxv.h>\n"
            "int mpqc_machine_fits(void) { return (int)(getauxval(AT_HWCAP) >> 20 & 1); }"
        )
    if target.arch != "x86_64" or not target.features:
        return "int mpqc_machine_fits(void) { return 1; }"
    wanted: dict[tuple[int, str], int] = {}
    for feature in target.features:
        for leaf, register, bits in _X86_CHECKS[feature]:
            old = wanted.get((leaf, register), 0)
            wanted[leaf, register] = old | sum(1 << bit for bit in bits)
    return f"""#include <cpuid.h>
static unsigned lacks(unsigned found, unsigned wanted) {{ return ~found & wanted; }}
int mpqc_machine_fits(void) {{
  unsigned a, b = 0, c = 0, d, features, state = 0;
  if (!__get_cpuid(1, &a, &b, &features, &d)) return 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) b = c = 0;
  if (features >> 27 & 1) __asm__ volatile("xgetbv" : "=a"(state), "=d"(d) : "c"(0));
  return !(lacks(features, {wanted.get((1, "ecx"), 0)}u) | lacks(b, {wanted.get((7, "ebx"), 0)}u) |
           lacks(c, {wanted.get((7, "ecx"), 0)}u) | lacks(state, {wanted.get((0, "xcr"), 0)}u));
}}"""


def embed(symbol: str, file: str, align: int, end: str = "") -> str:
    """The bytes of a file behind a symbol."""
    tail = f'".global {end}\\n.hidden {end}\\n{end}:\\n"' if end else ""
    return (
        f'__asm__(".section .rodata\\n.balign {align}\\n.global {symbol}\\n.hidden {symbol}\\n'
        f'{symbol}:\\n.incbin \\"{file}\\"\\n" {tail} ".byte 0\\n.previous\\n");'
    )
