"""eagl: entropy approximation guided layer selection."""

from dataclasses import dataclass
from typing import Literal

from mpqc.errors import UsageError
from mpqc.graph import Precision
from mpqc.passes.measure_entropy import Step, measure_entropy
from mpqc.search.base import ScoreSearch
from mpqc.search.problem import Problem
from mpqc.search.scores import Scores

Gain = Literal["scaled", "min"]


@dataclass(frozen=True)
class Eagl(ScoreSearch):
    """Entropy of the quantized weight codes (EAGL, arXiv 2301.13330); seconds, no data.

    Attributes:
        code_bits: width b_hi of the codes whose entropy H is taken.
        step: of the quantizer; see ``measure_entropy``.
        gain: with more than two widths; see docs/search/eagl.md. With two, the wider one gains
            H and the narrower 0, as in the paper.
        times_weights: gain H times the number of weights.
    """

    widths = (2, 4)

    code_bits: int = 4
    step: Step = "layer"
    gain: Gain = "scaled"
    times_weights: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.code_bits <= 8:
            raise UsageError(f"eagl: code_bits is from 2 to 8, got {self.code_bits}")

    def scores(self, problem: Problem) -> Scores:
        names = [layer.name for layer in problem.layers]
        entropies = measure_entropy(
            problem.need_graph(), names, self.code_bits, self.step, problem.progress
        )
        losses = {}
        for layer in problem.layers:
            factor = layer.weights if self.times_weights else 1
            row = self._gains(entropies[layer.name], equal_widths(problem.choices[layer.name]))
            losses[layer.name] = {precision: -gain * factor for precision, gain in row.items()}
        return Scores(losses, "negative entropy of the weight codes [bit]")

    def _gains(self, entropy: float, choices: tuple[Precision, ...]) -> dict[Precision, float]:
        bits = {precision: min(precision.weight, precision.activation) for precision in choices}
        low, high = min(bits.values()), max(bits.values())
        if self.gain == "min" and len(set(bits.values())) > 2:
            return {precision: min(entropy, b) for precision, b in bits.items()}

        def share(b: int) -> float:
            """Of the noise power 4**-b between the narrowest and the widest, what is gone."""
            return (4.0**-low - 4.0**-b) / (4.0**-low - 4.0**-high) if high > low else 0.0

        return {precision: entropy * share(b) for precision, b in bits.items()}


def equal_widths(choices: tuple[Precision, ...]) -> tuple[Precision, ...]:
    """Precisions with weights as wide as activations: one variable a group, as in the paper.

    All of them where a constraint keeps weights or activations from following the other; then
    the narrower of the two counts.
    """
    equal = tuple(p for p in choices if p.weight == p.activation)
    bits = {p.weight for p in equal}
    free = bits == {p.weight for p in choices} == {p.activation for p in choices}
    return equal if free else choices
