"""From learned losses to a plan: corrected by networks that are rounded and compared."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mpqc.errors import UsageError
from mpqc.graph import Precision
from mpqc.search.base import ScoreSearch
from mpqc.search.beliefs import measured_plan
from mpqc.search.cache import Ledger
from mpqc.search.problem import Problem, Widths
from mpqc.search.solve import Losses
from mpqc.train.batches import Batch, TrainingSet
from mpqc.train.loop import Teacher, find_device, run
from mpqc.train.module import GraphModule
from mpqc.train.search.base import open_trainer, place
from mpqc.train.trainer import PlanTrainer

JUDGED = 2048  # samples


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
    problem: Problem, method: ScoreSearch, losses: Losses, count: int, trust: float = 1.0
) -> dict[str, Precision]:
    """The plan that loses least, rounded as fine-tuning would start; see ``measured_plan``.

    Args:
        problem: its seed draws.
        method: its options are part of the name of what was measured.
        losses: of layers, as learned.
        count: of plans measured beside the learned, the uniform and the widest one; 0: the
            learned one.
        trust: in the learned losses.
    """
    trainer = open_trainer(problem, method.name())
    path, _ = place(problem, trainer, method)
    known = Ledger(None if path is None else path.with_suffix(".plans.jsonl"))
    judge: Judge | None = None
    done = 0

    def measured(widths: Widths) -> float:
        nonlocal done, judge
        name = json.dumps([str(precision) for precision in widths.values()])
        if name not in known:
            module = trainer.network(trainer.plan(widths), trainer.checkpoint)
            judge = judge or Judge(trainer)
            known[name] = judge(module)
        done += 1
        problem.progress(f"{method.name()}, plans", done, count + 3)
        return known[name] if math.isfinite(known[name]) else math.inf

    return measured_plan(problem, losses, count, measured, trust)
