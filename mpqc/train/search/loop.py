"""Weights and strengths in turns: two optimizers, one schedule, checkpoints to the bit."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from mpqc.search.problem import Progress, quiet
from mpqc.search.solve import Losses
from mpqc.train import checkpoint
from mpqc.train.batches import Augment, Batch, TrainingSet
from mpqc.train.loop import Recipe, Teacher, TrainingDiverged, parameter_groups
from mpqc.train.module import GraphModule
from mpqc.train.trainer import PlanTrainer

Turns: TypeAlias = Literal["step", "epoch", "both"]

LEAST_RATE, REACH = 0.01, 4.0  # of strengths


class Relaxation(ABC):
    """What a method brings: the searchable network and what its strengths minimise.

    Attributes:
        name: of the method.
        module: the network with its searchable layers, on the device.
        learning: whether the pass that is drawn for trains strengths; the loop says so.
    """

    name: str
    module: GraphModule
    learning: bool = True

    @abstractmethod
    def strengths(self) -> list[torch.nn.Parameter]:
        """What is learned beside the weights: logits, fractional widths."""

    def weight_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Optimizer's parameter groups of the weights; strengths may be among them."""
        return parameter_groups(self.module, recipe)

    def draw(self, epoch: float) -> None:  # noqa: B027 - most have nothing to draw
        """Before every forward pass: new shares from the strengths as they are."""

    @abstractmethod
    def objective(self, loss: Tensor) -> Tensor:
        """What strengths minimise, from the loss of the task and the shares drawn last."""

    def end_epoch(self, epoch: int) -> None:  # noqa: B027 - most have nothing to do
        """After each epoch, counted from 1."""

    @abstractmethod
    def losses(self) -> Losses:
        """What was learned: layer -> precision -> loss, for ``mpqc.search.repair``."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside module, strengths and optimizers."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have none
        """Take back what ``state`` gave."""


@dataclass(frozen=True)
class Schedule:
    """Who learns when.

    Attributes:
        turns: ``step``: after each step of the weights one of the strengths, on samples of their
            own; ``epoch``: likewise by epochs; ``both``: all learn from the same batches.
        weights_share: of the samples for the weights, where strengths have their own.
        warmup: share of the epochs in which only weights learn.
        lr: of the strengths at first; it falls as a cosine to zero, so that they come to rest.
            None: 0.02, or 8 over their number of steps where that is more, so that a short search
            can move a logit of Adam's by 4.
        optimizer: of the strengths; SGD has a momentum of 0.9.
        weight_decay: of the strengths.
    """

    turns: Turns = "step"
    weights_share: float = 0.5
    warmup: float = 0.0
    lr: float | None = None
    optimizer: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0


@dataclass(frozen=True)
class _Turn:
    kind: Literal["weights", "strengths", "both"]
    number: int  # of the batch among all of its kind
    epoch: float  # at its end
    ends: bool  # an epoch


class SearchLoop:
    """Trains a relaxation.

    Args:
        relaxation: network and objective.
        trainer: data, loss, recipe (epochs, batch size, rates of the weights, augmentation, seed).
        schedule: of the strengths.
        progress: called after every turn.
    """

    def __init__(
        self,
        relaxation: Relaxation,
        trainer: PlanTrainer,
        schedule: Schedule,
        progress: Progress = quiet,
    ) -> None:
        self._method, self._trainer, self._progress = relaxation, trainer, progress
        recipe, module = trainer.recipe, relaxation.module
        self._teacher: Teacher | None = None
        if trainer.objective.label_weight < 1:
            self._teacher = trainer.teacher()
        whole = trainer.training
        self._weights_set = self._strengths_set = whole
        if schedule.turns != "both":
            self._weights_set, self._strengths_set = whole.halves(
                schedule.weights_share, recipe.seed
            )
        for part in (self._weights_set, self._strengths_set):
            part.check_batch(recipe.batch_size)
        self._turns = _turns(
            schedule,
            recipe.epochs,
            len(self._weights_set) // recipe.batch_size,
            len(self._strengths_set) // recipe.batch_size,
        )
        self._strengths = relaxation.strengths()
        own = {id(tensor) for tensor in self._strengths}
        groups = [
            group | {"params": [p for p in group["params"] if id(p) not in own]}
            for group in relaxation.weight_groups(recipe)
        ]
        groups = [group | {"base": group["lr"]} for group in groups if group["params"]]
        self._weights: Any = (
            torch.optim.AdamW(groups, weight_decay=0.0)
            if recipe.optimizer == "adam"
            else torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
        )
        steps = sum(turn.kind != "weights" for turn in self._turns)
        rate = 2 * max(LEAST_RATE, REACH / max(1, steps)) if schedule.lr is None else schedule.lr
        kind = {"lr": rate, "weight_decay": schedule.weight_decay}
        self._rate, self._first = (
            rate,
            min((i for i, turn in enumerate(self._turns) if turn.kind != "weights"), default=0),
        )
        self._learner: Any = (
            torch.optim.Adam(self._strengths, **kind)
            if schedule.optimizer == "adam"
            else torch.optim.SGD(self._strengths, momentum=0.9, **kind)
        )
        self.turn = 0
        self.loss = math.nan
        self._device = next(module.parameters()).device

    @property
    def turns(self) -> int:
        """In all."""
        return len(self._turns)

    def state(self) -> dict[str, Any]:
        """All that a later run needs to go on as if nothing had been."""
        return {
            "turn": self.turn,
            "module": self._method.module.state_dict(),
            "strengths": [tensor.detach().clone() for tensor in self._strengths],
            "weights": self._weights.state_dict(),
            "learner": self._learner.state_dict(),
            "method": self._method.state(),
            "random": torch.get_rng_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.turn = int(state["turn"])
        self._method.module.load_state_dict(state["module"])
        with torch.no_grad():
            for tensor, known in zip(self._strengths, state["strengths"], strict=True):
                tensor.copy_(known)
        self._weights.load_state_dict(state["weights"])
        self._learner.load_state_dict(state["learner"])
        self._method.restore(state["method"])
        torch.set_rng_state(state["random"])

    def run(
        self, path: Path | None = None, about: dict[str, str] | None = None, every: float = 60.0
    ) -> None:
        """Train to the end.

        Args:
            path: of the checkpoint, written after every epoch and every so many seconds.
            about: goes into it.
            every: seconds between two checkpoints.

        Raises:
            TrainingDiverged: NaN or infinity; the checkpoint is the last good state.
        """
        recipe = self._trainer.recipe
        done = self._turns[: self.turn]
        dealt = {kind: sum(t.kind == kind for t in done) for kind in ("weights", "strengths")}
        dealt["both"] = len(done) - sum(dealt.values())
        sets = {"weights": self._weights_set, "both": self._weights_set,
                "strengths": self._strengths_set}  # fmt: skip
        decks = {
            kind: _deal(data, recipe.batch_size, recipe.seed, recipe.augment, dealt[kind])
            for kind, data in sets.items()
        }
        saved = time.monotonic()
        while self.turn < len(self._turns):
            turn = self._turns[self.turn]
            self._advance(turn, next(decks[turn.kind]).to(self._device), path)
            self.turn += 1
            if turn.ends:
                self._method.end_epoch(math.ceil(turn.epoch))
            now = time.monotonic()
            if path is not None and (turn.ends or now - saved > every):
                checkpoint.save(path, self.state(), about or {})
                saved = now
            label = f"{self._method.name}, loss {self.loss:.3f}"
            self._progress(label, self.turn, len(self._turns))

    def _advance(self, turn: _Turn, batch: Batch, path: Path | None) -> None:
        recipe, module = self._trainer.recipe, self._method.module
        rate = recipe.rate(self.turn, len(self._turns))
        for group in self._weights.param_groups:
            group["lr"] = group["base"] * rate
        done = (self.turn - self._first) / max(1, len(self._turns) - self._first)
        for group in self._learner.param_groups:
            group["lr"] = self._rate * 0.5 * (1 + math.cos(math.pi * max(0.0, done)))
        module.train()
        self._method.learning = turn.kind != "weights"
        self._method.draw(turn.epoch)
        targets = None if self._teacher is None else self._teacher(batch)
        loss = self._trainer.objective.loss(module(batch.feeds), targets, batch.labels)
        goal = loss if turn.kind == "weights" else self._method.objective(loss)
        self._weights.zero_grad(set_to_none=True)
        self._learner.zero_grad(set_to_none=True)
        goal.backward()
        learning = [] if turn.kind == "weights" else list(self._strengths)
        if turn.kind != "strengths":
            learning += [p for group in self._weights.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(learning, recipe.clip or math.inf)
        self.loss = float(loss.detach())
        values = (self.loss, float(goal.detach()), float(norm))
        if not all(map(math.isfinite, values)):
            kept = f"; the last good state is in {path}" if path and path.exists() else ""
            raise TrainingDiverged(
                f"{self._method.name} diverged at step {self.turn} of {len(self._turns)} "
                f"(loss {self.loss}){kept}: search with a lower --lr, or look for extreme values "
                "in the data"
            )
        if turn.kind != "strengths":
            self._weights.step()
        if turn.kind != "weights":
            self._learner.step()


def _turns(schedule: Schedule, epochs: float, weights: int, strengths: int) -> list[_Turn]:
    """The whole course.

    Args:
        schedule: how turns are taken.
        epochs: of the weights' set.
        weights: batches an epoch.
        strengths: likewise.
    """
    steps = max(1, round(epochs * weights))
    waits = schedule.warmup * steps
    found: list[_Turn] = []
    learned = 0

    def learn(count: int, epoch: float) -> None:
        nonlocal learned
        for _ in range(count):
            found.append(_Turn("strengths", learned, epoch, False))
            learned += 1

    for step in range(steps):
        epoch = (step + 1) / weights
        last = (step + 1) % weights == 0 or step + 1 == steps
        if schedule.turns == "both":
            kind: Literal["weights", "both"] = "weights" if step < waits else "both"
            found.append(_Turn(kind, step, epoch, last))
            continue
        found.append(_Turn("weights", step, epoch, False))
        if schedule.turns == "step" and step >= waits:
            learn(1, epoch)
        elif schedule.turns == "epoch" and last and step >= waits:
            learn(max(1, round(strengths * min(1.0, epochs))), epoch)
        if last:
            turn = found[-1]
            found[-1] = _Turn(turn.kind, turn.number, turn.epoch, True)
    return found


def _deal(data: TrainingSet, size: int, seed: int, augment: Augment, start: int) -> Iterator[Batch]:
    """Batches without end, from the given number on."""
    epoch, offset = divmod(start, len(data) // size)
    while True:
        yield from data.epoch(size, epoch, seed, augment, offset)
        epoch, offset = epoch + 1, 0
