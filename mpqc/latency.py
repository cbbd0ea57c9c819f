"""Measured latencies of layers on one machine: an open table, and what it promises.

A row is one layer shape at one width pair with one kernel; see docs/profile.md for the columns.
Points that nobody measured come from ``mpqc.latency_model`` and say so.
"""

import csv
import hashlib
import io
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mpqc.artifact import new_file
from mpqc.errors import DataError, OutputError, UsageError
from mpqc.graph import Precision

if TYPE_CHECKING:
    from mpqc.latency_model import LatencyModel
    from mpqc.passes.find_layers import Layer
    from mpqc.target import Target

KINDS = ("bitplane", "bitplane-lut", "int8")
NETWORK = "network"  # op of rows that speak of a whole model
FLOAT = "w32a32"
MEASURED = ("yes", "tuned")


@dataclass(frozen=True)
class Geometry:
    """Shape of a quantized layer, channels last, the image before padding.

    Attributes:
        op: "conv" or "matmul" (rows along ``w``).
        n, h, w, c: input image; a 1-D convolution is one row.
        out_channels: over all groups.
        kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, groups: as in ONNX.
        pad_top, pad_left, pad_bottom, pad_right: as in ONNX.
    """

    op: str
    n: int
    h: int
    w: int
    c: int
    out_channels: int
    kernel_h: int = 1
    kernel_w: int = 1
    stride_h: int = 1
    stride_w: int = 1
    dilation_h: int = 1
    dilation_w: int = 1
    groups: int = 1
    pad_top: int = 0
    pad_left: int = 0
    pad_bottom: int = 0
    pad_right: int = 0

    @property
    def out_pixels(self) -> int:
        """Of the whole batch."""
        high = self.h + self.pad_top + self.pad_bottom - self.dilation_h * (self.kernel_h - 1) - 1
        wide = self.w + self.pad_left + self.pad_right - self.dilation_w * (self.kernel_w - 1) - 1
        return self.n * (high // self.stride_h + 1) * (wide // self.stride_w + 1)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one run."""
        taps = self.kernel_h * self.kernel_w * (self.c // self.groups)
        return self.out_pixels * self.out_channels * taps


_COLUMNS = tuple(f.name for f in fields(Geometry))


@dataclass(frozen=True)
class Conditions:
    """What a latency means nothing without; one table holds one set of them.

    Attributes:
        target: name of the target.
        cpu: model of the processor that measured.
        threads: of a run.
        versions: mpqc, a digest of its kernels, TVM.
    """

    target: str
    cpu: str
    threads: int
    versions: str


@dataclass(frozen=True)
class Entry:
    """One row.

    Attributes:
        geometry: of a layer; None for a row about a whole network.
        epilogue: operators that run inside the layer's kernel, and what they leave.
        weight_bits, activation_bits: widths; 32 for a network in float.
        kernel: "bitplane", "bitplane-lut", "int8"; for networks "whole" (one run), "rest" (the
            steps that belong to no layer) and "promise" (what the table says of the whole).
        variant: instruction or form inside the kind.
        tile: register tile as pixels x vectors x lanes; on GPUs a block's as rows x columns x
            words.
        seconds_min, seconds_median: of the repetitions.
        measured: "yes"; "tuned" when every form of the kernel was; or "model": a network's
            promise may rest on points of the model.
        model: ``network_name``; empty for layers, which belong to none.
    """

    geometry: Geometry | None
    epilogue: str
    weight_bits: int
    activation_bits: int
    kernel: str
    variant: str
    tile: str
    seconds_min: float
    seconds_median: float
    measured: str = "yes"
    model: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """Rows of one key say the same thing; the last one counts."""
        widths = (self.weight_bits, self.activation_bits)
        return (self.geometry, self.epilogue, *widths, self.kernel, self.model)


_ENTRY = tuple(f.name for f in fields(Entry) if f.name != "geometry")
_CONDITIONS = tuple(f.name for f in fields(Conditions))
HEADER = (*_COLUMNS, *_ENTRY, *_CONDITIONS)


@dataclass(frozen=True)
class Network:
    """What a table knows of one model.

    Attributes:
        rest: seconds of what is no layer: input quantizers, pooling, float operators.
        factor: measured whole network over the sum of its parts; multiplies promises.
        checks: precision as text -> (promise without factor, measured) [s].
        float_seconds: the whole network in float; None where it was not measured.
    """

    rest: float
    factor: float
    checks: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    float_seconds: float | None = None

    def holds(self, precision: str) -> bool:
        """Whether the whole network was measured at a precision; w32a32 is float."""
        return self.float_seconds is not None if precision == FLOAT else precision in self.checks


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Latencies under one set of conditions."""

    conditions: Conditions
    entries: tuple[Entry, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """Read a CSV; a last line without its end, which an interruption leaves, is dropped.

        Raises:
            DataError: missing, damaged (names the line), or of several machines.
        """
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the latency table {path}: {error}") from error
        whole = text[: text.rfind("\n") + 1]
        rows = csv.reader(io.StringIO(whole))
        header = tuple(next(rows, ()))
        if header != HEADER:
            raise DataError(
                f"{path} is not a latency table of this mpqc: its first line does not name the "
                "columns; run mpqc profile again"
            )
        found: dict[tuple[object, ...], Entry] = {}
        conditions: Conditions | None = None
        for number, row in enumerate(rows, 2):
            try:
                entry, measured_under = _parse(row)
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"the latency table {path} is damaged in line {number}: {error}; delete the "
                    "line or the file and run mpqc profile again"
                ) from error
            if conditions not in (None, measured_under):
                raise DataError(
                    f"the latency table {path} mixes machines: line {number} is of "
                    f"{measured_under}, the lines before of {conditions}"
                )
            conditions = measured_under
            found[entry.key] = entry
        if conditions is None:
            raise DataError(f"the latency table {path} is empty: run mpqc profile")
        return cls(conditions, tuple(found.values()))

    def save(self, path: str | Path) -> None:
        """Write the CSV, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        with new_file(Path(path), overwrite=True) as work:
            work.write_text(_line(HEADER) + self._lines(self.entries), "utf-8", newline="")

    def appended(self, path: Path, entries: Sequence[Entry]) -> "LatencyTable":
        """The table with more rows, which also go to the end of its file in one write.

        Raises:
            OutputError: the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            raw = path.read_bytes() if path.exists() else b""
            whole = raw[: raw.rfind(b"\n") + 1]
            if whole != raw:
                path.write_bytes(whole)
            text = ("" if whole else _line(HEADER)) + self._lines(entries)
            with path.open("ab") as file:
                file.write(text.encode())
        except OSError as error:
            raise OutputError(f"cannot write the latency table {path}: {error}") from error
        return self.with_entries(entries)

    def with_entries(self, entries: Iterable[Entry]) -> "LatencyTable":
        """Rows of a known key replace it."""
        merged = {entry.key: entry for entry in (*self.entries, *entries)}
        return LatencyTable(self.conditions, tuple(merged.values()))

    def _lines(self, entries: Iterable[Entry]) -> str:
        under = [str(value) for value in asdict(self.conditions).values()]
        return "".join(_line((*_cells(entry), *under)) for entry in entries)

    # -- layers

    @cached_property
    def _by_point(self) -> dict[tuple[Geometry, int, int], dict[str, dict[str, Entry]]]:
        """(geometry, widths) -> epilogue -> kernel -> row."""
        points: dict[tuple[Geometry, int, int], dict[str, dict[str, Entry]]] = {}
        for entry in self.entries:
            if entry.geometry is not None and entry.measured in MEASURED:
                point = (entry.geometry, entry.weight_bits, entry.activation_bits)
                points.setdefault(point, {}).setdefault(entry.epilogue, {})[entry.kernel] = entry
        return points

    @cached_property
    def _kinds(self) -> dict[Geometry, tuple[str, ...]]:
        """Kernels that any width of a geometry was measured with."""
        kinds: dict[Geometry, set[str]] = {}
        for entry in self.entries:
            if entry.geometry is not None:
                kinds.setdefault(entry.geometry, set()).add(entry.kernel)
        return {geometry: tuple(sorted(found)) for geometry, found in kinds.items()}

    @cached_property
    def model(self) -> "LatencyModel":
        """Fitted to the measured rows."""
        from mpqc.latency_model import LatencyModel

        return LatencyModel.fit([e for e in self.entries if e.measured in MEASURED and e.geometry])

    def decides(self, geometry: Geometry, kernel: str) -> bool:
        """Whether a kind of kernel that is expected to be fastest was measured, at any width.

        Records without it, of a tuning that was stopped, cannot say that another is faster.
        """
        return kernel in self._kinds.get(geometry, ())

    def has(self, geometry: Geometry, epilogue: str, precision: Precision, kernel: str) -> bool:
        """Whether this very point was measured."""
        point = self._by_point.get((geometry, precision.weight, precision.activation), {})
        return kernel in point.get(epilogue, {})

    def tuned(self, geometry: Geometry, epilogue: str, precision: Precision, kernel: str) -> bool:
        """Whether every form of a kernel was measured at this point."""
        point = self._by_point.get((geometry, precision.weight, precision.activation), {})
        row = point.get(epilogue, {}).get(kernel)
        return row is not None and row.measured == "tuned"

    def seconds(
        self, geometry: Geometry, precision: Precision, epilogue: str | None = None
    ) -> tuple[float, bool]:
        """Latency of a layer with its fastest kernel, and whether that was measured.

        Args:
            geometry: of the layer.
            precision: its widths.
            epilogue: what runs inside its kernel; None takes what was measured most like it.
        """
        kernels = self._measured(geometry, precision, epilogue)
        if kernels:
            return min(kernels.values()), True
        return min(self._predicted(geometry, precision).values()), False

    def best_kernel(self, geometry: Geometry, precision: Precision) -> tuple[str, bool]:
        """Kind of the fastest kernel, and whether that was measured.

        Raises:
            UsageError: the table has no row of any kernel.
        """
        kernels = self._measured(geometry, precision, None)
        times = kernels or self._predicted(geometry, precision)
        return min(times, key=times.__getitem__), bool(kernels)

    def best_row(self, geometry: Geometry, precision: Precision, kernel: str) -> Entry | None:
        """The fastest measurement of a kind of kernel, behind whatever epilogue."""
        point = self._by_point.get((geometry, precision.weight, precision.activation), {})
        rows = [by_kernel[kernel] for by_kernel in point.values() if kernel in by_kernel]
        return min(rows, key=lambda row: row.seconds_min, default=None)

    def _measured(
        self, geometry: Geometry, precision: Precision, epilogue: str | None
    ) -> dict[str, float]:
        """Seconds by kernel; without an epilogue the mean over those measured with most kernels."""
        point = self._by_point.get((geometry, precision.weight, precision.activation), {})
        if epilogue is not None:
            return {kind: row.seconds_min for kind, row in point.get(epilogue, {}).items()}
        most = max((len(rows) for rows in point.values()), default=0)
        full = [rows for rows in point.values() if len(rows) == most]
        kinds = set.intersection(*(set(rows) for rows in full)) if full else set()
        return {
            kind: statistics.fmean(rows[kind].seconds_min for rows in full)
            for kind in sorted(kinds)
        }

    def _predicted(self, geometry: Geometry, precision: Precision) -> dict[str, float]:
        from mpqc.latency_model import exists

        kinds = self._kinds.get(geometry, KINDS)
        found = {
            kind: self.model.seconds(geometry, precision, kind)
            for kind in kinds
            if kind in self.model.kinds and exists(kind, geometry, precision)
        }
        if not found:
            raise UsageError(
                f"the latency table of {self.conditions.target} has nothing to compare a "
                f"{precision} layer with: run mpqc profile for this model"
            )
        return found

    # -- networks

    def network(self, model_sha256: str, batch: int = 1) -> Network | None:
        """What was measured of a whole model; None when nothing was."""
        name = network_name(model_sha256, batch)
        rows = [e for e in self.entries if e.geometry is None and e.model == name]
        by_kind: dict[str, dict[str, float]] = {}
        guessed = set()
        for row in rows:
            name = f"w{row.weight_bits}a{row.activation_bits}"
            by_kind.setdefault(row.kernel, {})[name] = row.seconds_min
            if row.measured == "model":
                guessed.add(name)
        rest, whole = by_kind.get("rest", {}), by_kind.get("whole", {})
        if not rest:
            return None
        promised = by_kind.get("promise", {})
        checks = {name: (promised[name], whole[name]) for name in promised if name in whole}
        sure = {name: pair for name, pair in checks.items() if name not in guessed} or checks
        factor = statistics.median(m / p for p, m in sure.values()) if sure else 1.0
        return Network(statistics.median(rest.values()), factor, checks, whole.get(FLOAT))


@dataclass(frozen=True)
class LayerPoint:
    """Where a layer of a model stands in a table."""

    geometry: Geometry
    epilogue: str


@dataclass(frozen=True)
class LatencyCost:
    """The latency objective of a search: seconds of one layer at one precision; they add up.

    The rest of the network is spread evenly over its layers, so that the sum over all of them is
    the promise for the whole network.

    Attributes:
        table: of the target.
        points: layer name -> its place in the table.
        network: of the same model.
        macs: multiply-accumulates of all layers.
    """

    table: LatencyTable
    points: Mapping[str, LayerPoint]
    network: Network
    macs: int

    def __call__(self, layer: "Layer", precision: Precision | None) -> float:
        """Promised seconds of a layer, its share of the rest included."""
        if layer.name not in self.points:
            raise UsageError(f"the latency table was not made for a model with {layer.name!r}")
        share = self.network.rest / len(self.points)
        return self.network.factor * (share + self._own(layer, precision))

    def _own(self, layer: "Layer", precision: Precision | None) -> float:
        if precision is not None:
            point = self.points[layer.name]
            return self.table.seconds(point.geometry, precision, point.epilogue)[0]
        if self.network.float_seconds is None:
            raise UsageError(
                f"layer {layer.name!r} stays in float, whose latency is not in the table: run "
                "mpqc profile without --no-check"
            )
        share = self.points[layer.name].geometry.macs / max(self.macs, 1)
        return self.network.float_seconds * share

    def measured(self, widths: Mapping[str, Precision | None]) -> bool:
        """Whether every quantized layer was measured at these widths."""
        return all(
            self.table.seconds(point.geometry, precision, point.epilogue)[1]
            for name, point in self.points.items()
            if (precision := widths.get(name)) is not None
        )

    def promise(self, widths: Mapping[str, Precision | None]) -> float:
        """Seconds of the whole network; layers without widths are in float."""
        share = self.network.rest / len(self.points)
        own = 0.0
        for name, point in self.points.items():
            precision = widths.get(name)
            if precision is not None:
                own += self.table.seconds(point.geometry, precision, point.epilogue)[0]
            elif self.network.float_seconds is not None:
                own += self.network.float_seconds * point.geometry.macs / max(self.macs, 1)
        return self.network.factor * (share * len(self.points) + own)


def network_name(model_sha256: str, batch: int = 1) -> str:
    """Of a model in rows about networks: 16 digits of its hash, and its batch from 2 on."""
    return model_sha256[:16] + (f"x{batch}" if batch > 1 else "")


CostFunction = Callable[["Layer", Precision | None], float]


def table_path(
    target: "Target", threads: int = 1, cache: Path | None = None, cpu: str | None = None
) -> Path:
    """File in the user's cache with the latencies of a target on one processor.

    Args:
        target: machine.
        threads: of every run.
        cache: folder; by default the user's.
        cpu: model of a board's processor; by default this machine's, or its GPU's.
    """
    from mpqc.bench import machine
    from mpqc.search.cache import default_cache
    from mpqc.target import gpu

    if cpu is None:
        cpu = gpu().name if target.cuda else machine({})["processor"]

    facts = [dict(target.llvm), sorted(target.features), target.vector_bits, target.cores]
    facts += [target.cuda] if target.cuda else []
    folder = (default_cache() if cache is None else cache) / "latency"
    made = _digest([facts, threads, versions()], 16)
    measured_on = _digest([cpu], 8)
    kind = target.cuda or f"{target.arch}-{target.vector_bits}"
    return folder / f"{kind}-{made}-{measured_on}.csv"


def _digest(facts: object, digits: int) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:digits]


def cached_path(target: "Target", threads: int = 1, cache: Path | None = None) -> Path | None:
    """The table that ``mpqc profile`` left for a target and these versions.

    This machine's where the target runs here; else of the board that was measured last.
    """
    own = table_path(target, threads, cache)
    if target.runs_here:
        return own if own.exists() else None
    boards = own.parent.glob(f"{own.stem.rpartition('-')[0]}-*.csv")
    return max(boards, key=lambda path: path.stat().st_mtime, default=None)


def cached_table(target: "Target", threads: int = 1, cache: Path | None = None) -> (
    LatencyTable | None
):  # fmt: skip
    """The table at ``cached_path``.

    Raises:
        DataError: it is damaged.
    """
    path = cached_path(target, threads, cache)
    return None if path is None else LatencyTable.load(path)


def versions() -> str:
    """Of what decides over speed: mpqc, a digest of the code that makes kernels, and TVM."""
    from importlib import metadata

    found = []
    for name in ("mpqc", "apache-tvm"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} source tree")
    found.insert(1, f"kernels {_kernel_digest()}")
    return "; ".join(found)


# Code that decides what a layer's kernel looks like.
_KERNEL_CODE = (
    "kernels.py", "compute.py", "compute_winograd.py", "winograd.py", "accumulators.py",
    "epilogue.py", "lowering.py", "packing.py", "cuda/codegen.py", "cuda/kernels.py",
    "cuda/lowering.py", "cuda/packing.py", "cuda/toolkit.py", "csrc/cuda_kernels.cuh",
)  # fmt: skip


@cache
def _kernel_digest() -> str:
    """Of the code as it was when the process first asked: what it has loaded."""
    from mpqc import schedules

    folder = Path(__file__).parent
    scheduled = sorted(Path(str(schedules.__file__)).parent.glob("*.py"))
    digest = hashlib.sha256()
    for path in (*(folder / name for name in _KERNEL_CODE), *scheduled):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _cells(entry: Entry) -> list[str]:
    geometry = entry.geometry
    shape = [NETWORK, *["0"] * (len(_COLUMNS) - 1)] if geometry is None else [
        str(getattr(geometry, name)) for name in _COLUMNS
    ]  # fmt: skip
    return [*shape, *(_text(getattr(entry, name)) for name in _ENTRY)]


def _text(value: object) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _line(cells: Iterable[str]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow(cells)
    return file.getvalue()


def _parse(row: Sequence[str]) -> tuple[Entry, Conditions]:
    if len(row) != len(HEADER):
        raise ValueError(f"{len(row)} columns instead of {len(HEADER)}")
    cells = dict(zip(HEADER, row, strict=True))
    seconds = {name: float(cells[name]) for name in ("seconds_min", "seconds_median")}
    if any(not 0 <= value < 1e6 for value in seconds.values()):
        raise ValueError("a latency that is no number of seconds")
    if cells["measured"] not in (*MEASURED, "model"):
        raise ValueError(f"measured is {cells['measured']!r}: neither yes, tuned nor model")
    geometry = None
    if cells["op"] != NETWORK:
        numbers = {name: int(cells[name]) for name in _COLUMNS if name != "op"}
        if cells["op"] not in ("conv", "matmul") or cells["kernel"] not in KINDS:
            raise ValueError(f"unknown op {cells['op']!r} or kernel {cells['kernel']!r}")
        geometry = Geometry(cells["op"], **numbers)
    entry = Entry(
        geometry=geometry,
        epilogue=cells["epilogue"],
        weight_bits=int(cells["weight_bits"]),
        activation_bits=int(cells["activation_bits"]),
        kernel=cells["kernel"],
        variant=cells["variant"],
        tile=cells["tile"],
        **seconds,
        measured=cells["measured"],
        model=cells["model"],
    )
    cpu, versions_ = cells["cpu"], cells["versions"]
    return entry, Conditions(cells["target"], cpu, int(cells["threads"]), versions_)
