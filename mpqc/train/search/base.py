"""What searches that train share: from a problem to a network on its way, and to its scores.

A method brings a ``Relaxation``::

    def learned(self, problem):                          # of a ``TrainedSearch``
        from mpqc.train.search.base import learn
        return learn(problem, self, lambda ground: MyRelaxation(ground, self), Schedule(...))

``learn`` opens the trainer, hands its parts over as a ``Ground``, trains with checkpoints in the
problem's cache, and keeps the result there.
"""

import contextlib
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from mpqc.calibration import Calibration
from mpqc.errors import UsageError
from mpqc.graph import Precision
from mpqc.search.base import ScoreSearch
from mpqc.search.cache import Ledger
from mpqc.search.problem import Problem
from mpqc.search.scores import Scores
from mpqc.search.trained import TrainedSearch
from mpqc.train import checkpoint
from mpqc.train.loop import find_device, seeded
from mpqc.train.module import GraphModule
from mpqc.train.search.costs import CostTables, Space
from mpqc.train.search.loop import Relaxation, Schedule, SearchLoop
from mpqc.train.trainer import PlanTrainer

EVERY = 60.0  # seconds between checkpoints


@dataclass(frozen=True, eq=False)
class Ground:
    """What a relaxation is built on.

    Attributes:
        problem: that is solved.
        trainer: data, loss, recipe; its seed is the problem's.
        space: candidate widths.
        costs: expected costs, on the device.
        module: the float network (or the trainer's checkpoint), on the device, without hooks.
        calibration: of what all layers read.
    """

    problem: Problem
    trainer: PlanTrainer
    space: Space
    costs: CostTables
    module: GraphModule
    calibration: Calibration

    @classmethod
    def of(cls, problem: Problem, method: str) -> "Ground":
        """For a problem that has a trainer.

        Raises:
            UsageError: the trainer cannot train mixtures, or has another model.
        """
        trainer = open_trainer(problem, method)
        device = find_device(trainer.device)
        space = Space.of(problem)
        module = trainer.network(None, trainer.checkpoint)
        costs = CostTables(problem, space, device)
        return cls(problem, trainer, space, costs, module, trainer.calibration())


Make: TypeAlias = Callable[[Ground], Relaxation]


def open_trainer(problem: Problem, method: str) -> PlanTrainer:
    """The problem's trainer with the problem's seed.

    Raises:
        UsageError: it is none of ours, or was opened for another model.
    """
    trainer = problem.trainer
    if not isinstance(trainer, PlanTrainer):
        raise UsageError(
            f"method {method!r} needs the trainer of mpqc.train: give --train data, "
            "or PlanTrainer.open(model, data)"
        )
    trainer.calibration()  # once, whatever the seed of the search
    module = GraphModule(trainer.graph)
    if missing := [name for name in problem.choices if name not in module.layers]:
        raise UsageError(f"the trainer was opened for another model: no layer {missing[0]!r}")
    return replace(trainer, recipe=replace(trainer.recipe, seed=problem.seed))


def learn(
    problem: Problem,
    method: TrainedSearch,
    make: Make,
    schedule: Schedule,
    unit: str = "negative logarithm of the strength",
) -> Scores:
    """Train a relaxation, or read what an earlier run ended with.

    Args:
        problem: its cache keeps checkpoint and result.
        method: its options are part of their names.
        make: from a ``Ground`` to the relaxation.
        schedule: of the strengths.
        unit: of the losses.

    Raises:
        TrainingDiverged: NaN; the checkpoint is the last good state.
    """
    trainer = open_trainer(problem, method.name())
    path, about = place(problem, trainer, method)
    known = Ledger(None if path is None else path.with_suffix(".jsonl"))
    wanted = [f"{name} {p}" for name, row in problem.choices.items() for p in row]
    if any(key not in known for key in wanted):  # a process may die while it writes
        seeded(problem.seed)
        ground = Ground.of(problem, method.name())
        relaxation = make(ground)
        work = SearchLoop(relaxation, ground.trainer, schedule, problem.progress)
        if path is not None and path.exists():
            work.restore(checkpoint.load(path, about))
        work.run(path, about, EVERY)
        known.update(
            {
                f"{name} {precision}": loss
                for name, row in relaxation.losses().items()
                for precision, loss in row.items()
            }
        )
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink()
    losses: dict[str, dict[Precision, float]] = {name: {} for name in problem.choices}
    for key, loss in known.items():
        name, _, width = key.rpartition(" ")
        losses[name][Precision.parse(width)] = loss
    return Scores(losses, unit)


def place(
    problem: Problem, trainer: PlanTrainer, method: ScoreSearch
) -> tuple[Path | None, dict[str, str]]:
    """File of the checkpoint, and what has to be the same to go on from it."""
    if problem.cache is None:
        return None, {}
    costs = {
        name: [function(layer, p) for layer in problem.layers for p in problem.choices[layer.name]]
        for name, function in problem.costs.items()
    }
    parts = {
        "the model": fingerprint_model(trainer),
        "the method": repr(method),
        "the recipe": f"{trainer.recipe} {trainer.quantizers} {trainer.objective}",
        "the training data": fingerprint_data(trainer),
        "the problem": f"{problem.choices} {problem.groups} {problem.ties} "
        f"{dict(problem.budgets)} {costs}",
    }
    parts = {key: hashlib.sha256(text.encode()).hexdigest()[:16] for key, text in parts.items()}
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
    return problem.cache / f"{method.name()}-{key}.pt", parts


def fingerprint_model(trainer: PlanTrainer) -> str:
    """Of the weights that training starts with."""
    source = trainer.checkpoint
    graph = trainer.graph if source is None else source.to_graph()
    digest = hashlib.sha256(str(graph).encode())
    for array in graph.constants.values():
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def fingerprint_data(trainer: PlanTrainer) -> str:
    """Of the number of samples, the first of them and all labels."""
    probe = zlib.crc32(b"")
    for part in (trainer.training, trainer.held):
        for array in part.arrays.values():
            probe = zlib.crc32(np.ascontiguousarray(array[part.chosen[:16]]).tobytes(), probe)
        if part.labels is not None:
            probe = zlib.crc32(part.labels[part.chosen].tobytes(), probe)
    return f"{len(trainer.training)} and {len(trainer.held)} samples, checksum {probe:08x}"
