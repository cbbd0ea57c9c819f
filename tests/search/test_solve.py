"""The solver against brute force."""

import io
import itertools
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqc.errors import BudgetError
from mpqc.graph import Precision
from mpqc.passes.find_layers import Layer
from mpqc.search.make_problem import COSTS
from mpqc.search.problem import Problem
from mpqc.search.solve import cheapest, describe, solve

Losses = Mapping[str, Mapping[Precision, float]]


def layer(name: str, macs: int, weights: int, source: str) -> Layer:
    return Layer(name, "Conv", source, f"{name}.w", f"{name}.y", macs, weights, 0, 1, 1)


def everything(problem: Problem, losses: Losses) -> list[tuple[float, dict[str, Precision]]]:
    """All assignments that keep the rules and the budgets, with their losses."""
    names = list(problem.choices)
    found = []
    for picks in itertools.product(*(losses[name] for name in names)):
        widths = dict(zip(names, picks, strict=True))
        if not problem.problems(widths):
            found.append((sum(losses[name][p] for name, p in widths.items()), widths))
    return found


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, Losses]:
    """Up to six layers in up to six groups, maybe tied, with one to three budgets."""
    count = draw(st.integers(1, 6))
    numbers = st.integers(1, 5)
    layers = tuple(
        layer(f"l{i}", draw(st.integers(1, 10**6)), draw(st.integers(1, 10**5)),
              f"x{draw(st.integers(0, count - 1))}")
        for i in range(count)
    )  # fmt: skip
    grid = [Precision(w, a) for w in (2, 4) for a in (2, 8)]
    choices = {one.name: tuple(grid) for one in layers}
    losses = {
        one.name: {p: draw(st.one_of(numbers, st.floats(0.0, 9.0))) * 1.0 for p in grid}
        for one in layers
    }
    ties: tuple[tuple[str, ...], ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    if count > 2 and draw(st.booleans()) and layers[0].input != layers[1].input:
        sources = {one.input: [o.name for o in layers if o.input == one.input] for one in layers}
        joined = tuple(sources.pop(layers[0].input) + sources.pop(layers[1].input))
        ties, groups = (("l0", "l1"),), (joined, *map(tuple, sources.values()))
    costs = {**COSTS, "latency": lambda one, p: one.macs**0.5 * (p.weight + 0.3 * p.activation)}
    base = Problem(layers, choices, costs, {}, groups=groups, ties=ties)
    budgets = {}
    for objective in draw(st.lists(st.sampled_from([*costs]), min_size=1, unique=True)):
        low = base.cost({name: Precision(2, 2) for name in choices}, objective)
        high = base.cost({name: Precision(4, 8) for name in choices}, objective)
        budgets[objective] = low + draw(st.floats(-0.05, 1.0)) * (high - low)
    return replace(base, budgets=budgets), losses


@settings(max_examples=120)
@given(problems())
def test_finds_what_brute_force_finds(case: tuple[Problem, Losses]) -> None:
    problem, losses = case
    known = everything(problem, losses)
    if not known:
        with pytest.raises(BudgetError, match="cheapest plan"):
            solve(problem, losses)
        return
    widths = solve(problem, losses)
    assert problem.problems(widths) == []
    loss = sum(losses[name][p] for name, p in widths.items())
    assert loss == pytest.approx(min(found for found, _ in known), rel=1e-7, abs=1e-7)


@settings(max_examples=60)
@given(problems())
def test_of_equal_losses_takes_the_cheapest(case: tuple[Problem, Losses]) -> None:
    problem, _ = case
    flat = {name: dict.fromkeys(row, 1.0) for name, row in problem.choices.items()}
    wide = replace(problem, budgets={"bitops": 1e300})
    least = cheapest(problem, "bitops")
    found = solve(wide, flat)
    if len(problem.ties) == 0:  # narrowest everywhere is cheapest in every cost
        assert found == least
    assert wide.cost(found, "bitops") <= wide.cost(least, "bitops") * (1 + 1e-12)


@settings(max_examples=40)
@given(problems())
def test_cheapest_is_what_brute_force_finds(case: tuple[Problem, Losses]) -> None:
    problem, losses = case
    free = replace(problem, budgets={})
    for objective in problem.costs:
        known = min(free.cost(widths, objective) for _, widths in everything(free, losses))
        assert free.cost(cheapest(problem, objective), objective) == pytest.approx(known)


def test_a_budget_that_is_exactly_met_is_met() -> None:
    layers = tuple(layer(f"l{i}", 7 * 10**8 + i, 3, f"x{i}") for i in range(5))
    choices = {one.name: (Precision(2, 2), Precision(3, 3), Precision(4, 4)) for one in layers}
    exact = float(sum(9 * one.macs for one in layers))
    losses = {name: {p: 4.0**-p.weight for p in row} for name, row in choices.items()}
    problem = Problem(layers, choices, COSTS, {"bitops": exact})
    assert set(solve(problem, losses).values()) == {Precision(3, 3)}
    below = solve(replace(problem, budgets={"bitops": exact - 1}), losses)
    assert problem.cost(below, "bitops") < exact


def test_layers_in_float_take_their_part_of_the_budget() -> None:
    one, other = layer("a", 10, 8, "x"), layer("b", 10, 8, "y")
    problem = Problem(
        (one,), {"a": (Precision(2, 2), Precision(8, 8))}, COSTS, {"size": 8 + 32.0},
        floats=(other,),
    )  # fmt: skip
    losses = {"a": {Precision(2, 2): 1.0, Precision(8, 8): 0.0}}
    assert solve(problem, losses) == {"a": Precision(8, 8)}
    tight = replace(problem, budgets={"size": 7 + 32.0})
    assert solve(tight, losses) == {"a": Precision(2, 2)}


def test_losses_that_are_missing_or_infinite_are_not_allowed() -> None:
    one = layer("a", 10, 8, "x")
    choices = {"a": (Precision(2, 2), Precision(4, 4), Precision(8, 8))}
    problem = Problem((one,), choices, COSTS, {"size": 100})
    losses = {"a": {Precision(2, 2): 1.0, Precision(4, 4): float("inf")}}
    assert solve(problem, losses) == {"a": Precision(2, 2)}


def test_names_budgets_that_exclude_each_other() -> None:
    layers = (layer("a", 1, 1000, "x"), layer("b", 1000, 1, "y"))
    choices = {n: (Precision(2, 8), Precision(8, 2)) for n in "ab"}
    skewed = {
        "size": lambda one, p: float(p.weight),
        "bitops": lambda one, p: float(p.activation),
    }
    problem = Problem(layers, choices, skewed, {"size": 9, "bitops": 9})
    with pytest.raises(BudgetError, match=r"size=9 B and bitops=9 cannot be met together.*w2a8"):
        solve(problem, {n: dict.fromkeys(choices[n], 0.0) for n in "ab"})


def test_says_nothing_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    grid = [Precision(w, a) for w in (2, 3, 4, 8) for a in (2, 3, 4, 8)]
    layers = tuple(layer(f"l{i}", int(m), int(m) // 9, f"x{i}")
                   for i, m in enumerate(random.integers(10**4, 10**7, 40)))  # fmt: skip
    losses = {o.name: {p: float(random.random()) / p.weight for p in grid} for o in layers}
    choices = {one.name: tuple(grid) for one in layers}
    limits = {
        "bitops": 9.0 * sum(o.macs for o in layers),
        "size": sum(o.weights for o in layers) / 3,
    }
    solve(Problem(layers, choices, COSTS, limits), losses)
    assert capfd.readouterr().out == ""
    with redirect_stdout(io.StringIO()):  # no file descriptor to protect there
        solve(Problem(layers, choices, COSTS, limits), losses)


def test_describes_plans() -> None:
    widths = {"a": Precision(2, 2), "b": Precision(4, 2), "c": Precision(2, 2)}
    assert describe(widths) == "2 layers w2a2, 1 layer w4a2"
