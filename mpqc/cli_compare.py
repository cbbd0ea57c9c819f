"""The verb ``compare``; ``register`` adds it to the command line."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mpqc import console
from mpqc.cli_options import (
    Dim,
    Json,
    Model,
    Option,
    Overwrite,
    PreprocessOption,
    Seed,
    TargetOption,
    Threads,
    Verbose,
    parse_dims,
)
from mpqc.errors import CheckFailed, EnvironmentLacks, UsageError
from mpqc.tables import duration, quantity

if TYPE_CHECKING:
    from mpqc.compare import Comparison


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        "compare",
        epilog="Example: mpqc compare model.onnx --data test.npz --uniform w2a2,w4a4,w8a8 "
        "--plan mixed.json --require 'mixed.accuracy>=w4a4.accuracy' -o report/",
    )(compare)


def compare(
    model: Model,
    output: Annotated[
        Path, Option("--output", "-o", metavar="DIR", help="Folder; an unfinished one goes on.")
    ],
    data: Annotated[
        str,
        Option("--data", metavar="D", help="Samples to measure on, with labels for accuracy."),
    ],
    preprocess: PreprocessOption = None,
    uniform: Annotated[
        str, Option("--uniform", metavar="w4a4,w8a8", help="Uniform builds, or none.")
    ] = "w2a2,w4a4,w8a8",
    plan: Annotated[
        list[Path] | None, Option("--plan", metavar="P", help="plan.json; repeatable.")
    ] = None,
    first_last: Annotated[
        str,
        Option("--first-last", metavar="same|w8a8", help="Ends of the uniform builds."),
    ] = "w8a8",
    calibration_data: Annotated[
        str | None,
        Option("--calibration-data", metavar="D", help="For ranges; by default --data."),
    ] = None,
    max_samples: Annotated[
        int | None, Option("--max-samples", min=1, help="Measure on so many; by default all.")
    ] = None,
    target: TargetOption = "native",
    kernel: Annotated[str, Option("--kernel", metavar="KIND", help="As in compile.")] = "auto",
    against: Annotated[
        str,
        Option(
            "--against",
            help="Some of ort-fp32, ort-int8, and on GPUs ort-cuda, torch-fp16, torch-int8, or "
            "none.",
        ),
    ] = "ort-fp32,ort-int8",
    threads: Threads = 1,
    repeat: Annotated[int, Option("--repeat", min=1, help="Runs of each, at least.")] = 30,
    require: Annotated[
        list[str] | None,
        Option(
            "--require",
            metavar="EXPR",
            help="Exit 1 unless it holds: accuracy>=0.9, a.latency<=w8a8.latency; repeatable.",
        ),
    ] = None,
    plot: Annotated[bool, Option("--plot/--no-plot", help="Draw pareto.png.")] = True,
    dim: Dim = None,
    force: Annotated[
        bool, Option("--force", help="Accept plans of another model where the names fit.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Build, verify and measure uniform builds and plans side by side, and say which is best."""
    from mpqc.compare import Subject
    from mpqc.compare import compare as run
    from mpqc.graph import Precision
    from mpqc.pipeline import Options
    from mpqc.require import Requirement
    from mpqc.target import find_target

    requirements = [Requirement.parse(text) for text in require or []]
    widths = [] if uniform == "none" else [part.strip() for part in uniform.split(",")]
    if len(set(widths)) < len(widths):
        raise UsageError(f"--uniform {uniform} names a width twice")
    subject = Subject(
        model=model,
        data=data,
        preprocess=preprocess,
        calibration=calibration_data,
        uniform=tuple(map(Precision.parse, widths)),
        plans=tuple(plan or ()),
        ends=None if first_last == "same" else Precision.parse(first_last),
        max_samples=max_samples,
        dims=parse_dims(dim),
        force=force,
    )
    options = Options(find_target(target), kernel, seed=seed)
    with console.Phases(verbose) as phases:
        result = run(
            subject,
            output,
            options,
            threads=threads,
            repeat=repeat,
            against=() if against == "none" else tuple(map(str.strip, against.split(","))),
            plot=plot,
            overwrite=overwrite,
            progress=phases,
            counted=phases.count,
        )
    failures = [line for need in requirements for line in need.failures(result.builds)]
    shown = result.to_json() | {"required": list(require or []), "unmet": failures}
    console.show(shown, as_json, lambda: table(result))
    if not result.passed:
        raise CheckFailed("a build does not compute what its reference says")
    if failures:
        raise CheckFailed("required, but not so: " + "; ".join(failures))
    if plot and result.no_plot:
        raise EnvironmentLacks(f"{result.no_plot}; all but the picture is written")


def table(result: "Comparison") -> RenderableType:
    """A row a build, and the verdict."""
    made = Table(
        title=f"{result.model} on {result.target}, {result.samples} samples, "
        f"{result.threads} thread(s)",
        title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for column in ("build", ">accuracy", ">same as float", ">SQNR", ">weights", ">BitOPs",
                   ">latency", "verified", "kernels"):  # fmt: skip
        number = column.startswith(">")
        made.add_column(column.lstrip(">"), justify="right" if number else "left", no_wrap=number,
                        overflow="fold")  # fmt: skip
    for build in result.builds:
        kernels = ", ".join(f"{count} {kind}" for kind, count in (build.kernels or {}).items())
        cells = (
            build.name,
            "" if build.accuracy is None else f"{build.accuracy:.2%}",
            "" if build.agreement is None else f"{build.agreement:.2%}",
            "" if build.sqnr_db is None else f"{build.sqnr_db:.1f} dB",
            "" if build.size is None else quantity(build.size, "B"),
            "" if build.bitops is None else quantity(build.bitops),
            "" if build.latency is None else duration(build.latency),
            "" if build.verified is None else "yes" if build.verified else "WRONG",
            kernels,
        )
        made.add_row(*map(Text, cells))
    lines = [*result.verdict, *(f"note: {note}" for note in result.notes)]
    return Group(made, *map(Text, lines), Text(f"report: {result.folder}"))
