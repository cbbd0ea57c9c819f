"""hawq: trace of the Hessian times the size of the perturbation."""

from dataclasses import dataclass

import numpy as np

from mpqc.calibration import Calibration
from mpqc.errors import UsageError
from mpqc.graph import Graph
from mpqc.histogram import squared_error
from mpqc.passes.find_layers import Layer, weight_matrix
from mpqc.passes.measure_compensation import measure_compensation
from mpqc.passes.measure_curvature import measure_curvature
from mpqc.passes.measure_perturbation import Metric
from mpqc.quantizers import quantize_weights
from mpqc.rounding import Accuracy, Rounding
from mpqc.search.base import ScoreSearch
from mpqc.search.cache import calibrated, held, ledger
from mpqc.search.problem import Problem
from mpqc.search.scores import Scores
from mpqc.search.sensitivity import check_samples, open_widths


@dataclass(frozen=True)
class Hawq(ScoreSearch):
    """Hessian trace times perturbation (HAWQ-V2, arXiv 1911.03852), by forward passes.

    Attributes:
        samples: of the data, at most.
        probes: random directions a batch, for the weights and for the input of each layer.
        metric: distance of outputs: sqnr or kl.
        rounding: that the perturbation is of: gptq as the compiler does it, or nearest.
    """

    needs = frozenset({"data"})

    samples: int = 256
    probes: int = 4
    metric: Metric = "sqnr"
    rounding: Rounding = "gptq"

    def __post_init__(self) -> None:
        check_samples("hawq", self.samples)
        if self.probes < 1:
            raise UsageError(f"hawq: probes is at least 1, got {self.probes}")

    def scores(self, problem: Problem) -> Scores:
        graph, data = problem.need_data("hawq")
        data = held(data.sample(self.samples, problem.seed))
        calibration = calibrated(problem, graph, data)
        curvature = measure_curvature(
            graph,
            data,
            [layer.name for layer in problem.layers],
            probes=self.probes,
            metric=self.metric,
            seed=problem.seed,
            known=ledger(problem, data, "curvature", self.metric, self.probes, problem.seed),
            progress=problem.progress,
        )
        readers: dict[str, int] = {}
        for layer in problem.layers:
            readers[layer.input] = readers.get(layer.input, 0) + 1
        weights, inputs = open_widths(problem)
        left = None
        if self.rounding != "nearest":
            left = measure_compensation(
                graph,
                data,
                calibration,
                weights,
                inputs,
                accuracy=Accuracy(),
                seed=problem.seed,
                known=ledger(problem, data, "compensation", repr(Accuracy()), problem.seed),
                progress=problem.progress,
            )
        losses = {}
        for layer in problem.layers:
            value, choices = layer.input, problem.choices[layer.name]
            of_weights = {
                bits: curvature.weights[layer.name]
                * weight_error(graph, layer, bits)
                * (1.0 if left is None else left.weights[layer.name][bits])
                for bits in weights.get(layer.name, ())
            }
            of_input = {
                bits: curvature.activations[value]
                * activation_error(calibration, value, bits)
                * (1.0 if left is None else left.activations[value][bits])
                / readers[value]
                for bits in inputs.get(value, ())
            }
            losses[layer.name] = {
                choice: of_weights.get(choice.weight, 0.0) + of_input.get(choice.activation, 0.0)
                for choice in choices
            }
        return Scores(losses, "Hessian trace x perturbation")


def weight_error(graph: Graph, layer: Layer, bits: int) -> float:
    """Mean squared error of the layer's weights at a width."""
    exact = weight_matrix(graph, graph[layer.name])
    axis = 0 if layer.op == "Conv" else 1
    codes = quantize_weights(exact, bits, axis)
    shape = [1] * exact.ndim
    shape[axis] = -1
    return float(
        np.mean((codes.values * codes.scale.reshape(shape).astype(np.float64) - exact) ** 2)
    )


def activation_error(calibration: Calibration, value: str, bits: int) -> float:
    """Mean squared error at a width of the elements of a value that are not zero."""
    histogram = calibration.histogram(value)
    rule = calibration.quantizer(value, bits)
    points = histogram.points()
    if not points[1].size:
        return 0.0
    error = squared_error(points, np.array([rule.scale]), np.array([rule.zero_point]), bits)
    return float(error[0]) / float(points[1].sum())
