"""From learned losses to a plan: of some that they allow, the best on held-out samples."""

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mpqc.errors import BudgetError, UsageError
from mpqc.graph import Precision
from mpqc.search.cache import Ledger
from mpqc.search.problem import Problem
from mpqc.search.repair import filled, repair
from mpqc.search.solve import Losses
from mpqc.search.trained import TrainedSearch
from mpqc.train.loop import Teacher, find_device, run
from mpqc.train.module import GraphModule
from mpqc.train.search.base import open_trainer, place
from mpqc.train.trainer import PlanTrainer

DOUBT = 0.5  # standard deviation of the logarithm of a tensor's losses


def held_loss(trainer: PlanTrainer, module: GraphModule, teacher: Teacher) -> float:
    """Mean loss on the held-out samples, as compiled.

    Of a few hundred samples it tells far smaller differences apart than accuracy, which counts
    whole samples.

    Raises:
        UsageError: none are held out.
    """
    if not len(trainer.held):
        raise UsageError("no samples are held out to measure on: give more data, or --validate")
    module.eval()
    total, device = 0.0, find_device(trainer.device)
    with torch.no_grad():
        for batch in trainer.held.batches(trainer.recipe.batch_size):
            moved = batch.to(device)
            targets = teacher.anew(moved) if trainer.objective.label_weight < 1 else None
            loss = trainer.objective.loss(run(module, moved), targets, moved.labels)
            total += float(loss) * len(batch.numbers)
    return total / len(trainer.held)


def drawn(problem: Problem, losses: Losses, count: int) -> list[dict[str, Precision]]:
    """Different plans under the budgets: of least loss, uniform, and of losses in doubt.

    What a short search learned about a tensor is right within a factor, not in its order of
    widths; so the losses of each weight tensor and each input are multiplied by a random factor.

    Args:
        problem: its seed draws.
        losses: of layers, sums of losses of weights and of inputs.
        count: of drawn ones, at most.
    """
    plans = [repair(problem, losses)]
    if even := _uniform(problem):
        plans.append(filled(problem, losses, even))
    rng = np.random.default_rng([problem.seed, 6])
    for _ in range(count):
        factors: list[dict[str, float]] = []
        for sets in (_weights(problem), problem.groups):
            each = {names: float(np.exp(DOUBT * rng.standard_normal())) for names in sets}
            factors.append({name: value for names, value in each.items() for name in names})
        noisy = {
            name: _scaled(row, factors[0][name], factors[1][name]) for name, row in losses.items()
        }
        plans.append(repair(problem, noisy))
    return [plan for number, plan in enumerate(plans) if plan not in plans[:number]]


def picked(
    problem: Problem, method: TrainedSearch, plans: Sequence[Mapping[str, Precision]]
) -> Mapping[str, Precision]:
    """The plan that loses least on the held-out samples, rounded as fine-tuning would start."""
    trainer = open_trainer(problem, method.name())
    if len(plans) == 1 or not len(trainer.held):
        return plans[0]
    path, _ = place(problem, trainer, method)
    known = Ledger(None if path is None else path.with_suffix(".plans.jsonl"))
    teacher = trainer.teacher()
    found = []
    for number, widths in enumerate(plans):
        name = json.dumps([str(precision) for precision in widths.values()])
        if name not in known:
            problem.progress(f"{method.name()}, plans", number, len(plans))
            module = trainer.network(trainer.plan(widths), trainer.checkpoint)
            known[name] = held_loss(trainer, module, teacher)
        found.append(known[name])
    good = [loss if math.isfinite(loss) else math.inf for loss in found]
    return plans[good.index(min(good))]


def _uniform(problem: Problem) -> dict[str, Precision] | None:
    from mpqc.search import precisions
    from mpqc.search.uniform import Uniform

    try:
        return precisions(Uniform()(problem))
    except BudgetError:
        return None


def _weights(problem: Problem) -> list[tuple[str, ...]]:
    """Layers by the weight width that they share."""
    tied = {name for tie in problem.ties for name in tie}
    return [*problem.ties, *((name,) for name in problem.choices if name not in tied)]


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
