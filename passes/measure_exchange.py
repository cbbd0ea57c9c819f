"""measure-exchange: what the outputs of a quantized network lose when one width changes.

Scores of single layers in a float network add up only while losses are small. Around a plan they
are measured where they count: all other layers are quantized as the plan says, and the layer in
question is fitted, at each of its other widths, to what these layers leave it to work with. Layers
behind it stay as the plan rounded them.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

from mpqc.calibration import Calibration
from mpqc.data import Data
from mpqc.graph import Array, Graph
from mpqc.histogram import Method
from mpqc.passes.find_layers import Layer
from mpqc.passes.measure_perturbation import (
    Disturbed,
    Loss,
    Metric,
    available_threads,
    compared,
    disturb,
)
from mpqc.passes.round_layers import Rounder, Rows, told, told_weights
from mpqc.plan import Plan
from mpqc.rounding import Accuracy, RoundedLayer

PLAN = "plan"  # key of the plan's own loss


@dataclass(frozen=True)
class Exchanges:
    """Losses of whole networks.

    Attributes:
        plan: of the network by the plan itself.
        weights: layer -> bits -> loss with that width of its weights.
        activations: value that layers read -> bits -> loss with that width.
    """

    plan: float
    weights: Mapping[str, Mapping[int, float]]
    activations: Mapping[str, Mapping[int, float]]


def measure_exchange(
    graph: Graph,
    plan: Plan,
    data: Data,
    scored: Data,
    calibration: Calibration,
    weight_bits: Mapping[str, Iterable[int]],
    activation_bits: Mapping[str, Iterable[int]],
    *,
    accuracy: Accuracy,
    metric: Metric = "sqnr",
    method: Method = "mse",
    seed: int = 0,
    known: MutableMapping[str, float] | None = None,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Exchanges:
    """Change one width of the plan at a time, and compare the outputs with the float model's.

    Args:
        graph: float, at the batch size of the data.
        plan: widths of all layers; it narrows no tensors.
        data: to round on.
        scored: to compare on; streamed once for each value that layers read.
        calibration: of those values.
        weight_bits: layer -> widths other than the plan's.
        activation_bits: value -> widths, likewise.
        accuracy: how layers are rounded.
        metric: distance of outputs.
        method: how activation ranges follow from histograms.
        seed: of the choice of samples and positions.
        known: losses that were measured before, which is where new ones go: those of a value
            and its layers together.
        progress: called with what was done, and how many steps of how many are done.
    """
    known = {} if known is None else known
    rounder = Rounder(graph, plan, calibration, data, accuracy, method, seed)
    missing: dict[str, list[_Trial]] = {}
    for value, layers in rounder.groups.items():
        wanted = [_Trial(f"a/{value}/{b}", None, b) for b in activation_bits.get(value, ())]
        wanted += [
            _Trial(f"w/{layer.name}/{b}", layer.name, b)
            for layer in layers
            for b in weight_bits.get(layer.name, ())
        ]
        missing[value] = [trial for trial in wanted if trial.key not in known]
    if PLAN not in known:
        missing[next(iter(missing))].append(_Trial(PLAN, None, None))
    if any(missing.values()):
        steps = 2 * len(missing)
        changes: dict[str, dict[str, RoundedLayer]] = {}
        for done, rows in enumerate(rounder.groups_in_order(), 1):
            changes |= _changes(rounder, rows, missing[rows[0].layer.input])
            rounder.round(rows)
            progress(f"round {rows[0].layer.name}", done, steps)
        for done, (value, layers) in enumerate(rounder.groups.items(), len(missing) + 1):
            if keys := [trial.key for trial in missing[value]]:
                tried = {key: changes.get(key, {}) for key in keys}
                known.update(_losses(rounder, layers, tried, scored, metric))
            progress(f"exchange {layers[0].name}", done, steps)
    return Exchanges(
        known[PLAN],
        {name: {b: known[f"w/{name}/{b}"] for b in bits} for name, bits in weight_bits.items()},
        {name: {b: known[f"a/{name}/{b}"] for b in bits} for name, bits in activation_bits.items()},
    )


@dataclass(frozen=True)
class _Trial:
    """Another width of a layer's weights, or (layer None) of what layers read, or (both) none."""

    key: str
    layer: str | None
    bits: int | None


def _changes(
    rounder: Rounder, rows: Sequence[Rows], trials: Sequence[_Trial]
) -> dict[str, dict[str, RoundedLayer]]:
    """Key -> layers that compute with something else than the plan says."""
    planned = rounder.plan.layers
    made: dict[str, dict[str, RoundedLayer]] = {}
    widths: dict[str, dict[int, str]] = {}
    for trial in trials:
        if trial.layer is not None and trial.bits is not None:
            widths.setdefault(trial.layer, {})[trial.bits] = trial.key
        elif trial.bits is not None:
            rule = rounder.rule(rows, trial.bits)
            made[trial.key] = {
                seen.layer.name: rounder.candidate(seen, planned[seen.layer.name].weight_bits, rule)
                for seen in rows
            }
    rule = rounder.rule(rows, planned[rows[0].layer.name].activation_bits)
    for seen in rows:
        name = seen.layer.name
        if bits := widths.get(name):
            found = rounder.candidates(seen, list(bits), rule)
            made |= {key: {name: layer} for key, layer in zip(bits.values(), found, strict=True)}
    return made


def _losses(
    rounder: Rounder,
    layers: Sequence[Layer],
    changes: Mapping[str, Mapping[str, RoundedLayer]],
    scored: Data,
    metric: Metric,
) -> dict[str, float]:
    """Losses of the network with each change, against the float outputs."""
    from mpqc import onnx_export, ort

    names = [layer.name for layer in layers]
    network = compared(rounder.simulation.graph(exact=names), metric)
    exact = ort.Session(
        onnx_export.to_onnx(compared(rounder.graph, metric)),
        threads=available_threads(),
        optimise=True,
    )
    own = {name: rounder.rounded[name] for name in names}
    losses = {key: Loss(metric) for key in changes}
    references = map(exact.run, scored.feeds())
    for run, outputs in zip(disturb(network, scored, names), references, strict=True):
        against = replace(run, outputs=outputs)
        for key, change in changes.items():
            losses[key].add(against, _run(against, layers, {**own, **change}))
    return {key: loss.value for key, loss in losses.items()}


def _run(
    run: Disturbed, layers: Sequence[Layer], made: Mapping[str, RoundedLayer]
) -> dict[str, Array]:
    x = told(run.input, made[layers[0].name].rule)
    weights = {layer.name: told_weights(layer, made[layer.name]) for layer in layers}
    return run(x, weights, {name: layer.bias for name, layer in made.items()})
