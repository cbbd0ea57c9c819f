"""A search's result for programs and for people."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mpqc.budget import show
from mpqc.search import SearchResult, precisions
from mpqc.search.base import Method
from mpqc.search.channels import layer_plan_cost, plan_total
from mpqc.search.solve import describe

if TYPE_CHECKING:
    from mpqc.forecast import Expectation


def to_json(
    result: SearchResult, kernels: "Mapping[str, Expectation] | None" = None
) -> dict[str, Any]:
    """The plan, the cost of each layer, and the uniform plan beside it.

    Args:
        result: of the search.
        kernels: what is expected to run each layer, where a target is known.
    """
    problem, plan = result.problem, result.plan
    expected = kernels or {}
    layers = []
    for row in _rows(result):
        name, precision, gain, costs, shares = row
        layers.append(
            {
                "name": name,
                "weight_bits": plan.layers[name].weight_bits,
                "activation_bits": precision.activation,
                "kernel": plan.layers[name].kernel,
                "expected_kernel": expected[name].kernel if name in expected else None,
                "gain_over_int8": expected[name].gain if name in expected else None,
                "searched": len(problem.choices[name]) > 1,
                "gain": gain,
                "cost": costs,
                "share": shares,
            }
        )
    record = plan.search
    return {
        "method": "" if record is None else record.method,
        "budget": dict(problem.budgets),
        "cost": plan_total(problem, plan),
        "layers": layers,
        "float_layers": [layer.name for layer in problem.floats],
        "score_unit": None if result.scores is None else result.scores.unit,
        "uniform": None
        if result.uniform is None
        else {
            "widths": describe(precisions(result.uniform)),
            "cost": problem.total(precisions(result.uniform)),
        },
        "noise": dict(result.noise),
        "plan": plan.model_dump(mode="json", exclude_none=True),
    }


def table(
    result: SearchResult, kernels: "Mapping[str, Expectation] | None" = None
) -> RenderableType:
    """A row a layer, and where the budget went; ``kernels`` as ``to_json`` takes them."""
    problem, expected = result.problem, kernels or {}
    objectives = list(problem.costs)
    made = Table(title="plan", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    made.add_column("layer", overflow="fold")
    made.add_column("widths", no_wrap=True)
    made.add_column("candidates", no_wrap=True)
    if expected:
        made.add_column("kernel", no_wrap=True)
    for column in ("gain", *(f"{name} share" for name in objectives)):
        made.add_column(column, justify="right", no_wrap=True)
    for name, _, gain, _, shares in _rows(result):
        count = len(problem.choices[name])
        made.add_row(
            Text(name),
            result.plan.layers[name].text,
            "pinned" if count == 1 else str(count),
            *((expected[name].kernel,) if expected else ()),
            "" if gain is None or count == 1 else f"{gain:.3g}",
            *(f"{shares[objective]:.1%}" for objective in objectives),
        )
    return Group(made, *map(Text, summary(result)))


def summary(result: SearchResult) -> list[str]:
    """What the plan costs, what the budget allows, what a uniform plan would cost."""
    problem, widths = result.problem, result.widths()
    lines = [f"{describe(widths)}" + _floats(result)]
    for name, cost in plan_total(problem, result.plan).items():
        limit = problem.budgets.get(name)
        if limit is None:
            lines.append(f"{name}: {show(name, cost)}")
        else:
            of = f"{cost / limit:.1%} of the budget {show(name, limit)}"
            lines.append(f"{name}: {show(name, cost)}, {of}")
    first = next(iter(problem.budgets))
    most = sorted(_rows(result), key=lambda row: -row[4][first])[:3]
    lines.append(f"most {first}: " + ", ".join(f"{row[0]} {row[4][first]:.0%}" for row in most))
    if result.uniform is None:
        lines.append("no uniform plan keeps this budget")
    else:
        uniform = precisions(result.uniform)
        costs = ", ".join(f"{name} {show(name, c)}" for name, c in problem.total(uniform).items())
        same = "the same plan" if uniform == widths else costs
        lines.append(f"widest uniform plan that fits: {describe(uniform)}: {same}")
    return lines + _confirmed(result)


def _confirmed(result: SearchResult) -> list[str]:
    """How the whole networks compare, in plain words."""
    if not result.noise:
        return []
    own, uniform = result.noise["plan"], result.noise["uniform"]
    figures = f"noise at the outputs {own:.3g} against {uniform:.3g} on calibration data"
    if uniform < own:
        return [f"mixed loses to uniform here ({figures}): the uniform plan is what is written"]
    return [f"mixed wins over uniform ({figures})"]


def methods_json(found: dict[str, Method]) -> dict[str, Any]:
    """What ``mpqc methods --json`` prints."""
    return {
        "methods": [
            {
                "name": method.name,
                "origin": method.origin,
                "class": method.module,
                "summary": method.summary,
                "needs": sorted(method.needs),
                "widths": list(method.widths),
                "problem": method.problem or None,
            }
            for method in found.values()
        ]
    }


def methods_table(found: dict[str, Method]) -> RenderableType:
    """What ``mpqc methods`` prints."""
    made = Table(title="search methods", title_justify="left", title_style="bold",
                 box=box.SIMPLE_HEAD)  # fmt: skip
    for column in ("name", "needs", "widths", "origin", "what it does"):
        made.add_column(column, overflow="fold", no_wrap=column == "name")
    for method in found.values():
        made.add_row(
            method.name,
            ", ".join(sorted(method.needs)) or "nothing",
            ",".join(map(str, method.widths)),
            Text(method.origin),
            Text(method.problem or method.summary),
        )
    return made


def _rows(
    result: SearchResult,
) -> list[tuple[str, Any, float | None, dict[str, float], dict[str, float]]]:
    """Layer, precision, gain, cost and share of the total cost by objective."""
    problem, widths = result.problem, result.widths()
    total = plan_total(problem, result.plan)
    rows = []
    for layer in problem.layers:
        precision, planned = widths[layer.name], result.plan.layers[layer.name]
        costs = {name: layer_plan_cost(problem, layer, planned, name) for name in problem.costs}
        shares = {name: cost / total[name] if total[name] else 0.0 for name, cost in costs.items()}
        gain = None
        if result.scores is not None:
            gain = result.scores.gain(layer.name, precision)
            gain = gain if math.isfinite(gain) else None
        rows.append((layer.name, precision, gain, costs, shares))
    return rows


def _floats(result: SearchResult) -> str:
    count = len(result.problem.floats)
    return f", {count} in float by constraint" if count else ""
