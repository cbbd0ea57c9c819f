"""Does the plan keep its promise? Whole networks compared, where scores only add up layers."""

from collections.abc import MutableMapping
from hashlib import sha256

import numpy as np

from mpqc.calibration import Calibration, calibrate
from mpqc.data import Data
from mpqc.graph import Graph
from mpqc.passes.quantize_layers import tensors_to_calibrate
from mpqc.passes.round_layers import round_layers
from mpqc.plan import Plan
from mpqc.rounding import Accuracy
from mpqc.search.cache import calibrated, ledger
from mpqc.search.problem import Problem

SAMPLES = 512
CALIBRATION_SAMPLES = 256  # as mpqc compile takes
ACCURACY = Accuracy()  # as mpqc compile rounds


class Judge:
    """Noise to signal at the outputs of quantized networks, on calibration data.

    ``sum |y - y_quantized|**2 / sum |y|**2`` over float outputs and samples; the quantized network
    is the exact integer graph, calibrated and rounded as ``mpqc compile`` does by default with
    these data and this seed. Samples that layers were rounded on do not count, where there are
    enough others.

    Args:
        graph: folded float graph at the batch size of ``data``.
        data: calibration data.
        calibration: of all values that the plans quantize, on ``calibration_data``.
        seed: of the choice of samples.
        samples: to compare on, at most.
        known: noise of plans that were judged before, which is where new ones go.
    """

    def __init__(
        self,
        graph: Graph,
        data: Data,
        calibration: Calibration,
        seed: int = 0,
        samples: int = SAMPLES,
        known: MutableMapping[str, float] | None = None,
    ) -> None:
        self.graph, self.calibration, self.seed = graph, calibration, seed
        self.rounded_on = calibration_data(data, seed)
        self.scored = held_out(data, seed, samples)
        self._known: MutableMapping[str, float] = {} if known is None else known

    def __call__(self, plan: Plan) -> float:
        """Noise of the network that the plan describes."""
        name = digest(plan)
        if name not in self._known:
            self._known[name] = self._measured(plan)
        return self._known[name]

    def _measured(self, plan: Plan) -> float:
        from mpqc.onnx_export import to_onnx
        from mpqc.ort import Session
        from mpqc.passes.measure_perturbation import available_threads
        from mpqc.pipeline import quantize

        rounded = None
        if plan.narrow:
            rounded = round_layers(
                self.graph, plan, self.calibration, self.rounded_on, ACCURACY, seed=self.seed
            )
        quantized = quantize(self.graph, plan, self.calibration, rounded=rounded)
        threads = available_threads()
        exact = Session(to_onnx(self.graph), threads=threads, optimise=True)
        integer = Session(to_onnx(quantized), threads=threads)
        noise = signal = 0.0
        for feed in self.scored.feeds():
            wanted, got = exact.run(feed), integer.run(feed)
            for name, values in wanted.items():
                if np.issubdtype(values.dtype, np.floating):
                    noise += float(np.square(values - got[name], dtype=np.float64).sum())
                    signal += float(np.square(values, dtype=np.float64).sum())
        return noise / signal if signal else 0.0


def calibration_data(data: Data, seed: int) -> Data:
    """What ``mpqc compile`` takes of them, for histograms and for rounding."""
    return data.sample(CALIBRATION_SAMPLES, seed)


def held_out(data: Data, seed: int, samples: int) -> Data:
    """Samples that layers are not rounded on; any, where those are fewer than they are."""
    used = calibration_data(data, seed)
    for others in (data.rest(CALIBRATION_SAMPLES, seed), used.rest(ACCURACY.samples, seed)):
        if others is not None and len(others) >= min(samples, ACCURACY.samples):
            return others.sample(samples, seed)
    return data.sample(samples, seed)


def digest(plan: Plan) -> str:
    """Name of the widths of a plan."""
    widths = sorted((name, layer.weight_bits, layer.activation_bits)
                    for name, layer in plan.layers.items())  # fmt: skip
    tensors = sorted((name, tensor.bits) for name, tensor in plan.tensors.items())
    return sha256(repr((widths, tensors)).encode()).hexdigest()[:20]


def output_noise(
    graph: Graph, plan: Plan, data: Data, seed: int = 0, samples: int = SAMPLES
) -> float:
    """``Judge`` for one plan that no problem was stated for."""
    tensors = tensors_to_calibrate(graph, plan)
    calibration = calibrate(graph, data, tensors, CALIBRATION_SAMPLES, seed)
    return Judge(graph, data, calibration, seed, samples)(plan)


def judge(problem: Problem, samples: int = SAMPLES) -> Judge:
    """Of plans of a problem; what it finds is kept in the problem's cache.

    Raises:
        UsageError: the problem has no data.
    """
    graph, data = problem.need_data("confirm")
    used = calibration_data(data, problem.seed)
    known = ledger(problem, data, "noise", problem.seed, samples, ACCURACY)
    return Judge(graph, data, calibrated(problem, graph, used), problem.seed, samples, known)


def confirm(problem: Problem, plan: Plan, uniform: Plan | None) -> dict[str, float]:
    """Noise of the plan and of the widest uniform plan under the same budgets.

    Returns:
        "plan" and "uniform" -> ``Judge``'s noise; empty where there is nothing to compare.
    """
    if uniform is None or problem.data is None or problem.graph is None:
        return {}
    if uniform.layers == plan.layers:
        return {}
    found, noise = {}, judge(problem)
    for step, (name, candidate) in enumerate((("plan", plan), ("uniform", uniform))):
        problem.progress(f"confirm {name}", step, 2)
        found[name] = noise(candidate)
    problem.progress("confirm", 2, 2)
    return found
