"""thrifty: narrow what costs most and matters least, until the budgets hold."""

from dataclasses import dataclass

import numpy as np

from mpqc.errors import BudgetError, UsageError
from mpqc.graph import Precision
from mpqc.passes.find_layers import weight_matrix
from mpqc.plan import Plan
from mpqc.search import Problem, Search


@dataclass(frozen=True)
class Thrifty(Search):
    """Greedy: narrows the tensor whose step saves most bits for the noise that it adds.

    Attributes:
        trust: how much more noise activations may have than weights.
    """

    trust: float = 1.0

    def __post_init__(self) -> None:
        if not self.trust > 0:
            raise UsageError(f"thrifty: trust is positive, got {self.trust}")

    def __call__(self, problem: Problem) -> Plan:
        spread = {layer.name: self.spread(problem, layer.name) for layer in problem.layers}
        widths = problem.snap({name: Precision(8, 8) for name in problem.choices})
        while not problem.fits(widths):
            narrower = self.narrower(problem, widths)
            if not narrower:
                raise BudgetError(f"no plan of thrifty fits; its cheapest plan is {widths}")

            def price(plan: dict[str, Precision], now: dict[str, Precision] = widths) -> float:
                """Noise added for each BitOP saved."""
                saved = problem.cost(now, "bitops") - problem.cost(plan, "bitops")
                return (self.noise(plan, spread) - self.noise(now, spread)) / saved

            widths = min(narrower, key=price)
        return problem.plan(widths, "thrifty")

    def narrower(
        self, problem: Problem, widths: dict[str, Precision]
    ) -> list[dict[str, Precision]]:
        """Every valid assignment that is one step narrower in one place."""
        found = []
        for name, old in widths.items():
            for new in problem.choices[name]:
                if new.weight > old.weight or new.activation > old.activation or new == old:
                    continue
                group = next(group for group in problem.groups if name in group)
                twins = next((tie for tie in problem.ties if name in tie), (name,))
                wanted = {
                    other: Precision(
                        new.weight if other in twins else p.weight,
                        new.activation if other in group else p.activation,
                    )
                    for other, p in widths.items()
                }
                if wanted == problem.snap(wanted) and self.a_step(problem, name, old, new):
                    found.append(wanted)
        return found

    def a_step(self, problem: Problem, name: str, old: Precision, new: Precision) -> bool:
        """Whether no candidate lies between the two."""
        between = [
            p for p in problem.choices[name]
            if p not in (old, new)
            and new.weight <= p.weight <= old.weight
            and new.activation <= p.activation <= old.activation
        ]  # fmt: skip
        return not between

    def spread(self, problem: Problem, name: str) -> float:
        """Largest weight relative to the root mean square: heavy tails quantize badly."""
        graph = problem.need_graph()
        weights = weight_matrix(graph, graph[name]).astype(np.float64)
        return float(np.abs(weights).max() / max(np.sqrt(np.mean(weights**2)), 1e-30))

    def noise(self, widths: dict[str, Precision], spread: dict[str, float]) -> float:
        """Powers of the rounding noise, summed over the layers."""
        return float(
            sum(
                spread[name] ** 2 * 4.0**-p.weight + 4.0**-p.activation / self.trust
                for name, p in widths.items()
            )
        )
