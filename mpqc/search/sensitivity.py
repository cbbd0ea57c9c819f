"""sensitivity: loss of the outputs, layer by layer and width by width."""

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
        weights, inputs = open_widths(problem)
        table = measure_sensitivity(
            graph,
            data,
            calibration,
            weights,
            inputs,
            metric=self.metric,
            accuracy=None if self.rounding == "nearest" else Accuracy(),
            seed=problem.seed,
            known=ledger(problem, data, "sensitivity", *self._key(problem)),
            progress=problem.progress,
        )
        readers: dict[str, int] = {}
        for layer in problem.layers:
            readers[layer.input] = readers.get(layer.input, 0) + 1
        losses = {
            layer.name: {
                choice: table.weights.get(layer.name, {}).get(choice.weight, 0.0)
                # layers with a common input share its loss
                + table.activations.get(layer.input, {}).get(choice.activation, 0.0)
                / readers[layer.input]
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


def open_widths(problem: Problem) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Widths of weights by layer and of activations by value, where there is a choice.

    What a pinned width loses, every plan loses: it need not be measured.
    """
    weights = {layer.name: _widths(problem, layer.name, "weight") for layer in problem.layers}
    inputs = {layer.input: _widths(problem, layer.name, "activation") for layer in problem.layers}
    kept = [{name: row for name, row in w.items() if len(row) > 1} for w in (weights, inputs)]
    return kept[0], kept[1]


def _widths(problem: Problem, name: str, key: str) -> list[int]:
    return sorted({getattr(choice, key) for choice in problem.choices[name]})
