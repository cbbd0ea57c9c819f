"""equalize-layers: move scale between the channels of layers that follow one another."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from mpqc.graph import Array, Graph, Node
from mpqc.passes.base import Pass, fresh
from mpqc.passes.find_layers import why_float

# op(s * x) = s * op(x) for s > 0, each channel by itself, padding included
SCALABLE = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool"})
REACH = 2.0**10  # a channel is scaled by this at most
SWEEPS = 8


@dataclass(frozen=True)
class EqualizeLayers(Pass):
    """Before: two layers with nothing between but Relu and the like. After: the same function.

        %y = Conv(%x, %w, %b)               %y = Conv(%x, %w / s, %b / s)
        %r = Relu(%y)               =>      %r = Relu(%y)
        %z = Conv(%r, %v)                   %z = Conv(%r, %v * s)

    s is ``sqrt(max|w| / max|v|)`` of each channel, so that both layers use it alike and one scale
    suits all channels of ``%r``; rounded to a power of two, so that no bit of ``%z`` changes.
    Relu6 and other limits stop it: they do not scale. A value with other readers stays.

    Attributes:
        everywhere: else only pairs of which one layer is a depthwise convolution, whose channels
            differ most and whose few weights are hard to round.
    """

    name = "equalize-layers"

    everywhere: bool = False

    def rewrite(self, graph: Graph) -> Graph:
        pairs = [
            (node, followers)
            for node in graph
            if (followers := _followers(graph, node))
            and (self.everywhere or any(_depthwise(graph, n) for n in (node, *followers)))
        ]
        weights = _Weights(graph)
        for _ in range(SWEEPS):
            changed = [weights.balance(node, followers) for node, followers in pairs]
            if not any(changed):
                break
        return weights.graph()


def _followers(graph: Graph, node: Node) -> tuple[Node, ...]:
    """Layers that read the node's channels, if nothing else does; else none."""
    if not _constant_layer(graph, node):
        return ()
    found: list[Node] = []
    values = [node.output]
    while values:
        value = values.pop()
        readers = graph.consumers(value)
        if value in graph.outputs or not readers:
            return ()
        for reader in readers:
            if reader.inputs[0] != value or value in reader.inputs[1:]:
                return ()
            if reader.op in SCALABLE and len([v for v in reader.outputs if v]) == 1:
                values.append(reader.output)
            elif _constant_layer(graph, reader) and (reader.op == "Conv") == (node.op == "Conv"):
                found.append(reader)
            else:
                return ()
    return tuple(found)


def _constant_layer(graph: Graph, node: Node) -> bool:
    """Whether the layer's weights may be rewritten: a Conv, or a product of rank 2."""
    if node.op not in ("Conv", "Gemm", "MatMul") or why_float(graph, node) is not None:
        return False
    return node.op == "Conv" or len(graph.shape(node.output)) == 2


def _depthwise(graph: Graph, node: Node) -> bool:
    groups = node.int_attr("group", 1) if node.op == "Conv" else 1
    return groups > 1 and graph.shape(node.inputs[1])[1] == 1


class _Weights:
    """Weights and biases of layers, changed channel by channel."""

    def __init__(self, graph: Graph) -> None:
        self._source = graph
        self._arrays: dict[tuple[str, int], Array] = {}

    def balance(self, node: Node, followers: tuple[Node, ...]) -> bool:
        """Scale the channels between the layers; whether any changed."""
        leaving = np.abs(self._by_output(node)).max(axis=1)
        entering = np.max([self._reach_by_input(follower) for follower in followers], axis=0)
        used = (leaving > 0) & (entering > 0)
        ratio = np.divide(leaving, entering, out=np.ones(leaving.shape), where=used)
        scale = np.exp2(np.rint(np.log2(np.clip(ratio, REACH**-2, REACH**2)) / 2))
        # a common factor of all channels is nothing that one scale a tensor would notice
        scale = scale / np.exp2(np.rint(np.log2(scale).mean()))
        if (scale == 1).all() or not self._stays_exact(node, followers, scale):
            return False
        self._scale_outputs(node, 1 / scale)
        for follower in followers:
            self._scale_inputs(follower, scale)
        return True

    def graph(self) -> Graph:
        """With new constants for what changed; a constant that others share stays theirs."""
        constants: dict[str, Array] = {}
        nodes = []
        for node in self._source:
            inputs = list(node.inputs)
            for index, part in ((1, "weight"), (2, "bias")):
                if (node.name, index) in self._arrays:
                    inputs[index] = fresh(self._source, f"{node.name}.{part}")
                    constants[inputs[index]] = self._arrays[node.name, index]
            nodes.append(replace(node, inputs=tuple(inputs)))
        return self._source.with_(nodes, constants=constants)

    def _array(self, node: Node, index: int) -> Array:
        known = self._arrays.get((node.name, index))
        return self._source.constants[node.inputs[index]] if known is None else known

    def _transposed(self, node: Node) -> bool:
        """Whether output channels are the last axis."""
        return node.op == "MatMul" or (node.op == "Gemm" and not node.int_attr("transB", 0))

    def _by_output(self, node: Node) -> Array:
        """[O, K]."""
        array = self._array(node, 1)
        return array.T if self._transposed(node) else array.reshape(array.shape[0], -1)

    def _reach_by_input(self, node: Node) -> Array:
        """Largest magnitude of the weights on each input channel: [I]."""
        array = np.abs(self._array(node, 1))
        reach: Array
        if node.op != "Conv":
            reach = array.max(axis=1 if self._transposed(node) else 0)
            return reach
        groups = node.int_attr("group", 1)
        split = array.reshape(groups, array.shape[0] // groups, array.shape[1], -1)
        reach = split.max(axis=(1, 3)).reshape(-1)
        return reach

    def _scaled_outputs(self, node: Node, scale: Array) -> Iterator[tuple[int, Array]]:
        array = self._array(node, 1)
        shape = (1, -1) if self._transposed(node) else (-1, *[1] * (array.ndim - 1))
        yield 1, array * scale.reshape(shape).astype(np.float32)
        if len(node.inputs) > 2 and node.inputs[2]:
            bias = np.broadcast_to(self._array(node, 2).reshape(-1), scale.shape)
            yield 2, bias * scale.astype(np.float32)

    def _scaled_inputs(self, node: Node, scale: Array) -> Array:
        array, factor = self._array(node, 1), scale.astype(np.float32)
        if node.op != "Conv":
            return array * factor.reshape((-1, 1) if self._transposed(node) else (1, -1))
        groups = node.int_attr("group", 1)
        split = array.reshape(groups, array.shape[0] // groups, array.shape[1], -1)
        return (split * factor.reshape(groups, 1, -1, 1)).reshape(array.shape)

    def _stays_exact(self, node: Node, followers: tuple[Node, ...], scale: Array) -> bool:
        """Whether no scaled number leaves the normal range of float32."""
        arrays = [array for _, array in self._scaled_outputs(node, 1 / scale)]
        arrays += [self._scaled_inputs(follower, scale) for follower in followers]
        sizes = [np.abs(array[array != 0]) for array in arrays]
        return all(not size.size or 2.0**-90 < size.min() <= size.max() < 2.0**90 for size in sizes)

    def _scale_outputs(self, node: Node, scale: Array) -> None:
        for index, array in self._scaled_outputs(node, scale):
            self._arrays[node.name, index] = array

    def _scale_inputs(self, node: Node, scale: Array) -> None:
        self._arrays[node.name, 1] = self._scaled_inputs(node, scale)
