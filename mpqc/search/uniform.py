"""uniform: the widest single precision that fits."""

from dataclasses import dataclass

from mpqc.budget import show
from mpqc.errors import BudgetError
from mpqc.graph import Precision
from mpqc.plan import Plan
from mpqc.search.base import Search
from mpqc.search.problem import Problem
from mpqc.search.solve import describe


@dataclass(frozen=True)
class Uniform(Search):
    """One precision for all layers that are free: the widest that keeps the budgets.

    The narrower of the two widths decides, then their sum, then the activations'. A layer that
    cannot take the precision takes the nearest that it can.
    """

    def __call__(self, problem: Problem) -> Plan:
        candidates = {p for choices in problem.choices.values() for p in choices}
        for precision in sorted(candidates, key=width, reverse=True):
            widths = problem.snap(dict.fromkeys(problem.choices, precision))
            if problem.fits(widths):
                return problem.plan(widths, "uniform")
        least = problem.snap(dict.fromkeys(problem.choices, min(candidates, key=width)))
        costs = ", ".join(
            f"{name} {show(name, problem.cost(least, name))} of {show(name, limit)}"
            for name, limit in problem.budgets.items()
        )
        raise BudgetError(
            f"no uniform plan keeps the budgets: the cheapest plan, {describe(least)}, costs "
            f"{costs}; allow narrower widths or raise the budget"
        )


def widest_uniform(problem: Problem) -> Plan | None:
    """The plan of ``Uniform``; None where none fits."""
    try:
        return Uniform()(problem)
    except BudgetError:
        return None


def width(precision: Precision) -> tuple[int, int, int]:
    """Order of precisions from narrow to wide."""
    w, a = precision.weight, precision.activation
    return min(w, a), w + a, a
