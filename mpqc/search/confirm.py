"""Does the plan keep its promise? Whole networks compared, where scores only add up layers."""

from mpqc.data import Data
from mpqc.graph import Graph
from mpqc.plan import Plan
from mpqc.search.problem import Problem

SAMPLES = 128
CALIBRATION_SAMPLES = 256  # as mpqc compile takes


def output_noise(
    graph: Graph, plan: Plan, data: Data, seed: int = 0, samples: int = SAMPLES
) -> float:
    """Noise to signal at the outputs of the quantized network, on calibration data.

    ``sum |y - y_quantized|**2 / sum |y|**2`` over float outputs and samples; the quantized network
    is the exact integer graph, rounded as ``mpqc compile`` rounds it by default.

    Args:
        graph: folded float graph at the batch size of ``data``.
        plan: widths.
        data: calibration data.
        seed: of the samples: one draw to calibrate and round on, another to compare.
        samples: at most so many of each.
    """
    import numpy as np

    from mpqc.calibration import calibrate
    from mpqc.onnx_export import to_onnx
    from mpqc.ort import Session
    from mpqc.passes.quantize_layers import tensors_to_calibrate
    from mpqc.passes.round_layers import round_layers
    from mpqc.pipeline import quantize
    from mpqc.rounding import Accuracy

    tensors = tensors_to_calibrate(graph, plan)
    calibration = calibrate(graph, data, tensors, CALIBRATION_SAMPLES, seed)
    rounded = None
    if plan.narrow:
        accuracy = Accuracy(samples=samples)
        rounded = round_layers(graph, plan, calibration, data, accuracy, seed=seed)
    exact = Session(to_onnx(graph), optimise=True)
    quantized = Session(to_onnx(quantize(graph, plan, calibration, rounded=rounded)))
    noise = signal = 0.0
    for feed in data.sample(samples, seed + 1).feeds():
        wanted, got = exact.run(feed), quantized.run(feed)
        for name, values in wanted.items():
            if np.issubdtype(values.dtype, np.floating):
                noise += float(np.square(values - got[name], dtype=np.float64).sum())
                signal += float(np.square(values, dtype=np.float64).sum())
    return noise / signal if signal else 0.0


def confirm(problem: Problem, plan: Plan, uniform: Plan | None) -> dict[str, float]:
    """Noise of the plan and of the widest uniform plan under the same budgets.

    Returns:
        "plan" and "uniform" -> ``output_noise``; empty where there is nothing to compare.
    """
    if uniform is None or problem.data is None or problem.graph is None:
        return {}
    if uniform.layers == plan.layers:
        return {}
    found = {}
    for step, (name, candidate) in enumerate((("plan", plan), ("uniform", uniform))):
        problem.progress(f"confirm {name}", step, 2)
        found[name] = output_noise(problem.graph, candidate, problem.data, problem.seed)
    problem.progress("confirm", 2, 2)
    return found
