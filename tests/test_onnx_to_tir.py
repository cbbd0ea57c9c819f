"""Regions of float operators against ONNX Runtime, operator by operator and model by model."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from scipy import special

from mpqc import onnx_to_tir, pooling
from mpqc.graph import Graph, Node, TensorType
from mpqc.importer import load
from mpqc.numerics import tree_mean
from mpqc.schedules import float_cpu
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
    "top_k": ("TopK", [f32(3, 40)], {1: i64(7)}, {"axis": 1}, 2),
    "top_k_ties": ("TopK", [np.array([2, 1, 2, 3, 2, 1], np.float32)], {1: i64(5)}, {}, 2),
    "top_k_smallest": ("TopK", [f32(9, 3)], {1: i64(4)}, {"axis": 0, "largest": 0}, 2),
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
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
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


def model_graph(name: str, dims: dict[str, int]) -> tuple[Graph, bytes]:
    path = MODELS / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"needs the trained model {path.name}, which is not part of the repository")
    return load(str(path), dims), path.read_bytes()


@pytest.mark.parametrize(
    ("name", "dims", "scheduled"),
    [
        ("mnist_cnn", {}, False),
        ("mnist_cnn", {}, True),
        ("cifar10_resnet8", {}, True),
        ("ad01_autoencoder", {}, True),
        ("magika_standard_v3_3", {}, True),
        ("ppocr_v2_angle_cls", {"x:2": 48, "x:3": 192}, True),
        ("ultraface_rfb320", {}, True),
    ],
)
def test_whole_model_equals_onnx_runtime(name: str, dims: dict[str, int], scheduled: bool) -> None:
    graph, model = model_graph(name, dims)
    assert onnx_to_tir.unsupported(list(graph), graph) == []
    region = onnx_to_tir.convert_region(list(graph), graph, TARGET)
    feeds = {
        value: f32(*kind.shape)
        if kind.dtype == "float32"
        else RNG.integers(0, 200, kind.shape).astype(kind.dtype)
        for value, kind in graph.inputs.items()
    }
    schedule = (lambda func: float_cpu.apply(func, 256, 2)) if scheduled else (lambda func: func)
    got = run_region(region, graph, feeds, schedule)
    for value, expected in zip(graph.outputs, ort(model, feeds), strict=True):
        scale = float(np.abs(expected).max()) or 1.0
        np.testing.assert_allclose(got[value] / scale, expected / scale, atol=1e-5)


def nchw_to_nhwc(text: str) -> tuple[Graph, Graph]:
    """The graph of one node, and the same with channels-last data."""
    plain = Graph.parse(text)
    node = next(iter(plain))
    last = {
        value: TensorType(k.dtype, (k.shape[0], *k.shape[2:], k.shape[1]))
        for value, k in plain.types.items()
        if value not in plain.constants
    }
    moved = Node(node.name, node.op, node.inputs, node.outputs, {**node.attrs, "layout": "NHWC"})
    inputs = {value: last[value] for value in plain.inputs}
    return plain, Graph(inputs, plain.outputs, [moved], plain.constants, last, plain.opset)


CHANNELS_LAST = {
    "conv": "%y = Conv(%x, %w, %b) {kernel_shape=[3,3], pads=[1,1,1,1]} : f32[2,20,13,11]",
    "conv_stride": "%y = Conv(%x, %w, %b) {kernel_shape=[3,3], strides=[2,2]} : f32[2,20,6,5]",
    "max_pool": "%y = MaxPool(%x) {kernel_shape=[3,3], pads=[1,1,1,1]} : f32[2,6,13,11]",
    "average_pool": "%y = AveragePool(%x) {kernel_shape=[3,3], pads=[1,1,1,1]} : f32[2,6,13,11]",
    "global_average": "%y = GlobalAveragePool(%x) : f32[2,6,1,1]",
    "global_max": "%y = GlobalMaxPool(%x) : f32[2,6,1,1]",
}


@pytest.mark.parametrize("name", CHANNELS_LAST)
def test_channels_last_equals_channels_first(name: str) -> None:
    plain, last = nchw_to_nhwc(
        "%x = Input() : f32[2,6,13,11]\n"
        "%w = Constant() : f32[20,6,3,3]\n%b = Constant() : f32[20]\n"
        f"{CHANNELS_LAST[name]}\nreturn %y"
    )
    x = f32(2, 6, 13, 11)
    first = onnx_to_tir.convert_region(list(plain), plain, TARGET)
    moved = onnx_to_tir.convert_region(list(last), last, TARGET)
    expected = run_region(first, plain, {"x": x})["y"]
    got = run_region(moved, last, {"x": np.ascontiguousarray(np.moveaxis(x, 1, -1))})["y"]
    np.testing.assert_array_equal(np.moveaxis(got, -1, 1), expected)


@pytest.mark.parametrize("spatial", [(1, 1), (7, 7), (3, 5), (16, 16), (13, 9)])
def test_global_average_has_the_order_of_the_reference(spatial: tuple[int, int]) -> None:
    height, width = spatial
    graph = Graph.parse(
        f"%x = Input() : f32[2,5,{height},{width}]\n"
        "%y = GlobalAveragePool(%x) : f32[2,5,1,1]\nreturn %y"
    )
    x = f32(2, 5, height, width)
    region = onnx_to_tir.convert_region(list(graph), graph, TARGET)
    got = run_region(region, graph, {"x": x}, lambda func: float_cpu.apply(func, 256, 2))["y"]
    np.testing.assert_array_equal(got[..., 0, 0], tree_mean(x.reshape(2, 5, -1)))


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("average_pool")])
def test_average_pool_has_the_order_of_the_reference(name: str, tmp_path: Path) -> None:
    model, feeds = single_node(CASES[name])
    onnx.save(model, tmp_path / "model.onnx")
    graph = load(str(tmp_path / "model.onnx"))
    node = next(iter(graph))
    found = pooling.windows(graph, node)
    assert found is not None
    expected = pooling.mean(feeds["x0"], found, graph.shape(node.output))
    region = onnx_to_tir.convert_region(list(graph), graph, TARGET)
    got = run_region(region, graph, feeds, lambda func: float_cpu.apply(func, 256, 2))
    np.testing.assert_array_equal(got[node.output], expected)


def test_boundary_values_keep_their_names_and_reshapes_cost_nothing() -> None:
    graph = Graph.parse("""
        %x = Input() : f32[2,6]
        %shape = Constant() {value=[3, 4]} : i64[2]
        %w = Constant() : f32[3,4]
        %q = Relu(%x) : f32[2,6]
        %r = Reshape(%q, %shape) : f32[3,4]
        %s = Mul(%r, %w) : f32[3,4]
        %same = Identity(%s) : f32[3,4]
        %flat = Reshape(%x, %shape) : f32[3,4]
        return %s, %same, %flat
    """)
    region = onnx_to_tir.convert_region(list(graph), graph, TARGET)
    assert region.inputs == ("w", "x")
    assert set(region.outputs) == {"s", "same", "flat"}
    assert region.aliases == {"same": "s", "flat": "x"}
    assert region.calls[0].inputs == ("x",)
    assert region.calls[-1].outputs == ("s",)
    assert region.calls[-1].inputs[1] == "w"
    assert len(region.calls) == 2
    assert region.constants == {}


def test_elementwise_chains_fuse_and_equal_kernels_are_shared() -> None:
    graph = Graph.parse("""
        %x = Input() : f32[4,8]
        %w = Constant() : f32[8,8]
        %a = MatMul(%x, %w) : f32[4,8]
        %b = Relu(%a) : f32[4,8]
        %c = MatMul(%b, %w) : f32[4,8]
        %y = Relu(%c) : f32[4,8]
        return %y
    """)
    region = onnx_to_tir.convert_region(list(graph), graph, TARGET)
    assert len(region.calls) == 2
    assert len(region.kernels) == 1
    assert all(not f.attrs or "global_symbol" not in f.attrs for f in region.kernels.values())


def test_values_used_outside_the_region_are_outputs() -> None:
    graph = Graph.parse("""
        %x = Input() : f32[4]
        %a = Relu(%x) : f32[4]
        %b = Exp(%a) : f32[4]
        %c = Add(%a, %b) : f32[4]
        return %c
    """)
    region = onnx_to_tir.convert_region([graph["a"], graph["b"]], graph, TARGET)
    assert set(region.outputs) == {"a", "b"}
    assert region.inputs == ("x",)


def test_what_cannot_be_converted_is_listed_at_once_with_names() -> None:
    graph = Graph.parse("""
        %x = Input() : f32[4,9]
        %v, %i, %z = DynamicQuantizeLinear(%x) : u8[4,9], f32[], u8[] @dynamic
        %s = my.domain::Swish(%x) : f32[4,9] @swish
        %a = ArgMax(%x) {axis=0, keepdims=0, select_last_index=0} : i64[9] @arg
        return %s, %v, %i, %z, %a
    """)
    refused = onnx_to_tir.unsupported(list(graph), graph)
    assert [node.name for node, _ in refused] == ["dynamic", "swish"]
    assert "runtime" in refused[0][1]
    assert "my.domain::Swish" in refused[1][1]
    with pytest.raises(onnx_to_tir.PackedCallNeeded, match="dynamic"):
        onnx_to_tir.convert_region([graph["dynamic"]], graph, TARGET)
    assert onnx_to_tir.supported("Conv")
    assert not onnx_to_tir.supported("Conv", "com.example")


def test_a_conversion_that_disagrees_with_the_graph_names_the_node() -> None:
    graph = Graph.parse("""
        %x = Input() : f32[4,9]
        %y = Transpose(%x) {perm=[1, 0]} : f32[9,5] @turn
        return %y
    """)
    with pytest.raises(onnx_to_tir.RegionError, match="turn"):
        onnx_to_tir.convert_region(list(graph), graph, TARGET)


@pytest.mark.parametrize("name", ["exp", "tanh", "sigmoid", "erf"])
def test_polynomials_are_as_exact_as_float32_allows(name: str) -> None:
    exact = {"exp": np.exp, "tanh": np.tanh, "sigmoid": special.expit, "erf": special.erf}[name]
    x = np.concatenate([np.linspace(-90, 88, 20_001), np.linspace(-5, 5, 20_001)])
    x = np.append(x, [0.0, 1e-30, np.inf, -np.inf, np.nan]).astype(np.float32)
    op = name.capitalize()
    graph = Graph.parse(f"%x = Input() : f32[{x.size}]\n%y = {op}(%x) : f32[{x.size}]\nreturn %y")
    region = onnx_to_tir.convert_region(list(graph), graph, TARGET)
    got = run_region(region, graph, {"x": x})["y"]
    with np.errstate(over="ignore"):
        expected = exact(x.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-37)
