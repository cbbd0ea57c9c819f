from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from mpqc import numerics, reference
from mpqc.calibration import calibrate
from mpqc.data import open_data
from mpqc.errors import DataError
from mpqc.graph import Array, Graph
from mpqc.passes import round_layers as module
from mpqc.passes.find_layers import find_layers
from mpqc.passes.quantize_layers import QuantizeLayers, tensors_to_calibrate
from mpqc.passes.round_layers import round_layers, second_moments, told
from mpqc.plan import LayerPlan, Plan, TensorPlan
from mpqc.quantizers import ActivationQuantizer
from mpqc.replay import Replay
from mpqc.rounding import Accuracy, RoundedLayer

# strides, a branch with a shared input, a depthwise layer, a residual sum and a matrix product
NET = Graph.parse(
    """
    %x = Input() : f32[2,3,8,8]
    %w1 = Constant() : f32[8,3,3,3]
    %b1 = Constant() : f32[8]
    %w2 = Constant() : f32[8,1,3,3]
    %w3 = Constant() : f32[8,8,1,1]
    %w4 = Constant() : f32[8,8,1,1]
    %w5 = Constant() : f32[8,5]
    %shape = Constant() {value=[2, 8]} : i64[2]
    %c1 = Conv(%x, %w1, %b1) {pads=[1,1,1,1], strides=[2,2]} : f32[2,8,4,4] @first
    %r1 = Relu(%c1) : f32[2,8,4,4]
    %c2 = Conv(%r1, %w2) {group=8, pads=[1,1,1,1]} : f32[2,8,4,4] @depthwise
    %c3 = Conv(%r1, %w3) : f32[2,8,4,4] @shortcut
    %r2 = Relu(%c2) : f32[2,8,4,4]
    %c4 = Conv(%r2, %w4) : f32[2,8,4,4] @pointwise
    %s = Add(%c3, %c4) : f32[2,8,4,4]
    %p = GlobalAveragePool(%s) : f32[2,8,1,1]
    %f = Reshape(%p, %shape) : f32[2,8]
    %y = MatMul(%f, %w5) : f32[2,5] @classifier
    return %y
    """
)
LAYERS = ("first", "depthwise", "shortcut", "pointwise", "classifier")


def pictures(samples: int, seed: int = 0) -> Array:
    """Neighbours alike, as in pictures: float32 [samples, 3, 8, 8]."""
    rough = np.random.default_rng(seed).standard_normal((samples, 3, 4, 4))
    return np.repeat(np.repeat(rough, 2, 2), 2, 3).astype(np.float32)


def plan(weight: int, activation: int, tensors: Mapping[str, int] | None = None) -> Plan:
    return Plan(
        model_sha256="0" * 64,
        layers={name: LayerPlan(weight_bits=weight, activation_bits=activation) for name in LAYERS},
        tensors={name: TensorPlan(bits=bits) for name, bits in (tensors or {}).items()},
    )


def quantized(
    planned: Plan, accuracy: Accuracy, **options: Any
) -> tuple[dict[str, RoundedLayer], Graph]:
    data = open_data({"x": pictures(64)}, NET)
    known = calibrate(NET, data, tensors_to_calibrate(NET, planned))
    rounded = round_layers(NET, planned, known, data, accuracy, **options)
    return rounded, QuantizeLayers(planned, known, rounded=rounded)(NET)


def nearest(planned: Plan) -> Graph:
    data = open_data({"x": pictures(64)}, NET)
    known = calibrate(NET, data, tensors_to_calibrate(NET, planned))
    return QuantizeLayers(planned, known)(NET)


def loss(graph: Graph, seed: int = 9) -> float:
    """Mean squared error of the output on data not seen."""
    fresh = pictures(64, seed)
    errors = []
    for start in range(0, 64, 2):
        feeds = {"x": fresh[start : start + 2]}
        difference = reference.run(graph, feeds)["y"] - reference.run(NET, feeds)["y"]
        errors.append(np.square(difference).mean())
    return float(np.mean(errors))


@pytest.mark.parametrize(
    ("weight", "activation", "share"), [(2, 8, 0.5), (3, 8, 0.5), (4, 8, 0.5), (3, 3, 0.9)]
)
def test_outputs_come_closer_on_data_not_seen(weight: int, activation: int, share: float) -> None:
    planned = plan(weight, activation)
    rounded, graph = quantized(planned, Accuracy())
    assert set(rounded) == set(LAYERS)
    assert loss(graph) < share * loss(nearest(planned))


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_weights_are_codes_of_the_planned_width(bits: int) -> None:
    rounded, graph = quantized(plan(bits, 4), Accuracy(samples=8))
    for name, made in rounded.items():
        assert made.weights.levels == ("odd" if bits == 1 else "signed")
        numerics.weight_codes(made.weights.values, bits, made.weights.levels)
        np.testing.assert_array_equal(graph.constants[f"{name}.codes"], made.weights.values)
    reference.run(graph, {"x": pictures(2)})


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_corrected_channels_keep_their_means(rounding: Any) -> None:
    """Of what the layer gives in the quantized network, on the calibration data."""
    _, graph = quantized(plan(3, 3), Accuracy(rounding=rounding))
    values = ["c1", "c2", "c3", "c4", "y"]
    means: list[dict[str, Array]] = []
    for network in (NET, graph):
        runs = [
            reference.run(network, {"x": pictures(64)[i : i + 2]}, values) for i in range(0, 64, 2)
        ]
        means.append({
            value: np.mean([np.moveaxis(run[value], 1, -1).reshape(-1, run[value].shape[1]).mean(0)
                            for run in runs], 0)
            for value in values
        })  # fmt: skip
    for value in values:
        np.testing.assert_allclose(means[1][value], means[0][value], atol=1e-3)


def test_biases_stay_where_they_are_not_to_be_corrected() -> None:
    rounded, _ = quantized(plan(3, 3), Accuracy(bias_correction=False))
    np.testing.assert_array_equal(rounded["first"].bias, NET.constants["b1"])
    assert not rounded["pointwise"].bias.any()


def test_layers_with_one_input_share_its_rule() -> None:
    rounded, graph = quantized(plan(4, 2), Accuracy())
    assert rounded["depthwise"].rule == rounded["shortcut"].rule
    assert len([node for node in graph.consumers("r1") if node.op == "Quantize"]) == 1


def test_clipping_by_values_leaves_the_rules_of_calibration() -> None:
    planned = plan(4, 2)
    data = open_data({"x": pictures(64)}, NET)
    known = calibrate(NET, data, tensors_to_calibrate(NET, planned))
    rounded = round_layers(NET, planned, known, data, Accuracy(clipping="mse"))
    for layer in find_layers(NET):
        assert rounded[layer.name].rule == known.quantizer(layer.input, 2)


@pytest.mark.parametrize("bits", [4, 8])
def test_narrowed_values_are_seen_as_narrow(bits: int) -> None:
    planned = plan(3, 4, {"r1": bits, "s": bits})
    rounded, graph = quantized(planned, Accuracy())
    assert loss(graph) < 0.9 * loss(nearest(planned))
    assert rounded["depthwise"].rule.bits == 4


def test_same_seed_same_weights_and_progress_is_told() -> None:
    told_: list[tuple[str, int, int]] = []
    first, _ = quantized(plan(3, 3), Accuracy(samples=20), seed=4,
                         progress=lambda *step: told_.append(step))  # fmt: skip
    second, _ = quantized(plan(3, 3), Accuracy(samples=20), seed=4)
    for name, made in first.items():
        np.testing.assert_array_equal(made.weights.values, second[name].weights.values)
        np.testing.assert_array_equal(made.bias, second[name].bias)
    assert told_ == [
        ("first", 1, 5), ("shortcut", 3, 5), ("pointwise", 4, 5), ("classifier", 5, 5)
    ]  # fmt: skip


def test_too_little_memory_changes_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that do not fit are computed again."""
    roomy, _ = quantized(plan(3, 3), Accuracy(samples=20))
    original = Replay
    monkeypatch.setattr(module, "Replay", lambda data, budget, threads: original(data, 0, threads))
    tight, _ = quantized(plan(3, 3), Accuracy(samples=20))
    for name, made in roomy.items():
        np.testing.assert_array_equal(made.weights.values, tight[name].weights.values)


def test_layers_too_wide_for_square_matrices_are_rounded_to_nearest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_COLUMNS", 8)
    rounded, _ = quantized(plan(4, 4), Accuracy())
    codes = nearest(plan(4, 4)).constants
    np.testing.assert_array_equal(rounded["first"].weights.values, codes["first.codes"])
    assert (rounded["pointwise"].weights.values != codes["pointwise.codes"]).any()


def test_rows_by_chunks_are_the_dense_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 23, 5)).astype(np.float32)
    y = rng.standard_normal((23, 6)).astype(np.float32)
    rule = ActivationQuantizer(0.3, 7, 4)
    monkeypatch.setattr(module, "CHUNK", 4)
    seen = rule.dequantize(rule.quantize(x)).astype(np.float64)
    gram, cross = second_moments(x, y, rule, seen.mean(1), y.mean(0))
    centred = seen - seen.mean(1, keepdims=True)
    out = (y - y.mean(0)).T.reshape(2, 3, 23)
    np.testing.assert_array_equal(told(x, rule), seen.astype(np.float32))
    np.testing.assert_allclose(gram, centred.swapaxes(1, 2) @ centred / 23, atol=1e-6)
    np.testing.assert_allclose(cross, out @ centred / 23, atol=1e-6)


def test_inputs_that_overflow_are_named() -> None:
    planned = plan(4, 4)
    data = open_data({"x": pictures(4)}, NET)
    known = calibrate(NET, data, tensors_to_calibrate(NET, planned))
    loud = NET.with_(constants={"w2": NET.constants["w2"] * np.float32(1e38)})
    with pytest.raises(DataError, match="'c2' is NaN or infinite"):
        round_layers(loud, planned, known, data, Accuracy())
