"""Options that several verbs share, so that they read and mean the same in each."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpqc import console
from mpqc.errors import UsageError

if TYPE_CHECKING:
    from mpqc.boards.board import Board
    from mpqc.boards.connection import Connection
    from mpqc.plan import Plan
    from mpqc.target import Target

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
PlanFile = Annotated[
    Path | None, Option("--plan", metavar="P", help="plan.json: widths of every layer.")
]
Bits = Annotated[
    str | None, Option("--bits", metavar="w2a2", help="One width for the body of the network.")
]
FirstLast = Annotated[
    str, Option("--first-last", metavar="same|w8a8", help="Width of the first and last layers.")
]
Threads = Annotated[int, Option("--threads", min=1, help="Of every run.")]

SshHost = Annotated[
    str | None, Option("--ssh", metavar="USER@HOST", help="Run on this board, over ssh.")
]
Tracker = Annotated[
    str | None,
    Option("--tracker", metavar="HOST:PORT", help="Run on a board of TVM's RPC tracker: --key."),
]
Key = Annotated[
    str | None, Option("--key", metavar="NAME", help="Which of the tracker's boards, as rpi4.")
]
Timeout = Annotated[
    float, Option("--timeout", min=1, help="Seconds that a command on the board may take.")
]
Via = Annotated[
    str,
    Option("--via", metavar="CMD", help="On the board, before every run, as 'taskset -c 3'."),
]


@dataclass(frozen=True)
class BoardOptions:
    """Where a verb runs models: here, or on a board that its options name.

    Raises:
        UsageError: options that do not go together.
    """

    ssh: str | None = None
    tracker: str | None = None
    key: str | None = None
    timeout: float = 600.0
    via: str = ""

    def __post_init__(self) -> None:
        if self.ssh is not None and self.tracker is not None:
            raise UsageError("--ssh and --tracker exclude each other: one board at a time")
        if (self.tracker is None) != (self.key is None):
            raise UsageError("--tracker and --key go together: where the tracker is, which board")
        if self.via and not self.given:
            raise UsageError("--via is for boards: name one with --ssh or --tracker and --key")

    @property
    def given(self) -> bool:
        """Whether they name a board."""
        return self.ssh is not None or self.tracker is not None

    @contextlib.contextmanager
    def open(self, target: "Target", threads: int = 1) -> "Iterator[Board | None]":
        """The board; None without one."""
        if not self.given:
            yield None
            return
        from mpqc.boards.board import Board

        with Board(self._connection(target), target, threads, self.via) as board:
            yield board

    def _connection(self, target: "Target") -> "Connection":
        if self.ssh is not None:
            from mpqc.boards.ssh import Ssh

            return Ssh(self.ssh, self.timeout)
        from mpqc.boards.rpc import Rpc

        return Rpc(str(self.tracker), str(self.key), target, self.timeout, console.note)


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
