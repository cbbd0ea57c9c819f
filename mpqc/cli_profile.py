"""The verb ``profile``; ``register`` adds it to the command line."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mpqc import console
from mpqc.cli_options import (
    Batch,
    BoardOptions,
    Dim,
    Json,
    Key,
    Model,
    Option,
    Overwrite,
    Seed,
    SshHost,
    TargetOption,
    Threads,
    Timeout,
    Tracker,
    Verbose,
    Via,
    parse_dims,
)
from mpqc.errors import UsageError
from mpqc.tables import duration

if TYPE_CHECKING:
    from mpqc.profile_layers import Profile


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("profile", epilog="Example: mpqc profile model.onnx --widths 2,4,8 -o table.csv")(
        profile
    )


def profile(
    model: Model,
    target: TargetOption = "native",
    widths: Annotated[
        str,
        Option("--widths", metavar="1,2,4", help="Candidates; all their pairs are measured."),
    ] = "1,2,3,4,8",
    threads: Threads = 1,
    repeat: Annotated[int, Option("--repeat", min=1, help="Passes over all steps, at least.")] = 15,
    output: Annotated[
        Path | None,
        Option("--output", "-o", metavar="TABLE.csv", help="Write this model's rows."),
    ] = None,
    check: Annotated[
        bool, Option("--check/--no-check", help="Measure whole networks against the table.")
    ] = True,
    dim: Dim = None,
    batch: Batch = 1,
    tiles: Annotated[
        bool, Option("--tiles", help="Also measure the tiles beside the default.")
    ] = False,
    cache: Annotated[
        Path | None, Option("--cache", metavar="DIR", help="By default the user's, $MPQC_CACHE.")
    ] = None,
    no_cache: Annotated[bool, Option("--no-cache", help="Measure anew, keep nothing.")] = False,
    ssh: SshHost = None,
    tracker: Tracker = None,
    key: Key = None,
    via: Via = "",
    timeout: Timeout = 600.0,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Measure every layer at every width with every kernel: what latency budgets are made of."""
    from mpqc.artifact import check_output
    from mpqc.profile_layers import CHECKS
    from mpqc.profile_layers import profile as measure
    from mpqc.target import find_target

    if output is not None:
        check_output(output, overwrite)
    if cache is not None and no_cache:
        raise UsageError("--cache and --no-cache exclude each other")
    machine = find_target(target)
    where = BoardOptions(ssh, tracker, key, timeout, via)
    with where.open(machine, threads) as board, Bar(verbose) as bar:
        result = measure(
            model,
            machine,
            widths=_widths(widths),
            threads=threads,
            repeat=repeat,
            checks=CHECKS if check else (),
            dims=parse_dims(dim),
            batch=batch,
            tiles=tiles,
            cache=cache,
            use_cache=not no_cache,
            runner=board,
            progress=bar,
        )
    if output is not None:
        result.own_table().save(output)
    shown = result.to_json() | {"table": None if output is None else str(output)}
    console.show(shown, as_json, lambda: table(result, output))


def _widths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--widths wants numbers with commas between, as 2,4,8; got {text!r}")
    return [int(part) for part in parts]


class Bar(Progress):
    """A bar on a terminal; with ``-v`` a line for each step elsewhere too."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        where = console.stderr()
        super().__init__(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(), console=where, transient=True, disable=not where.is_terminal,
        )  # fmt: skip
        self._row = self.add_task("import", total=None)

    def __call__(self, label: str, done: int, total: int) -> None:
        self.update(self._row, description=label, completed=done, total=total)
        if self._verbose:
            console.note(f"{label} ({done} of {total})")


def table(result: "Profile", output: Path | None = None) -> RenderableType:
    """Fastest kernel of every layer at equal widths, and how the sum compares with the whole."""
    found = result.to_json()
    names = list(dict.fromkeys(name for layer in found["layers"] for name in layer["widths"]))
    equal = [name for name in names if name[1:].partition("a")[0] == name.partition("a")[2]]
    title = f"{found['target']} ({found['cpu']}), {found['threads']} thread(s)"
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    made.add_column("layer", overflow="fold")
    for name in equal:
        made.add_column(name, justify="right", no_wrap=True)
    for layer in found["layers"]:
        cells = [
            f"{layer['widths'][name]['kernel']} {duration(layer['widths'][name]['seconds'])}"
            if name in layer["widths"] else ""
            for name in equal
        ]  # fmt: skip
        made.add_row(Text(layer["name"]), *map(Text, cells))
    lines = [
        f"{found['measured']} points measured, {found['cached']} from the cache, "
        f"{found['seconds']:.1f} s"
    ]
    error = found["model_median_error"]
    if error is not None:
        lines.append(f"points that are not measured come from a model, typically {error:.0%} off")
    network = found["network"]
    if network is not None:
        lines.append(f"what is no layer takes {duration(network['rest'])}")
        lines += [
            f"whole network at {name}: the table says {duration(check['promise'])}, measured "
            f"{duration(check['measured'])} ({check['error']:+.1%})"
            for name, check in network["checks"].items()
        ]
        lines.append(f"promises are multiplied by {network['factor']:.3f} for this model")
    lines += [f"written: {output}"] if output is not None else []
    lines += [f"cache: {found['cache']}"] if found["cache"] else []
    return Group(made, *map(Text, lines))
