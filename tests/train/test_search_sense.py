"""Strengths move where it makes sense: a layer that needs no more than one bit gives way."""

import math
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.budget import parse_budgets
from mpqc.data import open_data
from mpqc.graph import Graph
from mpqc.search import load, make_problem
from mpqc.train.batches import SetData, TrainingSet
from mpqc.train.loop import Recipe
from mpqc.train.objective import Objective
from mpqc.train.trainer import PlanTrainer

TEXT = """
%x = Input() : f32[{n},8,6,6]
%w1 = Constant() : f32[12,8,3,3]
%w2 = Constant() : f32[12,12,3,3]
%w3 = Constant() : f32[12,12,3,3]
%w4 = Constant() : f32[6,12]
%v1 = Conv(%x, %w1) {{pads=[1, 1, 1, 1]}} : f32[{n},12,6,6] @first
%r1 = Relu(%v1) : f32[{n},12,6,6]
%v2 = Conv(%r1, %w2) {{pads=[1, 1, 1, 1]}} : f32[{n},12,6,6] @{second}
%r2 = Relu(%v2) : f32[{n},12,6,6]
%v3 = Conv(%r2, %w3) {{pads=[1, 1, 1, 1]}} : f32[{n},12,6,6] @{third}
%r3 = Relu(%v3) : f32[{n},12,6,6]
%p = GlobalAveragePool(%r3) : f32[{n},12,1,1]
%f = Flatten(%p) : f32[{n},12]
%y = Gemm(%f, %w4) {{transB=1}} : f32[{n},6] @last
return %y
"""


@pytest.mark.parametrize("signs_first", [True, False])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ebs", {"price": "0.5", "choice": "likeliest"}),
        ("ebs", {"strengths": "stochastic", "price": "0.5", "choice": "likeliest"}),
        ("dnas", {"quantizer": "lsq", "weights_share": "0.5"}),
    ],
)
def test_a_layer_of_signs_takes_fewer_bits(
    method: str, options: dict[str, str], signs_first: bool
) -> None:
    rng = np.random.default_rng(3)
    names = {"second": "signs", "third": "rich"} if signs_first else {
        "second": "rich", "third": "signs"}  # fmt: skip
    shapes = {"w1": (12, 8, 3, 3), "w2": (12, 12, 3, 3), "w3": (12, 12, 3, 3), "w4": (6, 12)}
    weights = {
        name: (rng.standard_t(3, shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        for name, shape in shapes.items()
    }
    bipolar = "w2" if signs_first else "w3"
    weights[bipolar] = (np.sign(weights[bipolar]) / np.sqrt(108)).astype(np.float32)
    one, batch = (Graph.parse(TEXT.format(n=n, **names), weights) for n in (1, 16))
    data = open_data({"x": rng.standard_normal((192, 8, 6, 6)).astype(np.float32)}, batch)
    training, held = TrainingSet.read(data, batch).split(0.0, 0, 0)
    objective = replace(Objective.of(one, False), classes={}, distance="mse")
    trainer = PlanTrainer(
        one, batch, SetData(training, 16), training, held, objective,
        Recipe(epochs=8, batch_size=16, lr=1e-4), device="cpu",
    )  # fmt: skip
    problem = make_problem(
        one, parse_budgets("size=w3a8"), ("w1a8", "w2a8", "w3a8", "w5a8"), trainer=trainer
    )
    search = load(method, options)
    losses = search.scores(problem).losses  # type: ignore[attr-defined]

    def mean(name: str) -> float:
        """Expected weight width."""
        return float(sum(p.weight * math.exp(-loss) for p, loss in losses[name].items()))

    assert mean("signs") < mean("rich") - 0.3
