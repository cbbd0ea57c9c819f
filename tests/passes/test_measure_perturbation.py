from dataclasses import replace

import numpy as np
import pytest

from mpqc import reference
from mpqc.errors import DataError
from mpqc.graph import Array, Graph
from mpqc.passes.find_layers import find_layers
from mpqc.passes.measure_perturbation import Loss, compared, disturb, probabilities
from mpqc.search.testing import BATCH, SAMPLES, toy_data, toy_graph

GRAPH, DATA = toy_graph(BATCH), toy_data()


def with_constant(graph: Graph, name: str, array: Array) -> Graph:
    return graph.with_(constants={name: array})


def close(a: Array, b: Array) -> bool:
    return bool(np.allclose(a, b, rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize("name", [layer.name for layer in find_layers(GRAPH)])
def test_a_replaced_weight_is_that_of_the_whole_graph(name: str) -> None:
    node = GRAPH[name]
    stored = GRAPH.constants[node.inputs[1]]
    other = np.random.default_rng(1).normal(size=stored.shape).astype(np.float32)
    matrix = other.T if node.op == "Gemm" else other  # transB
    feeds = next(iter(DATA.feeds()))
    run = next(iter(disturb(GRAPH, DATA, [name])))
    expected = reference.run(with_constant(GRAPH, node.inputs[1], other), feeds)
    assert close(run(None, {name: matrix})["y"], expected["y"])
    assert close(run()["y"], reference.run(GRAPH, feeds)["y"])
    assert close(run.outputs["y"], reference.run(GRAPH, feeds)["y"])


def test_a_replaced_input_reaches_all_layers_that_share_it() -> None:
    run = next(iter(disturb(GRAPH, DATA, ["main", "shortcut"])))
    zeros = np.zeros_like(run.input)
    feeds = next(iter(DATA.feeds()))
    nodes = [
        replace(node, inputs=("zeros", *node.inputs[1:]))
        if node.name in ("main", "shortcut")
        else node
        for node in GRAPH
    ]
    expected = reference.run(GRAPH.with_(nodes, constants={"zeros": zeros}), feeds)
    assert close(run(zeros)["y"], expected["y"])


def test_a_float_reader_of_the_input_is_not_disturbed() -> None:
    graph = Graph.parse(
        """
        %x = Input() : f32[2,4]
        %w = Constant() : f32[4,4]
        %h = Relu(%x) : f32[2,4]
        %p = MatMul(%h, %w) : f32[2,4]
        %y = Add(%p, %h) : f32[2,4]
        return %y
        """
    )
    from mpqc.data import open_data

    x = np.abs(np.random.default_rng(0).normal(size=(2, 4))).astype(np.float32)
    run = next(iter(disturb(graph, open_data({"x": x}, graph), ["p"])))
    assert np.array_equal(run(np.zeros_like(x))["y"], x)
    assert np.array_equal(run(None, None, {"p": np.full(4, 9, np.float32)})["y"] - run()["y"],
                          (run()["y"] + 9) - run()["y"])  # fmt: skip


def test_biases_of_layers_without_one() -> None:
    run = next(iter(disturb(GRAPH, DATA, ["depthwise"])))
    shifted = run(None, None, {"depthwise": np.full(16, 2.0, np.float32)})["y"]
    assert not close(shifted, run()["y"])


def test_the_filling_of_the_last_batch_does_not_count() -> None:
    rows = [run.rows for run in disturb(GRAPH, DATA.sample(SAMPLES - 3), ["main"])]
    assert sum(rows) == SAMPLES - 3
    assert rows[-1] == BATCH - 3


def test_losses() -> None:
    run = next(iter(disturb(GRAPH, DATA, ["main"])))
    y = run.outputs["y"]
    for metric in ("sqnr", "kl"):
        loss = Loss(metric)
        loss.add(run, run.outputs)
        assert loss.value == pytest.approx(0, abs=1e-9)
    noisy = Loss("sqnr")
    noisy.add(run, {"y": y * 1.5})
    assert noisy.value == pytest.approx(0.25)
    p, q = probabilities(y), probabilities(y * 2)
    divergence = Loss("kl")
    divergence.add(run, {"y": y * 2})
    assert divergence.value == pytest.approx(float((p * np.log(p / q)).sum() / BATCH), rel=1e-6)
    broken = Loss("sqnr")
    broken.add(run, {"y": y * np.float32(np.nan)})
    assert broken.value == np.inf


def test_probabilities_stay_as_they_are() -> None:
    logits = np.array([[1.0, 2.0, 3.0]], np.float32)
    once = probabilities(logits)
    assert np.array_equal(probabilities(once), once)


def test_noise_is_compared_before_a_softmax() -> None:
    graph = Graph.parse(
        """
        %x = Input() : f32[2,4]
        %w = Constant() : f32[4,3]
        %h = MatMul(%x, %w) : f32[2,3]
        %y = Softmax(%h) : f32[2,3]
        return %y
        """
    )
    assert compared(graph, "sqnr").outputs == ("h",)
    assert compared(graph, "kl").outputs == ("y",)


def test_kl_wants_classes() -> None:
    graph = Graph.parse("%x = Input() : f32[2,1]\n%y = Relu(%x) : f32[2,1]\nreturn %y")
    with pytest.raises(DataError, match="metric=sqnr"):
        compared(graph, "kl")


def test_a_layer_that_no_output_needs_is_named() -> None:
    cut = GRAPH.with_(outputs=["r1"])
    with pytest.raises(DataError, match="depends on layer 'main'"):
        list(disturb(cut, DATA, ["main"]))
