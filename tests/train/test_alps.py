"""ALPS against brute force: trials as the specification has them, and the best of all plans."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.errors import UsageError
from mpqc.graph import Precision
from mpqc.search import load, precisions
from mpqc.search.alps import Alps, group_levels, losses_of, tensor_levels, widest, with_ties
from mpqc.search.constraints import Constraints
from mpqc.search.problem import Problem
from mpqc.search.solve import solve
from mpqc.search.testing import between, toy_graph, toy_problem
from mpqc.train.loop import TrainingDiverged
from mpqc.train.objective import Objective
from mpqc.train.search import alps
from tests.train.contract import toy_trainer


def problem(**changes: Any) -> Problem:
    made = replace(toy_problem(), trainer=toy_trainer(), **changes)
    four = {
        name: tuple(p for p in row if {p.weight, p.activation} <= {2, 4} or len(row) == 1)
        for name, row in made.choices.items()
    }
    return replace(made, choices=four)


def test_a_trial_narrows_one_group_of_the_trained_network() -> None:
    asked = problem()
    levels = group_levels(asked)
    assert levels[("main", "shortcut")] == {
        2: {"main": Precision(2, 2), "shortcut": Precision(2, 2)},
        4: {"main": Precision(4, 4), "shortcut": Precision(4, 4)},
    }
    assert list(levels[("first",)].values()) == [{"first": Precision(8, 8)}]
    method = Alps(epochs=0.4, start=0.4, metric="val_acc")
    reference, found = alps.measure(asked, method, levels)
    assert set(found) == {
        (group, 2) for group in (("main", "shortcut"), ("depthwise",), ("pointwise",))
    }

    trainer = toy_trainer()
    wide = {n: Precision(8, 8) if n in ("first", "classifier") else Precision(4, 4)
            for n in asked.choices}  # fmt: skip
    four = trainer.network(trainer.plan(wide))
    trainer.fit(four, 0.4)
    by_hand = replace(trainer, checkpoint=four)
    assert by_hand.train(wide, 0.4) == reference
    for (group, width), value in found.items():
        narrow = wide | dict.fromkeys(group, Precision(width, width))
        assert by_hand.train(narrow, 0.4) == value


def test_a_trial_narrows_one_tensor_where_tensors_are_groups() -> None:
    asked = problem()
    levels = tensor_levels(asked)
    assert levels["weights of", "main"] == {
        2: {"main": Precision(2, 4)}, 4: {"main": Precision(4, 4)},
    }  # fmt: skip
    assert levels["input of", "main", "shortcut"] == {
        2: {"main": Precision(4, 2), "shortcut": Precision(4, 2)},
        4: {"main": Precision(4, 4), "shortcut": Precision(4, 4)},
    }
    assert list(levels["weights of", "first"].values()) == [{"first": Precision(8, 8)}]
    assert widest(levels) == widest(group_levels(asked))
    drops = {
        (("weights of", "main"), 2): 0.25,
        (("weights of", "shortcut"), 2): 0.5,
        (("input of", "main", "shortcut"), 2): 1.0,
    }
    losses = losses_of(asked, levels, drops)
    assert losses["main"] == {
        Precision(2, 2): 0.75, Precision(2, 4): 0.25, Precision(4, 2): 0.5, Precision(4, 4): 0.0,
    }  # fmt: skip
    assert losses["shortcut"][Precision(2, 2)] == 1.0
    assert all(losses[name].keys() == set(row) for name, row in asked.choices.items())


def test_tied_weights_are_one_tensor() -> None:
    tied = Constraints(tie=(("main", "pointwise"),))
    levels = tensor_levels(replace(toy_problem(constraints=tied), trainer=toy_trainer()))
    assert set(levels["weights of", "main", "pointwise"][2]) == {"main", "pointwise"}
    assert ("weights of", "main") not in levels


def test_pairs_that_are_no_grid_are_tried_by_layers() -> None:
    asked = problem()
    equal = {
        name: tuple(p for p in row if p.weight == p.activation)
        for name, row in asked.choices.items()
    }
    asked = replace(asked, choices=equal)
    assert tensor_levels(asked) == group_levels(asked)


def test_the_knapsack_is_that_of_brute_force() -> None:
    asked = between(problem(), {"bitops": 0.35})
    levels = group_levels(asked)
    groups = [group for group, rows in levels.items() if len(rows) > 1]
    gains = dict(zip(groups, (0.03, 0.0, 0.011), strict=True))
    losses = losses_of(asked, levels, {(group, 2): gain for group, gain in gains.items()})
    found = solve(asked, losses)
    best = min(

            (sum(gains[g] for g, wide in zip(groups, kept, strict=True) if not wide), cost)
            for kept in product((False, True), repeat=len(groups))
            for plan in [
                {n: p for g, rows in levels.items()
                 for n, p in rows[
                     min(rows) if g in groups and not kept[groups.index(g)] else max(rows)
                 ].items()}
            ]
            for cost in [asked.cost(plan, "bitops")]
            if cost <= asked.budgets["bitops"]

    )  # fmt: skip
    lost = sum(losses[name][p] for name, p in found.items())
    assert lost == pytest.approx(best[0])
    assert asked.cost(found, "bitops") == best[1]


@pytest.mark.parametrize("metric", ["val_loss", "train_acc", "train_loss"])
def test_other_metrics(metric: str) -> None:
    asked = problem()
    method = load("alps", {"metric": metric, "epochs": "0.4", "start": "0.4"})
    scores = method.scores(asked)  # type: ignore[attr-defined]
    assert scores.unit.startswith("loss" if metric.endswith("loss") else "accuracy")
    assert all(loss >= 0 for row in scores.losses.values() for loss in row.values())
    if metric.endswith("loss"):
        assert any(loss > 0 for row in scores.losses.values() for loss in row.values())


def test_another_budget_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Alps(epochs=0.2, start=0.2, samples=0)
    asked = between(problem(cache=tmp_path), {"bitops": 0.3})
    first = method(asked)
    monkeypatch.setattr(alps, "trial", None)
    monkeypatch.setattr(alps, "_start", None)
    assert method(asked) == first
    other = between(asked, {"size": 0.9})
    assert other.problems(precisions(method(other))) == []


def test_divergence_keeps_what_had_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, asked = Alps(epochs=0.2, start=0.2), problem(cache=tmp_path)
    exact, calls = alps.trial, []

    def diverge(*given: Any) -> float:
        calls.append(1)
        if len(calls) == 3:
            monkeypatch.setattr(
                Objective, "loss", lambda self, outputs, *_: next(iter(outputs.values())).sum() / 0
            )
        return exact(*given)

    with monkeypatch.context() as patch:
        patch.setattr(alps, "trial", diverge)
        with pytest.raises(TrainingDiverged, match="diverged at step 0"):
            method(asked)
    (kept,) = tmp_path.glob("alps-*/trials.jsonl")
    assert len(kept.read_text().splitlines()) == 2


def test_pinned_layers_are_not_tried() -> None:
    constraints = Constraints(pin={"depthwise": "w3a4"}, tie=(("main", "pointwise"),))
    levels = group_levels(replace(toy_problem(constraints=constraints), trainer=toy_trainer()))
    assert list(levels[("depthwise",)].values()) == [{"depthwise": Precision(3, 4)}]
    tied = next(group for group in levels if "main" in group)
    assert {"main", "shortcut", "pointwise"} == set(tied)
    assert all(row["main"] == row["pointwise"] for row in levels[tied].values())
    assert set(toy_graph().constants)


def test_groups_that_lose_nothing_use_the_budget() -> None:
    asked = between(problem(), {"bitops": 1.0})
    levels = group_levels(asked)
    trials = {(group, 2): 0.0 for group, rows in levels.items() if len(rows) > 1}
    assert solve(asked, losses_of(asked, levels, with_ties(trials))) == widest(levels)
    some = with_ties(trials | {(("depthwise",), 2): 0.01})
    assert 0.01 < some[("depthwise",), 2] < 0.010001


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="positive"):
        Alps(epochs=0)
    with pytest.raises(UsageError, match="not negative"):
        Alps(samples=-1)
