"""Plans whose output channels have widths of their own: costs, checks, and the choice itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mpqc.budget import show
from mpqc.errors import PlanError
from mpqc.graph import Array, Precision
from mpqc.passes.find_layers import Layer
from mpqc.plan import LayerPlan, Plan
from mpqc.search.problem import Problem, Widths

MULTIPLIER = 2.0**40  # of costs against losses: beyond, only costs count


def layer_plan_cost(problem: Problem, layer: Layer, planned: LayerPlan, objective: str) -> float:
    """Each channel counts its share of the layer at its width; a pruned one nothing."""
    function = problem.costs[objective]
    if isinstance(planned.weight_bits, int):
        return function(layer, Precision(planned.weight_bits, planned.activation_bits))
    counts = planned.counts
    total = sum(
        count * function(layer, Precision(bits, planned.activation_bits))
        for bits, count in counts.items()
        if bits
    )
    return total / layer.channels_out


def plan_cost(problem: Problem, plan: Plan, objective: str) -> float:
    """Cost of a plan, floats included. Exact for sizes and BitOPs, which are sums over channels."""
    searched = [
        layer_plan_cost(problem, layer, plan.layers[layer.name], objective)
        for layer in problem.layers
    ]
    return float(sum(searched) + sum(problem.costs[objective](la, None) for la in problem.floats))


def plan_total(problem: Problem, plan: Plan) -> dict[str, float]:
    """Cost of a plan by objective."""
    return {objective: plan_cost(problem, plan, objective) for objective in problem.costs}


def plan_problems(problem: Problem, plan: Plan) -> list[str]:
    """As ``Problem.problems``, with channels of their own widths: each has to be a candidate."""
    found: list[str] = []
    widest: dict[str, Precision] = {}
    for name, planned in plan.layers.items():
        widest[name] = Precision(planned.widest, planned.activation_bits)
        if isinstance(planned.weight_bits, int) or name not in problem.choices:
            continue
        known = {p.weight for p in problem.choices[name] if p.activation == planned.activation_bits}
        if strange := sorted(set(planned.weight_bits) - known - {0}):
            found.append(f"layer {name!r} has channels of {strange[0]} bits, no candidate")
    found = replace(problem, budgets={}).problems(widest) + found
    if found:
        return found
    return [
        f"{objective} is {show(objective, cost)}, the budget is {show(objective, limit)}"
        for objective, limit in problem.budgets.items()
        if (cost := plan_cost(problem, plan, objective)) > limit
    ]


@dataclass(frozen=True, eq=False)
class ChannelScores:
    """What one weight tensor wants.

    Attributes:
        layers: that have these widths: one, or several that are tied.
        losses: width -> float64 [channels]; 0 is pruned. Widths that are missing are not allowed.
    """

    layers: tuple[str, ...]
    losses: Mapping[int, Array]


def choose_channels(
    problem: Problem, inputs: Mapping[str, int], scores: list[ChannelScores], start: Widths
) -> dict[str, tuple[int, ...]]:
    """Widths of all channels for least loss under the budgets, activations as they are given.

    One multiplier prices all budgets; what it leaves of them is spent where a step wins most for
    its cost. With one budget that is within one channel's step of the optimum.

    Args:
        problem: costs and budgets.
        inputs: layer -> activation width.
        scores: of all layers of the problem.
        start: an assignment that keeps the budgets, for channels that nothing else suits.

    Returns:
        Layer -> width of each channel, never all 0.
    """
    tensors = [_Tensor.of(problem, inputs, score) for score in scores]
    fixed = {n: sum(problem.costs[n](la, None) for la in problem.floats) for n in problem.budgets}
    limits = np.array([limit - fixed[name] for name, limit in problem.budgets.items()])

    def spent(chosen: list[Array]) -> Array:
        parts = [t.costs[np.arange(len(c)), c].sum(0) for t, c in zip(tensors, chosen, strict=True)]
        total: Array = np.sum(parts, axis=0)
        return total

    def fits(chosen: list[Array]) -> bool:
        return bool((spent(chosen) <= limits).all())

    def at(price: float) -> list[Array]:
        return [tensor.best(price, limits) for tensor in tensors]

    low, high = 0.0, 1e-9
    chosen = at(low)
    if not fits(chosen):
        while high < MULTIPLIER and not fits(at(high)):
            low, high = high, high * 4
        chosen = at(high)
        for _ in range(50):
            middle = (low + high) / 2
            tried = at(middle)
            if fits(tried):
                high, chosen = middle, tried
            else:
                low = middle
    if not fits(chosen):
        chosen = [
            np.full(len(t.losses), t.widths.index(start[s.layers[0]].weight))
            for t, s in zip(tensors, scores, strict=True)
        ]
    _raise(tensors, chosen, limits - spent(chosen), limits)
    return {
        name: tuple(tensor.widths[index] for index in picked)
        for tensor, picked, score in zip(tensors, chosen, scores, strict=True)
        for name in score.layers
    }


@dataclass(frozen=True, eq=False)
class _Tensor:
    """Losses float64 [channels, widths], costs [channels, widths, budgets]."""

    widths: tuple[int, ...]
    losses: Array
    costs: Array

    @classmethod
    def of(cls, problem: Problem, inputs: Mapping[str, int], score: ChannelScores) -> "_Tensor":
        widths = tuple(sorted(score.losses))
        losses = np.stack([np.asarray(score.losses[bits], np.float64) for bits in widths], axis=1)
        if widths[0] == 0 and len(widths) > 1:  # one channel at least stays
            losses[int(np.argmax(losses[:, 0] - losses[:, 1])), 0] = np.inf
        costs = np.zeros((*losses.shape, len(problem.budgets)))
        for number, objective in enumerate(problem.budgets):
            for index, bits in enumerate(widths):
                if bits:
                    costs[:, index, number] = sum(
                        problem.costs[objective](
                            problem.layer(name), Precision(bits, inputs[name])
                        ) / len(losses)
                        for name in score.layers
                    )  # fmt: skip
        return cls(widths, losses, costs)

    def best(self, price: float, limits: Array) -> Array:
        """Index of the width of each channel at a price of the budgets' shares."""
        priced = self.losses + price * (self.costs / np.maximum(limits, 1e-300)).sum(2)
        chosen: Array = priced.argmin(1)
        return chosen


def _raise(tensors: list[_Tensor], chosen: list[Array], left: Array, limits: Array) -> None:
    """Spend what is left, one step of one channel after the other, until none fits."""
    while True:
        steps: list[tuple[float, int, int]] = []
        for number, (tensor, picked) in enumerate(zip(tensors, chosen, strict=True)):
            for channel in np.flatnonzero(picked + 1 < len(tensor.widths)).tolist():
                now = int(picked[channel])
                cost = tensor.costs[channel, now + 1] - tensor.costs[channel, now]
                if (cost <= left).all():
                    loss = tensor.losses[channel, now + 1] - tensor.losses[channel, now]
                    share = float((cost / np.maximum(limits, 1e-300)).sum())
                    steps.append((loss / max(share, 1e-12), number, channel))
        if not steps:
            return
        for _, number, channel in sorted(steps):
            tensor, now = tensors[number], int(chosen[number][channel])
            cost = tensor.costs[channel, now + 1] - tensor.costs[channel, now]
            if (cost <= left).all():
                chosen[number][channel] = now + 1
                left -= cost


def channel_plan(
    problem: Problem, widths: Mapping[str, tuple[int, ...]], inputs: Mapping[str, int], method: str
) -> Plan:
    """The plan of an assignment by channels, with its provenance.

    Raises:
        PlanError: the assignment breaks the problem's rules: a defect of the plugin.
    """
    narrow = {layer.name: Precision(max(widths[layer.name]), inputs[layer.name])
              for layer in problem.layers}  # fmt: skip
    plan = replace(problem, budgets={}).plan(narrow, method)
    layers = {
        name: planned.model_copy(update={"weight_bits": widths[name]})
        if len(set(widths[name])) > 1
        else planned
        for name, planned in plan.layers.items()
    }
    record = plan.search
    assert record is not None
    plan = plan.model_copy(update={"layers": layers})
    spent = {"budget": dict(problem.budgets), "cost": plan_total(problem, plan)}
    plan = plan.model_copy(update={"search": record.model_copy(update=spent)})
    if found := plan_problems(problem, plan):
        raise PlanError(f"method {method!r} broke the rules: {'; '.join(found)}")
    return plan
