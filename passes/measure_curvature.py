"""measure-curvature: traces of the Hessian of the loss, by random probes and forward passes.

For a distance D of outputs that is zero at the float model, ``D(W + e v) = e^2/2 v'Hv + O(e^3)``,
and for a vector v of independent signs the mean of ``v'Hv`` is the trace of H (Hutchinson). With
D the divergence of class probabilities, H is the Fisher information, which is the Gauss-Newton
part of the Hessian of the cross entropy, and all of it where the model is certain.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from mpqc.data import Data
from mpqc.graph import Array, Graph
from mpqc.passes.find_layers import Layer, find_layers, weight_matrix
from mpqc.passes.measure_perturbation import Loss, Metric, compared, disturb

STEP = 0.02  # of a probe, relative to the root mean square of what it disturbs


@dataclass(frozen=True)
class Curvature:
    """Halves of traces: loss for each unit of mean squared error.

    Attributes:
        weights: layer -> Tr(H) / 2 over its weights.
        activations: value -> Tr(H) / 2 over its elements that are not zero, one sample's.
        metric: of the outputs.
    """

    weights: Mapping[str, float]
    activations: Mapping[str, float]
    metric: str


def measure_curvature(
    graph: Graph,
    data: Data,
    layers: Iterable[str],
    *,
    probes: int = 4,
    metric: Metric = "sqnr",
    seed: int = 0,
    known: MutableMapping[str, float] | None = None,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Curvature:
    """Probe the weights and the input of each layer.

    Zeros of an activation are not probed: every quantizer keeps them.

    Args:
        graph: float, at the batch size of the data.
        data: streamed once for each value that layers read.
        layers: names.
        probes: a batch, of each thing.
        metric: distance of outputs.
        seed: of the signs.
        known: traces that were measured before; new ones are added.
        progress: called with what was measured, and how many values of how many are done.
    """
    seen = compared(graph, metric)
    known = {} if known is None else known
    names = set(layers)
    readers: dict[str, list[Layer]] = {}
    for layer in find_layers(graph):
        if layer.name in names:
            readers.setdefault(layer.input, []).append(layer)
    for done, (value, group) in enumerate(readers.items()):
        keys = [f"a/{value}", *(f"w/{layer.name}" for layer in group)]
        if any(key not in known for key in keys):
            known.update(_traces(seen, data, value, group, probes, metric, seed))
        progress(f"curvature of {group[0].name}", done + 1, len(readers))
    return Curvature(
        {layer.name: known[f"w/{layer.name}"] for group in readers.values() for layer in group},
        {value: known[f"a/{value}"] for value in readers},
        metric,
    )


def _traces(
    graph: Graph, data: Data, value: str, group: list[Layer], probes: int, metric: Metric, seed: int
) -> dict[str, float]:
    # a generator of each value's own: a resumed measurement draws the same signs
    digest = int.from_bytes(sha256(value.encode()).digest()[:8], "little")
    random = np.random.default_rng([seed, digest])
    exact = {layer.name: weight_matrix(graph, graph[layer.name]) for layer in group}
    losses = {key: Loss(metric) for key in (value, *exact)}
    steps = {name: _step(array) for name, array in exact.items()}
    input_step = 0.0
    for run in disturb(graph, data, [layer.name for layer in group]):
        input_step = input_step or _step(run.input)  # the first batch's: one step for all
        for _ in range(probes):
            signs = _signs(random, run.input) * (run.input != 0)
            losses[value].add(run, run(run.input + np.float32(input_step) * signs))
            for name, array in exact.items():
                probe = array + np.float32(steps[name]) * _signs(random, array)
                losses[name].add(run, run(None, {name: probe}))
    traces = {f"w/{name}": losses[name].value / steps[name] ** 2 for name in exact}
    return {f"a/{value}": losses[value].value / input_step**2, **traces}


def _step(array: Array) -> float:
    """A small part of the root mean square; something where all is zero."""
    filled = array[array != 0]
    return STEP * float(np.sqrt(np.mean(filled.astype(np.float64) ** 2))) if filled.size else STEP


def _signs(random: np.random.Generator, like: Array) -> Array:
    return random.integers(0, 2, like.shape, np.int8).astype(np.float32) * 2 - 1
