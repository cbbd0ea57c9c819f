"""Training samples: read once, dealt in batches in an order that seed and epoch fix."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpqc.data import Data
from mpqc.errors import DataError, OutputError
from mpqc.graph import Array, Graph

MEMORY = 2**32  # bytes of samples beyond which they are kept in a file


@dataclass(frozen=True)
class Batch:
    """Some samples.

    Attributes:
        feeds: input name -> tensor [n, ...].
        labels: int64 [n] or None.
        numbers: int64 [n], of the samples in their set.
    """

    feeds: dict[str, Tensor]
    labels: Tensor | None
    numbers: Array

    def to(self, device: torch.device) -> "Batch":
        """On another device."""
        feeds = {name: tensor.to(device) for name, tensor in self.feeds.items()}
        return replace(
            self, feeds=feeds, labels=None if self.labels is None else self.labels.to(device)
        )


@dataclass(frozen=True)
class Augment:
    """Random changes of pictures, NCHW.

    Attributes:
        flip: mirror half of them.
        crop: move by up to so many pixels, borders reflected.
    """

    flip: bool = False
    crop: int = 0

    def __bool__(self) -> bool:
        return self.flip or self.crop > 0

    def __call__(self, pictures: Array, rng: np.random.Generator) -> Array:
        """Change each picture by itself, float32 [n, c, h, w]."""
        if pictures.ndim != 4 or not self:
            return pictures
        n, _, height, width = pictures.shape
        if self.crop:
            edge = (self.crop, self.crop)
            wide = np.pad(pictures, ((0, 0), (0, 0), edge, edge), "reflect")
            moves = rng.integers(0, 2 * self.crop + 1, (n, 2))
            pictures = np.stack(
                [wide[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(moves)]
            )
        if self.flip:
            mirrored = rng.random((n, 1, 1, 1)) < 0.5
            pictures = np.where(mirrored, pictures[..., ::-1], pictures)
        return pictures


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Samples as the model takes them.

    Attributes:
        arrays: input name -> array [n, ...]; mapped from a file where they are many.
        labels: int64 [n] or None.
        chosen: numbers of the samples that belong to this set.
    """

    arrays: Mapping[str, Array]
    labels: Array | None
    chosen: Array
    _keep: Any = field(default=None, repr=False)  # the folder of the mapped files

    @classmethod
    def read(cls, data: Data, graph: Graph, memory: int = MEMORY) -> "TrainingSet":
        """Read all samples.

        Args:
            data: opened for the graph.
            graph: its inputs share their first axis, the batch.
            memory: bytes; more samples are kept in a temporary file.

        Raises:
            DataError: no samples, or inputs without a common batch axis.
            OutputError: the temporary file does not fit.
        """
        leading = {kind.shape[0] if kind.shape else 0 for kind in graph.inputs.values()}
        if len(leading) != 1 or 0 in leading:
            raise DataError("training wants inputs that share their first axis, the batch")
        feeds = data.batch if data.samples is None else leading.pop()
        count = data.samples
        if count is None:
            count = sum(1 for _ in data.feeds()) * feeds
        shapes = {name: (count, *kind.shape[1:]) for name, kind in graph.inputs.items()}
        size = sum(
            int(np.prod(shape, dtype=np.int64)) * np.dtype(graph.inputs[name].dtype).itemsize
            for name, shape in shapes.items()
        )
        keep = None
        arrays: dict[str, Array] = {}
        try:
            if size > memory:
                keep = tempfile.TemporaryDirectory(prefix="mpqc-train-")
            for index, (name, shape) in enumerate(shapes.items()):
                dtype = np.dtype(graph.inputs[name].dtype)
                if keep is None:
                    arrays[name] = np.empty(shape, dtype)
                else:
                    file = Path(keep.name, f"{index}.npy")
                    arrays[name] = np.lib.format.open_memmap(file, "w+", dtype, shape)
            done = 0
            for feed in data.feeds():
                for name, array in feed.items():
                    rows = min(len(array), count - done)
                    arrays[name][done : done + rows] = array[:rows]
                done = min(done + len(array), count)
        except OSError as error:
            raise OutputError(
                f"{count} training samples do not fit on the disk: {error}"
            ) from error
        if done == 0:
            raise DataError("no training samples; give at least one batch")
        labels = None if data.labels is None else data.labels.astype(np.int64)
        return cls(arrays, labels, np.arange(done), keep)

    def __len__(self) -> int:
        return len(self.chosen)

    def check_labels(self, classes: int) -> None:
        """Refuse labels that no class has.

        Raises:
            DataError: names the first.
        """
        if self.labels is None:
            return
        if self.labels.ndim != 1:
            raise DataError(f"labels have shape {list(self.labels.shape)}, expected one a sample")
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= classes))
        if len(wrong):
            raise DataError(
                f"label {self.labels[wrong[0]]} of sample {wrong[0]} is out of range: the model "
                f"has {classes} classes, 0 to {classes - 1} ({len(wrong)} labels are wrong)"
            )

    def check_batch(self, size: int) -> None:
        """Refuse a set that does not fill one batch.

        Raises:
            DataError: says how many there are.
        """
        if len(self) < size:
            raise DataError(
                f"{len(self)} training samples do not fill a batch of {size}: "
                f"give more data, or --batch-size {max(1, len(self))}"
            )

    def split(self, share: float, most: int, seed: int) -> tuple["TrainingSet", "TrainingSet"]:
        """Training and validation part: at most ``most`` samples are held out."""
        held = min(most, int(len(self) * share))
        order = np.random.default_rng([seed, 1]).permutation(len(self))
        rest, out = np.sort(order[held:]), np.sort(order[:held])
        return replace(self, chosen=self.chosen[rest]), replace(self, chosen=self.chosen[out])

    def halves(self, share: float, seed: int) -> tuple["TrainingSet", "TrainingSet"]:
        """Two disjoint parts, the first with the given share: weights and strengths."""
        order = np.random.default_rng([seed, 2]).permutation(len(self))
        first = round(len(self) * share)
        parts = np.sort(order[:first]), np.sort(order[first:])
        return replace(self, chosen=self.chosen[parts[0]]), replace(
            self, chosen=self.chosen[parts[1]]
        )

    def take(self, numbers: Array) -> Batch:
        """Samples by their numbers in the whole set."""
        feeds = {
            name: torch.from_numpy(np.ascontiguousarray(array[numbers]))
            for name, array in self.arrays.items()
        }
        labels = None if self.labels is None else torch.from_numpy(self.labels[numbers])
        return Batch(feeds, labels, numbers)

    def epoch(
        self, size: int, epoch: int, seed: int, augment: Augment = Augment(), start: int = 0
    ) -> Iterator[Batch]:
        """Full batches in a random order, the rest left out.

        Args:
            size: samples of a batch.
            epoch: its number.
            seed: with the epoch it fixes order and augmentation.
            augment: of pictures.
            start: batches that are left out, because they were seen before an interruption.
        """
        order = np.random.default_rng([seed, 3, epoch]).permutation(len(self))
        for number in range(start, len(self) // size):
            batch = self.take(self.chosen[order[number * size : (number + 1) * size]])
            if augment:
                rng = np.random.default_rng([seed, 4, epoch, number])
                feeds = {
                    name: torch.from_numpy(np.ascontiguousarray(augment(tensor.numpy(), rng)))
                    for name, tensor in batch.feeds.items()
                }
                batch = replace(batch, feeds=feeds)
            yield batch

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in their order; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self.take(self.chosen[start : start + size])


@dataclass(frozen=True, eq=False)
class SetData(Data):
    """Samples of a set as calibration data; it pickles.

    Attributes:
        source: the samples.
        batch: of a feed.
    """

    source: TrainingSet
    batch: int

    @property
    def samples(self) -> int:  # type: ignore[override]
        return len(self.source)

    @property
    def labels(self) -> Array | None:  # type: ignore[override]
        return None if self.source.labels is None else self.source.labels[self.source.chosen]

    def sample(self, max_samples: int | None, seed: int = 0) -> "SetData":
        if max_samples is not None and max_samples < 1:
            raise DataError(f"at least one sample is needed, got max_samples={max_samples}")
        if max_samples is None or max_samples >= self.samples:
            return self
        picks = np.sort(np.random.default_rng(seed).permutation(self.samples)[:max_samples])
        return replace(self, source=replace(self.source, chosen=self.source.chosen[picks]))

    def feeds(self) -> Iterator[dict[str, Array]]:
        chosen = self.source.chosen
        for start in range(0, len(chosen), self.batch):
            rows = chosen[start : start + self.batch]
            rows = np.concatenate([rows, np.repeat(rows[-1:], self.batch - len(rows))])
            yield {name: np.ascontiguousarray(a[rows]) for name, a in self.source.arrays.items()}
