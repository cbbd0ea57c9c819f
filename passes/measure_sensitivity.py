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
from mpqc.quantizers import conv_shift, quantize_weights


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
    known: MutableMapping[str, float] | None = None,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Sensitivity:
    """Quantize and dequantize one thing at a time, and compare the outputs on the data.

    Weights are rounded, and biases corrected, as ``QuantizeLayers`` does.

    Args:
        graph: float, at the batch size of the data.
        data: streamed once for each value that layers read.
        calibration: of those values.
        weight_bits: layer -> widths.
        activation_bits: value -> widths.
        metric: distance of outputs.
        method: how activation ranges follow from histograms.
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
    for done, (value, layers) in enumerate(readers.items()):
        wanted = [
            *((f"a/{value}/{bits}", value, bits) for bits in activation_bits.get(value, ())),
            *(
                (f"w/{layer.name}/{bits}", layer.name, bits)
                for layer in layers
                for bits in weight_bits.get(layer.name, ())
            ),
        ]
        missing = [entry for entry in wanted if entry[0] not in known]
        if missing:
            losses = {key: Loss(metric) for key, _, _ in missing}
            rounded = {
                key: _rounded(graph, layer, bits, calibration)
                for key, name, bits in missing
                if key.startswith("w/")
                for layer in layers
                if layer.name == name
            }
            for run in disturb(seen, data, [layer.name for layer in layers]):
                for key, name, bits in missing:
                    if key in rounded:
                        outputs = run(None, {name: rounded[key][0]}, {name: rounded[key][1]})
                    else:
                        outputs = _narrowed(run, calibration, value, bits, method)
                    losses[key].add(run, outputs)
            known.update({key: loss.value for key, loss in losses.items()})
        progress(f"sensitivity of {layers[0].name}", done + 1, len(readers))
    return Sensitivity(
        {name: {b: known[f"w/{name}/{b}"] for b in bits} for name, bits in weight_bits.items()},
        {name: {b: known[f"a/{name}/{b}"] for b in bits} for name, bits in activation_bits.items()},
        metric,
    )


def _narrowed(
    run: Disturbed, calibration: Calibration, value: str, bits: int, method: Method
) -> dict[str, Array]:
    rule = calibration.quantizer(value, bits, method)
    return run(rule.dequantize(rule.quantize(run.input)))


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
