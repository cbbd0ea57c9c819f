"""sensitivity: loss of the outputs, layer by layer and width by width."""

from collections.abc import Iterable
from dataclasses import dataclass

from mpqc.errors import UsageError
from mpqc.passes.measure_perturbation import Metric
from mpqc.passes.measure_sensitivity import measure_sensitivity
from mpqc.rounding import Accuracy, Rounding
from mpqc.search.base import ScoreSearch
from mpqc.search.cache import calibrated, held, ledger
from mpqc.search.problem import Problem
from mpqc.search.scores import Scores


@dataclass(frozen=True)
class Sensitivity(ScoreSearch):
    """Measured loss of the outputs with one layer quantized, weights and activations.

    Attributes:
        samples: of the data, at most.
        metric: distance of outputs: sqnr or kl.
        rounding: of the weights: gptq as the compiler does it, or nearest, which is faster.
    """

    needs = frozenset({"data"})

    samples: int = 256
    metric: Metric = "sqnr"
    rounding: Rounding = "gptq"

    def __post_init__(self) -> None:
        check_samples("sensitivity", self.samples)

    def scores(self, problem: Problem) -> Scores:
        graph, data = problem.need_data("sensitivity")
        data = held(data.sample(self.samples, problem.seed))
        calibration = calibrated(problem, graph, data)
        table = measure_sensitivity(
            graph,
            data,
            calibration,
            {layer.name: _widths(problem, layer.name, "weight") for layer in problem.layers},
            {layer.input: _widths(problem, layer.name, "activation") for layer in problem.layers},
            metric=self.metric,
            accuracy=None if self.rounding == "nearest" else Accuracy(),
            seed=problem.seed,
            known=ledger(problem, data, "sensitivity", *self._key(problem)),
            progress=problem.progress,
        )
        readers = {layer.input: 0 for layer in problem.layers}
        for layer in problem.layers:
            readers[layer.input] += 1
        losses = {
            layer.name: {
                choice: table.weights[layer.name][choice.weight]
                # layers with a common input share its loss
                + table.activations[layer.input][choice.activation] / readers[layer.input]
                for choice in problem.choices[layer.name]
            }
            for layer in problem.layers
        }
        unit = "divergence [nat]" if table.metric == "kl" else "noise / signal"
        return Scores(losses, f"{unit} of the outputs")

    def _key(self, problem: Problem) -> tuple[object, ...]:
        """What losses depend on beside model and data."""
        if self.rounding == "nearest":
            return (self.metric,)
        return self.metric, repr(Accuracy()), problem.seed


def check_samples(method: str, samples: int) -> None:
    """Refuse a number of samples below one."""
    if samples < 1:
        raise UsageError(f"{method}: samples is at least 1, got {samples}")


def _widths(problem: Problem, name: str, key: str) -> Iterable[int]:
    return sorted({getattr(choice, key) for choice in problem.choices[name]})
