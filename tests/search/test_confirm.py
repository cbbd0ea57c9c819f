"""A plan is compared with the uniform one as a whole network."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from mpqc.data import open_data
from mpqc.demo import files
from mpqc.graph import Precision
from mpqc.pipeline import import_model
from mpqc.plan import Plan
from mpqc.search import precisions, report, search_plan
from mpqc.search.base import Search
from mpqc.search.confirm import output_noise
from mpqc.search.problem import Problem

DEMO = files()


@dataclass(frozen=True)
class Narrowest(Search):
    """Keeps every budget and nothing else."""

    def __call__(self, problem: Problem) -> Plan:
        narrow = {
            name: min(choices, key=lambda p: p.weight * p.activation)
            for name, choices in problem.choices.items()
        }
        return problem.plan(problem.snap(narrow), "narrowest")


def test_more_bits_make_less_noise() -> None:
    graph = import_model(DEMO.model)
    data = open_data(DEMO.calibration, graph)
    noises = [
        output_noise(graph, Plan.uniform(graph, Precision(bits, bits)), data, samples=32)
        for bits in (2, 4, 8)
    ]
    assert noises[0] > noises[1] > noises[2] > 0
    assert noises[2] < 0.01


@pytest.mark.parametrize("confirmed", [False, True])
def test_a_worse_plan_gives_way_to_the_uniform_one(confirmed: bool) -> None:
    result = search_plan(
        DEMO.model,
        method=Narrowest(),
        budgets="bitops=w4a4",
        data=Path(DEMO.calibration),
        widths=[2, 4],
        confirmed=confirmed,
    )
    widths = set(precisions(result.plan).values())
    text = "\n".join(report.summary(result))
    if not confirmed:
        assert Precision(2, 2) in widths
        assert not result.noise
        return
    assert Precision(4, 4) in widths
    assert Precision(2, 2) not in widths
    assert result.noise["uniform"] < result.noise["plan"]
    assert "mixed loses to uniform" in text
    assert report.to_json(result)["noise"] == dict(result.noise)


def test_a_better_plan_stays() -> None:
    result = search_plan(
        DEMO.model,
        method="sensitivity",
        budgets="bitops=w3a3",
        data=Path(DEMO.calibration),
        widths=[2, 3, 4, 6, 8],
        confirmed=True,
    )
    if result.plan.layers != (result.uniform.layers if result.uniform else None):
        assert result.noise["plan"] <= result.noise["uniform"]
        assert "mixed wins over uniform" in "\n".join(report.summary(result))
    else:
        assert result.noise["uniform"] < result.noise["plan"]


def test_a_uniform_plan_without_scores_is_shown_all_the_same() -> None:
    """EAGL scores w2a2 and w4a4 only; the uniform plan that replaces it may hold w2a4."""
    result = search_plan(
        DEMO.model,
        method="eagl",
        budgets="bitops=w3a3",
        data=Path(DEMO.calibration),
        confirmed=True,
    )
    assert report.to_json(result)["noise"] == dict(result.noise)
    report.table(result)
