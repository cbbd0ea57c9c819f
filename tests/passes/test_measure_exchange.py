"""Losses around a plan against networks that are quantized and run as a whole."""

import numpy as np
import pytest

from mpqc.calibration import calibrate
from mpqc.graph import Precision
from mpqc.onnx_export import to_onnx
from mpqc.ort import Session
from mpqc.passes.find_layers import find_layers
from mpqc.passes.measure_exchange import Exchanges, measure_exchange
from mpqc.passes.round_layers import round_layers
from mpqc.pipeline import quantize
from mpqc.plan import Plan
from mpqc.rounding import Accuracy
from mpqc.search.testing import BATCH, toy_data, toy_graph

GRAPH, DATA = toy_graph(BATCH), toy_data()
LAYERS = find_layers(GRAPH)
CALIBRATION = calibrate(GRAPH, DATA, [layer.input for layer in LAYERS])
PLAN = Plan.uniform(GRAPH, Precision(3, 3))


def measured(
    weights: dict[str, list[int]], inputs: dict[str, list[int]], known: dict[str, float]
) -> Exchanges:
    return measure_exchange(
        GRAPH, PLAN, DATA, DATA, CALIBRATION, weights, inputs, accuracy=Accuracy(), known=known
    )


def noise(plan: Plan) -> float:
    """Of the integer network, every layer rounded for this plan."""
    rounded = round_layers(GRAPH, plan, CALIBRATION, DATA, Accuracy())
    exact = Session(to_onnx(GRAPH))
    integer = Session(to_onnx(quantize(GRAPH, plan, CALIBRATION, rounded=rounded)))
    pairs = [(exact.run(f)["y"], integer.run(f)["y"]) for f in DATA.feeds()]
    wanted, got = (np.concatenate(part).astype(np.float64) for part in zip(*pairs, strict=True))
    return float(((got - wanted) ** 2).sum() / (wanted**2).sum())


def changed(**widths: Precision) -> Plan:
    body = {name: Precision(layer.widest, layer.activation_bits)
            for name, layer in PLAN.layers.items()}  # fmt: skip
    return Plan.of(GRAPH, body | widths)


def test_the_plan_itself_is_the_network_that_it_makes() -> None:
    found = measured({}, {}, {})
    assert found.plan == pytest.approx(noise(PLAN), rel=0.02)


def test_a_change_behind_which_nothing_comes_is_the_network_with_that_change() -> None:
    found = measured({"classifier": [2, 4]}, {}, {})
    for bits in (2, 4):
        expected = noise(changed(classifier=Precision(bits, 8)))
        assert found.weights["classifier"][bits] == pytest.approx(expected, rel=0.02)
    assert found.weights["classifier"][2] > found.weights["classifier"][4] > found.plan


def test_narrower_activations_lose_more_in_all_layers_that_read_them() -> None:
    found = measured({"main": [2]}, {"r1": [2], "r3": [2]}, {})
    for row in (found.weights["main"], *found.activations.values()):
        assert row[2] > 1.1 * found.plan


def test_measures_only_what_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, float] = {}
    first = measured({"main": [2, 4]}, {"r3": [2]}, known)
    assert sorted(known) == ["a/r3/2", "plan", "w/main/2", "w/main/4"]
    part = {key: known[key] for key in ("plan", "w/main/2", "w/main/4")}
    assert measured({"main": [2, 4]}, {"r3": [2]}, part) == first
    monkeypatch.setattr("mpqc.ort.Session", None)
    assert measured({"main": [2, 4]}, {"r3": [2]}, known) == first
