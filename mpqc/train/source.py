"""A model with its training data: one graph to train, a smaller one to calibrate on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mpqc import importer
from mpqc.data import Data, open_data
from mpqc.errors import ModelError
from mpqc.graph import Array, Graph
from mpqc.train.batches import TrainingSet
from mpqc.train.module import GraphModule, check_batching, load_graph
from mpqc.train.objective import Objective
from mpqc.train.quantized_layer import folded

CALIBRATION_BATCH = 8  # calibration holds the values of all layers at once
CALIBRATION_SAMPLES = 256
HELD_OUT, MOST_HELD_OUT = 0.1, 1000

Samples: TypeAlias = str | Path | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Source:
    """What training starts from.

    Attributes:
        graph: for training, BatchNormalization kept.
        flat: the float graph that the compiler quantizes, at the batch of
        data: samples to calibrate on: those that are trained on.
        sha256: of the model file.
    """

    graph: Graph
    flat: Graph
    data: Data
    sha256: str

    @classmethod
    def open(
        cls,
        model: str | Path,
        train: Samples,
        batch: int,
        preprocess: str | Path | None = None,
        dims: Mapping[str, int] | None = None,
        max_samples: int | None = None,
        seed: int = 0,
    ) -> "Source":
        """Read a model and open its data.

        Args:
            model: float ONNX file.
            train: training data, as ``mpqc.data`` reads them; functions give feeds of one sample.
            batch: of training.
            preprocess: of pictures.
            dims: of symbolic dimensions.
            max_samples: of the data, drawn by
            seed: a random number.
        """
        flat = folded(load_graph(model, dims))
        data = open_data(train, flat, preprocess, max_samples, seed)
        if data.samples is not None:
            flat = folded(load_graph(model, dims, min(CALIBRATION_BATCH, batch)))
            data = open_data(train, flat, preprocess, max_samples, seed)
        return cls(_graph(model, dims, batch, data), flat, data, importer.sha256(model))

    def samples(
        self,
        validate: Samples | None,
        preprocess: str | Path | None,
        objective: Objective | None,
        batch: int,
        seed: int,
    ) -> tuple[TrainingSet, TrainingSet]:
        """Training samples and held-out ones, checked.

        Args:
            validate: data to hold out; None: a tenth of the training data, at most 1000.
            preprocess: of pictures.
            objective: says how many classes labels may name; None: not checked.
            batch: that they have to fill.
            seed: of the choice.

        Raises:
            DataError: labels out of range, or fewer samples than a batch.
        """
        training = TrainingSet.read(self.data, self.flat)
        if validate is None:
            training, held = training.split(HELD_OUT, MOST_HELD_OUT, seed)
        else:
            held = TrainingSet.read(open_data(validate, self.flat, preprocess), self.flat)
        if objective is not None and objective.head is not None:
            for part in (training, held):
                part.check_labels(objective.classes[objective.head])
        training.check_batch(batch)
        return training, held


def _graph(model: str | Path, dims: Mapping[str, int] | None, batch: int, data: Data) -> Graph:
    """The graph of one sample, which takes any batch; or that of the batch, where it has to be.

    Some networks carry the batch in the middle of their shapes; only shapes made for the batch
    are right for them.
    """
    one = load_graph(model, dims)
    two = _two_samples(data)
    if batch == 1 or two is None:
        return one
    try:
        check_batching(GraphModule(one), two)
    except ModelError:
        whole = load_graph(model, dims, batch)
        if next(iter(whole.inputs.values())).shape[:1] != (batch,):
            raise
        return whole
    return one


def _two_samples(data: Data) -> dict[str, Array] | None:
    rows: list[dict[str, Array]] = []
    for feed in data.feeds():
        rows.append(feed)
        if sum(len(next(iter(row.values()))) for row in rows) >= 2:
            names = rows[0].keys()
            return {name: np.concatenate([row[name] for row in rows])[:2] for name in names}
    return None
