"""measure-compensation: how much of a layer's output error is left when the layer is fitted.

Estimates of what rounding to nearest costs can be carried over to compensated rounding with it.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass

import numpy as np

from mpqc.calibration import Calibration
from mpqc.data import Data
from mpqc.graph import Array, Graph
from mpqc.histogram import Method
from mpqc.passes.find_layers import Layer, find_layers
from mpqc.passes.measure_sensitivity import WIDE
from mpqc.passes.round_layers import Rounder, Rows, told, told_weights
from mpqc.plan import LayerPlan, Plan
from mpqc.quantizers import ActivationQuantizer, quantize_weights
from mpqc.rounding import Accuracy

ROWS = 2048  # that errors are measured on


@dataclass(frozen=True)
class Compensation:
    """Power of the error of outputs over that with rounding to nearest, means aside.

    Attributes:
        weights: layer -> bits -> share that is left.
        activations: value that layers read -> bits -> share that is left in these layers.
    """

    weights: Mapping[str, Mapping[int, float]]
    activations: Mapping[str, Mapping[int, float]]


def measure_compensation(
    graph: Graph,
    data: Data,
    calibration: Calibration,
    weight_bits: Mapping[str, Iterable[int]],
    activation_bits: Mapping[str, Iterable[int]],
    *,
    accuracy: Accuracy,
    method: Method = "mse",
    seed: int = 0,
    known: MutableMapping[str, float] | None = None,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Compensation:
    """Fit each layer of the float network at each width, weights and inputs apart.

    Args:
        graph: float, at the batch size of the data.
        data: streamed about once.
        calibration: of the values.
        weight_bits: layer -> widths.
        activation_bits: value -> widths.
        accuracy: how layers are fitted.
        method: how activation ranges follow from histograms.
        seed: of the choice of samples and positions.
        known: shares that were measured before, which is where new ones go.
        progress: called with what was measured, and how many values of how many are done.
    """
    known = {} if known is None else known
    readers: dict[str, list[Layer]] = {}
    for layer in find_layers(graph):
        if layer.name in weight_bits or layer.input in activation_bits:
            readers.setdefault(layer.input, []).append(layer)
    done = {
        value
        for value, layers in readers.items()
        if all(f"a/{value}/{b}" in known for b in activation_bits.get(value, ()))
        and all(
            f"w/{one.name}/{b}" in known for one in layers for b in weight_bits.get(one.name, ())
        )
    }
    if len(done) < len(readers):
        eight = LayerPlan(weight_bits=WIDE, activation_bits=WIDE)
        names = [layer.name for layers in readers.values() for layer in layers]
        plan = Plan(model_sha256="0" * 64, layers=dict.fromkeys(names, eight))
        rounder = Rounder(graph, plan, calibration, data, accuracy, method, seed)
        for step, rows in enumerate(rounder.groups_in_order(skip=done), len(done) + 1):
            value = rows[0].layer.input
            found = _of_inputs(rounder, rows, activation_bits.get(value, ()))
            for seen in rows:
                bits = list(weight_bits.get(seen.layer.name, ()))
                found |= _of_weights(rounder, rows, seen, bits)
            known.update(found)
            progress(f"compensation of {rows[0].layer.name}", step, len(readers))
    return Compensation(
        {name: {b: known[f"w/{name}/{b}"] for b in bits} for name, bits in weight_bits.items()},
        {name: {b: known[f"a/{name}/{b}"] for b in bits} for name, bits in activation_bits.items()},
    )


def _of_weights(
    rounder: Rounder, rows: list[Rows], seen: Rows, widths: list[int]
) -> dict[str, float]:
    rule = rounder.rule(rows, WIDE)
    shares = {}
    fitted = rounder.candidates(seen, widths, rule) if widths else []
    for bits, made in zip(widths, fitted, strict=True):
        codes = quantize_weights(seen.exact, bits, seen.axis)
        scale = codes.scale.reshape(-1, *[1] * (codes.values.ndim - 1))
        nearest = codes.values * (scale if seen.axis == 0 else codes.scale)
        left = _error(seen, told_weights(seen.layer, made), rule)
        shares[f"w/{seen.layer.name}/{bits}"] = _share(left, _error(seen, nearest, rule))
    return shares


def _of_inputs(rounder: Rounder, rows: list[Rows], widths: Iterable[int]) -> dict[str, float]:
    shares = {}
    for bits in widths:
        value = rows[0].layer.input
        plain = rounder.calibration.quantizer(value, bits, rounder.method)
        rule = rounder.rule(rows, bits)
        left = before = 0.0
        for seen in rows:
            power = float(np.square(seen.sample(ROWS)[1]).mean()) or 1.0
            made = rounder.candidate(seen, WIDE, rule)
            left += _error(seen, told_weights(seen.layer, made), rule) / power
            before += _error(seen, seen.exact, plain) / power
        shares[f"a/{value}/{bits}"] = _share(left, before)
    return shares


def _share(left: float, before: float) -> float:
    return left / before if before > 0 else 1.0


def _error(seen: Rows, weights: Array, rule: ActivationQuantizer) -> float:
    """Variance of the error of the layer's outputs: the bias takes the mean away."""
    x, y = seen.sample(ROWS)
    got = told(x, rule) @ seen.rows(weights.astype(np.float32)).swapaxes(1, 2)
    error = got.swapaxes(0, 1).reshape(y.shape) - y
    return float(np.square(error - error.mean(0), dtype=np.float64).mean())
