"""``mpqc demo``: search and compile the embedded model at several widths, verify, and compare.

The folder that it leaves holds the model and its data too, for first steps of one's own.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpqc import demo, importer
from mpqc.artifact import Artifact, new_folder, write_json
from mpqc.data import Data, open_data
from mpqc.errors import DataError, EnvironmentLacks
from mpqc.graph import Array, Graph, Precision
from mpqc.ort import Session
from mpqc.passes.estimate_cost import estimate_cost
from mpqc.pipeline import Options, compile_model, import_model
from mpqc.plan import Plan
from mpqc.run_model import run_samples
from mpqc.runtime import CompiledModel
from mpqc.target import native
from mpqc.verify import verify

RESULT = "demo.json"  # also tells the demo's own folder from others
VERIFIED_SAMPLES = 64
REPEAT = 300  # runs of each contestant; one takes some ten microseconds
UNIFORM = ("w8a8", "w4a4", "w2a2")
PLOT = "demo.png"
BUDGET = "bitops=w3a3"  # of the searched plan
# By hand: the ends and the depthwise layer hold 4 % of the weights, so that eight bits cost little
# there; all other activations keep four bits, their weights two or three.
MIXED = {
    "stem": "w8a8",
    "block.conv1": "w3a4",
    "block.conv2": "w3a4",
    "down": "w2a4",
    "depthwise": "w8a8",
    "pointwise": "w2a4",
    "classifier": "w8a8",
}


@dataclass(frozen=True)
class DemoBuild:
    """One row of the table.

    Attributes:
        name: "w2a2", "mixed"; "float" is ONNX Runtime on the float model.
        folder: of the artifact, relative to the demo's; None for "float".
        accuracy: share of labels met.
        agreement: share of samples with the float model's class.
        size: of the weights [bytes].
        bitops: of one sample.
        seconds: fastest of the interleaved runs of one sample on one thread.
        compile_seconds: from ONNX file to artifact.
        verified: whether the artifact computes what its reference says; None for "float".
    """

    name: str
    folder: str | None
    accuracy: float
    agreement: float
    size: float
    bitops: int
    seconds: float
    compile_seconds: float
    verified: bool | None


@dataclass(frozen=True)
class DemoResult:
    """Result of ``run_demo``: the float model first."""

    folder: Path
    samples: int
    builds: tuple[DemoBuild, ...]
    seconds: float
    plotted: bool = False

    @property
    def passed(self) -> bool:
        return all(build.verified is not False for build in self.builds)

    def to_json(self) -> dict[str, Any]:
        """Plain data; sizes in bytes, times in seconds."""
        own = self.builds[0]
        return {
            "mpqc_demo": 1,
            "folder": str(self.folder),
            "samples": self.samples,
            "passed": self.passed,
            "seconds": self.seconds,
            "builds": [
                {**asdict(build), "speedup": own.seconds / build.seconds} for build in self.builds
            ],
        }


def run_demo(
    output: Path, *, seed: int = 0, progress: Callable[[str], None] = lambda _: None
) -> DemoResult:
    """Run the whole line on the embedded model.

    Args:
        output: folder to create; one that an earlier demo left is replaced.
        seed: of the calibration sample.
        progress: called with the name of each phase.

    Raises:
        OutputError: ``output`` exists and is not a demo's.
    """
    start = time.perf_counter()
    files = demo.files()
    with new_folder(output, overwrite=True, marker=RESULT) as folder:
        for file in files:
            shutil.copyfile(file, folder / file.name)
        graph = import_model(files.model)
        plans = demo_plans(graph, importer.sha256(files.model))
        data = open_data(files.test, graph)
        progress("search")
        plans["searched"] = searched_plan(files, seed)
        for name in ("mixed", "searched"):
            plans[name].save(folder / f"{name}.json")
        artifacts: dict[str, Artifact] = {}
        spent: dict[str, float] = {}
        for name, plan in plans.items():
            progress(f"compile {name}")
            begun = time.perf_counter()
            calibration = open_data(files.calibration, graph)
            artifacts[name] = compile_model(
                files.model, folder / name, Options(native(), seed=seed), plan=plan,
                data=calibration,
            )  # fmt: skip
            spent[name] = time.perf_counter() - begun
        verified = {}
        for name, artifact in artifacts.items():
            progress(f"verify {name}")
            verified[name] = verify(artifact, data, layers=True, max_samples=VERIFIED_SAMPLES)
        progress("measure")
        session = Session(files.model, threads=1, optimise=True)
        models = {name: CompiledModel(artifact.library) for name, artifact in artifacts.items()}
        logits = _logits(session, models, data)
        seconds = _latencies(session, models, data)
        for model in models.values():
            model.close()
        builds = tuple(
            DemoBuild(
                name,
                name if name in plans else None,
                _accuracy(logits[name], data),
                _agreement(logits[name], logits["float"]),
                cost.size,
                cost.bitops,
                seconds[name],
                round(spent.get(name, 0.0), 3),
                verified[name].passed if name in verified else None,
            )
            for name in logits
            for cost in [estimate_cost(graph, plans.get(name))]
        )
        result = DemoResult(output, len(data), builds, round(time.perf_counter() - start, 2))
        write_json(folder / RESULT, result.to_json())
        plotted = _plot(result, folder / PLOT)
    return replace(result, plotted=plotted)


def searched_plan(files: demo.DemoFiles, seed: int) -> Plan:
    """The widths that measured sensitivities buy for the BitOPs of the uniform three-bit build."""
    from mpqc.search import search_plan

    return search_plan(
        files.model,
        method="sensitivity",
        budgets=BUDGET,
        data=files.calibration,
        widths=(2, 3, 4, 6, 8),
        seed=seed,
        confirmed=True,
    ).plan


def _plot(result: DemoResult, path: Path) -> bool:
    """Accuracy against size, BitOPs and latency, where matplotlib is installed."""
    from mpqc.plot import pareto_plot
    from mpqc.verdict import Build

    roles = {"float": "opponent", "mixed": "plan", "searched": "plan"}
    builds = [
        Build(
            build.name,
            roles.get(build.name, "uniform"),  # type: ignore[arg-type]
            accuracy=build.accuracy,
            agreement=build.agreement,
            size=build.size if build.folder else None,
            bitops=build.bitops if build.folder else None,
            latency=build.seconds,
        )
        for build in result.builds
    ]
    try:
        pareto_plot(builds, "digits: uniform and mixed builds", path)
    except EnvironmentLacks:
        return False
    return True


def demo_plans(graph: Graph, sha256: str) -> dict[str, Plan]:
    """The uniform plans and the one by hand."""
    plans = {
        name: Plan.uniform(graph, Precision.parse(name), model_sha256=sha256) for name in UNIFORM
    }
    mixed = {layer: Precision.parse(widths) for layer, widths in MIXED.items()}
    plans["mixed"] = Plan.of(graph, mixed, model_sha256=sha256)
    return plans


def _logits(session: Session, models: Mapping[str, CompiledModel], data: Data) -> dict[str, Array]:
    """Contestant -> logits [samples, classes], the float model first."""
    rows = [next(iter(session.run(feed).values())) for feed in data.feeds()]
    logits = {"float": np.concatenate(rows)}
    for name, model in models.items():
        results, _ = run_samples(model, data)
        logits[name] = next(iter(results.values()))
    return logits


def _latencies(
    session: Session, models: Mapping[str, CompiledModel], data: Data
) -> dict[str, float]:
    """Fastest run of each [s]; they take turns, so that a disturbance meets all of them."""
    feed = next(iter(data.feeds()))
    runs: dict[str, Callable[[], Sequence[float]]] = {"float": lambda: session.seconds(feed, 1)}
    for name, model in models.items():
        runs[name] = lambda model=model: model.seconds(feed, 1)  # type: ignore[misc]
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(REPEAT):
        for name, run in runs.items():
            best[name] = min(best[name], *run())
    return best


def _accuracy(logits: Array, data: Data) -> float:
    if data.labels is None:
        raise DataError("the demo's pictures have lost their labels: install mpqc again")
    return float((logits.argmax(1) == data.labels).mean())


def _agreement(logits: Array, expected: Array) -> float:
    return float((logits.argmax(1) == expected.argmax(1)).mean())
