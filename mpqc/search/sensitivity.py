"""sensitivity: loss of the outputs, layer by layer and width by width."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpqc.calibration import Calibration
from mpqc.data import Data, open_data
from mpqc.errors import UsageError
from mpqc.graph import Graph
from mpqc.parallel import each, jobs_here
from mpqc.passes.find_layers import find_layers
from mpqc.passes.measure_perturbation import Metric
from mpqc.passes.measure_sensitivity import Sensitivity as Table
from mpqc.passes.measure_sensitivity import measure_sensitivity
from mpqc.rounding import Accuracy, Rounding
from mpqc.search.base import ScoreSearch
from mpqc.search.cache import calibrated, held, ledger
from mpqc.search.problem import Problem, Progress, quiet
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
        known = ledger(problem, data, "sensitivity", *self._key(problem))
        accuracy = None if self.rounding == "nearest" else Accuracy()
        task = _Task(graph, data, calibration, weights, inputs, self.metric, accuracy, problem.seed)
        if jobs_here() > 1:
            _measure_together(task, known, problem)
        table = task.run(known, problem.progress)
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


@dataclass(frozen=True, eq=False)
class _Task:
    """The arguments of ``measure_sensitivity``, as other processes get them."""

    graph: Graph
    data: Data
    calibration: Calibration
    weights: Mapping[str, list[int]]
    inputs: Mapping[str, list[int]]
    metric: Metric
    accuracy: Accuracy | None
    seed: int

    def __getstate__(self) -> dict[str, Any]:
        """Samples in place of the data, which may be open files."""
        feeds = list(self.data.feeds())
        arrays = {
            name: np.concatenate([feed[name] for feed in feeds])[: self.data.samples]
            for name in self.graph.inputs
        }
        return vars(self) | {"data": arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        data = held(open_data(state["data"], state["graph"]))
        vars(self).update(state | {"data": data})

    def run(self, known: MutableMapping[str, float], progress: Progress) -> Table:
        return measure_sensitivity(
            self.graph,
            self.data,
            self.calibration,
            self.weights,
            self.inputs,
            metric=self.metric,
            accuracy=self.accuracy,
            seed=self.seed,
            known=known,
            progress=progress,
        )

    def keys(self) -> dict[str, list[str]]:
        """Names of the losses, by the value that the layers read."""
        found: dict[str, list[str]] = {}
        for layer in find_layers(self.graph):
            row = [f"w/{layer.name}/{bits}" for bits in self.weights.get(layer.name, ())]
            if layer.input not in found:
                row += [f"a/{layer.input}/{bits}" for bits in self.inputs.get(layer.input, ())]
            found.setdefault(layer.input, []).extend(row)
        return {value: row for value, row in found.items() if row}


def _measure_together(task: _Task, known: MutableMapping[str, float], problem: Problem) -> None:
    """Values in any order, each in a process of its own; what has ended is known at once."""
    keys = task.keys()
    missing = [value for value, row in keys.items() if any(key not in known for key in row)]
    done = len(keys) - len(missing)
    for _, losses in each(_measure_one, task, missing):
        known.update(losses)
        done += 1
        problem.progress("sensitivity", done, len(keys))


def _measure_one(task: _Task, value: str) -> dict[str, float]:
    """Losses of one value and the layers that read it."""
    keys = task.keys()
    rest = {key: 0.0 for other, row in keys.items() if other != value for key in row}
    known = dict(rest)
    task.run(known, quiet)
    return {key: loss for key, loss in known.items() if key not in rest}


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
