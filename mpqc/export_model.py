"""Write a quantized model for other tools: the numbers that ``compile`` would build."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from mpqc.artifact import check_output, new_file
from mpqc.data import Data
from mpqc.errors import UsageError
from mpqc.graph import Graph, Precision
from mpqc.passes.base import run
from mpqc.passes.drop_dead import DropDead
from mpqc.passes.fake_quantize_layers import FakeQuantizeLayers
from mpqc.passes.find_layers import find_integer_layers
from mpqc.passes.fold_batch_norm import FoldBatchNorm
from mpqc.passes.fold_pad import FoldPad
from mpqc.passes.round_layers import LayerProgress
from mpqc.pipeline import Options, Prepared, Progress, prepare, quantize, read_fake_quantized
from mpqc.plan import Plan

Format: TypeAlias = Literal["qdq", "qcdq", "qonnx", "integer"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: of the model.
        form: one of ``FORMATS``.
        bytes: of the file.
        opset: of its standard operators.
        widths: node name -> widths, as they stand in the nodes' metadata.
    """

    path: Path
    form: Format
    bytes: int
    opset: int
    widths: Mapping[str, Mapping[str, int]]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        layers = {name: dict(found) for name, found in self.widths.items() if "bits" not in found}
        return {
            "model": str(self.path), "format": self.form, "bytes": self.bytes,
            "opset": self.opset, "layers": layers,
        }  # fmt: skip

    @property
    def message(self) -> str:
        """One line for people."""
        layers = [found for found in self.widths.values() if "weight_bits" in found]
        return (
            f"{self.path}: {self.form}, opset {self.opset}, {len(layers)} quantized layers, "
            f"{self.bytes / 1e6:.2f} MB"
        )


def export_model(
    model: str | Path,
    output: str | Path,
    form: Format,
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
) -> Exported:
    """Quantize an ONNX model and write it in one of the forms that other tools read.

    Args:
        model: ONNX file: float with a plan or bits, or quantized already.
        output: file to write, whole or not at all.
        form: ``qdq`` (with 4- and 2-bit types), ``qcdq`` (8-bit types and Clip), ``qonnx``, or
            ``integer``: ConvInteger and MatMulInteger with the exact float steps between them.
        options: numeric choices; those of kernels and targets play no part.
        plan: widths of every layer; or
        bits: one width for the body, ``ends`` for the first layers and the classifier.
        ends: None gives them the body's width.
        data: calibration data, as ``compile_model`` takes them.
        residual_bits: width of shared float values; None keeps them as they are.
        dims: values of symbolic dimensions.
        batch: size of the batch dimension.
        force: accept a plan of another model where the names fit.
        overwrite: replace a file at ``output``.
        progress: called with each phase's name.
        calibration_progress: called with the samples done and in all (None: unknown).
        rounding_progress: called with a layer's name, the layers done and in all.

    Raises:
        MpqcError: see the children for whose fault it is; nothing is left at ``output``.
    """
    if form not in FORMATS:
        raise UsageError(f"no format {form!r}: one of {', '.join(FORMATS)}")
    check_output(Path(output), overwrite)
    prepared = prepare(
        model, options, plan=plan, bits=bits, ends=ends, data=data, residual_bits=residual_bits,
        dims=dims, batch=batch, force=force, progress=progress,
        calibration_progress=calibration_progress, rounding_progress=rounding_progress,
    )  # fmt: skip
    if not prepared.whole_plan.layers:
        raise UsageError(
            f"{model} holds no quantized layer to export: give --plan or --bits, or a model that "
            "is quantized already"
        )
    progress("export")
    from mpqc import onnx_quantized  # needs onnx's converter

    graph = _quantized(prepared, form, options, lambda: read_fake_quantized(model, dims, batch)[0])
    if form == "integer":
        written = onnx_quantized.to_integer(graph)
    else:
        written = onnx_quantized.to_dialect(graph, form)
    with new_file(Path(output), overwrite) as path:
        path.write_bytes(written)
    progress("done")
    opset, widths = onnx_quantized.opset_of(written), onnx_quantized.layer_widths(graph)
    return Exported(Path(output), form, len(written), opset, widths)


def _quantized(
    prepared: Prepared, form: Format, options: Options, given: Callable[[], Graph]
) -> Graph:
    """The integer graph, or the float graph between its quantizers.

    Layers that the model brought quantized keep the quantizers that it ``given`` them.
    """
    correct = options.accuracy.bias_correction
    if form == "integer":
        return quantize(
            prepared.graph, prepared.plan, prepared.calibration, options.method, None,
            prepared.rounded, correct,
        )  # fmt: skip
    graph = prepared.graph
    if find_integer_layers(graph):
        folded = (FoldBatchNorm(), FoldPad()) if prepared.plan.layers else ()
        graph = run(given(), *folded, DropDead())
    planned = FakeQuantizeLayers(
        prepared.plan, prepared.calibration, options.method, correct, prepared.rounded
    )
    return run(graph, planned, DropDead())
