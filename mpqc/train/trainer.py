"""The trainer that searches get: one model, its data, and what training at given widths takes."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mpqc.calibration import Calibration, calibrate
from mpqc.data import Data
from mpqc.errors import UsageError
from mpqc.graph import Graph, Precision
from mpqc.passes.find_layers import find_layers
from mpqc.passes.round_layers import round_layers
from mpqc.plan import LayerPlan, Plan
from mpqc.rounding import Accuracy
from mpqc.train.batches import SetData, TrainingSet
from mpqc.train.loop import Recipe, Teacher, Training, evaluate, find_device, seeded, settle
from mpqc.train.module import GraphModule
from mpqc.train.objective import Objective
from mpqc.train.quantized_layer import Quantizers, quantize_module
from mpqc.train.source import CALIBRATION_SAMPLES, Samples, Source


@dataclass(eq=False)
class PlanTrainer:
    """Trains one model at any widths; the ``Trainer`` of ``mpqc.search``. It pickles.

    Attributes:
        graph: for training; BatchNormalization kept.
        flat: the float graph that the compiler quantizes, at the batch of
        data: calibration data.
        training: samples.
        held: held-out samples, on which metrics are measured.
        objective: loss and metric.
        recipe: of each run; ``epochs`` is given with it.
        quantizers: that learn.
        device: of all runs.
        model_sha256: of the model file.
        checkpoint: where ``train`` starts: a quantized network; None: the float model, rounded
            with compensation.
    """

    graph: Graph
    flat: Graph
    data: Data
    training: TrainingSet
    held: TrainingSet
    objective: Objective
    recipe: Recipe
    quantizers: Quantizers = Quantizers()  # noqa: RUF009 - frozen
    device: str = "auto"
    model_sha256: str = "0" * 64
    checkpoint: GraphModule | None = None
    _calibration: Calibration | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        model: str | Path,
        train: Samples,
        *,
        validate: Samples | None = None,
        preprocess: str | Path | None = None,
        dims: Mapping[str, int] | None = None,
        recipe: Recipe | None = None,
        quantizers: Quantizers | None = None,
        label_weight: float = 0.0,
        device: str = "auto",
        max_samples: int | None = None,
    ) -> "PlanTrainer":
        """Read model and data.

        Args:
            model: float ONNX file.
            train: training data, as ``mpqc.data`` reads them; labels are not needed.
            validate: data to measure on; by default a tenth of the training data, at most 1000.
            preprocess: of pictures.
            dims: of symbolic dimensions.
            recipe: of each run.
            quantizers: that learn.
            label_weight: share of the labels in the loss.
            device: auto, cpu, cuda.
            max_samples: of the training data.
        """
        find_device(device)
        recipe = recipe or Recipe()
        source = Source.open(
            model, train, recipe.batch_size, preprocess, dims, max_samples, recipe.seed
        )
        labelled = source.data.labels is not None
        objective = Objective.of(source.graph, labelled, label_weight=label_weight)
        training, held = source.samples(
            validate, preprocess, objective, recipe.batch_size, recipe.seed
        )
        data = SetData(training, source.data.batch)  # unlike files, it pickles
        return cls(source.graph, source.flat, data, training, held, objective, recipe,
                   quantizers or Quantizers(), device, source.sha256)  # fmt: skip

    def teacher(self) -> Teacher:
        """The float model; keep it for several runs."""
        module = GraphModule(self.graph).to(find_device(self.device))
        known = None if self.recipe.augment else self.training
        return Teacher(module, known, self.recipe.batch_size)

    def calibration(self) -> Calibration:
        """Of the inputs of all layers; measured once."""
        if self._calibration is None:
            tensors = dict.fromkeys(layer.input for layer in find_layers(self.flat))
            self._calibration = calibrate(
                self.flat, self.data, tensors, CALIBRATION_SAMPLES, self.recipe.seed
            )
        return self._calibration

    def plan(self, widths: Mapping[str, Precision]) -> Plan:
        """Widths as a plan."""
        layers = {
            name: LayerPlan(weight_bits=p.weight, activation_bits=p.activation)
            for name, p in widths.items()
        }
        return Plan(model_sha256=self.model_sha256, layers=layers)

    def network(
        self,
        plan: Plan | None = None,
        checkpoint: GraphModule | None = None,
        compensate: bool = True,
    ) -> GraphModule:
        """A fresh module on the device.

        Args:
            plan: quantize at these widths; None: a float network.
            checkpoint: take its weights, and the quantizers of the layers that keep their
                widths; others start with steps of least squared error.
            compensate: without a checkpoint, start where training-free quantization ends.
        """
        module = GraphModule(self.graph if checkpoint is None else checkpoint.to_graph())
        rounded = None
        if plan is not None:
            if checkpoint is None and compensate and plan.narrow:
                rounded = round_layers(
                    self.flat, plan, self.calibration(),
                    self.data.sample(CALIBRATION_SAMPLES, self.recipe.seed),
                    Accuracy(), seed=self.recipe.seed,
                )  # fmt: skip
            quantize_module(module, plan, self.calibration(), rounded, self.quantizers)
            if checkpoint is not None:
                _keep_quantizers(module, checkpoint)
        module.to(find_device(self.device))
        if plan is not None:
            keep = rounded is not None and self.quantizers.compensated
            settle(module, self.training, self.recipe, keep)
        return module

    def fit(
        self, module: GraphModule, epochs: float, teacher: Teacher | None = None, **changes: Any
    ) -> Training:
        """Train a module; its averaged weights are in it afterwards.

        Args:
            module: from ``network``, or with hooks of a search.
            epochs: may be a fraction.
            teacher: from ``teacher``; made anew without.
            changes: fields of ``Recipe`` that differ, and ``extra_loss`` and ``groups``.
        """
        extra = {key: changes.pop(key) for key in ("extra_loss", "groups") if key in changes}
        recipe = replace(self.recipe, epochs=epochs, **changes)
        seeded(recipe.seed)
        work = Training(
            module, self.objective, self.training, self.held, recipe,
            teacher or self.teacher(), **extra,
        )  # fmt: skip
        work.run()
        return work

    def measure(self, module: GraphModule, teacher: Teacher | None = None) -> float:
        """Metric on the held-out samples, as compiled; greater is better."""
        judge = None
        if self.held.labels is None or self.objective.head is None:
            judge = teacher or Teacher(GraphModule(self.graph).to(find_device(self.device)))
        if not len(self.held):
            raise UsageError("no samples are held out to measure on: give more data, or --validate")
        return evaluate(module, self.held, self.objective, judge, self.recipe.batch_size)

    def train(self, widths: Mapping[str, Precision], epochs: float) -> float:
        """Fine-tune the whole network from the checkpoint at these widths; see ``Trainer``."""
        module = self.network(self.plan(widths), self.checkpoint)
        teacher = self.teacher()
        if epochs > 0:
            self.fit(module, epochs, teacher)
        return self.measure(module, teacher)


def _keep_quantizers(module: GraphModule, before: GraphModule) -> None:
    """Take over the quantizers of layers whose widths have not changed.

    Weights' steps go by layers, inputs' by values, which all readers of a value share.
    """
    for name in module.hooks.names():
        new, old = module.hooks.find(name), before.hooks.find(name)
        if old is None or type(old) is not type(new):
            continue
        if new.offset is None and old.offset is not None:
            new.offset = copy.deepcopy(old.offset)
        if _shapes(new.weight) == _shapes(old.weight) and _levels(new) == _levels(old):
            new.weight.load_state_dict(old.weight.state_dict())
        if type(new.data) is type(old.data) and new.data.bits == old.data.bits:
            _copy_rule(new.data, old.data)


def _copy_rule(new: Any, old: Any) -> None:
    new.load_state_dict(old.state_dict())
    if hasattr(old, "zero_point"):
        new.zero_point = old.zero_point


def _levels(hook: Any) -> tuple[Any, ...]:
    levels = getattr(hook.weight, "levels", None)
    if levels is None:
        return (hook.weight.bits, hook.weight.scheme)
    return (levels.kind, *levels.low.reshape(-1).tolist(), *levels.high.reshape(-1).tolist())


def _shapes(module: torch.nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()]
