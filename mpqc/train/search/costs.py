"""Costs of relaxed widths: expectations over the tables that all searches share."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mpqc.graph import Precision
from mpqc.search.problem import Problem

LEAST_PRICE = 1e-3  # of a bit, relative to the dearest: free bits have to be comparable too
CORNER = 0.1  # of a budget, within which its price rises


@dataclass(frozen=True, eq=False)
class Space:
    """What is searched: candidate widths of every layer, and which of them are one variable.

    Attributes:
        weights: layer -> weight widths, rising.
        inputs: layer -> activation widths, rising; equal in a group.
        weight_key: layer -> the first of the layers whose weight width it shares (ties).
        input_key: layer -> the first of the layers whose activation width it shares.
    """

    weights: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, tuple[int, ...]]
    weight_key: Mapping[str, str]
    input_key: Mapping[str, str]

    @classmethod
    def of(cls, problem: Problem) -> "Space":
        """Of a problem; constraints have made the candidates of groups and ties equal."""
        weight_key = {name: tie[0] for tie in problem.ties for name in tie}
        return cls(
            {n: tuple(sorted({p.weight for p in row})) for n, row in problem.choices.items()},
            {n: tuple(sorted({p.activation for p in row})) for n, row in problem.choices.items()},
            {name: weight_key.get(name, name) for name in problem.choices},
            {name: group[0] for group in problem.groups for name in group},
        )

    def pairs(self, layer: str) -> list[list[Precision]]:
        """Precisions of a layer: rows by weight width, columns by activation width."""
        return [[Precision(w, a) for a in self.inputs[layer]] for w in self.weights[layer]]


class CostTables:
    """The problem's costs as tensors, in shares of the budgets where there are any.

    Args:
        problem: its cost functions are asked once for each layer and pair of widths.
        space: of the problem.
        device: where the shares will be.
    """

    def __init__(self, problem: Problem, space: Space, device: torch.device) -> None:
        self.budgets = dict(problem.budgets)
        self._tables: dict[str, dict[str, Tensor]] = {}
        self._fixed: dict[str, float] = {}
        for name, function in problem.costs.items():
            self._tables[name] = {
                layer.name: torch.tensor(
                    [[function(layer, p) for p in row] for row in space.pairs(layer.name)],
                    dtype=torch.float64,
                    device=device,
                )
                for layer in problem.layers
            }
            self._fixed[name] = float(sum(function(layer, None) for layer in problem.floats))

    def expected(self, shares: Mapping[str, Tensor], objective: str) -> Tensor:
        """Expected cost, a float64 scalar.

        Args:
            shares: layer -> [weight widths, activation widths], sums of 1: see ``joint``.
            objective: size, bitops, latency, ...
        """
        tables = self._tables[objective]
        parts = [(shares[name].double() * table).sum() for name, table in tables.items()]
        return torch.stack(parts).sum() + self._fixed[objective]

    def excess(self, shares: Mapping[str, Tensor]) -> Tensor:
        """``sum over budgets of max(0, E[cost] / budget - 1)``, rounded off, a float32 scalar."""
        over = [
            rounded(torch.relu(self.expected(shares, name) / limit - 1))
            for name, limit in self.budgets.items()
        ]
        return torch.stack(over).sum().float() if over else torch.zeros(())


def rounded(excess: Tensor) -> Tensor:
    """``|excess|`` with a parabola at zero in place of its corner.

    At a corner the price is all or nothing from step to step, and drowns what strengths should
    learn from the task; so it comes to rest where it is worth as much as the task's loss.
    """
    size = excess.abs()
    return torch.where(size < CORNER, excess.square() / (2 * CORNER), size - CORNER / 2)


def joint(weights: Tensor, inputs: Tensor) -> Tensor:
    """Shares of pairs from shares of weight and of activation widths: costs become bilinear.

    Args:
        weights: [widths], or [output channels, widths], whose mean counts.
        inputs: [widths].
    """
    mean = weights.mean(0) if weights.dim() == 2 else weights
    return torch.outer(mean, inputs)
