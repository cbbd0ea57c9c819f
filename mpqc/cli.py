"""The command line: parses and calls, nothing more. Heavy modules load inside the verbs."""

import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from mpqc import (
    cli_compare,
    cli_export,
    cli_finetune,
    cli_profile,
    cli_search,
    cli_tune,
    console,
    tables,
)
from mpqc.cli_options import (
    VERBOSE,
    ArtifactPath,
    Batch,
    Bits,
    BoardOptions,
    DataOption,
    Dim,
    FirstLast,
    FloatModel,
    Json,
    Key,
    Model,
    Option,
    Overwrite,
    PlanFile,
    PreprocessOption,
    Seed,
    SshHost,
    TargetOption,
    Threads,
    Timeout,
    Tracker,
    Verbose,
    Via,
    parse_dims,
    read_plan,
)
from mpqc.errors import CheckFailed, MpqcError, UsageError

INTERRUPTED, INTERNAL = 130, 70  # exit codes beside those of mpqc.errors


class _Verbs(TyperGroup):
    """Turns errors into one message and the exit code that says whose fault it was."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MpqcError as error:
            if ctx.meta.get(VERBOSE):
                traceback.print_exc()
            console.note(f"mpqc: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            console.note("mpqc: interrupted; nothing partial was left")
            raise typer.Exit(INTERRUPTED) from None


def _print_version(value: bool) -> None:
    if value:
        import mpqc

        typer.echo(f"mpqc {mpqc.__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_Verbs,
    name="mpqc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Verbs ---------------------------------------------------------------------------------------


@app.callback()
def _root(
    version: Annotated[
        bool,
        Option("--version", is_eager=True, callback=_print_version, help="Print the version."),
    ] = False,
) -> None:
    """Mixed-precision quantization compiler: ONNX to verified sub-byte kernels in a plain .so."""


@app.command(
    "compile",
    epilog="Example: mpqc compile model.onnx --bits w2a2 --data calibration.npz -o build/",
)
def compile_(
    model: Model,
    output: Annotated[
        Path, Option("--output", "-o", metavar="DIR", help="Folder for the artifact.")
    ],
    plan: PlanFile = None,
    bits: Bits = None,
    first_last: FirstLast = "w8a8",
    residual_bits: Annotated[
        int | None,
        Option("--residual-bits", min=1, max=8, help="Width of residual streams [default: float]."),
    ] = None,
    data: DataOption = None,
    preprocess: PreprocessOption = None,
    target: TargetOption = "native",
    kernel: Annotated[
        str,
        Option("--kernel", metavar="KIND", help="Force bitplane, bitplane-lut or int8 kernels."),
    ] = "auto",
    latency_table: Annotated[
        Path | None,
        Option(
            "--db",
            "--latency-table",
            metavar="F.csv",
            help="Of mpqc tune or profile: kernels are chosen by it; by default the cache's.",
        ),
    ] = None,
    static: Annotated[bool, Option("--static", help="Also a static library, model.a.")] = False,
    prefix: Annotated[
        str,
        Option("--prefix", metavar="NAME", help="Of its functions: several models, one program."),
    ] = "mpqc",
    bare: Annotated[
        bool,
        Option("--bare", help="A library without threads and heap: the caller gives the memory."),
    ] = False,
    ready_weights: Annotated[
        bool,
        Option("--ready-weights", help="Larger file, but no weights in writable memory."),
    ] = False,
    runtime: Annotated[
        Literal["none", "tvm"],
        Option("--runtime", help="none: a freestanding library; tvm: for programs that use TVM."),
    ] = "none",
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
    strict: Annotated[
        bool, Option("--strict", help="A layer that does not run as planned is an error.")
    ] = False,
    force: Annotated[
        bool, Option("--force", help="Accept a plan of another model where the names fit.")
    ] = False,
    debug_dump: Annotated[
        Path | None,
        Option("--debug-dump", metavar="DIR", help="Text of the graph after every pass."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Compile an ONNX model into an artifact: one shared library and what proves it."""
    if plan is not None and bits is not None:
        raise UsageError("--plan and --bits exclude each other: the plan says all widths")
    from mpqc.artifact import check_output
    from mpqc.data import open_data
    from mpqc.debug_dump import DebugDump
    from mpqc.graph import Precision
    from mpqc.model_source import Form
    from mpqc.pipeline import Options, compile_model
    from mpqc.rounding import Accuracy
    from mpqc.target import find_target

    check_output(output, overwrite)
    form = Form(static, prefix, bare, ready_weights, runtime)
    options = Options(
        find_target(target),
        kernel,
        calibration,
        max_samples,
        seed,
        strict,
        form,
        latency_table or "cache",
        Accuracy(rounding, bias_correction, clipping, equalize),
    )
    widths = None if bits is None else Precision.parse(bits)
    ends = None if first_last == "same" else Precision.parse(first_last)
    dims = parse_dims(dim)
    loaded = read_plan(plan, model, dims)
    with console.Phases(verbose) as phases:
        artifact = compile_model(
            model,
            output,
            options,
            plan=loaded,
            bits=widths,
            ends=ends,
            residual_bits=residual_bits,
            data=None if data is None else lambda graph: open_data(data, graph, preprocess),
            dims=dims,
            batch=batch,
            force=force,
            overwrite=overwrite,
            progress=phases,
            calibration_progress=phases.count,
            rounding_progress=phases.layer,
            callback=None if debug_dump is None else DebugDump(debug_dump, overwrite),
        )
    if plan is None and bits is None and not artifact.manifest["model"]["quantized"]:
        console.note("neither --plan nor --bits: every layer stays in float")
    result = {"artifact": str(output), "manifest": artifact.manifest, "report": artifact.report}
    console.show(result, as_json, lambda: tables.compile_table(artifact))


@app.command(epilog="Example: mpqc run build/ --input pictures.npz --output logits.npz")
def run(
    artifact: ArtifactPath,
    source: Annotated[
        str, Option("--input", metavar="X.npz", help="Samples, named as the inputs.")
    ],
    output: Annotated[Path, Option("--output", "-o", metavar="Y.npz", help="For the outputs.")],
    preprocess: PreprocessOption = None,
    threads: Threads = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Run a compiled model over a file of samples."""
    from mpqc.artifact import Artifact
    from mpqc.run_model import run_file

    result = run_file(
        Artifact.open(artifact),
        source,
        output,
        preprocess=preprocess,
        threads=threads,
        overwrite=overwrite,
    )
    console.show(result.to_json(), as_json, lambda: tables.plain(result))


@app.command(epilog="Example: mpqc verify build/ --data test.npz --layers")
def verify(
    artifact: ArtifactPath,
    data: DataOption = None,
    preprocess: PreprocessOption = None,
    layers: Annotated[
        bool, Option("--layers", help="Compare every value inside, not only outputs.")
    ] = False,
    max_samples: Annotated[int, Option("--max-samples", min=1, help="Compare so many.")] = 16,
    model: FloatModel = None,
    ssh: SshHost = None,
    tracker: Tracker = None,
    key: Key = None,
    via: Via = "",
    timeout: Timeout = 600.0,
    as_json: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Check a compiled model bit for bit against its integer reference; exit 1 if it differs."""
    from mpqc.artifact import Artifact
    from mpqc.boards.board import target_of
    from mpqc.data import open_data
    from mpqc.verify import input_graph
    from mpqc.verify import verify as verify_artifact

    where = BoardOptions(ssh, tracker, key, timeout, via)
    opened = Artifact.open(artifact)
    samples = None if data is None else open_data(data, input_graph(opened), preprocess)
    with console.Phases(verbose) as phases, where.open(target_of(opened)) as board:
        phases("verify")
        result = verify_artifact(
            opened,
            samples,
            layers=layers,
            max_samples=max_samples,
            model=model,
            seed=seed,
            board=board,
            progress=phases.count,
        )
    console.show(result.to_json(), as_json, lambda: tables.verify_table(result))
    if not result.passed:
        raise CheckFailed(f"{artifact} does not compute what its reference says")


@app.command(epilog="Example: mpqc bench build/ --against ort-fp32,ort-int8 --threads 2")
def bench(
    artifact: ArtifactPath,
    threads: Threads = 1,
    against: Annotated[
        str,
        Option(
            "--against",
            help="Some of ort-fp32, ort-int8, and on GPUs ort-cuda, torch-fp16, torch-int8, "
            "with commas between, or none.",
        ),
    ] = "ort-fp32",
    repeat: Annotated[int, Option("--repeat", min=1, help="Measured runs of each.")] = 20,
    per_layer: Annotated[bool, Option("--per-layer", help="Time every kernel too.")] = False,
    data: DataOption = None,
    preprocess: PreprocessOption = None,
    model: FloatModel = None,
    ssh: SshHost = None,
    tracker: Tracker = None,
    key: Key = None,
    via: Via = "",
    timeout: Timeout = 600.0,
    as_json: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Measure latency, run by run in turn with ONNX Runtime or PyTorch on the float model."""
    from mpqc.artifact import Artifact
    from mpqc.bench import bench as bench_artifact
    from mpqc.boards.board import target_of
    from mpqc.data import open_data
    from mpqc.verify import input_graph

    where = BoardOptions(ssh, tracker, key, timeout, via)
    opened = Artifact.open(artifact)
    if where.given:
        from mpqc.boards.bench import bench_board

        if against not in ("ort-fp32", "none", "") or data is not None:
            raise UsageError("a board measures the artifact alone: no --against, no --data")
        with console.Phases(verbose) as phases, where.open(target_of(opened), threads) as board:
            phases("measure")
            assert board is not None
            remote = bench_board(opened, board, repeat, per_layer)
        console.show(remote.to_json(), as_json, lambda: tables.bench_table(remote))
        return
    samples = None if data is None else open_data(data, input_graph(opened), preprocess)
    opponents = [name.strip() for name in against.split(",") if name.strip() not in ("", "none")]
    with console.Phases(verbose) as phases:
        phases("measure")
        result = bench_artifact(
            opened,
            threads=threads,
            repeat=repeat,
            against=opponents,
            per_layer=per_layer,
            model=model,
            data=samples,
            seed=seed,
        )
    console.show(result.to_json(), as_json, lambda: tables.bench_table(result))


@app.command(epilog="Example: mpqc inspect model.onnx --target rpi4")
def inspect(
    model: Model,
    target: Annotated[
        str | None, Option("--target", help="Forecast the kernels of this machine.")
    ] = None,
    dim: Dim = None,
    batch: Batch = 1,
    as_json: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Preflight: layers, costs and all problems at once; exit 1 if something cannot compile."""
    from mpqc.inspect_model import inspect_model
    from mpqc.target import find_target

    machine = None if target is None else find_target(target)
    with console.Phases(verbose) as phases:
        phases("inspect")
        result = inspect_model(model, machine, parse_dims(dim), batch)
    console.show(result.to_json(), as_json, lambda: tables.inspect_table(result))
    if not result.compiles:
        names = [problem.node for problem in result.problems]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise CheckFailed(f"{model} cannot be compiled because of {', '.join(names[:5])}{more}")


@app.command(epilog="Example: mpqc doctor --json")
def doctor(as_json: Json = False, verbose: Verbose = False, seed: Seed = 0) -> None:
    """What works on this machine, and what to install; exit 3 if mpqc cannot compile here."""
    from dataclasses import asdict

    from mpqc.doctor import checks
    from mpqc.errors import EnvironmentLacks

    found = checks()
    result = {"checks": [asdict(check) for check in found]}
    console.show(result, as_json, lambda: tables.doctor_table(found))
    if missing := [check.name for check in found if check.required and not check.ok]:
        raise EnvironmentLacks(f"mpqc cannot compile here without: {', '.join(missing)}")


@app.command(epilog="Example: mpqc targets")
def targets(as_json: Json = False, verbose: Verbose = False, seed: Seed = 0) -> None:
    """The machines that mpqc compiles for."""
    from mpqc.target import TARGETS, native

    known = [native(), *TARGETS.values()]
    result = {
        "targets": [
            {
                "name": target.name,
                "architecture": target.arch,
                "features": sorted(target.features),
                "vector_bits": target.vector_bits,
                "runs_here": target.runs_here,
                "about": target.about,
                "tvm": target.llvm,
            }
            for target in known
        ]
    }
    console.show(result, as_json, lambda: tables.targets_table(known))


@app.command(epilog="Example: mpqc demo --output first-look/")
def demo(
    output: Annotated[
        Path,
        Option("--output", "-o", metavar="DIR", help="Folder; an earlier demo's is replaced."),
    ] = Path("mpqc-demo"),
    as_json: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """The whole line on an embedded model: compile at several widths, verify, compare."""
    from mpqc.demo_run import run_demo

    with console.Phases(verbose) as phases:
        result = run_demo(output, seed=seed, progress=phases)
    console.show(result.to_json(), as_json, lambda: tables.demo_table(result))
    if not result.passed:
        raise CheckFailed("a build does not compute what its reference says")


for verbs in (cli_search, cli_finetune, cli_profile, cli_tune, cli_compare, cli_export):
    verbs.register(app)


def main() -> NoReturn:
    """Entry point of ``mpqc``."""
    try:
        app()
    except Exception:  # no MpqcError: those have been told already
        traceback.print_exc()
        console.note("mpqc: this is a bug in mpqc; please report it with the lines above")
        sys.exit(INTERNAL)
    sys.exit(0)
