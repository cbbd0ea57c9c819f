"""PrimFuncs with bound threads to CUDA source and the launches that run them.

TVM's own host code is not used: it needs TVM's runtime. What it would do - which kernels, in which
order, over how many blocks, with which working memory - is read from the lowered functions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx.build import codegen_build

from mpqc.errors import ArtifactError
from mpqc.model_source import CSRC

DEVICE_CODE = "cuda_kernels.cuh"
MOST_BLOCKS, MOST_BLOCKS_ASIDE = 2**31 - 1, 65535  # of a grid, along x and along y and z


@dataclass(frozen=True)
class Launch:
    """One launch of a device kernel.

    Attributes:
        kernel: name of the ``__global__`` function.
        grid, block: extents x, y, z.
        arguments: pointers: parameter of the PrimFunc by index, or working memory by name.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: tuple[int | str, ...]


@dataclass(frozen=True)
class DeviceFunction:
    """What a PrimFunc became.

    Attributes:
        launches: in order.
        workspaces: name -> bytes of global memory that its kernels hand over to each other.
    """

    launches: tuple[Launch, ...]
    workspaces: Mapping[str, int]


@dataclass(frozen=True)
class DeviceCode:
    """CUDA source of all kernels, and how each PrimFunc runs."""

    source: str
    functions: Mapping[str, DeviceFunction]

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the ``__global__`` functions, each once."""
        names = (x.kernel for f in self.functions.values() for x in f.launches)
        return tuple(dict.fromkeys(names))


def device_source() -> str:
    """The code that all kernels share."""
    return (CSRC / DEVICE_CODE).read_text("utf-8")


def generate(functions: Mapping[str, Any], arch: str) -> DeviceCode:
    """Lower and print scheduled PrimFuncs.

    Args:
        functions: symbol -> PrimFunc whose loops are bound to blocks and threads.
        arch: "sm_90" and the like.

    Raises:
        ArtifactError: a grid is larger than any device takes.
    """
    if not functions:
        return DeviceCode("", {})
    target = tvm.target.Target({"kind": "cuda", "arch": arch}, host={"kind": "llvm"})
    module = tvm.IRModule(
        {
            name: legalize(func)
            .with_attr("global_symbol", name)
            .with_attr("tirx.noalias", True)
            .with_attr("tirx.is_scheduled", True)
            for name, func in functions.items()
        }
    )
    pipeline, _, finalize = tirx.get_tir_pipeline("s_tir")
    host, device = _split(tirx.transform.BindTarget(target)(module), pipeline)
    source = codegen_build(finalize()(device), target).inspect_source()
    return DeviceCode(source, {name: _read_host(name, host[name]) for name in functions})


_NARROW = ("int8", "uint8", "int16", "uint16")


def legalize(func: Any) -> Any:
    """Write a function as C means it.

    LLVM's fences between products and sums go: nvcc is told not to contract them. Arithmetic of
    narrow integers, which C does in ``int``, is cut to its width where TVM would print it bare.
    Buffers start at their pointers, also where TVM leaves that open.
    """
    offsets = [getattr(parameter.ty, "elem_offset", None) for parameter in func.params]
    symbols = [offset for offset in offsets if isinstance(offset, tvm.ir.Var)]

    def variable(node: Any) -> Any:
        known = any(symbol.same_as(node) for symbol in symbols)
        return tirx.const(0, str(node.ty)) if known else node

    def call(node: Any) -> Any:
        name = getattr(node.op, "name", "")
        if name == "tirx.call_llvm_pure_intrin":
            return node.args[-1]
        return _widened(node, tirx.shift_left, *node.args) if name == "tirx.shift_left" else node

    def binary(operator: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
        return lambda node: _widened(node, operator, node.a, node.b)

    operators = (tirx.Add, tirx.Sub, tirx.Mul)
    return tvm_ffi.structural_map(
        func,
        [
            (tvm.ir.Call, call),
            *((kind, binary(kind)) for kind in operators),
            *([(tvm.ir.Var, variable)] if symbols else []),
        ],
    )


def _widened(node: Any, operator: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    dtype = str(node.ty)
    if dtype not in _NARROW:
        return node
    return tirx.Cast(dtype, operator(tirx.Cast("int32", a), tirx.Cast("int32", b)))


def _split(module: Any, pipeline: Any) -> tuple[dict[str, Any], Any]:
    """Host functions as they are before TVM gives them its calling convention; device module."""
    host: dict[str, Any] = {}

    def take_host(whole: Any, _context: Any) -> Any:
        device = {}
        for name, func in whole.functions.items():
            if int(func.attrs.get("calling_conv", 0)) == 2:
                device[name] = func
            else:
                host[name.name_hint] = func
        return tvm.IRModule(device)

    def make() -> Any:
        return tvm.transform.module_pass(take_host, opt_level=0, name="mpqc.TakeHost")

    packed = tirx.transform.MakePackedAPI
    tirx.transform.MakePackedAPI = make
    try:
        return host, pipeline(module)
    finally:
        tirx.transform.MakePackedAPI = packed


def _read_host(name: str, func: Any) -> DeviceFunction:
    parameters = list(func.params)
    views: list[tuple[Any, Any]] = []  # buffer, the one whose memory it views
    allocated: list[Any] = []
    calls: list[Any] = []

    def declared(node: Any) -> None:
        views.append((node.buffer, node.data.args[0]))

    def found(node: Any) -> None:
        allocated.append(node.buffer)

    def called(node: Any) -> None:
        if getattr(node.op, "name", "") == "tirx.call_ffi_kernel":
            calls.append(node)

    tvm_ffi.structural_walk(func.body, (tirx.DeclBuffer, declared))
    tvm_ffi.structural_walk(func.body, (tirx.AllocBuffer, found))
    tvm_ffi.structural_walk(func.body, (tvm.ir.Call, called))

    def place(pointer: Any) -> int | str:
        buffer = pointer.args[0]
        for _ in range(len(views) + 1):
            for index, parameter in enumerate(parameters):
                if parameter.same_as(buffer):
                    return index
            for index, own in enumerate(allocated):
                if own.same_as(buffer):
                    return f"{name}.{index}"
            buffer = next(source for view, source in views if view.same_as(buffer))
        raise AssertionError(f"{name}: a kernel is given memory from nowhere")

    return DeviceFunction(
        tuple(_launch(call, place) for call in calls),
        {f"{name}.{index}": _bytes(buffer) for index, buffer in enumerate(allocated)},
    )


def _bytes(buffer: Any) -> int:
    kind = buffer.ty
    return prod(int(e) for e in kind.shape) * int(np.dtype(str(kind.dtype)).itemsize)


def _launch(call: Any, place: Any) -> Launch:
    name, *arguments = call.args
    tags = [str(tag) for tag in call.attrs.launch_params]
    extents = dict(zip(tags, map(int, arguments[len(arguments) - len(tags) :]), strict=True))
    if unknown := [tag for tag in tags if tag[:-1] not in ("blockIdx.", "threadIdx.")]:
        raise ArtifactError(f"{name.value} is launched with {', '.join(unknown)}")

    def three(kind: str) -> tuple[int, int, int]:
        x, y, z = (extents.get(f"{kind}.{axis}", 1) for axis in "xyz")
        return x, y, z

    grid = three("blockIdx")
    if grid[0] > MOST_BLOCKS or max(grid[1:]) > MOST_BLOCKS_ASIDE:
        raise ArtifactError(f"{name.value} wants {grid} blocks: compile with a smaller --batch")
    pointers: Sequence[Any] = arguments[: len(arguments) - len(tags)]
    return Launch(
        str(name.value), grid, three("threadIdx"), tuple(place(pointer) for pointer in pointers)
    )
