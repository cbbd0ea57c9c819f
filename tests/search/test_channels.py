"""Widths by channel: costs of plans, checks, and the choice under budgets."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from mpqc.errors import PlanError
from mpqc.graph import Precision
from mpqc.plan import LayerPlan, Plan
from mpqc.search import precisions
from mpqc.search.channels import (
    ChannelScores,
    channel_plan,
    choose_channels,
    plan_cost,
    plan_problems,
    plan_total,
)
from mpqc.search.problem import Problem
from mpqc.search.testing import toy_problem


def mixed(problem: Problem, bits: tuple[int, ...]) -> Plan:
    """All at w3a3, ``main`` by channel."""
    plan = problem.plan(problem.snap(dict.fromkeys(problem.choices, Precision(3, 3))), "test")
    main = LayerPlan(weight_bits=bits, activation_bits=3)
    return plan.model_copy(update={"layers": {**plan.layers, "main": main}})


def test_each_channel_counts_its_share() -> None:
    problem = toy_problem("bitops=w8a8")
    plan = mixed(problem, (0, 4, 2, 2) * 4)
    layer, whole = problem.layer("main"), precisions(plan) | {"main": Precision(3, 3)}
    for name, per_bit in (("bitops", layer.macs * 3), ("size", layer.weights / 8)):
        assert plan_cost(problem, plan, name) == problem.cost(whole, name) - per_bit
    assert plan_problems(problem, plan) == []
    tight = replace(problem, budgets={"bitops": plan_cost(problem, plan, "bitops") - 1})
    assert "budget" in plan_problems(tight, plan)[0]
    assert "no candidate" in plan_problems(problem, mixed(problem, (5, 8) * 8))[0]


def choices(problem: Problem, rng: np.random.Generator) -> list[ChannelScores]:
    """Two channels of ``main`` and one width for each other layer."""
    found = []
    for layer in problem.layers:
        widths = sorted({p.weight for p in problem.choices[layer.name]})
        count = 2 if layer.name == "main" else 1
        rows = np.sort(rng.random((count, len(widths))), axis=1)[:, ::-1]
        found.append(ChannelScores((layer.name,), dict(zip(widths, rows.T, strict=True))))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_near_the_best_of_all_choices(seed: int) -> None:
    """Against brute force: within the budget, and at most a step's loss from the optimum."""
    problem = toy_problem("bitops=w3a3")
    scores = choices(problem, np.random.default_rng(seed))
    inputs = dict.fromkeys(problem.choices, 3) | {"first": 8, "classifier": 8}
    start = problem.snap({n: Precision(2, a) for n, a in inputs.items()})
    got = choose_channels(problem, inputs, scores, start)

    def cost(widths: dict[str, tuple[int, ...]]) -> float:
        return sum(
            problem.costs["bitops"](problem.layer(n), Precision(b, inputs[n])) / len(row)
            for n, row in widths.items()
            for b in row
        )

    def loss(widths: dict[str, tuple[int, ...]]) -> float:
        rows = {score.layers[0]: score.losses for score in scores}
        return float(sum(rows[n][b][i] for n, row in widths.items() for i, b in enumerate(row)))

    limit = problem.budgets["bitops"]
    assert cost(got) <= limit
    every = [
        [
            (score.layers[0], bits)
            for bits in product(score.losses, repeat=len(got[score.layers[0]]))
        ]
        for score in scores
    ]
    best = min(loss(dict(each)) for each in product(*every) if cost(dict(each)) <= limit)
    assert best - 1e-9 <= loss(got) <= best + 0.7


def test_a_layer_keeps_a_channel() -> None:
    problem = toy_problem("bitops=w2a2")
    scores = [
        ChannelScores((layer.name,), {p.weight: np.zeros(1) for p in problem.choices[layer.name]})
        for layer in problem.layers
        if layer.name != "main"
    ]
    scores.append(ChannelScores(("main",), {0: np.zeros(16), 2: np.full(16, 9.0)}))
    inputs = dict.fromkeys(problem.choices, 2) | {"first": 8, "classifier": 8}
    start = problem.snap({n: Precision(2, a) for n, a in inputs.items()})
    tight = replace(problem, budgets={"bitops": problem.cost(start, "bitops") - 60_000})
    widths = choose_channels(tight, inputs, scores, start)
    assert max(widths["main"]) == 2
    whole = {la.name: widths[la.name] if len(widths[la.name]) > 1
             else widths[la.name] * la.channels_out for la in problem.layers}  # fmt: skip
    plan = channel_plan(tight, whole, inputs, "test")
    assert plan.search is not None
    assert plan.search.cost == plan_total(tight, plan)
    with pytest.raises(PlanError, match="broke the rules"):
        channel_plan(replace(tight, budgets={"bitops": 1.0}), whole, inputs, "test")
