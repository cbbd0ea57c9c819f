"""Plans measured as they are rounded, and what they are judged on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.search import precisions
from mpqc.search.beliefs import measured_plan
from mpqc.search.ebs import Ebs
from mpqc.search.problem import Problem, Widths
from mpqc.search.repair import filled, repair
from mpqc.search.solve import Losses
from mpqc.search.testing import toy_problem
from mpqc.search.uniform import Uniform
from mpqc.train.search.pick import Judge, held_loss, picked
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


def test_plans_are_compared_as_they_are_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = problem(cache=tmp_path)
    seen: dict[str, float] = {}
    exact = Judge.__call__

    def watched(self: Judge, module: Any) -> float:
        hooks = [module.hooks.find(name) for name in asked.choices]
        loss = exact(self, module)
        seen[str([(h.weight.bits, h.data.bits) for h in hooks])] = loss
        return loss

    monkeypatch.setattr(Judge, "__call__", watched)
    found = picked(asked, Ebs(), losses(asked), 3)
    assert asked.problems(found) == []
    assert 2 < len(seen) <= 6

    def remembered(widths: Widths) -> float:
        return seen[str([(widths[n].weight, widths[n].activation) for n in asked.choices])]

    assert measured_plan(asked, losses(asked), 3, remembered) == found
    even = filled(asked, losses(asked), precisions(Uniform()(asked)))
    assert str([(even[n].weight, even[n].activation) for n in asked.choices]) in seen
    monkeypatch.setattr(Judge, "__call__", None)  # a second run reads what the first measured
    assert picked(asked, Ebs(), losses(asked), 3) == found
    learned = repair(asked, losses(asked))
    assert picked(asked, Ebs(), losses(asked), 0) == learned


def test_all_samples_judge_what_is_not_trained() -> None:
    trainer = toy_trainer()
    module = trainer.network(trainer.plan(repair(problem(), losses(problem()))))
    whole = Judge(trainer)(module)
    held = held_loss(trainer, module, trainer.teacher())
    assert Judge(trainer, len(trainer.held))(module) == pytest.approx(held, rel=1e-5)
    count = len(trainer.held) + len(trainer.training)
    rest = replace(trainer, held=trainer.training)
    others = held_loss(rest, module, trainer.teacher())
    mean = (held * len(trainer.held) + others * len(trainer.training)) / count
    assert whole == pytest.approx(mean, rel=1e-5)
