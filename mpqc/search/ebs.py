"""ebs: strengths of all widths over one set of meta weights, trained with them."""

from dataclasses import dataclass
from typing import Literal

from mpqc.errors import UsageError
from mpqc.plan import Plan
from mpqc.search.problem import Problem
from mpqc.search.scores import Scores
from mpqc.search.trained import TrainedSearch


@dataclass(frozen=True)
class Ebs(TrainedSearch):
    """Efficient bitwidth search: strengths of widths over shared meta weights (arXiv 2003.07577).

    Attributes:
        strengths: ``deterministic``: softmax; ``stochastic``: Gumbel-softmax samples of it.
        price: weight of the budgets' excess in what strengths minimise. It has to be dearer than
            what the loss gains by the last bit that the budgets leave room for.
        start: strengths at the start: ``budget``: as even as the budgets' expected costs allow;
            ``even``.
        choice: of the plan: ``balance``: what each width loses follows from where loss and price
            came to rest; ``likeliest``: from the logarithm of its strength alone.
        strength_lr: learning rate of the strengths; 0: 0.01, or more where the search is short.
        strength_optimizer: adam, or sgd with momentum 0.9.
        temperature: of the stochastic strengths, at the start; falls exponentially to a tenth.
        warmup: share of the epochs in which only weights learn.
        level: ``two``: strengths learn from samples of their own; ``one``: from the same batches.
        weights_share: of the samples for the weights, with two levels.
        samples: plans that are measured, rounded and not trained, to correct what was learned;
            0: the learned one.
        quantizer: ``lsq``: learned steps, as ``mpqc finetune`` takes; ``dorefa``: DoReFa weights
            and PACT inputs.
        alpha: clips of PACT: one a width (``branch``), or one an input (``shared``).
    """

    widths = (1, 2, 3, 4, 5)

    strengths: Literal["deterministic", "stochastic"] = "deterministic"
    price: float = 10.0
    start: Literal["budget", "even"] = "budget"
    choice: Literal["balance", "likeliest"] = "balance"
    strength_lr: float = 0.0
    strength_optimizer: Literal["adam", "sgd"] = "adam"
    temperature: float = 1.0
    warmup: float = 0.1
    level: Literal["one", "two"] = "one"
    weights_share: float = 0.5
    samples: int = 16
    quantizer: Literal["dorefa", "lsq"] = "lsq"
    alpha: Literal["branch", "shared"] = "branch"

    def __post_init__(self) -> None:
        if not (self.price >= 0 and self.strength_lr >= 0 and self.temperature > 0):
            raise UsageError("ebs: temperature is positive, price and strength_lr not negative")
        if not (0 <= self.warmup < 1 and 0 < self.weights_share < 1):
            raise UsageError("ebs: warmup and weights_share are shares, below 1")
        if self.samples < 0:
            raise UsageError("ebs: samples is not negative")

    def learned(self, problem: Problem) -> Scores:
        from mpqc.train.search.ebs import learned

        return learned(problem, self)

    def plan(self, problem: Problem, scores: Scores) -> Plan:
        if not self.samples:
            return super().plan(problem, scores)
        from mpqc.train.search.pick import picked

        widths = picked(problem, self, scores.losses, self.samples)
        return problem.plan(widths, self.name())
