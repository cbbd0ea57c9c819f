"""Time every layer of a model at every width pair with every kernel: the latency table.

The whole network is quantized to one width pair, lowered with one kind of kernel, built, and
stepped through. So a layer is timed as it will run: with the padding, packing or tables that its
kernel needs, with the elementwise operators that are fused behind it, among its neighbours. The
kernels of one width pair take turns, so that a disturbance meets all of them.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mpqc import importer
from mpqc.calibration import Calibration
from mpqc.errors import EnvironmentLacks, UsageError
from mpqc.graph import Array, Graph, Node, Precision
from mpqc.latency import (
    FLOAT,
    KINDS,
    Conditions,
    Entry,
    Geometry,
    LatencyCost,
    LatencyTable,
    LayerPoint,
    Network,
    network_name,
    table_path,
    versions,
)
from mpqc.passes.find_layers import find_layers, why_none
from mpqc.plan import Plan
from mpqc.program import Program, plan_memory
from mpqc.runtime import CompiledModel
from mpqc.target import Target

if TYPE_CHECKING:
    from mpqc.select_kernel import Choice, Selector

WIDTHS = (1, 2, 3, 4, 8)
CHECKS = (Precision(2, 2), Precision(4, 4), Precision(8, 8))
REPEAT = 15  # passes over all steps, at least
LEAST_SECONDS = 0.2  # and as many more as fit into this, for each library
MOST_PASSES = 200

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Times:
    """Of one library.

    Attributes:
        steps: fastest and median seconds of each step, without the cost of the call.
        whole: fastest and median seconds of a run.
        around: of these, what a run takes beside its steps, where they are timed apart: on a GPU
            the start of the graph and the caller's copies.
    """

    steps: tuple[tuple[float, float], ...]
    whole: tuple[float, float]
    around: tuple[float, float] = (0.0, 0.0)


class Runner(Protocol):
    """Where libraries run: this machine, or a board."""

    def machine(self) -> str:
        """Model of the processor."""
        ...

    def measure(self, libraries: Sequence[Path], repeat: int) -> list[Times]:
        """Time the libraries in turn."""
        ...


@dataclass(frozen=True)
class LocalRunner:
    """Runs libraries in this process."""

    threads: int = 1

    def machine(self) -> str:
        from mpqc.bench import machine

        return str(machine({})["processor"])

    def measure(self, libraries: Sequence[Path], repeat: int) -> list[Times]:
        models = [CompiledModel(library, self.threads) for library in libraries]
        try:
            contestants = [_Contestant(model) for model in models]
            for contestant in contestants:  # warm up
                contestant.run()
            take_turns([contestant.turn for contestant in contestants], repeat)
            return [contestant.times() for contestant in contestants]
        finally:
            for model in models:
                model.close()


def take_turns(contestants: Sequence[Callable[[], None]], repeat: int) -> None:
    """Call them one after the other, ``repeat`` times each, and more while time is left."""
    passes, start = 0, time.perf_counter()
    while passes < repeat or (
        passes < MOST_PASSES and time.perf_counter() - start < LEAST_SECONDS * len(contestants)
    ):
        for contestant in contestants:
            contestant()
        passes += 1


class _Contestant:
    def __init__(self, model: CompiledModel) -> None:
        self._feeds = random_feeds(model)
        self._model = model
        self._stepper = model.steps(self._feeds)
        self._steps: list[list[float]] = []
        self._wholes: list[float] = []
        self._call = self._call_seconds()

    def _call_seconds(self) -> float:
        """What it costs to call a step from here that does nothing: one that does not exist."""
        library, handle = self._model._library, self._model._handle
        best = 1.0
        for _ in range(200):
            start = time.perf_counter()
            library.mpqc_step(handle, -1)
            best = min(best, time.perf_counter() - start)
        return best

    def run(self, record: bool = False) -> None:
        steps = [self._stepper.step(index) for index in range(len(self._stepper))]
        whole = self._model.seconds(self._feeds, 1)
        self._stepper = self._model.steps(self._feeds)  # the run has bound its own buffers
        if record:
            self._steps.append(steps)
            self._wholes += whole

    def turn(self) -> None:
        self.run()  # brings its data back into the caches
        self.run(record=True)

    def times(self) -> Times:
        steps = tuple(
            (max(0.0, min(found) - self._call), max(0.0, statistics.median(found) - self._call))
            for found in zip(*self._steps, strict=True)
        )
        return Times(steps, (min(self._wholes), statistics.median(self._wholes)))


@dataclass(frozen=True)
class Profile:
    """Result of ``profile``.

    Attributes:
        table: all that is known under these conditions; other models' layers too.
        points: layer name -> its place in the table.
        network: the whole model; None without a check.
        macs: multiply-accumulates of its layers.
        path: of the cache file; None when nothing is cached.
        measured, cached: points of this model measured now, and found in the cache.
        seconds: that it took.
    """

    table: LatencyTable
    points: Mapping[str, LayerPoint]
    network: Network | None
    macs: int
    path: Path | None
    measured: int
    cached: int
    seconds: float

    @property
    def cost(self) -> LatencyCost:
        """The latency objective of a search."""
        network = self.network or Network(0.0, 1.0)
        return LatencyCost(self.table, self.points, network, self.macs)

    def own_table(self) -> LatencyTable:
        """The rows of this model alone."""
        shapes = {(point.geometry, point.epilogue) for point in self.points.values()}
        kept = tuple(
            entry for entry in self.table.entries
            if entry.geometry is None or (entry.geometry, entry.epilogue) in shapes
        )  # fmt: skip
        return LatencyTable(self.table.conditions, kept)

    def to_json(self) -> dict[str, Any]:
        """Plain data; times in seconds."""
        errors = self.table.model.errors()
        network = self.network
        return {
            "mpqc_profile": 1,
            "target": self.table.conditions.target,
            "cpu": self.table.conditions.cpu,
            "threads": self.table.conditions.threads,
            "versions": self.table.conditions.versions,
            "cache": None if self.path is None else str(self.path),
            "measured": self.measured,
            "cached": self.cached,
            "seconds": round(self.seconds, 3),
            "model_median_error": statistics.median(errors) if errors else None,
            "layers": [
                {
                    "name": name,
                    "op": point.geometry.op,
                    "macs": point.geometry.macs,
                    "epilogue": point.epilogue,
                    "widths": self._widths(point),
                }
                for name, point in self.points.items()
            ],
            "network": None if network is None else {
                "rest": network.rest,
                "factor": network.factor,
                "float": network.float_seconds,
                "checks": {
                    name: {"promise": promise, "measured": measured,
                           "error": promise / measured - 1,
                           "error_with_factor": promise * network.factor / measured - 1}
                    for name, (promise, measured) in network.checks.items()
                },
            },
        }  # fmt: skip

    def _widths(self, point: LayerPoint) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for entry in self.table.entries:
            if (entry.geometry, entry.epilogue) == (point.geometry, point.epilogue):
                name = f"w{entry.weight_bits}a{entry.activation_bits}"
                best = found.get(name)
                if best is None or entry.seconds_min < best["seconds"]:
                    found[name] = {"kernel": entry.kernel, "seconds": entry.seconds_min}
        return found


def profile(
    model: str | Path,
    target: Target,
    *,
    widths: Iterable[int] = WIDTHS,
    threads: int = 1,
    repeat: int = REPEAT,
    checks: Sequence[Precision] = CHECKS,
    dims: Mapping[str, int] | None = None,
    batch: int = 1,
    tiles: bool = False,
    cache: Path | None = None,
    use_cache: bool = True,
    runner: Runner | None = None,
    progress: Progress = lambda *_: None,
) -> Profile:
    """Measure what the cache does not know yet; each width pair is kept as soon as it is done.

    Args:
        model: ONNX file.
        target: has to run where the runner is.
        widths: candidates; all pairs of them are measured.
        threads: of every run.
        repeat: passes over all steps, at least.
        checks: uniform networks that are built with the table's kernels and measured whole.
        dims: values of symbolic dimensions.
        batch: samples of one run.
        tiles: measure tiles beside the default too.
        cache: folder; by default the user's.
        use_cache: False measures everything anew and keeps nothing.
        runner: by default this process.
        progress: called with what is done, steps done, steps in all.

    Raises:
        EnvironmentLacks: this machine cannot run the target's instructions, or lacks its GPU or
            the compiler for it, or the board is gone.
        UsageError: widths outside 1 to 8, or a model without layers.
        DataError: the cache is damaged.
    """
    start = time.perf_counter()
    pairs = _pairs(widths)
    runs = (
        own_runner(target, threads, "latencies are measured, not guessed")
        if runner is None
        else runner
    )
    cpu = runs.machine()
    conditions = Conditions(target.name, cpu, threads, versions())
    path = table_path(target, threads, cache, cpu) if use_cache else None
    table = LatencyTable.load(path) if path is not None and path.exists() else (
        LatencyTable(conditions)
    )  # fmt: skip
    network = OpenNetwork.open(model, dims, target, batch)
    book = Book(table, path)
    missing = {pair: network.missing(book.table, pair) for pair in pairs}
    wanted = sum(len(network.wanted(pair, kind)) for pair in pairs for kind in KINDS)
    absent = sum(len(points) for kinds in missing.values() for points in kinds.values())
    work = [(pair, kinds) for pair, kinds in missing.items() if kinds]
    steps = len(work) + len(checks) + bool(checks)
    known = book.table.network(network.sha256, batch)
    try:
        for done, (pair, kinds) in enumerate(work):
            progress(f"measure {pair}", done, steps)
            book.add(_measure_pair(network, pair, list(kinds), runs, repeat, tiles))
        for index, checked in enumerate((*checks, None) if checks else ()):
            name = FLOAT if checked is None else str(checked)
            progress(f"check the whole network at {name}", len(work) + index, steps)
            if work or known is None or not known.holds(name):
                book.add(_check(network, checked, runs, repeat, book.table))
    except EnvironmentLacks as error:
        if path is None:
            raise
        raise EnvironmentLacks(
            f"{error}; what was measured is kept: the same command goes on from there"
        ) from error
    progress("done", steps, steps)
    return Profile(
        table=book.table,
        points=network.points,
        network=book.table.network(network.sha256, batch),
        macs=network.macs,
        path=path,
        measured=absent,
        cached=wanted - absent,
        seconds=time.perf_counter() - start,
    )


def latency_cost(
    model: str | Path,
    target: Target,
    table: LatencyTable | None = None,
    *,
    threads: int = 1,
    dims: Mapping[str, int] | None = None,
    batch: int = 1,
    cache: Path | None = None,
) -> LatencyCost:
    """The latency objective of a search, from a table that is there already.

    Args:
        model: ONNX file.
        target: machine.
        table: of that machine; by default the one in the user's cache.
        threads: of the runs that the cached table is about.
        dims: values of symbolic dimensions.
        batch: samples of one run.
        cache: folder; by default the user's.

    Raises:
        UsageError: there is no table, or it knows nothing of this model.
        DataError: the table is damaged.
    """
    from mpqc.latency import cached_table

    found = cached_table(target, threads, cache) if table is None else table
    more = f" --batch {batch}" if batch > 1 else ""
    advice = f"run mpqc profile {model} --target {target.name}{more} first"
    if found is None:
        raise UsageError(f"no latencies of {target.name} on this machine are known: {advice}")
    network = OpenNetwork.open(model, dims, target, batch)
    whole = found.network(network.sha256, batch)
    if whole is None:
        of_batch = f" at batch {batch}" if batch > 1 else ""
        raise UsageError(f"the latency table holds no whole network of {model}{of_batch}: {advice}")
    return LatencyCost(found, network.points, whole, network.macs)


# ---------------------------------------------------------------------------------- the network


@dataclass(frozen=True)
class OpenNetwork:
    """A model, ready to be quantized at any width without data.

    Attributes:
        graph: float, folded.
        calibration: of random inputs: it decides which codes have zero points, and no more.
        plan: all layers at eight bits.
        points: layer name -> geometry and epilogue.
        kinds: layer name -> kernels that can run it at few bits.
    """

    graph: Graph
    calibration: Calibration
    plan: Plan
    points: Mapping[str, LayerPoint]
    sha256: str
    target: Target
    macs: int
    batch: int = 1

    @classmethod
    def open(
        cls, model: str | Path, dims: Mapping[str, int] | None, target: Target, batch: int
    ) -> "OpenNetwork":
        from mpqc.pipeline import Options, calibrate_plan, import_model

        graph = import_model(model, dims, batch)
        plan = Plan.uniform(graph, Precision(8, 8), None)
        if not plan.layers:
            raise UsageError(why_none(graph))
        calibration = calibrate_plan(graph, plan, _random_data(graph), Options(target))
        macs = sum(layer.macs for layer in find_layers(graph))
        bare = cls(graph, calibration, plan, {}, importer.sha256(model), target, macs, batch)
        return replace(bare, points=layer_points(bare.quantized(Precision(4, 4))))

    def quantized(self, precision: Precision) -> Graph:
        """Channels-last integer graph, all layers at one precision."""
        return self.planned(Plan.uniform(self.graph, precision, None))

    def planned(self, plan: Plan) -> Graph:
        from mpqc.pipeline import channels_last, quantize

        return channels_last(quantize(self.graph, plan, self.calibration))

    def wanted(self, precision: Precision, kind: str) -> set[LayerPoint]:
        """Points that a kind of kernel can run."""
        from mpqc.latency_model import exists

        known = self.target.arch == "x86_64" and not self.target.cuda
        lut = kind != "bitplane-lut" or known
        return {
            point for point in self.points.values()
            if lut and exists(kind, point.geometry, precision)
        }  # fmt: skip

    def wanted_by(self, graph: Graph, kind: str, table: LatencyTable) -> bool:
        """Whether a planned graph has a layer of which not every form of a kind is measured."""
        from mpqc.grouping import LAYERS

        for node in graph:
            if node.op not in LAYERS:
                continue
            point = self.points[node.name]
            widths = Precision(node.int_attr("weight_bits"), node.int_attr("activation_bits"))
            known = table.tuned(point.geometry, point.epilogue, widths, kind)
            if point in self.wanted(widths, kind) and not known:
                return True
        return False

    def missing(self, table: LatencyTable, precision: Precision) -> dict[str, set[LayerPoint]]:
        """Kind -> points that the table lacks; kinds without any left out."""
        found = {
            kind: {
                point for point in self.wanted(precision, kind)
                if not table.has(point.geometry, point.epilogue, precision, kind)
            }
            for kind in KINDS
        }  # fmt: skip
        return {kind: points for kind, points in found.items() if points}


@dataclass
class Book:
    """The table, and the file that grows with it."""

    table: LatencyTable
    path: Path | None

    def add(self, entries: Sequence[Entry]) -> None:
        self.table = (
            self.table.with_entries(entries)
            if self.path is None
            else self.table.appended(self.path, entries)
        )


def layer_points(graph: Graph) -> dict[str, LayerPoint]:
    """Geometry and epilogue of every layer of a quantized, channels-last graph."""
    from mpqc.grouping import LAYERS, form_groups

    points = {}
    for group in form_groups(graph):
        head = group.nodes[0]
        if head.op in LAYERS:
            points[head.name] = LayerPoint(
                node_geometry(graph, head), _epilogue(graph, group.nodes)
            )
    order = [node.name for node in graph if node.name in points]
    return {name: points[name] for name in order}


def node_geometry(graph: Graph, node: Node) -> Geometry:
    """Of an IntConv or IntMatMul node of a channels-last graph."""
    from mpqc.select_kernel import geometry, table_geometry

    layer, pads, source = geometry(graph, node)
    return table_geometry(node.op, layer, pads, source)


def _epilogue(graph: Graph, nodes: Sequence[Node]) -> str:
    """Operators in order, images that they read, and what others read of them."""
    inside = {node.name for node in nodes}
    own = {value for node in nodes for value in node.outputs}
    images = {
        value for node in nodes[1:] for value in node.inputs
        if value and value not in own and value not in graph.constants
    }  # fmt: skip
    left = sorted(
        graph.type(node.output).dtype
        for node in nodes
        if node.output in graph.outputs
        or any(reader.name not in inside for reader in graph.consumers(node.output))
    )
    operators = "+".join(node.op for node in nodes[1:]) or "none"
    reads = f" reading {len(images)}" if images else ""
    return f"{operators}{reads} to {'+'.join(left)}"


# ----------------------------------------------------------------------------------- measuring


def _measure_pair(
    network: OpenNetwork,
    precision: Precision,
    kinds: Sequence[str],
    runner: Runner,
    repeat: int,
    tiles: bool,
) -> list[Entry]:
    """Rows of all layers at one width pair."""
    graph = network.quantized(precision)
    selectors = [each for kind in kinds for each in candidates(network.target, kind, tiles, graph)]
    return fastest(measure_layers(network, graph, selectors, runner, repeat))


def fastest(entries: Iterable[Entry]) -> list[Entry]:
    """Of each point and kind of kernel."""
    found: dict[tuple[object, ...], Entry] = {}
    for entry in entries:
        if entry.seconds_min <= found.get(entry.key, entry).seconds_min:
            found[entry.key] = entry
    return list(found.values())


def measure_layers(
    network: OpenNetwork,
    graph: Graph,
    selectors: "Sequence[Selector]",
    runner: Runner,
    repeat: int,
) -> list[Entry]:
    """Rows of the layers of a quantized, channels-last graph, for each of the selectors.

    A layer for which a selector has no kernel of the kind that it asks for makes no row.
    """
    from mpqc.lowering import lower

    entries: list[Entry] = []
    with tempfile.TemporaryDirectory(prefix="mpqc-") as folder:
        programs: list[Program] = []
        libraries = []
        for index, selector in enumerate(selectors):
            programs.append(lower(graph, network.target, selector))
            libraries.append(_build(programs[-1], network.target, Path(folder, f"{index}.so")))
        for selector, program, times in zip(
            selectors, programs, runner.measure(libraries, repeat), strict=True
        ):
            layers, _ = attribute(program, times)
            samples: dict[tuple[LayerPoint, Precision], list[_Sample]] = {}
            for node in graph:
                if node.name not in layers:
                    continue
                choice = selector.choose(graph, node)
                if choice.kind != selector.kernel:
                    continue
                widths = Precision(choice.layer.weight_bits, choice.layer.activation_bits)
                sample = _Sample(*layers[node.name], choice.variant, tile_name(choice))
                samples.setdefault((network.points[node.name], widths), []).append(sample)
            entries += [
                Entry(
                    point.geometry, point.epilogue, widths.weight, widths.activation,
                    selector.kernel, found[0].variant, found[0].tile,
                    statistics.fmean(sample.best for sample in found),
                    statistics.fmean(sample.median for sample in found),
                )
                for (point, widths), found in samples.items()
            ]  # fmt: skip
    return entries


def candidates(target: Target, kind: str, tiles: bool, graph: Graph) -> "Sequence[Selector]":
    """What is built to measure one kind of kernel; the fastest of them makes the row."""
    from mpqc.grouping import LAYERS
    from mpqc.select_kernel import Selector

    if not target.cuda:
        default = Selector(target, kind)
        forms = [len(default.forms(graph, node)) for node in graph if node.op in LAYERS]
        places = max(forms, default=1) if tiles else 1
        return [replace(default, place=place) for place in range(places)]
    from mpqc.cuda.select import candidates

    return candidates(target, kind, tiles)


def tile_name(choice: "Choice") -> str:
    """As a row has it; empty where a kernel has no tile."""
    from mpqc.cuda.select import CudaChoice

    if isinstance(choice, CudaChoice):
        return "" if choice.blocks is None else choice.blocks.name
    return choice.form


def own_runner(target: Target, threads: int, why: str) -> Runner:
    """Of this machine.

    Args:
        target: to measure on.
        threads: of every run.
        why: it has to run here, for whoever reads that it cannot.

    Raises:
        EnvironmentLacks: this machine cannot run the target, or lacks its GPU, or the compiler for
            it.
    """
    if target.why_not_here:
        raise EnvironmentLacks(
            f"{target.why_not_here}, and {why}: name a board (--ssh, or --tracker and --key), or "
            "choose a target that runs here (mpqc targets)"
        )
    if not target.cuda:
        return LocalRunner(threads)
    from mpqc.cuda.measure import DeviceRunner
    from mpqc.cuda.toolkit import require
    from mpqc.model_source import Form

    require(Form(), target)  # said before the work, not after it
    return DeviceRunner()


@dataclass(frozen=True)
class _Sample:
    best: float
    median: float
    variant: str
    tile: str


def _check(
    network: OpenNetwork,
    precision: Precision | None,
    runner: Runner,
    repeat: int,
    table: LatencyTable,
) -> list[Entry]:
    """Build a network as ``compile`` does and measure it whole; rows about the network.

    Args:
        network: to be built.
        precision: of its body, the ends at eight bits; None: in float.
        runner: measures.
        repeat: passes.
        table: chooses the kernels.
    """
    from mpqc.lowering import lower
    from mpqc.select_kernel import Selector

    plan = Plan.of(network.graph, {})
    if precision is not None:
        plan = Plan.uniform(network.graph, precision)
    program = lower(network.planned(plan), network.target, Selector(network.target, table=table))
    with tempfile.TemporaryDirectory(prefix="mpqc-") as folder:
        library = _build(program, network.target, Path(folder, "whole.so"))
        (times,) = runner.measure([library], repeat)
    bits = (32, 32) if precision is None else (precision.weight, precision.activation)

    def row(kernel: str, best: float, median: float) -> Entry:
        model = network_name(network.sha256, network.batch)
        return Entry(None, "", *bits, kernel, "", "", best, median, model=model)

    rows = [row("whole", *times.whole)]
    if precision is None:
        return rows
    _, rest = attribute(program, times)
    widths = {n: Precision(p.widest, p.activation_bits) for n, p in plan.layers.items()}
    simple = LatencyCost(table, network.points, Network(rest[0], 1.0), network.macs)
    promise = simple.promise(widths)
    said = row("promise", promise, promise)
    sure = "yes" if simple.measured(widths) else "model"
    return [*rows, row("rest", *rest), replace(said, measured=sure)]


def measure_whole(
    network: OpenNetwork,
    graph: Graph,
    tables: Sequence[LatencyTable | None],
    runner: Runner,
    repeat: int,
) -> list[float]:
    """Fastest seconds of a run with the kernels that each table chooses, in turn."""
    from mpqc.lowering import lower
    from mpqc.select_kernel import Selector

    with tempfile.TemporaryDirectory(prefix="mpqc-") as folder:
        libraries = []
        for index, table in enumerate(tables):
            program = lower(graph, network.target, Selector(network.target, table=table))
            libraries.append(_build(program, network.target, Path(folder, f"{index}.so")))
        return [times.whole[0] for times in runner.measure(libraries, repeat)]


def _build(program: Program, target: Target, output: Path) -> Path:
    from mpqc.build import build

    manifest = {"target": {"name": target.name, "features": sorted(target.features)}}
    build(program, plan_memory(program), target, manifest, output)
    return output


Pair = tuple[float, float]


def attribute(program: Program, times: Times) -> tuple[dict[str, Pair], Pair]:
    """Share the steps' times out: layer name -> (fastest, median), and what belongs to none.

    A step that prepares the input of several layers is shared by them.
    """
    layers: dict[str, list[Pair]] = {record.name: [] for record in program.layers}
    rest: list[Pair] = [times.around]
    readers: dict[str, list[int]] = {}
    for index, step in enumerate(program.steps):
        for name in step.inputs:
            readers.setdefault(program.root(name), []).append(index)

    def owners(index: int) -> set[str]:
        step = program.steps[index]
        if step.kind in (*KINDS, "window_sum"):
            return {step.label}
        if step.kind not in ("pad", "pack", "expand"):
            return set()
        after = {i for name in step.outputs for i in readers.get(program.root(name), ())}
        return {name for i in after if i > index for name in owners(i)}

    for index, (best, median) in enumerate(times.steps):
        found = owners(index) & layers.keys()
        for name in found:
            layers[name].append((best / len(found), median / len(found)))
        if not found:
            rest.append((best, median))
    return {name: _sum(found) for name, found in layers.items()}, _sum(rest)


def _sum(pairs: Sequence[Pair]) -> Pair:
    return sum(best for best, _ in pairs), sum(median for _, median in pairs)


def _pairs(widths: Iterable[int]) -> list[Precision]:
    bits = sorted(set(widths))
    if not bits or not all(1 <= b <= 8 for b in bits):
        raise UsageError(f"--widths wants numbers from 1 to 8, got {list(bits)}")
    return [Precision(w, a) for w in bits for a in bits]


# ------------------------------------------------------------------------------------- inputs


def random_feeds(model: CompiledModel) -> dict[str, Array]:
    """Inputs of a model: normal floats, small integers."""
    generator = np.random.default_rng(0)
    return {name: _random(generator, kind.dtype, kind.shape) for name, kind in model.inputs.items()}


def _random(generator: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    if dtype.startswith("float"):
        return np.asarray(generator.normal(size=shape)).astype(dtype)
    return np.asarray(generator.integers(0, 2, shape)).astype(dtype)


def _random_data(graph: Graph) -> Any:
    """One feed: latency does not depend on values, only on whether codes have zero points."""
    from mpqc.data import open_data

    generator = np.random.default_rng(0)
    feeds = {
        name: _random(generator, kind.dtype, kind.shape) for name, kind in graph.inputs.items()
    }
    return open_data(feeds, graph)
