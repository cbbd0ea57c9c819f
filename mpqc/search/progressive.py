"""progressive: widths that only fall with depth, led by how far classes are separated."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Literal

import numpy as np

from mpqc.budget import show
from mpqc.errors import BudgetError
from mpqc.graph import Graph, Precision
from mpqc.passes.measure_separability import measure_separability
from mpqc.plan import Plan
from mpqc.search.base import Search
from mpqc.search.cache import ledger
from mpqc.search.problem import Problem
from mpqc.search.sensitivity import check_samples
from mpqc.search.solve import describe

_EXPONENTS = np.geomspace(1 / 64, 64, 97)


@dataclass(frozen=True)
class Progressive(Search):
    """Widths fall with depth as the classes separate (our reading of arXiv 1912.12656).

    Attributes:
        samples: of the data, at most.
        granularity: ``stage``: layers between changes of resolution share their width.
    """

    needs = frozenset({"data"})

    samples: int = 512
    granularity: Literal["stage", "layer"] = "stage"

    def __post_init__(self) -> None:
        check_samples("progressive", self.samples)

    def __call__(self, problem: Problem) -> Plan:
        places = separation(problem, self)
        free = [row for row in problem.choices.values() if len(row) > 1]
        widths = sorted({min(p.weight, p.activation) for row in free for p in row}) or [8]

        def plan(high: int, place: Callable[[float], float]) -> dict[str, Precision]:
            low = widths[0]
            bits = {n: round_up(widths, high - place(s) * (high - low)) for n, s in places.items()}
            return problem.snap({name: Precision(b, b) for name, b in bits.items()})

        fitting = [b for b in widths if problem.fits(plan(b, lambda s: 0.0))]
        found = [plan(b, lambda s: 0.0) for b in fitting]
        start = next((b for b in widths if b not in fitting), None)
        if start is not None:  # the narrowest homogeneous network that is too wide
            family = [plan(start, lambda s, e=e: s**e) for e in _EXPONENTS]  # type: ignore[misc]
            found += [candidate for candidate in family if problem.fits(candidate)]
        if not found:
            least = plan(widths[0], lambda s: 0.0)
            costs = ", ".join(
                f"{show(name, problem.cost(least, name))} of {show(name, limit)} {name}"
                for name, limit in problem.budgets.items()
            )
            raise BudgetError(
                f"no progressive plan keeps the budgets: the cheapest plan, {describe(least)}, "
                f"costs {costs}; allow narrower widths or raise the budget"
            )
        first = next(iter(problem.budgets), "bitops")
        return problem.plan(max(found, key=lambda w: problem.cost(w, first)), "progressive")


def round_up(widths: list[int], bits: float) -> int:
    """The narrowest candidate that is at least ``round(bits)`` wide."""
    wanted = round(bits)
    return next((width for width in widths if width >= wanted), widths[-1])


def separation(problem: Problem, method: Progressive) -> dict[str, float]:
    """Place of each layer between the first, 0, and the last, 1: never falls with depth."""
    graph, data = problem.need_data("progressive")
    data = data.sample(method.samples, problem.seed)
    known = ledger(problem, data, "separability")
    values = [layer.input for layer in problem.layers]
    if any(value not in known for value in values):
        known.update(measure_separability(graph, data, values, problem.progress))
    stages = [_stage(graph, layer.output) for layer in problem.layers]
    ratios = [known[value] for value in values]
    if method.granularity == "stage":
        ratios = [
            best
            for _, run in groupby(zip(stages, ratios, strict=True), key=lambda item: item[0])
            for part in [[ratio for _, ratio in run]]
            for best in [max(part)] * len(part)
        ]
    rising = list(accumulate(ratios, max))
    span = rising[-1] - rising[0]
    return {
        layer.name: (ratio - rising[0]) / span if span > 0 else 0.0
        for layer, ratio in zip(problem.layers, rising, strict=True)
    }


def _stage(graph: Graph, value: str) -> tuple[int, ...]:
    return graph.shape(value)[2:]
