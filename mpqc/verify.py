"""Verify an artifact: the compiled model against its integer reference, bit for bit.

``reference.onnx`` says in standard operators what every quantized layer computes; ONNX Runtime
runs it without rewriting it. Outputs are compared first. Where they differ, or on request, every
value that the compiled model keeps is compared. A value may differ because a float operator before
it rounded its last place differently: then the part of the reference that computes this value is
run on what the *compiled* model had there. Integer kernels must agree exactly on their own inputs.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from mpqc.artifact import Artifact
from mpqc.data import Data
from mpqc.errors import ArtifactError, MpqcError, UsageError
from mpqc.graph import Array, Graph, TensorType
from mpqc.packing import bytes_to_codes
from mpqc.runtime import Model, Steps, open_model
from mpqc.verify_original import Original, OriginalComparison

if TYPE_CHECKING:
    from mpqc.boards.board import Board

TOLERANCE = 1e-3  # of the largest magnitude, where float operators take part

ORIGINAL_SAMPLES = 64  # that are followed step by step beside a quantized original

Run: TypeAlias = Callable[[Mapping[str, Array]], Mapping[str, Array]]
Status = Literal["exact", "exact on own inputs", "float", "wrong"]
_INTEGER = frozenset({"ConvInteger", "MatMulInteger", "Round"})
_WORSE: tuple[Status, ...] = ("exact", "exact on own inputs", "float", "wrong")


@dataclass(frozen=True)
class Row:
    """What became of one value, over all samples.

    Attributes:
        value: name in the model.
        layer: node or operator that computes it.
        kernel: kind of its kernel; "" for a model output that was compared as a whole.
        status: "float" means within the tolerance of a float operator.
        difference: largest absolute difference that decided the status.
        largest: largest magnitude of the expected value.
    """

    value: str
    layer: str
    kernel: str
    status: Status
    difference: float = 0.0
    largest: float = 0.0

    @property
    def verdict(self) -> str:
        """For people."""
        if self.status in ("exact", "exact on own inputs"):
            return self.status
        name = "float" if self.status == "float" else "WRONG"
        return f"{name}, max diff {self.difference:.3g} of {self.largest:.3g}"

    def merged(self, other: "Row") -> "Row":
        """The worse of two samples."""
        rank = (_WORSE.index(self.status), self.difference / max(self.largest, 1e-30))
        rank_other = (_WORSE.index(other.status), other.difference / max(other.largest, 1e-30))
        return other if rank_other > rank else self


@dataclass(frozen=True)
class Agreement:
    """The compiled model beside the float model it came from.

    Attributes:
        samples: compared.
        top1: share of samples with the same largest class; None without a [N, classes] output.
        sqnr_db: output -> signal to quantization noise [dB]; None where there is no noise.
        accuracy, float_accuracy: share of labels met; None without labels.
    """

    samples: int
    top1: float | None
    sqnr_db: Mapping[str, float | None]
    accuracy: float | None = None
    float_accuracy: float | None = None


@dataclass(frozen=True)
class Verification:
    """Result of ``verify``.

    Attributes:
        passed: the artifact computes what its reference says.
        outputs: one row an output of the model.
        layers: one row a value inside, in order of computation; empty when not looked at.
        samples: compared.
        source: of the samples, in words.
        agreement: with the float model; None where that is not at hand.
        note: why there is no agreement; empty when there is.
        original: beside the quantized model that was compiled; None for float models, and where
            the file is not at hand.
    """

    passed: bool
    outputs: tuple[Row, ...]
    layers: tuple[Row, ...]
    samples: int
    source: str
    agreement: Agreement | None = None
    note: str = ""
    original: Original | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        return (*self.layers, *self.outputs)

    @property
    def message(self) -> str:
        """One sentence: what was compared with what, on how many samples, and the answer."""
        where = f"on {self.samples} {'sample' if self.samples == 1 else 'samples'} of {self.source}"
        wrong = [row for row in self.rows if row.status == "wrong"]
        outputs = _count(len(self.outputs), "output")
        if self.original is not None and not self.original.passed:
            return f"FAILED: {self.original.message}, {where}"
        if not self.passed:
            first = (wrong or list(self.outputs))[0]
            place = f"{first.value} ({first.layer}): {first.verdict}"
            return f"FAILED: {len(wrong)} of {len(self.rows)} values wrong {where}; first: {place}"
        if all(row.status == "exact" for row in self.outputs):
            text = f"{outputs} equal to reference.onnx bit for bit {where}"
        else:
            worst = max(row.difference / max(row.largest, 1e-30) for row in self.outputs)
            text = (
                f"{outputs} within {TOLERANCE:g} of reference.onnx {where} (largest relative "
                f"difference {worst:.2g}, from float operators)"
            )
            if worst > TOLERANCE:
                text = (
                    f"every step is right on its own inputs {where}; {outputs} {worst:.2g} from "
                    "reference.onnx, because the last places of float operators changed codes"
                )
        return f"passed: {text}{self._inside()}"

    def _inside(self) -> str:
        if not self.layers:
            return ""
        counts = {s: sum(row.status == s for row in self.layers) for s in _WORSE}
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return f"; step by step {_count(len(self.layers), 'value')}: {said}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""

        def row(entry: Row) -> dict[str, Any]:
            finite = {
                key: value if math.isfinite(value) else None
                for key, value in (("difference", entry.difference), ("largest", entry.largest))
            }
            return {**asdict(entry), **finite}

        return {
            "passed": self.passed,
            "message": self.message,
            "samples": self.samples,
            "source": self.source,
            "tolerance": TOLERANCE,
            "outputs": [row(entry) for entry in self.outputs],
            "layers": [row(entry) for entry in self.layers],
            "agreement": None if self.agreement is None else asdict(self.agreement),
            "note": self.note,
            "original": None if self.original is None else {
                **asdict(self.original), "passed": self.original.passed,
                "codes": self.original.codes, "ties": self.original.ties,
                "message": self.original.message,
            },
        }  # fmt: skip


def input_graph(artifact: Artifact) -> Graph:
    """A graph of the artifact's inputs alone: what ``open_data`` needs to check data."""
    inputs = {
        name: TensorType(kind["dtype"], tuple(kind["shape"]))
        for name, kind in artifact.manifest["inputs"].items()
    }
    return Graph(inputs, list(inputs)[:1], (), {}, {})


def verify(
    artifact: Artifact,
    data: Data | None = None,
    *,
    layers: bool = False,
    max_samples: int = 16,
    model: Path | None = None,
    seed: int = 0,
    board: "Board | None" = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Compare an artifact with its reference, and with the float model where that is at hand.

    Args:
        artifact: built for this machine, or for the board.
        data: inputs; without, random ones in the range that the input's quantizer covers.
        layers: compare every value inside too; done anyway when outputs differ.
        max_samples: at most so many.
        model: the float model; by default the one that was compiled, if it is unchanged.
        seed: of random inputs and of the choice of samples.
        board: where the compiled model runs; by default here.
        progress: called with the number of samples done.

    Raises:
        ArtifactError: the artifact is damaged, or built for another machine.
        DataError: data that do not fit.
    """
    if max_samples < 1:
        raise UsageError(f"at least one sample is needed, got {max_samples}")
    reference = artifact.reference.read_bytes()
    with contextlib.ExitStack() as stack:
        compiled: Model
        if board is None:
            compiled = stack.enter_context(open_model(artifact.library))
        else:
            compiled = board.load(artifact)
        samples = _Samples.open(compiled, reference, data, max_samples, seed)
        float_model, note = _source(artifact, model)
        comparison = _Comparison(compiled, reference)
        agreement = None if float_model is None else _Agreeing(samples.labels)
        outputs: dict[str, Row] = {}
        done = 0
        for feed, valid in samples.feeds():
            got, expected = compiled.run(feed), comparison.reference_outputs(feed)
            _merge(outputs, _compare_outputs(got, expected))
            if float_model is not None and agreement is not None:
                try:
                    agreement.add(got, float_model.session.run(feed), done, valid)
                except MpqcError as error:
                    agreement, note = None, f"the float model does not take these inputs: {error}"
            done += valid
            if progress is not None:
                progress(done)
        original = None
        if board is None and float_model is not None and float_model.graph is not None:
            original = _beside_original(float_model, float_model.graph, comparison, samples)
        inside: dict[str, Row] = {}
        if layers or any(row.status != "exact" for row in outputs.values()):
            for feed, _ in samples.feeds():
                _merge(inside, comparison.inner_values(feed))
        passed = _passes(outputs.values(), inside.values(), compiled.manifest)
        if passed:  # what is left of a difference came from float operators
            outputs = {n: replace(r, status=_floated(r.status)) for n, r in outputs.items()}
        result = agreement.result() if agreement is not None else None
    return Verification(
        passed and (original is None or original.passed),
        tuple(outputs.values()),
        tuple(inside.values()),
        done,
        samples.source,
        result,
        note if result is None else "",
        original,
    )


def _beside_original(
    source: "_Source", graph: Graph, comparison: "_Comparison", samples: "_Samples"
) -> Original:
    """The quantized file that was compiled, step by step beside the compiled model."""
    beside = OriginalComparison(
        source.name, graph, source.session, source.whole,
        comparison.reference, comparison.types, comparison.compiled.outputs,
    )  # fmt: skip
    for feed, valid in samples.feeds():
        if beside.samples >= ORIGINAL_SAMPLES:
            break
        beside.add(comparison.own_values(feed), feed, valid)
    return beside.result()


def agree(
    run: Run,
    float_run: Run,
    data: Data,
    max_samples: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Agreement:
    """Run two models over the same samples and say how far they agree.

    Args:
        run: feeds -> outputs of the model to judge.
        float_run: of the float model.
        data: inputs, with labels where accuracy is asked for.
        max_samples: at most so many; None: all.
        seed: of the choice of samples.
        progress: called with the number of samples done.
    """
    samples = _Samples.of(data, max_samples, seed)
    agreeing = _Agreeing(samples.labels)
    done = 0
    for feed, valid in samples.feeds():
        agreeing.add(run(feed), float_run(feed), done, valid)
        done += valid
        if progress is not None:
            progress(done)
    return agreeing.result()


def _floated(status: Status) -> Status:
    return "float" if status == "wrong" else status


def _passes(outputs: Any, inside: Any, manifest: Mapping[str, Any]) -> bool:
    """Equal outputs; or, behind float operators, every single step right on its own inputs.

    A float operator may round differently in the last place than ONNX Runtime's, and a quantizer
    behind it may turn that into another code: the outputs drift, though no step is wrong.
    """
    if any(row.status == "wrong" for row in inside):
        return False
    if all(row.status == "exact" for row in outputs):
        return True
    has_floats = any(step["kind"] == "float" for step in manifest["steps"])
    return has_floats and bool(inside)


def _merge(rows: dict[str, Row], found: Sequence[Row]) -> None:
    for row in found:
        rows[row.value] = rows[row.value].merged(row) if row.value in rows else row


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# Samples -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Samples:
    """Feeds, again and again the same, each with the number of samples in it that count."""

    source: str
    stream: Callable[[], Iterator[tuple[dict[str, Array], int]]]
    labels: Array | None = None

    def feeds(self) -> Iterator[tuple[dict[str, Array], int]]:
        return self.stream()

    @classmethod
    def open(
        cls, model: Model, reference: bytes, data: Data | None, most: int, seed: int
    ) -> "_Samples":
        if data is None:
            batches = [kind.shape[0] for kind in model.inputs.values() if kind.shape]
            feeds = random_feeds(model.inputs, -(-most // max([1, *batches])), reference, seed)
            valid = min([most, *batches]) if batches else 1
            return cls(
                f"random inputs, seed {seed}", lambda: ((feed, max(1, valid)) for feed in feeds)
            )
        return cls.of(data, most, seed)

    @classmethod
    def of(cls, data: Data, most: int | None, seed: int) -> "_Samples":
        chosen = data.sample(most, seed)

        def stream() -> Iterator[tuple[dict[str, Array], int]]:
            for index, feed in enumerate(chosen.feeds()):
                left = math.inf if chosen.samples is None else chosen.samples - index * chosen.batch
                yield feed, int(min(left, chosen.batch))

        return cls("the data", stream, chosen.labels)


def random_feeds(
    inputs: Mapping[str, TensorType], count: int, reference: bytes | None = None, seed: int = 0
) -> list[dict[str, Array]]:
    """Seeded random inputs.

    Args:
        inputs: name -> type.
        count: feeds.
        reference: reference model; floats then fill the range of the input's quantizer and a tenth
            beyond it, so that clipping is seen. Otherwise they are normal.
        seed: of the generator.
    """
    from mpqc.onnx_parts import quantized_ranges  # onnx is heavy

    ranges = {} if reference is None else quantized_ranges(reference)
    generator = np.random.default_rng(seed)

    def draw(name: str, kind: TensorType) -> Array:
        if kind.dtype.startswith("float"):
            if name in ranges:
                low, high = ranges[name]
                margin = (high - low) / 10
                return generator.uniform(low - margin, high + margin, kind.shape).astype(kind.dtype)
            return generator.normal(size=kind.shape).astype(kind.dtype)
        if kind.dtype == "bool":
            return generator.integers(0, 2, kind.shape).astype(bool)
        bounds = np.iinfo(kind.dtype)
        narrow = bounds.bits == 8  # pictures fill their type, indices do not
        low, high = (int(bounds.min), int(bounds.max)) if narrow else (0, 1)
        return generator.integers(low, high + 1, kind.shape).astype(kind.dtype)

    return [{name: draw(name, kind) for name, kind in inputs.items()} for _ in range(count)]


# Comparison ----------------------------------------------------------------------------------


def _difference(got: Array, expected: Array) -> float:
    """Largest absolute difference; 0 only where all is equal, infinite where one is no number."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return math.inf
    if np.array_equal(got, expected, equal_nan=got.dtype.kind == "f"):
        return 0.0
    if got.dtype == bool:
        return 1.0
    with np.errstate(invalid="ignore"):
        apart = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    apart[got == expected] = 0
    return math.inf if np.isnan(apart).any() else float(apart.max())


def _largest(array: Array) -> float:
    return float(np.abs(array.astype(np.float64)).max()) if array.size else 0.0


def _tolerable(difference: float, largest: float) -> bool:
    return difference <= TOLERANCE * largest


def _compare_outputs(got: Mapping[str, Array], expected: Mapping[str, Array]) -> list[Row]:
    rows = []
    for name, array in got.items():
        difference, largest = _difference(array, expected[name]), _largest(expected[name])
        status: Status = "exact"
        if difference:
            tolerable = array.dtype.kind == "f" and _tolerable(difference, largest)
            status = "float" if tolerable else "wrong"
        rows.append(Row(name, "output", "", status, difference, largest))
    return rows


@dataclass
class _Comparison:
    """The compiled model's inner values beside the reference's."""

    compiled: Model
    reference: bytes
    parts: dict[str, tuple[Any, bool]] = field(default_factory=dict)

    @cached_property
    def taps(self) -> dict[str, dict[str, Any]]:
        """Inner values that can be read, in order of computation."""
        taps: dict[str, dict[str, Any]] = self.compiled.manifest["taps"]
        return dict(sorted(taps.items(), key=lambda item: item[1]["step"]))

    @cached_property
    def types(self) -> dict[str, TensorType]:
        """Of every value that a part of the reference may start from."""
        inner = {
            name: TensorType(tap["dtype"], tuple(tap["shape"])) for name, tap in self.taps.items()
        }
        return {**inner, **self.compiled.inputs, **self.compiled.outputs}

    @cached_property
    def _whole(self) -> Any:
        from mpqc.ort import Session

        return Session(self.reference)

    @cached_property
    def _exposed(self) -> Any:
        from mpqc.onnx_parts import expose
        from mpqc.ort import Session

        inner = {n: self.types[n] for n in self.taps if n not in self.compiled.inputs}
        return Session(expose(self.reference, inner))

    def reference_outputs(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        expected: dict[str, Array] = self._whole.run(feed, list(self.compiled.outputs))
        return expected

    def inner_values(self, feed: Mapping[str, Array]) -> list[Row]:
        """One sample: every tapped value, then the outputs, each with a verdict."""
        own = self.own_values(feed)
        expected = {**feed, **self._exposed.run(feed)}
        rows = []
        steps = self.compiled.manifest["steps"]
        for name, tap in self.taps.items():
            step = steps[tap["step"]]
            rows.append(self._judge(name, step["label"], step["kind"], own, expected))
        for name in self.compiled.outputs:
            if name not in self.taps:
                rows.append(self._judge(name, "output", "", own, expected))
        return rows

    def own_values(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run step by step and read each value before its memory serves another."""
        stepper = self.compiled.steps(feed)
        due: dict[int, list[str]] = {}
        for name, tap in self.taps.items():
            due.setdefault(tap["step"], []).append(name)
        own = dict(feed)
        for index in range(len(stepper)):
            stepper.step(index)
            for name in due.get(index, []):
                own[name] = read_tap(stepper, self.taps[name])
        return own | dict(zip(self.compiled.outputs, stepper.results, strict=True))

    def _judge(
        self,
        name: str,
        label: str,
        kernel: str,
        own: Mapping[str, Array],
        expected: Mapping[str, Array],
    ) -> Row:
        largest = _largest(expected[name])
        difference = _difference(own[name], expected[name])
        if not difference or name in self.compiled.inputs:
            status: Status = "wrong" if difference else "exact"
            return Row(name, label, kernel, status, difference, largest)
        session, fused = self._part(name)
        again = session.run({value: own[value] for value in session.inputs})[name]
        difference, largest = _difference(own[name], again), _largest(again)
        if not difference:
            return Row(name, label, kernel, "exact on own inputs", 0.0, largest)
        # integer kernels, and float operators that only move codes, have no last place to lose
        is_float = kernel == "float" or (not kernel and not fused)
        rounds = is_float and any(own[n].dtype.kind == "f" for n in session.inputs)
        if rounds and (own[name].dtype.kind != "f" or _tolerable(difference, largest)):
            return Row(name, label, kernel, "float", difference, largest)
        return Row(name, label, kernel, "wrong", difference, largest)

    def _part(self, name: str) -> tuple[Any, bool]:
        """Session of the reference between the nearest values at hand and this one.

        Also whether an integer kernel computes it: its products and roundings never leave it.
        """
        from mpqc.onnx_parts import extract, operators
        from mpqc.ort import Session

        if name not in self.parts:
            part = extract(self.reference, self.types, name, self.types[name])
            fused = not _INTEGER.isdisjoint(operators(part))
            self.parts[name] = Session(part), fused
        return self.parts[name]


def read_tap(stepper: Steps, tap: Mapping[str, Any]) -> Array:
    """A value inside the compiled model, as the graph has it; valid right after its step.

    Args:
        stepper: has just run step ``tap["step"]``.
        tap: entry of the manifest's ``taps``.

    Returns:
        The array, channels first.
    """
    shape, perm = tuple(tap["shape"]), tuple(tap["perm"])
    stored = list(shape)
    for axis, source in enumerate(perm):  # stored.transpose(perm) is the graph's array
        stored[source] = shape[axis]
    if tap["form"] in ("planes", "words"):  # a GPU's words are the same bytes, in fours
        *pixels, channels = stored
        pixel_bytes = -(-channels // 8) if tap["form"] == "planes" else 4 * -(-channels // 32)
        kind = TensorType("uint8", (tap["bits"], *pixels, pixel_bytes))
        array = bytes_to_codes(stepper.read(tap["offset"], kind), channels)
    elif tap["form"] == "plain":
        array = stepper.read(tap["offset"], TensorType(tap["dtype"], tuple(stored)))
    else:
        raise ArtifactError(f"the manifest has a value of the unknown form {tap['form']!r}")
    return np.ascontiguousarray(array.transpose(perm) if perm else array)


# The float model -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """The model that was compiled, in ONNX Runtime.

    Attributes:
        name: of its file.
        session: the file itself, or its quantizers in standard operators.
        whole: whether it is the file itself.
        graph: operators in float between quantizers; None for a float model.
    """

    name: str
    session: Any
    whole: bool = True
    graph: Graph | None = None


def _source(artifact: Artifact, model: Path | None) -> tuple[_Source | None, str]:
    """The model that was compiled, or None and why it is not at hand."""
    from mpqc.ort import Session

    path, note = _original_file(artifact, model)
    if note:
        return None, note
    try:
        if not artifact.manifest["model"].get("quantized"):
            return _Source(path.name, Session(path)), ""
        graph = _fake_quantized(artifact, path)
        try:
            return _Source(path.name, Session(path), True, graph), ""
        except MpqcError:  # operators that ONNX Runtime does not have: QONNX
            from mpqc.onnx_export import to_onnx

            return _Source(path.name, Session(to_onnx(graph)), False, graph), ""
    except MpqcError as error:
        return None, str(error)


def _fake_quantized(artifact: Artifact, path: Path) -> Graph:
    from mpqc.pipeline import read_fake_quantized

    report = artifact.report
    return read_fake_quantized(path, report["dims"], report["batch"])[0]


def _original_file(artifact: Artifact, model: Path | None) -> tuple[Path, str]:
    """The file that was compiled, and why it is not at hand; empty when it is."""
    from mpqc.importer import sha256

    if model is not None:
        return model, ""
    try:
        report = artifact.report
    except ArtifactError as error:
        return Path(), str(error)
    path = Path(report.get("model", ""))
    if not path.is_file():
        return path, f"the float model is not at {path}"
    if sha256(path) != report.get("model_sha256"):
        return path, f"{path} has changed since it was compiled"
    return path, ""


@dataclass
class _Agreeing:
    """Sums that ``Agreement`` is made of."""

    labels: Array | None
    samples: int = 0
    same: int = 0
    classified: bool = False
    right: int = 0
    float_right: int = 0
    signal: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)

    def add(
        self, got: Mapping[str, Array], wanted: Mapping[str, Array], start: int, valid: int
    ) -> None:
        """One feed: ``valid`` samples that begin at sample ``start``."""
        self.samples += valid
        for name, array in got.items():
            if array.dtype.kind != "f" or name not in wanted:
                continue
            clean = wanted[name].astype(np.float64)
            self.signal[name] = self.signal.get(name, 0.0) + float((clean**2).sum())
            error = float(((clean - array.astype(np.float64)) ** 2).sum())
            self.noise[name] = self.noise.get(name, 0.0) + error
        for name, array in got.items():
            if array.ndim == 2 and array.shape[1] > 1 and name in wanted:
                self._classify(array[:valid], wanted[name][:valid], start)
                return

    def _classify(self, got: Array, wanted: Array, start: int) -> None:
        self.classified = True
        chosen, float_chosen = got.argmax(axis=1), wanted.argmax(axis=1)
        self.same += int((chosen == float_chosen).sum())
        if self.labels is not None:
            labels = self.labels[start : start + len(chosen)].reshape(-1)
            self.right += int((chosen == labels).sum())
            self.float_right += int((float_chosen == labels).sum())

    def result(self) -> Agreement:
        def decibel(name: str) -> float | None:
            signal, noise = self.signal[name], self.noise[name]
            if not (noise > 0 and signal > 0 and math.isfinite(signal / noise)):
                return None
            return 10 * math.log10(signal / noise)

        labelled = self.classified and self.labels is not None
        total = max(1, self.samples)
        return Agreement(
            self.samples,
            self.same / total if self.classified else None,
            {name: decibel(name) for name in self.signal},
            self.right / total if labelled else None,
            self.float_right / total if labelled else None,
        )
