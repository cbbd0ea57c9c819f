"""From what a relaxed search learned to a plan: exact under the budgets, which are then used up."""

from collections.abc import Iterator

from mpqc.graph import Precision
from mpqc.search.problem import Problem
from mpqc.search.solve import Losses, solve


def repair(problem: Problem, losses: Losses) -> dict[str, Precision]:
    """The assignment of least loss under all budgets, raised wherever it still fits.

    Where the least losses together keep the budgets they are taken; else the knapsack over all
    layers decides exactly what gives way. What is left of the budgets goes to wider tensors, those
    first that lose least for what they cost.

    Args:
        problem: layers, groups, ties, costs, budgets.
        losses: layer -> precision -> loss, such as -log of a probability.

    Raises:
        BudgetError: nothing keeps the budgets; names the cheapest assignment.
    """
    return filled(problem, losses, solve(problem, losses))


def filled(problem: Problem, losses: Losses, widths: dict[str, Precision]) -> dict[str, Precision]:
    """An assignment that keeps the budgets, raised wherever it still fits.

    Args:
        problem: layers, groups, ties, costs, budgets.
        losses: which precisions there are, and what they lose.
        widths: to start with.
    """
    while True:
        steps = [wider for wider in _raised(problem, losses, widths) if problem.fits(wider)]
        if not steps:
            return widths
        now = widths

        def price(wider: dict[str, Precision], now: dict[str, Precision] = now) -> float:
            """Loss for the budgets' shares; free steps are the best."""
            lost = sum(losses[name][wider[name]] - losses[name][now[name]] for name in wider)
            taken = sum(
                (problem.cost(wider, name) - problem.cost(now, name)) / limit
                for name, limit in problem.budgets.items()
                if limit > 0
            )
            return lost / taken if taken > 1e-12 else float("-inf")

        widths = min(steps, key=price)


def _raised(
    problem: Problem, losses: Losses, widths: dict[str, Precision]
) -> Iterator[dict[str, Precision]]:
    """Every valid assignment with one tensor a candidate wider."""
    twins = {name: tie for tie in problem.ties for name in tie}
    for layer in problem.layers:
        tied = twins.get(layer.name, (layer.name,))
        if tied[0] == layer.name:
            yield from _wider(losses, widths, tied, "weight")
    for group in problem.groups:
        yield from _wider(losses, widths, group, "activation")


def _wider(
    losses: Losses, widths: dict[str, Precision], names: tuple[str, ...], part: str
) -> Iterator[dict[str, Precision]]:
    old = getattr(widths[names[0]], part)
    above = sorted({getattr(p, part) for p in losses[names[0]] if getattr(p, part) > old})
    for bits in above:
        wanted = {
            name: Precision(bits, widths[name].activation)
            if part == "weight"
            else Precision(widths[name].weight, bits)
            for name in names
        }
        if all(precision in losses[name] for name, precision in wanted.items()):
            yield widths | wanted
            return
