"""Scheduled float kernels equal the unscheduled ones, element by element."""

from typing import Any

import numpy as np
import pytest
import tvm

from mpqc import onnx_to_tir
from mpqc.graph import Graph
from mpqc.numerics import tree_sum
from mpqc.schedules import float_cpu
from tests.region_runner import TARGET, run_region

CONV = (
    "%x = Input() : {x}\n%w = Constant() : {w}\n%b = Constant() : {b}\n"
    "%c = Conv(%x, %w, %b) {attrs} : {y}\n%y = Relu(%c) : {y}\nreturn %y"
)


def conv(x: str, w: str, y: str, attrs: str) -> str:
    channels = w.split("[")[1].split(",")[0]
    return CONV.format(x=x, w=w, y=y, b=f"f32[{channels}]", attrs="{" + attrs + "}")


NHWC = ', layout="NHWC"'
KERNELS = {
    "conv_3x3": conv("f32[1,9,9,8]", "f32[32,8,3,3]", "f32[1,9,9,32]", "pads=[1,1,1,1]" + NHWC),
    "conv_odd": conv("f32[1,5,17,3]", "f32[17,3,3,3]", "f32[1,5,17,17]", "pads=[1,1,1,1]" + NHWC),
    "conv_stride": conv(
        "f32[2,13,11,5]", "f32[10,5,3,3]", "f32[2,7,6,10]",
        "pads=[1,1,1,1], strides=[2,2]" + NHWC),
    "conv_1x1": conv("f32[1,7,7,24]", "f32[64,24,1,1]", "f32[1,7,7,64]", 'layout="NHWC"'),
    "conv_1x1_point": conv("f32[1,1,1,40]", "f32[130,40,1,1]", "f32[1,1,1,130]", 'layout="NHWC"'),
    "conv_grouped": conv("f32[1,8,8,16]", "f32[24,4,3,3]", "f32[1,6,6,24]", "group=4" + NHWC),
    "conv_dilated": conv("f32[1,9,9,4]", "f32[5,4,3,3]", "f32[1,5,5,5]", "dilations=[2,2]" + NHWC),
    "conv_first": conv("f32[1,8,9,9]", "f32[20,8,3,3]", "f32[1,20,9,9]", "pads=[1,1,1,1]"),
    "conv_1d": conv("f32[2,4,37]", "f32[6,4,5]", "f32[2,6,37]", "pads=[2,2]"),
    "depthwise": conv(
        "f32[1,9,9,24]", "f32[24,1,3,3]", "f32[1,9,9,24]", "group=24, pads=[1,1,1,1]" + NHWC),
    "depthwise_odd": conv(
        "f32[1,9,10,17]", "f32[17,1,5,5]", "f32[1,5,5,17]",
        "group=17, pads=[2,2,2,2], strides=[2,2]" + NHWC),
    "depthwise_first": conv(
        "f32[1,17,9,10]", "f32[17,1,3,3]", "f32[1,17,9,10]", "group=17, pads=[1,1,1,1]"),
    "rounded_sigmoid": """
        %x = Input() : f32[1,6,6,16]
        %r = Round(%x) : f32[1,6,6,16]
        %s = Sigmoid(%r) : f32[1,6,6,16]
        %t = Round(%s) : f32[1,6,6,16]
        %m = Mul(%r, %t) : f32[1,6,6,16]
        %y = Round(%m) : f32[1,6,6,16]
        return %y""",
    "residual": """
        %x = Input() : f32[1,6,6,16]
        %z = Input() : f32[1,6,6,32]
        %w = Constant() : f32[32,16,3,3]
        %c = Conv(%x, %w) {pads=[1,1,1,1], layout="NHWC"} : f32[1,6,6,32]
        %s = Add(%c, %z) : f32[1,6,6,32]
        %r = Relu(%s) : f32[1,6,6,32]
        %y = Sigmoid(%r) : f32[1,6,6,32]
        return %y
    """,
    "tap": """
        %x = Input() : f32[1,6,6,16]
        %w = Constant() : f32[32,16,3,3]
        %c = Conv(%x, %w) {pads=[1,1,1,1], layout="NHWC"} : f32[1,6,6,32]
        %y = Relu(%c) : f32[1,6,6,32]
        return %c, %y
    """,
    "conv_dynamic": """
        %x = Input() : f32[1,5,9,9]
        %w = Input() : f32[6,5,3,3]
        %y = Conv(%x, %w) : f32[1,6,7,7]
        return %y
    """,
    "dense": """
        %x = Input() : f32[1,100]
        %w = Constant() : f32[100,130]
        %y = MatMul(%x, %w) : f32[1,130]
        return %y
    """,
    "matmul_rows": """
        %x = Input() : f32[2,19,24]
        %w = Constant() : f32[24,48]
        %b = Constant() : f32[48]
        %m = MatMul(%x, %w) : f32[2,19,48]
        %a = Add(%m, %b) : f32[2,19,48]
        %y = Gelu(%a) : f32[2,19,48]
        return %y
    """,
    "batch_matmul": """
        %x = Input() : f32[3,17,24]
        %w = Input() : f32[3,24,32]
        %y = MatMul(%x, %w) : f32[3,17,32]
        return %y
    """,
    "batch_matmul_odd": """
        %x = Input() : f32[3,7,5]
        %w = Input() : f32[3,5,9]
        %y = MatMul(%x, %w) : f32[3,7,9]
        return %y
    """,
    "max_pool": """
        %x = Input() : f32[1,9,11,24]
        %y = MaxPool(%x) {kernel_shape=[3,3], strides=[2,2], layout="NHWC"} : f32[1,4,5,24]
        return %y
    """,
    "average_pool": """
        %x = Input() : f32[1,9,11,19]
        %y = AveragePool(%x) {kernel_shape=[3,3], pads=[1,1,1,1], layout="NHWC"} : f32[1,9,11,19]
        return %y
    """,
    "global_average": """
        %x = Input() : f32[1,9,11,19]
        %y = GlobalAveragePool(%x) {layout="NHWC"} : f32[1,1,1,19]
        return %y
    """,
    "softmax": """
        %x = Input() : f32[6,37]
        %y = Softmax(%x) : f32[6,37]
        return %y
    """,
    "softmax_middle": """
        %x = Input() : f32[2,16,33]
        %y = Softmax(%x) {axis=1} : f32[2,16,33]
        return %y
    """,
    "layer_norm": """
        %x = Input() : f32[5,7,48]
        %g = Constant() : f32[48]
        %b = Constant() : f32[48]
        %y = LayerNormalization(%x, %g, %b) : f32[5,7,48]
        return %y
    """,
    "reduce_last": """
        %x = Input() : f32[5,7,48]
        %a = Constant() {value=[-1]} : i64[1]
        %y = ReduceSum(%x, %a) : f32[5,7,1]
        return %y
    """,
    "reduce_first": """
        %x = Input() : f32[50,7,48]
        %a = Constant() {value=[0]} : i64[1]
        %y = ReduceSum(%x, %a) : f32[1,7,48]
        return %y
    """,
    "reduce_all": """
        %x = Input() : f32[5,7,3]
        %y = ReduceMax(%x) {keepdims=0} : f32[]
        return %y
    """,
    "elementwise_odd": """
        %x = Input() : f32[1,7,13,11]
        %z = Input() : f32[1,7,13,11]
        %a = Add(%x, %z) : f32[1,7,13,11]
        %y = HardSwish(%a) : f32[1,7,13,11]
        return %y
    """,
    "broadcast": """
        %x = Input() : f32[2,7,13]
        %z = Input() : f32[7,1]
        %y = Mul(%x, %z) : f32[2,7,13]
        return %y
    """,
    "elementwise_large": """
        %x = Input() : f32[3,101,257]
        %y = Tanh(%x) : f32[3,101,257]
        return %y
    """,
    "scalar": """
        %x = Input() : f32[]
        %y = Exp(%x) : f32[]
        return %y
    """,
    "compare": """
        %x = Input() : f32[4,32]
        %z = Input() : f32[4,32]
        %y = Less(%x, %z) : bool[4,32]
        return %y
    """,
    "transpose": """
        %x = Input() : f32[2,17,9,20]
        %y = Transpose(%x) {perm=[0,2,3,1]} : f32[2,9,20,17]
        return %y
    """,
    "concat": """
        %x = Input() : f32[1,6,6,5]
        %z = Input() : f32[1,6,6,11]
        %y = Concat(%x, %z) {axis=3} : f32[1,6,6,16]
        return %y
    """,
    "argmax": """
        %x = Input() : f32[4,33]
        %y = ArgMax(%x) {axis=1} : i64[4,1]
        return %y
    """,
    "resize": """
        %x = Input() : f32[1,3,5,6]
        %s = Constant() {value=[1.0, 1.0, 2.0, 2.0]} : f32[4]
        %y = Resize(%x, _, %s) {mode="linear"} : f32[1,3,10,12]
        return %y
    """,
}  # fmt: skip


@pytest.mark.parametrize("vector_bits", [128, 256, 512])
@pytest.mark.parametrize("name", KERNELS)
def test_scheduled_equals_unscheduled(name: str, vector_bits: int) -> None:
    graph = Graph.parse(KERNELS[name])
    rng = np.random.default_rng(3)
    feeds = {k: rng.standard_normal(v.shape).astype(v.dtype) for k, v in graph.inputs.items()}
    region = onnx_to_tir.convert_region(list(graph), graph, TARGET, vector_bits=vector_bits)
    plain = run_region(region, graph, feeds)
    fast = run_region(region, graph, feeds, lambda f: float_cpu.apply(f, vector_bits, 2))
    for value, expected in plain.items():
        np.testing.assert_allclose(fast[value], expected, rtol=1e-5, atol=1e-6)


def rule_of(text: str) -> list[str]:
    """Names of the rules that take the kernels of a graph."""
    graph = Graph.parse(text)
    region = onnx_to_tir.convert_region(list(graph), graph, TARGET)
    return [float_cpu.rule_for(func, 256, 2) for func in region.kernels.values()]


@pytest.mark.parametrize("name", [n for n in KERNELS if n != "conv_dynamic"])
def test_no_common_kernel_needs_the_fallback(name: str) -> None:
    assert "fallback" not in rule_of(KERNELS[name])


@pytest.mark.parametrize("name", ["conv_3x3", "conv_grouped", "conv_first", "dense", "residual"])
def test_products_are_tiled_in_registers(name: str) -> None:
    assert "register_tile" in rule_of(KERNELS[name])


@pytest.mark.parametrize("vector_bits", [128, 256, 512])
@pytest.mark.parametrize("length", [5, 48, 53])
def test_rows_are_summed_in_one_order_on_every_machine(vector_bits: int, length: int) -> None:
    graph = Graph.parse(f"""
        %x = Input() : f32[6,{length}]
        %a = Constant() {{value=[-1]}} : i64[1]
        %y = ReduceSum(%x, %a) {{keepdims=0}} : f32[6]
        return %y
    """)
    x = np.random.default_rng(1).standard_normal((6, length)).astype(np.float32) * 1e4
    turns = length // 16 if length >= 32 else 0
    lanes = np.zeros((6, 16), np.float32)
    for turn in range(turns):
        lanes += x[:, turn * 16 : turn * 16 + 16]
    leaves = x[:, turns * 16 :]
    leaves = np.concatenate([lanes, leaves], axis=1) if turns else leaves
    region = onnx_to_tir.convert_region(list(graph), graph, TARGET, vector_bits=vector_bits)
    got = run_region(region, graph, {"x": x}, lambda f: float_cpu.apply(f, vector_bits, 2))["y"]
    np.testing.assert_array_equal(got, tree_sum(leaves))


@pytest.mark.parametrize("name", ["reduce_first", "reduce_last", "batch_matmul_odd"])
def test_a_schedule_never_reassociates_a_sum(name: str) -> None:
    graph = Graph.parse(KERNELS[name])
    feeds = {
        value: np.resize(np.array([1e8, 1.0, -1e8, 3.0, 5.0], np.float32), kind.shape)
        for value, kind in graph.inputs.items()
    }
    region = onnx_to_tir.convert_region(list(graph), graph, TARGET)
    plain = run_region(region, graph, feeds)["y"]
    fast = run_region(region, graph, feeds, lambda func: float_cpu.apply(func, 512, 2))["y"]
    np.testing.assert_array_equal(fast, plain)


def test_scheduling_keeps_the_symbol_and_marks_the_function() -> None:
    graph = Graph.parse(KERNELS["softmax"])
    region = onnx_to_tir.convert_region(list(graph), graph, TARGET)
    func: Any = next(iter(region.kernels.values()))
    assert "global_symbol" not in dict(float_cpu.apply(func, 256, 1).attrs)
    named = float_cpu.apply(func.with_attr("global_symbol", "soft"), 256, 1)
    assert named.attrs["global_symbol"] == "soft"
    assert named.attrs["tirx.is_scheduled"]


def test_one_core_stays_serial() -> None:
    graph = Graph.parse(KERNELS["conv_3x3"])
    region = onnx_to_tir.convert_region(list(graph), graph, TARGET)
    for func in region.kernels.values():
        assert "T.parallel" not in tvm.IRModule({"f": float_cpu.apply(func, 256, 1)}).script()
    scatter = Graph.parse("""
        %x = Input() : f32[3,3]
        %i = Input() : i64[1,3]
        %u = Input() : f32[1,3]
        %y = ScatterElements(%x, %i, %u) : f32[3,3]
        return %y
    """)
    (func,) = onnx_to_tir.convert_region(list(scatter), scatter, TARGET).kernels.values()
    assert "T.parallel" not in tvm.IRModule({"f": float_cpu.apply(func, 256, 1)}).script()
    texts = [
        tvm.IRModule({"f": float_cpu.apply(func, 256, 4)}).script()
        for func in region.kernels.values()
    ]
    assert any("T.parallel" in text for text in texts)
