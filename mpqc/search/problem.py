"""What a search plugin gets to see: layers, widths, costs, budgets; and what it returns."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeAlias

from mpqc.budget import show
from mpqc.data import Data
from mpqc.errors import PlanError, UsageError
from mpqc.graph import Graph, Precision
from mpqc.passes.find_layers import Layer
from mpqc.plan import LayerPlan, Plan, SearchRecord

Widths: TypeAlias = Mapping[str, Precision]
CostFunction: TypeAlias = Callable[[Layer, Precision | None], float]
"""Cost of one layer at one precision; None: it stays in float. Costs of layers add up."""
Progress: TypeAlias = Callable[[str, int, int], None]
"""What is being done, steps done, steps in all."""


class Trainer(Protocol):
    """What a plugin that learns widths needs; the handle comes from ``mpqc[train]``."""

    def train(self, widths: Widths, epochs: float) -> float:
        """Fine-tune the whole network from its checkpoint at these widths.

        Returns:
            The validation metric after it; greater is better.
        """
        ...


def all_pairs(row: Iterable[Precision]) -> bool:
    """Whether every weight width comes with every activation width."""
    known = set(row)
    return len(known) == len({p.weight for p in known}) * len({p.activation for p in known})


def quiet(label: str, done: int, total: int) -> None:
    """A progress callback that says nothing."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One search. Frozen: a plugin returns a plan and changes nothing.

    Attributes:
        layers: the layers to assign, in topological order, with MACs and weight counts of one
            sample. Layers that constraints leave in float are in ``floats``.
        choices: candidate precisions of each layer; a pinned layer has one.
        costs: objective -> cost of a layer at a precision, in bytes, BitOPs, seconds.
        budgets: objective -> upper limit of the sum.
        groups: layers that share the activation width, because they share the input tensor or
            are tied; a partition of ``layers`` (made from their inputs when left out).
        ties: layers that the user wants at equal weight and activation widths.
        floats: quantizable layers that stay in float and still cost something.
        seed: of every random choice.
        model_sha256: of the model file.
        graph: the folded float graph at the batch size of ``data``; weights are its constants.
        data: calibration data as the model takes them, maybe with labels.
        trainer: fine-tunes at given widths.
        cache: folder for what is expensive and does not depend on the budget.
        progress: called now and then.
    """

    layers: tuple[Layer, ...]
    choices: Mapping[str, tuple[Precision, ...]]
    costs: Mapping[str, CostFunction]
    budgets: Mapping[str, float]
    groups: tuple[tuple[str, ...], ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    floats: tuple[Layer, ...] = ()
    seed: int = 0
    model_sha256: str = "0" * 64
    graph: Graph | None = None
    data: Data | None = None
    trainer: Trainer | None = None
    cache: Path | None = None
    progress: Progress = quiet
    _by_name: Mapping[str, Layer] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        by_name = {layer.name: layer for layer in self.layers}
        object.__setattr__(self, "_by_name", MappingProxyType(by_name))
        for name in ("choices", "costs", "budgets"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        if not self.groups:
            object.__setattr__(self, "groups", shared_inputs(self.layers))
        if self.choices.keys() != by_name.keys() or not all(self.choices.values()):
            raise UsageError("every layer of a search needs candidate widths, and only they")
        if sorted(name for group in self.groups for name in group) != sorted(by_name):
            raise UsageError("the tied groups have to hold every layer once")
        if unknown := sorted(self.budgets.keys() - self.costs.keys()):
            raise UsageError(_no_cost(unknown[0]))

    @property
    def weight_groups(self) -> tuple[tuple[str, ...], ...]:
        """Layers that share the weight width: the ties, then every other layer alone."""
        tied = {name for tie in self.ties for name in tie}
        return (*self.ties, *((name,) for name in self.choices if name not in tied))

    def layer(self, name: str) -> Layer:
        return self._by_name[name]

    def cost(self, widths: Widths, objective: str) -> float:
        """Cost of an assignment of all layers, floats included."""
        function = self.costs[objective]
        searched = [function(layer, widths[layer.name]) for layer in self.layers]
        return float(sum(searched) + sum(function(layer, None) for layer in self.floats))

    def total(self, widths: Widths) -> dict[str, float]:
        """Cost of an assignment by objective."""
        return {objective: self.cost(widths, objective) for objective in self.costs}

    def fits(self, widths: Widths) -> bool:
        """Whether all budgets hold."""
        return all(self.cost(widths, name) <= limit for name, limit in self.budgets.items())

    def problems(self, widths: Widths) -> list[str]:
        """Whatever makes an assignment unacceptable, one sentence each."""
        found = [f"layer {name!r} has no width" for name in self.choices if name not in widths]
        found += [f"{name!r} is not a layer of the search" for name in widths.keys() - self.choices]
        if found:
            return found
        found = [
            f"layer {name!r} got {widths[name]}, which is not one of its candidates"
            for name, choices in self.choices.items()
            if widths[name] not in choices
        ]
        found += [
            f"layers {', '.join(group)} share an input but not its width"
            for group in self.groups
            if len({widths[name].activation for name in group}) > 1
        ]
        found += [
            f"layers {', '.join(tie)} are tied but differ"
            for tie in self.ties
            if len({widths[name] for name in tie}) > 1
        ]
        return found + [
            f"{objective} is {show(objective, self.cost(widths, objective))}, "
            f"the budget is {show(objective, limit)}"
            for objective, limit in self.budgets.items()
            if self.cost(widths, objective) > limit
        ]

    def plan(self, widths: Widths, method: str) -> Plan:
        """The plan of an assignment, with its provenance.

        Raises:
            PlanError: the assignment breaks the problem's rules: a defect of the plugin.
        """
        if found := self.problems(widths):
            raise PlanError(f"method {method!r} broke the rules: {'; '.join(found)}")
        layers = {
            layer.name: LayerPlan(
                weight_bits=widths[layer.name].weight,
                activation_bits=widths[layer.name].activation,
            )
            for layer in self.layers
        }
        record = SearchRecord(
            method=method,
            budget=dict(self.budgets),
            cost=self.total(widths),
            seed=self.seed,
            version=_version(),
        )
        return Plan(model_sha256=self.model_sha256, layers=layers, search=record)

    def snap(self, wanted: Widths) -> dict[str, Precision]:
        """The nearest valid assignment, budgets aside.

        Layers that are tied follow the first of them; of equally near widths the wider is taken.
        """
        lead = {name: group[0] for group in self.groups for name in group}
        twin = {name: tie[0] for tie in self.ties for name in tie}
        shared = {
            group[0]: _nearest(
                sorted(
                    set.intersection(
                        *({choice.activation for choice in self.choices[name]} for name in group)
                    )
                ),
                wanted[group[0]].activation,
            )
            for group in self.groups
        }
        snapped: dict[str, Precision] = {}
        for layer in self.layers:
            name = layer.name
            source = twin.get(name, name)
            activation = shared[lead[name]]
            weights = [c.weight for c in self.choices[source] if c.activation == activation]
            snapped[name] = Precision(_nearest(weights, wanted[source].weight), activation)
        return snapped

    def need_graph(self) -> Graph:
        """The graph, or a UsageError: this problem was made without a model."""
        if self.graph is None:
            raise UsageError("this method reads the model's weights: give the problem a graph")
        return self.graph

    def need_data(self, method: str) -> tuple[Graph, Data]:
        """Graph and data.

        Raises:
            UsageError: there are no data.
        """
        if self.data is None:
            raise UsageError(f"method {method!r} needs calibration data: give --data")
        return self.need_graph(), self.data


def shared_inputs(layers: tuple[Layer, ...]) -> tuple[tuple[str, ...], ...]:
    """Names of layers by the value that they read."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.input, []).append(layer.name)
    return tuple(map(tuple, groups.values()))


def _nearest(values: list[int], wanted: int) -> int:
    return min(values, key=lambda value: (abs(value - wanted), -value))


def _no_cost(objective: str) -> str:
    if objective == "latency":
        return (
            "a latency budget needs measured latencies: run mpqc profile, "
            "then give its table with --latency-table"
        )
    return f"there is no cost function for the budget {objective!r}"


def _version() -> str:
    try:
        return metadata.version("mpqc")
    except metadata.PackageNotFoundError:
        return "source tree"
