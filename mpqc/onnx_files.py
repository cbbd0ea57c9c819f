"""Read an ONNX file that nobody vouches for: bytes in, a checked ModelProto out.

Nothing is executed and nothing outside the model's own folder is opened.
"""

import hashlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from mpqc.errors import ModelError
from mpqc.graph import Array
from mpqc.packing import unpack_elements

MAX_FILE_BYTES = 2**31 - 1  # protobuf reads no more
MAX_DATA_BYTES = 64 * 2**30


def sha256(path: str | Path) -> str:
    """Hash of the model file's bytes, as plans store it."""
    digest = hashlib.sha256()
    file = _model_file(Path(path))
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from error
    return digest.hexdigest()


def read_model(path: str | Path) -> onnx.ModelProto:
    """Parse the file; weights kept outside it stay outside until ``read_tensor`` wants them."""
    file = _model_file(Path(path))
    size = file.stat().st_size
    if size == 0:
        raise ModelError(f"{file} is empty; export the model again")
    if size > MAX_FILE_BYTES:
        raise ModelError(
            f"{file} has {size} bytes, protobuf reads at most {MAX_FILE_BYTES}; "
            "save it with external data (onnx.save(..., save_as_external_data=True))"
        )
    model = onnx.ModelProto()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from error
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError, whichever implementation is installed
        raise ModelError(
            f"{file} is not an ONNX model, or is truncated; download or export it again"
        ) from error
    if not _is_text(model):
        raise ModelError(f"{file} holds names that are not text (UTF-8); export it again")
    if not model.HasField("graph") or not model.graph.output or model.ir_version < 1:
        raise ModelError(
            f"{file} is not an ONNX model: no graph with outputs in it; export it again"
        )
    return model


def read_tensor(tensor: onnx.TensorProto, folder: Path) -> Array:
    """Values of a tensor, whether they lie inside the model or in a file beside it."""
    name = tensor.name or "without a name"
    if any(extent < 0 for extent in tensor.dims):
        raise ModelError(f"tensor {name} has negative dimensions {list(tensor.dims)}; export again")
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except KeyError as error:
        raise ModelError(
            f"tensor {name} has the unknown element type {tensor.data_type}; "
            "export with a type that ONNX names"
        ) from error
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _external(tensor, np.dtype(dtype), folder)
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except Exception as error:  # a hostile tensor may fail anywhere inside onnx or numpy
        raise ModelError(
            f"tensor {name} of shape {list(tensor.dims)} is damaged: {error}; export again"
        ) from error


def _is_text(message: Any) -> bool:
    """Protobuf hands out bytes where a string is no UTF-8: nothing else expects them."""
    for kind, value in message.ListFields():
        single = not hasattr(value, "extend")
        values = [value] if single else value
        if kind.type == kind.TYPE_STRING and any(isinstance(text, bytes) for text in values):
            return False
        if kind.type == kind.TYPE_MESSAGE and not all(map(_is_text, values)):
            return False
    return True


def _model_file(path: Path) -> Path:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise ModelError(f"no such model file: {path}; check the path") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the model file {str(path)!r}: {error}") from error
    if stat.S_ISDIR(mode):
        raise ModelError(f"{path} is a directory; give the .onnx file inside it")
    if not stat.S_ISREG(mode):
        raise ModelError(f"{path} is not a regular file; give an .onnx file")
    return path


def _external(tensor: onnx.TensorProto, dtype: np.dtype[np.generic], folder: Path) -> Array:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    file = _external_file(tensor.name, facts.get("location", ""), folder)
    shape = tuple(tensor.dims)
    count = 1
    for extent in shape:
        count *= extent
    bits = _packed_types().get(tensor.data_type, 8 * dtype.itemsize)
    expected = -(-count * bits // 8)
    try:
        offset = int(facts.get("offset", 0))
        length = int(facts.get("length", expected))
    except ValueError as error:
        raise ModelError(f"tensor {tensor.name}: bad external data entry: {error}") from error
    available = file.stat().st_size
    if expected > MAX_DATA_BYTES or offset < 0 or length != expected:
        raise ModelError(
            f"tensor {tensor.name} of {expected} bytes claims {length} bytes at offset {offset} "
            f"of {file}; export the model again"
        )
    if offset + length > available:
        raise ModelError(
            f"{file} has {available} bytes, tensor {tensor.name} needs {offset + length}; "
            "the file is truncated: copy it again"
        )
    if count == 0:
        return np.zeros(shape, dtype)
    # mapped, not read: a model of many GB costs memory only where it is touched
    if bits < 8:
        packed = np.memmap(file, np.uint8, "r", offset, (expected,))
        name = str(dtype)
        codes = unpack_elements(packed, bits, signed=name.startswith("int"))[:count]
        # numpy holds an element of any other kind in the low bits of its byte
        made = codes.astype(dtype) if "int" in name else codes.view(dtype)
        return made.reshape(shape)
    little = dtype.newbyteorder("<") if dtype.kind in "iuf" else dtype
    return np.memmap(file, little, "r", offset, shape or (1,)).reshape(shape)


def _external_file(name: str, location: str, folder: Path) -> Path:
    where = f"tensor {name} keeps its values in {location!r}"
    if not location:
        raise ModelError(f"tensor {name} has external data without a location; export again")
    parts = location.replace("\\", "/").split("/")
    if Path(location).is_absolute() or ".." in parts or "\0" in location or ":" in parts[0]:
        raise ModelError(
            f"{where}, outside the model's folder; put the file beside the model and save again"
        )
    home = folder.resolve()
    file = home / location
    try:
        real = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{where}, which is missing in {folder}; copy it there") from error
    if not real.is_relative_to(home):
        raise ModelError(
            f"{where}, a link that leaves the model's folder; put the file itself there"
        )
    if not real.is_file():
        raise ModelError(f"{where}, which is not a regular file; put the file itself there")
    return real


def _packed_types() -> dict[int, int]:
    """Element types narrower than a byte, and their bits."""
    names = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}
    return {
        getattr(onnx.TensorProto, name): bits
        for name, bits in names.items()
        if hasattr(onnx.TensorProto, name)
    }


def tensors_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph: initializers and attributes, those of subgraphs too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from tensors_of(inner)
