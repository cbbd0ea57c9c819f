"""Searches that train need no word about the network: a transformer block, MobileNetV2."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.budget import parse_budgets
from mpqc.data import open_data
from mpqc.graph import Array, Graph
from mpqc.plan import Plan
from mpqc.search import load, make_problem
from mpqc.search.channels import plan_problems
from mpqc.train import folded, load_graph
from mpqc.train.batches import SetData, TrainingSet
from mpqc.train.loop import Recipe
from mpqc.train.objective import Objective
from mpqc.train.trainer import PlanTrainer
from tests.train.test_quantized_layer import BLOCK

METHODS = {
    "ebs": {"samples": "2"},
    "dnas": {"samples": "0", "share_weights": "true", "weights_share": "0.5"},
    "fracbits": {"samples": "2"},
    "fracbits by channel": {"granularity": "kernel", "prune": "true", "quantizer": "lsq"},
    "alps": {"epochs": "0.5", "start": "0.5", "metric": "train_loss", "samples": "2"},
}


def search(
    graph: Graph, method: str, batch: int, count: int, widths: tuple[int, ...] = (2, 4, 8)
) -> Plan:
    """A few steps on random samples; the plan keeps its budget."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {
        name: rng.standard_normal((count, *kind.shape[1:])).astype(np.float32)
        for name, kind in graph.inputs.items()
    }
    flat = folded(graph)
    samples = TrainingSet.read(open_data(arrays, flat), graph)
    training, held = samples.split(0.0, 0, 0)
    trainer = PlanTrainer(
        graph, flat, SetData(training, next(iter(graph.inputs.values())).shape[0]), training, held,
        Objective.of(graph, False), Recipe(epochs=1, batch_size=batch), device="cpu",
    )  # fmt: skip
    labels: list[str] = []
    problem = make_problem(
        flat, parse_budgets("bitops=w4a4"), widths, trainer=trainer,
        progress=lambda label, done, total: labels.append(label),
    )  # fmt: skip
    name = method.partition(" ")[0]
    plan = load(name, METHODS[method])(problem)
    assert plan_problems(problem, plan) == []
    assert labels
    assert all("nan" not in label for label in labels)
    return plan


@pytest.mark.parametrize("method", METHODS)
def test_a_transformer_block(method: str) -> None:
    plan = search(Graph.parse(BLOCK), method, 4, 24)
    assert search(Graph.parse(BLOCK), method, 4, 24) == plan


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_mobilenet_v2(method: str, shared_models: Path) -> None:
    widths = (2, 4) if method == "alps" else (2, 4, 8)  # a trial for each tensor and narrower width
    search(load_graph(shared_models / "mobilenet_v2_1.0_224.onnx"), method, 2, 8, widths)
