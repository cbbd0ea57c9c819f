"""Bitwidth search: state the problem, run a plugin, say what came of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpqc.budget import Budget, parse_budgets
from mpqc.data import Data, open_data
from mpqc.errors import ModelError, PlanError, UsageError
from mpqc.graph import Array, Graph, Precision
from mpqc.plan import Plan
from mpqc.preprocess import Preprocess
from mpqc.search.base import GROUP, Method, ScoreSearch, Search, load, methods
from mpqc.search.cache import default_cache
from mpqc.search.channels import plan_problems
from mpqc.search.confirm import confirm
from mpqc.search.constraints import Constraints
from mpqc.search.make_problem import EIGHT, candidates, make_problem
from mpqc.search.problem import CostFunction, Problem, Progress, Trainer, quiet
from mpqc.search.scores import Scores
from mpqc.search.solve import check_budgets
from mpqc.search.uniform import widest_uniform

__all__ = [
    "GROUP",
    "Constraints",
    "CostFunction",
    "Method",
    "Problem",
    "ScoreSearch",
    "Scores",
    "Search",
    "SearchResult",
    "Trainer",
    "candidates",
    "default_cache",
    "load",
    "make_problem",
    "methods",
    "search_plan",
]

_BATCH_BYTES = 64 << 20  # of all values of one batch: keeps a search on large models small


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        plan: with its provenance.
        problem: that was solved.
        scores: of the method, where it has any.
        uniform: the widest uniform plan under the same budgets, for comparison; None where
            none fits.
        noise: of "plan", as the method found it, and of "uniform" at the outputs, where the two
            were compared (see ``confirm``); the plan with less of it is ``plan``.
    """

    plan: Plan
    problem: Problem
    scores: Scores | None
    uniform: Plan | None
    noise: Mapping[str, float] = field(default_factory=dict)

    def widths(self) -> dict[str, Precision]:
        """Precision by layer."""
        return precisions(self.plan)


def precisions(plan: Plan) -> dict[str, Precision]:
    """Precision by layer of a plan; the widest weight where channels differ."""
    return {
        name: Precision(layer.widest, layer.activation_bits) for name, layer in plan.layers.items()
    }


def search_plan(
    model: str | Path,
    *,
    method: str | Search,
    budgets: str | Iterable[str | Budget],
    data: Data | str | Path | Mapping[str, Array] | None = None,
    preprocess: Preprocess | str | Path | None = None,
    widths: Iterable[int | Precision | str] | None = None,
    options: Mapping[str, str] | None = None,
    ends: Precision | None = EIGHT,
    constraints: Constraints | str | Path | None = None,
    costs: Mapping[str, CostFunction] | None = None,
    trainer: Trainer | None = None,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress = quiet,
    confirmed: bool = False,
) -> SearchResult:
    """Search bitwidths for an ONNX model.

    Args:
        model: ONNX file.
        method: name of a plugin, or one that is made already.
        budgets: ``"bitops=w4a4"`` or several; all hold.
        data: calibration data or where they are; see ``mpqc.data``.
        preprocess: for uint8 pictures.
        widths: candidates; the method's own by default.
        options: of the plugin, as texts.
        ends: precision of the first layers and the classifier; None searches them too. Uniform
            references of budgets follow the same convention.
        constraints: or their TOML file.
        costs: more cost functions, such as a measured ``latency``.
        trainer: for methods that train.
        dims: values of symbolic dimensions.
        seed: of all random choices.
        cache: folder for measurements; None measures anew.
        progress: called with what is done, steps done, steps in all.
        confirmed: with data, compare the whole quantized network with the widest uniform plan that
            fits, and return the better of the two.

    Raises:
        BudgetError: no plan keeps the budgets.
        UsageError: unknown method, option, layer or unit; something needed is missing.
        MpqcError: as importing the model and opening the data raise it.
    """
    from mpqc import importer

    plugin = load(method, options) if isinstance(method, str) else method
    name = method if isinstance(method, str) else type(method).__name__
    given = [budgets] if isinstance(budgets, str) else list(budgets)
    parsed = [b for b in given if isinstance(b, Budget)]
    texts = [b for b in given if isinstance(b, str)]
    limits = (*parsed, *(parse_budgets(texts) if texts or not parsed else ()))
    _check_needs(plugin, name, data, trainer)
    graph = _import(model, dims, 1)
    if isinstance(constraints, str | Path):
        constraints = Constraints.load(constraints)
    handles: dict[str, Any] = {}
    if data is None:
        handles["graph"] = graph
    elif isinstance(data, Data):
        handles["graph"] = _import(model, dims, data.batch)
        handles["data"] = data
    else:
        handles["graph"] = _batched(model, dims, graph)
        handles["data"] = open_data(data, handles["graph"], preprocess)
    if "labels" in getattr(plugin, "needs", ()) and handles["data"].labels is None:
        raise UsageError(f"method {name!r} needs labels: add an array 'labels' to the data")
    problem = make_problem(
        graph,
        limits,
        getattr(plugin, "widths", Search.widths) if widths is None else widths,
        ends=ends,
        constraints=constraints,
        costs=costs,
        seed=seed,
        model_sha256=importer.sha256(model),
        trainer=trainer,
        cache=None if cache is None else Path(cache),
        progress=progress,
        **handles,
    )
    check_budgets(problem)  # said before anything is measured
    scores = plugin.scores(problem) if isinstance(plugin, ScoreSearch) else None
    if isinstance(plugin, ScoreSearch) and scores is not None:
        plan = plugin.plan(problem, scores)
    else:
        plan = plugin(problem)
    if not isinstance(plan, Plan):
        raise PlanError(f"method {name!r} returned {type(plan).__name__}, not a Plan")
    if found := plan_problems(problem, plan):
        raise PlanError(f"method {name!r} broke the rules: {'; '.join(found)}")
    uniform = widest_uniform(problem)
    trains = "trainer" in getattr(plugin, "needs", ())  # such plans are fine-tuned: noise says less
    noise = confirm(problem, plan, uniform) if confirmed and not trains else {}
    if uniform is not None and noise and noise["uniform"] < noise["plan"]:
        plan = uniform
    return SearchResult(plan, problem, scores, uniform, noise)


def batch_for(graph: Graph) -> int:
    """Samples a batch so that all values together stay small: from 1 to 32.

    Args:
        graph: at batch 1.
    """
    values = sum(graph.type(name).nbytes for node in graph for name in node.outputs if name)
    return max(1, min(32, _BATCH_BYTES // max(values, 1)))


def _batched(model: str | Path, dims: Mapping[str, int] | None, graph: Graph) -> Graph:
    """The model at the batch to measure at; at its own where it fixes one."""
    try:
        return _import(model, dims, batch_for(graph))
    except ModelError:  # it could be imported at one sample
        return graph


def _import(model: str | Path, dims: Mapping[str, int] | None, batch: int) -> Graph:
    from mpqc.pipeline import import_model

    return import_model(model, dims, batch)


def _check_needs(plugin: Search, name: str, data: object, trainer: Trainer | None) -> None:
    needs: frozenset[str] = getattr(plugin, "needs", frozenset())
    if needs & {"data", "labels"} and data is None:
        raise UsageError(f"method {name!r} needs calibration data: give --data")
    if "trainer" in needs and trainer is None:
        raise UsageError(
            f'method {name!r} trains: give --train data; it needs pip install "mpqc[train]"'
        )
