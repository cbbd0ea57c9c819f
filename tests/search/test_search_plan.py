"""The whole search on real models."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mpqc import importer
from mpqc.errors import BudgetError, DataError, PlanError, UsageError
from mpqc.graph import Precision
from mpqc.passes.estimate_cost import estimate_cost
from mpqc.passes.find_layers import find_layers
from mpqc.pipeline import import_model
from mpqc.plan import Plan
from mpqc.search import Search, SearchResult, batch_for, precisions, report, search_plan
from mpqc.search.problem import Problem
from mpqc.search.testing import toy_graph

CLASSIFIERS = [
    "cifar10_resnet20",
    "cifar10_resnet8",
    "mnist_cnn",
    "mobilenet_v1_0.25_224",
    "mobilenet_v2_1.0_224",
    "ppocr_v2_angle_cls",
    "squeezenet1.0_sparse",
]


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("budget", ["bitops=w4a4", "bitops=w3a3", "size=w3a3"])
def test_eagl_needs_no_data(name: str, budget: str, shared_models: Path) -> None:
    model = shared_models / f"{name}.onnx"
    dims = {"x:2": 48, "x:3": 192} if name.startswith("ppocr") else {}
    result = search_plan(model, method="eagl", budgets=budget, dims=dims)
    graph = import_model(model, dims)
    result.plan.check(graph, importer.sha256(model))
    cost = estimate_cost(graph, result.plan)
    objective = budget.partition("=")[0]
    assert getattr(cost, objective) <= result.problem.budgets[objective]
    assert result.plan.search is not None
    assert result.plan.search.cost == {"size": cost.size, "bitops": float(cost.bitops)}


def test_the_budget_of_a_uniform_build_is_its_cost(shared_models: Path) -> None:
    model = shared_models / "cifar10_resnet20.onnx"
    result = search_plan(model, method="uniform", budgets=["bitops=w4a4", "size=w4a4"])
    graph = import_model(model)
    uniform = Plan.uniform(graph, Precision(4, 4))
    assert result.plan.layers == uniform.layers
    assert result.problem.budgets["bitops"] == estimate_cost(graph, uniform).bitops == 670_081_024


def test_eagl_on_mobilenet_v2_takes_seconds(shared_models: Path) -> None:
    start = time.process_time()  # a busy machine adds none
    search_plan(
        shared_models / "mobilenet_v2_1.0_224.onnx", method="eagl", budgets="bitops=0.8*w4a4"
    )
    assert time.process_time() - start < 10


@pytest.fixture
def pictures(tmp_path: Path, shared_data: Path) -> tuple[Path, Path]:
    """64 CIFAR-10 training pictures, and how they become numbers."""
    with np.load(shared_data / "cifar10_train15k.npz") as arrays:
        np.savez(tmp_path / "some.npz", x=arrays["x"][:64], labels=arrays["y"][:64])
    (tmp_path / "p.toml").write_text(
        "scale = 0.00392156862745098\nmean = [0.485, 0.456, 0.406]\nstd = [0.229, 0.224, 0.225]\n"
    )
    return tmp_path / "some.npz", tmp_path / "p.toml"


@pytest.mark.parametrize("method", ["sensitivity", "hawq", "progressive"])
def test_methods_that_measure(
    method: str, shared_models: Path, pictures: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def searched(budget: str) -> SearchResult:
        return search_plan(
            shared_models / "cifar10_resnet8.onnx", method=method, budgets=budget,
            data=pictures[0], preprocess=pictures[1], widths=(2, 4), cache=tmp_path / "cache",
            options={"samples": "32"},
        )  # fmt: skip

    first = searched("bitops=0.6*w4a4")
    assert len({str(p) for p in first.widths().values()}) > 1
    monkeypatch.setattr("mpqc.ort.Session", None)
    assert searched("bitops=0.6*w4a4").plan == first.plan
    wider = searched("bitops=0.9*w4a4")
    assert wider.problem.cost(wider.widths(), "bitops") >= first.problem.cost(
        first.widths(), "bitops"
    )


def test_says_what_is_missing_or_wrong(shared_models: Path, tmp_path: Path) -> None:
    model = shared_models / "cifar10_resnet8.onnx"
    with pytest.raises(UsageError, match="'sensitivity' needs calibration data"):
        search_plan(model, method="sensitivity", budgets="bitops=w4a4")
    with pytest.raises(UsageError, match="mpqc profile"):
        search_plan(model, method="uniform", budgets="latency=5ms")
    with pytest.raises(UsageError, match="needs a budget"):
        search_plan(model, method="uniform", budgets=[])
    with pytest.raises(BudgetError, match=r"size=10 kB cannot be met: the cheapest plan.*2 layers"):
        search_plan(model, method="eagl", budgets="size=10kB")
    bad = tmp_path / "c.toml"
    bad.write_text('exclude = ["conv_99"]')
    with pytest.raises(UsageError, match="near names: conv_"):
        search_plan(model, method="eagl", budgets="size=w4a4", constraints=bad)
    with pytest.raises(DataError):
        search_plan(model, method="hawq", budgets="size=w4a4", data=tmp_path / "none.npz")


class _Lazy(Search):
    needs = frozenset({"labels", "trainer"})

    def __call__(self, problem: Problem) -> Plan:
        return "w4a4"  # type: ignore[return-value]


def test_what_a_plugin_needs_is_asked_for(
    shared_models: Path, pictures: tuple[Path, Path], tmp_path: Path
) -> None:
    model = shared_models / "cifar10_resnet20.onnx"
    with pytest.raises(UsageError, match="needs calibration data"):
        search_plan(model, method=_Lazy(), budgets="size=w4a4")
    with pytest.raises(UsageError, match=r"trains.*mpqc\[train\]"):
        search_plan(model, method=_Lazy(), budgets="size=w4a4", data=pictures[0])
    np.savez(tmp_path / "bare.npz", x=np.zeros((4, 32, 32, 3), np.uint8))

    class Trainer:
        def train(self, widths: object, epochs: float) -> float:
            return 0.0

    with pytest.raises(UsageError, match="needs labels"):
        search_plan(
            model, method=_Lazy(), budgets="size=w4a4", data=tmp_path / "bare.npz",
            preprocess=pictures[1], trainer=Trainer(),
        )  # fmt: skip
    with pytest.raises(PlanError, match="returned str, not a Plan"):
        search_plan(
            model, method=_Lazy(), budgets="size=w4a4", data=pictures[0],
            preprocess=pictures[1], trainer=Trainer(),
        )  # fmt: skip


def test_tables_add_up(shared_models: Path) -> None:
    model = shared_models / "cifar10_resnet20.onnx"
    result = search_plan(model, method="eagl", budgets="bitops=0.8*w4a4")
    found = report.to_json(result)
    for objective, cost in found["cost"].items():
        assert sum(row["cost"][objective] for row in found["layers"]) == cost
        assert sum(row["share"][objective] for row in found["layers"]) == pytest.approx(1)
    assert Plan.parse(json.dumps(found["plan"])) == result.plan
    assert found["uniform"]["cost"]["bitops"] <= found["budget"]["bitops"]
    text = "\n".join(report.summary(result))
    assert "of the budget 536.1 M" in text
    assert "widest uniform plan that fits: 18 layers w2a4" in text
    assert set(precisions(result.plan)) == {row["name"] for row in found["layers"]}


def test_batches_stay_small(shared_models: Path) -> None:
    assert batch_for(toy_graph()) == 32
    assert batch_for(import_model(shared_models / "mobilenet_v2_1.0_224.onnx")) == 1


def test_a_model_that_fixes_its_batch_is_measured_at_that(
    shared_models: Path, shared_data: Path
) -> None:
    with np.load(shared_data / "mnist_test_a.npz") as arrays:
        pictures = {"Input3": arrays["x"][:8, None].astype(np.float32)}
    result = search_plan(
        shared_models / "mnist_cnn.onnx", method="sensitivity", budgets="bitops=w4a4",
        data=pictures, ends=None, widths=["2", "4"],
    )  # fmt: skip
    assert len(result.plan.layers) == 3


def test_importing_is_cheap() -> None:
    code = (
        "import sys, mpqc.search, mpqc.cli_search, mpqc.budget;"
        "print([m for m in ('scipy', 'onnx', 'onnxruntime', 'tvm', 'matplotlib', 'torch')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_layers_are_counted_for_one_sample(
    shared_models: Path, pictures: tuple[Path, Path]
) -> None:
    model = shared_models / "cifar10_resnet20.onnx"
    result = search_plan(
        model, method="uniform", budgets="size=w4a4", data=pictures[0], preprocess=pictures[1]
    )
    assert result.problem.graph is not None
    assert next(iter(result.problem.graph.inputs.values())).shape[0] > 1
    assert sum(layer.macs for layer in result.problem.layers) == 40_551_040
    assert len(find_layers(result.problem.graph)) == 20
