"""What fitting leaves of a layer's error."""

import numpy as np
import pytest

from mpqc.calibration import calibrate
from mpqc.passes.find_layers import find_layers
from mpqc.passes.measure_compensation import Compensation, measure_compensation
from mpqc.rounding import Accuracy
from mpqc.search.testing import BATCH, toy_data, toy_graph

GRAPH, DATA = toy_graph(BATCH), toy_data()
CALIBRATION = calibrate(GRAPH, DATA, [layer.input for layer in find_layers(GRAPH)])


def measured(
    weights: dict[str, list[int]],
    inputs: dict[str, list[int]],
    known: dict[str, float] | None = None,
    accuracy: Accuracy | None = None,
) -> Compensation:
    return measure_compensation(
        GRAPH, DATA, CALIBRATION, weights, inputs, accuracy=accuracy or Accuracy(), known=known
    )


def test_two_bits_win_more_than_eight() -> None:
    found = measured({"main": [2, 8], "pointwise": [2, 8]}, {"r1": [2, 8]})
    for row in (*found.weights.values(), found.activations["r1"]):
        assert 0 < row[2] < 1
        assert row[2] < row[8]


def test_rounding_to_nearest_leaves_everything() -> None:
    nearest = Accuracy(rounding="nearest", clipping="mse")
    found = measured({"depthwise": [2, 4], "classifier": [3]}, {}, accuracy=nearest)
    for row in found.weights.values():
        assert list(row.values()) == pytest.approx([1.0] * len(row))


def test_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, float] = {}
    first = measured({"main": [2], "pointwise": [3]}, {"r3": [4]}, known)
    part = {key: value for key, value in known.items() if "main" in key}
    again = measured({"main": [2], "pointwise": [3]}, {"r3": [4]}, part)
    assert again.weights["main"] == first.weights["main"]
    assert np.isclose(again.activations["r3"][4], first.activations["r3"][4], rtol=1e-3)
    monkeypatch.setattr("mpqc.ort.Session", None)
    assert measured({"main": [2], "pointwise": [3]}, {"r3": [4]}, known) == first
