"""Options that several verbs share, so that they read and mean the same in each."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpqc.errors import UsageError

if TYPE_CHECKING:
    from mpqc.artifact import Artifact
    from mpqc.boards.board import Board
    from mpqc.plan import Plan

VERBOSE = "mpqc.verbose"  # where the context remembers -v, for messages about errors


def _remember(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[VERBOSE] = value
    return value


Option, Argument = typer.Option, typer.Argument
Json = Annotated[bool, Option("--json", help="The result as one JSON object on stdout.")]
Verbose = Annotated[
    bool,
    Option("--verbose", "-v", help="Say more; errors with traceback.", callback=_remember),
]
Seed = Annotated[int, Option("--seed", min=0, help="Of everything random.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an existing output.")]
Model = Annotated[Path, Argument(metavar="MODEL", help="ONNX file.")]
ArtifactPath = Annotated[
    Path, Argument(metavar="ARTIFACT", help="Folder that compile left, or its model.so.")
]
FloatModel = Annotated[
    Path | None,
    Option("--model", help="The float model, where it has moved since it was compiled."),
]
DataOption = Annotated[
    str | None,
    Option("--data", metavar="D", help="FILE.npz named as the inputs, or module.py:function."),
]
PreprocessOption = Annotated[
    Path | None,
    Option("--preprocess", metavar="F", help="TOML: how uint8 pictures become numbers."),
]
TargetOption = Annotated[
    str, Option("--target", help="Machine: see mpqc targets; or a TVM target dict.")
]
Dim = Annotated[
    list[str] | None,
    Option("--dim", metavar="NAME=VALUE", help="Value of a symbolic dimension; repeatable."),
]
Batch = Annotated[int, Option("--batch", min=1, help="Samples of one run.")]
Threads = Annotated[int, Option("--threads", min=1, help="Of every run.")]

SshHost = Annotated[
    str | None,
    Option("--ssh", metavar="USER@HOST", help="Run on this board; the artifact is for it."),
]
Timeout = Annotated[
    float, Option("--timeout", min=1, help="Seconds that a command on the board may take.")
]


@contextlib.contextmanager
def board_or_here(
    host: str | None, artifact: "Artifact", timeout: float, threads: int = 1
) -> "Iterator[Board | None]":
    """The board that --ssh names; None without."""
    if host is None:
        yield None
        return
    from mpqc.boards.board import Board, target_of

    with Board(host, target_of(artifact), threads, timeout) as board:
        yield board


def read_plan(path: Path | None, model: Path, dims: dict[str, int]) -> "Plan | None":
    """The plan of ``--plan``: ours or another tool's, of which a line on stderr tells."""
    if path is None:
        return None
    from mpqc import console
    from mpqc.foreign_plan import load_plan

    plan, foreign = load_plan(path, model, dims)
    if foreign is not None:
        console.note(foreign.message)
    return plan


def parse_dims(pairs: list[str] | None) -> dict[str, int]:
    """``["N=4"]`` -> ``{"N": 4}``.

    Raises:
        UsageError: not a name and a positive number.
    """
    dims = {}
    for pair in pairs or []:
        name, _, value = pair.rpartition("=")
        if not name or not value.isdecimal() or int(value) < 1:
            raise UsageError(f"--dim wants NAME=VALUE with a positive number, got {pair!r}")
        dims[name] = int(value)
    return dims
