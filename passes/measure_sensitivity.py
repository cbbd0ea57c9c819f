"""measure-sensitivity: what the outputs lose when one layer's weights or input are quantized."""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass

import numpy as np

from mpqc.calibration import Calibration
from mpqc.data import Data
from mpqc.graph import Array, Graph
from mpqc.histogram import Method
from mpqc.passes.find_layers import Layer, bias_vector, find_layers, weight_matrix
from mpqc.passes.measure_perturbation import Disturbed, Loss, Metric, compared, disturb
from mpqc.passes.round_layers import Rounder, Rows, told, told_weights
from mpqc.plan import LayerPlan, Plan
from mpqc.quantizers import ActivationQuantizer, conv_shift, quantize_weights
from mpqc.rounding import Accuracy, RoundedLayer

WIDE = 8  # bits of what is not narrowed


@dataclass(frozen=True)
class Sensitivity:
    """Losses by width, each with all else in float.

    Attributes:
        weights: layer -> bits -> loss.
        activations: value that layers read -> bits -> loss with all its layers reading codes.
        metric: ``kl`` in nats or ``sqnr``, noise over signal.
    """

    weights: Mapping[str, Mapping[int, float]]
    activations: Mapping[str, Mapping[int, float]]
    metric: str


def measure_sensitivity(
    graph: Graph,
    data: Data,
    calibration: Calibration,
    weight_bits: Mapping[str, Iterable[int]],
    activation_bits: Mapping[str, Iterable[int]],
    *,
    metric: Metric = "sqnr",
    method: Method = "mse",
    accuracy: Accuracy | None = None,
    seed: int = 0,
    known: MutableMapping[str, float] | None = None,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Sensitivity:
    """Quantize and dequantize one thing at a time, and compare the outputs on the data.

    Args:
        graph: float, at the batch size of the data.
        data: streamed once for each value that layers read, and once more by ``accuracy``.
        calibration: of those values.
        weight_bits: layer -> widths.
        activation_bits: value -> widths.
        metric: distance of outputs.
        method: how activation ranges follow from histograms.
        accuracy: how layers are rounded: each is fitted to its outputs, at every width anew, as
            ``round_layers`` does behind float layers; where activations are narrow, their range
            is refined and eight-bit weights make good what they can. None: as ``QuantizeLayers``
            does, to nearest with corrected biases.
        seed: of ``accuracy``'s choice of samples and positions.
        known: losses that were measured before, which is where new ones go: those of a value
            and its layers together when the last batch has been seen.
        progress: called with what was measured, and how many values of how many are done.
    """
    seen = compared(graph, metric)
    known = {} if known is None else known
    readers: dict[str, list[Layer]] = {}
    for layer in find_layers(graph):
        if layer.name in weight_bits or layer.input in activation_bits:
            readers.setdefault(layer.input, []).append(layer)
    missing = {}
    for value, layers in readers.items():
        wanted = [_Trial(f"a/{value}/{b}", None, b) for b in activation_bits.get(value, ())]
        for layer in layers:
            named = ((f"w/{layer.name}/{b}", b) for b in weight_bits.get(layer.name, ()))
            wanted += [_Trial(key, layer, bits) for key, bits in named]
        missing[value] = [trial for trial in wanted if trial.key not in known]
    rows = None
    if accuracy is not None and any(missing.values()):
        eight = LayerPlan(weight_bits=WIDE, activation_bits=WIDE)
        names = [layer.name for layers in readers.values() for layer in layers]
        plan = Plan(model_sha256="0" * 64, layers=dict.fromkeys(names, eight))
        rounder = Rounder(graph, plan, calibration, data, accuracy, method, seed)
        rows = rounder.groups_in_order(skip={v for v, trials in missing.items() if not trials})
    for done, (value, layers) in enumerate(readers.items()):
        if trials := missing[value]:
            if rows is None:
                made = _nearest(graph, trials, calibration, value, method)
            else:
                made = _fitted(rounder, next(rows), trials)
            losses = {trial.key: Loss(metric) for trial in trials}
            for run in disturb(seen, data, [layer.name for layer in layers]):
                for trial in trials:
                    losses[trial.key].add(run, made[trial.key](run))
            known.update({key: loss.value for key, loss in losses.items()})
        progress(f"sensitivity of {layers[0].name}", done + 1, len(readers))
    return Sensitivity(
        {name: {b: known[f"w/{name}/{b}"] for b in bits} for name, bits in weight_bits.items()},
        {name: {b: known[f"a/{name}/{b}"] for b in bits} for name, bits in activation_bits.items()},
        metric,
    )


@dataclass(frozen=True)
class _Trial:
    """Weights of one layer at a width, or (layer None) a value that layers read."""

    key: str
    layer: Layer | None
    bits: int


@dataclass(frozen=True, eq=False)
class _Change:
    """What to run a batch with.

    Attributes:
        rule: of the input; None: as it is.
        weights: by layer.
        biases: by layer.
    """

    rule: ActivationQuantizer | None
    weights: Mapping[str, Array]
    biases: Mapping[str, Array]

    def __call__(self, run: Disturbed) -> dict[str, Array]:
        x = None if self.rule is None else told(run.input, self.rule)
        return run(x, self.weights, self.biases)


def _nearest(
    graph: Graph, trials: Iterable[_Trial], calibration: Calibration, value: str, method: Method
) -> dict[str, _Change]:
    made = {}
    for trial in trials:
        if trial.layer is None:
            rule = calibration.quantizer(value, trial.bits, method)
            made[trial.key] = _Change(rule, {}, {})
        else:
            name = trial.layer.name
            weights, bias = _rounded(graph, trial.layer, trial.bits, calibration)
            made[trial.key] = _Change(None, {name: weights}, {name: bias})
    return made


def _fitted(rounder: Rounder, rows: list[Rows], trials: Iterable[_Trial]) -> dict[str, _Change]:
    """The same with layers fitted to their outputs."""
    made = {}
    widths: dict[str, list[int]] = {}
    for trial in trials:
        if trial.layer is not None:
            widths.setdefault(trial.layer.name, []).append(trial.bits)
            continue
        rule = rounder.rule(rows, trial.bits)
        layers = {seen.layer: rounder.candidate(seen, WIDE, rule) for seen in rows}
        made[trial.key] = _change(layers, rule)
    wide = rounder.rule(rows, WIDE)
    for seen in rows:
        bits = widths.get(seen.layer.name, [])
        found = rounder.candidates(seen, bits, wide) if bits else []
        for width, layer in zip(bits, found, strict=True):
            made[f"w/{seen.layer.name}/{width}"] = _change({seen.layer: layer}, None)
    return made


def _change(layers: Mapping[Layer, RoundedLayer], rule: ActivationQuantizer | None) -> _Change:
    weights = {layer.name: told_weights(layer, made) for layer, made in layers.items()}
    return _Change(rule, weights, {layer.name: made.bias for layer, made in layers.items()})


def _rounded(
    graph: Graph, layer: Layer, bits: int, calibration: Calibration
) -> tuple[Array, Array]:
    """Weights and bias as the quantized layer has them."""
    node = graph[layer.name]
    exact = weight_matrix(graph, node)
    axis = 0 if layer.op == "Conv" else 1
    codes = quantize_weights(exact, bits, axis)
    shape = [1] * exact.ndim
    shape[axis] = -1
    weights = codes.values * codes.scale.reshape(shape)
    error = weights.astype(np.float64) - exact
    means = calibration.mean(layer.input)
    shift = conv_shift(error, means, layer.groups) if layer.op == "Conv" else means @ error
    bias = bias_vector(graph, node)
    return weights, ((0.0 if bias is None else bias) - shift).astype(np.float32)
