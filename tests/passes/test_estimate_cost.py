from pathlib import Path

import pytest

from mpqc import importer
from mpqc.graph import Graph, Precision
from mpqc.passes.estimate_cost import estimate_cost, layer_cost
from mpqc.passes.find_layers import find_layers
from mpqc.passes.fold_batch_norm import FoldBatchNorm
from mpqc.plan import LayerPlan, Plan

TWO = Graph.parse(
    """
    %x = Input() : f32[1,3]
    %w1 = Constant() : f32[3,4]
    %w2 = Constant() : f32[4,2]
    %b2 = Constant() : f32[2]
    %h = MatMul(%x, %w1) : f32[1,4]
    %y = Gemm(%h, %w2, %b2) : f32[1,2]
    return %y
    """
)


def plan(**layers: LayerPlan) -> Plan:
    return Plan(model_sha256="0" * 64, layers=layers)


def test_sums_macs_times_widths() -> None:
    cost = estimate_cost(
        TWO,
        plan(
            h=LayerPlan(weight_bits=2, activation_bits=3),
            y=LayerPlan(weight_bits=(1, 5), activation_bits=8),
        ),
    )
    assert cost.bitops == 12 * 2 * 3 + 4 * (1 + 5) * 8
    assert cost.size == (12 * 2 + 4 * (1 + 5)) / 8
    assert (cost.scale_bytes, cost.bias_bytes) == (4 * (4 + 2), 4 * 2)


def test_a_layer_outside_the_plan_counts_as_float() -> None:
    cost = estimate_cost(TWO, plan(h=LayerPlan(weight_bits=2, activation_bits=3)))
    assert cost.layers["y"].bitops == 8 * 32 * 32
    assert cost.layers["y"].weight_bits == 8 * 32


def test_the_table_of_a_search_adds_up_to_the_cost_of_its_plan() -> None:
    uniform = Plan.uniform(TWO, Precision(3, 5), None)
    rows = [layer_cost(layer, Precision(3, 5)) for layer in find_layers(TWO)]
    assert list(estimate_cost(TWO, uniform).layers.values()) == rows


@pytest.fixture(scope="module")
def resnet20(shared_models: Path) -> Graph:
    return FoldBatchNorm()(importer.load(shared_models / "cifar10_resnet20.onnx"))


@pytest.mark.parametrize(("bits", "mbitops"), [(2, 188.8), (3, 389.3), (4, 670.1), (5, 1031.0)])
def test_published_bitops_of_resnet20(resnet20: Graph, bits: int, mbitops: float) -> None:
    body = Precision(bits, bits)
    published = Plan.uniform(resnet20, body, classifier=Precision(8, bits))
    assert round(estimate_cost(resnet20, published).bitops / 1e6, 1) == mbitops


def test_published_cost_of_resnet20_in_float(resnet20: Graph) -> None:
    assert round(estimate_cost(resnet20, None).bitops / 1e6) == 41_524
    assert sum(layer.macs for layer in find_layers(resnet20)) == 40_551_040


@pytest.mark.parametrize(
    ("bits", "gbitops", "mbytes"), [(2, 1.87, 1.83), (3, 3.32, 2.10), (4, 5.35, 2.38)]
)
def test_published_cost_of_mobilenet_v2(
    shared_models: Path, bits: int, gbitops: float, mbytes: float
) -> None:
    graph = importer.load(shared_models / "mobilenet_v2_1.0_224.onnx")
    published = Plan.uniform(graph, Precision(bits, bits), classifier=Precision(8, bits))
    cost = estimate_cost(graph, published)
    assert round(cost.bitops / 1e9, 2) == gbitops
    assert round(cost.size / 1e6, 2) == mbytes
