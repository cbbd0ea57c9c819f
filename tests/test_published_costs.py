"""BitOPs and sizes that the papers print, on networks that a script builds."""

from functools import cache
from pathlib import Path

import pytest

from benchmarks.models import MODELS
from mpqc import importer
from mpqc.graph import Graph, Precision
from mpqc.passes.estimate_cost import estimate_cost
from mpqc.passes.find_layers import find_layers
from mpqc.passes.fold_batch_norm import FoldBatchNorm
from mpqc.plan import Plan


@cache
def network(name: str, folder: Path) -> Graph:
    path = folder / f"{name}.onnx"
    path.write_bytes(MODELS[name](0).SerializeToString())
    return FoldBatchNorm()(importer.load(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


def published(graph: Graph, bits: int) -> Plan:
    """The papers' convention: first layer w8a8, classifier w8 on the body's activations."""
    return Plan.uniform(graph, Precision(bits, bits), classifier=Precision(8, bits))


# ResNet-18, MobileNetV1 and MobileNetV2: the targets of the FracBits configurations.
@pytest.mark.parametrize(
    ("name", "bits", "gbitops"),
    [
        ("resnet18", 2, 14.34),
        ("resnet18", 3, 22.83),
        ("resnet18", 4, 34.70),
        ("resnet18", 5, 49.96),
        ("resnet18", 8, 116.10),
        ("mobilenet_v1", 2, 2.94),
        ("mobilenet_v1", 3, 5.73),
        ("mobilenet_v1", 4, 9.64),
        ("mobilenet_v1", 5, 14.66),
        ("mobilenet_v1", 8, 36.40),
        ("mobilenet_v2", 2, 1.87),
        ("mobilenet_v2", 3, 3.32),
        ("mobilenet_v2", 4, 5.35),
        ("mobilenet_v2", 5, 7.96),
        ("mobilenet_v2", 8, 19.25),
    ],
)
def test_bitops(folder: Path, name: str, bits: int, gbitops: float) -> None:
    graph = network(name, folder)
    assert round(estimate_cost(graph, published(graph, bits)).bitops / 1e9, 2) == gbitops


@pytest.mark.parametrize(
    ("name", "bits", "mbytes"),
    [
        ("resnet18", 2, 3.31),
        ("resnet18", 3, 4.71),
        ("resnet18", 4, 6.10),
        ("mobilenet_v1", 2, 1.82),
        ("mobilenet_v1", 3, 2.22),
        ("mobilenet_v1", 4, 2.62),
        ("mobilenet_v2", 2, 1.83),
        ("mobilenet_v2", 3, 2.10),
        ("mobilenet_v2", 4, 2.38),
    ],
)
def test_size_of_the_weights(folder: Path, name: str, bits: int, mbytes: float) -> None:
    graph = network(name, folder)
    cost = estimate_cost(graph, published(graph, bits))
    assert round(cost.size / 1e6, 2) == mbytes
    assert cost.bias_bytes >= 4000  # the classifier's thousand, which the papers add apart


@pytest.mark.parametrize(
    ("name", "gbitops"), [("resnet18", 1857.6), ("mobilenet_v1", 582.4), ("mobilenet_v2", 308.0)]
)
def test_cost_in_float(folder: Path, name: str, gbitops: float) -> None:
    graph = network(name, folder)
    assert round(estimate_cost(graph, None).bitops / 1e9, 1) == gbitops
    macs = sum(layer.macs for layer in find_layers(graph))
    assert macs * 32 * 32 == estimate_cost(graph, None).bitops
