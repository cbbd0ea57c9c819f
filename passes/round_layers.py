"""round-layers: what each planned layer computes with, found on calibration data.

Layers are taken in the order in which the graph runs them. Each sees the inputs that the
quantized layers before it give, and is fitted to the outputs that it has in the float model: so
errors are not only kept small where they arise, what earlier layers did wrong is made good too,
as far as the layer can.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import TypeAlias

import numpy as np

from mpqc.calibration import Calibration
from mpqc.data import Data
from mpqc.errors import DataError
from mpqc.graph import Array, Graph, Node
from mpqc.histogram import Method
from mpqc.passes.find_layers import Layer, bias_vector, find_layers, weight_matrix
from mpqc.passes.measure_perturbation import available_threads
from mpqc.patches import Geometry
from mpqc.plan import Plan
from mpqc.quantizers import (
    ActivationQuantizer,
    QuantizedWeights,
    quantize_weights,
    stored_levels,
)
from mpqc.replay import Replay
from mpqc.rounding import Accuracy, Objective, RoundedLayer, compensate

LayerProgress: TypeAlias = Callable[[str, int, int], None]

ROWS = 4096  # of a layer at least, where the data have them, and
ROWS_PER_COLUMN = 32
CLIPPING_ROWS = 2048
MAX_COLUMNS = 5120  # beyond, the square matrices are too large: round to nearest
PRODUCTS = 5e10  # of the square matrix of a layer's inputs: bounds its time, not below ROWS
BYTES = 2**28  # of one layer's rows, and of values kept for each of the two graphs
CHUNK = 4096  # rows in a product
SHARES = (1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.4, 1.6)  # of an activation's scale


def round_layers(
    graph: Graph,
    plan: Plan,
    calibration: Calibration,
    data: Data,
    accuracy: Accuracy,
    *,
    method: Method = "mse",
    seed: int = 0,
    progress: LayerProgress | None = None,
) -> dict[str, RoundedLayer]:
    """Weights, biases and activation ranges of all layers of the plan.

    Args:
        graph: float, at the batch size of the data.
        plan: widths.
        calibration: of what ``tensors_to_calibrate`` names.
        data: streamed about twice, and more often where values do not fit in memory.
        accuracy: what to do.
        method: how ranges follow from histograms, before they are refined.
        seed: of the choice of samples and positions.
        progress: called with a layer's name, and how many of how many are done.

    Raises:
        DataError: no data, or values that are not finite.
    """
    rounder = Rounder(graph, plan, calibration, data, accuracy, method, seed)
    total = sum(map(len, rounder.groups.values()))
    for rows in rounder.groups_in_order():
        rounder.round(rows)
        if progress is not None:
            progress(rows[-1].layer.name, len(rounder.rounded), total)
    return rounder.rounded


class Rounder:
    """Rounds the layers of a plan one after the other; between, others may be tried.

    Attributes:
        groups: value -> planned layers that read it, in the order in which the graph runs them.
        rounded: layer -> what it computes with; grows.
        simulation: the network so far.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        calibration: Calibration,
        data: Data,
        accuracy: Accuracy,
        method: Method = "mse",
        seed: int = 0,
    ) -> None:
        plan.check(graph, None)
        self.graph, self.plan, self.calibration = graph, plan, calibration
        self.accuracy, self.method, self.seed = accuracy, method, seed
        self._data = data.sample(accuracy.samples, seed)
        self.rounded: dict[str, RoundedLayer] = {}
        self.simulation = Simulation(graph)
        for value, tensor in plan.tensors.items():
            rule = calibration.quantizer(value, tensor.bits, method)
            self.simulation.narrow(value, rule)
        self.groups: dict[str, list[Layer]] = {}
        for layer in find_layers(graph):
            if layer.name in plan.layers:
                self.groups.setdefault(layer.input, []).append(layer)
        names = [layer.name for layers in self.groups.values() for layer in layers]
        self._number = {name: number for number, name in enumerate(names)}

    def groups_in_order(self, skip: Collection[str] = ()) -> Iterator[list["Rows"]]:
        """Layers that read one value, with what they see in the network as it stands.

        Those that are to be rounded are rounded before the next is asked for.

        Args:
            skip: values whose readers are left as they are, unseen.
        """
        data = self._data
        samples = self.accuracy.samples if data.samples is None else data.samples
        batches = ceil(samples / data.batch)
        exact, twin = (Replay(data, BYTES, available_threads()) for _ in range(2))
        for value, layers in self.groups.items():
            if value in skip:
                continue
            seen = self.simulation.reads(value)
            outputs = exact.stage(self.graph, [layer.output for layer in layers])
            inputs = (batch[seen] for batch in twin.stage(self.simulation.graph(), [seen]))
            yield self._rows(layers, inputs, outputs, batches)

    def round(self, rows: Sequence["Rows"]) -> None:
        """Round the layers that read one value, as the plan says."""
        rule = self.rule(rows, self.plan.layers[rows[0].layer.name].activation_bits)
        for seen in rows:
            made = self.candidate(seen, self.plan.layers[seen.layer.name].weight_bits, rule)
            self.rounded[seen.layer.name] = made
            self.simulation.replace(self.graph, seen.layer, made)

    def rule(self, rows: Sequence["Rows"], bits: int) -> ActivationQuantizer:
        """For the value that the layers read, at a width."""
        value = rows[0].layer.input
        rule = self.calibration.quantizer(value, bits, self.method)
        narrowed = self.plan.tensors.get(value)
        if self.accuracy.clipping == "output" and (narrowed is None or narrowed.bits != bits):
            return self._clipped(rows, rule)
        return rule

    def _rows(
        self,
        layers: Sequence[Layer],
        inputs: Iterator[Array],
        outputs: Iterator[dict[str, Array]],
        batches: int,
    ) -> list["Rows"]:
        rows = [Rows.of(self.graph, layer) for layer in layers]
        count = 0
        for number, (x, ys) in enumerate(zip(inputs, outputs, strict=True)):
            count += 1
            for seen in rows:
                own = self._number[seen.layer.name]
                rng = np.random.default_rng([self.seed, own, number])
                seen.add(x, ys[seen.layer.output], batches, rng)
        if not count:
            raise DataError("no calibration samples; give at least one")
        return rows

    def _clipped(self, rows: Sequence["Rows"], rule: ActivationQuantizer) -> ActivationQuantizer:
        """The range of least output error, with the weights as they are."""
        rules = [
            ActivationQuantizer(rule.scale * share, rule.zero_point, rule.bits) for share in SHARES
        ]
        losses = np.zeros(len(rules))
        for seen in rows:
            x, y = seen.sample(CLIPPING_ROWS)
            weights = seen.weights.swapaxes(1, 2)
            target = y - seen.bias
            power = float(np.square(target - target.mean(0)).mean()) or 1.0
            for index, candidate in enumerate(rules):
                got = told(x, candidate) @ weights
                error = got.swapaxes(0, 1).reshape(target.shape) - target
                if self.accuracy.bias_correction:
                    error = error - error.mean(0)
                losses[index] += float(np.square(error).mean()) / power
        return rules[int(np.argmin(losses))]

    def candidate(
        self, seen: "Rows", bits: int | tuple[int, ...], rule: ActivationQuantizer
    ) -> RoundedLayer:
        """What a layer would compute with at a width of weights and a rule of its input."""
        return self.candidates(seen, [bits], rule)[0]

    def candidates(
        self, seen: "Rows", widths: Sequence[int | tuple[int, ...]], rule: ActivationQuantizer
    ) -> list[RoundedLayer]:
        """The same at several widths of weights."""
        x, y = seen.all()
        center = self.accuracy.bias_correction
        x_mean = _quantized_mean(x, rule)
        y_mean = y.mean(0, np.float64)
        columns = x.shape[2]
        objective = None
        if self.accuracy.rounding != "nearest" and columns <= MAX_COLUMNS:
            gram, cross = second_moments(
                x,
                y if center else y - seen.bias,
                rule,
                x_mean if center else np.zeros_like(x_mean),
                y_mean if center else np.zeros_like(y_mean),
            )
            damping = self.accuracy.damping + columns / x.shape[1]
            objective = Objective.fitted(seen.weights, gram, cross, damping)
        found = []
        for bits in widths:
            weights = self._weights(seen, bits, objective)
            bias = seen.bias
            if center:
                rows = seen.rows(weights.values) * weights.scale.reshape(len(x), -1, 1)
                means = np.einsum("gok,gk->go", rows.astype(np.float64), x_mean)
                bias = y_mean - means.reshape(-1)
            found.append(RoundedLayer(weights, bias.astype(np.float32), rule))
        return found

    def _weights(
        self, seen: "Rows", bits: int | tuple[int, ...], objective: Objective | None
    ) -> QuantizedWeights:
        if objective is None:
            return quantize_weights(seen.exact, bits, seen.axis)
        codes, scale = compensate(seen.weights, bits, objective, self.accuracy.order)
        return QuantizedWeights(seen.shaped(codes), scale.reshape(-1), *stored_levels(bits))


def told_weights(layer: Layer, made: RoundedLayer) -> Array:
    """float32, the weights that the codes stand for, as ``weight_matrix`` shapes them."""
    shape = (-1, *[1] * (made.weights.values.ndim - 1)) if layer.op == "Conv" else (1, -1)
    weights: Array = made.weights.values * made.weights.scale.reshape(shape)
    return weights


def told(x: Array, rule: ActivationQuantizer) -> Array:
    """``rule.dequantize(rule.quantize(x))`` without the codes, which is faster."""
    steps: Array = x / np.float32(rule.scale)
    np.rint(steps, out=steps)
    np.clip(steps, -rule.zero_point, rule.top - rule.zero_point, out=steps)
    steps *= np.float32(rule.scale)
    return steps


def _quantized_mean(x: Array, rule: ActivationQuantizer) -> Array:
    """Mean of the quantized rows [G, n, K]: float64 [G, K]."""
    total = np.zeros((x.shape[0], x.shape[2]))
    for start in range(0, x.shape[1], CHUNK):
        part = told(x[:, start : start + CHUNK], rule)
        total += part.sum(1, np.float64)
    mean: Array = total / x.shape[1]
    return mean


def second_moments(
    x: Array, y: Array, rule: ActivationQuantizer, x_mean: Array, y_mean: Array
) -> tuple[Array, Array]:
    """Products of quantized inputs among themselves and with the outputs, about the given means.

    Args:
        x: float32 [G, n, K], not yet quantized.
        y: float32 [n, G * O].
        rule: of x.
        x_mean: [G, K].
        y_mean: [G * O].

    Returns:
        float64 [G, K, K] and [G, O, K], means over the rows; a chunk at a time.
    """
    groups, count, columns = x.shape
    gram = np.zeros((groups, columns, columns))
    cross = np.zeros((groups, y.shape[1] // groups, columns))
    for start in range(0, count, CHUNK):
        part = told(x[:, start : start + CHUNK], rule)
        part -= x_mean[:, None].astype(np.float32)
        out = (y[start : start + CHUNK] - y_mean).astype(np.float32)
        gram += part.swapaxes(1, 2) @ part
        cross += out.T.reshape(groups, -1, out.shape[0]) @ part
    return gram / count, cross / count


@dataclass
class Rows:
    """Rows of one layer's inputs and outputs at random positions, and its weights as rows."""

    layer: Layer
    geometry: Geometry
    exact: Array
    bias: Array
    x: list[Array] = field(default_factory=list)
    y: list[Array] = field(default_factory=list)

    @classmethod
    def of(cls, graph: Graph, layer: Layer) -> "Rows":
        node = graph[layer.name]
        bias = bias_vector(graph, node)
        return cls(
            layer,
            Geometry.of(graph, layer),
            weight_matrix(graph, node),
            np.zeros(layer.channels_out, np.float32) if bias is None else bias,
        )

    @property
    def axis(self) -> int:
        """Of the output channels."""
        return 0 if self.layer.op == "Conv" else 1

    def rows(self, weights: Array) -> Array:
        """Weights as [G, O, K]."""
        flat = weights if self.layer.op == "Conv" else weights.T
        groups = self.layer.groups
        return flat.reshape(groups, self.layer.channels_out // groups, -1)

    @property
    def weights(self) -> Array:
        """The float weights, [G, O, K]."""
        return self.rows(self.exact)

    def shaped(self, rows: Array) -> Array:
        """[G, O, K] as the layer's weights."""
        if self.layer.op == "Conv":
            return rows.reshape(self.exact.shape)
        return np.ascontiguousarray(rows[0].T)

    def add(self, x: Array, y: Array, batches: int, rng: np.random.Generator) -> None:
        """Take this batch's share."""
        for value, array in ((self.layer.input, x), (self.layer.output, y)):
            if not np.isfinite(array).all():
                raise DataError(
                    f"value {value!r} is NaN or infinite: the model overflows on these data; "
                    "check the preprocessing"
                )
        groups, _, columns = self.weights.shape
        fit = min(BYTES // (4 * groups * columns), max(ROWS, int(PRODUCTS / columns**2)))
        share = ceil(min(max(ROWS, ROWS_PER_COLUMN * columns), fit) / batches)
        positions = self.geometry.positions(x)
        at = np.arange(positions)
        if share < positions:
            at = np.sort(rng.choice(positions, share, replace=False))
        self.x.append(self.geometry.inputs(x, at))
        self.y.append(self.geometry.outputs(y, at))

    def all(self) -> tuple[Array, Array]:
        """Inputs [G, n, K] and outputs [n, O]."""
        self.x, self.y = [np.concatenate(self.x, 1)], [np.concatenate(self.y)]
        return self.x[0], self.y[0]

    def sample(self, most: int) -> tuple[Array, Array]:
        """Some of them, evenly spread."""
        x, y = self.all()
        step = ceil(x.shape[1] / most)
        return np.ascontiguousarray(x[:, ::step]), y[::step]


class Simulation:
    """The float graph whose layers are replaced by what their quantized forms compute."""

    def __init__(self, graph: Graph) -> None:
        self._float = graph
        self._nodes: dict[str, list[Node]] = {node.name: [node] for node in graph}
        self._constants: dict[str, Array] = {}
        self._types = dict(graph.types)
        self._narrowed: dict[str, str] = {}
        self._codes: dict[str, str] = {}
        self._first: list[Node] = []

    def reads(self, value: str) -> str:
        """What readers of a float value read."""
        return self._narrowed.get(value, value)

    def narrow(self, value: str, rule: ActivationQuantizer) -> None:
        """All readers of the value read it as the rule's codes tell it."""
        nodes, name = self._rounding(value, value, rule)
        self._first += nodes
        self._narrowed[value] = name

    def replace(self, graph: Graph, layer: Layer, made: RoundedLayer) -> None:
        """The layer computes with rounded weights, bias and inputs."""
        node = graph[layer.name]
        nodes: list[Node] = []
        if layer.input not in self._codes:
            source = self.reads(layer.input)
            nodes, self._codes[layer.input] = self._rounding(f"{layer.input}.in", source, made.rule)
        data = self._codes[layer.input]
        weight, bias = self._fresh(f"{node.name}.w"), self._fresh(f"{node.name}.b")
        self._constants[weight] = told_weights(layer, made)
        self._constants[bias] = made.bias
        if layer.op == "Conv":
            nodes.append(replace(node, inputs=(data, weight, bias)))
        else:
            product = self._fresh(f"{node.name}.product")
            self._types[product] = graph.type(layer.output)
            nodes.append(Node(product, "MatMul", (data, weight), (product,)))
            nodes.append(Node(node.name, "Add", (product, bias), node.outputs))
        self._nodes[layer.name] = nodes

    def graph(self, exact: Collection[str] = ()) -> Graph:
        """As it stands.

        Args:
            exact: layers that stay as they are in the float graph.
        """
        nodes = [
            replace(node, inputs=tuple(self._narrowed.get(v, v) for v in node.inputs))
            for name, made in self._nodes.items()
            for node in ([self._float[name]] if name in exact else made)
        ]
        return self._float.with_(
            [*self._first, *nodes], constants=self._constants, types=self._types
        )

    def _rounding(self, base: str, value: str, rule: ActivationQuantizer) -> tuple[list[Node], str]:
        """Float operators that quantize and dequantize: fewer and faster than exact codes."""
        kind = self._float.type(base.removesuffix(".in"))
        scale, low, high = (
            self._constant(f"{base}.{what}", number)
            for what, number in (
                ("scale", rule.scale),
                ("low", -rule.zero_point),
                ("high", rule.top - rule.zero_point),
            )
        )
        chain: tuple[tuple[str, tuple[str, ...]], ...] = (
            ("Div", (scale,)),
            ("Round", ()),
            ("Clip", (low, high)),
            ("Mul", (scale,)),
        )
        nodes = []
        for op, others in chain:
            name = self._fresh(f"{base}.{op.lower()}")
            self._types[name] = kind
            nodes.append(Node(name, op, (value, *others), (name,)))
            value = name
        return nodes, value

    def _constant(self, base: str, number: float) -> str:
        name = self._fresh(base)
        self._constants[name] = np.array(number, np.float32)
        return name

    def _fresh(self, base: str) -> str:
        taken = {**self._types, **dict.fromkeys(self._constants), **dict.fromkeys(self._nodes)}
        name, serial = base, 1
        while name in taken:
            name, serial = f"{base}_{serial}", serial + 1
        return name
