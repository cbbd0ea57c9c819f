"""Measure an artifact beside its opponents: interleaved, in one process, on one machine."""

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mpqc.artifact import Artifact
from mpqc.data import Data
from mpqc.errors import ArtifactError, EnvironmentLacks, ModelError, UsageError
from mpqc.graph import Array
from mpqc.latency import KINDS
from mpqc.runtime import CompiledModel, LocalModel, Steps, open_model
from mpqc.target import gpu

if TYPE_CHECKING:
    from mpqc.ort import Session


class Opponent(Protocol):
    """What runs a float model to compare with."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Feed every input, get all outputs by name."""
        ...

    def seconds(self, feeds: Mapping[str, Array], repeat: int) -> list[float]:
        """Wall time of single runs [s]."""
        ...


OPPONENTS: Mapping[str, str] = {
    "ort-fp32": "the model that was compiled in ONNX Runtime, optimised",
    "ort-int8": "the same after onnxruntime.quantization (QDQ, U8S8, per channel, MinMax)",
    "ort-cuda": "the model that was compiled in ONNX Runtime on the GPU, as a CUDA graph",
    "torch-fp16": "the same in PyTorch on the GPU, fp16, as a CUDA graph",
    "torch-int8": "the same with PyTorch's int8 in matrix products and 1x1 convolutions",
}
ON_GPU = frozenset({"ort-cuda", "torch-fp16", "torch-int8"})
WARM_UP = 3  # runs
TOGETHER = 20  # runs of a GPU's step between two looks at the clock
CALIBRATION_SAMPLES = 16  # of the opponent that calibrates


@dataclass(frozen=True)
class Timing:
    """Latency of one contestant.

    Attributes:
        name: "mpqc" or an opponent's name.
        best, median: seconds of one run.
        runs: measured.
    """

    name: str
    best: float
    median: float
    runs: int


@dataclass(frozen=True)
class LayerTiming:
    """Latency of one step of the compiled model.

    Attributes:
        layer: node of the model, or what the step moves.
        kernel: kind of kernel.
        best, median: seconds.
        macs: multiply-accumulates, of quantized layers; 0 for other steps.
    """

    layer: str
    kernel: str
    best: float
    median: float
    macs: int = 0

    @property
    def macs_per_second(self) -> float:
        return self.macs / self.best if self.best else 0.0


@dataclass(frozen=True)
class Benchmark:
    """Result of ``bench``.

    Attributes:
        timings: the artifact first, then its opponents.
        layers: one row a step; empty unless asked for.
        machine: where it ran, with what.
        threads: of every contestant.
        batch: samples of one run.
    """

    timings: tuple[Timing, ...]
    layers: tuple[LayerTiming, ...]
    machine: Mapping[str, Any]
    threads: int
    batch: int

    @property
    def speedups(self) -> dict[str, float]:
        """Opponent -> how many times longer its best run takes than the artifact's."""
        own, *others = self.timings
        return {other.name: other.best / own.best for other in others}

    @property
    def message(self) -> str:
        """One line for people."""
        own = self.timings[0]
        text = f"{own.best * 1e3:.3f} ms (median {own.median * 1e3:.3f})"
        for other in self.timings[1:]:
            ratio = other.best / own.best
            text += f"; {other.name} {other.best * 1e3:.3f} ms ({ratio:.2f}x)"
        return f"{text}; {self.threads} thread{'' if self.threads == 1 else 's'}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; times in seconds."""
        return {
            "timings": [asdict(timing) for timing in self.timings],
            "speedups": self.speedups,
            "threads": self.threads,
            "batch": self.batch,
            "layers": [
                {**asdict(layer), "macs_per_second": layer.macs_per_second} for layer in self.layers
            ],
            "machine": dict(self.machine),
        }


def bench(
    artifact: Artifact,
    *,
    threads: int = 1,
    repeat: int = 20,
    against: Sequence[str] = ("ort-fp32",),
    per_layer: bool = False,
    model: Path | None = None,
    data: Data | None = None,
    seed: int = 0,
) -> Benchmark:
    """Time single runs of the artifact and of its opponents, in turn (A, B, A, B, ...).

    Args:
        artifact: built for this machine.
        threads: of every contestant.
        repeat: measured runs of each, after a warm-up.
        against: names from ``OPPONENTS``.
        per_layer: time every kernel too, in further runs.
        model: the float model for the opponents; by default the one that was compiled.
        data: inputs of the runs and calibration of ``ort-int8``; by default random ones.
        seed: of random inputs.

    Raises:
        UsageError: an unknown opponent, or a count below one.
        ArtifactError: damaged, built for another machine, or the float model is gone.
        ModelError: ONNX Runtime refuses the float model.
        EnvironmentLacks: no GPU for the artifact or an opponent, or an opponent is not installed.
    """
    check_opponents(against)
    if threads < 1 or repeat < 1:
        raise UsageError(f"threads and repeat start at 1, got {threads} and {repeat}")
    if per_layer and artifact.manifest.get("runtime") == "tvm":
        raise UsageError("--per-layer times freestanding libraries: this one has TVM's runtime")
    with open_model(artifact.library, threads) as compiled:
        feeds = _feeds(artifact, compiled, data, seed)
        runs: dict[str, Callable[[int], list[float]]] = {
            "mpqc": lambda count: compiled.seconds(feeds[0], count)
        }
        original = _original(artifact, model) if against else None
        if original is not None and artifact.manifest["model"].get("quantized"):
            for name, session in _quantized(artifact, original, against, threads).items():
                session.run(feeds[0])
                runs[name] = lambda count, s=session: s.seconds(feeds[0], count)  # type: ignore[misc]
            against = ()
        for name in against:
            runs[name] = _opponent(name, original, feeds, threads, artifact)
        times = take_turns(runs, repeat)
        layers = _per_layer(compiled, feeds[0], repeat) if per_layer else ()
        batch = max((kind.shape[0] for kind in compiled.inputs.values() if kind.shape), default=1)
        versions = compiled.manifest["versions"]
        on_gpu = isinstance(compiled, CompiledModel) and compiled.on_gpu
    timings = tuple(
        Timing(name, min(found), statistics.median(found), len(found))
        for name, found in times.items()
    )
    facts = machine(versions)
    if on_gpu:
        facts["processor"] = f"{gpu().name} ({facts['processor']})"
    return Benchmark(timings, layers, facts, threads, batch)


def take_turns(
    runs: Mapping[str, Callable[[int], list[float]]], repeat: int
) -> dict[str, list[float]]:
    """Seconds of single runs after a warm-up; A, B, A, B, ..., so that disturbances meet all.

    Args:
        runs: name -> what runs so many times and returns the seconds of each.
        repeat: measured runs of each.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(WARM_UP)
    for _ in range(repeat):
        for name, run in runs.items():
            times[name] += run(1)
    return times


def _feeds(
    artifact: Artifact, compiled: LocalModel, data: Data | None, seed: int
) -> list[dict[str, Array]]:
    from mpqc.verify import random_feeds

    if data is None:
        reference = artifact.reference.read_bytes()
        return random_feeds(compiled.inputs, CALIBRATION_SAMPLES, reference, seed)
    return list(data.sample(CALIBRATION_SAMPLES * data.batch, seed).feeds())


def _original(artifact: Artifact, model: Path | None) -> Path:
    path = Path(artifact.report.get("model", "")) if model is None else model
    if not path.is_file():
        raise ArtifactError(f"the float model is not at {path}: say where it is with --model")
    return path


def _opponent(
    name: str,
    model: Path | None,
    feeds: Sequence[Mapping[str, Array]],
    threads: int,
    artifact: Artifact,
) -> Callable[[int], list[float]]:
    if model is None:
        raise ModelError(f"{name} needs the float model")
    report = artifact.report
    session = opponent(name, model, feeds, threads, report.get("dims"), int(report.get("batch", 1)))
    return lambda count: session.seconds(feeds[0], count)


def _quantized(
    artifact: Artifact, model: Path, against: Sequence[str], threads: int
) -> "dict[str, Opponent]":
    """What a model that was quantized already competes with: itself, its integers fused by ORT."""
    found: dict[str, Opponent] = {}
    if pytorch := [name for name in against if name.startswith("torch-")]:
        raise UsageError(f"{model.name} is quantized already, {pytorch[0]} takes float models")
    if "ort-cuda" in against:
        from mpqc.ort_cuda import CudaSession

        found["ort-cuda"] = CudaSession(model)
    if set(against) - ON_GPU:
        name, session = _quantized_on_cpu(artifact, model, against, threads)
        found[name] = session
    return found


def _quantized_on_cpu(
    artifact: Artifact, model: Path, against: Sequence[str], threads: int
) -> tuple[str, "Session"]:
    from mpqc.ort import Session

    if "ort-int8" in against:
        raise UsageError(
            f"{model.name} is quantized already, ort-int8 would quantize it once more: "
            "--against ort-fp32 runs it as it is"
        )
    try:
        return "ort", Session(model, threads, optimise=True)
    except ModelError:  # QONNX
        from mpqc.onnx_export import to_onnx
        from mpqc.pipeline import read_fake_quantized

        report = artifact.report
        graph, _ = read_fake_quantized(model, report["dims"], report["batch"])
        return "ort (standard operators)", Session(to_onnx(graph), threads, optimise=True)


def check_opponents(names: Sequence[str]) -> None:
    """Refuse what cannot take part, before anything is run.

    Raises:
        UsageError: an unknown name.
        EnvironmentLacks: one that needs a GPU, and there is none.
    """
    if strangers := [name for name in names if name not in OPPONENTS]:
        raise UsageError(f"unknown opponent {strangers[0]!r}; choose from {', '.join(OPPONENTS)}")
    on_gpu = [name for name in names if name in ON_GPU]
    if on_gpu and not gpu().capability:
        raise EnvironmentLacks(
            f"{on_gpu[0]} runs on a GPU, and no CUDA driver with a GPU is found here"
        )


def opponent(
    name: str,
    model: Path,
    feeds: Sequence[Mapping[str, Array]],
    threads: int,
    dims: Mapping[str, int] | None = None,
    batch: int = 1,
) -> Opponent:
    """Something else that runs the float model, to compare with.

    Args:
        name: from ``OPPONENTS``.
        model: float ONNX file.
        feeds: calibration of ``ort-int8``; the first is tried.
        threads: of the session.
        dims: values of symbolic dimensions.
        batch: samples of one run.

    Raises:
        ModelError: it refuses the model.
        EnvironmentLacks: it is not installed, or sees no GPU.
    """
    session = _opened(name, model, feeds, threads, dims, batch)
    session.run(feeds[0])  # says what does not fit before anything is timed
    return session


def _opened(
    name: str,
    model: Path,
    feeds: Sequence[Mapping[str, Array]],
    threads: int,
    dims: Mapping[str, int] | None,
    batch: int,
) -> Opponent:
    if name == "ort-cuda":
        from mpqc.ort_cuda import CudaSession

        return CudaSession(model)
    if name in ON_GPU:
        try:
            from mpqc.train.opponent import TorchOpponent
        except (ImportError, EnvironmentLacks) as error:  # mpqc.train says it of training
            raise EnvironmentLacks(
                f"{name} needs PyTorch: pip install torch (a build with CUDA)"
            ) from error
        return TorchOpponent(model, "int8" if name == "torch-int8" else "fp16", dims, batch)
    from mpqc.ort import Session, quantize_static

    source = quantize_static(model, feeds) if name == "ort-int8" else model
    return Session(source, threads, optimise=True)


def _per_layer(
    compiled: LocalModel, feed: Mapping[str, Array], repeat: int
) -> tuple[LayerTiming, ...]:
    stepper = compiled.steps(feed)
    if isinstance(compiled, CompiledModel) and compiled.on_gpu:
        count = range(len(stepper))  # by the GPU's clock: the start of a kernel takes longer
        times = [[compiled.time_step(index, TOGETHER) for index in count] for _ in range(repeat)]
    else:
        times = [_step_times(stepper) for _ in range(repeat + 1)][1:]
    return layer_timings(compiled.manifest, list(zip(*times, strict=True)))


def layer_timings(
    manifest: Mapping[str, Any], times: Sequence[Sequence[float]]
) -> tuple[LayerTiming, ...]:
    """A row for each kernel of an artifact, from the seconds of its runs."""
    macs = {layer["name"]: layer["macs"] for layer in manifest["layers"]}
    return tuple(
        LayerTiming(
            step["label"],
            step["kind"],
            min(found),
            statistics.median(found),
            macs.get(step["label"], 0) if step["kind"] in KINDS else 0,
        )
        for step, found in zip(manifest["steps"], times, strict=True)
    )


def _step_times(stepper: Steps) -> list[float]:
    return [stepper.step(index) for index in range(len(stepper))]


def machine(versions: Mapping[str, str]) -> dict[str, Any]:
    """Facts about this machine that a latency means nothing without.

    Args:
        versions: of what compiled the model.
    """
    facts: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "compiled_with": dict(versions),
    }
    with_runtime = [name for name in ("onnxruntime", "numpy") if _version(name)]
    facts["measured_with"] = {name: _version(name) for name in with_runtime}
    if hasattr(os, "getloadavg"):
        facts["load_average"] = round(os.getloadavg()[0], 2)
    if gpu().name:
        facts["gpu"] = gpu().name
    for line in _cpuinfo().splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in ("model name", "Model"):
            facts["processor"] = value
        elif key == "cpu MHz":
            facts.setdefault("clock_mhz", float(value))
    return facts


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
