"""reverse and random: what a good method has to beat."""

from dataclasses import dataclass

import numpy as np

from mpqc.errors import BudgetError, UsageError
from mpqc.graph import Precision
from mpqc.plan import Plan
from mpqc.search.base import ScoreSearch, Search, load
from mpqc.search.problem import Problem
from mpqc.search.scores import Scores
from mpqc.search.solve import cheapest, solve


@dataclass(frozen=True)
class Reverse(ScoreSearch):
    """Baseline: the ranking of another method upside down.

    The layer that loses most gets the losses of the one that loses least, and so on. Layers
    change places among those of equal candidates and equal ties.

    Attributes:
        of: name of the method whose scores are reversed.
    """

    of: str = "sensitivity"

    def __post_init__(self) -> None:
        if self.of == "reverse":
            raise UsageError("reverse: name the method to reverse, as in --option of=eagl")

    def scores(self, problem: Problem) -> Scores:
        method = load(self.of)
        if not isinstance(method, ScoreSearch):
            raise UsageError(f"reverse: method {self.of!r} has no scores to reverse")
        found = method.scores(problem)
        swapped = dict(found.losses)
        sizes = {name: len(group) for group in problem.groups for name in group}
        kinds: dict[object, list[str]] = {}
        for name, row in found.losses.items():
            kinds.setdefault((sizes[name], frozenset(row)), []).append(name)
        for names in kinds.values():
            ranked = sorted(names, key=lambda name: spread(found, name))
            swapped |= {
                name: found.losses[other] for name, other in zip(ranked, ranked[::-1], strict=True)
            }
        return Scores(swapped, f"{found.unit}, reversed")

    def name(self) -> str:
        return f"reverse:{self.of}"


def spread(scores: Scores, layer: str) -> float:
    """Loss between the worst and the best candidate of a layer."""
    losses = scores.losses[layer].values()
    return max(losses) - min(losses)


@dataclass(frozen=True)
class Random(Search):
    """Baseline: random layers get one step wider, until nothing more fits. Seeded."""

    def __call__(self, problem: Problem) -> Plan:
        random = np.random.default_rng(problem.seed)
        widths = _start(problem)
        steps = {
            group: sorted({p.activation for p in problem.choices[group[0]]})
            for group in problem.groups
        }
        moves = [
            ("weight", layer.name, bits)
            for layer in problem.layers
            for bits in sorted({p.weight for p in problem.choices[layer.name]})
        ] + [("activation", group[0], bits) for group, bits_ in steps.items() for bits in bits_]
        members = {group[0]: group for group in problem.groups}
        for index in random.permutation(len(moves)):
            kind, name, bits = moves[index]
            wider = dict(widths)
            for other in members[name] if kind == "activation" else _twins(problem, name):
                old = wider[other]
                w, a = (bits, old.activation) if kind == "weight" else (old.weight, bits)
                wider[other] = Precision(max(old.weight, w), max(old.activation, a))
            if not problem.problems(wider):
                widths = wider
        return problem.plan(widths, "random")


def _twins(problem: Problem, name: str) -> tuple[str, ...]:
    return next((tie for tie in problem.ties if name in tie), (name,))


def _start(problem: Problem) -> dict[str, Precision]:
    """The cheapest plan; with several budgets any that keeps them all."""
    if len(problem.budgets) == 1:
        found = cheapest(problem, next(iter(problem.budgets)))
        if problem.fits(found):
            return found
    try:
        price = {
            layer.name: {
                p: sum(
                    function(layer, p) / max(problem.budgets.get(objective, np.inf), 1e-300)
                    for objective, function in problem.costs.items()
                )
                for p in problem.choices[layer.name]
            }
            for layer in problem.layers
        }
        return solve(problem, price)
    except BudgetError as error:
        raise BudgetError(f"random: {error}") from error
