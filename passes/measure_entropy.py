"""measure-entropy: how many bits the quantized weights of a layer hold. Needs no data."""

from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

import numpy as np

from mpqc.graph import Array, Graph
from mpqc.passes.find_layers import weight_matrix
from mpqc.quantizers import quantize_weights

Step: TypeAlias = Literal["layer", "lsq", "channel"]


def measure_entropy(
    graph: Graph,
    layers: Iterable[str],
    bits: int = 4,
    step: Step = "layer",
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> dict[str, float]:
    """Entropy of the codes of each layer's weights.

    Args:
        graph: float.
        layers: names.
        bits: width of the codes.
        step: ``layer``: one step a layer, of least squared error; ``lsq``: one step a layer, with
            which LSQ begins to train, 2 mean|w| / sqrt(Qp); ``channel``: codes as the compiler
            makes them, a step of least squared error for each output channel.
        progress: called with what was measured, and how many layers of how many are done.

    Returns:
        Bits per weight, from 0 to ``bits``.
    """
    names = tuple(layers)
    found = {}
    for done, name in enumerate(names):
        node = graph[name]
        weights = weight_matrix(graph, node)
        if step == "lsq":
            codes = lsq_codes(weights, bits)
        elif step == "layer":
            codes = quantize_weights(weights.reshape(1, -1), bits, 0).values
        else:
            codes = quantize_weights(weights, bits, 0 if node.op == "Conv" else 1).values
        found[name] = entropy(codes)
        progress(f"entropy of {name}", done + 1, len(names))
    return found


def lsq_codes(weights: Array, bits: int) -> Array:
    """Integers ``clip(round(w / s), -2**(bits-1), 2**(bits-1) - 1)`` with one s for all."""
    half = 2 ** (bits - 1)
    top = max(half - 1, 1)
    step = 2 * float(np.abs(weights).mean(dtype=np.float64)) / np.sqrt(top) or 1.0
    return np.clip(np.rint(weights / step), -half, half - 1).astype(np.int16)


def entropy(codes: Array) -> float:
    """``-sum p log2 p`` over the values that occur [bits]."""
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / counts.sum()
    return max(0.0, float(-(shares * np.log2(shares)).sum()))
