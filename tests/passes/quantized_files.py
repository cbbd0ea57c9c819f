"""What the tests of the dialects' readers share: files in a few lines, and how they are run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

from mpqc import importer, pipeline, reference
from mpqc.graph import Graph
from mpqc.onnx_export import to_onnx
from mpqc.ort import Session
from mpqc.passes.read_quantizers import Reading, read_quantizers
from mpqc.runtime import CompiledModel
from mpqc.target import native

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

FLOAT = TensorProto.FLOAT


def typed(name: str, values: Any, kind: int) -> Any:
    """A tensor of any ONNX element type, those narrower than a byte among them."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    array = np.asarray(values)
    made = numpy_helper.from_array(np.ascontiguousarray(array).astype(dtype), name)
    made.dims[:] = array.shape
    return made


def floats(name: str, values: Any) -> Any:
    return typed(name, values, FLOAT)


def info(name: str, shape: Sequence[int | str], kind: int = FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def file(
    nodes: Sequence[Any],
    constants: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    opset: int = 13,
    domains: Mapping[str, int] | None = None,
) -> bytes:
    """An ONNX file that ONNX Runtime reads, where it knows the operators."""
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(constants))
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid(name, version) for name, version in (domains or {}).items()]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 13 if opset > 20 else 9
    return bytes(model.SerializeToString())


def load(content: bytes, folder: Path) -> Graph:
    path = folder / "model.onnx"
    path.write_bytes(content)
    return importer.load(path)


def read(content: bytes, folder: Path) -> Reading:
    return read_quantizers(load(content, folder))


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph]


def only(graph: Graph, op: str) -> Any:
    """The only node of that operator."""
    (node,) = (node for node in graph if node.op == op)
    return node


def weights_of(graph: Graph, node: Any) -> tuple[Array, Array]:
    """Integers and scale of a DequantizeWeights."""
    values, scale = (graph.constants[name] for name in node.inputs)
    return values, scale


def compute(graph: Graph, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """By the interpreter; the exported form in ONNX Runtime gives the same."""
    got = reference.run(graph, feeds)
    again = Session(to_onnx(graph)).run(feeds)
    for name, array in got.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_allclose(again[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
    return got


def compiled(path: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What the library computes that the whole compiler makes of a file."""
    with library(path) as model:
        return model.run(dict(feeds))


@contextmanager
def library(path: Path) -> Iterator[CompiledModel]:
    """The library that the whole compiler makes of a file, to run while the context lasts."""
    options = pipeline.Options(target=native(), latencies=None)
    with TemporaryDirectory() as folder:
        made = pipeline.compile_model(path, Path(folder) / "build", options)
        with CompiledModel(made.library) as model:
            yield model


def steps_apart(got: Array, want: Array, step: float) -> tuple[int, float]:
    """How many elements differ by more than half a step, and the largest difference in steps."""
    gap = np.abs(got.astype(np.float64) - want.astype(np.float64)) / step
    return int((gap > 0.5).sum()), float(gap.max(initial=0))
