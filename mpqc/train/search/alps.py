"""What ``mpqc.search.alps`` runs: a network at the widest widths, and trials that start there."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mpqc.graph import Precision
from mpqc.parallel import each
from mpqc.search.alps import Alps, Levels, Metric, Trial, widest
from mpqc.search.cache import Ledger
from mpqc.search.problem import Problem
from mpqc.train import checkpoint
from mpqc.train.loop import Training, TrainingDiverged, seeded
from mpqc.train.module import GraphModule
from mpqc.train.search.base import fingerprint_data, fingerprint_model, open_trainer
from mpqc.train.search.pick import held_loss
from mpqc.train.trainer import PlanTrainer

EVERY = 60.0  # seconds between checkpoints
REFERENCE = "nothing dropped"


@dataclass(frozen=True, eq=False)
class Bench:
    """What all trials share.

    Attributes:
        trainer: its checkpoint is the network at the widest widths.
        epochs: of a trial.
        metric: to return.
    """

    trainer: PlanTrainer
    epochs: float
    metric: Metric


def trial(bench: Bench, widths: Mapping[str, Precision]) -> float:
    """Fine-tune the whole network from the checkpoint, some layers narrower; the metric after."""
    trainer = bench.trainer
    module = trainer.network(trainer.plan(widths), trainer.checkpoint)
    teacher = trainer.teacher()
    work = trainer.fit(module, bench.epochs, teacher)
    if bench.metric == "val_acc":
        return trainer.measure(module, teacher)
    if bench.metric == "val_loss":
        return held_loss(trainer, module, teacher)
    last = work.history[-1]
    return last.training if bench.metric == "train_acc" else last.loss


def measure(problem: Problem, method: Alps, levels: Levels) -> tuple[float, dict[Trial, float]]:
    """The metric with nothing dropped, and with each group at each lower level.

    Trials go through ``mpqc.parallel``; each is in the problem's cache as soon as it ends.

    Raises:
        TrainingDiverged: names the trial; finished trials are kept.
    """
    trainer = open_trainer(problem, "alps")
    wide = widest(levels)
    folder = _place(problem, trainer, method, wide)
    known = Ledger(None if folder is None else folder / "trials.jsonl")
    wanted: dict[str, tuple[Trial | None, dict[str, Precision]]] = {REFERENCE: (None, wide)}
    for group, rows in levels.items():
        for width in sorted(rows)[:-1]:
            named = f"{' '.join(group)} at {width}"
            wanted[named] = ((group, width), wide | rows[width])
    missing = [key for key in wanted if key not in known]
    if missing:
        start = _start(problem, trainer, method, wide, folder)
        bench = Bench(replace(trainer, checkpoint=start), method.epochs, method.metric)
        problem.progress("alps: trials", len(wanted) - len(missing), len(wanted))
        plans = [wanted[key][1] for key in missing]
        done = len(wanted) - len(missing)
        for number, value in each(trial, bench, plans):
            known[missing[number]] = value
            done += 1
            problem.progress("alps: trials", done, len(wanted))
    found = {made: known[key] for key, (made, _) in wanted.items() if made is not None}
    return known[REFERENCE], found


def _start(
    problem: Problem,
    trainer: PlanTrainer,
    method: Alps,
    wide: Mapping[str, Precision],
    folder: Path | None,
) -> GraphModule:
    """The network at the widest widths, trained; kept in the cache, and resumed from there."""
    seeded(problem.seed)
    module = trainer.network(trainer.plan(wide), trainer.checkpoint)
    recipe = replace(trainer.recipe, epochs=method.start or trainer.recipe.epochs)
    work = Training(
        module, trainer.objective, trainer.training, trainer.held, recipe, trainer.teacher()
    )
    path = None if folder is None else folder / "widest.pt"
    about = {"the recipe": str(recipe)}
    if path is not None and path.exists():
        work.restore(checkpoint.load(path, about))
    try:
        work.run(
            lambda status: problem.progress("alps: widest network", status.step, status.steps),
            path, about, EVERY,
        )  # fmt: skip
    except TrainingDiverged as error:
        raise TrainingDiverged(f"the network at the widest widths: {error}") from error
    return module


def _place(
    problem: Problem, trainer: PlanTrainer, method: Alps, wide: Mapping[str, Precision]
) -> Path | None:
    """Folder of the checkpoint and the trials: the same for every budget."""
    if problem.cache is None:
        return None
    parts = (
        fingerprint_model(trainer), fingerprint_data(trainer), repr(method),
        f"{trainer.recipe} {trainer.quantizers} {trainer.objective}",
        sorted((name, str(p)) for name, p in wide.items()),
    )  # fmt: skip
    return problem.cache / f"alps-{hashlib.sha256(repr(parts).encode()).hexdigest()[:20]}"
