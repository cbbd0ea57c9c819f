"""The training loop: teacher, schedule, averages, checkpoints. The same for every method."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mpqc.errors import EnvironmentLacks, MpqcError, UsageError
from mpqc.train import checkpoint
from mpqc.train.batches import Augment, Batch, TrainingSet
from mpqc.train.module import GraphModule
from mpqc.train.objective import Objective, Score
from mpqc.train.quantized_layer import QuantizedLayer

TARGET_BYTES = 2**30  # of the float model's outputs on all samples, beyond: computed each time
SETTLING_SAMPLES = 256
SMALLEST = 1e-2  # magnitude of parameters that start at zero


class TrainingDiverged(MpqcError):  # noqa: N818 - reads as the sentence it is
    """The loss or a gradient became NaN or infinite."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: may be a fraction.
        batch_size: samples of a step; what does not fill one is left out of an epoch.
        lr: of the weights, over the root mean square that each parameter starts with: 0.01
            moves it by about a percent a step at first. Half of it for each bit that quantized
            layers have beyond two: their steps are finer, and they start closer to the float model.
        step_lr: of logarithms of the quantizers' steps, and of what hooks add; likewise.
        optimizer: ``adam``, or ``sgd`` with Nesterov momentum 0.9.
        weight_decay: decoupled, of weights.
        warmup: share of all steps in which the rates rise; then they fall as a cosine to zero.
        ema: decay of the running average of the weights, which is what is evaluated and kept;
            0 for none. It starts lower.
        freeze: share of all steps at the end in which BatchNormalization keeps its statistics;
            by default all of them, because the noise of small batches costs more than it brings
            a network that starts close to its goal.
        clip: greatest norm of the gradient; 0 for none.
        augment: of pictures.
        seed: of the order and of augmentation.
    """

    epochs: float = 10.0
    batch_size: int = 64
    lr: float = 0.005
    step_lr: float = 0.003
    optimizer: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0
    warmup: float = 0.05
    ema: float = 0.999
    freeze: float = 1.0
    clip: float = 0.0
    augment: Augment = Augment()  # noqa: RUF009 - frozen
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.epochs > 0 and self.batch_size > 0 and self.lr > 0 and self.step_lr >= 0):
            raise UsageError("epochs, batch size and learning rate must be positive")
        if not (0 <= self.ema < 1 and 0 <= self.warmup < 1 and 0 <= self.freeze <= 1):
            raise UsageError("ema and warmup are from 0 to below 1, freeze from 0 to 1")
        if self.optimizer not in ("adam", "sgd"):
            raise UsageError(f"no optimizer {self.optimizer!r}: adam or sgd")

    def rate(self, step: int, steps: int) -> float:
        """Share of the learning rates at a step, 0 to 1."""
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@dataclass
class EpochRecord:
    """One line of the history; accuracies as ``Objective.metric`` says."""

    epoch: int
    loss: float
    training: float
    validation: float | None
    rate: float
    seconds: float


@dataclass(frozen=True)
class Status:
    """Where training is; ``record`` is set when an epoch has ended."""

    step: int
    steps: int
    loss: float
    training: float
    record: EpochRecord | None = None


@dataclass
class Best:
    """Weights as they were once.

    Attributes:
        metric: validation.
        epoch: how many had ended; 0: where training starts.
        weights: parameters and statistics by name.
    """

    metric: float
    epoch: int
    weights: dict[str, Tensor]


Report: TypeAlias = Callable[[Status], None]


def silent(status: Status) -> None:
    """Says nothing."""


def find_device(name: str = "auto") -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one.

    Raises:
        EnvironmentLacks: the machine has no such device.
        UsageError: not a device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no device {name!r}: auto, cpu, cuda, or cuda:1") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise EnvironmentLacks(
                f"device {name} was asked for, but PyTorch {torch.__version__} sees {count} GPUs "
                "here: use --device cpu, or install a PyTorch with CUDA and the GPU's driver"
            )
    elif device.type != "cpu":
        raise UsageError(f"no device {name!r}: auto, cpu, cuda, or cuda:1")
    return device


class Teacher:
    """Outputs of the float model.

    Args:
        module: the float network.
        data: compute its outputs on all of them now, where they fit; None: on each batch.
    """

    def __init__(self, module: GraphModule, data: TrainingSet | None = None, size: int = 64):
        self._module = module.eval()
        self._known: dict[str, Tensor] | None = None
        if data is None or not len(data):
            return
        first = self(data.take(data.chosen[:1]).to(_device_of(module)))
        bytes_ = sum(tensor.nbytes for tensor in first.values()) * len(
            next(iter(data.arrays.values()))
        )
        if bytes_ > TARGET_BYTES:
            return
        total = len(next(iter(data.arrays.values())))
        known = {
            name: torch.zeros((total, *tensor.shape[1:]), dtype=tensor.dtype)
            for name, tensor in first.items()
        }
        for batch in data.batches(size):
            for name, tensor in self(batch.to(_device_of(module))).items():
                known[name][torch.from_numpy(batch.numbers)] = tensor.cpu()
        self._known = known

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        if self._known is not None:
            numbers = torch.from_numpy(batch.numbers)
            device = _device_of(self._module)
            return {name: tensor[numbers].to(device) for name, tensor in self._known.items()}
        return self.anew(batch)

    def anew(self, batch: Batch) -> dict[str, Tensor]:
        """Computed now: for samples that are not of the set whose outputs are known."""
        with torch.no_grad():
            return run(self._module, batch)


def _device_of(module: torch.nn.Module) -> torch.device:
    device: torch.device = next(module.parameters()).device
    return device


@dataclass
class Training:
    """A network on its way.

    Attributes:
        module: trained in place; ``run`` leaves the averaged weights in it, in evaluation mode.
        objective: loss and metric.
        training: samples.
        validation: measured after every epoch; may be empty.
        recipe: how.
        teacher: float model; None where labels are all.
        extra_loss: added to the loss of each step; for the cost terms of searches.
        groups: optimizer's parameter groups, by default all parameters of the module.
        best: the best weights of those that ``consider`` was called for; what ``run`` leaves.
    """

    module: GraphModule
    objective: Objective
    training: TrainingSet
    validation: TrainingSet
    recipe: Recipe
    teacher: Teacher | None
    extra_loss: Callable[[], Tensor] | None = None
    groups: list[dict[str, Any]] | None = None
    history: list[EpochRecord] = field(default_factory=list)
    step: int = 0
    best: "Best | None" = None

    def __post_init__(self) -> None:
        self.training.check_batch(self.recipe.batch_size)
        if self.objective.head is not None:
            for part in (self.training, self.validation):
                part.check_labels(self.objective.classes[self.objective.head])
        self.device = _device_of(self.module)
        self.per_epoch = len(self.training) // self.recipe.batch_size
        self.steps = max(1, round(self.recipe.epochs * self.per_epoch))
        groups = self.groups or parameter_groups(self.module, self.recipe)
        for group in groups:
            group["base"] = group["lr"]
        if self.recipe.optimizer == "adam":
            fused = self.device.type == "cpu" or None  # elsewhere as torch thinks best
            self.optimizer: Any = torch.optim.AdamW(groups, weight_decay=0.0, fused=fused)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
        self._average = {name: t.detach().clone() for name, t in self._averaged().items()}
        self._sums = [0.0, 0.0, 0.0]  # loss, right, seen of this epoch

    def _averaged(self) -> dict[str, Tensor]:
        """Parameters and running statistics; constants, which may be infinite, stay."""
        return dict(self.module.named_parameters()) | {
            f"statistics of {name}": tensor for name, tensor in self.module.statistics().items()
        }

    # State -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that a later run needs to go on as if nothing had been."""
        return {
            "step": self.step,
            "module": self.module.state_dict(),
            "average": self._average,
            "optimizer": self.optimizer.state_dict(),
            "history": [asdict(record) for record in self.history],
            "sums": self._sums,
            "random": torch.get_rng_state(),
            "best": None if self.best is None else dict(vars(self.best)),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.step = int(state["step"])
        self.module.load_state_dict(state["module"])
        for name, tensor in state["average"].items():
            self._average[name].copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [EpochRecord(**record) for record in state["history"]]
        self._sums = list(state["sums"])
        torch.set_rng_state(state["random"])
        if state["best"] is not None:
            self.best = Best(**state["best"])

    def consider(self, metric: float, epoch: int) -> None:
        """Keep the module's weights as the best, unless others were better.

        Called before ``run``, it makes every epoch's averaged weights a candidate, and ``run``
        leaves the best of all in the module. Of equal ones the latest is taken.
        """
        if self.best is None or metric >= self.best.metric:
            weights = {name: t.detach().clone() for name, t in self._averaged().items()}
            self.best = Best(metric, epoch, weights)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the module, for a while."""
        own = {name: tensor.detach().clone() for name, tensor in self._averaged().items()}
        self.keep_average()
        try:
            yield
        finally:
            self._take(own)

    def keep_average(self) -> None:
        """The averaged weights in the module, for good."""
        if self.recipe.ema:
            self._take(self._average)

    def _take(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._averaged().items():
                tensor.copy_(weights[name])

    # Steps -----------------------------------------------------------------------------------

    def run(
        self,
        report: Report = silent,
        path: Path | None = None,
        about: dict[str, str] | None = None,
        every: float = 60.0,
        stop: int | None = None,
    ) -> list[EpochRecord]:
        """Train from the step where it stands to the end.

        Args:
            report: called after every step and every epoch.
            path: of the checkpoint, written after every epoch and every so many seconds.
            about: goes into the checkpoint.
            every: seconds between two checkpoints.
            stop: step to stop at, before the end.

        Raises:
            TrainingDiverged: NaN or infinity; the checkpoint is the last good state.
        """
        last = self.steps if stop is None else min(stop, self.steps)
        saved = started = time.monotonic()
        while self.step < last:
            epoch, start = divmod(self.step, self.per_epoch)
            size, seed = self.recipe.batch_size, self.recipe.seed
            for batch in self.training.epoch(size, epoch, seed, self.recipe.augment, start):
                self._advance(batch.to(self.device), path)
                done = self.step % self.per_epoch == 0 or self.step == self.steps
                record = self._end_epoch(epoch, started) if done else None
                report(self._status(record))
                now = time.monotonic()
                if done:
                    started = now
                if path is not None and (done or now - saved > every):
                    checkpoint.save(path, self.state(), about or {})
                    saved = now
                if self.step >= last:
                    break
        if self.step >= self.steps:
            self.keep_average()
            if self.best is not None:
                self._take(self.best.weights)
        self.module.eval()
        return self.history

    def _status(self, record: EpochRecord | None) -> Status:
        if record is not None:
            return Status(self.step, self.steps, record.loss, record.training, record)
        loss, right, seen = self._sums
        count = max(1, self.step % self.per_epoch)
        return Status(self.step, self.steps, loss / count, right / max(1.0, seen))

    def _advance(self, batch: Batch, path: Path | None) -> None:
        rate = self.recipe.rate(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate
        frozen = self.step >= self.steps * (1 - self.recipe.freeze)
        self.module.freeze_batch_norm = frozen
        self.module.train()
        targets = None if self.teacher is None else self.teacher(batch)
        outputs = self.module(batch.feeds)
        loss = self.objective.loss(outputs, targets, batch.labels)
        if self.extra_loss is not None:
            loss = loss + self.extra_loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip or math.inf)
        value = float(loss.detach())
        if not (math.isfinite(value) and math.isfinite(float(norm))):
            kept = f"; the last good state is in {path}" if path and path.exists() else ""
            raise TrainingDiverged(
                f"training diverged at step {self.step} of {self.steps} (loss {value}){kept}: "
                "train with a lower --lr, or look for extreme values in the data"
            )
        self.optimizer.step()
        self.step += 1
        self._follow()
        score = Score(self.objective)
        score.add({k: v.detach() for k, v in outputs.items()}, targets, batch.labels)
        self._sums = [
            self._sums[0] + value,
            self._sums[1] + score.value * len(batch.numbers),
            self._sums[2] + len(batch.numbers),
        ]

    def _follow(self) -> None:
        """Move the average towards the weights."""
        if not self.recipe.ema:
            return
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            current = self._averaged()
            names = list(current)
            torch._foreach_lerp_(
                [self._average[name] for name in names],
                [current[name] for name in names],
                1 - decay,
            )

    def _end_epoch(self, epoch: int, started: float) -> EpochRecord:
        count = self.step - epoch * self.per_epoch
        loss, right, seen = self._sums
        self._sums = [0.0, 0.0, 0.0]
        measured = None
        if len(self.validation):
            with self.averaged():
                measured = self.evaluate(self.validation)
                if self.best is not None:
                    self.consider(measured, epoch + 1)
        record = EpochRecord(
            epoch + 1, loss / max(1, count), right / max(1.0, seen), measured,
            self.recipe.rate(self.step - 1, self.steps), time.monotonic() - started,
        )  # fmt: skip
        self.history.append(record)
        return record

    def evaluate(self, data: TrainingSet) -> float:
        """Metric of the module as it is, as compiled."""
        teacher = None if data.labels is not None and self.objective.head else self.teacher
        return evaluate(self.module, data, self.objective, teacher, self.recipe.batch_size)


def settle(module: GraphModule, training: TrainingSet, recipe: Recipe, keep: bool) -> None:
    """Fit BatchNormalization to the quantized network before it trains.

    Args:
        module: quantized.
        training: samples; a few of them are seen.
        recipe: their batch size and order.
        keep: what the network computes, because rounding with compensation made it so.
    """
    device = _device_of(module)
    batches = training.epoch(recipe.batch_size, 0, recipe.seed)
    few = islice(batches, -(-SETTLING_SAMPLES // recipe.batch_size))
    module.settle_batch_norm((batch.to(device).feeds for batch in few), keep)


def run(module: GraphModule, batch: Batch) -> dict[str, Tensor]:
    """Outputs for a batch that need not fill the graph's own: repeated to its size, then cut."""
    base = next(iter(module.graph.inputs.values())).shape[0]
    count = len(batch.numbers)
    missing = -count % base
    feeds = {
        name: torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
        for name, tensor in batch.feeds.items()
    }
    outputs: dict[str, Tensor] = module(feeds if missing else batch.feeds)
    if not missing:
        return outputs
    whole = count + missing
    return {name: t[: t.shape[0] * count // whole] for name, t in outputs.items()}


def evaluate(
    module: GraphModule,
    data: TrainingSet,
    objective: Objective,
    teacher: Teacher | None = None,
    size: int = 64,
) -> float:
    """``Objective.metric`` in evaluation mode: what the compiled network reaches.

    Args:
        module: in any mode; left in evaluation mode.
        data: all of them are seen.
        objective: says what is measured.
        teacher: where there are no labels.
        size: of a batch.
    """
    module.eval()
    score = Score(objective)
    device = _device_of(module)
    with torch.no_grad():
        for batch in data.batches(size):
            moved = batch.to(device)
            targets = None if teacher is None else teacher.anew(moved)
            score.add(run(module, moved), targets, moved.labels)
    return score.value


def fineness(module: GraphModule) -> float:
    """What rates are multiplied by: 1 for a float network and to two bits, least 1/16."""
    found = [module.hooks.find(name) for name in module.hooks.names()]
    bits = [(h.weight.bits + h.data.bits) / 2 for h in found if isinstance(h, QuantizedLayer)]
    body = [b for b in bits if b < 8] or bits  # the first and last layers keep eight bits
    mean = sum(body) / len(body) if body else 2.0
    return float(2.0 ** -min(max(mean - 2, 0.0), 4.0))


def parameter_groups(module: GraphModule, recipe: Recipe) -> list[dict[str, Any]]:
    """Weights by their magnitudes, and what hooks and quantizers learn."""
    share = fineness(module)
    groups: dict[float, list[Tensor]] = {}
    for tensor in module.learned().values():
        size = max(float(tensor.detach().square().mean().sqrt()), SMALLEST * 0.1)
        groups.setdefault(2.0 ** round(math.log2(size)), []).append(tensor)
    found: list[dict[str, Any]] = [
        {"params": tensors, "lr": share * recipe.lr * size, "weight_decay": recipe.weight_decay}
        for size, tensors in sorted(groups.items())
    ]
    own = {id(tensor) for tensors in groups.values() for tensor in tensors}
    rest = [tensor for tensor in module.parameters() if id(tensor) not in own]
    if rest:
        found.append({"params": rest, "lr": share * recipe.step_lr, "weight_decay": 0.0})
    return found


def seeded(seed: int) -> None:
    """Fix torch's own generator; orders and augmentation have theirs."""
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
