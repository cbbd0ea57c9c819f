"""The folder that a compilation leaves: written whole or not at all.

``model.so`` (code, packed weights and manifest: the file to deploy), ``manifest.json``,
``plan.json``, ``reference.onnx`` (the same integer computation in standard ONNX operators) and
``report.json`` (costs and provenance).
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpqc.errors import ArtifactError, OutputError

LIBRARY, MANIFEST, PLAN, REFERENCE, REPORT = (
    "model.so", "manifest.json", "plan.json", "reference.onnx", "report.json",
)  # fmt: skip


@dataclass(frozen=True)
class Artifact:
    """A compiled model on disk."""

    folder: Path

    @classmethod
    def open(cls, path: str | Path) -> "Artifact":
        """Accept the folder or its ``model.so``.

        Raises:
            ArtifactError: not an artifact.
        """
        folder = Path(path)
        folder = folder.parent if folder.name == LIBRARY else folder
        missing = [name for name in (LIBRARY, MANIFEST) if not (folder / name).is_file()]
        if missing:
            raise ArtifactError(
                f"{path} is not a compiled model: {', '.join(missing)} missing; run mpqc compile"
            )
        return cls(folder)

    @property
    def library(self) -> Path:
        return self.folder / LIBRARY

    @property
    def reference(self) -> Path:
        """reference.onnx.

        Raises:
            ArtifactError: it was removed.
        """
        path = self.folder / REFERENCE
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: verification needs it; compile again")
        return path

    def _json(self, name: str) -> dict[str, Any]:
        try:
            loaded: dict[str, Any] = json.loads((self.folder / name).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{self.folder / name} cannot be read: {error}") from error
        return loaded

    @property
    def manifest(self) -> dict[str, Any]:
        return self._json(MANIFEST)

    @property
    def report(self) -> dict[str, Any]:
        return self._json(REPORT)


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse an output early, before the work.

    Raises:
        OutputError: it exists and may not be replaced, or its folder cannot be written.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already; give --overwrite to replace it")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: {parent} is not a writable folder")


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool, marker: str = MANIFEST) -> Iterator[Path]:
    """A folder that appears at ``path`` when the block ends well, and never when it does not.

    Args:
        path: of the folder; its parents are made, and go again when the block fails.
        overwrite: replace a folder that is empty or holds ``marker``.
        marker: file that tells our own folders from those of others.

    Raises:
        OutputError: see ``check_output``; also when an existing folder lacks the marker.
    """
    check_output(path, overwrite)
    if path.exists() and not (
        path.is_dir() and ((path / marker).exists() or not any(path.iterdir()))
    ):
        raise OutputError(
            f"{path} was not written by this command ({marker} is missing): it is not replaced; "
            "choose another name"
        )
    parent = path.absolute().parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=parent))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    old = work.with_name(f"{work.name}-old")
    try:
        work.chmod(0o755)
        yield work
        if path.exists():
            path.rename(old)
        work.rename(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        if old.exists() and not path.exists():  # interrupted between the two
            old.rename(path)
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        _remove_empty(made)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Innermost first; one that holds something stays."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def new_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """The same for a single file."""
    check_output(path, overwrite)
    if path.is_dir():
        raise OutputError(f"{path} is a folder, not a file: it is not replaced")
    work = path.with_name(f".{path.name}.{os.getpid()}")
    parent = path.absolute().parent
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        yield work
        os.replace(work, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        work.unlink(missing_ok=True)
        _remove_empty(made)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Plain JSON, one key a line at the top levels, final newline."""
    path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
