"""``mpqc compare``: build, verify and measure uniform builds and plans of one model side by side.

What a build depends on makes its key; its result is kept under it as soon as it is known, so that
an interrupted comparison goes on where it stopped. Latencies are always measured anew, all builds
and opponents in turn: numbers of different hours do not compare.
"""

import contextlib
import csv
import hashlib
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mpqc import importer
from mpqc.artifact import Artifact, check_output, new_file, write_json
from mpqc.bench import (
    CALIBRATION_SAMPLES,
    OPPONENTS,
    Opponent,
    check_opponents,
    machine,
    opponent,
    take_turns,
)
from mpqc.data import Data, open_data
from mpqc.errors import EnvironmentLacks, MpqcError, OutputError, PlanError, UsageError
from mpqc.foreign_plan import load_plan
from mpqc.graph import Array, Graph, Precision
from mpqc.onnx_export import to_onnx
from mpqc.ort import Session
from mpqc.passes.estimate_cost import estimate_cost
from mpqc.pipeline import Options, compile_model, import_model, versions
from mpqc.plan import Plan
from mpqc.runtime import CompiledModel
from mpqc.verdict import Build, quality_of, verdict
from mpqc.verify import Agreement, agree, verify

STATE, RESULT, TABLE, PLOT = "compare.state.json", "compare.json", "compare.csv", "pareto.png"
VERIFIED_SAMPLES = 16
REPEAT = 30
LEAST_SECONDS = 1.0  # of all turns: small networks run more often
_FORMAT = 1


@dataclass(frozen=True)
class Subject:
    """What to compare.

    Attributes:
        model: ONNX file.
        data: samples that accuracy and agreement are measured on, as ``open_data`` takes them.
        preprocess: TOML for uint8 pictures.
        calibration: samples that ranges come from; None: ``data``.
        uniform: precisions of the bodies; the ends stay at ``ends``.
        plans: files.
        ends: None gives them the body's widths.
        max_samples: to measure on; None: all.
        dims: values of symbolic dimensions.
        force: accept plans of another model where the names fit.
    """

    model: Path
    data: str
    preprocess: Path | None = None
    calibration: str | None = None
    uniform: tuple[Precision, ...] = ()
    plans: tuple[Path, ...] = ()
    ends: Precision | None = Precision(8, 8)  # noqa: RUF009 - frozen
    max_samples: int | None = None
    dims: Mapping[str, int] = field(default_factory=dict)
    force: bool = False


@dataclass(frozen=True)
class Comparison:
    """Result of ``compare``.

    Attributes:
        builds: uniform ones, plans, opponents.
        verdict: sentences.
        quality: the measure that the verdict ranks by.
        samples: measured on.
        model: name of the file.
        target, threads, machine: where latencies are from.
        folder: of the report.
        notes: what could not be measured, and why.
        no_plot: why there is no picture; empty when there is one.
    """

    builds: tuple[Build, ...]
    verdict: tuple[str, ...]
    quality: str
    samples: int
    model: str
    target: str
    threads: int
    machine: Mapping[str, Any]
    folder: Path
    notes: tuple[str, ...] = ()
    no_plot: str = ""

    @property
    def passed(self) -> bool:
        """Whether every build computes what its reference says."""
        return all(build.verified is not False for build in self.builds)

    def to_json(self) -> dict[str, Any]:
        """Plain data; sizes in bytes, times in seconds."""
        return {
            "mpqc_compare": _FORMAT,
            "model": self.model,
            "target": self.target,
            "threads": self.threads,
            "samples": self.samples,
            "quality": self.quality,
            "passed": self.passed,
            "builds": [asdict(build) for build in self.builds],
            "verdict": list(self.verdict),
            "notes": list(self.notes),
            "machine": dict(self.machine),
            "folder": str(self.folder),
            "plot": None if self.no_plot else str(self.folder / PLOT),
        }


def compare(
    subject: Subject,
    output: Path,
    options: Options,
    *,
    threads: int = 1,
    repeat: int = REPEAT,
    against: Sequence[str] = ("ort-fp32", "ort-int8"),
    plot: bool = True,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    counted: Callable[[int], None] | None = None,
) -> Comparison:
    """Build, verify, measure; write compare.json, compare.csv and pareto.png.

    Args:
        subject: model, data, uniform precisions, plans.
        output: folder; one that an interrupted comparison left is continued.
        options: of the compiler.
        threads: of every contestant.
        repeat: interleaved runs of each, at least.
        against: names from ``bench.OPPONENTS``.
        plot: draw pareto.png.
        overwrite: replace a finished comparison; builds that did not change are kept.
        progress: called with the name of each phase.
        counted: called with samples done.

    Raises:
        UsageError: nothing to compare, or names that stand twice.
        OutputError: ``output`` holds a finished comparison, or something else.
        MpqcError: as compiling and measuring raise it.
    """
    if options.target.why_not_here:
        raise EnvironmentLacks(
            f"{options.target.why_not_here}, so that nothing can be measured: compare on the "
            "machine itself, or choose a target that runs here"
        )
    check_opponents(against)
    graph = import_model(subject.model, subject.dims)
    sha256 = importer.sha256(subject.model)
    plans = _plans(subject, graph, sha256)
    data = open_data(subject.data, graph, subject.preprocess)
    source = subject.data if subject.calibration is None else subject.calibration
    calibration = open_data(source, graph, subject.preprocess)
    _prepare(output, overwrite)
    bench = _Bench(subject, graph, sha256, data, calibration, options, output, progress, counted)
    notes: list[str] = []
    builds = [bench.build(name, plan, notes) for name, plan in plans.items()]
    sessions: dict[str, Opponent] = {}
    feeds = list(calibration.sample(CALIBRATION_SAMPLES * calibration.batch, options.seed).feeds())
    for name in against:
        progress(f"prepare {name}")
        try:
            sessions[name] = opponent(name, subject.model, feeds, threads, subject.dims)
        except MpqcError as error:
            notes.append(f"{name} does not take part: {error}")
            continue
        builds.append(bench.judge_opponent(name, sessions[name]))
    progress("measure latencies")
    builds = _with_latencies(builds, sessions, feeds[0], output, threads, repeat)
    result = Comparison(
        tuple(builds), tuple(verdict(builds)), quality_of(builds),
        max((build.samples for build in builds), default=0), subject.model.name,
        options.target.name, threads, machine(versions()), output, tuple(notes),
    )  # fmt: skip
    return _write(result, plot)


def _plans(subject: Subject, graph: Graph, sha256: str) -> dict[str, tuple[str, Plan]]:
    """Name -> role and plan."""
    found: dict[str, tuple[str, Plan]] = {}
    for precision in subject.uniform:
        plan = Plan.uniform(graph, precision, subject.ends, model_sha256=sha256)
        found[str(precision)] = ("uniform", plan)
    for path in subject.plans:
        name = re.sub(r"[^\w.+-]", "_", path.stem)
        if name in found or name in OPPONENTS:
            raise UsageError(f"two builds are named {name!r}: rename {path}")
        plan, _ = load_plan(path, subject.model, subject.dims)
        try:
            plan.check(graph, sha256, subject.force)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error
        found[name] = ("plan", plan)
    if not found:
        raise UsageError("nothing to compare: give --uniform w4a4,w8a8, or --plan, or both")
    return found


def _prepare(output: Path, overwrite: bool) -> None:
    """Make the folder, or accept one that a comparison left."""
    ours = (output / STATE).is_file()
    if output.exists() and not ours and not (output.is_dir() and not any(output.iterdir())):
        raise OutputError(
            f"{output} was not written by mpqc compare ({STATE} is missing): it is not replaced; "
            "choose another name"
        )
    if (output / RESULT).exists():
        check_output(output / RESULT, overwrite)
    check_output(output, overwrite=True)
    try:
        for folder in (output, output / "builds", output / "results"):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(output / STATE, {"mpqc_compare_state": _FORMAT})
        for name in (RESULT, TABLE, PLOT):  # what is left then belongs together
            (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error}") from error


@dataclass(frozen=True)
class _Bench:
    """Builds and judges, each result kept."""

    subject: Subject
    graph: Graph
    sha256: str
    data: Data
    calibration: Data
    options: Options
    output: Path
    progress: Callable[[str], None]
    counted: Callable[[int], None] | None

    def build(self, name: str, planned: tuple[str, Plan], notes: list[str]) -> Build:
        role, plan = planned
        key = self._key(plan.text())
        file = self.output / "results" / f"{key}.json"
        folder = self.output / "builds" / name
        known = self._known(file, folder, notes)
        if known is not None:
            return replace(known, name=name, role=role)  # type: ignore[arg-type]
        self.progress(f"compile {name}")
        artifact = compile_model(
            self.subject.model, folder, self.options, plan=plan, data=self.calibration,
            dims=self.subject.dims, force=self.subject.force, overwrite=folder.exists(),
        )  # fmt: skip
        self.progress(f"verify {name}")
        verified = verify(
            artifact, self.data, max_samples=VERIFIED_SAMPLES, seed=self.options.seed,
            model=self.subject.model,
        )  # fmt: skip
        self.progress(f"run {name}")
        with CompiledModel(artifact.library) as compiled:
            judged = self._judge(compiled.run)
        cost = estimate_cost(self.graph, plan)
        manifest = artifact.manifest
        build = Build(
            name, role,  # type: ignore[arg-type]
            **_quality(judged),
            size=cost.size,
            bitops=float(cost.bitops),
            verified=verified.passed,
            library_bytes=artifact.library.stat().st_size,
            kernels=dict(Counter(layer["kernel"] for layer in manifest["layers"])),
            widths={layer["name"]: layer["run"] or "float" for layer in manifest["layers"]},
            folder=f"builds/{name}",
        )  # fmt: skip
        self._keep(file, build, artifact)
        return build

    def judge_opponent(self, name: str, session: Opponent) -> Build:
        file = self.output / "results" / f"{self._key(name)}.json"
        known = self._known(file, None, [])
        if known is not None:
            return known
        self.progress(f"run {name}")
        build = Build(name, "opponent", **_quality(self._judge(session.run)))
        self._keep(file, build, None)
        return build

    def _judge(self, run: Callable[[Mapping[str, Array]], Mapping[str, Array]]) -> Agreement:
        float_run = Session(to_onnx(self.graph), optimise=True).run
        return agree(
            run, float_run, self.data, self.subject.max_samples, self.options.seed, self.counted
        )

    def _key(self, what: str) -> str:
        options = asdict(self.options) | {"target": repr(self.options.target)}
        table = _latency_digest(self.options)
        facts = [
            _FORMAT, what, self.sha256, sorted(self.subject.dims.items()), repr(options), table,
            _source_digest(self.subject.data), self.subject.max_samples,
            _source_digest(self.subject.calibration or self.subject.data),
            _source_digest(self.subject.preprocess), versions(),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:20]

    def _known(self, file: Path, folder: Path | None, notes: list[str]) -> Build | None:
        """A result that was kept, if its artifact is still the one that was measured."""
        if not file.exists():
            return None
        try:
            kept = json.loads(file.read_text("utf-8"))
            if folder is not None and kept["library"] != importer.sha256(
                Artifact.open(folder).library
            ):
                return None  # another build of that name has replaced it
            names = {entry.name for entry in fields(Build)}
            if kept["build"].keys() != names:
                raise ValueError("fields are missing")
            return Build(**kept["build"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{file.name} was damaged ({error}) and has been made anew")
        except MpqcError:
            pass  # the artifact is gone: build it again
        return None

    def _keep(self, file: Path, build: Build, artifact: Artifact | None) -> None:
        library = None if artifact is None else importer.sha256(artifact.library)
        with new_file(file, overwrite=True) as work:
            write_json(work, {"library": library, "build": asdict(build)})


def _quality(judged: Agreement) -> dict[str, Any]:
    noise = next(iter(judged.sqnr_db.values()), None)
    return {
        "accuracy": judged.accuracy,
        "agreement": judged.top1,
        "sqnr_db": noise,
        "samples": judged.samples,
    }


def _with_latencies(
    builds: Sequence[Build],
    sessions: Mapping[str, Opponent],
    feed: Mapping[str, Array],
    output: Path,
    threads: int,
    repeat: int,
) -> list[Build]:
    """Latencies of all, in turn."""
    runs: dict[str, Callable[[int], list[float]]] = {}
    with contextlib.ExitStack() as stack:
        for build in builds:
            if build.folder is None:
                session = sessions[build.name]
                runs[build.name] = lambda n, s=session: s.seconds(feed, n)  # type: ignore[misc]
            else:
                model = stack.enter_context(CompiledModel(output / build.folder, threads))
                runs[build.name] = lambda n, m=model: m.seconds(feed, n)  # type: ignore[misc]
        once = sum(min(run(3)) for run in runs.values())
        times = take_turns(runs, max(repeat, min(20 * repeat, int(LEAST_SECONDS / once))))
    return [
        replace(
            build,
            latency=min(times[build.name]),
            latency_median=statistics.median(times[build.name]),
        )
        for build in builds
    ]


def _write(result: Comparison, plot: bool) -> Comparison:
    no_plot = "" if plot else "not asked for"
    if plot:
        from mpqc.plot import pareto_plot

        title = f"{result.model} on {result.target}, {result.samples} samples"
        try:
            pareto_plot(result.builds, title, result.folder / PLOT)
        except EnvironmentLacks as error:
            no_plot = str(error)
    result = replace(result, no_plot=no_plot)
    with new_file(result.folder / TABLE, overwrite=True) as work:
        _write_csv(result.builds, work)
    with new_file(result.folder / RESULT, overwrite=True) as work:
        write_json(work, result.to_json())
    return result


_CSV = (
    "name", "role", "accuracy", "agreement", "sqnr_db", "samples", "size", "bitops", "latency",
    "latency_median", "verified", "library_bytes",
)  # fmt: skip


def _write_csv(builds: Sequence[Build], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_CSV)
        for build in builds:
            cells = [getattr(build, name) for name in _CSV]
            writer.writerow("" if cell is None else cell for cell in cells)


def _latency_digest(options: Options) -> str:
    """Of the table that chooses kernels: another one makes another build."""
    from mpqc.latency import cached_path

    if options.kernel != "auto" or options.latencies is None:
        return ""
    path = options.latencies
    return _source_digest(cached_path(options.target) if path == "cache" else Path(path))


def _source_digest(source: str | Path | None) -> str:
    """Of a data file, or of the file with the function that makes data."""
    if source is None:
        return ""
    path = Path(source)
    if not path.is_file() and ":" in str(source):
        path = Path(str(source).rpartition(":")[0])
    return f"{source} {importer.sha256(path)}" if path.is_file() else str(source)
