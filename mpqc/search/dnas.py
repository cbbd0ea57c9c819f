"""dnas: a super-net with an operator for every precision, chosen by Gumbel-softmax."""

from dataclasses import dataclass
from typing import Literal

from mpqc.errors import UsageError
from mpqc.plan import Plan
from mpqc.search.problem import Problem
from mpqc.search.scores import Scores
from mpqc.search.trained import TrainedSearch

TRUST = 0.4  # in probabilities, which say little of widths that are hardly drawn


@dataclass(frozen=True)
class Dnas(TrainedSearch):
    """Differentiable architecture search over precisions in a super-net (arXiv 1812.00090).

    Attributes:
        cost: ``budget``: task loss * (1 + price * excess over the budgets); ``product``: task
            loss * beta (log cost)^gamma, as published, without a target.
        price: see ``cost``.
        gamma: see ``cost``.
        share_weights: one set of weights for all precisions, in place of one for each.
        hard_sample: one precision a pass, with the gradients of the soft sample.
        temperature: of the Gumbel-softmax at the start.
        cooling: eta in temperature * exp(-eta * epoch); 0: to a fiftieth at the end.
        warmup: share of the epochs in which only weights learn.
        strength_lr: of Adam for the logits; 0: 0.01, or more where the search is short.
        strength_decay: weight decay of the logits.
        weights_share: of the samples for the weights; the rest is for the logits.
        samples: architectures drawn at the end, beside the most probable one; the one that loses
            least on held-out samples is kept.
        short: epochs of training after which drawn architectures are compared, as published; 0:
            ``samples`` plans are measured rounded, not trained, and correct what probabilities
            say of widths.
        quantizer: ``lsq``: learned steps, as ``mpqc finetune`` takes; ``dorefa``: DoReFa weights
            and PACT inputs.
    """

    widths = ("w1a4", "w2a2", "w2a4", "w3a3", "w4a4", "w8a8")

    cost: Literal["budget", "product"] = "budget"
    price: float = 2.0
    gamma: float = 0.9
    share_weights: bool = False
    hard_sample: bool = False
    temperature: float = 5.0
    cooling: float = 0.0
    warmup: float = 0.1
    strength_lr: float = 0.0
    strength_decay: float = 5e-4
    weights_share: float = 0.8
    samples: int = 3
    short: float = 1.0
    quantizer: Literal["dorefa", "lsq"] = "lsq"

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and 0 <= self.warmup < 1 and 0 < self.weights_share < 1):
            raise UsageError("dnas: temperature is positive; warmup and weights_share are shares")
        if min(self.price, self.gamma, self.cooling, self.strength_lr, self.strength_decay) < 0:
            raise UsageError("dnas: price, gamma, cooling and rates are not negative")
        if self.samples < 0 or self.short < 0:
            raise UsageError("dnas: samples and short are not negative")

    def learned(self, problem: Problem) -> Scores:
        from mpqc.train.search.dnas import learned

        return learned(problem, self)

    def plan(self, problem: Problem, scores: Scores) -> Plan:
        if not self.samples:
            return super().plan(problem, scores)
        from mpqc.train.search.dnas import chosen
        from mpqc.train.search.pick import picked

        if self.short:
            return problem.plan(chosen(problem, self, scores), self.name())
        widths = picked(problem, self, scores.losses, self.samples, TRUST)
        return problem.plan(widths, self.name())
