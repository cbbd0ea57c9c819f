"""From a graph and what the user asks for to a Problem."""

from collections.abc import Iterable, Mapping
from typing import Any

import networkx as nx

from mpqc.budget import Budget
from mpqc.errors import UsageError
from mpqc.graph import Graph, Precision
from mpqc.passes.estimate_cost import FLOAT_BITS, layer_cost
from mpqc.passes.find_layers import Layer, find_layers, first_layers, last_layers, why_none
from mpqc.plan import Plan
from mpqc.search.constraints import Constraints
from mpqc.search.problem import CostFunction, Problem, shared_inputs

EIGHT = Precision(8, 8)


def size_cost(layer: Layer, precision: Precision | None) -> float:
    """Weights in bytes; scales and biases apart, as ``estimate_cost`` counts."""
    bits = (
        layer.weights * FLOAT_BITS
        if precision is None
        else layer_cost(layer, precision).weight_bits
    )
    return bits / 8


def bitops_cost(layer: Layer, precision: Precision | None) -> float:
    """MACs times weight bits times activation bits."""
    if precision is None:
        return float(layer.macs * FLOAT_BITS**2)
    return float(layer_cost(layer, precision).bitops)


COSTS: Mapping[str, CostFunction] = {"size": size_cost, "bitops": bitops_cost}


def candidates(widths: Iterable[int | Precision | str]) -> tuple[Precision, ...]:
    """Candidate precisions: numbers stand for all their pairs, ``w2a4`` for itself.

    Raises:
        UsageError: none, or a width outside 1 to 8.
    """
    bits, pairs = [], []
    for width in widths:
        text = str(width).strip().lower()
        if text.isdecimal():
            bits.append(int(text))
        else:
            pairs.append(width if isinstance(width, Precision) else Precision.parse(text))
    if wrong := [b for b in bits if not 1 <= b <= 8]:
        raise UsageError(f"widths are from 1 to 8, got {wrong[0]}")
    pairs += [Precision(w, a) for w in sorted(set(bits)) for a in sorted(set(bits))]
    if not pairs:
        raise UsageError("a search needs candidate widths, for example --widths 2,4,8")
    return tuple(dict.fromkeys(pairs))


def make_problem(
    graph: Graph,
    budgets: Iterable[Budget],
    widths: Iterable[int | Precision | str],
    /,
    *,
    ends: Precision | None = EIGHT,
    constraints: Constraints | None = None,
    costs: Mapping[str, CostFunction] | None = None,
    **handles: Any,
) -> Problem:
    """State a search.

    The first layers and the classifier are pinned to ``ends``, the convention of ``--bits`` and
    of the uniform builds that relative budgets refer to. A layer that shares its input with a
    pinned one can only take the pinned activation width.

    Args:
        graph: the folded float graph at batch 1: costs count one sample.
        budgets: limits; relative ones refer to ``Plan.uniform`` with the same ``ends``.
        widths: see ``candidates``.
        ends: None: the ends are searched like all other layers.
        constraints: pins, bounds, ties and exclusions.
        costs: more cost functions, such as a measured ``latency``.
        handles: the other fields of ``Problem``.

    Raises:
        UsageError: nothing to search, or constraints that contradict each other.
    """
    layers = find_layers(graph)
    if not layers:
        raise UsageError(why_none(graph))
    functions = {**COSTS, **(costs or {})}
    matched = (constraints or Constraints()).matched(layer.name for layer in layers)
    fixed = {} if ends is None else dict.fromkeys((*first_layers(graph), *last_layers(graph)), ends)
    allowed = candidates(widths)
    choices = {
        layer.name: matched.choices(layer.name, allowed)
        if layer.name in matched.pins or layer.name not in fixed
        else (fixed[layer.name],)
        for layer in layers
        if layer.name not in matched.excluded
    }
    searched = tuple(layer for layer in layers if layer.name in choices)
    if not searched:
        raise UsageError("the constraints exclude every layer")
    ties = _merged(matched.ties)
    groups = _merged((*shared_inputs(searched), *ties))
    _agree(choices, ties, groups, frozenset(fixed) - matched.pins.keys())

    def uniform_cost(objective: str, precision: Precision) -> float:
        if objective not in functions:
            return 1.0  # Problem names what is missing
        planned = Plan.uniform(graph, precision, ends).layers
        return sum(
            functions[objective](layer, Precision(planned[layer.name].widest,
                                                  planned[layer.name].activation_bits))
            for layer in layers
        )  # fmt: skip

    return Problem(
        layers=searched,
        choices=choices,
        costs=functions,
        budgets={budget.objective: budget.resolve(uniform_cost) for budget in budgets},
        groups=groups,
        ties=ties,
        floats=tuple(layer for layer in layers if layer.name in matched.excluded),
        **handles,
    )


def _merged(sets: Iterable[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Overlapping sets become one; order of first appearance."""
    union: Any = nx.Graph()
    for names in sets:
        nx.add_path(union, names)
    rank = {name: index for index, name in enumerate(union)}
    parts = [tuple(sorted(part, key=rank.__getitem__)) for part in nx.connected_components(union)]
    return tuple(sorted(parts, key=lambda part: rank[part[0]]))


def _agree(
    choices: dict[str, tuple[Precision, ...]],
    ties: tuple[tuple[str, ...], ...],
    groups: tuple[tuple[str, ...], ...],
    by_default: frozenset[str],
) -> None:
    """Leave to tied layers what they have in common.

    An end that is pinned by default follows a layer that the user pinned.
    """
    for tie in ties:
        if bound := [name for name in tie if name not in by_default]:
            for name in set(tie) - set(bound):
                choices[name] = choices[bound[0]]
        common = set.intersection(*(set(choices[name]) for name in tie))
        if not common:
            raise UsageError(f"constraints: tied layers {', '.join(tie)} have no width in common")
        for name in tie:
            choices[name] = tuple(p for p in choices[name] if p in common)
    for group in groups:
        shared = set.intersection(*({p.activation for p in choices[name]} for name in group))
        if not shared and (bound := [name for name in group if name not in by_default]):
            for name in set(group) - set(bound):  # 8-bit weights, the activations of the others
                weights = {p.weight for p in choices[name]}
                widths = {p.activation for p in choices[bound[0]]}
                choices[name] = tuple(Precision(w, a) for w in weights for a in sorted(widths))
            shared = set.intersection(*({p.activation for p in choices[name]} for name in group))
        if not shared:
            names = ", ".join(group)
            raise UsageError(f"layers {names} share an input but no activation width; repin one")
        for name in group:
            choices[name] = tuple(p for p in choices[name] if p.activation in shared)
