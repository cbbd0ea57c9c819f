"""Build a program into a library for TVM's runtime: a Relax executable with the same kernels.

For programs that run models through TVM already. The library holds kernels, constants and the
manifest; whoever loads it needs TVM's runtime of the same version. Its functions:

    main(inputs...)     outputs, as a tuple, in the manifest's order
    values(inputs...)   the bytes of every value that the manifest's taps list, by step; outputs
    manifest()          JSON
"""

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx

from mpqc.build import Built
from mpqc.errors import ArtifactError
from mpqc.graph import Array, TensorType
from mpqc.program import SLACK, Program
from mpqc.target import Target, llvm_target, native
from mpqc.toolchain import find_compiler


def build_relax(
    program: Program, target: Target, manifest: Mapping[str, Any], output: Path
) -> Built:
    """Compile and link; arguments and errors as ``mpqc.build.build``."""
    module = _Network(program, manifest).module
    executable = tvm.compile(
        module, target=llvm_target(target), relax_pipeline=tvm.transform.Sequential(_passes())
    )
    command, *options = find_compiler(target, native().arch)
    compiler = tvm.support.cc.cross_compiler(command, options=[*options, "-Wl,-s"])
    try:
        executable.export_library(str(output), fcompile=compiler)
    except RuntimeError as error:
        raise ArtifactError(f"{command} failed to link the model:\n{error}") from error
    output.chmod(0o755)
    weights = sum(array.nbytes for array in program.constants.values())
    return Built(output, None, None, weights, 0, 0, output.stat().st_size - weights)


def _passes() -> list[Any]:
    """From calls of kernels to the virtual machine's code: nothing is fused or scheduled again."""
    transform = relax.transform
    return [
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ]


class _Network:
    """The program as a Relax module.

    Every buffer is a storage of its own, freed behind its last use; tensors of several shapes and
    types lie at its start, as buffers have aliases. Inputs are copied, since kernels may read a
    little behind what they use.
    """

    def __init__(self, program: Program, manifest: Mapping[str, Any]) -> None:
        self._program = program
        self._block = relax.BlockBuilder()
        self._kernels = {
            name: self._block.add_func(func.without_attr("global_symbol"), name)
            for name, func in program.kernels.items()
        }
        self._copies: dict[TensorType, Any] = {}
        self._constants: dict[tuple[str, TensorType], Any] = {}
        self._storages: dict[str, Any] = {}
        listed = manifest.get("taps", {})
        self._taps = [tap for name, tap in program.taps.items() if name in listed]
        self._function("main", False)
        self._function("values", True)
        with self._block.function("manifest", []):
            text = json.dumps(manifest, separators=(",", ":"))
            self._block.emit_func_output(tvm.ir.StringImm(text))
        self.module = self._block.get()

    def _function(self, name: str, with_taps: bool) -> None:
        program, self._storages = self._program, {}
        inputs = {
            name: relax.Var(f"input_{index}", relax.TensorType(kind.shape, kind.dtype))
            for index, (name, kind) in enumerate(program.inputs.items())
        }
        with self._block.function(name, list(inputs.values()), pure=False):
            found: list[Any] = []
            for input_, tensor in inputs.items():
                self._copy(tensor, self._tensor(input_, program.inputs[input_]))
            for index, step in enumerate(program.steps):
                names = [program.root(each) for each in (*step.inputs, *step.outputs)]
                kinds = _types(program.kernels[step.kernel])
                tensors = [self._tensor(*pair) for pair in zip(names, kinds, strict=True)]
                self._block.emit(relax.Call(self._kernels[step.kernel], tensors))
                found += self._tapped(index) if with_taps else []
            for output, kind in program.outputs.items():
                found.append(self._kept(program.root(program.results[output]), kind))
            self._block.emit_func_output(relax.Tuple(found))

    def _tapped(self, step: int) -> list[Any]:
        kept = []
        for tap in self._taps:
            if tap.step == step:
                root = self._program.root(tap.buffer)
                size = self._size(root)
                kept.append(self._kept(root, TensorType("uint8", (size,))))
        return kept

    def _size(self, root: str) -> int:
        constant = self._program.constants.get(root)
        return self._program.buffers[root].nbytes if constant is None else constant.nbytes

    def _kept(self, root: str, kind: TensorType) -> Any:
        """A copy that the caller receives."""
        copy = self._alloc(self._storage(kind.nbytes), kind)
        self._copy(self._tensor(root, kind), copy)
        return copy

    def _tensor(self, root: str, kind: TensorType) -> Any:
        """A buffer as a kernel's argument."""
        constant = self._program.constants.get(root)
        if constant is not None and constant.size:
            made = self._constants.get((root, kind))
            if made is None:
                made = relax.const(_reinterpreted(constant, kind), kind.dtype)
                self._constants[root, kind] = made
            return made
        if root not in self._storages:
            self._storages[root] = self._storage(max(self._size(root), kind.nbytes) + SLACK)
        return self._alloc(self._storages[root], kind)

    def _storage(self, size: int) -> Any:
        shape = relax.ShapeExpr([size])
        return self._block.emit(relax.op.memory.alloc_storage(shape, 0, "global", "uint8"))

    def _alloc(self, storage: Any, kind: TensorType) -> Any:
        shape = relax.ShapeExpr(kind.shape)
        return self._block.emit(relax.op.memory.alloc_tensor(storage, 0, shape, kind.dtype))

    def _copy(self, source: Any, target: Any) -> None:
        kind = TensorType(str(target.ty.dtype), tuple(int(n) for n in target.ty.shape.values))
        if kind not in self._copies:
            self._copies[kind] = self._block.add_func(_copy_kernel(kind), "copy")
        self._block.emit(relax.Call(self._copies[kind], [source, target]))


def _copy_kernel(kind: TensorType) -> Any:
    source = te.placeholder(kind.shape, kind.dtype, name="source")
    target = te.compute(kind.shape, lambda *index: source[index], name="target")
    made = te.create_prim_func([source, target], index_dtype_override="int64")
    return made.without_attr("global_symbol")


def _types(func: tirx.PrimFunc) -> Sequence[TensorType]:
    return [
        TensorType(str(param.ty.dtype), tuple(int(extent) for extent in param.ty.shape))
        for param in func.params
    ]


def _reinterpreted(array: Array, kind: TensorType) -> Array:
    """The bytes of a constant as a kernel takes them; missing ones at its end are zero."""
    data = np.zeros(prod(kind.shape) * np.dtype(kind.dtype).itemsize, np.uint8)
    given = np.ascontiguousarray(array).reshape(-1).view(np.uint8)[: data.size]
    data[: given.size] = given
    return data.view(kind.dtype).reshape(kind.shape)
