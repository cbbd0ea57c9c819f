"""What keeps accuracy below eight bits, in the pipeline and on a trained network."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpqc.calibration import calibrate
from mpqc.data import Data, open_data
from mpqc.graph import Array, Graph, Precision
from mpqc.onnx_export import to_onnx
from mpqc.ort import Session
from mpqc.passes.quantize_layers import tensors_to_calibrate
from mpqc.pipeline import Options, equalize, import_model, quantize, round_plan
from mpqc.plan import Plan
from mpqc.preprocess import Preprocess
from mpqc.rounding import Accuracy
from mpqc.target import native

NET = Graph.parse(
    """
    %x = Input() : f32[1,2,6,6]
    %w = Constant() : f32[4,2,3,3]
    %d = Constant() : f32[4,1,3,3]
    %p = Constant() : f32[3,4,1,1]
    %a = Conv(%x, %w) : f32[1,4,4,4] @first
    %r = Relu(%a) : f32[1,4,4,4]
    %b = Conv(%r, %d) {group=4} : f32[1,4,2,2] @depthwise
    %y = Conv(%b, %p) : f32[1,3,2,2] @last
    return %y
    """
)
OPTIONS = Options(native(), max_samples=8)


def data() -> Data:
    rows = np.random.default_rng(0).standard_normal((20, 2, 6, 6)).astype(np.float32)
    return open_data({"x": rows}, NET)


def plan(bits: int) -> Plan:
    return Plan.uniform(NET, Precision(bits, bits), None)


@pytest.mark.parametrize(
    ("bits", "accuracy", "layers"),
    [
        (4, Accuracy(), 3),
        (4, Accuracy(rounding="nearest"), 3),
        (4, Accuracy(clipping="mse"), 3),
        (4, Accuracy(rounding="nearest", clipping="mse"), 0),
        (8, Accuracy(), 0),
    ],
)
def test_layers_are_watched_where_that_can_help(bits: int, accuracy: Accuracy, layers: int) -> None:
    known = calibrate(NET, data(), tensors_to_calibrate(NET, plan(bits)))
    options = replace(OPTIONS, accuracy=accuracy)
    assert len(round_plan(NET, plan(bits), known, data(), options)) == layers


@pytest.mark.parametrize(
    ("bits", "choice", "changes"),
    [(4, "auto", True), (4, "on", True), (4, "off", False), (8, "on", False)],
)
def test_channels_are_equalized_where_asked(bits: int, choice: str, changes: bool) -> None:
    uneven = NET.constants["d"] * np.array([1, 50, 1, 1], np.float32).reshape(4, 1, 1, 1)
    graph = NET.with_(constants={"d": uneven})
    accuracy = Accuracy(equalize=choice)  # type: ignore[arg-type]
    assert (str(equalize(graph, plan(bits), accuracy)) != str(graph)) == changes


def accuracy_of(graph: Graph, pictures: Data, labels: Array) -> float:
    session, right = Session(to_onnx(graph), threads=2), 0
    for number, feeds in enumerate(pictures.feeds()):
        classes = session.run(feeds)[graph.outputs[0]].argmax(1)
        right += int((classes == labels[50 * number : 50 * number + 50]).sum())
    return right / len(labels)


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "least"), [("w4a4", 0.89), ("w3a3", 0.86), ("w2a4", 0.85)])
def test_a_trained_network_survives(
    shared_models: Path, shared_data: Path, widths: str, least: float
) -> None:
    """ResNet-20 on CIFAR-10: 91.7 % in float; to nearest 90, 82 and 13 %."""
    graph = import_model(shared_models / "cifar10_resnet20.onnx", batch=50)
    preprocess = Preprocess(scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    train, test = (
        open_data(shared_data / f"cifar10_{name}.npz", graph, preprocess, max_samples=samples)
        for name, samples in (("train15k", 250), ("test_a", 1000))
    )
    planned = Plan.uniform(graph, Precision.parse(widths))
    known = calibrate(graph, train, tensors_to_calibrate(graph, planned))
    rounded = round_plan(graph, planned, known, train, Options(native()))
    quantized = quantize(graph, planned, known, rounded=rounded)
    assert test.labels is not None
    assert accuracy_of(quantized, test, test.labels) > least
