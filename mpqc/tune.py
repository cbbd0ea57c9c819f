"""Tune the kernels of a planned model: every form of each that has several, where it will run.

A form is a variant (instruction, Winograd or direct) with a register tile. The whole network is
built once a form and stepped through, the forms of one kind of kernel in turn, so that a layer is
timed among its neighbours and a disturbance meets all forms. The fastest of each layer shape, width
pair and kind become rows of a latency table, the file that ``compile --db`` chooses kernels by; a
kind whose forms are all measured is not measured again. At last the network as it would be built
without the records and the one with them are measured whole, in turn.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqc.errors import DataError
from mpqc.graph import Graph, Precision
from mpqc.grouping import LAYERS
from mpqc.latency import KINDS, Conditions, Entry, LatencyTable, versions
from mpqc.plan import Plan
from mpqc.profile_layers import (
    REPEAT,
    Book,
    OpenNetwork,
    Progress,
    Runner,
    candidates,
    fastest,
    measure_layers,
    measure_whole,
    own_runner,
)
from mpqc.target import Target

if TYPE_CHECKING:
    from mpqc.select_kernel import Choice, Selector

AT_ONCE = 4  # libraries in turn; the default is among the first


@dataclass(frozen=True)
class TunedLayer:
    """A layer before and after.

    Attributes:
        name: of the layer.
        precision: its widths in the plan.
        before, after: kernel, variant and tile without and with the records.
        seconds: that the tuned kernel took as a step of the network; None: not measured.
    """

    name: str
    precision: Precision
    before: str
    after: str
    seconds: float | None


@dataclass(frozen=True)
class Tuned:
    """Result of ``tune``.

    Attributes:
        table: all records.
        db: their file.
        layers: in order.
        before, after: fastest seconds of a run of the whole network without and with the records;
            None where the time was up before.
        trials: libraries measured now.
        complete: whether every form of every kind is measured.
        seconds: that it took.
    """

    table: LatencyTable
    db: Path
    layers: tuple[TunedLayer, ...]
    before: float | None
    after: float | None
    trials: int
    complete: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data; times in seconds."""
        return {
            "mpqc_tune": 1,
            "target": self.table.conditions.target,
            "cpu": self.table.conditions.cpu,
            "threads": self.table.conditions.threads,
            "db": str(self.db),
            "trials": self.trials,
            "complete": self.complete,
            "seconds": round(self.seconds, 3),
            "before": self.before,
            "after": self.after,
            "layers": [
                {
                    "name": layer.name, "widths": str(layer.precision), "before": layer.before,
                    "after": layer.after, "seconds": layer.seconds,
                }
                for layer in self.layers
            ],
        }  # fmt: skip


def tune(
    model: str | Path,
    target: Target,
    plan: Plan,
    db: Path,
    *,
    trials: int | None = None,
    limit: float | None = None,
    threads: int = 1,
    repeat: int = REPEAT,
    dims: Mapping[str, int] | None = None,
    batch: int = 1,
    runner: Runner | None = None,
    progress: Progress = lambda *_: None,
) -> Tuned:
    """Measure the forms of a plan's kernels that the records lack; each kind is kept when done.

    Args:
        model: ONNX file.
        target: has to run where the runner is.
        plan: widths of the layers.
        db: records; grows if it exists.
        trials: libraries to build and measure, at most; None: all.
        limit: seconds after which no more is begun; None: no limit.
        threads: of every run.
        repeat: passes over all steps, at least.
        dims: values of symbolic dimensions.
        batch: samples of one run.
        runner: by default this process.
        progress: called with what is done, steps done, steps in all.

    Raises:
        EnvironmentLacks: this machine cannot run the target, or the board is gone.
        UsageError: a model without layers.
        PlanError: the plan is another model's.
        DataError: the records are damaged, or of another machine or version.
    """
    start = time.perf_counter()
    runs = own_runner(target, threads, "tuning measures") if runner is None else runner
    conditions = Conditions(target.name, runs.machine(), threads, versions())
    network = OpenNetwork.open(model, dims, target, batch)
    plan.check(network.graph, network.sha256)
    graph = network.planned(plan)
    book = Book(_records(db, conditions), db)
    done, complete = 0, True
    for number, kind in enumerate(KINDS):
        progress(f"forms of {kind}", number, len(KINDS) + 1)
        forms = _missing(network, graph, book.table, kind)
        left = len(forms) if trials is None else max(0, trials - done)
        found: list[Entry] = []
        tried = 0
        while tried < min(left, len(forms)) and not _over(start, limit):
            some = forms[tried : min(left, tried + AT_ONCE)]
            progress(f"{kind}: {tried + len(some)} of {len(forms)}", number, len(KINDS) + 1)
            found += measure_layers(network, graph, some, runs, repeat)
            tried += len(some)
        whole = tried == len(forms)
        if found:
            best = fastest(found)
            book.add([replace(entry, measured="tuned") for entry in best] if whole else best)
        done, complete = done + tried, complete and whole
    before = after = None
    if not _over(start, limit):
        progress("the whole network", len(KINDS), len(KINDS) + 1)
        before, after = measure_whole(network, graph, (None, book.table), runs, repeat)
    progress("done", len(KINDS) + 1, len(KINDS) + 1)
    layers = tuple(_layers(network, graph, book.table))
    took = time.perf_counter() - start
    return Tuned(book.table, db, layers, before, after, done, complete, took)


def _over(start: float, limit: float | None) -> bool:
    return limit is not None and time.perf_counter() - start > limit


def _records(db: Path, conditions: Conditions) -> LatencyTable:
    """Of the file, if there is one, and it speaks of this very machine and version."""
    if not db.exists():
        return LatencyTable(conditions)
    table = LatencyTable.load(db)
    if table.conditions != conditions:
        raise DataError(
            f"the records in {db} are of {table.conditions}, not of {conditions}: name another "
            "file with --db"
        )
    return table


def _missing(
    network: OpenNetwork, graph: Graph, table: LatencyTable, kind: str
) -> "Sequence[Selector]":
    """What to build for a kind; nothing where all its forms are measured."""
    if not network.wanted_by(graph, kind, table):
        return []
    return candidates(network.target, kind, True, graph)


def _layers(network: OpenNetwork, graph: Graph, table: LatencyTable) -> list[TunedLayer]:
    from mpqc.select_kernel import Selector

    plain, tuned = Selector(network.target), Selector(network.target, table=table)
    found = []
    for node in graph:
        if node.op not in LAYERS:
            continue
        before, after = plain.choose(graph, node), tuned.choose(graph, node)
        precision = Precision(after.layer.weight_bits, after.layer.activation_bits)
        row = table.best_row(network.points[node.name].geometry, precision, after.kind)
        seconds = None if row is None else row.seconds_min
        found.append(TunedLayer(node.name, precision, _said(before), _said(after), seconds))
    return found


def _said(choice: "Choice") -> str:
    from mpqc.profile_layers import tile_name

    return " ".join(word for word in (choice.kind, choice.variant, tile_name(choice)) if word)
