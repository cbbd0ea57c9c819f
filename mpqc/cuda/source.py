"""Generated C of a library for GPUs: model.c and sizes.h."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mpqc.cuda.codegen import DeviceCode
from mpqc.model_source import (
    DEFAULT_PREFIX,
    STRUCTS,
    Form,
    Weights,
    embed,
    identity,
    narrow_rows,
    public_header,
    scratch_expression,
    tensor_table,
)
from mpqc.program import MemoryPlan, Program
from mpqc.target import Target

DEVICE_CODE = "kernels.fatbin"


def sizes_header(program: Program, memory: MemoryPlan, weights: Weights, form: Form) -> str:
    """sizes.h: what cuda_runtime.c is compiled for."""
    instance, worker = STRUCTS[form.bare]
    facts = {
        "ARENA_BYTES": memory.size,
        "ARENA_LEAST": memory.lower_bound,
        "WEIGHT_BYTES": len(weights.data),
        "SHARED_BYTES": weights.shared,
        "INSTANCE_BYTES": instance,
        "WORKER_BYTES": worker,
        "SCRATCH_BYTES(threads)": scratch_expression(program, on_host(memory), 0, form),
    }
    return "".join(f"#define MPQC_{name} {value}\n" for name, value in facts.items())


def on_host(memory: MemoryPlan) -> MemoryPlan:
    """What an instance takes of the host's memory: the arena is the GPU's."""
    return replace(memory, size=0)


def header(program: Program, memory: MemoryPlan, form: Form, model: str) -> str:
    """model.h."""
    text = public_header(program, on_host(memory), 0, form, DEFAULT_PREFIX, model)
    end = "#ifdef __cplusplus\n}"
    own = (
        "/* Time that the GPU took for the last run or step, copies included [s]. */\n"
        "MPQC_API int mpqc_device_seconds(mpqc_model* model, double* result);\n"
        "/* Mean time that the GPU takes for a step that runs so many times in a row [s], started\n"
        " * together as in a whole run. Values inside the model mean nothing afterwards. */\n"
        "MPQC_API int mpqc_time_step(mpqc_model* model, int index, int times, double* result);\n\n"
    )
    return text.replace(end, own + end, 1)


def model_source(
    program: Program,
    memory: MemoryPlan,
    workspaces: Mapping[str, int],
    weights: Weights,
    code: DeviceCode,
    target: Target,
    manifest: Mapping[str, Any],
) -> str:
    """model.c: tables of kernels, launches and places.

    Args:
        program: lowered.
        memory: places of its buffers.
        workspaces: step and name of working memory -> place, as ``"3 kernel.0"``.
        weights: as they lie in the library.
        code: what its kernels became.
        target: machine.
        manifest: names the model.
    """
    places = {**memory.offsets, **memory.ends}
    behind = len(weights.data)  # where widened weights start on the device

    def place(name: str) -> str:
        root = program.root(name)
        if root in weights.fixed:
            return f"{{1, {weights.fixed[root]}}}"
        if root in weights.widened:
            return f"{{1, {behind + weights.widened[root]}}}"
        return f"{{0, {places[root]}}}"

    numbers = {name: index for index, name in enumerate(code.kernels)}
    launches: list[str] = []
    rows: list[str] = []
    firsts = [0]
    for index, step in enumerate(program.steps):
        buffers = (*step.inputs, *step.outputs)
        for launch in code.functions[step.kernel].launches:
            grid, block = (f"{{{', '.join(map(str, e))}}}" for e in (launch.grid, launch.block))
            launches.append(
                f"  {{{numbers[launch.kernel]}, {grid}, {block}, {len(rows)}, "
                f"{len(launch.arguments)}}},"
            )
            rows += [
                place(buffers[x]) if isinstance(x, int) else f"{{0, {workspaces[f'{index} {x}']}}}"
                for x in launch.arguments
            ]
        firsts.append(len(launches))
    results = {name: program.root(buffer) for name, buffer in program.results.items()}
    lines = [
        '#include "cuda_model.h"', "",
        f"const int mpqc_steps_n = {len(program.steps)};",
        f"const int mpqc_kernels_n = {len(numbers)};",
        f"const int mpqc_capability = {target.cuda.removeprefix('sm_')};",
        "const char* const mpqc_kernels[] = {",
        *(f'  "{name}",' for name in numbers), "  0};",
        "const struct mpqc_launch mpqc_launches[] = {", *launches, "  {0}};",
        "const struct mpqc_place mpqc_places[] = {", *(f"  {row}," for row in rows), "  {0}};",
        f"const int mpqc_step_launches[] = {{{', '.join(map(str, firsts))}}};",
        *tensor_table("input", program.inputs, [places[name] for name in program.inputs]),
        *tensor_table("output", program.outputs, [places[results[n]] for n in program.outputs]),
        *narrow_rows(weights),
        identity(target, manifest),
        embed("mpqc_weights", "weights.bin", 64),
        embed("mpqc_device_code", DEVICE_CODE, 64),
        embed("mpqc_manifest_begin", "manifest.json", 1, "mpqc_manifest_end"),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
