"""What was measured stays measured: files keyed by all that the numbers depend on."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from mpqc.calibration import Calibration, calibrate
from mpqc.data import Data
from mpqc.errors import DataError, OutputError
from mpqc.graph import Array, Graph
from mpqc.search.problem import Problem

HELD_BYTES = 256 << 20
FORMAT = 1  # counts up when measurements change their meaning


def default_cache() -> Path:
    """``$MPQC_CACHE``, or ``mpqc`` in the user's cache folder."""
    if chosen := os.environ.get("MPQC_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpqc"


class _Held(Data):
    """Feeds that are kept in memory: measurements stream them once a layer."""

    def __init__(self, source: Data, feeds: list[dict[str, Array]]) -> None:
        self._source, self._feeds = source, feeds
        self.batch, self.labels = source.batch, source.labels
        self.samples = source.samples

    def feeds(self) -> Iterator[dict[str, Array]]:
        return iter(self._feeds)

    def sample(self, max_samples: int | None, seed: int = 0) -> Data:
        return self._source.sample(max_samples, seed)

    def rest(self, max_samples: int, seed: int = 0) -> Data | None:
        return self._source.rest(max_samples, seed)


def held(data: Data) -> Data:
    """The data, in memory where they are small: decoding pictures again costs more."""
    feeds, size = [], 0
    for feed in data.feeds():
        size += sum(array.nbytes for array in feed.values())
        if size > HELD_BYTES:
            return data
        feeds.append(feed)
    return _Held(data, feeds)


class Ledger(MutableMapping[str, float]):
    """Numbers by name, each on disk as soon as it is known: one JSON array a line.

    A process may die at any time: a last line without its end is dropped.

    Args:
        path: file to continue or to begin; None keeps all in memory.

    Raises:
        DataError: the file holds something else.
        OutputError: it cannot be read or written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._values: dict[str, float] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            raw = path.read_bytes() if path.exists() else b""
            whole = raw[: raw.rfind(b"\n") + 1]
            for number, line in enumerate(whole.splitlines(), 1):
                self._read(path, number, line)
            if whole != raw:
                path.write_bytes(whole)
        except OSError as error:
            raise OutputError(f"cannot use the cache {path}: {error}") from error

    def _read(self, path: Path, number: int, line: bytes) -> None:
        try:
            name, value = json.loads(line)
            if not isinstance(name, str) or not isinstance(value, int | float):
                raise ValueError("not a name and a number")
            if math.isnan(value):
                raise ValueError("not a number")
        except (ValueError, TypeError) as error:
            raise DataError(
                f"the cache {path} is damaged in line {number}: {error}; delete the file "
                "and search again"
            ) from error
        self._values[name] = float(value)

    def __setitem__(self, name: str, value: float) -> None:
        self.update({name: value})

    def update(self, *given: Any, **more: float) -> None:
        """Add values that belong together: all of them are written, or none that counts."""
        values = {name: float(value) for name, value in dict(*given, **more).items()}
        if self._path is not None:
            lines = "".join(json.dumps([name, value]) + "\n" for name, value in values.items())
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(lines)
            except OSError as error:
                raise OutputError(f"cannot write the cache {self._path}: {error}") from error
        self._values |= values

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __delitem__(self, name: str) -> None:
        raise TypeError("a ledger only grows")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def ledger(problem: Problem, data: Data | None, kind: str, *options: object) -> Ledger:
    """The ledger of one kind of measurement for this model, these data and these options."""
    if problem.cache is None:
        return Ledger(None)
    return Ledger(problem.cache / f"{kind}-{_key(problem, data, options)}.jsonl")


def calibrated(problem: Problem, graph: Graph, data: Data) -> Calibration:
    """Histograms of what all layers read, from the cache where they are there."""
    tensors = [layer.input for layer in problem.layers]
    if problem.cache is None:
        return calibrate(graph, data, tensors, progress=_told(problem))
    path = problem.cache / f"calibration-{_key(problem, data, tuple(tensors))}.npz"
    if path.exists():
        return Calibration.load(path)
    made = calibrate(graph, data, tensors, progress=_told(problem))
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(f".{os.getpid()}")
    made.save(half)
    half.replace(path)
    return made


def _told(problem: Problem) -> Any:
    return lambda done, total: problem.progress("calibration", done, total or done)


def _key(problem: Problem, data: Data | None, options: tuple[object, ...]) -> str:
    graph = problem.need_graph()
    parts = [FORMAT, problem.model_sha256, graph_digest(graph), options]
    parts.append(None if data is None else data_digest(data))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def graph_digest(graph: Graph) -> str:
    """Hash of operators, shapes and weights: models that are not files have one too."""
    digest = hashlib.sha256(str(graph).encode())
    for name, array in graph.constants.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def data_digest(data: Data) -> str:
    """Hash of all feeds and labels, in order."""
    digest = hashlib.sha256(repr((data.batch, data.samples)).encode())
    for feeds in data.feeds():
        for name, array in feeds.items():
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            digest.update(array.tobytes())
    if data.labels is not None:
        digest.update(np.ascontiguousarray(data.labels).tobytes())
    return digest.hexdigest()
