import numpy as np
import pytest

from mpqc import reference
from mpqc.data import open_data
from mpqc.errors import DataError
from mpqc.graph import Graph
from mpqc.passes.measure_separability import measure_separability
from mpqc.search.testing import BATCH, toy_data, toy_graph

GRAPH = Graph.parse("%x = Input() : f32[4,2,2,2]\n%y = Relu(%x) : f32[4,2,2,2]\nreturn %y")


def test_is_the_scatter_between_over_the_scatter_within() -> None:
    x = np.random.default_rng(0).normal(size=(12, 2, 2, 2)).astype(np.float32)
    labels = np.arange(12) % 3
    features = x.mean(axis=(2, 3)).astype(np.float64)
    means = np.array([features[labels == c].mean(0) for c in range(3)])
    within = ((features - means[labels]) ** 2).sum()
    between = (4 * (means - features.mean(0)) ** 2).sum()
    found = measure_separability(GRAPH, open_data({"x": x, "labels": labels}, GRAPH), ["x"])
    assert found["x"] == pytest.approx(between / within, rel=1e-6)


def test_the_filling_of_the_last_batch_does_not_count() -> None:
    x = np.random.default_rng(0).normal(size=(6, 2, 2, 2)).astype(np.float32)
    labels = np.arange(6) % 2
    once = measure_separability(GRAPH, open_data({"x": x, "labels": labels}, GRAPH), ["x"])
    full = np.concatenate([x, x]), np.concatenate([labels, labels])
    twice = measure_separability(GRAPH, open_data({"x": full[0], "labels": full[1]}, GRAPH), ["x"])
    assert once["x"] == pytest.approx(twice["x"], rel=1e-6)


def test_takes_predictions_where_there_are_no_labels() -> None:
    graph, data = toy_graph(BATCH), toy_data(labels=False)
    logits = np.concatenate([reference.run(graph, feeds)["y"] for feeds in data.feeds()])
    centred = graph.with_(constants={"b6": -logits.mean(0)})  # else it predicts one class
    found = measure_separability(centred, data, ["x", "r1", "f"])
    assert found["f"] > found["x"] > 0


def test_says_what_is_missing() -> None:
    x = np.ones((4, 2, 2, 2), np.float32)
    with pytest.raises(DataError, match="needs labels"):
        measure_separability(GRAPH, open_data({"x": x}, GRAPH), ["x"])
    with pytest.raises(DataError, match="two classes"):
        measure_separability(GRAPH, open_data({"x": x, "labels": np.ones(4, int)}, GRAPH), ["x"])
    with pytest.raises(DataError, match="from 0"):
        measure_separability(GRAPH, open_data({"x": x, "labels": -np.ones(4, int)}, GRAPH), ["x"])
