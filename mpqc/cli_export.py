"""The verb ``export``; ``register`` adds it to the command line."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from mpqc import console
from mpqc.cli_options import (
    Batch,
    Bits,
    DataOption,
    Dim,
    FirstLast,
    Json,
    Model,
    Option,
    Overwrite,
    PlanFile,
    PreprocessOption,
    Seed,
    Verbose,
    parse_dims,
    read_plan,
)
from mpqc.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        "export",
        epilog="Example: mpqc export model.onnx --plan plan.json --data calibration.npz "
        "--format qdq -o quantized.onnx",
    )(export)


def export(
    model: Model,
    output: Annotated[Path, Option("--output", "-o", metavar="F.onnx", help="For the model.")],
    form: Annotated[
        Literal["qdq", "qcdq", "qonnx", "integer"],
        Option(
            "--format",
            help="qdq: ONNX's 8-, 4- and 2-bit types; qcdq: 8-bit types and Clip, for older "
            "consumers; qonnx: Quant nodes; integer: ConvInteger and MatMulInteger.",
        ),
    ] = "qdq",
    plan: PlanFile = None,
    bits: Bits = None,
    first_last: FirstLast = "w8a8",
    residual_bits: Annotated[
        int | None,
        Option("--residual-bits", min=1, max=8, help="Width of residual streams [default: float]."),
    ] = None,
    data: DataOption = None,
    preprocess: PreprocessOption = None,
    dim: Dim = None,
    batch: Batch = 1,
    calibration: Annotated[
        Literal["mse", "minmax", "percentile", "entropy"],
        Option("--calibration", help="How ranges of activations are clipped."),
    ] = "mse",
    max_samples: Annotated[
        int, Option("--max-samples", min=1, help="Of calibration data, drawn by --seed.")
    ] = 256,
    rounding: Annotated[
        Literal["gptq", "nearest"],
        Option("--rounding", help="Below 8 bits: compensate rounding errors on the data, or not."),
    ] = "gptq",
    clipping: Annotated[
        Literal["output", "mse"],
        Option("--clipping", help="Below 8 bits: clip by the layers' outputs, or by the values."),
    ] = "output",
    bias_correction: Annotated[
        bool,
        Option("--bias-correction/--no-bias-correction", help="Keep the mean of each channel."),
    ] = True,
    equalize: Annotated[
        Literal["auto", "on", "off"],
        Option("--equalize", help="Move scale between channels of neighbouring layers."),
    ] = "off",
    force: Annotated[
        bool, Option("--force", help="Accept a plan of another model where the names fit.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Write the quantized model for other tools: the numbers that compile would build."""
    if plan is not None and bits is not None:
        raise UsageError("--plan and --bits exclude each other: the plan says all widths")
    from mpqc.data import open_data
    from mpqc.export_model import export_model
    from mpqc.graph import Precision
    from mpqc.pipeline import Options
    from mpqc.rounding import Accuracy
    from mpqc.target import find_target

    dims = parse_dims(dim)
    options = Options(
        find_target("native"),
        method=calibration,
        max_samples=max_samples,
        seed=seed,
        accuracy=Accuracy(rounding, bias_correction, clipping, equalize),
    )
    with console.Phases(verbose) as phases:
        exported = export_model(
            model,
            output,
            form,
            options,
            plan=read_plan(plan, model, dims),
            bits=None if bits is None else Precision.parse(bits),
            ends=None if first_last == "same" else Precision.parse(first_last),
            data=None if data is None else lambda graph: open_data(data, graph, preprocess),
            residual_bits=residual_bits,
            dims=dims,
            batch=batch,
            force=force,
            overwrite=overwrite,
            progress=phases,
            calibration_progress=phases.count,
            rounding_progress=phases.layer,
        )
    console.show(exported.to_json(), as_json, lambda: exported.message)
