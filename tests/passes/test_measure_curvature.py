import numpy as np
import pytest

from mpqc.data import open_data
from mpqc.graph import Graph
from mpqc.passes.find_layers import find_layers
from mpqc.passes.measure_curvature import measure_curvature
from mpqc.passes.measure_perturbation import probabilities
from mpqc.search.testing import BATCH, toy_data, toy_graph

N, K, C = 64, 6, 4
LINEAR = Graph.parse(
    f"""
    %x = Input() : f32[{N},{K}]
    %w = Constant() : f32[{K},{C}]
    %y = MatMul(%x, %w) : f32[{N},{C}]
    return %y
    """
)
X = np.random.default_rng(0).normal(size=(N, K)).astype(np.float32)
DATA = open_data({"x": X}, LINEAR)


def test_trace_of_a_linear_layer_under_squared_error() -> None:
    """|(W + v)x - Wx|^2 / |Wx|^2 has the trace C |x|^2 / |Wx|^2 over W, N |W|^2 / ... over x."""
    w = LINEAR.constants["w"]
    power = float(((X @ w).astype(np.float64) ** 2).sum())
    found = measure_curvature(LINEAR, DATA, ["y"], probes=400)
    assert found.weights["y"] == pytest.approx(C * float((X**2).sum()) / power, rel=0.05)
    assert found.activations["x"] == pytest.approx(N * float((w**2).sum()) / power, rel=0.05)


def test_trace_of_a_classifier_is_that_of_the_fisher_information() -> None:
    """Tr(F) = mean over samples of |x|^2 sum_c p_c (1 - p_c); KL grows with half of it."""
    p = probabilities(X @ LINEAR.constants["w"])
    exact = float(np.mean((X.astype(np.float64) ** 2).sum(1) * (p * (1 - p)).sum(1)))
    found = measure_curvature(LINEAR, DATA, ["y"], probes=400, metric="kl")
    assert found.weights["y"] == pytest.approx(exact / 2, rel=0.05)


def test_seeds() -> None:
    graph, data = toy_graph(BATCH), toy_data()
    names = [layer.name for layer in find_layers(graph)]
    first = measure_curvature(graph, data, names, seed=1)
    assert measure_curvature(graph, data, names, seed=1) == first
    assert measure_curvature(graph, data, names, seed=2) != first
    alone = measure_curvature(graph, data, ["pointwise"], seed=1)  # as a resumed one measures
    assert alone.weights["pointwise"] == first.weights["pointwise"]
