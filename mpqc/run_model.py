"""Run an artifact over a file of samples: ``mpqc run``."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpqc.artifact import Artifact, new_file
from mpqc.data import Data, open_data
from mpqc.errors import UsageError
from mpqc.graph import Array, TensorType
from mpqc.runtime import Model, open_model
from mpqc.verify import input_graph


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        output: file with the outputs, named as in the model.
        samples: run.
        seconds: of the runs, without reading and writing.
        outputs: type of each array in the file.
    """

    output: Path
    samples: int
    seconds: float
    outputs: Mapping[str, TensorType]

    @property
    def message(self) -> str:
        """One line for people."""
        arrays = ", ".join(f"{name} {kind}" for name, kind in self.outputs.items())
        return f"{self.output}: {arrays}; {self.samples} samples in {self.seconds:.3f} s"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "output": str(self.output),
            "samples": self.samples,
            "seconds": self.seconds,
            "outputs": {
                name: {"dtype": kind.dtype, "shape": list(kind.shape)}
                for name, kind in self.outputs.items()
            },
        }


def run_file(
    artifact: Artifact,
    source: str,
    output: Path,
    *,
    preprocess: Path | None = None,
    threads: int = 1,
    overwrite: bool = False,
) -> RunResult:
    """Run every sample of ``source`` and write the outputs.

    Args:
        artifact: built for this machine.
        source: as ``open_data`` takes it; more samples than the model's batch are looped over.
        output: .npz to write.
        preprocess: for uint8 pictures.
        threads: of the model.
        overwrite: replace ``output``.

    Raises:
        DataError: names, shapes or dtypes are not the model's.
        OutputError: the file cannot be written.
    """
    if threads < 1:
        raise UsageError(f"at least one thread is needed, got {threads}")
    with new_file(output, overwrite) as work, open_model(artifact.library, threads) as model:
        data = open_data(source, input_graph(artifact), preprocess)
        start = time.perf_counter()
        results, samples = run_samples(model, data)
        seconds = time.perf_counter() - start
        with work.open("wb") as file:  # a name without .npz would get one
            np.savez(file, **results)  # type: ignore[arg-type]
    kinds = {name: TensorType.of(array) for name, array in results.items()}
    return RunResult(output, samples, seconds, kinds)


def run_samples(model: Model, data: Data) -> tuple[dict[str, Array], int]:
    """Outputs of all samples.

    Returns:
        Output name -> array; the samples lie along axis 0 where the model has them there, and
        along a new axis 0 otherwise. And the number of samples.
    """
    found: dict[str, list[Array]] = {name: [] for name in model.outputs}
    for feed in data.feeds():
        for name, array in model.run(feed).items():
            found[name].append(array)
    feeds = len(next(iter(found.values())))
    samples = feeds * data.batch if data.samples is None else data.samples
    batches = {kind.shape[0] for kind in model.inputs.values() if kind.shape}
    batch = batches.pop() if len(batches) == 1 else 0
    return {name: _joined(arrays, batch, data, samples) for name, arrays in found.items()}, samples


def _joined(arrays: Sequence[Array], batch: int, data: Data, samples: int) -> Array:
    if not arrays[0].shape or arrays[0].shape[0] != batch:
        return np.stack(arrays)
    whole = np.concatenate(arrays)
    # The last feed is filled up where samples are batched; a sample may also be a whole feed.
    return whole[:samples] if data.batch == batch else whole
