"""What training minimises, and what is measured: distillation, labels, accuracy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from mpqc.errors import ModelError, UsageError
from mpqc.graph import Graph

Outputs: TypeAlias = Mapping[str, Tensor]
Distance: TypeAlias = Literal["auto", "kl", "mse"]


@dataclass(frozen=True)
class Objective:
    """Loss and metric of a network.

    Attributes:
        classes: output that tells classes apart -> its classes; empty for other networks.
        probabilities: those of them that a Softmax gives, not logits.
        distance: of the outputs from the float model's: ``kl`` of the classes, ``mse`` of the
            values over the variance of the float model's.
        label_weight: share of the labels' cross entropy in the loss, the rest is distance.
        temperature: of ``kl``.
    """

    classes: Mapping[str, int]
    probabilities: frozenset[str]
    distance: Literal["kl", "mse"] = "kl"
    label_weight: float = 0.0
    temperature: float = 2.0

    @classmethod
    def of(
        cls,
        graph: Graph,
        labelled: bool,
        distance: Distance = "auto",
        label_weight: float = 0.0,
        temperature: float = 2.0,
    ) -> "Objective":
        """For a network.

        Args:
            graph: its outputs [n, classes] are taken for classes where there are labels, or
                they come from a Softmax, or there is no other output and they are fewer than the
                inputs' values.
            labelled: whether the data have labels.
            distance: ``auto`` is ``kl`` for classes, else ``mse``.
            label_weight: 0 to 1.
            temperature: of ``kl``.

        Raises:
            UsageError: labels are asked for and there are none, or no classes.
        """
        if not 0 <= label_weight <= 1 or temperature <= 0:
            raise UsageError("the labels' share is from 0 to 1, the temperature positive")
        classes, probabilities = {}, set()
        for name in graph.outputs:
            kind, producer = graph.type(name), graph.producer(name)
            if kind.dtype != "float32" or len(kind.shape) != 2 or kind.shape[1] < 2:
                continue
            op = producer.op if producer else ""
            small = kind.shape[1] * kind.shape[0] < sum(t.elements for t in graph.inputs.values())
            if labelled or op in ("Softmax", "LogSoftmax") or (len(graph.outputs) == 1 and small):
                classes[name] = kind.shape[1]
            if op == "Softmax":
                probabilities.add(name)
        if label_weight and not labelled:
            raise UsageError("the loss takes labels, but the training data have none")
        if label_weight and len(classes) != 1:
            raise UsageError(
                f"labels train a network with one output of classes; this one has {len(classes)}"
            )
        found = ("kl" if classes else "mse") if distance == "auto" else distance
        if found == "kl" and not classes:
            raise UsageError("the network has no output of classes: take --distance mse")
        return cls(classes, frozenset(probabilities), found, label_weight, temperature)

    @property
    def head(self) -> str | None:
        """The output of classes, if there is one alone."""
        return next(iter(self.classes)) if len(self.classes) == 1 else None

    def logits(self, name: str, values: Tensor) -> Tensor:
        """What softmax makes probabilities of."""
        return values.clamp_min(1e-12).log() if name in self.probabilities else values

    def loss(self, outputs: Outputs, targets: Outputs | None, labels: Tensor | None) -> Tensor:
        """Scalar.

        Args:
            outputs: of the network.
            targets: of the float model; None where the labels are all.
            labels: int64 [n].
        """
        parts = []
        if targets is not None and self.label_weight < 1:
            distance = torch.stack([self._distance(n, v, targets[n]) for n, v in outputs.items()])
            parts.append((1 - self.label_weight) * distance.mean())
        if self.label_weight:
            if labels is None or self.head is None:
                raise UsageError("the loss takes labels, but the training data have none")
            logits = self.logits(self.head, outputs[self.head])
            parts.append(self.label_weight * F.cross_entropy(logits, labels))
        if not parts:
            raise ModelError("there is nothing to train on: no targets and no labels")
        return torch.stack(parts).sum()

    def _distance(self, name: str, got: Tensor, wanted: Tensor) -> Tensor:
        if self.distance == "kl" and name in self.classes:
            t = self.temperature
            target = F.log_softmax(self.logits(name, wanted) / t, 1)
            found = F.log_softmax(self.logits(name, got) / t, 1)
            return F.kl_div(found, target, reduction="batchmean", log_target=True) * t * t
        if not got.is_floating_point():
            return torch.zeros((), device=got.device)
        spread = (wanted - wanted.mean()).square().mean().clamp_min(1e-12)
        return (got - wanted).square().mean() / spread

    @property
    def metric(self) -> str:
        """Name of what ``Score`` counts."""
        return "accuracy" if self.head else "signal share"


class Score:
    """Accuracy over batches: of the labels, else agreement with the float model's classes.

    Networks without classes: ``1 - noise / signal`` of their outputs, at least 0.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._right = self._seen = 0
        self._noise = self._signal = 0.0
        self.labelled = False

    def add(self, outputs: Outputs, targets: Outputs | None, labels: Tensor | None) -> None:
        """Count a batch."""
        head = self._objective.head
        if head is not None:
            if labels is None and targets is None:
                return
            self.labelled = labels is not None
            wanted = labels if labels is not None else (targets or {})[head].argmax(1)
            self._right += int((outputs[head].argmax(1) == wanted).sum())
            self._seen += len(wanted)
        elif targets is not None:
            for name, wanted in targets.items():
                if wanted.is_floating_point():
                    self._noise += float((outputs[name] - wanted).double().square().sum())
                    self._signal += float((wanted - wanted.mean()).double().square().sum())

    @property
    def value(self) -> float:
        """0 to 1."""
        if self._objective.head is not None:
            return self._right / self._seen if self._seen else 0.0
        return max(0.0, 1.0 - self._noise / self._signal) if self._signal else 0.0
