"""The verb ``tune``; ``register`` adds it to the command line."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mpqc import console
from mpqc.cli_options import (
    Batch,
    Bits,
    BoardOptions,
    Dim,
    FirstLast,
    Json,
    Key,
    Model,
    Option,
    PlanFile,
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
from mpqc.cli_profile import Bar
from mpqc.errors import UsageError
from mpqc.tables import duration

if TYPE_CHECKING:
    from mpqc.tune import Tuned

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("tune", epilog="Example: mpqc tune model.onnx --plan plan.json --db tuned.csv")(
        tune
    )


def tune(
    model: Model,
    plan: PlanFile = None,
    bits: Bits = None,
    first_last: FirstLast = "w8a8",
    target: TargetOption = "native",
    db: Annotated[
        Path, Option("--db", metavar="F.csv", help="Records; goes on from those that are there.")
    ] = Path("tuned.csv"),
    trials: Annotated[
        int | None, Option("--trials", min=1, help="Builds to measure, at most [default: all].")
    ] = None,
    time_budget: Annotated[
        str | None,
        Option("--time-budget", metavar="10m", help="Begin nothing after: 90s, 10m, 1h."),
    ] = None,
    threads: Threads = 1,
    repeat: Annotated[int, Option("--repeat", min=1, help="Passes over all steps, at least.")] = 15,
    dim: Dim = None,
    batch: Batch = 1,
    ssh: SshHost = None,
    tracker: Tracker = None,
    key: Key = None,
    via: Via = "",
    timeout: Timeout = 600.0,
    as_json: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Measure every form of a plan's kernels where they will run; compile --db takes the best."""
    from mpqc.graph import Precision
    from mpqc.importer import sha256
    from mpqc.pipeline import import_model
    from mpqc.plan import Plan
    from mpqc.target import find_target
    from mpqc.tune import tune as measure

    if model.is_dir():
        raise UsageError(
            f"{model} is a folder: give the ONNX model, and the artifact's plan with "
            f"--plan {model / 'plan.json'}"
        )
    if (plan is None) == (bits is None):
        raise UsageError("give either --plan or --bits: tuning is for the widths that will run")
    machine, dims = find_target(target), parse_dims(dim)
    planned = read_plan(plan, model, dims)
    if planned is None:
        ends = None if first_last == "same" else Precision.parse(first_last)
        graph, widths = import_model(model, dims), Precision.parse(str(bits))
        planned = Plan.uniform(graph, widths, ends, model_sha256=sha256(model))
    where = BoardOptions(ssh, tracker, key, timeout, via)
    with where.open(machine, threads) as board, Bar(verbose) as bar:
        result = measure(
            model,
            machine,
            planned,
            db,
            trials=trials,
            limit=None if time_budget is None else _seconds(time_budget),
            threads=threads,
            repeat=repeat,
            dims=dims,
            batch=batch,
            runner=board,
            progress=bar,
        )
    console.show(result.to_json(), as_json, lambda: table(result))


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if found is None:
        raise UsageError(
            f"--time-budget wants a time with its unit, as 90s, 10m or 1h; got {text!r}"
        )
    return float(found[1]) * _UNITS[found[2]]


def table(result: "Tuned") -> RenderableType:
    """Kernels before and after of the layers that changed, and what the network gains."""
    machine = result.table.conditions
    title = f"{machine.target} ({machine.cpu}), {machine.threads} thread(s)"
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("layer", "widths", "by the model", "by the records"):
        made.add_column(name, overflow="fold")
    made.add_column("takes", justify="right", no_wrap=True)
    changed = [layer for layer in result.layers if layer.before != layer.after]
    for layer in changed:
        took = "" if layer.seconds is None else duration(layer.seconds)
        cells = (layer.name, str(layer.precision), layer.before, layer.after, took)
        made.add_row(*map(Text, cells))
    lines = [
        f"{len(changed)} of {len(result.layers)} layers take another kernel; {result.trials} "
        f"builds measured in {result.seconds:.0f} s"
    ]
    if result.before is not None and result.after is not None:
        lines.append(
            f"whole network: {duration(result.before)} without the records, "
            f"{duration(result.after)} with them: {result.before / result.after:.2f} times as fast"
        )
    if not result.complete:
        lines.append("not all forms are measured yet: the same command goes on from here")
    lines.append(f"records: {result.db}; mpqc compile --db {result.db} takes the fastest kernels")
    return Group(*([made] if changed else []), *map(Text, lines))
