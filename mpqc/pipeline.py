"""The compiler on one page: import, calibrate, quantize, lower, build."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpqc import importer
from mpqc.artifact import (
    LIBRARY,
    MANIFEST,
    PLAN,
    REFERENCE,
    REPORT,
    Artifact,
    new_folder,
    write_json,
)
from mpqc.calibration import Calibration, calibrate
from mpqc.data import Data
from mpqc.errors import ModelError, UsageError
from mpqc.graph import QUANTIZED_OPS, Graph, Node, Precision
from mpqc.histogram import Method
from mpqc.model_source import Form
from mpqc.onnx_export import to_onnx
from mpqc.passes.base import Callback, run
from mpqc.passes.channels_last import ChannelsLast
from mpqc.passes.commute_quantize import CommuteQuantize
from mpqc.passes.drop_dead import DropDead
from mpqc.passes.equalize_layers import EqualizeLayers
from mpqc.passes.estimate_cost import estimate_cost
from mpqc.passes.find_layers import (
    find_float_layers,
    find_integer_layers,
    find_layers,
    shared_tensors,
)
from mpqc.passes.fold_batch_norm import FoldBatchNorm
from mpqc.passes.fold_bias import FoldBias
from mpqc.passes.fold_pad import FoldPad
from mpqc.passes.fuse_requantize import FuseRequantize
from mpqc.passes.group_channels import GroupChannels, part_of
from mpqc.passes.integer_layers import IntegerLayers, integer_layers
from mpqc.passes.quantize_layers import QuantizeLayers, tensors_to_calibrate
from mpqc.passes.read_arithmetic import ReadArithmetic
from mpqc.passes.read_quantizers import ReadQuantizers, read_quantizers
from mpqc.passes.round_layers import LayerProgress, round_layers
from mpqc.passes.split_dequantize import SplitDequantize
from mpqc.plan import LayerPlan, Plan
from mpqc.program import LayerRecord, MemoryPlan, Program, plan_memory
from mpqc.rounding import Accuracy, RoundedLayer
from mpqc.target import Target

if TYPE_CHECKING:
    from mpqc.latency import LatencyTable
    from mpqc.select_kernel import Selector

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a compilation depends on beside model, plan and data.

    Attributes:
        target: machine to build for.
        kernel: "auto" or the kind to force.
        method: how activation ranges are clipped.
        max_samples: of calibration data.
        seed: of the calibration sample.
        strict: a layer that does not run as planned is an error.
        form: kind of library: static too, with threads or bare.
        latencies: table by which kernels are chosen: a file of ``mpqc profile``, what the user's
            cache holds for the target (if anything), or None: the model of its instructions.
        accuracy: what is done for accuracy below eight bits.
    """

    target: Target
    kernel: str = "auto"
    method: Method = "mse"
    max_samples: int | None = 256
    seed: int = 0
    strict: bool = False
    form: Form = Form()  # noqa: RUF009 - frozen
    latencies: Path | Literal["cache"] | None = "cache"
    accuracy: Accuracy = Accuracy()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Imported:
    """A model as the compiler takes it.

    Attributes:
        graph: static shapes, BatchNormalization and pads folded; where the model was quantized
            already, its layers compute on codes.
        kept: node of a quantized model -> why its arithmetic stays in float.
    """

    graph: Graph
    kept: Mapping[str, str]


def read_model(
    path: str | Path,
    dims: Mapping[str, int] | None = None,
    batch: int = 1,
    callback: Callback | None = None,
) -> Imported:
    """ONNX file, float or quantized, to what the compiler starts from."""
    fake, kept = read_fake_quantized(path, dims, batch, callback)
    graph, floats = integer_layers(fake)
    if callback is not None:
        callback(IntegerLayers(), graph)
    graph = run(graph, FoldBatchNorm(), FoldPad(), DropDead(), callback=callback)
    return Imported(graph, kept | {layer.node: layer.reason for layer in floats})


def read_fake_quantized(
    path: str | Path,
    dims: Mapping[str, int] | None = None,
    batch: int = 1,
    callback: Callback | None = None,
) -> tuple[Graph, dict[str, str]]:
    """The model's operators in float between its quantizers, and what stays float and why."""
    reading = read_quantizers(importer.load(path, dims, batch))
    if callback is not None:
        callback(ReadQuantizers(), reading.graph)
    graph = run(reading.graph, ReadArithmetic(), callback=callback)
    return graph, {kept.node: kept.reason for kept in reading.kept}


def import_model(
    path: str | Path,
    dims: Mapping[str, int] | None = None,
    batch: int = 1,
    callback: Callback | None = None,
) -> Graph:
    """The graph of ``read_model``."""
    return read_model(path, dims, batch, callback).graph


def calibrate_plan(
    graph: Graph,
    plan: Plan,
    data: Data | None,
    options: Options,
    progress: Callable[[int, int | None], None] | None = None,
) -> Calibration:
    """Histograms of every tensor that the plan quantizes."""
    tensors = tensors_to_calibrate(graph, plan)
    if not tensors:
        return Calibration({}, samples=0)
    if data is None:
        raise UsageError("quantizing needs calibration data: give --data")
    return calibrate(
        graph, data, tensors, max_samples=options.max_samples, seed=options.seed, progress=progress
    )


def equalize(
    graph: Graph, plan: Plan, accuracy: Accuracy, callback: Callback | None = None
) -> Graph:
    """The same float function, whose channels suit common scales better."""
    if not plan.narrow or accuracy.equalize == "off":
        return graph
    return run(graph, EqualizeLayers(accuracy.equalize == "on"), callback=callback)


def round_plan(
    graph: Graph,
    plan: Plan,
    calibration: Calibration,
    data: Data | None,
    options: Options,
    progress: LayerProgress | None = None,
) -> Mapping[str, RoundedLayer]:
    """What layers compute with, where that is more than rounding to nearest."""
    if data is None or not plan.narrow or not options.accuracy.reads_data:
        return {}
    return round_layers(
        graph,
        plan,
        calibration,
        data.sample(options.max_samples, options.seed),
        options.accuracy,
        method=options.method,
        seed=options.seed,
        progress=progress,
    )


def quantize(
    graph: Graph,
    plan: Plan,
    calibration: Calibration,
    method: Method = "mse",
    callback: Callback | None = None,
    rounded: Mapping[str, RoundedLayer] | None = None,
    correct_bias: bool = True,
) -> Graph:
    """Float graph and plan to the exact integer graph that everything after computes."""
    return run(
        graph,
        QuantizeLayers(plan, calibration, method, correct_bias, rounded or {}),
        FoldBias(),
        CommuteQuantize(),
        FuseRequantize(),
        DropDead(),
        callback=callback,
    )


def lower(
    quantized: Graph, plan: Plan | None, options: Options, callback: Callback | None = None
) -> Program:
    """Integer graph to scheduled kernels and the steps that call them."""
    from mpqc import lowering

    selector = _selector(plan, options)
    last = channels_last(quantized, callback)
    last = run(last, GroupChannels(expected_cycles(selector, last)), DropDead(), callback=callback)
    parts = {node.name: part_of(node) for node in last}
    of_parts = {part: selector.by_layer.get(whole, "auto") for part, whole in parts.items()}
    program = lowering.lower(last, options.target, replace(selector, by_layer=of_parts))
    program.layers = _whole(program.layers, parts)
    known = quantized.types  # the reference has no values of parts
    program.taps = {value: tap for value, tap in program.taps.items() if value in known}
    program.steps = [replace(s, label=parts.get(s.label, s.label)) for s in program.steps]
    return program


def expected_cycles(selector: "Selector", network: Graph) -> Callable[[Graph, Node], float]:
    """What the kernel of a layer, or of a part of one, is expected to take inside of a network."""
    from mpqc.select_kernel import count_weights

    of_all = replace(selector, weights=count_weights(network))

    def cycles(graph: Graph, node: Node) -> float:
        choice = of_all.choose(graph, node)
        weight = graph.constants[node.inputs[1]]
        macs = graph.type(node.output).elements * (weight.size // graph.shape(node.output)[-1])
        return macs / max(choice.rates[choice.kind], 1e-9)

    return cycles


def _whole(records: Sequence[LayerRecord], parts: Mapping[str, str]) -> list[LayerRecord]:
    """Records of layers from those of their parts."""
    found: dict[str, list[LayerRecord]] = {}
    for record in records:
        found.setdefault(parts[record.name], []).append(record)
    return [LayerRecord.joined(name, rows) for name, rows in found.items()]


def channels_last(quantized: Graph, callback: Callback | None = None) -> Graph:
    """Integer graph in the layout that lowering takes."""
    return run(quantized, ChannelsLast(), SplitDequantize(), DropDead(), callback=callback)


def _selector(plan: Plan | None, options: Options) -> "Selector":
    from mpqc.select_kernel import Selector

    kernels = {name: layer.kernel for name, layer in plan.layers.items()} if plan else {}
    return Selector(options.target, options.kernel, kernels, _latencies(options))


def _latencies(options: Options) -> "LatencyTable | None":
    from mpqc.latency import LatencyTable, cached_table

    if options.kernel != "auto" or options.latencies is None:
        return None
    if options.latencies != "cache":
        return LatencyTable.load(options.latencies)
    return cached_table(options.target)


@dataclass(frozen=True)
class Prepared:
    """A model before its planned layers become integers.

    Attributes:
        graph: folded and equalized; float, but for the layers of a model that was quantized.
        plan: widths of its layers, checked.
        calibration: of the values that the plan quantizes.
        rounded: what layers compute with, where that is more than rounding to nearest.
        sha256: of the model file.
        kept: node of a quantized model -> why its arithmetic stays in float.
    """

    graph: Graph
    plan: Plan
    calibration: Calibration
    rounded: Mapping[str, RoundedLayer]
    sha256: str
    kept: Mapping[str, str]

    @property
    def whole_plan(self) -> Plan:
        """The plan with the widths that the model brought."""
        brought = {
            layer.name: LayerPlan(weight_bits=found.weight, activation_bits=found.activation)
            for layer, found in find_integer_layers(self.graph).items()
        }
        return self.plan.model_copy(update={"layers": {**brought, **self.plan.layers}})


def prepare(
    model: str | Path,
    options: Options,
    *,
    plan: Plan | None = None,
    bits: Precision | None = None,
    ends: Precision | None = Precision(8, 8),  # noqa: B008 - frozen
    data: Data | Callable[[Graph], Data] | None = None,
    residual_bits: int | None = None,
    dims: Mapping[str, int] | None = None,
    batch: int = 1,
    force: bool = False,
    progress: Progress = lambda _: None,
    calibration_progress: Callable[[int, int | None], None] | None = None,
    rounding_progress: LayerProgress | None = None,
    callback: Callback | None = None,
) -> Prepared:
    """Import, plan, calibrate and round: all that compiling and exporting share.

    The arguments are those of ``compile_model``.
    """
    progress("import")
    imported = read_model(model, dims, batch, callback)
    graph, sha256 = imported.graph, importer.sha256(model)
    if (plan is not None or bits is not None) and not find_layers(graph):
        _refuse_widths(Path(model), graph)
    if plan is None:
        plan = Plan.of(graph, {}, model_sha256=sha256)
        if bits is not None:
            plan = Plan.uniform(graph, bits, ends, model_sha256=sha256)
    if residual_bits is not None:
        plan = plan.with_tensors(shared_tensors(graph, plan.layers), residual_bits)
    plan.check(graph, sha256, force)
    _selector(plan, options)  # a kernel that does not exist is said before the work
    _refuse_unknown(graph)
    progress("calibrate")
    graph = equalize(graph, plan, options.accuracy, callback)
    opened = data(graph) if callable(data) else data
    calibration = calibrate_plan(graph, plan, opened, options, calibration_progress)
    progress("round")
    rounded = round_plan(graph, plan, calibration, opened, options, rounding_progress)
    return Prepared(graph, plan, calibration, rounded, sha256, imported.kept)


def _refuse_widths(model: Path, graph: Graph) -> None:
    if found := find_integer_layers(graph):
        widths = ", ".join(sorted({str(precision) for precision in found.values()}))
        raise UsageError(
            f"{model} is quantized already ({widths}): leave out --bits and --plan, or give the "
            "float model that it came from"
        )


def compile_model(
    model: str | Path,
    output: str | Path,
    options: Options,
    *,
    plan: Plan | None = None,
    bits: Precision | None = None,
    ends: Precision | None = Precision(8, 8),  # noqa: B008 - frozen
    data: Data | Callable[[Graph], Data] | None = None,
    residual_bits: int | None = None,
    dims: Mapping[str, int] | None = None,
    batch: int = 1,
    force: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
    calibration_progress: Callable[[int, int | None], None] | None = None,
    rounding_progress: LayerProgress | None = None,
    callback: Callback | None = None,
) -> Artifact:
    """Compile an ONNX model into an artifact folder.

    Args:
        model: ONNX file.
        output: folder to create.
        options: target and numeric choices.
        plan: widths of every layer; or
        bits: one width for the body, ``ends`` for the first layers and the classifier.
        ends: None gives them the body's width.
        data: calibration data, or what opens them for the imported graph; needed when something
            is quantized.
        residual_bits: width of the float values that layers and other operators share; None
            keeps them float32, or as the plan says.
        dims: values of symbolic dimensions.
        batch: size of the batch dimension.
        force: accept a plan of another model where the names fit.
        overwrite: replace an artifact at ``output``.
        progress: called with each phase's name.
        calibration_progress: called with the samples done and in all (None: unknown).
        rounding_progress: called with a layer's name, the layers done and in all.
        callback: called with each pass and the graph that it left.

    Raises:
        MpqcError: see the children for whose fault it is; nothing is left at ``output``.
    """
    clock = _Clock(progress)
    if options.target.cuda:
        from mpqc.cuda.toolkit import require

        require(options.form, options.target)  # said before the work, not after it
    with new_folder(Path(output), overwrite) as folder:
        prepared = prepare(
            model, options, plan=plan, bits=bits, ends=ends, data=data,
            residual_bits=residual_bits, dims=dims, batch=batch, force=force, progress=clock,
            calibration_progress=calibration_progress, rounding_progress=rounding_progress,
            callback=callback,
        )  # fmt: skip
        graph, plan, sha256 = prepared.graph, prepared.plan, prepared.sha256
        clock("quantize")
        quantized = quantize(
            graph,
            plan,
            prepared.calibration,
            options.method,
            callback,
            prepared.rounded,
            options.accuracy.bias_correction,
        )
        (folder / REFERENCE).write_bytes(to_onnx(quantized))
        clock("lower")
        program = lower(quantized, plan, options, callback)
        layers = _all_layers(graph, program, prepared)
        _check_strict(layers, options)
        clock("build")
        from mpqc.build import build

        memory = plan_memory(program)
        manifest = _manifest(Path(model), prepared, program, memory, layers, options)
        built = build(program, memory, options.target, manifest, folder / LIBRARY, options.form)
        clock("done")
        write_json(folder / MANIFEST, manifest)
        prepared.whole_plan.save(folder / PLAN)
        cost = estimate_cost(graph, plan)
        write_json(folder / REPORT, {
            "model": str(Path(model).resolve()),
            "model_sha256": sha256,
            "dims": dict(dims or {}),
            "batch": batch,
            "cost": {"bitops": cost.bitops, "size": cost.size, "scale_bytes": cost.scale_bytes,
                     "bias_bytes": cost.bias_bytes},
            "bytes": {"library": built.library.stat().st_size, "weights": built.weight_bytes,
                      "arena": memory.size, "arena_lower_bound": memory.lower_bound,
                      "scratch": built.scratch_bytes, "shared": built.shared_bytes},
            "seconds": clock.seconds,
        })  # fmt: skip
    return Artifact(Path(output))


def _refuse_unknown(graph: Graph) -> None:
    """Name every operator that has no kernel before the work, not the first one after it."""
    from mpqc.onnx_to_tir import unsupported

    layers = {layer.name for layer in find_layers(graph)}
    others = (n for n in graph if n.name not in layers and n.op not in QUANTIZED_OPS)
    refused = unsupported(others)
    if refused:
        lines = "".join(f"\n  {node.name}: {reason}" for node, reason in refused)
        raise ModelError(f"{len(refused)} nodes cannot be compiled:{lines}")


def _all_layers(graph: Graph, program: Program, prepared: Prepared) -> list[LayerRecord]:
    """Layers in the model's order: what the kernels run, and what stayed float and why."""
    kept, planned = prepared.kept, prepared.plan.layers
    run_ = {record.name: record for record in program.layers}
    run_ |= {
        name: replace(run_[name], asked=layer.text, channels=layer.counts)
        for name, layer in planned.items()
        if name in run_
    }
    records = []
    macs = {layer.name: layer.macs for layer in find_layers(graph)}
    reasons = {layer.name: layer.reason for layer in find_float_layers(graph)}
    for node in graph:
        if node.name in run_:
            records.append(run_[node.name])
        elif node.name in macs:
            records.append(LayerRecord(node.name, None, None, "float", macs=macs[node.name],
                                       reason=kept.get(node.name, "the plan leaves it in "
                                                       "float")))  # fmt: skip
        elif node.name in reasons:
            reason = kept.get(node.name, reasons[node.name])
            records.append(LayerRecord(node.name, None, None, "float", reason=reason))
    return records


def _check_strict(layers: Sequence[LayerRecord], options: Options) -> None:
    if not options.strict:
        return
    fallbacks = [f"{layer.name} ({layer.reason})" for layer in layers if layer.reason]
    if fallbacks:
        raise UsageError(f"--strict: these layers do not run as planned: {'; '.join(fallbacks)}")


def _manifest(
    model: Path,
    prepared: Prepared,
    program: Program,
    memory: MemoryPlan,
    layers: Sequence[LayerRecord],
    options: Options,
) -> dict[str, Any]:
    target = options.target
    return {
        "mpqc_manifest": 1,
        "model": {"file": model.name, "sha256": prepared.sha256,
                  "quantized": bool(find_integer_layers(prepared.graph))},
        "target": {"name": target.name, "arch": target.arch, "llvm": target.llvm,
                   "features": sorted(target.features), "cuda": target.cuda},
        "inputs": {n: {"dtype": t.dtype, "shape": t.shape} for n, t in program.inputs.items()},
        "outputs": {n: {"dtype": t.dtype, "shape": t.shape} for n, t in program.outputs.items()},
        "layers": [asdict(layer) for layer in layers],
        "kept": dict(prepared.kept),
        "floats": dict(program.floats),
        "fallbacks": sum(bool(layer.reason) for layer in layers),
        "kernel": options.kernel,
        "runtime": options.form.runtime,
        "steps": [{"label": s.label, "kind": s.kind, "kernel": s.kernel} for s in program.steps],
        "taps": _taps(program, memory),
        "memory": {"arena": memory.size, "lower_bound": memory.lower_bound},
        "calibration": {"method": options.method, "max_samples": options.max_samples,
                        "seed": options.seed, "accuracy": asdict(options.accuracy)},
        "versions": versions(),
    }  # fmt: skip


def _taps(program: Program, memory: MemoryPlan) -> dict[str, Any]:
    """Where verification finds intermediate values; inputs and outputs are seen anyway."""
    taps = {}
    for value, tap in program.taps.items():
        root = program.root(tap.buffer)
        if root not in memory.offsets:
            continue
        kind = program.buffers[root]
        taps[value] = {
            "offset": memory.offsets[root], "form": tap.form,
            "dtype": "uint8" if tap.form == "words" else kind.dtype,
            "shape": tap.shape, "perm": tap.perm, "bits": tap.bits, "step": tap.step,
        }  # fmt: skip
    return taps


def versions() -> dict[str, str]:
    """Of everything that shapes the generated code."""
    names = ("mpqc", "apache-tvm", "apache-tvm-ffi", "onnx", "onnxruntime", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "source tree"
    return found


class _Clock:
    """Phase times [s], told to the progress callback as they start."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._phase, self._start = progress, "", 0.0
        self.seconds: dict[str, float] = {}

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        if self._phase:
            self.seconds[self._phase] = round(now - self._start, 3)
        self._phase, self._start = phase, now
        self._progress(phase)
