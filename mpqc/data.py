"""Input data as a stream of feeds that fit the model: the contract behind ``--data``.

Accepted are

- an ``.npz`` (or a mapping) of arrays named as the model's inputs; a one-input model takes the
  only array that is no label, whatever its name. ``labels`` or ``y`` of integers are the labels,
  text arrays are ignored. The first axis counts samples;
- uint8 pictures in such an ``.npz``, with a ``mpqc.preprocess.Preprocess``;
- an archive of pictures: ``jpg`` uint8, the streams one after the other, and ``off``, where
  picture i is ``jpg[off[i]:off[i + 1]]``, with a Preprocess too;
- ``module.py:function``, a function without arguments that returns an iterable of feeds or a
  ``onnxruntime.quantization.CalibrationDataReader``. It is called again for each pass.
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpqc.errors import DataError
from mpqc.graph import Array, Graph, TensorType
from mpqc.npz import Rows, open_npz
from mpqc.preprocess import Preprocess, decode_jpeg

_LABELS = ("labels", "y")


class Data(ABC):
    """Feeds of a model, as many times as asked for, one batch in memory at a time.

    Attributes:
        batch: samples in a feed.
        samples: in all, or None when only the stream knows.
        labels: integers [samples], or None.
    """

    batch: int
    samples: int | None
    labels: Array | None

    @abstractmethod
    def feeds(self) -> Iterator[dict[str, Array]]:
        """Input name -> array, checked. The last feed repeats its last sample to be full."""

    @abstractmethod
    def sample(self, max_samples: int | None, seed: int = 0) -> "Data":
        """At most so many samples: a random choice in file order where the length is known."""

    def rest(self, max_samples: int, seed: int = 0) -> "Data | None":
        """What ``sample`` leaves out; None where that is nothing, or a stream's end."""
        return None

    def __len__(self) -> int:
        if self.samples is None:
            raise DataError("these data are a stream of unknown length")
        return self.samples

    def __bool__(self) -> bool:
        return True


def open_data(
    source: str | Path | Mapping[str, Array],
    graph: Graph,
    preprocess: Preprocess | str | Path | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> Data:
    """Open data for a model and check what can be checked without reading all of them.

    Args:
        source: of one of the kinds above.
        graph: its inputs say names, dtypes, shapes and the batch.
        preprocess: for uint8 pictures; a path is read as TOML.
        max_samples: see ``Data.sample``.
        seed: of that choice.

    Raises:
        DataError: names the array, what was expected, what is there, and the cure.
    """
    if isinstance(preprocess, str | Path):
        preprocess = Preprocess.load(preprocess)
    if isinstance(source, Mapping):
        data: Data = _stored(dict(source), graph, preprocess, "the data")
    elif (location := _function(str(source))) is not None:
        if preprocess is not None:
            raise DataError(f"{source} makes its own feeds; leave the preprocessing out")
        data = _Stream(*location, dict(graph.inputs), _batch(graph))
    else:
        data = _stored(open_npz(Path(source)), graph, preprocess, str(source))
    return data.sample(max_samples, seed)


def _function(source: str) -> tuple[Path, str] | None:
    file, colon, function = source.rpartition(":")
    return (Path(file), function) if colon and file.endswith(".py") else None


def _batch(graph: Graph) -> int:
    """Length of the first axis of the inputs where they agree, else 1."""
    leading = {kind.shape[0] if kind.shape else 1 for kind in graph.inputs.values()}
    return leading.pop() if len(leading) == 1 else 1


# Arrays --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """Samples of one input: ``read(i, j)`` gives samples i..j-1 as the model takes them."""

    name: str
    samples: int
    read: Callable[[int, int], Array]


@dataclass(frozen=True)
class _Stored(Data):
    columns: tuple[_Column, ...]
    inputs: Mapping[str, TensorType]
    batch: int
    labels: Array | None
    chosen: Array | None = None  # sorted sample numbers; None: all

    @property
    def samples(self) -> int:  # type: ignore[override]
        return self.columns[0].samples if self.chosen is None else len(self.chosen)

    def sample(self, max_samples: int | None, seed: int = 0) -> "Data":
        if max_samples is not None and max_samples < 1:
            raise DataError(f"at least one sample is needed, got max_samples={max_samples}")
        if max_samples is None or max_samples >= self.samples:
            return self
        return self._pick(np.random.default_rng(seed).permutation(self.samples)[:max_samples])

    def rest(self, max_samples: int, seed: int = 0) -> "Data | None":
        picks = np.random.default_rng(seed).permutation(self.samples)[max_samples:]
        return self._pick(picks) if picks.size else None

    def _pick(self, picks: Array) -> "Data":
        picks = np.sort(picks)
        chosen = picks if self.chosen is None else self.chosen[picks]
        labels = None if self.labels is None else self.labels[picks]
        return replace(self, chosen=chosen, labels=labels)

    def feeds(self) -> Iterator[dict[str, Array]]:
        numbers = np.arange(self.samples) if self.chosen is None else self.chosen
        for start in range(0, len(numbers), self.batch):
            rows = numbers[start : start + self.batch]
            yield {column.name: self._feed(column, rows) for column in self.columns}

    def _feed(self, column: _Column, rows: Array) -> Array:
        kind = self.inputs[column.name]
        if rows[-1] - rows[0] == len(rows) - 1:
            array = column.read(int(rows[0]), int(rows[-1]) + 1)
        else:
            array = np.concatenate([column.read(int(row), int(row) + 1) for row in rows])
        _check_finite(column.name, array, int(rows[0]))
        if len(rows) < self.batch:
            array = np.concatenate([array, np.repeat(array[-1:], self.batch - len(rows), 0)])
        return np.ascontiguousarray(array, kind.dtype).reshape(kind.shape)


def _stored(
    arrays: dict[str, Rows], graph: Graph, preprocess: Preprocess | None, source: str
) -> Data:
    inputs = dict(graph.inputs)
    named, labels = _assign(arrays, inputs, source)
    # Rows are samples where the inputs share a batch axis, and whole feeds where they fit as such.
    per_sample = (
        all(kind.shape for kind in inputs.values())
        and len({kind.shape[0] for kind in inputs.values()}) == 1
        and any(_row_shape(named[name]) != kind.shape for name, kind in inputs.items())
    )
    batch = _batch(graph) if per_sample else 1
    columns = tuple(
        _column(name, named[name], kind, kind.shape[1:] if per_sample else kind.shape, preprocess)
        for name, kind in inputs.items()
    )
    counts = {column.name: column.samples for column in columns}
    if len(set(counts.values())) != 1:
        raise DataError(f"{source}: the inputs have different numbers of samples: {counts}")
    total = columns[0].samples
    if total == 0:
        raise DataError(f"{source}: array {columns[0].name!r} is empty; give at least one sample")
    if labels is not None and labels.shape[0] != total:
        raise DataError(
            f"{source}: {labels.shape[0]} labels for {total} samples; give one label a sample"
        )
    return _Stored(columns, inputs, batch, labels)


def _row_shape(rows: Any) -> tuple[int, ...] | None:
    return None if isinstance(rows, tuple) else tuple(rows.shape[1:])


def _assign(
    arrays: dict[str, Rows], inputs: Mapping[str, TensorType], source: str
) -> tuple[dict[str, Any], Array | None]:
    """Which array feeds which input, and the labels."""
    numbers = {name: rows for name, rows in arrays.items() if rows.dtype.kind in "biuf"}
    labels = None
    for name in _LABELS:
        rows = numbers.get(name)
        if rows is not None and name not in inputs and rows.dtype.kind in "iu" and rows.shape:
            labels = np.asarray(rows[: rows.shape[0]]) if labels is None else labels
            del numbers[name]
    if "jpg" in numbers and "off" in numbers and len(inputs) == 1 and "jpg" not in inputs:
        return {next(iter(inputs)): (numbers["jpg"], numbers["off"])}, labels
    if inputs.keys() <= numbers.keys():
        return {name: numbers[name] for name in inputs}, labels
    if len(inputs) == 1 and len(numbers) == 1:
        return {next(iter(inputs)): next(iter(numbers.values()))}, labels
    missing = ", ".join(sorted(inputs.keys() - numbers.keys()))
    raise DataError(
        f"{source}: no array for the model's input {missing}; it holds "
        f"{', '.join(sorted(arrays)) or 'nothing'}. Name the arrays as the inputs: "
        f"{', '.join(f'{name} {kind}' for name, kind in inputs.items())}"
    )


def _column(
    name: str,
    rows: Any,
    kind: TensorType,
    sample: tuple[int, ...],
    preprocess: Preprocess | None,
) -> _Column:
    if isinstance(rows, tuple):
        return _pictures(name, _unpacked(name, *rows), kind, sample, preprocess)
    if not rows.shape:
        raise DataError(f"array {name!r} is a single number; expected [samples, {_show(sample)}]")
    if rows.dtype == np.uint8 and kind.dtype == "float32":
        read = _Column(name, rows.shape[0], lambda start, stop: rows[start:stop])
        return _pictures(name, read, kind, sample, preprocess)
    if preprocess is not None:
        raise DataError(
            f"array {name!r} is {rows.dtype}; preprocessing is for uint8 pictures: "
            "leave it out, or store the pictures as uint8"
        )
    if rows.dtype != kind.dtype and not np.can_cast(rows.dtype, kind.dtype, "safe"):
        raise DataError(
            f"array {name!r} is {rows.dtype}, the model takes {kind.dtype}; "
            f"store it as .astype(np.{kind.dtype})"
        )
    shape = rows.shape[1:]
    if shape != sample and shape != (1, *sample):
        raise DataError(
            f"array {name!r} has shape {list(rows.shape)}, expected [samples, {_show(sample)}]; "
            "transpose or resize it, or bind another input shape"
        )
    return _Column(
        name, rows.shape[0], lambda start, stop: rows[start:stop].reshape(stop - start, *sample)
    )


def _unpacked(name: str, jpg: Rows, off: Rows) -> _Column:
    offsets = np.asarray(off[: off.shape[0]])
    ends_well = offsets.ndim == 1 and offsets.size and offsets[0] >= 0
    if not ends_well or (np.diff(offsets) < 0).any() or offsets[-1] > jpg.shape[0]:
        raise DataError("array 'off' does not rise within 'jpg': the archive is damaged")

    def read(start: int, stop: int) -> Array:
        streams = [jpg[int(offsets[i]) : int(offsets[i + 1])] for i in range(start, stop)]
        pictures = [decode_jpeg(stream.tobytes()) for stream in streams]
        if len({picture.shape for picture in pictures}) > 1:
            raise DataError("the pictures of one batch differ in size; use a batch of 1")
        return np.stack(pictures)

    return _Column(name, offsets.size - 1, read)


def _pictures(
    name: str,
    stored: _Column,
    kind: TensorType,
    sample: tuple[int, ...],
    preprocess: Preprocess | None,
) -> _Column:
    if preprocess is None:
        raise DataError(
            f"array {name!r} holds uint8 pictures, the model takes {kind}; say how they become "
            "numbers with --preprocess FILE.toml (scale, mean, std, layout)"
        )
    if stored.samples:
        got = preprocess(stored.read(0, 1)).shape[1:]
        if got != sample:
            raise DataError(
                f"array {name!r}: preprocessing gives pictures of {list(got)}, the model takes "
                f"{list(sample)}; set layout, resize or crop"
            )
    return replace(stored, read=lambda start, stop: preprocess(stored.read(start, stop)))


def _check_finite(name: str, array: Array, first: int) -> None:
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return
    axes = tuple(range(1, array.ndim))
    row = int(np.flatnonzero(~np.isfinite(array).all(axis=axes))[0])
    raise DataError(
        f"array {name!r} holds NaN or infinity in the feed that starts at sample {first} "
        f"(its sample {row}); remove or mend it"
    )


def _show(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


# Functions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stream(Data):
    file: Path
    function: str
    inputs: Mapping[str, TensorType]
    batch: int
    limit: int | None = None
    samples = None
    labels = None

    def sample(self, max_samples: int | None, seed: int = 0) -> "Data":
        if max_samples is not None and max_samples < 1:
            raise DataError(f"at least one sample is needed, got max_samples={max_samples}")
        limits = [limit for limit in (self.limit, max_samples) if limit is not None]
        return replace(self, limit=min(limits, default=None))

    def feeds(self) -> Iterator[dict[str, Array]]:
        count = 0
        for feed in _iterate(_call(self.file, self.function)):
            if self.limit is not None and count * self.batch >= self.limit:
                return
            yield self._checked(feed, count)
            count += 1
        if count == 0:
            raise DataError(f"{self.file}:{self.function} returned no feeds")

    def _checked(self, feed: Any, number: int) -> dict[str, Array]:
        where = f"{self.file}:{self.function}, feed {number}"
        if not isinstance(feed, Mapping) or feed.keys() != self.inputs.keys():
            got = ", ".join(map(str, feed)) if isinstance(feed, Mapping) else type(feed).__name__
            raise DataError(
                f"{where}: expected a dict of {', '.join(self.inputs)}, got {got or 'nothing'}"
            )
        arrays = {name: np.asarray(feed[name]) for name in self.inputs}
        for name, array in arrays.items():
            expected = self.inputs[name]
            if TensorType.of(array) != expected:
                raise DataError(
                    f"{where}: array {name!r} is {TensorType.of(array)}, the model takes {expected}"
                )
            _check_finite(name, array, number * self.batch)
        return arrays


def _call(file: Path, function: str) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise DataError(f"cannot find {file}; --data wants module.py:function")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = getattr(module, function)
        return made()
    except Exception as error:  # the user's code may raise anything
        raise DataError(f"{file}:{function} failed: {type(error).__name__}: {error}") from error


def _iterate(source: Any) -> Iterable[Any]:
    if hasattr(source, "get_next"):  # CalibrationDataReader: None ends it
        return iter(source.get_next, None)
    if isinstance(source, Iterable) and not isinstance(source, Mapping):
        return source
    raise DataError(
        f"the data function returned {type(source).__name__}; "
        "return an iterable of dicts or a CalibrationDataReader"
    )
