"""fracbits: widths that are fractions while they learn, by layer or by output channel."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mpqc.errors import UsageError
from mpqc.plan import Plan
from mpqc.search.channels import ChannelScores, channel_plan, choose_channels
from mpqc.search.problem import Problem
from mpqc.search.repair import repair
from mpqc.search.scores import Scores
from mpqc.search.trained import TrainedSearch


@dataclass(frozen=True, eq=False)
class FracScores(Scores):
    """Losses of layers, and the widths that they come from.

    Attributes:
        weights: layer -> fractional width of its weights, one or one an output channel.
        prices: layer -> what a bit of its weights takes of the budgets.
        pruned: layers whose channels may have width 0.
    """

    weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    prices: Mapping[str, float] = field(default_factory=dict)
    pruned: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FracBits(TrainedSearch):
    """Fractional bitwidths by interpolation between neighbours (arXiv 2007.02017).

    Attributes:
        granularity: of weight widths: one a ``layer``, or one an output channel (``kernel``).
        prune: let channels go down to width 0, which removes them; wants ``kernel``.
        price: weight of |cost / budget - 1|, rounded off at zero, in the loss.
        start: bits above the uniform width that just keeps the budgets, where widths start.
        width_lr: learning rate of the widths; 0: 0.01 bits a step, or more where the search is
            short.
        warmup: share of the epochs in which only weights learn.
        samples: plans that are measured, rounded and not trained, to correct what was learned;
            0: the learned one. Widths of channels follow the learned one.
        quantizer: ``lsq``: learned steps, as ``mpqc finetune`` takes; ``dorefa``: DoReFa weights
            and PACT inputs.
    """

    widths = (1, 2, 3, 4, 5, 6, 7, 8)

    granularity: Literal["layer", "kernel"] = "layer"
    prune: bool = False
    price: float = 10.0
    start: float = 0.5
    width_lr: float = 0.0
    warmup: float = 0.1
    samples: int = 16
    quantizer: Literal["dorefa", "lsq"] = "lsq"

    def __post_init__(self) -> None:
        if not (self.price >= 0 and self.width_lr >= 0 and abs(self.start) <= 8):
            raise UsageError("fracbits: price and width_lr are not negative, start is in bits")
        if not (0 <= self.warmup < 1 and self.samples >= 0):
            raise UsageError("fracbits: warmup is a share, below 1, samples not negative")
        if self.prune and self.granularity != "kernel":
            raise UsageError("fracbits: prune removes output channels: it wants granularity=kernel")

    def learned(self, problem: Problem) -> Scores:
        from mpqc.train.search.fracbits import learned

        return learned(problem, self)

    def plan(self, problem: Problem, scores: Scores) -> Plan:
        if self.granularity == "layer" and self.samples:
            from mpqc.train.search.pick import picked

            best = picked(problem, self, scores.losses, self.samples)
            return problem.plan(best, self.name())
        start = repair(problem, scores.losses)
        if self.granularity == "layer" or not isinstance(scores, FracScores):
            return problem.plan(start, self.name())
        inputs = {name: found.activation for name, found in start.items()}
        twins = {name: tie for tie in problem.ties for name in tie}
        wanted = []
        for layer in problem.layers:
            tie = twins.get(layer.name, (layer.name,))
            if tie[0] != layer.name:
                continue
            known = {p.weight for p in problem.choices[layer.name]
                     if p.activation == inputs[layer.name]}  # fmt: skip
            known |= {0} if layer.name in scores.pruned else set()
            learned = np.asarray(scores.weights[layer.name])
            price = scores.prices[layer.name] / len(learned)
            losses = {bits: price * np.square(learned - bits) for bits in known}
            wanted.append(ChannelScores(tie, losses))
        widths = choose_channels(problem, inputs, wanted, start)
        whole = {
            layer.name: widths[layer.name] if len(widths[layer.name]) > 1
            else widths[layer.name] * layer.channels_out
            for layer in problem.layers
        }  # fmt: skip
        return channel_plan(problem, whole, inputs, self.name())
