"""Every operator of the interpreter against ONNX Runtime."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.graph import Array, Graph
from mpqc.onnx_export import to_onnx
from mpqc.ort import Session
from mpqc.train.module import GraphModule
from mpqc.train.ops import OPS

X = "%x = Input() : f32[2,4,6,6]\n"
CASES = {
    **{
        op: X + f"%y = {op}(%x) : f32[2,4,6,6]\nreturn %y"
        for op in (
            "Abs", "Ceil", "Celu", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
            "HardSwish", "LeakyRelu", "Mish", "Neg", "Relu", "Round", "Selu", "Sigmoid", "Sign",
            "Sin", "Softplus", "Softsign", "Tanh",
        )
    },
    **{
        op: X + f"%a = Abs(%x) : f32[2,4,6,6]\n%y = {op}(%a) : f32[2,4,6,6]\nreturn %y"
        for op in ("Log", "Reciprocal", "Sqrt")
    },
    **{
        op: X + "%c = Constant() : f32[4,1,6]\n%y = " + f"{op}(%x, %c) : f32[2,4,6,6]\nreturn %y"
        for op in ("Add", "Div", "Max", "Mean", "Min", "Mul", "Sub", "Sum")
    },
    **{
        op: X + f"%y = {op}(%x) {{axes=[1, 3], keepdims=0}} : f32[2,6]\nreturn %y"
        for op in (
            "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
            "ReduceSumSquare",
        )
    },
    "ReduceSum": X + "%a = Constant() {value=[-1]} : i64[1]\n"
    "%y = ReduceSum(%x, %a) {keepdims=1} : f32[2,4,6,1]\nreturn %y",
    "ReduceMean of pictures": X + "%y = ReduceMean(%x) {axes=[2, 3], keepdims=0} : f32[2,4]\n"
    "return %y",
    "Pow": X + "%c = Constant() {value=[2.0]} : f32[1]\n"
    "%y = Pow(%x, %c) : f32[2,4,6,6]\nreturn %y",
    "Clip": X + "%l = Constant() {value=[-0.5]} : f32[]\n%h = Constant() {value=[0.7]} : f32[]\n"
    "%y = Clip(%x, %l, %h) : f32[2,4,6,6]\nreturn %y",
    "PRelu": X + "%s = Constant() : f32[4,1,1]\n%y = PRelu(%x, %s) : f32[2,4,6,6]\nreturn %y",
    "Conv": X + "%w = Constant() : f32[6,2,3,2]\n%b = Constant() : f32[6]\n"
    "%y = Conv(%x, %w, %b) {group=2, pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2]}"
    " : f32[2,6,4,5]\nreturn %y",
    "Conv of one axis": "%x = Input() : f32[2,4,9]\n%w = Constant() : f32[3,4,3]\n"
    '%y = Conv(%x, %w) {auto_pad="SAME_UPPER", strides=[2]} : f32[2,3,5]\nreturn %y',
    "ConvTranspose": X + "%w = Constant() : f32[4,3,3,3]\n%b = Constant() : f32[3]\n"
    "%y = ConvTranspose(%x, %w, %b) {strides=[2, 2], pads=[1, 0, 1, 1], "
    "output_padding=[1, 1]} : f32[2,3,12,13]\nreturn %y",
    "ConvTranspose of the same size": X + "%w = Constant() : f32[4,2,4,5]\n"
    '%y = ConvTranspose(%x, %w) {strides=[2, 2], group=2, auto_pad="SAME_UPPER"}'
    " : f32[2,4,12,12]\nreturn %y",
    "ConvTranspose to a size": X + "%w = Constant() : f32[4,2,4,5]\n"
    "%y = ConvTranspose(%x, %w) {strides=[2, 2], output_shape=[12, 13]}"
    " : f32[2,2,12,13]\nreturn %y",
    "Gemm": "%x = Input() : f32[4,3]\n%w = Constant() : f32[4,5]\n%b = Constant() : f32[1,5]\n"
    "%y = Gemm(%x, %w, %b) {transA=1, alpha=0.5, beta=2.0} : f32[3,5]\nreturn %y",
    "MatMul": X + "%w = Constant() : f32[6,3]\n%y = MatMul(%x, %w) : f32[2,4,6,3]\nreturn %y",
    "Einsum": X + "%w = Constant() : f32[4,3]\n"
    '%y = Einsum(%x, %w) {equation="bchw,cd->bdhw"} : f32[2,3,6,6]\nreturn %y',
    "BatchNormalization": X + "%g = Constant() : f32[4]\n%b = Constant() : f32[4]\n"
    "%m = Constant() : f32[4]\n%v = Constant() {value=[0.5, 1.0, 2.0, 0.1]} : f32[4]\n"
    "%y = BatchNormalization(%x, %g, %b, %m, %v) {epsilon=0.001} : f32[2,4,6,6]\nreturn %y",
    "LayerNormalization": X + "%g = Constant() : f32[6]\n%b = Constant() : f32[6]\n"
    "%y = LayerNormalization(%x, %g, %b) {axis=-1} : f32[2,4,6,6]\nreturn %y",
    "GroupNormalization": X + "%g = Constant() : f32[4]\n%b = Constant() : f32[4]\n"
    "%y = GroupNormalization(%x, %g, %b) {num_groups=2} : f32[2,4,6,6]\nreturn %y",
    "InstanceNormalization": X + "%g = Constant() : f32[4]\n%b = Constant() : f32[4]\n"
    "%y = InstanceNormalization(%x, %g, %b) : f32[2,4,6,6]\nreturn %y",
    "LRN": X + "%y = LRN(%x) {size=3, alpha=0.01} : f32[2,4,6,6]\nreturn %y",
    "MaxPool": X + "%y = MaxPool(%x) {kernel_shape=[3, 2], strides=[2, 2], ceil_mode=1, "
    "pads=[1, 0, 0, 0]} : f32[2,4,3,3]\nreturn %y",
    "AveragePool": X + "%y = AveragePool(%x) {kernel_shape=[3, 3], strides=[2, 2], "
    "pads=[1, 1, 1, 1]} : f32[2,4,3,3]\nreturn %y",
    "AveragePool with its padding": X + "%y = AveragePool(%x) {kernel_shape=[3, 3], "
    "strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1} : f32[2,4,3,3]\nreturn %y",
    "GlobalAveragePool": X + "%y = GlobalAveragePool(%x) : f32[2,4,1,1]\nreturn %y",
    "GlobalMaxPool": X + "%y = GlobalMaxPool(%x) : f32[2,4,1,1]\nreturn %y",
    "Reshape": X + "%s = Constant() {value=[2, -1, 3]} : i64[3]\n"
    "%y = Reshape(%x, %s) : f32[2,48,3]\nreturn %y",
    "Flatten": X + "%y = Flatten(%x) {axis=2} : f32[8,36]\nreturn %y",
    "Expand": "%x = Input() : f32[2,1,3]\n%s = Constant() {value=[2, 4, 3]} : i64[3]\n"
    "%y = Expand(%x, %s) : f32[2,4,3]\nreturn %y",
    "Squeeze": "%x = Input() : f32[2,1,3,1]\n%a = Constant() {value=[1, -1]} : i64[2]\n"
    "%y = Squeeze(%x, %a) : f32[2,3]\nreturn %y",
    "Unsqueeze": "%x = Input() : f32[2,3]\n%a = Constant() {value=[1, -1]} : i64[2]\n"
    "%y = Unsqueeze(%x, %a) : f32[2,1,3,1]\nreturn %y",
    "Transpose": X + "%y = Transpose(%x) {perm=[0, 2, 3, 1]} : f32[2,6,6,4]\nreturn %y",
    "Slice": X + "%s = Constant() {value=[0, 5]} : i64[2]\n"
    "%e = Constant() {value=[9223372036854775807, -9223372036854775808]} : i64[2]\n"
    "%a = Constant() {value=[2, -1]} : i64[2]\n%t = Constant() {value=[2, -2]} : i64[2]\n"
    "%y = Slice(%x, %s, %e, %a, %t) : f32[2,4,3,3]\nreturn %y",
    "Split": X + "%s = Constant() {value=[1, 3]} : i64[2]\n"
    "%y, %z = Split(%x, %s) {axis=1} : f32[2,1,6,6], f32[2,3,6,6]\nreturn %y, %z",
    "Pad": X + "%p = Constant() {value=[0, 1, 0, 2, 0, 0, 1, 0]} : i64[8]\n"
    "%c = Constant() {value=[1.5]} : f32[]\n%y = Pad(%x, %p, %c) : f32[2,5,7,8]\nreturn %y",
    "Pad by reflection": X + "%p = Constant() {value=[0, 0, 1, 2, 0, 0, 1, 0]} : i64[8]\n"
    '%y = Pad(%x, %p) {mode="reflect"} : f32[2,4,8,8]\nreturn %y',
    "Tile": X + "%r = Constant() {value=[1, 2, 1, 1]} : i64[4]\n"
    "%y = Tile(%x, %r) : f32[2,8,6,6]\nreturn %y",
    "Concat": X + "%c = Constant() : f32[2,1,6,6]\n"
    "%y = Concat(%x, %c) {axis=1} : f32[2,5,6,6]\nreturn %y",
    "Gather": X + "%i = Constant() {value=[3, -4, 0]} : i64[3]\n"
    "%y = Gather(%x, %i) {axis=1} : f32[2,3,6,6]\nreturn %y",
    "DepthToSpace": X + "%y = DepthToSpace(%x) {blocksize=2} : f32[2,1,12,12]\nreturn %y",
    "DepthToSpace CRD": X + '%y = DepthToSpace(%x) {blocksize=2, mode="CRD"} : f32[2,1,12,12]\n'
    "return %y",
    "SpaceToDepth": X + "%y = SpaceToDepth(%x) {blocksize=2} : f32[2,16,3,3]\nreturn %y",
    "Resize": X + "%s = Constant() {value=[1.0, 1.0, 1.5, 2.0]} : f32[4]\n"
    '%y = Resize(%x, _, %s) {mode="linear"} : f32[2,4,9,12]\nreturn %y',
    "Resize to corners": X + "%s = Constant() {value=[1.0, 1.0, 0.5, 2.0]} : f32[4]\n"
    '%y = Resize(%x, _, %s) {mode="linear", coordinate_transformation_mode="align_corners"}'
    " : f32[2,4,3,12]\nreturn %y",
    "Resize to the nearest": X + "%s = Constant() {value=[1.0, 1.0, 2.0, 1.5]} : f32[4]\n"
    '%y = Resize(%x, _, %s) {mode="nearest", coordinate_transformation_mode="asymmetric", '
    'nearest_mode="floor"} : f32[2,4,12,9]\nreturn %y',
    "Softmax": X + "%y = Softmax(%x) {axis=1} : f32[2,4,6,6]\nreturn %y",
    "LogSoftmax": X + "%y = LogSoftmax(%x) {axis=-1} : f32[2,4,6,6]\nreturn %y",
    "ArgMax": X + "%y = ArgMax(%x) {axis=1, keepdims=0} : i64[2,6,6]\nreturn %y",
    "ArgMin": X + "%y = ArgMin(%x) {axis=-1} : i64[2,4,6,1]\nreturn %y",
    "TopK": X + "%k = Constant() {value=[2]} : i64[1]\n"
    "%y, %i = TopK(%x, %k) {axis=-1} : f32[2,4,6,2], i64[2,4,6,2]\nreturn %y, %i",
    "Where": X + "%c = Constant() {value=[0.1]} : f32[1]\n"
    "%m = Greater(%x, %c) : bool[2,4,6,6]\n%n = Neg(%x) : f32[2,4,6,6]\n"
    "%y = Where(%m, %x, %n) : f32[2,4,6,6]\nreturn %y",
    "Cast": X + "%y = Cast(%x) {to=6} : i32[2,4,6,6]\nreturn %y",
    "comparisons": X + "%c = Constant() {value=[0.1]} : f32[1]\n"
    "%a = GreaterOrEqual(%x, %c) : bool[2,4,6,6]\n%b = LessOrEqual(%x, %c) : bool[2,4,6,6]\n"
    "%d = Less(%x, %c) : bool[2,4,6,6]\n%e = Equal(%x, %c) : bool[2,4,6,6]\n"
    "%g = And(%a, %b) : bool[2,4,6,6]\n%h = Or(%d, %e) : bool[2,4,6,6]\n"
    "%y = Not(%h) : bool[2,4,6,6]\nreturn %y, %g",
    "OneHot": "%x = Input() : f32[2,3]\n%i = ArgMax(%x) {axis=1, keepdims=0} : i64[2]\n"
    "%d = Constant() {value=[4]} : i64[1]\n%v = Constant() {value=[0.5, 2.0]} : f32[2]\n"
    "%y = OneHot(%i, %d, %v) {axis=-1} : f32[2,4]\nreturn %y",
    "Identity": X + "%y = Identity(%x) : f32[2,4,6,6]\nreturn %y",
}  # fmt: skip


def parsed(case: str) -> Graph:
    """Axes are attributes of reductions in older opsets."""
    graph = Graph.parse(CASES[case])
    if "{axes=" not in CASES[case]:
        return graph
    parts = (graph.inputs, graph.outputs, tuple(graph), graph.constants, graph.types)
    return Graph(*parts, opset=13)


def feeds(graph: Graph) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    return {
        name: rng.standard_normal(kind.shape).astype(kind.dtype)
        for name, kind in graph.inputs.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_computes_what_onnx_says(case: str) -> None:
    graph = parsed(case)
    given = feeds(graph)
    wanted = Session(to_onnx(graph)).run(given)
    module = GraphModule(graph).eval()
    got = module({name: torch.from_numpy(array) for name, array in given.items()})
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        found = got[name].detach().numpy()
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        np.testing.assert_allclose(found, array, rtol=2e-5, atol=2e-6)


def test_every_operator_of_the_table_has_a_case() -> None:
    seen = {node.op for text in CASES.values() for node in Graph.parse(text)}
    assert OPS.keys() - seen == set()
