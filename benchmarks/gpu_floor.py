"""The least time that a layer can take on a GPU: what memory and what arithmetic allow."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

# mpqc.cuda.select's, which needs TVM to import: used where nothing was measured. A test holds them
# equal.
ASSUMED: Mapping[str, Mapping[str, float]] = {
    "75": {"and-popcount": 512, "dp4a": 256, "mma-b1": 0, "mma-s8": 0},
    "80": {"and-popcount": 512, "dp4a": 256, "mma-b1": 16384, "mma-s8": 2048},
    "86": {"and-popcount": 512, "dp4a": 256, "mma-b1": 8192, "mma-s8": 1024},
    "87": {"and-popcount": 512, "dp4a": 256, "mma-b1": 8192, "mma-s8": 1024},
    "89": {"and-popcount": 512, "dp4a": 256, "mma-b1": 8192, "mma-s8": 1024},
    "90": {"and-popcount": 512, "dp4a": 256, "mma-b1": 2048, "mma-s8": 2048},
}
KINDS = {"bitplane": ("and-popcount", "mma-b1"), "int8": ("dp4a", "mma-s8")}


@dataclass(frozen=True)
class Floor:
    """Seconds that no kernel on these instructions goes below.

    Attributes:
        memory: codes in, weights and codes out, each once, at the measured bandwidth. What lies
            in the second-level cache can be faster.
        arithmetic: products of the planes (or bytes) at the fastest measured instruction.
    """

    memory: float
    arithmetic: float


def floor(
    layer: Mapping[str, Any], batch: int, widths: str, kind: str, rates: Mapping[str, Any]
) -> Floor | None:
    """Of one layer; None without measured rates.

    Args:
        layer: as ``gpu_build.layers_of`` writes it, at batch 1.
        batch: of the run.
        widths: "w2a2", as the manifest says it.
        kind: "bitplane" or "int8".
        rates: as ``gpu_rates.cu`` prints them.
    """
    needed = ("multiprocessors", "hertz", "bytes_a_second")
    if kind not in KINDS or any(name not in rates for name in needed):
        return None
    weight_bits, activation_bits = bits(widths)
    pairs = 1
    if kind == "bitplane":
        pairs = weight_bits * activation_bits
    else:
        weight_bits = activation_bits = 8
    macs, weights = layer["macs"] * batch, prod(layer["weight"])
    codes_in, codes_out = prod(layer["input"]) * batch, results(layer) * batch
    moved = (activation_bits * (codes_in + codes_out) + weight_bits * weights) / 8
    rate = max(float(rates.get(name, 0.0)) for name in KINDS[kind])
    if not rate:
        return None
    a_second = rate * rates["multiprocessors"] * rates["hertz"]
    return Floor(moved / rates["bytes_a_second"], macs * pairs / a_second)


def results(layer: Mapping[str, Any]) -> int:
    """Elements that a layer writes at batch 1."""
    weight = layer["weight"]
    each = prod(weight[1:]) if len(weight) > 2 else layer["input"][-1]
    return int(layer["macs"]) // max(1, int(each))


def bits(widths: str) -> tuple[int, int]:
    """``w2a4`` -> (2, 4); the widest where a layer has several: ``w2+4a4``."""
    weight, _, activation = widths.removeprefix("w").partition("a")
    return max(map(int, weight.split("+"))), int(activation)
