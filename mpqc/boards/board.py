"""A board: compiled models run and are measured there."""

import statistics
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from mpqc.artifact import Artifact
from mpqc.boards.connection import Connection
from mpqc.boards.programs import compile_measure
from mpqc.errors import ArtifactError, DataError, UsageError
from mpqc.profile_layers import LEAST_SECONDS, Times
from mpqc.runtime import FetchedSteps
from mpqc.target import Target, find_target
from mpqc.tensor_type import Array, TensorType

PROGRAM = "measure"


@dataclass(frozen=True)
class Samples:
    """Times of one library, run by run [s].

    Attributes:
        whole: of each run.
        steps: of each step, in each run.
    """

    whole: tuple[float, ...]
    steps: tuple[tuple[float, ...], ...]


class Board:
    """Another machine that we can send files to and run commands on; use it as a context.

    Args:
        connection: to it; closed with the board.
        target: machine that the models were compiled for.
        threads: of every run.
        via: command on the board that runs the measuring program, as "taskset -c 3".

    Raises:
        EnvironmentLacks: no compiler for it here, or it is gone.
    """

    def __init__(
        self, connection: Connection, target: Target, threads: int = 1, via: str = ""
    ) -> None:
        self.threads = threads
        self.connection = connection
        self._program = f"{via} {connection.folder}/{PROGRAM}".strip()
        try:
            with tempfile.TemporaryDirectory(prefix="mpqc-") as folder:
                connection.upload({PROGRAM: compile_measure(target, Path(folder))})
        except BaseException:
            connection.close()
            raise
        self._sent = 0

    def send(self, library: Path) -> str:
        """Place of a library on the board."""
        name = f"model{self._sent}.so"
        self.connection.upload({name: library})
        self._sent += 1
        return f"{self.connection.folder}/{name}"

    def run(self, arguments: str, given: bytes = b"") -> bytes:
        """The measuring program."""
        return self.connection.run(f"{self._program} {arguments}", given)

    def samples(self, libraries: Sequence[Path], repeat: int, seconds: float) -> list[Samples]:
        """Run libraries in turn, at least so often and, together, at least so long."""
        places = " ".join(map(self.send, libraries))
        call = f"time {self.threads} {repeat} {seconds:g} {places}"
        text = self.run(call).decode()
        self.connection.run(f"rm -f {places}")  # a profile sends many
        found: list[tuple[tuple[float, ...], list[tuple[float, ...]]]] = []
        for line in text.splitlines():
            kind, *numbers = line.split()
            times = tuple(int(number) * 1e-9 for number in numbers)
            if kind == "whole":
                found.append((times, []))
            else:
                found[-1][1].append(times)
        return [Samples(whole, tuple(steps)) for whole, steps in found]

    def measure(self, libraries: Sequence[Path], repeat: int) -> list[Times]:
        """As ``profile_layers.Runner`` asks."""

        def pair(times: Sequence[float]) -> tuple[float, float]:
            return min(times), statistics.median(times)

        return [
            Times(tuple(map(pair, sample.steps)), pair(sample.whole))
            for sample in self.samples(libraries, repeat, LEAST_SECONDS * len(libraries))
        ]

    def machine(self) -> str:
        """Model of the board's processor."""
        return str(self.facts()["processor"])

    def facts(self) -> dict[str, Any]:
        """About the board: what a latency means nothing without."""
        asked = "uname -srm; uname -m; cat /proc/loadavg; cat /proc/cpuinfo"
        text = self.connection.run(asked).decode("utf-8", "replace")
        system, machine, load, *lines = text.splitlines()
        facts: dict[str, Any] = {
            "processor": machine,
            "cores": sum(line.startswith("processor") for line in lines),
            "system": system,
            "host": self.connection.host,
            "load_average": float(load.split()[0]),
        }
        for line in lines:
            key, _, value = (part.strip() for part in line.partition(":"))
            if key in ("model name", "Model"):
                facts["processor"] = value
        return facts

    def load(self, artifact: Artifact) -> "RemoteModel":
        """A compiled model as ``verify`` uses it.

        Raises:
            UsageError: not a freestanding library.
        """
        check_freestanding(artifact)
        return RemoteModel(self, artifact)

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class RemoteModel:
    """A compiled model on a board, with the face of ``runtime.CompiledModel``."""

    def __init__(self, board: Board, artifact: Artifact) -> None:
        self._board = board
        self._place = board.send(artifact.library)
        self._manifest = artifact.manifest
        self.inputs = _types(self.manifest["inputs"])
        self.outputs = _types(self.manifest["outputs"])

    @property
    def manifest(self) -> dict[str, Any]:
        """What the library says of itself."""
        return self._manifest

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see ``CompiledModel.run``."""
        outputs, _ = self._run(feeds, ())
        return outputs

    def steps(self, feeds: Mapping[str, Array]) -> "FetchedSteps":
        """Run step by step, and fetch every value that the manifest lists."""
        taps = sorted(self.manifest["taps"].values(), key=lambda tap: tap["step"])
        reads = [(tap["step"], tap["offset"], _stored_bytes(tap)) for tap in taps]
        outputs, found = self._run(feeds, reads)
        values = {
            (step, offset): data for (step, offset, _), data in zip(reads, found, strict=True)
        }
        return FetchedSteps(len(self.manifest["steps"]), list(outputs.values()), values)

    def _run(
        self, feeds: Mapping[str, Array], reads: Sequence[tuple[int, int, int]]
    ) -> tuple[dict[str, Array], list[bytes]]:
        if feeds.keys() != self.inputs.keys():
            raise DataError(f"the model takes {sorted(self.inputs)}, got {sorted(feeds)}")
        header = struct.pack("<Q", len(reads)) + b"".join(struct.pack("<3Q", *r) for r in reads)
        arrays = []
        for name, kind in self.inputs.items():
            array = np.asarray(feeds[name])
            if TensorType.of(array) != kind:
                raise DataError(f"input {name!r} is {TensorType.of(array)}, the model takes {kind}")
            arrays.append(array.tobytes())
        data = self._board.run(
            f"run {self._place} {self._board.threads} 1", header + b"".join(arrays)
        )
        sizes = [kind.nbytes for kind in self.outputs.values()] + [size for *_, size in reads]
        if len(data) != sum(sizes):
            raise ArtifactError(f"the board answered {len(data)} bytes instead of {sum(sizes)}")
        pieces, start = [], 0
        for size in sizes:
            pieces.append(data[start : start + size])
            start += size
        outputs = {
            name: np.frombuffer(piece, kind.dtype).reshape(kind.shape)
            for (name, kind), piece in zip(self.outputs.items(), pieces, strict=False)
        }
        return outputs, pieces[len(outputs) :]


def _types(described: Mapping[str, Any]) -> dict[str, TensorType]:
    return {n: TensorType(kind["dtype"], tuple(kind["shape"])) for n, kind in described.items()}


def _stored_bytes(tap: Mapping[str, Any]) -> int:
    """Bytes of a value in the arena."""
    shape, perm = list(tap["shape"]), tap["perm"]
    stored: list[int] = list(shape)
    for axis, source in enumerate(perm):
        stored[source] = shape[axis]
    if tap["form"] == "planes":
        return int(tap["bits"] * prod(stored[:-1]) * -(-stored[-1] // 8))
    return prod(stored) * int(np.dtype(tap["dtype"]).itemsize)


def check_freestanding(artifact: Artifact) -> None:
    """Refuse what the measuring program cannot load.

    Raises:
        UsageError: it was compiled for TVM's runtime.
    """
    if artifact.manifest.get("runtime") == "tvm":
        raise UsageError(
            f"{artifact.folder} was compiled with --runtime tvm: boards run freestanding "
            "libraries; compile it without"
        )


def target_of(artifact: Artifact) -> Target:
    """Machine that an artifact was compiled for."""
    known = artifact.manifest["target"]
    name = str(known["name"])
    if name != "native":
        return find_target(name)
    return Target(name, known["arch"], known["llvm"], features=frozenset(known["features"]))
