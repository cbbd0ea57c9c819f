"""Checkpoints that are whole or not there at all."""

import contextlib
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from mpqc.errors import OutputError, UsageError

FORMAT = 1


def save(path: Path, state: dict[str, Any], about: dict[str, str]) -> None:
    """Replace the checkpoint; where that fails the last good one stays.

    Args:
        path: of the file.
        state: tensors and plain values.
        about: what has to be the same when it is resumed.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            torch.save({"mpqc_checkpoint": FORMAT, "about": about, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        kept = "the last good checkpoint stays" if path.exists() else "there is none yet"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise OutputError(
            f"cannot write the checkpoint {path}: {reason}; {kept}. Make room, then --resume"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def load(path: Path, about: dict[str, str]) -> dict[str, Any]:
    """Read what ``save`` wrote.

    Raises:
        UsageError: there is none, it is damaged, or it was made otherwise.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        if found["mpqc_checkpoint"] != FORMAT:
            raise ValueError("written by another version of mpqc")
        before, state = found["about"], found["state"]
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        raise UsageError(f"cannot resume from {path}: {error}; train again") from error
    different = [key for key in about if before.get(key) != about[key]]
    if different:
        key = different[0]
        raise UsageError(
            f"cannot resume from {path}: {key} was {before.get(key)}, now it is {about[key]}; "
            "give the same options, or train again with --overwrite"
        )
    return dict(state)
