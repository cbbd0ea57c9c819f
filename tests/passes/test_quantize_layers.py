from functools import partial

import numpy as np
import pytest

from mpqc import reference
from mpqc.calibration import Calibration, calibrate
from mpqc.data import open_data
from mpqc.errors import PassError, PlanError
from mpqc.graph import Array, Graph
from mpqc.histogram import Histogram
from mpqc.passes.quantize_layers import QuantizeLayers, tensors_to_calibrate
from mpqc.plan import LayerPlan, Plan, TensorPlan

CONV = Graph.parse(
    """
    %x = Input() : f32[1,2,5,5]
    %w = Constant() : f32[3,2,3,3]
    %b = Constant() {value=[0.5, -1.0, 0.25]} : f32[3]
    %v = Constant() : f32[3,2,1,1]
    %y = Conv(%x, %w, %b) {pads=[1,1,1,1]} : f32[1,3,5,5] @first
    %z = Conv(%x, %v) : f32[1,3,5,5] @second
    %o = Add(%y, %z) : f32[1,3,5,5]
    return %o
    """
)


def plan(tensors: dict[str, int] | None = None, **layers: tuple[int, int]) -> Plan:
    return Plan(
        model_sha256="0" * 64,
        layers={
            name: LayerPlan(weight_bits=weight, activation_bits=activation)
            for name, (weight, activation) in layers.items()
        },
        tensors={name: TensorPlan(bits=bits) for name, bits in (tensors or {}).items()},
    )


def calibration(**values: Array) -> Calibration:
    histograms = {}
    for name, array in values.items():
        histograms[name] = Histogram()
        histograms[name].add(array)
    return Calibration(histograms, 1)


def draw(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


quantize_layers = partial(QuantizeLayers, correct_bias=False)


def test_writes_codes_integers_and_an_affine() -> None:
    after = quantize_layers(
        plan(first=(4, 3)), calibration(x=np.array([0, 7], np.float32)), "minmax"
    )(CONV)
    lines = str(after).splitlines()
    assert "%x.q3 = Quantize(%x) {bits=3, scale=1.0, zero_point=0} : u8[1,2,5,5]" in lines
    assert (
        "%first.acc = IntConv(%x.q3, %first.codes) {activation_bits=3, pads=[1, 1, 1, 1], "
        'weight_bits=4, weight_levels="signed", zero_point=0} : i32[1,3,5,5] @first'
    ) in lines
    assert (
        "%y = Affine(%first.acc, %first.m, %first.b) {axis=1} : f32[1,3,5,5] @first.affine" in lines
    )
    assert "%z = Conv(%x, %v) : f32[1,3,5,5] @second" in lines  # not in the plan
    assert "%first.b = Constant() {value=[0.5, -1.0, 0.25]} : f32[3]" in lines


def test_layers_with_one_input_share_its_codes() -> None:
    after = quantize_layers(plan(first=(4, 3), second=(2, 3)), calibration(x=draw(9)))(CONV)
    assert [node.name for node in after if node.op == "Quantize"] == ["x.q3"]


@pytest.mark.parametrize("widths", [(8, 8), (4, 8), (2, 2), (1, 1), (1, 4)])
def test_computes_the_product_of_the_rounded_operands(widths: tuple[int, int]) -> None:
    x = draw(1, 2, 5, 5)
    known = calibration(x=x)
    after = quantize_layers(plan(first=widths, second=widths), known)(CONV)
    rule = known.quantizer("x", widths[1])
    rounded = dict(CONV.constants)
    for layer, weight in (("first", "w"), ("second", "v")):
        scale = after.constants[f"{layer}.m"] / np.float32(rule.scale)
        rounded[weight] = after.constants[f"{layer}.codes"] * scale[:, None, None, None]
    float_twin = CONV.with_(constants={k: v.astype(np.float32) for k, v in rounded.items()})

    got = reference.run(after, {"x": x})["o"]
    expected = reference.run(float_twin, {"x": rule.dequantize(rule.quantize(x))})["o"]

    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_eight_bits_stay_close_to_float() -> None:
    x = draw(1, 2, 5, 5)
    after = quantize_layers(plan(first=(8, 8), second=(8, 8)), calibration(x=x))(CONV)
    exact = reference.run(CONV, {"x": x})["o"]
    error = np.abs(reference.run(after, {"x": x})["o"] - exact).max()
    assert 0 < error < 0.02 * np.abs(exact).max()


GEMM = """
    %x = Input() : f32[2,3]
    %w = Constant() : f32[4,3]
    %c = Constant() {value=[1.0, 2.0, 3.0, 4.0]} : f32[4]
    %y = Gemm(%x, %w, %c) {alpha=2.0, beta=0.5, transB=1} : f32[2,4] @fc
    return %y
"""
MATMUL = """
    %x = Input() : f32[2,5,3]
    %w = Constant() : f32[3,4]
    %y = MatMul(%x, %w) : f32[2,5,4] @fc
    return %y
"""


@pytest.mark.parametrize(("text", "axis"), [(GEMM, 1), (MATMUL, 2)])
def test_products_become_plain_matrix_products(text: str, axis: int) -> None:
    graph = Graph.parse(text)
    x = draw(*graph.shape("x"))
    after = quantize_layers(plan(fc=(8, 8)), calibration(x=x))(graph)
    assert (after["fc"].op, after.constants["fc.codes"].shape) == ("IntMatMul", (3, 4))
    assert after["fc.affine"].int_attr("axis") == axis
    exact = reference.run(graph, {"x": x})["y"]
    error = np.abs(reference.run(after, {"x": x})["y"] - exact).max()
    assert error < 0.02 * np.abs(exact).max()


def test_a_narrowed_tensor_is_narrow_for_all_its_readers() -> None:
    x = draw(1, 2, 5, 5)
    narrow = plan({"x": 2}, first=(8, 8))
    assert tensors_to_calibrate(CONV, narrow) == ("x",)
    known = calibration(x=x)
    after = quantize_layers(narrow, known)(CONV)
    rule = known.quantizer("x", 2)

    assert after["second"].inputs[0] == "x.d2"
    assert after["x.d2.q8"].inputs == ("x.d2",)
    got = reference.run(after, {"x": x})["o"]
    same = reference.run(after, {"x": rule.dequantize(rule.quantize(x))})["o"]
    np.testing.assert_array_equal(got, same)


def test_a_narrowed_tensor_shares_its_codes_with_layers_of_its_width() -> None:
    after = quantize_layers(plan({"x": 4}, first=(8, 4)), calibration(x=draw(9)))(CONV)
    assert after["first"].inputs[0] == "x.q4"
    assert [node.op for node in after.consumers("x")] == ["Quantize"]


def test_refuses_a_plan_of_another_model() -> None:
    with pytest.raises(PlanError, match="'third' is not a layer"):
        quantize_layers(plan(third=(2, 2)), calibration(x=draw(9)))(CONV)


def test_refuses_sums_beyond_int32() -> None:
    taps = 70_000
    graph = Graph.parse(
        f"""
        %x = Input() : f32[1,{taps}]
        %w = Constant() : f32[{taps},1]
        %y = MatMul(%x, %w) : f32[1,1]
        return %y
        """,
        {"w": np.full((taps, 1), -1, np.float32)},
    )
    known = calibration(x=np.array([0, 1], np.float32))
    with pytest.raises(PlanError, match="beyond int32"):
        quantize_layers(plan(y=(8, 8)), known)(graph)
    assert "y.acc" in quantize_layers(plan(y=(4, 8)), known)(graph).types


def test_names_that_exist_are_avoided() -> None:
    graph = Graph.parse(str(CONV).replace("%z", "%x.q3"), dict(CONV.constants))
    after = quantize_layers(plan(first=(4, 3)), calibration(x=draw(9)))(graph)
    assert after["first"].inputs[0] == "x.q3_1"


def test_twice_is_an_error_that_names_the_pass() -> None:
    step = quantize_layers(plan(first=(4, 3)), calibration(x=draw(9)))
    with pytest.raises((PassError, PlanError), match="'first' is not a layer"):
        step(step(CONV))


GROUPED = """
    %x = Input() : f32[4,6,5]
    %w = Constant() : f32[4,3,2]
    %y = Conv(%x, %w) {group=2} : f32[4,4,4] @layer
    return %y
"""
PRODUCT = """
    %x = Input() : f32[4,6,5]
    %w = Constant() : f32[5,3]
    %y = MatMul(%x, %w) : f32[4,6,3] @layer
    return %y
"""


@pytest.mark.parametrize(("text", "others"), [(GROUPED, (0, 2)), (PRODUCT, (0, 1))])
def test_corrected_biases_keep_the_mean_of_every_channel(
    text: str, others: tuple[int, ...]
) -> None:
    graph = Graph.parse(text)
    levels = np.arange(1, 7, dtype=np.float32)[:, None]  # constant along the kernel: no borders
    x = np.random.default_rng(0).uniform(0, 1, (400, 6, 1)).astype(np.float32) + levels
    x = np.ascontiguousarray(np.broadcast_to(x, (400, 6, 5)))
    data = open_data({"x": x}, graph)
    known = calibrate(graph, data, ["x"])

    def mean(made: Graph) -> Array:
        outputs = [reference.run(made, feed)["y"] for feed in data.feeds()]
        found: Array = np.mean(outputs, axis=(0, *(axis + 1 for axis in others)))
        return found

    exact = mean(graph)
    plain = mean(QuantizeLayers(plan(layer=(2, 8)), known, correct_bias=False)(graph))
    corrected = mean(QuantizeLayers(plan(layer=(2, 8)), known)(graph))
    assert np.abs(plain - exact).max() > 0.1
    np.testing.assert_allclose(corrected, exact, atol=0.02)
