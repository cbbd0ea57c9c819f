"""Plans drawn around what a search learned, and the best of them on held-out samples."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.graph import Precision
from mpqc.search import precisions
from mpqc.search.ebs import Ebs
from mpqc.search.problem import Problem
from mpqc.search.repair import filled, repair
from mpqc.search.solve import Losses
from mpqc.search.testing import toy_problem
from mpqc.search.uniform import Uniform
from mpqc.train.search import pick
from mpqc.train.search.pick import drawn, held_loss, picked
from tests.train.contract import toy_trainer


def problem(budget: str = "bitops=w3a3", **changes: Any) -> Problem:
    return toy_problem(budget, **{"trainer": toy_trainer(), **changes})


def losses(asked: Problem) -> Losses:
    """Sums of losses of weights and of inputs."""
    rng = np.random.default_rng(4)
    return {
        name: {p: float(w) * 4.0**-p.weight + float(a) * 4.0**-p.activation for p in row}
        for (name, row), (w, a) in zip(
            asked.choices.items(), rng.random((len(asked.choices), 2)), strict=True
        )
    }


def test_drawn_plans_differ_and_keep_the_budgets() -> None:
    asked = problem()
    plans = drawn(asked, losses(asked), 6)
    assert plans[0] == repair(asked, losses(asked))
    assert filled(asked, losses(asked), precisions(Uniform()(asked))) in plans
    assert 2 < len(plans) <= 8
    assert all(asked.problems(plan) == [] for plan in plans)
    assert all(plan not in plans[:number] for number, plan in enumerate(plans))
    assert drawn(asked, losses(asked), 6) == plans
    assert drawn(replace(asked, seed=1), losses(asked), 6) != plans


def test_factors_of_one_change_no_difference() -> None:
    asked = problem()
    for row in losses(asked).values():
        same = pick._scaled(row, 1.0, 1.0)
        base = next(iter(row))
        for p, loss in row.items():
            assert same[p] - same[base] == pytest.approx(loss - row[base])
    pairs = {Precision(1, 4): 0.5, Precision(2, 2): 0.3, Precision(4, 4): 0.1}
    assert pick._scaled(pairs, 4.0, 1.0)[Precision(2, 2)] == pytest.approx(2 * (0.3 - 0.1))


def test_the_best_on_held_out_samples_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = problem(cache=tmp_path)
    trainer = toy_trainer()
    plans = drawn(asked, losses(asked), 1)
    teacher = trainer.teacher()
    expected = min(
        plans, key=lambda w: held_loss(trainer, trainer.network(trainer.plan(w)), teacher)
    )
    assert picked(asked, Ebs(), plans) == expected
    monkeypatch.setattr(pick, "held_loss", None)  # a second run reads what the first measured
    assert picked(asked, Ebs(), plans) == expected
    nobody = replace(trainer, held=replace(trainer.held, chosen=trainer.held.chosen[:0]))
    assert picked(replace(asked, trainer=nobody), Ebs(), plans) == plans[0]
