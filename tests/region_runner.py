"""Runs a Region of float kernels on TVM tensors: the test's stand-in for a built library."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tvm

from mpqc.graph import Array, Graph
from mpqc.onnx_to_tir import Region

TARGET = {"kind": "llvm", "mcpu": "x86-64-v3", "num-cores": 2}


def run_region(
    region: Region,
    graph: Graph,
    feeds: Mapping[str, Array],
    schedule: Callable[[Any], Any] = lambda func: func,
    target: Mapping[str, Any] = TARGET,
) -> dict[str, Array]:
    """The region's outputs, by name, in the shapes of the graph."""
    buffers = {**graph.constants, **region.constants, **feeds}
    module = tvm.IRModule(
        {
            name: schedule(func).with_attr("global_symbol", name)
            for name, func in region.kernels.items()
        }
    )
    library = tvm.compile(module, target=tvm.target.Target(dict(target))) if region.kernels else {}
    types = {**graph.types, **region.temps}
    for call in region.calls:
        shapes = [
            tuple(int(d) for d in param.ty.shape) for param in region.kernels[call.kernel].params
        ]
        names = (*call.inputs, *call.outputs)
        for name in call.outputs:
            kind = types[name]
            buffers[name] = np.full(kind.shape, 77, kind.dtype)
        arrays = [
            tvm.runtime.tensor(np.ascontiguousarray(buffers[name]).reshape(shape))
            for name, shape in zip(names, shapes, strict=True)
        ]
        library[call.kernel](*arrays)
        for name, array in zip(call.outputs, arrays[len(call.inputs) :], strict=True):
            buffers[name] = array.numpy().reshape(types[name].shape)
    for name, source in region.aliases.items():
        buffers[name] = buffers[source].reshape(types[name].shape)
    return {name: buffers[name] for name in region.outputs}
