"""From learned losses to a plan: of some that they allow, the best as it is rounded."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mpqc.errors import BudgetError, UsageError
from mpqc.graph import Precision
from mpqc.search.cache import Ledger
from mpqc.search.problem import Problem
from mpqc.search.repair import filled, repair
from mpqc.search.solve import Losses
from mpqc.search.trained import TrainedSearch
from mpqc.train.batches import Batch, TrainingSet
from mpqc.train.loop import Teacher, find_device, run
from mpqc.train.module import GraphModule
from mpqc.train.search.base import open_trainer, place
from mpqc.train.trainer import PlanTrainer

JUDGED = 2048  # samples
DOUBT = 0.25  # standard deviation of the logarithm of a tensor's losses


def held_loss(trainer: PlanTrainer, module: GraphModule, teacher: Teacher) -> float:
    """Mean loss on the held-out samples, as compiled.

    Of a few hundred samples it tells far smaller differences apart than accuracy, which counts
    whole samples.

    Raises:
        UsageError: none are held out.
    """
    if not len(trainer.held):
        raise UsageError("no samples are held out to measure on: give more data, or --validate")
    return _mean_loss(trainer, module, _with_targets(trainer, teacher, trainer.held))


Judged: TypeAlias = tuple[Batch, dict[str, Tensor] | None]
"""Samples, and the float model's outputs if the loss asks for them."""


def _with_targets(trainer: PlanTrainer, teacher: Teacher, samples: TrainingSet) -> Iterator[Judged]:
    device, soft = find_device(trainer.device), trainer.objective.label_weight < 1
    for batch in samples.batches(trainer.recipe.batch_size):
        yield batch, teacher.anew(batch.to(device)) if soft else None


def _mean_loss(trainer: PlanTrainer, module: GraphModule, judged: Iterable[Judged]) -> float:
    """Over all samples, as compiled."""
    module.eval()
    total, seen, device = 0.0, 0, find_device(trainer.device)
    with torch.no_grad():
        for batch, targets in judged:
            moved = batch.to(device)
            loss = trainer.objective.loss(run(module, moved), targets, moved.labels)
            total += float(loss) * len(batch.numbers)
            seen += len(batch.numbers)
    return total / max(1, seen)


class Judge:
    """Loss of networks that are rounded, not trained.

    To them samples for training are as new as held-out ones. A few hundred would not do: where
    little is lost, a handful of samples loses most of it.

    Args:
        trainer: has the samples, and the float model.
        count: of samples: held-out ones, then others.
    """

    def __init__(self, trainer: PlanTrainer, count: int = JUDGED) -> None:
        self._trainer = trainer
        teacher = trainer.teacher()
        order = np.random.default_rng([trainer.recipe.seed, 7]).permutation(len(trainer.training))
        others = np.sort(order[: max(0, count - len(trainer.held))])
        rest = replace(trainer.training, chosen=trainer.training.chosen[others])
        parts = (trainer.held, rest)
        self._judged = [one for part in parts for one in _with_targets(trainer, teacher, part)]

    def __call__(self, module: GraphModule) -> float:
        """Mean loss, as compiled."""
        return _mean_loss(self._trainer, module, self._judged)


def picked(
    problem: Problem, method: TrainedSearch, losses: Losses, count: int
) -> Mapping[str, Precision]:
    """The plan that loses least, rounded as fine-tuning would start; see ``Judge``.

    Compared are the plan of least loss, the widest uniform one that fits, and some that are drawn:
    what a short search learned about a tensor is right within a factor, not in its order of
    widths; so the losses of each weight tensor and each input are multiplied by a random factor,
    around those of the best plan so far.

    Args:
        problem: its seed draws.
        method: its options are part of the name of what was measured.
        losses: of layers, sums of losses of weights and of inputs.
        count: of drawn plans, at most.
    """
    trainer = open_trainer(problem, method.name())
    learned = repair(problem, losses)
    if not count:
        return learned
    path, _ = place(problem, trainer, method)
    known = Ledger(None if path is None else path.with_suffix(".plans.jsonl"))
    judge: Judge | None = None
    done = 0

    def measured(widths: Mapping[str, Precision]) -> float:
        nonlocal done, judge
        name = json.dumps([str(precision) for precision in widths.values()])
        if name not in known:
            module = trainer.network(trainer.plan(widths), trainer.checkpoint)
            judge = judge or Judge(trainer)
            known[name] = judge(module)
        done += 1
        problem.progress(f"{method.name()}, plans", done, count + 2)
        return known[name] if math.isfinite(known[name]) else math.inf

    best, least = learned, measured(learned)
    if even := _uniform(problem):
        other = filled(problem, losses, even)
        if (loss := measured(other)) < least:
            best, least = other, loss
    factors = Factors.of(problem)
    rng = np.random.default_rng([problem.seed, 6])
    for _ in range(count):
        tried = factors.drawn(rng)
        widths = repair(problem, tried.scaled(losses))
        if (loss := measured(widths)) < least:
            best, least, factors = widths, loss, tried
    return best


@dataclass(frozen=True)
class Factors:
    """Of the losses of tensors.

    Attributes:
        weights: layers that share weight widths -> factor.
        inputs: layers that share an input -> factor.
    """

    weights: Mapping[tuple[str, ...], float]
    inputs: Mapping[tuple[str, ...], float]

    @classmethod
    def of(cls, problem: Problem) -> "Factors":
        """All of them 1."""
        tied = {name for tie in problem.ties for name in tie}
        weights = [*problem.ties, *((name,) for name in problem.choices if name not in tied)]
        return cls(dict.fromkeys(weights, 1.0), dict.fromkeys(problem.groups, 1.0))

    def drawn(self, rng: np.random.Generator) -> "Factors":
        """Others near them."""

        def near(each: Mapping[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
            return {k: v * math.exp(DOUBT * rng.standard_normal()) for k, v in each.items()}

        return Factors(near(self.weights), near(self.inputs))

    def scaled(self, losses: Losses) -> Losses:
        """Losses times these factors."""
        weights = {name: value for names, value in self.weights.items() for name in names}
        inputs = {name: value for names, value in self.inputs.items() for name in names}
        return {name: _scaled(row, weights[name], inputs[name]) for name, row in losses.items()}


def _uniform(problem: Problem) -> dict[str, Precision] | None:
    from mpqc.search import precisions
    from mpqc.search.uniform import Uniform

    try:
        return precisions(Uniform()(problem))
    except BudgetError:
        return None


def _scaled(row: Mapping[Precision, float], weight: float, data: float) -> dict[Precision, float]:
    """Losses of weights and of inputs times a factor each; of both together, where pairs lack."""
    wide = max(row, key=lambda p: (p.weight, p.activation))
    found = {}
    for p in row:
        one, two = Precision(p.weight, wide.activation), Precision(wide.weight, p.activation)
        if one in row and two in row:
            found[p] = weight * (row[one] - row[wide]) + data * (row[two] - row[wide])
        else:
            found[p] = (row[p] - row[wide]) * math.sqrt(weight * data)
    return found
