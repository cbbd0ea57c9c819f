"""What the calibration data say about the values of a graph: histograms and channel means."""

import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpqc.data import Data
from mpqc.errors import DataError, OutputError
from mpqc.graph import Array, Graph
from mpqc.histogram import BINS, Histogram, Method
from mpqc.quantizers import ActivationQuantizer

_FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """Histograms by value name.

    Attributes:
        histograms: of float32 values.
        samples: calibration samples seen.
        means: float64 [channels] of the same values; channels are axis 1 of what convolutions
            read, else the last axis.
    """

    histograms: Mapping[str, Histogram]
    samples: int
    means: Mapping[str, Array] = field(default_factory=dict)

    def histogram(self, tensor: str) -> Histogram:
        """The histogram of one value.

        Raises:
            DataError: the value was not calibrated.
        """
        if tensor not in self.histograms:
            raise DataError(_missing(tensor))
        return self.histograms[tensor]

    def mean(self, tensor: str) -> Array:
        """Mean of each channel of one value: float64 [channels].

        Raises:
            DataError: the value was not calibrated.
        """
        if tensor not in self.means:
            raise DataError(_missing(tensor))
        return self.means[tensor]

    def quantizer(self, tensor: str, bits: int, method: Method = "mse") -> ActivationQuantizer:
        """The rule for one value at one width."""
        return self.histogram(tensor).quantizer(bits, method)

    def save(self, path: str | Path) -> None:
        """Write one .npz: a JSON header, the counts and the means.

        Raises:
            OutputError: the file cannot be written.
        """
        names = list(self.histograms)
        rows = [
            {
                "name": name,
                "exponent": h.exponent,
                "zeros": h.zeros,
                "low": h.low,
                "high": h.high,
                "total": h.total,
            }
            for name, h in self.histograms.items()
        ]
        header = {"mpqc_calibration": _FORMAT, "samples": self.samples, "tensors": rows}
        counts = np.array([self.histograms[name].counts for name in names], np.int64)
        arrays: dict[str, Any] = {f"mean{i}": self.mean(name) for i, name in enumerate(names)}
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        arrays["counts"] = counts.reshape(-1, 2 * BINS)
        try:
            with Path(path).open("wb") as file:  # savez would append .npz to the name
                np.savez_compressed(file, **arrays)
        except OSError as error:
            raise OutputError(f"cannot write the calibration {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what ``save`` wrote.

        Raises:
            DataError: missing, damaged or of another version.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                header = json.loads(archive["header"].tobytes())
                counts = archive["counts"]
                means = [archive[f"mean{i}"] for i in range(len(counts))]
            if header["mpqc_calibration"] != _FORMAT or counts.shape[1:] != (2 * BINS,):
                raise ValueError("written by another version of mpqc")
            histograms = {
                row.pop("name"): Histogram(counts=count, **row)
                for row, count in zip(header["tensors"], counts, strict=True)
            }
            return cls(
                histograms, int(header["samples"]), dict(zip(histograms, means, strict=True))
            )
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(
                f"cannot read the calibration {path}: {error}; delete it and calibrate again"
            ) from error


def _missing(tensor: str) -> str:
    return f"value {tensor!r} was not calibrated; calibrate again with this model and plan"


def calibrate(
    graph: Graph,
    data: Data,
    tensors: Iterable[str],
    max_samples: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int | None], None] | None = None,
    threads: int = 1,
) -> Calibration:
    """Run the float graph over the data and watch the given values.

    Args:
        graph: float; ONNX Runtime runs it.
        data: streamed once.
        tensors: float32 values of the graph.
        max_samples: drawn at random where the data have a length, else the first.
        seed: of that draw.
        progress: called with samples done and samples in all (None: unknown).
        threads: of ONNX Runtime.

    Raises:
        DataError: no data, or values that are not finite.
    """
    from mpqc import onnx_export, ort

    names = tuple(dict.fromkeys(tensors))
    fed = [name for name in names if name in graph.inputs]
    computed = [name for name in names if name not in graph.inputs]
    if unknown := [name for name in names if name not in graph.types]:
        raise DataError(f"not values of this model: {', '.join(unknown)}")
    data = data.sample(max_samples, seed)
    session = None
    if computed:
        session = ort.Session(onnx_export.to_onnx(graph, computed), threads=threads)
    histograms = {name: Histogram() for name in names}
    axes = {name: _channel_axis(graph, name) for name in names}
    sums: dict[str, Array] = {name: np.zeros(()) for name in names}
    feeds_seen = done = 0
    for feeds in data.feeds():
        values = {name: feeds[name] for name in fed}
        if session is not None:
            values |= session.run(feeds, computed)
        for name, array in values.items():
            if not np.isfinite(array).all():
                raise DataError(
                    f"value {name!r} is NaN or infinite after {done} samples: the float model "
                    "overflows on these data; check the preprocessing"
                )
            histograms[name].add(array)
            others = tuple(axis for axis in range(array.ndim) if axis != axes[name])
            sums[name] = sums[name] + array.mean(axis=others, dtype=np.float64)
        feeds_seen += 1
        done += data.batch
        if data.samples is not None:
            done = min(done, data.samples)
        if progress is not None:
            progress(done, data.samples)
    if done == 0:
        raise DataError("no calibration samples; give at least one")
    means = {name: np.atleast_1d(total / feeds_seen) for name, total in sums.items()}
    return Calibration(histograms, done, means)


def _channel_axis(graph: Graph, value: str) -> int:
    convolved = any(node.op == "Conv" for node in graph.consumers(value))
    return 1 if convolved else len(graph.shape(value)) - 1
