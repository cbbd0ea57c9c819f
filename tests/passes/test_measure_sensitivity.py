"""Losses against the quantizing pass itself, run over the whole graph in the interpreter."""

import numpy as np
import pytest

from mpqc import reference
from mpqc.calibration import calibrate
from mpqc.graph import Graph, Precision
from mpqc.passes.find_layers import find_layers
from mpqc.passes.measure_sensitivity import measure_sensitivity
from mpqc.passes.quantize_layers import QuantizeLayers
from mpqc.passes.round_layers import round_layers
from mpqc.plan import Plan
from mpqc.rounding import Accuracy
from mpqc.search.testing import BATCH, toy_data, toy_graph

GRAPH, DATA = toy_graph(BATCH), toy_data()
CALIBRATION = calibrate(GRAPH, DATA, [layer.input for layer in find_layers(GRAPH)])


def noise(quantized: Graph) -> float:
    error = signal = 0.0
    for feeds in DATA.feeds():
        exact, got = (reference.run(graph, feeds)["y"] for graph in (GRAPH, quantized))
        error += float(((got.astype(np.float64) - exact) ** 2).sum())
        signal += float((exact.astype(np.float64) ** 2).sum())
    return error / signal


@pytest.mark.parametrize("name", ["main", "depthwise", "pointwise", "classifier"])
def test_is_what_quantizing_the_layer_does(name: str) -> None:
    """Weights at 2 bits under 8-bit activations, whose own loss is a thousandth of that."""
    widths = {name: Precision(2, 8)}
    expected = noise(QuantizeLayers(Plan.of(GRAPH, widths), CALIBRATION)(GRAPH))
    table = measure_sensitivity(GRAPH, DATA, CALIBRATION, {name: [2]}, {})
    assert table.weights[name][2] == pytest.approx(expected, rel=0.05)


def test_activations_are_those_of_all_layers_that_share_them() -> None:
    widths = {"main": Precision(8, 2), "shortcut": Precision(8, 2)}
    expected = noise(QuantizeLayers(Plan.of(GRAPH, widths), CALIBRATION)(GRAPH))
    table = measure_sensitivity(GRAPH, DATA, CALIBRATION, {}, {"r1": [2]})
    assert table.activations["r1"][2] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("metric", ["sqnr", "kl"])
def test_wider_loses_less(metric: str) -> None:
    layers = find_layers(GRAPH)
    bits = [2, 4, 8]
    table = measure_sensitivity(
        GRAPH, DATA, CALIBRATION,
        {layer.name: bits for layer in layers}, {layer.input: bits for layer in layers},
        metric=metric,  # type: ignore[arg-type]
    )  # fmt: skip
    for row in [*table.weights.values(), *table.activations.values()]:
        assert row[2] > row[4] > row[8] > 0


def test_rounded_as_the_compiler_does_it() -> None:
    """The last body layer alone, at two bits: behind it nothing has to be fitted."""
    plan = Plan.of(GRAPH, {"pointwise": Precision(2, 8)})
    rounded = round_layers(GRAPH, plan, CALIBRATION, DATA, Accuracy())
    expected = noise(QuantizeLayers(plan, CALIBRATION, "mse", True, rounded)(GRAPH))
    fitted = measure_sensitivity(
        GRAPH, DATA, CALIBRATION, {"pointwise": [2]}, {}, accuracy=Accuracy()
    )
    nearest = measure_sensitivity(GRAPH, DATA, CALIBRATION, {"pointwise": [2]}, {})
    assert fitted.weights["pointwise"][2] == pytest.approx(expected, rel=0.1)
    assert fitted.weights["pointwise"][2] < 0.8 * nearest.weights["pointwise"][2]


def test_narrow_activations_are_made_good_as_far_as_weights_can() -> None:
    fitted = measure_sensitivity(GRAPH, DATA, CALIBRATION, {}, {"r1": [2]}, accuracy=Accuracy())
    nearest = measure_sensitivity(GRAPH, DATA, CALIBRATION, {}, {"r1": [2]})
    assert 0 < fitted.activations["r1"][2] < nearest.activations["r1"][2]


def test_fitting_goes_on_where_it_stopped() -> None:
    known: dict[str, float] = {}
    widths = {"main": [2, 4], "pointwise": [3]}
    first = measure_sensitivity(
        GRAPH, DATA, CALIBRATION, widths, {"r1": [2]}, accuracy=Accuracy(), known=known
    )
    part = {key: value for key, value in known.items() if "pointwise" not in key}
    again = measure_sensitivity(
        GRAPH, DATA, CALIBRATION, widths, {"r1": [2]}, accuracy=Accuracy(), known=part
    )
    for name, row in again.weights.items():
        assert row == pytest.approx(first.weights[name], rel=1e-3)


def test_measures_only_what_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, float] = {}
    first = measure_sensitivity(
        GRAPH, DATA, CALIBRATION, {"main": [2, 4]}, {"r1": [2]}, known=known
    )
    assert sorted(known) == ["a/r1/2", "w/main/2", "w/main/4"]
    monkeypatch.setattr("mpqc.ort.Session", None)
    again = measure_sensitivity(
        GRAPH, DATA, CALIBRATION, {"main": [2, 4]}, {"r1": [2]}, known=known
    )
    assert again == first
    with pytest.raises(TypeError):
        measure_sensitivity(GRAPH, DATA, CALIBRATION, {"main": [3]}, {}, known=known)
