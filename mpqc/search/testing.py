"""The contract of search plugins as tests that any package can run on its own.

    from mpqc.search.testing import SearchContract

    class TestMine(SearchContract):
        method = "mine"

Needs pytest. Problems are tiny: a network of six layers, two of which share an input.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from mpqc.budget import parse_budgets
from mpqc.data import Data, open_data
from mpqc.errors import BudgetError, UsageError
from mpqc.graph import Graph, Precision
from mpqc.plan import Plan
from mpqc.search import precisions
from mpqc.search.base import Search, load
from mpqc.search.constraints import Constraints
from mpqc.search.make_problem import make_problem
from mpqc.search.problem import Problem, Widths
from mpqc.search.solve import cheapest

BATCH, SAMPLES, CLASSES = 4, 24, 3

_TEXT = """
%x = Input() : f32[{n},3,8,8]
%w1 = Constant() : f32[8,3,3,3]
%w2 = Constant() : f32[16,8,3,3]
%w3 = Constant() : f32[16,8,1,1]
%w4 = Constant() : f32[16,1,3,3]
%w5 = Constant() : f32[24,16,1,1]
%w6 = Constant() : f32[{k},24]
%b6 = Constant() : f32[{k}]
%v1 = Conv(%x, %w1) {{pads=[1, 1, 1, 1]}} : f32[{n},8,8,8] @first
%r1 = Relu(%v1) : f32[{n},8,8,8]
%v2 = Conv(%r1, %w2) {{pads=[1, 1, 1, 1], strides=[2, 2]}} : f32[{n},16,4,4] @main
%v3 = Conv(%r1, %w3) {{strides=[2, 2]}} : f32[{n},16,4,4] @shortcut
%s = Add(%v2, %v3) : f32[{n},16,4,4]
%r2 = Relu(%s) : f32[{n},16,4,4]
%v4 = Conv(%r2, %w4) {{group=16, pads=[1, 1, 1, 1]}} : f32[{n},16,4,4] @depthwise
%r3 = Relu(%v4) : f32[{n},16,4,4]
%v5 = Conv(%r3, %w5) : f32[{n},24,4,4] @pointwise
%r4 = Relu(%v5) : f32[{n},24,4,4]
%p = GlobalAveragePool(%r4) : f32[{n},24,1,1]
%f = Flatten(%p) : f32[{n},24]
%y = Gemm(%f, %w6, %b6) {{transB=1}} : f32[{n},{k}] @classifier
return %y
"""

# Constraints beside the convention that the ends have 8 bits.
CASES: Mapping[str, Constraints] = {
    "free": Constraints(),
    "bounded": Constraints(min={"depthwise": "w3a3"}, max={"pointwise": "w4"}),
    "pinned": Constraints(pin={"main": "w3a4"}),
    "tied": Constraints(tie=(("depthwise", "pointwise"),)),
    "excluded": Constraints(exclude=("shortcut",)),
}


def toy_graph(batch: int = 1) -> Graph:
    """The network: six layers, ``main`` and ``shortcut`` read one value."""
    random = np.random.default_rng(5)
    shapes = {"w1": (8, 3, 3, 3), "w2": (16, 8, 3, 3), "w3": (16, 8, 1, 1), "w4": (16, 1, 3, 3),
              "w5": (24, 16, 1, 1), "w6": (CLASSES, 24)}  # fmt: skip
    constants: dict[str, Any] = {
        name: (random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        for name, shape in shapes.items()
    }
    constants["b6"] = np.zeros(CLASSES, np.float32)
    return Graph.parse(_TEXT.format(n=batch, k=CLASSES), constants)


def toy_data(labels: bool = True) -> Data:
    """Pictures of three classes that differ in their means."""
    random = np.random.default_rng(6)
    classes = np.arange(SAMPLES) % CLASSES
    pictures = random.normal(size=(SAMPLES, 3, 8, 8)) + classes[:, None, None, None] - 1
    arrays: dict[str, Any] = {"x": pictures.astype(np.float32)}
    if labels:
        arrays["labels"] = classes
    return open_data(arrays, toy_graph(BATCH))


class ToyTrainer:
    """Stands in for training: wide layers are good, ``main`` counts most. Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def train(self, widths: Widths, epochs: float) -> float:
        self.calls += 1
        weight = {name: 3.0 if name == "main" else 1.0 for name in widths}
        losses = [weight[n] * (4.0**-p.weight + 4.0**-p.activation) for n, p in widths.items()]
        return 1.0 - float(sum(losses)) / len(losses)


def toy_problem(
    budget: str = "bitops=w3a3", constraints: Constraints = CASES["free"], **changes: Any
) -> Problem:
    """A problem on the toy network; candidates 2, 3, 4 and 8 bits.

    Args:
        budget: as on the command line.
        constraints: of layers.
        changes: other fields of the problem.
    """
    handles: dict[str, Any] = {
        "graph": toy_graph(BATCH),
        "data": toy_data(),
        "trainer": ToyTrainer(),
    }
    return make_problem(
        toy_graph(), parse_budgets(budget), (2, 3, 4, 8), constraints=constraints,
        **{**handles, **changes},
    )  # fmt: skip


def between(problem: Problem, shares: Mapping[str, float]) -> Problem:
    """The problem with budgets that lie between the cheapest plan, 0, and the widest, 1."""
    budgets = {}
    for objective, share in shares.items():
        low = problem.cost(cheapest(problem, objective), objective)
        wide = problem.snap({name: Precision(8, 8) for name in problem.choices})
        budgets[objective] = low + share * (problem.cost(wide, objective) - low)
    return replace(problem, budgets=budgets)


class _StopError(Exception):
    """What interrupts a search in the tests."""


class SearchContract:
    """What every plugin has to do; inherit, and name the method.

    Attributes:
        method: name of the entry point.
        options: texts for the plugin's options.
    """

    method: ClassVar[str]
    options: ClassVar[Mapping[str, str]] = {}

    def search(self) -> Search:
        """A fresh plugin."""
        return load(self.method, self.options)

    def solved(self, problem: Problem) -> Plan:
        return self.search()(problem)

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize(
        "shares",
        [{"bitops": 0.2}, {"size": 0.4}, {"bitops": 0.3, "size": 0.6}, {"bitops": 2.0}],
        ids=str,
    )
    def test_keeps_budgets_and_rules(self, case: str, shares: Mapping[str, float]) -> None:
        """Budgets, candidates, shared inputs and ties hold under the shared cost model."""
        problem = between(toy_problem(constraints=CASES[case]), shares)
        plan = self.solved(problem)
        assert problem.problems(precisions(plan)) == []
        assert set(plan.layers) == {layer.name for layer in problem.layers}

    def test_says_where_the_plan_comes_from(self) -> None:
        """Method, seed, budget and cost stand in the plan, which survives being a file."""
        problem = toy_problem(seed=7, model_sha256="5" * 64)
        plan = self.solved(problem)
        assert plan.model_sha256 == "5" * 64
        assert plan.search is not None
        assert plan.search.method
        assert plan.search.seed == 7
        assert plan.search.budget == dict(problem.budgets)
        assert plan.search.cost == problem.total(precisions(plan))
        assert Plan.parse(plan.text()) == plan

    def test_same_seed_same_plan(self) -> None:
        """Nothing but the problem decides, not even numpy's global generator."""
        state = np.random.get_state()
        try:
            np.random.seed(1)
            first = self.solved(toy_problem(seed=3))
            np.random.seed(2)
            assert self.solved(toy_problem(seed=3)) == first
        finally:
            np.random.set_state(state)

    @pytest.mark.parametrize("objective", ["bitops", "size"])
    def test_a_narrower_budget_never_costs_more(self, objective: str, tmp_path: Path) -> None:
        """Costs rise with the budget, from that of the cheapest plan to that of the widest."""
        base = toy_problem(cache=tmp_path)
        low = base.cost(cheapest(base, objective), objective)
        high = base.cost({name: Precision(8, 8) for name in base.choices}, objective)
        spent = []
        for limit in np.geomspace(low * 1.15, high, 8):
            problem = replace(base, budgets={objective: float(limit)})
            try:
                spent.append(problem.cost(precisions(self.solved(problem)), objective))
            except BudgetError:
                assert not spent, "a budget that could be met became impossible by widening it"
        assert spent
        assert spent == sorted(spent)

    @pytest.mark.parametrize("budget", ["bitops=1k", "size=1B", "bitops=100G,size=1B"])
    def test_says_when_the_budget_cannot_be_met(self, budget: str) -> None:
        """A BudgetError names the cheapest plan."""
        with pytest.raises(BudgetError, match="cheapest plan"):
            self.solved(toy_problem(budget))

    def test_says_what_it_lacks(self) -> None:
        """A method that needs data or a trainer says so when it gets none."""
        needs: frozenset[str] = getattr(self.search(), "needs", frozenset())
        if needs & {"data", "labels"}:
            with pytest.raises(UsageError, match=r"needs|--data"):
                self.solved(replace(toy_problem(), data=None))
        if "trainer" in needs:
            with pytest.raises(UsageError, match=r"needs|--train"):
                self.solved(replace(toy_problem(), trainer=None))
        if not needs:
            self.solved(replace(toy_problem(), data=None, trainer=None))

    @pytest.mark.parametrize("after", [1, 3, 8])
    def test_resumes_after_an_interruption(self, tmp_path: Path, after: int) -> None:
        """Interrupted where it reports progress, it ends with the plan of an undisturbed run."""
        expected = self.solved(toy_problem(cache=tmp_path / "undisturbed"))
        steps = 0

        def interrupt(label: str, done: int, total: int) -> None:
            nonlocal steps
            steps += 1
            if steps == after:
                raise _StopError

        try:
            self.solved(toy_problem(cache=tmp_path / "resumed", progress=interrupt))
        except _StopError:
            pass
        else:
            assert steps < after
        assert self.solved(toy_problem(cache=tmp_path / "resumed")) == expected

    def test_leaves_a_used_cache_alone(self, tmp_path: Path) -> None:
        """A second search with the same cache gives the same plan and measures nothing anew."""
        first = self.solved(toy_problem(cache=tmp_path))
        files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert self.solved(toy_problem(cache=tmp_path)) == first
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files
