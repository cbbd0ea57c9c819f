"""Time of float operators, scheduled by mpqc, against ONNX Runtime on one thread.

    python benchmarks/float_ops.py [--vector-bits 512] [--only conv]

Both run alternately in rounds; the minima are compared. Convolutions and pools are channels last
in mpqc and channels first in ONNX Runtime, each its own best layout.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import tvm

from mpqc import onnx_export, onnx_to_tir
from mpqc.graph import Graph, Node, TensorType
from mpqc.schedules import float_cpu
from mpqc.target import llvm_target, native

ROUNDS, RUNS = 5, 5


def conv(channels: int, size: int, outs: int, kernel: int, stride: int, groups: int = 1) -> str:
    """A convolution with Relu as text."""
    pad = kernel // 2
    out = (size + 2 * pad - kernel) // stride + 1
    attrs = (
        f"kernel_shape=[{kernel},{kernel}], pads=[{pad},{pad},{pad},{pad}],"
        f" strides=[{stride},{stride}], group={groups}"
    )
    return f"""
        %x = Input() : f32[1,{channels},{size},{size}]
        %w = Constant() : f32[{outs},{channels // groups},{kernel},{kernel}]
        %b = Constant() : f32[{outs}]
        %c = Conv(%x, %w, %b) {{{attrs}}} : f32[1,{outs},{out},{out}]
        %y = Relu(%c) : f32[1,{outs},{out},{out}]
        return %y
    """


def unary(op: str, shape: str, attrs: str = "") -> str:
    """An operator of one operand as text."""
    return f"%x = Input() : {shape}\n%y = {op}(%x) {attrs} : {shape}\nreturn %y"


CASES = {
    "conv 3x3 64@56": conv(64, 56, 64, 3, 1),
    "conv 3x3 256@14": conv(256, 14, 256, 3, 1),
    "conv 3x3 512@7": conv(512, 7, 512, 3, 1),
    "conv 3x3 s2 128@56": conv(128, 56, 128, 3, 2),
    "conv 1x1 64-128@56": conv(64, 56, 128, 1, 1),
    "conv 1x1 256-64@28": conv(256, 28, 64, 1, 1),
    "conv 7x7 s2 stem": conv(3, 224, 64, 7, 2),
    "conv grouped 32x8@28": conv(256, 28, 256, 3, 1, 32),
    "depthwise 3x3 96@56": conv(96, 56, 96, 3, 1, 96),
    "depthwise 3x3 s2 144@56": conv(144, 56, 144, 3, 2, 144),
    "max pool 3x3 s2": """
        %x = Input() : f32[1,64,112,112]
        %y = MaxPool(%x) {kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]} : f32[1,64,56,56]
        return %y
    """,
    "average pool 3x3": """
        %x = Input() : f32[1,64,56,56]
        %y = AveragePool(%x) {kernel_shape=[3,3], pads=[1,1,1,1]} : f32[1,64,56,56]
        return %y
    """,
    "global average": """
        %x = Input() : f32[1,512,7,7]
        %y = GlobalAveragePool(%x) : f32[1,512,1,1]
        return %y
    """,
    "dense 1x2048x1000": """
        %x = Input() : f32[1,2048]
        %w = Constant() : f32[2048,1000]
        %b = Constant() : f32[1000]
        %y = Gemm(%x, %w, %b) : f32[1,1000]
        return %y
    """,
    "matmul 128x768x768": """
        %x = Input() : f32[1,128,768]
        %w = Constant() : f32[768,768]
        %y = MatMul(%x, %w) : f32[1,128,768]
        return %y
    """,
    "attention q.k": """
        %x = Input() : f32[1,12,128,64]
        %z = Input() : f32[1,12,64,128]
        %y = MatMul(%x, %z) : f32[1,12,128,128]
        return %y
    """,
    "softmax 12x128x128": unary("Softmax", "f32[1,12,128,128]"),
    "layer norm 128x768": """
        %x = Input() : f32[1,128,768]
        %g = Constant() : f32[768]
        %b = Constant() : f32[768]
        %y = LayerNormalization(%x, %g, %b) : f32[1,128,768]
        return %y
    """,
    "add": """
        %x = Input() : f32[1,64,112,112]
        %z = Input() : f32[1,64,112,112]
        %y = Add(%x, %z) : f32[1,64,112,112]
        return %y
    """,
    "relu odd": unary("Relu", "f32[1,63,111,113]"),
    "sigmoid": unary("Sigmoid", "f32[1,64,112,112]"),
    "gelu": unary("Gelu", "f32[1,128,3072]"),
    "hard swish": unary("HardSwish", "f32[1,64,112,112]"),
    "transpose": """
        %x = Input() : f32[1,64,112,112]
        %y = Transpose(%x) {perm=[0,2,3,1]} : f32[1,112,112,64]
        return %y
    """,
    "concat": """
        %x = Input() : f32[1,64,56,56]
        %z = Input() : f32[1,64,56,56]
        %y = Concat(%x, %z) {axis=1} : f32[1,128,56,56]
        return %y
    """,
    "reduce mean last": """
        %x = Input() : f32[1,512,768]
        %a = Constant() {value=[-1]} : i64[1]
        %y = ReduceMean(%x, %a) : f32[1,512,1]
        return %y
    """,
}  # fmt: skip


def channels_last(graph: Graph) -> Graph:
    """The same graph with the data of convolutions and pools as [N, H, W, C]."""
    if next(iter(graph)).op not in ("Conv", "MaxPool", "AveragePool", "GlobalAveragePool"):
        return graph

    def move(kind: TensorType) -> TensorType:
        return TensorType(kind.dtype, (kind.shape[0], *kind.shape[2:], kind.shape[1]))

    nodes = [
        node if node.op == "Relu" else
        Node(node.name, node.op, node.inputs, node.outputs, {**node.attrs, "layout": "NHWC"})
        for node in graph
    ]  # fmt: skip
    types = {v: move(k) for v, k in graph.types.items() if v not in graph.constants}
    inputs = {v: types[v] for v in graph.inputs}
    return Graph(inputs, graph.outputs, nodes, graph.constants, types, graph.opset)


def ours(graph: Graph, feeds: dict[str, Any], bits: int) -> tuple[Callable[[], None], Any, float]:
    """A function that runs the region, its result tensor, seconds of compilation."""
    target = llvm_target(native())
    start = time.perf_counter()
    region = onnx_to_tir.convert_region(list(graph), graph, target, vector_bits=bits)
    kernels = {
        name: float_cpu.apply(func, bits, 1).with_attr("global_symbol", name)
        for name, func in region.kernels.items()
    }
    library = tvm.compile(tvm.IRModule(kernels), target=target)
    seconds = time.perf_counter() - start
    values = {**graph.constants, **region.constants, **feeds}
    tensors: dict[str, Any] = {}
    calls = []
    for call in region.calls:
        operands = []
        names = (*call.inputs, *call.outputs)
        for name, param in zip(names, region.kernels[call.kernel].params, strict=True):
            shape = tuple(int(d) for d in param.ty.shape)
            if name not in tensors:
                value = values.get(name, np.zeros(shape, str(param.ty.dtype)))
                tensors[name] = tvm.runtime.tensor(np.ascontiguousarray(value))
            operands.append(tensors[name]._create_view(shape))
        calls.append((library[call.kernel], operands))

    def run() -> None:
        for function, operands in calls:
            function(*operands)

    return run, tensors[region.aliases.get(graph.outputs[0], graph.outputs[0])], seconds


def theirs(graph: Graph, feeds: dict[str, Any]) -> tuple[Callable[[], Any], Any]:
    """A function that runs ONNX Runtime, and its result."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx_export.to_onnx(graph), options)
    return lambda: session.run(None, feeds), session.run(None, feeds)[0]


def fastest(run: Callable[[], Any]) -> float:
    """Least time of a few runs [s]."""
    best = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """Print one line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vector-bits", type=int, default=native().vector_bits)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    print(f"{'operator':26} {'mpqc':>9} {'ORT':>9} {'ratio':>6} {'compile':>8}")
    rng = np.random.default_rng(0)
    for name, text in CASES.items():
        if options.only not in name:
            continue
        graph = Graph.parse(text)
        moved = channels_last(graph)
        feeds = {
            v: rng.standard_normal(k.shape).astype(np.float32) for v, k in graph.inputs.items()
        }
        last = {
            v: np.ascontiguousarray(np.moveaxis(x, 1, -1)) if moved is not graph else x
            for v, x in feeds.items()
        }
        mine, result, seconds = ours(moved, last, options.vector_bits)
        other, expected = theirs(graph, feeds)
        mine()
        got = result.numpy()
        got = np.moveaxis(got, -1, 1) if moved is not graph and got.ndim == 4 else got
        np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=1e-3, atol=1e-3)
        ours_best = theirs_best = float("inf")
        for _ in range(ROUNDS):
            ours_best = min(ours_best, fastest(mine))
            theirs_best = min(theirs_best, fastest(other))
        ratio = ours_best / theirs_best
        print(
            f"{name:26} {ours_best * 1e3:7.3f}ms {theirs_best * 1e3:7.3f}ms {ratio:6.2f}"
            f" {seconds:7.2f}s"
        )


if __name__ == "__main__":
    main()
