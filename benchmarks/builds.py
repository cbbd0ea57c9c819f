"""Compiled models for benchmarks, kept from run to run while nothing that matters has changed.

Weights are rounded to nearest: that takes seconds instead of minutes, and latency does not depend
on how well they are chosen.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mpqc
from mpqc import pipeline
from mpqc.artifact import Artifact
from mpqc.data import open_data
from mpqc.graph import Array, Precision
from mpqc.rounding import Accuracy
from mpqc.runtime import CompiledModel
from mpqc.target import find_target

Feeds = Sequence[Mapping[str, Array]]


@dataclass(frozen=True)
class Recipe:
    """How models are compiled.

    Attributes:
        target: name of the machine.
        kernel: "auto", or the kind to force.
        latencies: table by which kernels are chosen; None: the model of the instructions.
        ends: width of the first layers and the classifier; None: as the body.
    """

    target: str = "native"
    kernel: str = "auto"
    latencies: Path | None = None
    ends: Precision | None = Precision(8, 8)  # noqa: RUF009 - frozen

    def artifact(self, model: Path, bits: Precision, feeds: Feeds, folder: Path) -> Path:
        """Folder of the compiled model, from an earlier run if it is the same.

        Args:
            model: ONNX file.
            bits: of the body.
            feeds: calibration data; the first is used.
            folder: that keeps artifacts.
        """
        table = self.latencies.read_bytes() if self.latencies else b""
        facts = [
            str(bits), str(self.ends), self.target, self.kernel, sources(), pipeline.versions(),
            hashlib.sha256(model.read_bytes()).hexdigest(), hashlib.sha256(table).hexdigest(),
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        kept = folder / f"{model.stem}-{bits}-{key}"
        if not kept.is_dir():
            options = pipeline.Options(
                find_target(self.target),
                kernel=self.kernel,
                latencies=self.latencies,
                accuracy=Accuracy(rounding="nearest", clipping="mse"),
            )
            data = open_data(dict(feeds[0]), pipeline.import_model(model))
            folder.mkdir(parents=True, exist_ok=True)
            pipeline.compile_model(model, kept, options, bits=bits, ends=self.ends, data=data)
        return kept

    def load(
        self, model: Path, bits: Precision, feeds: Feeds, folder: Path, threads: int = 1
    ) -> CompiledModel:
        """The compiled model, ready to run."""
        artifact = Artifact(self.artifact(model, bits, feeds, folder))
        return CompiledModel(artifact.library, threads)


@cache
def sources() -> str:
    """Hash of the compiler's own sources."""
    root = Path(mpqc.__file__).parent
    digest = hashlib.sha256()
    for part in (root, root / "passes", root / "schedules", root / "csrc"):
        for path in sorted(part.iterdir()):
            if path.suffix in (".py", ".c", ".h"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
