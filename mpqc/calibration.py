"""What the calibration data say about the values of a graph: one histogram a tensor."""

import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpqc.data import Data
from mpqc.errors import DataError, OutputError
from mpqc.graph import Graph
from mpqc.histogram import BINS, Histogram, Method
from mpqc.quantizers import ActivationQuantizer

_FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """Histograms by value name.

    Attributes:
        histograms: of float32 values.
        samples: calibration samples seen.
    """

    histograms: Mapping[str, Histogram]
    samples: int

    def histogram(self, tensor: str) -> Histogram:
        """The histogram of one value.

        Raises:
            DataError: the value was not calibrated.
        """
        if tensor not in self.histograms:
            raise DataError(
                f"value {tensor!r} was not calibrated; calibrate again with this model and plan"
            )
        return self.histograms[tensor]

    def quantizer(self, tensor: str, bits: int, method: Method = "mse") -> ActivationQuantizer:
        """The rule for one value at one width."""
        return self.histogram(tensor).quantizer(bits, method)

    def save(self, path: str | Path) -> None:
        """Write one .npz: a JSON header and the counts.

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
        try:
            with Path(path).open("wb") as file:  # savez would append .npz to the name
                np.savez_compressed(
                    file,
                    header=np.frombuffer(json.dumps(header).encode(), np.uint8),
                    counts=counts.reshape(-1, 2 * BINS),
                )
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
            if header["mpqc_calibration"] != _FORMAT or counts.shape[1:] != (2 * BINS,):
                raise ValueError("written by another version of mpqc")
            histograms = {
                row.pop("name"): Histogram(counts=count, **row)
                for row, count in zip(header["tensors"], counts, strict=True)
            }
            return cls(histograms, int(header["samples"]))
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(
                f"cannot read the calibration {path}: {error}; delete it and calibrate again"
            ) from error


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
    done = 0
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
        done += data.batch
        if data.samples is not None:
            done = min(done, data.samples)
        if progress is not None:
            progress(done, data.samples)
    if done == 0:
        raise DataError("no calibration samples; give at least one")
    return Calibration(histograms, done)
