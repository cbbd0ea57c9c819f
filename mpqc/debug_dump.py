"""The graph as text after every pass: what ``compile --debug-dump`` leaves."""

from pathlib import Path

from mpqc.artifact import check_output
from mpqc.errors import OutputError
from mpqc.graph import Graph
from mpqc.passes.base import Pass


class DebugDump:
    """A callback of passes that writes ``01-fold-batch-norm.txt`` and so on.

    What is written stays when the compilation fails: that is when it is needed.

    Args:
        folder: for the files.
        overwrite: drop the dump of an earlier run.

    Raises:
        OutputError: the folder exists and may not be used, or cannot be made.
    """

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        check_output(folder, overwrite)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("[0-9][0-9]-*.txt"):
                old.unlink()
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error}") from error
        self._folder, self._count = folder, 0

    def __call__(self, step: Pass, graph: Graph) -> None:
        """Write what the pass left."""
        self._count += 1
        path = self._folder / f"{self._count:02d}-{step.name}.txt"
        try:
            path.write_text(f"{graph}\n", "utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error}") from error
