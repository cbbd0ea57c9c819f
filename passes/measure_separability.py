"""measure-separability: how well classes are told apart by what each layer reads."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from mpqc.data import Data
from mpqc.errors import DataError
from mpqc.graph import Array, Graph
from mpqc.passes.measure_perturbation import available_threads


@dataclass
class _Sums:
    """Of the features of one value: enough for the scatter within and between classes."""

    count: Array  # [classes]
    total: Array  # [classes, channels]
    square: float = 0.0

    def add(self, features: Array, labels: Array) -> None:
        np.add.at(self.count, labels, 1)
        np.add.at(self.total, labels, features)
        self.square += float((features**2).sum())

    def ratio(self) -> float:
        """Scatter between classes over scatter within."""
        seen = self.count > 0
        means = self.total[seen] / self.count[seen, None]
        overall = self.total.sum(0) / self.count.sum()
        within = self.square - float((self.count[seen, None] * means**2).sum())
        between = float((self.count[seen, None] * (means - overall) ** 2).sum())
        return between / (max(within, 0.0) + 1e-12 * max(self.square, 1e-12))


def measure_separability(
    graph: Graph,
    data: Data,
    values: Iterable[str],
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> dict[str, float]:
    """Trace ratio J = S_between / S_within of the spatial means of each value.

    Args:
        graph: float, at the batch size of the data.
        data: with labels; without, the classes that the model itself predicts.
        values: float32 values of the graph.
        progress: called with samples done and in all.

    Raises:
        DataError: no labels and no classifier, or fewer than two classes.
    """
    from mpqc import onnx_export, ort

    names = tuple(dict.fromkeys(values))
    taps = [name for name in names if name not in graph.inputs]
    predicts = data.labels is None
    if predicts:
        taps = list(dict.fromkeys([*taps, _logits(graph)]))
    session = (
        ort.Session(onnx_export.to_onnx(graph, taps), available_threads(), True) if taps else None
    )
    classes = _classes(graph, data)
    sums: dict[str, _Sums] = {}
    done, total = 0, data.samples or 0
    for feeds in data.feeds():
        found = {**feeds, **(session.run(feeds) if session else {})}
        rows = data.batch if data.samples is None else min(data.batch, data.samples - done)
        labels = (
            found[_logits(graph)].argmax(-1).reshape(-1)[:rows]
            if data.labels is None
            else np.asarray(data.labels[done : done + rows], np.int64).reshape(-1)
        )
        for name in names:
            features = _features(found[name])[:rows]
            made = sums.setdefault(
                name, _Sums(np.zeros(classes), np.zeros((classes, features.shape[1])))
            )
            made.add(features, labels)
        done += rows
        progress("separability", done, max(total, done))
    if not sums or np.count_nonzero(next(iter(sums.values())).count) < 2:
        raise DataError("separability needs samples of at least two classes; give more data")
    return {name: sums[name].ratio() for name in names}


def _features(array: Array) -> Array:
    """float64 [batch, channels]: means over the positions of a channels-first value."""
    wide = array.astype(np.float64)
    if wide.ndim > 2:
        return np.asarray(wide.mean(axis=tuple(range(2, wide.ndim))))
    return wide.reshape(array.shape[0], -1)


def _logits(graph: Graph) -> str:
    for name in graph.outputs:
        kind = graph.type(name)
        if kind.dtype == "float32" and len(kind.shape) == 2 and kind.shape[1] > 1:
            return name
    raise DataError(
        "separability needs labels: add an array 'labels' to the data "
        "(the model has no output [samples, classes] to take them from)"
    )


def _classes(graph: Graph, data: Data) -> int:
    if data.labels is not None:
        labels = np.asarray(data.labels)
        if labels.min(initial=0) < 0:
            raise DataError("labels are class numbers from 0")
        return int(labels.max(initial=0)) + 1
    return graph.shape(_logits(graph))[1]
