"""What the command line prints: results on stdout, everything else on stderr."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn

WIDTH = 110  # columns where no terminal says how many: pipes, files, the README


def stdout() -> Console:
    """For people who read results."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, soft_wrap=False)


def stderr() -> Console:
    """For progress, warnings and errors."""
    return Console(
        stderr=True, width=None if sys.stderr.isatty() else WIDTH, highlight=False, soft_wrap=True
    )


def show(result: Mapping[str, Any], as_json: bool, render: Callable[[], RenderableType]) -> None:
    """Print a result: one JSON object, or what ``render`` makes for people."""
    if as_json:
        sys.stdout.write(json.dumps(result, indent=1, allow_nan=False) + "\n")
        sys.stdout.flush()
    else:
        stdout().print(render())


def note(text: str) -> None:
    """A remark or a warning, on stderr."""
    stderr().print(text, markup=False)


class Phases:
    """Names of the phases of a job as they start: a spinner on a terminal, lines with ``-v``.

    Args:
        verbose: a line with its seconds for every phase that has ended.
    """

    def __init__(self, verbose: bool = False) -> None:
        self._verbose = verbose
        self._console = stderr()
        # Rich draws nothing where stderr is no terminal.
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), console=self._console, transient=True
        )
        self._task = self._progress.add_task("")
        self._name, self._start = "", 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        self._progress.stop()

    def __call__(self, phase: str) -> None:
        """Start a phase; the one before has ended."""
        self._end()
        self._name, self._start = phase, time.perf_counter()
        self._progress.update(self._task, description=phase)

    def count(self, done: int, samples: int | None = None) -> None:
        """Say how far the phase is, in samples of so many (None: unknown)."""
        of = "" if samples is None else f" of {samples}"
        self._progress.update(self._task, description=f"{self._name}: {done}{of} samples")

    def layer(self, name: str, done: int, total: int) -> None:
        """Say how far the phase is, in layers."""
        text = f"{self._name}: {done} of {total} layers, {name}"
        self._progress.update(self._task, description=escape(text))

    def _end(self) -> None:
        if self._verbose and self._name:
            seconds = time.perf_counter() - self._start
            self._console.print(f"{self._name}: {seconds:.2f} s", markup=False)
        self._name = ""
