"""Arrays of an .npz that may be larger than memory: mapped, or read in slices."""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from mpqc.errors import DataError
from mpqc.graph import Array

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a zip member: 30 bytes, then name and extra


class Rows(Protocol):
    """What the readers of this module and a plain ``numpy.ndarray`` have in common."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> "np.dtype[np.generic]": ...

    def __getitem__(self, rows: slice, /) -> Array: ...


class PackedRows:
    """A compressed member. Slices in rising order stream; a step back starts over."""

    def __init__(
        self, path: Path, member: str, shape: tuple[int, ...], dtype: "np.dtype[np.generic]"
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._path, self._member = path, member
        self._row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        self._stream: IO[bytes] | None = None
        self._next = 0

    def __getitem__(self, rows: slice) -> Array:
        start, stop, _ = rows.indices(self.shape[0])
        stop = max(start, stop)
        try:
            stream = self._at(start)
            raw = stream.read((stop - start) * self._row_bytes)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{self._path}: array {self._member!r} is damaged: {error}") from error
        if len(raw) != (stop - start) * self._row_bytes:
            raise DataError(f"{self._path}: array {self._member!r} ends early; write it again")
        self._next = stop
        return np.frombuffer(raw, self.dtype).reshape(stop - start, *self.shape[1:])

    def _at(self, row: int) -> IO[bytes]:
        if self._stream is None or row < self._next:
            self._stream = zipfile.ZipFile(self._path).open(self._member)  # noqa: SIM115 - kept open
            _read_header(self._stream)
            self._next = 0
        skip = (row - self._next) * self._row_bytes
        while skip > 0:
            skip -= len(self._stream.read(min(skip, 1 << 20))) or skip
        return self._stream


def open_npz(path: Path) -> dict[str, Rows]:
    """Arrays by name. Object arrays are refused: reading one would run its pickled code.

    Raises:
        DataError: missing, not an .npz, damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            arrays = {
                info.filename.removesuffix(".npy"): _open(path, archive, info) for info in members
            }
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, struct.error) as error:
        raise DataError(f"cannot read {path} as .npz: {error}") from error
    if not arrays:
        raise DataError(f"{path} holds no arrays; write it with numpy.savez")
    return arrays


def _open(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Rows:
    with archive.open(info) as stream:
        shape, fortran, dtype = _read_header(stream)
        header = stream.tell()
    if dtype.hasobject:
        raise DataError(f"{path}: array {info.filename!r} holds Python objects; store numbers")
    plain = info.compress_type == zipfile.ZIP_STORED
    if shape == () or 0 in shape or (fortran and not plain):
        with archive.open(info) as stream:
            whole: Array = np.lib.format.read_array(stream, allow_pickle=False)
            return whole
    if not plain:
        return PackedRows(path, info.filename, shape, dtype)
    with path.open("rb") as file:
        file.seek(info.header_offset)
        fields = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    offset = info.header_offset + _LOCAL_HEADER.size + fields[-2] + fields[-1] + header
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, "np.dtype[np.generic]"]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"npy format {version} is unknown; save with numpy 2 defaults")
