"""alps: one fine-tune a group of layers with that group narrower."""

from dataclasses import dataclass
from typing import Literal

from mpqc.errors import UsageError
from mpqc.graph import Precision
from mpqc.plan import Plan
from mpqc.search.base import ScoreSearch
from mpqc.search.eagl import equal_widths
from mpqc.search.problem import Problem, all_pairs
from mpqc.search.scores import Scores

Metric = Literal["val_loss", "val_acc", "train_acc", "train_loss"]
Groups = Literal["tensors", "layers"]
TRUST = 0.4  # in single trials: a group that lost nothing by luck does lose


@dataclass(frozen=True)
class Alps(ScoreSearch):
    """Fine-tune once for each group of layers with only that group narrow (arXiv 2301.13330).

    Attributes:
        epochs: of each trial.
        start: epochs of the network at the widest candidates, from which all trials start; 0: as
            many as ``--epochs`` says.
        metric: that a group's narrowing makes worse: the loss of training on held-out samples,
            accuracy there, or accuracy or loss in training.
        groups: what one trial narrows: ``tensors``: weights or an input; ``layers``: both, to the
            same width, as published.
        samples: plans that are measured, rounded and not trained, to correct the losses for the
            budget; 0: the knapsack's plan over them, as published.
    """

    needs = frozenset({"trainer"})
    widths = (2, 4)

    epochs: float = 1.0
    start: float = 0.0
    metric: Metric = "val_loss"
    groups: Groups = "tensors"
    samples: int = 16

    def __post_init__(self) -> None:
        if not (self.epochs > 0 and self.start >= 0):
            raise UsageError("alps: epochs of a trial are positive, start is not negative")
        if self.samples < 0:
            raise UsageError("alps: samples is not negative")

    def scores(self, problem: Problem) -> Scores:
        if problem.trainer is None:
            raise UsageError(
                "method 'alps' trains: give --train data; it needs pip install \"mpqc[train]\""
            )
        from mpqc.search.solve import solve

        levels = tensor_levels(problem) if self.groups == "tensors" else group_levels(problem)
        even = losses_of(problem, levels, {})
        solve(problem, even)  # a budget that cannot be met is said before hours of training
        from mpqc.train.search.alps import measure

        reference, found = measure(problem, self, levels)
        loss = self.metric.endswith("loss")
        worse = 1.0 if loss else -1.0
        drops = with_ties({t: max(0.0, worse * (v - reference)) for t, v in found.items()})
        unit = "loss gained" if loss else "accuracy lost"
        return Scores(losses_of(problem, levels, drops), f"{unit} in {self.epochs:g} epochs")

    def plan(self, problem: Problem, scores: Scores) -> Plan:
        if not (self.samples and problem.budgets):
            return super().plan(problem, scores)
        from mpqc.train.search.pick import picked

        widths = picked(problem, self, scores.losses, self.samples, TRUST)
        return problem.plan(widths, self.name())


def with_ties(drops: "dict[Trial, float]") -> "dict[Trial, float]":
    """Of groups that lose the same, the wider one is better: what fits the budget is used.

    What is added is a ten-thousandth of the greatest drop and falls as the noise of rounding.
    """
    tie = 1e-4 * (max(drops.values(), default=0.0) or 1.0)
    return {(group, bits): drop + tie * 4.0**-bits for (group, bits), drop in drops.items()}


Levels = dict[tuple[str, ...], dict[int, dict[str, Precision]]]
"""Group -> width -> precision of each of its layers, others at their widest; the widest last.

A group of a tensor is WEIGHTS or INPUT, then its layers.
"""
Trial = tuple[tuple[str, ...], int]
WEIGHTS, INPUT = "weights of", "input of"


def group_levels(problem: Problem) -> Levels:
    """What each group of layers can be narrowed to: one decision a group, as in the paper.

    Groups share an input or are tied. Weights and inputs get the same width where constraints
    leave them free; elsewhere the nearest that they allow. Levels that come out equal are one.
    """
    made: Levels = {}
    for group in problem.groups:
        bits = sorted({b for name in group for p in equal_widths(problem.choices[name])
                       for b in (p.weight, p.activation)})  # fmt: skip
        levels: dict[int, dict[str, Precision]] = {}
        for width in bits:
            wanted = {name: Precision(width, width) for name in problem.choices}
            snapped = problem.snap(wanted)
            level = {name: snapped[name] for name in group}
            if level not in levels.values():
                levels[width] = level
        made[group] = levels
    return made


def tensor_levels(problem: Problem) -> Levels:
    """What each weight tensor and each input can be narrowed to, one decision a tensor.

    Where some pairs of widths are not allowed, those of ``group_levels``.
    """
    if not all(all_pairs(row) for row in problem.choices.values()):
        return group_levels(problem)
    wide = {
        name: Precision(max(p.weight for p in row), max(p.activation for p in row))
        for name, row in problem.choices.items()
    }
    made: Levels = {}
    for names in problem.weight_groups:
        made[WEIGHTS, *names] = {
            bits: {name: Precision(bits, wide[name].activation) for name in names}
            for bits in sorted({p.weight for p in problem.choices[names[0]]})
        }
    for names in problem.groups:
        made[INPUT, *names] = {
            bits: {name: Precision(wide[name].weight, bits) for name in names}
            for bits in sorted({p.activation for p in problem.choices[names[0]]})
        }
    return made


def widest(levels: Levels) -> dict[str, Precision]:
    """Every layer at its highest level."""
    return {name: p for group in levels.values() for name, p in group[max(group)].items()}


def losses_of(
    problem: Problem, levels: Levels, drops: dict[Trial, float]
) -> dict[str, dict[Precision, float]]:
    """A group's loss, spread evenly over its layers, which share their level."""
    losses: dict[str, dict[Precision, float]] = {layer.name: {} for layer in problem.layers}
    tensors: dict[tuple[str, str, int], float] = {}
    for group, rows in levels.items():
        for width, level in rows.items():
            loss = drops.get((group, width), 0.0) / len(level)
            for name, precision in level.items():
                if group[0] in (WEIGHTS, INPUT):
                    tensors[group[0], name, width] = loss
                else:
                    losses[name][precision] = min(loss, losses[name].get(precision, loss))
    if tensors:
        return {
            name: {
                p: tensors[WEIGHTS, name, p.weight] + tensors[INPUT, name, p.activation]
                for p in row
            }
            for name, row in problem.choices.items()
        }
    return losses
