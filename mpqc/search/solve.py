"""Multiple-choice knapsack, exact: least loss under any number of budgets."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from mpqc.budget import show
from mpqc.errors import BudgetError
from mpqc.graph import Array, Precision
from mpqc.search.problem import Problem, Widths

Losses = Mapping[str, Mapping[Precision, float]]

_SCALE = 1e4  # of the largest loss: HiGHS stops at absolute gaps of 1e-6
_CUTS = 20  # of assignments that keep a budget within HiGHS's tolerance only
_TIGHTER = 1 - 1e-6  # of the limits where cutting was not enough


def solve(problem: Problem, losses: Losses) -> dict[str, Precision]:
    """The assignment of least loss that keeps all budgets; of equal losses the cheapest.

    Args:
        problem: layers, ties, costs and budgets.
        losses: layer -> precision -> loss; precisions that are missing are not allowed. They
            may be negative gains; only sums count.

    Raises:
        BudgetError: nothing keeps the budgets; names the cheapest assignment.
    """
    model = _Model.of(problem, losses)
    best = model.solve(model.loss)
    if best is None:
        raise BudgetError(_cannot_be_met(problem, model))
    # Of plans that lose the same, the cheapest: then a narrower budget never costs more.
    limit = model.value(model.loss, best) + 1e-9 * float(np.abs(model.loss).max(initial=0.0))
    cheapest = replace(model, extra=(model.loss, limit)).solve(model.price)
    if cheapest is not None and model.value(model.price, cheapest) < model.value(model.price, best):
        best = cheapest
    return model.widths(best)


def check_budgets(problem: Problem) -> None:
    """Refuse budgets that no assignment keeps.

    Raises:
        BudgetError: names the cheapest assignment.
    """
    solve(problem, {name: dict.fromkeys(row, 0.0) for name, row in problem.choices.items()})


def cheapest(
    problem: Problem, objective: str, losses: Losses | None = None
) -> dict[str, Precision]:
    """The assignment of least cost, whatever the budgets.

    Args:
        problem: its budgets are ignored.
        objective: of which the cost is minimised.
        losses: which precisions are allowed; by default all candidates.
    """
    allowed = losses or {name: dict.fromkeys(row, 0.0) for name, row in problem.choices.items()}
    model = _Model.of(replace(problem, budgets={}), allowed)
    found = model.solve(model.costs[objective])
    if found is None:
        raise BudgetError("the tied layers have no widths in common; change the constraints")
    return model.widths(found)


@dataclass(frozen=True, eq=False)
class _Model:
    """One 0-1 variable for each layer and precision.

    Attributes:
        names: layer of each variable.
        precisions: of each variable.
        equal: rows of an equation system and its right-hand sides: one precision a layer, ties.
        loss: of each variable.
        costs: objective -> of each variable.
        price: all costs, each relative to the widest plan.
        budgets: objective -> what is left for the variables.
        extra: one more row with an upper limit.
    """

    names: tuple[str, ...]
    precisions: tuple[Precision, ...]
    equal: tuple[Any, Array]
    loss: Array
    costs: Mapping[str, Array]
    price: Array
    budgets: Mapping[str, float]
    extra: tuple[Array, float] | None = None

    @classmethod
    def of(cls, problem: Problem, losses: Losses) -> "_Model":
        variables = [
            (layer, precision, float(loss))
            for layer in problem.layers
            for precision, loss in sorted(losses[layer.name].items(), key=lambda i: str(i[0]))
            if np.isfinite(loss)
        ]
        costs = {
            objective: np.array([function(layer, p) for layer, p, _ in variables], np.float64)
            for objective, function in problem.costs.items()
        }
        fixed = {
            objective: sum(function(layer, None) for layer in problem.floats)
            for objective, function in problem.costs.items()
        }
        price = sum(
            (values / max(values.sum(), 1e-300) for values in costs.values()),
            np.zeros(len(variables)),
        )
        names = tuple(layer.name for layer, _, _ in variables)
        precisions = tuple(precision for _, precision, _ in variables)
        return cls(
            names,
            precisions,
            _equations(problem, names, precisions),
            np.array([loss for _, _, loss in variables]),
            costs,
            price,
            {name: limit - fixed[name] for name, limit in problem.budgets.items()},
        )

    def solve(self, objective: Array) -> Array | None:
        """Variables that are 1, as sorted indices; None when nothing is feasible."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array, vstack

        rows, sides = self.equal
        limits = [(self.costs[name], limit) for name, limit in self.budgets.items()] + (
            [self.extra] if self.extra else []
        )
        constraints = [LinearConstraint(rows, sides, sides)]
        for row, limit in limits:
            scale = max(float(np.abs(row).max(initial=0.0)), abs(limit), 1e-300) / 1e3
            constraints.append(LinearConstraint(row[None] / scale, -np.inf, limit / scale))
        largest = float(np.abs(objective).max(initial=0.0)) or 1.0
        cuts: list[Array] = []
        for attempt in range(_CUTS + 1):
            cut = []
            if attempt == _CUTS:
                tight = replace(self, budgets={n: b * _TIGHTER for n, b in self.budgets.items()})
                return tight.solve(objective)
            if cuts:  # not this very assignment again
                picked = vstack([csr_array(c[None]) for c in cuts], format="csr")
                cut = [LinearConstraint(picked, -np.inf, picked.sum(axis=1) - 1)]
            with _silence():
                result = milp(
                    objective / largest * _SCALE,
                    integrality=np.ones(len(objective)),
                    bounds=Bounds(0, 1),
                    constraints=[*constraints, *cut],
                    options={"mip_rel_gap": 0.0},
                )
            if result.x is None:
                return None
            chosen = np.flatnonzero(result.x > 0.5)
            if all(self.value(self.costs[name], chosen) <= limit
                   for name, limit in self.budgets.items()):  # fmt: skip
                return chosen
            mark = np.zeros(len(objective))
            mark[chosen] = 1.0
            cuts.append(mark)
        return None

    def value(self, row: Array, chosen: Array) -> float:
        return float(sum(row[chosen].tolist()))

    def widths(self, chosen: Array) -> dict[str, Precision]:
        return {self.names[i]: self.precisions[i] for i in chosen}


def _equations(
    problem: Problem, names: tuple[str, ...], precisions: tuple[Precision, ...]
) -> tuple[Any, Array]:
    from scipy.sparse import csr_array

    of_layer: dict[str, list[int]] = {layer.name: [] for layer in problem.layers}
    for index, name in enumerate(names):
        of_layer[name].append(index)
    rows: list[dict[int, int]] = [dict.fromkeys(found, 1) for found in of_layer.values()]
    sides = [1] * len(rows)

    def tie(a: str, b: str, key: str) -> None:
        """As many variables of each width in one layer as in the other."""
        for width in sorted({getattr(precisions[i], key) for i in of_layer[a] + of_layer[b]}):
            row = {i: 1 for i in of_layer[a] if getattr(precisions[i], key) == width}
            row |= {i: -1 for i in of_layer[b] if getattr(precisions[i], key) == width}
            rows.append(row)
            sides.append(0)

    for group in problem.groups:
        for a, b in pairwise(group):
            tie(a, b, "activation")
    for twins in problem.ties:
        for a, b in pairwise(twins):
            tie(a, b, "weight")
    where = [(r, c, v) for r, row in enumerate(rows) for c, v in row.items()]
    r, c, v = zip(*where, strict=True)
    return csr_array((v, (r, c)), shape=(len(rows), len(names))), np.array(sides, np.float64)


def _cannot_be_met(problem: Problem, model: _Model) -> str:
    losses: dict[str, dict[Precision, float]] = {}
    for name, precision in zip(model.names, model.precisions, strict=True):
        losses.setdefault(name, {})[precision] = 0.0
    least = {name: cheapest(problem, name, losses) for name in problem.budgets}
    short = [name for name in least if problem.cost(least[name], name) > problem.budgets[name]]
    said = [
        f"{name}={show(name, problem.budgets[name])} cannot be met: the cheapest plan, "
        f"{describe(least[name])}, costs {show(name, problem.cost(least[name], name))}"
        for name in short
    ]
    if not said:
        each = " and ".join(f"{n}={show(n, limit)}" for n, limit in problem.budgets.items())
        plans = "; ".join(
            f"the cheapest plan in {name}, {describe(least[name])}, costs "
            + ", ".join(show(other, problem.cost(least[name], other)) for other in problem.budgets)
            for name in least
        )
        said = [f"{each} cannot be met together: {plans}"]
    return "; ".join(said) + "; allow narrower widths or raise the budget"


def describe(widths: Widths) -> str:
    """A plan in a few words: ``17 layers w2a2, 2 layers w8a8``."""
    counts: dict[Precision, int] = {}
    for precision in widths.values():
        counts[precision] = counts.get(precision, 0) + 1
    parts = [
        f"{n} layer{'s' * (n > 1)} {p}" for p, n in sorted(counts.items(), key=lambda i: -i[1])
    ]
    return ", ".join(parts)


@contextmanager
def _silence() -> Iterator[None]:
    """HiGHS prints debugging lines to the process's stdout, where ``--json`` writes."""
    try:
        sys.stdout.flush()
        saved = os.dup(1)
    except (OSError, ValueError, AttributeError):  # no stdout to protect
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
