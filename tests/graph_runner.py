"""Text of a quantized graph -> program -> library -> results, beside the numpy oracle."""

import re
from pathlib import Path

import numpy as np

from mpqc import lowering, reference
from mpqc.build import build
from mpqc.graph import Array, Graph
from mpqc.passes.base import run
from mpqc.passes.channels_last import ChannelsLast
from mpqc.passes.drop_dead import DropDead
from mpqc.program import Program, plan_memory
from mpqc.runtime import CompiledModel
from mpqc.select_kernel import Selector
from mpqc.target import Target, native


def parse(text: str) -> Graph:
    """Read a graph; int16 constants are two-bit weights, ``*_m`` are small scales."""
    generator = np.random.default_rng(7)
    constants: dict[str, Array] = {}
    for name, kind, dims in re.findall(r"%(\S+) = Constant\(\) : (i16|f32)\[([\d,]*)\]", text):
        shape = tuple(int(extent) for extent in dims.split(","))
        if kind == "i16":
            constants[name] = generator.integers(-2, 2, shape).astype(np.int16)
            if "odd" in name:
                constants[name] = generator.choice([-3, -1, 1, 3], shape).astype(np.int16)
        elif name.endswith("_m"):
            constants[name] = generator.uniform(0.02, 0.1, shape).astype(np.float32)
    return Graph.parse(text, constants)


def lower(graph: Graph, target: Target | None = None, kernel: str = "auto") -> Program:
    target = target or native()
    last = run(graph, ChannelsLast(), DropDead())
    return lowering.lower(last, target, Selector(target, kernel))


def built(program: Program, folder: Path, target: Target | None = None) -> CompiledModel:
    library = folder / f"model{len(list(folder.iterdir()))}.so"
    build(program, plan_memory(program), target or native(), {"steps": []}, library)
    return CompiledModel(library)


def feeds(graph: Graph, seed: int = 0) -> dict[str, Array]:
    """Codes of two bits and normal floats."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.integers(0, 4, kind.shape).astype(np.uint8)
        if kind.dtype == "uint8"
        else generator.normal(size=kind.shape).astype(kind.dtype)
        for name, kind in graph.inputs.items()
    }


def check(graph: Graph, program: Program, folder: Path, target: Target | None = None) -> None:
    """What the library computes is what the graph means, twice in a row."""
    with built(program, folder, target) as model:
        for seed in range(2):
            fed = feeds(graph, seed)
            got, expected = model.run(fed), reference.run(graph, fed)
            assert list(got) == list(dict.fromkeys(graph.outputs))
            for name, array in expected.items():
                assert got[name].dtype == array.dtype
                np.testing.assert_array_equal(got[name], array, err_msg=name)
