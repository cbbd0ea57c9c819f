"""Latency of layers that nobody measured: a small model, calibrated on those that were.

For each kind of kernel (grouped convolutions apart), by non-negative least squares on relative
errors::

    seconds = c0 + c1 * input + c2 * output + c3 * weights + c4 * work

``input`` counts the elements that are padded, packed or made into tables (times the planes of
bitplane kernels), ``output`` the elements that the epilogue writes, ``weights`` the bytes of
packed weights, ``work`` the products: MACs * w * a for ``bitplane``, MACs * w for
``bitplane-lut``, MACs for ``int8``. All coefficients are at least zero, hence more bits never cost
less. Where the same geometry was measured at other widths, the prediction is scaled by what the
model missed there, near widths before far ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mpqc.graph import Array, Precision
from mpqc.latency import Entry, Geometry

MOST_LUT_BITS = 6  # activations: four codes of more overflow the byte of a table
FEWEST_ROWS = 3  # that a fit of its own is worth


def exists(kind: str, geometry: Geometry, precision: Precision) -> bool:
    """Whether there can be such a kernel."""
    lut = kind == "bitplane-lut"
    return not lut or (geometry.groups == 1 and precision.activation <= MOST_LUT_BITS)


def features(kind: str, geometry: Geometry, precision: Precision) -> Array:
    """The columns above: float64 [5]."""
    planes = precision.activation if kind == "bitplane" else 1
    group_in = geometry.c // geometry.groups
    whole = 8 * -(-group_in // 8) if kind == "bitplane" else group_in
    macs = geometry.macs // max(group_in, 1) * whole
    taps = geometry.kernel_h * geometry.kernel_w
    weight_planes = 8 if kind == "int8" else precision.weight
    work = {
        "bitplane": precision.weight * precision.activation,
        "bitplane-lut": precision.weight,
        "int8": 1,
    }[kind]
    return np.array(
        [
            1.0,
            geometry.n * geometry.h * geometry.w * geometry.c * planes,
            geometry.out_pixels * geometry.out_channels,
            geometry.out_channels * taps * whole * weight_planes / 8,
            macs * work,
        ]
    )


@dataclass(frozen=True)
class LatencyModel:
    """Calibrated coefficients and the rows that they come from.

    Attributes:
        coefficients: (kind, grouped) -> [5].
        anchors: (kind, geometry) -> (precision, seconds) of what was measured.
    """

    coefficients: Mapping[tuple[str, bool], Array] = field(default_factory=dict)
    anchors: Mapping[tuple[str, Geometry], Sequence[tuple[Precision, float]]] = field(
        default_factory=dict
    )

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(kind for kind, _ in self.coefficients)

    @classmethod
    def fit(cls, entries: Iterable[Entry]) -> "LatencyModel":
        """Calibrate on measured layers."""
        rows: dict[tuple[str, bool], list[tuple[Array, float]]] = {}
        anchors: dict[tuple[str, Geometry], list[tuple[Precision, float]]] = {}
        for entry in entries:
            if entry.geometry is None:
                continue
            precision = Precision(entry.weight_bits, entry.activation_bits)
            row = (features(entry.kernel, entry.geometry, precision), entry.seconds_min)
            rows.setdefault((entry.kernel, entry.geometry.groups > 1), []).append(row)
            found = anchors.setdefault((entry.kernel, entry.geometry), [])
            found.append((precision, entry.seconds_min))
        pooled: dict[str, list[tuple[Array, float]]] = {}
        for (kind, _), kept in rows.items():
            pooled.setdefault(kind, []).extend(kept)
        coefficients = {}
        for kind, every in pooled.items():
            for grouped in (False, True):
                own = rows.get((kind, grouped), [])
                coefficients[kind, grouped] = _solve(own if len(own) >= FEWEST_ROWS else every)
        return cls(coefficients, anchors)

    def seconds(
        self, geometry: Geometry, precision: Precision, kind: str, but: Precision | None = None
    ) -> float:
        """Predicted latency.

        Args:
            geometry: of the layer.
            precision: its widths.
            kind: of the kernel, from ``kinds``.
            but: a precision whose measurements are not looked at, to test the model.
        """
        plain = self._plain(geometry, precision, kind)
        near = [
            (1 / (1 + _distance(other, precision)) ** 2, np.log(measured / expected))
            for other, measured in self.anchors.get((kind, geometry), ())
            if other != but and measured > 0
            and (expected := self._plain(geometry, other, kind)) > 0
        ]  # fmt: skip
        if not near:
            return plain
        weights, misses = zip(*near, strict=True)
        return float(plain * np.exp(np.average(misses, weights=weights)))

    def _plain(self, geometry: Geometry, precision: Precision, kind: str) -> float:
        coefficients = self.coefficients[kind, geometry.groups > 1]
        return float(features(kind, geometry, precision) @ coefficients)

    def errors(self) -> list[float]:
        """|prediction / measured - 1| of each point, its own measurement left out."""
        found = []
        for (kind, geometry), anchors in self.anchors.items():
            for precision, measured in anchors:
                predicted = self.seconds(geometry, precision, kind, but=precision)
                if measured > 0:
                    found.append(abs(predicted / measured - 1))
        return found


def _distance(one: Precision, other: Precision) -> int:
    return abs(one.weight - other.weight) + abs(one.activation - other.activation)


def _solve(rows: Sequence[tuple[Array, float]]) -> Array:
    from scipy.optimize import nnls

    kept = [(row, seconds) for row, seconds in rows if seconds > 0]
    if not kept:
        return np.zeros(5)
    matrix = np.array([row / seconds for row, seconds in kept])
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)  # columns differ by many decades
    found, _ = nnls(matrix / scale, np.ones(len(kept)))
    return np.asarray(found / scale)
