"""Float operators with the default CUDA schedules, on the emulated GPU."""

import ctypes
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mpqc import onnx_to_tir
from mpqc.cuda.codegen import DeviceCode, generate
from mpqc.graph import Array, Graph
from mpqc.importer import load
from mpqc.onnx_to_tir import Region
from mpqc.schedules import cuda_float
from tests.cuda.emulation import Emulator
from tests.test_onnx_to_tir import CASES, ort, single_node

TARGET = {"kind": "llvm", "mcpu": "x86-64", "num-cores": 1}
# Each rule of the schedule: inlined chains, sums, several stages, results read twice, plain loops.
SOME = ("softmax", "layer_norm", "conv", "max_pool", "average_pool", "topk", "scatter", "cumsum",
        "gather", "reducemean", "matmul", "resize", "gelu", "concat", "transpose")  # fmt: skip


def converted(name: str) -> tuple[Region, Graph, Mapping[str, Array], list[Array]]:
    model, feeds = single_node(CASES[name])
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        onnx.save(model, file.name)
        graph = load(file.name)
    region = onnx_to_tir.convert_region(list(graph), graph, TARGET, vector_bits=128)
    return region, graph, feeds, ort(model.SerializeToString(), feeds)


def launch(library: Any, code: DeviceCode, kernel: str, arrays: Sequence[Array]) -> None:
    """Run a PrimFunc's kernels as the runtime would."""
    function = code.functions[kernel]
    spaces = {
        name: np.full(size + 64, 0xA5, np.uint8) for name, size in function.workspaces.items()
    }
    for each in function.launches:
        pointers = [
            ctypes.c_void_p((arrays[x] if isinstance(x, int) else spaces[x]).ctypes.data)
            for x in each.arguments
        ]
        values = (ctypes.c_void_p * len(pointers))(*map(ctypes.addressof, pointers))
        grid, block = ((ctypes.c_uint * 3)(*extents) for extents in (each.grid, each.block))
        getattr(library, f"{each.kernel}__call")(grid, block, values)


def check(names: Sequence[str], emulator: Emulator, folder: Path) -> None:
    """All operators in one source: one compilation."""
    cases = {name: converted(name) for name in names}
    kernels = {
        f"{index}_{kernel}": cuda_float.apply(func)
        for index, (region, *_) in enumerate(cases.values())
        for kernel, func in region.kernels.items()
    }
    kernels = {f"k{name}": func for name, func in kernels.items()}
    code = generate(kernels, "sm_86")
    image = emulator.fat_binary(code.source, "sm_86", folder)
    library = ctypes.CDLL(image.partition(b":")[2].rstrip(b"\0").decode())
    for index, (name, (region, graph, feeds, expected)) in enumerate(cases.items()):
        buffers = {**graph.constants, **region.constants, **feeds}
        types = {**graph.types, **region.temps}
        for call in region.calls:
            for result in call.outputs:
                buffers[result] = np.full(types[result].shape, 77, types[result].dtype)
            arrays = [np.ascontiguousarray(buffers[x]) for x in (*call.inputs, *call.outputs)]
            launch(library, code, f"k{index}_{call.kernel}", arrays)
            buffers |= dict(zip(call.outputs, arrays[len(call.inputs) :], strict=True))
        for alias, source in region.aliases.items():
            buffers[alias] = buffers[source].reshape(types[alias].shape)
        for value, wanted in zip(graph.outputs, expected, strict=True):
            got = buffers[value].reshape(graph.shape(value))
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5, err_msg=name)


def test_operators_equal_onnx_runtime(emulator: Emulator, tmp_path: Path) -> None:
    names = [next(name for name in CASES if some in name.lower()) for some in SOME
             if any(some in name.lower() for name in CASES)]  # fmt: skip
    assert len(names) > 10
    check(names, emulator, tmp_path)


@pytest.mark.slow
def test_all_operators_equal_onnx_runtime(emulator: Emulator, tmp_path: Path) -> None:
    check(list(CASES), emulator, tmp_path)
