"""Regions of float operators against ONNX Runtime, operator by operator and model by model."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from mpqc import onnx_to_tir
from mpqc.graph import Graph, Node, TensorType
from mpqc.importer import load
from tests.region_runner import TARGET, run_region

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"
RNG = np.random.default_rng(7)


def f32(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> Any:
    return RNG.uniform(0.1, 0.9, shape).astype(np.float32)


def i64(*values: int) -> Any:
    return np.array(values, np.int64)


X4 = (2, 6, 9, 10)
UNARY = [
    "Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "LogSoftmax", "Mish", "Neg", "Relu", "Round", "Selu", "Sigmoid",
    "Sign", "Sin", "Softmax", "Softplus", "Softsign", "Tanh", "GlobalAveragePool",
    "GlobalMaxPool", "Flatten",
]  # fmt: skip
REDUCE = ["ReduceMax", "ReduceMin", "ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2",
          "ReduceProd", "ReduceSumSquare", "ReduceLogSumExp"]  # fmt: skip
# name: (op, fed inputs, constant inputs by position, attributes, number of outputs)
CASES: dict[str, tuple[str, list[Any], dict[int, Any], dict[str, Any], int]] = {
    **{op.lower(): (op, [f32(*X4)], {}, {}, 1) for op in UNARY},
    **{f"{op.lower()}_last": (op, [positive(2, 5, 7)], {1: i64(-1)}, {}, 1) for op in REDUCE},
    **{
        f"{op.lower()}_mid": (op, [positive(*X4)], {1: i64(1, 2)}, {"keepdims": 0}, 1)
        for op in REDUCE
    },
    **{op.lower(): (op, [f32(2, 3, 4), f32(3, 1)], {}, {}, 1) for op in
       ["Add", "Sub", "Mul", "Div", "Max", "Min", "Less", "Greater", "Equal", "PRelu"]},
    "gelu_tanh": ("Gelu", [f32(4, 9)], {}, {"approximate": "tanh"}, 1),
    "log": ("Log", [positive(3, 5)], {}, {}, 1),
    "sqrt": ("Sqrt", [positive(3, 5)], {}, {}, 1),
    "reciprocal": ("Reciprocal", [positive(3, 5)], {}, {}, 1),
    "pow": ("Pow", [positive(3, 5), positive(3, 5)], {}, {}, 1),
    "pow2": ("Pow", [f32(3, 5)], {1: np.float32(2)}, {}, 1),
    "and": ("And", [f32(3, 4) > 0, f32(3, 4) > 0], {}, {}, 1),
    "not": ("Not", [f32(3, 4) > 0], {}, {}, 1),
    "clip": ("Clip", [f32(3, 4)], {1: np.float32(-0.5), 2: np.float32(0.5)}, {}, 1),
    "where": ("Where", [f32(3, 4) > 0, f32(3, 4), f32(4)], {}, {}, 1),
    "cast_int": ("Cast", [3 * f32(3, 4)], {}, {"to": onnx.TensorProto.INT32}, 1),
    "cast_float": ("Cast", [np.arange(6, dtype=np.int64)], {}, {"to": onnx.TensorProto.FLOAT}, 1),
    "softmax_axis1": ("Softmax", [f32(*X4)], {}, {"axis": 1}, 1),
    "conv": ("Conv", [f32(2, 6, 13, 11)], {1: f32(20, 6, 3, 3), 2: f32(20)}, {"pads": [1] * 4}, 1),
    "conv_1x1": ("Conv", [f32(1, 8, 7, 7)], {1: f32(16, 8, 1, 1)}, {}, 1),
    "conv_stride": ("Conv", [f32(1, 3, 21, 17)], {1: f32(16, 3, 7, 7)},
                    {"pads": [3] * 4, "strides": [2, 2]}, 1),
    "conv_odd_pads": ("Conv", [f32(1, 3, 9, 9)], {1: f32(5, 3, 3, 2)}, {"pads": [0, 1, 2, 0]}, 1),
    "conv_dilated": ("Conv", [f32(1, 3, 12, 12)], {1: f32(5, 3, 3, 3)}, {"dilations": [2, 3]}, 1),
    "conv_grouped": ("Conv", [f32(1, 8, 9, 9)], {1: f32(12, 2, 3, 3)}, {"group": 4}, 1),
    "conv_depthwise": ("Conv", [f32(1, 8, 9, 9)], {1: f32(8, 1, 3, 3), 2: f32(8)},
                       {"group": 8, "pads": [1] * 4, "strides": [2, 2]}, 1),
    "conv_multiplier": ("Conv", [f32(1, 4, 9, 9)], {1: f32(8, 1, 3, 3)}, {"group": 4}, 1),
    "conv_same": ("Conv", [f32(1, 4, 10, 9)], {1: f32(4, 4, 3, 3)},
                  {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, 1),
    "conv_1d": ("Conv", [f32(2, 4, 30)], {1: f32(6, 4, 5), 2: f32(6)}, {"pads": [2, 2]}, 1),
    "conv_3d": ("Conv", [f32(1, 2, 5, 6, 7)], {1: f32(3, 2, 3, 3, 3)}, {}, 1),
    "conv_dynamic": ("Conv", [f32(1, 3, 8, 8), f32(4, 3, 3, 3)], {}, {"pads": [1] * 4}, 1),
    "conv_transpose": ("ConvTranspose", [f32(1, 4, 6, 5)], {1: f32(4, 3, 3, 3)},
                       {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]}, 1),
    "max_pool": ("MaxPool", [f32(*X4)], {}, {"kernel_shape": [3, 3], "strides": [2, 2],
                                            "pads": [1] * 4}, 1),
    "max_pool_ceil": ("MaxPool", [f32(1, 3, 10, 10)], {},
                      {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, 1),
    "average_pool": ("AveragePool", [f32(*X4)], {}, {"kernel_shape": [3, 2]}, 1),
    "average_pool_pads": ("AveragePool", [f32(*X4)], {},
                          {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2]}, 1),
    "average_pool_include": ("AveragePool", [f32(*X4)], {}, {
        "kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}, 1),
    "average_pool_1d": ("AveragePool", [f32(1, 3, 20)], {}, {"kernel_shape": [4]}, 1),
    "mean_spatial": ("ReduceMean", [f32(1, 5, 11, 13)], {1: i64(2, 3)}, {"keepdims": 0}, 1),
    "gather": ("Gather", [f32(5, 6)], {1: i64(3, 0, -1)}, {"axis": 1}, 1),
    "gather_dynamic": ("Gather", [f32(5, 6), i64(3, 0, 1)], {}, {}, 1),
    "gather_elements": ("GatherElements", [f32(3, 3), np.zeros((1, 3), np.int64)], {}, {}, 1),
    "gather_nd": ("GatherND", [f32(4, 5)], {1: np.array([[0, 1], [3, 2]])}, {}, 1),
    "slice": ("Slice", [f32(*X4)], {1: i64(1, 2), 2: i64(8, 9), 3: i64(2, 3), 4: i64(2, 1)}, {}, 1),
    "slice_back": ("Slice", [f32(4, 9)], {1: i64(-1), 2: i64(-100), 3: i64(1), 4: i64(-2)}, {}, 1),
    "pad": ("Pad", [f32(3, 4)], {1: i64(1, 0, 2, 3), 2: np.float32(1.5)}, {}, 1),
    "pad_reflect": ("Pad", [f32(3, 4)], {1: i64(1, 1, 2, 0)}, {"mode": "reflect"}, 1),
    "concat": ("Concat", [f32(2, 3), f32(2, 5), f32(2, 1)], {}, {"axis": 1}, 1),
    "split": ("Split", [f32(2, 9)], {1: i64(2, 3, 4)}, {"axis": 1}, 3),
    "resize_nearest": ("Resize", [f32(1, 3, 5, 6)], {2: np.array([1, 1, 2, 2], np.float32)}, {
        "mode": "nearest", "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor"}, 1),
    "resize_linear": ("Resize", [f32(1, 3, 5, 6)], {3: i64(1, 3, 10, 9)},
                      {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}, 1),
    "resize_corners": ("Resize", [f32(1, 3, 5, 6)], {3: i64(1, 3, 10, 9)},
                       {"mode": "linear", "coordinate_transformation_mode": "align_corners"}, 1),
    "transpose": ("Transpose", [f32(*X4)], {}, {"perm": [0, 2, 3, 1]}, 1),
    "layer_norm": ("LayerNormalization", [f32(2, 7, 12)], {1: f32(12), 2: f32(12)}, {}, 1),
    "instance_norm": ("InstanceNormalization", [f32(*X4)], {1: f32(6), 2: f32(6)}, {}, 1),
    "batch_norm": ("BatchNormalization", [f32(*X4)],
                   {1: f32(6), 2: f32(6), 3: f32(6), 4: positive(6)}, {}, 1),
    "lrn": ("LRN", [f32(1, 8, 5, 5)], {}, {"size": 5}, 1),
    "matmul": ("MatMul", [f32(3, 13, 8), f32(3, 8, 5)], {}, {}, 1),
    "matmul_constant": ("MatMul", [f32(3, 13, 8)], {1: f32(8, 21)}, {}, 1),
    "matmul_vector": ("MatMul", [f32(8)], {1: f32(8, 5)}, {}, 1),
    "gemm": ("Gemm", [f32(1, 20)], {1: f32(40, 20), 2: f32(40)},
             {"transB": 1, "alpha": 0.5, "beta": 2.0}, 1),
    "gemm_plain": ("Gemm", [f32(17, 20)], {1: f32(20, 33)}, {}, 1),
    "gemm_dynamic": ("Gemm", [f32(6, 4), f32(6, 5), f32(4, 5)], {}, {"transA": 1}, 1),
    "einsum": ("Einsum", [f32(2, 3, 4), f32(2, 4, 5)], {}, {"equation": "bij,bjk->bik"}, 1),
    "reshape": ("Reshape", [f32(2, 6)], {1: i64(3, -1)}, {}, 1),
    "squeeze": ("Squeeze", [f32(2, 1, 6)], {1: i64(1)}, {}, 1),
    "unsqueeze": ("Unsqueeze", [f32(2, 6)], {1: i64(0, 2)}, {}, 1),
    "expand": ("Expand", [f32(1, 6)], {1: i64(4, 6)}, {}, 1),
    "tile": ("Tile", [f32(2, 3)], {1: i64(2, 3)}, {}, 1),
    "argmax": ("ArgMax", [f32(3, 9)], {}, {"axis": 1}, 1),
    "one_hot": ("OneHot", [i64(1, 0, 3)], {1: i64(5), 2: np.array([0, 1], np.float32)}, {}, 1),
    "depth_to_space": ("DepthToSpace", [f32(1, 8, 3, 4)], {}, {"blocksize": 2, "mode": "CRD"}, 1),
    "space_to_depth": ("SpaceToDepth", [f32(1, 2, 4, 6)], {}, {"blocksize": 2}, 1),
    "trilu": ("Trilu", [f32(4, 5)], {}, {"upper": 0}, 1),
    "cumsum": ("CumSum", [f32(3, 5)], {1: np.array(1, np.int64)}, {}, 1),
    "scatter_elements": ("ScatterElements", [f32(3, 3), np.array([[1, 0, 2]]), f32(1, 3)], {},
                         {}, 1),
    "sum": ("Sum", [f32(3, 4), f32(4), f32(3, 1)], {}, {}, 1),
}  # fmt: skip


def single_node(case: tuple[str, list[Any], dict[int, Any], dict[str, Any], int]) -> Any:
    op, fed, constants, attrs, count = case
    feeds = {f"x{i}": array for i, array in enumerate(fed)}
    places: dict[int, str] = {i: f"c{i}" for i in constants}
    free = (i for i in range(99) if i not in places)
    places.update({next(free): name for name in feeds})
    names = [places.get(i, "") for i in range(max(places) + 1)]
    outputs = [f"y{i}" for i in range(count)]
    node = helper.make_node(op, names, outputs, **attrs)
    model = helper.make_model(
        helper.make_graph(
            [node],
            op,
            [
                helper.make_tensor_value_info(
                    n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape
                )
                for n, a in feeds.items()
            ],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [numpy_helper.from_array(np.asarray(a), f"c{i}") for i, a in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    return onnx.shape_inference.infer_shapes(model, data_prop=True), feeds


def ort(model: bytes, feeds: dict[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return list(onnxruntime.InferenceSession(model, options).run(None, feeds))


@pytest.mark.parametrize("name", CASES)
def test_operator_equals_onnx_runtime(name: str, tmp_path: Path) -> None:
    model, feeds = single_node(CASES[name])
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    graph = load(str(path))
    region = onnx_to_tir.convert_region(list(graph), graph, TARGET)
    got = run_region(region, graph, feeds)
    for value, expected in zip(graph.outputs, ort(model.SerializeToString(), feeds), strict=True):
        assert got[value].dtype == expected.dtype
        np.testing.assert_allclose(got[value], expected, rtol=1e-5, atol=1e-5)
