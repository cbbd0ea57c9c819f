"""Learned losses, corrected by plans that are measured."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from mpqc.graph import Precision
from mpqc.search import precisions
from mpqc.search.beliefs import Beliefs, measured_plan
from mpqc.search.constraints import Constraints
from mpqc.search.problem import Problem, Widths
from mpqc.search.repair import filled, repair
from mpqc.search.solve import Losses, solve
from mpqc.search.testing import CASES, between, toy_problem
from mpqc.search.uniform import Uniform

BASE = 0.1


def learned(asked: Problem, seed: int = 4) -> Losses:
    """Sums of losses of weights and of inputs."""
    rng = np.random.default_rng(seed)
    found: dict[str, dict[Precision, float]] = {}
    of_input = {group: float(rng.random()) for group in asked.groups}
    for name, row in asked.choices.items():
        (data,) = (loss for group, loss in of_input.items() if name in group)
        own = float(rng.random())
        found[name] = {p: own * 4.0**-p.weight + data * 4.0**-p.activation for p in row}
    return found


class Truth:
    """Plans lose what was learned, but weights and inputs by factors of their own."""

    def __init__(self, losses: Losses, weights: float, inputs: float, luck: float = 0.0) -> None:
        self.losses = {
            name: {p: self._true(row, p, weights, inputs) for p in row}
            for name, row in losses.items()
        }
        self.seen: list[Widths] = []
        self._rng, self._luck = np.random.default_rng(8), luck

    @staticmethod
    def _true(row: Mapping[Precision, float], p: Precision, weights: float, inputs: float) -> float:
        wide = max(row, key=str)
        of_weights = row[Precision(p.weight, wide.activation)] - row[wide]
        return weights * of_weights + inputs * (row[p] - row[wide] - of_weights)

    def of(self, widths: Widths) -> float:
        return BASE + sum(self.losses[name][p] for name, p in widths.items())

    def __call__(self, widths: Widths) -> float:
        self.seen.append(widths)
        return self.of(widths) * (1 + self._luck * float(self._rng.standard_normal()))


@pytest.mark.parametrize("factors", [(0.3, 2.0), (3.0, 0.5)])
def test_what_was_learned_wrong_is_corrected(factors: tuple[float, float]) -> None:
    asked = toy_problem("bitops=w3a3")
    truth = Truth(learned(asked), *factors)
    best = truth.of(solve(asked, truth.losses))
    start = truth.of(repair(asked, learned(asked)))
    found = truth.of(measured_plan(asked, learned(asked), 12, truth))
    assert start > best * 1.05  # or there would be nothing to correct
    assert found - best < 0.2 * (start - best)


def test_units_do_not_matter() -> None:
    asked = toy_problem("bitops=w3a3")
    plain = measured_plan(asked, learned(asked), 8, Truth(learned(asked), 0.3, 2.0))
    scaled = {
        name: {p: 1e4 * loss for p, loss in row.items()} for name, row in learned(asked).items()
    }
    assert measured_plan(asked, scaled, 8, Truth(learned(asked), 0.3, 2.0)) == plain


def test_the_luck_of_a_measurement_is_seen_through() -> None:
    """Of plans that are all alike the one that was measured best is not expected to be so good."""
    asked = toy_problem("bitops=w3a3")
    losses = learned(asked)
    truth = Truth(losses, 1.0, 1.0)
    beliefs = Beliefs(asked, losses, BASE)
    rng = np.random.default_rng(0)
    plans = [repair(asked, beliefs.losses(beliefs.factors(rng))) for _ in range(12)]
    for widths in plans:
        beliefs.tell(widths, truth.of(widths))
    lucky = truth.of(plans[5]) * 0.9
    beliefs.tell(plans[5], lucky)
    expected = beliefs.expected()[-1]
    assert lucky < expected
    assert truth.of(plans[5]) - expected < 0.5 * (truth.of(plans[5]) - lucky)


def test_the_uniform_plan_wins_where_it_is_best() -> None:
    asked = toy_problem("bitops=w3a3")
    even = filled(asked, learned(asked), precisions(Uniform()(asked)))

    def measure(widths: Widths) -> float:
        return (
            1.0
            if widths == even
            else 3.0 - (asked.cost(widths, "bitops") > 2 * asked.budgets["bitops"])
        )

    assert measured_plan(asked, learned(asked), 6, measure) == even


def test_nothing_is_measured_where_nothing_is_asked() -> None:
    asked = toy_problem("bitops=w3a3")
    truth = Truth(learned(asked), 1.0, 1.0)
    assert measured_plan(asked, learned(asked), 0, truth) == repair(asked, learned(asked))
    assert truth.seen == []


@pytest.mark.parametrize("case", CASES)
def test_plans_keep_the_rules_and_none_is_measured_twice(case: str) -> None:
    asked = between(toy_problem(constraints=CASES[case]), {"bitops": 0.3})
    truth = Truth(learned(asked), 0.5, 1.5)
    found = measured_plan(asked, learned(asked), 5, truth)
    assert asked.problems(found) == []
    widest, *rest = truth.seen
    assert all(asked.fits(widths) for widths in rest)
    assert not any(asked.cost(widths, "bitops") > asked.cost(widest, "bitops") for widths in rest)
    assert len({str(widths) for widths in rest[2:]}) == len(rest[2:])
    again = Truth(learned(asked), 0.5, 1.5)
    assert measured_plan(asked, learned(asked), 5, again) == found
    assert again.seen == truth.seen


def test_pairs_of_widths_that_are_no_grid() -> None:
    """Precisions whose losses are no sums of two are parts of their own."""
    asked = toy_problem("bitops=w3a3")
    pairs = (Precision(2, 4), Precision(3, 3), Precision(4, 2), Precision(8, 8))
    choices = {n: row if len(row) == 1 else pairs for n, row in asked.choices.items()}
    asked = replace(asked, choices=choices)
    rng = np.random.default_rng(3)
    losses = {n: {p: float(rng.random()) for p in row} for n, row in choices.items()}
    beliefs = Beliefs(asked, losses, BASE)
    assert {part.kind for part in beliefs.parts} == {"layer"}
    assert beliefs.losses(beliefs.factors()).keys() == losses.keys()
    truth = Truth.__new__(Truth)
    truth.losses = {n: {p: 4.0**-p.weight for p in row} for n, row in choices.items()}
    truth.seen, truth._luck, truth._rng = [], 0.0, rng
    found = measured_plan(asked, losses, 10, truth)
    assert asked.problems(found) == []
    assert truth.of(found) == min(truth.of(widths) for widths in truth.seen if asked.fits(widths))


def test_losses_of_zero_and_below_still_tell_widths_apart() -> None:
    asked = toy_problem("bitops=w3a3")
    for value in (0.0, -1.0):
        losses = {
            n: {p: value * (p != max(row, key=str)) for p in row}
            for n, row in asked.choices.items()
        }
        beliefs = Beliefs(asked, losses, BASE)
        rows = beliefs.losses(beliefs.factors())
        narrow, wide = Precision(2, 2), Precision(3, 3)
        assert all(row[narrow] > row[wide] for row in rows.values() if narrow in row)


def test_a_tensor_that_seems_to_lose_nothing_can_be_found_to_lose() -> None:
    """Without full trust in a loss of nearly zero, few measurements put it right."""
    asked = toy_problem("bitops=w3a3")
    truth = Truth(learned(asked), 1.0, 1.0)
    wrong = {
        name: {p: loss * (1e-4 if name == "main" else 1.0) for p, loss in row.items()}
        for name, row in learned(asked).items()
    }
    best = truth.of(solve(asked, truth.losses))
    full, some = (truth.of(measured_plan(asked, wrong, 8, truth, t)) for t in (1.0, 0.4))
    assert best <= some < full


def test_a_plan_that_cannot_be_measured_is_not_taken() -> None:
    asked = toy_problem("bitops=w3a3")
    truth = Truth(learned(asked), 0.3, 2.0)
    start = repair(asked, learned(asked))
    spoiled = measured_plan(
        asked, learned(asked), 4, lambda widths: np.inf if widths == start else truth(widths)
    )
    assert spoiled != start
    count = 0

    def measure(widths: Widths) -> float:
        nonlocal count
        count += 1
        return np.inf if count > 3 else truth(widths)

    assert measured_plan(asked, learned(asked), 4, measure) in truth.seen


def test_shared_tensors_are_one_part() -> None:
    asked = toy_problem("bitops=w3a3", constraints=Constraints(tie=(("main", "pointwise"),)))
    parts = Beliefs(asked, learned(asked), BASE).parts
    tied = {part.names for part in parts if part.kind == "weights" and len(part.names) > 1}
    assert tied == {("main", "pointwise")}
    assert {part.names for part in parts if part.kind == "inputs"} == set(asked.groups)


@pytest.mark.parametrize("loss", [0.0, 1.0, -1.0])
def test_plans_that_all_lose_the_same_are_no_trouble(loss: float) -> None:
    asked = toy_problem("bitops=w3a3")
    found = measured_plan(asked, learned(asked), 4, lambda widths: loss)
    assert asked.problems(found) == []
