"""Run a compiled model from Python: ctypes and numpy, nothing else.

A machine that only runs models needs this package without its dependencies, and numpy.
"""

import ctypes
import json
import mmap
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from mpqc.errors import ArtifactError, DataError, EnvironmentLacks, UsageError
from mpqc.target import host_flags, native
from mpqc.tensor_type import Array, TensorType

ABI_VERSION = 1
ALIGNMENT = 64  # of scratch memory [bytes]
NO_DEVICE = 7  # status: no driver, or no GPU


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_char_p),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("bytes", ctypes.c_size_t),
    )


class _About(ctypes.Structure):
    _fields_ = (
        ("abi_version", ctypes.c_int32),
        ("most_threads", ctypes.c_int32),
        ("model", ctypes.c_char_p),
        ("sha256", ctypes.c_char_p),
        ("compiler", ctypes.c_char_p),
        ("target", ctypes.c_char_p),
    )


class _Memory(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "scratch",
            "arena",
            "arena_least",
            "workspace",
            "workspace_peak",
            "weights",
            "shared",
        )
    )


@dataclass(frozen=True)
class About:
    """Which model a library holds.

    Attributes:
        model, sha256: file that was compiled, and the hash of its content.
        compiler: version of mpqc.
        target: machine that it was compiled for.
        most_threads: of an instance; 1 in a library without threads.
    """

    model: str
    sha256: str
    compiler: str
    target: str
    most_threads: int


@dataclass(frozen=True)
class Memory:
    """Memory of an instance [bytes].

    Attributes:
        scratch: of this instance, all in one block.
        arena: of these: values between kernels, inputs and outputs.
        arena_least: largest total of values that live at the same time.
        workspace: of these: working memory of each thread's kernels.
        workspace_peak: most of it that a thread has used so far.
        weights: read-only in the library, for all instances.
        shared: weights made ready for the kernels, once for all instances.
    """

    scratch: int
    arena: int
    arena_least: int
    workspace: int
    workspace_peak: int
    weights: int
    shared: int


def _check_whole(path: Path) -> None:
    """Refuse a truncated library: the loader would map what is missing and crash.

    Raises:
        ArtifactError: not an ELF file, or shorter than its section table says.
    """
    try:
        with path.open("rb") as file:
            header = file.read(64)
        size = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    if len(header) < 52 or header[:4] != b"\x7fELF":
        raise ArtifactError(f"{path} is no compiled model: no shared library at all")
    if header[5] != 1:
        return  # big-endian: the loader says that it is of another machine
    # the table of sections is the last thing in a library: where it starts, entry size, entries
    wide = header[4] == 2 and len(header) == 64
    start = struct.unpack_from("<Q" if wide else "<I", header, 40 if wide else 32)[0]
    entry, entries = struct.unpack_from("<HH", header, 58 if wide else 46)
    if start + entry * entries > size:
        raise ArtifactError(f"{path} is truncated at {size} bytes: copy or compile it again")


def _open(path: Path) -> Any:
    _check_whole(path)
    try:
        library = ctypes.CDLL(str(path))
        version = library.mpqc_abi_version()
    except (OSError, AttributeError) as error:
        if is_for_tvm(path):
            raise ArtifactError(
                f"{path} was compiled with --runtime tvm: mpqc.runtime.open_model runs it, under "
                "TVM; compile it without for a freestanding library"
            ) from error
        raise ArtifactError(f"{path} is no compiled model of this machine: {error}") from error
    if version != ABI_VERSION:
        raise ArtifactError(
            f"{path} has interface version {version}, this mpqc reads {ABI_VERSION}"
        )
    size = ctypes.c_size_t
    pointers = ctypes.POINTER(ctypes.c_void_p)
    library.mpqc_message.restype = ctypes.c_char_p
    library.mpqc_manifest.restype = ctypes.c_void_p
    library.mpqc_manifest.argtypes = (ctypes.POINTER(size),)
    library.mpqc_scratch_bytes.restype = size
    library.mpqc_create_in.argtypes = (ctypes.c_int, ctypes.c_void_p, size, pointers)
    library.mpqc_describe_memory.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Memory))
    library.mpqc_destroy.argtypes = (ctypes.c_void_p,)
    library.mpqc_destroy.restype = None
    library.mpqc_run.argtypes = (
        ctypes.c_void_p,
        pointers,
        ctypes.c_void_p,
        pointers,
        ctypes.c_void_p,
    )
    library.mpqc_bind.argtypes = (ctypes.c_void_p, pointers, pointers)
    library.mpqc_step.argtypes = (ctypes.c_void_p, ctypes.c_int)
    library.mpqc_read.argtypes = (ctypes.c_void_p, size, ctypes.c_void_p, size)
    return library


def _check_instructions(path: Path, target: Mapping[str, Any]) -> None:
    """Refuse what would end in an illegal instruction; a host that says nothing is believed."""
    lacking = set(target.get("features", ())) - native().features
    if host_flags() and lacking:
        raise ArtifactError(
            f"{path} was built for {target.get('name')} and needs {', '.join(sorted(lacking))}, "
            "which this machine lacks: compile it with --target native"
        )


class Steps(Protocol):
    """A run that stops after every kernel, here or on a board."""

    results: list[Array]

    def __len__(self) -> int: ...

    def step(self, index: int) -> float:
        """Run one kernel."""
        ...

    def read(self, offset: int, kind: TensorType) -> Array:
        """A buffer of the arena."""
        ...


class FetchedSteps:
    """A run whose inner values were all fetched.

    Args:
        count: of steps.
        results: of the run.
        values: (step, offset) -> bytes of a value, and more behind it.
    """

    def __init__(
        self, count: int, results: list[Array], values: Mapping[tuple[int, int], Array | bytes]
    ) -> None:
        self.results = results
        self._count, self._values, self._at = count, values, -1

    def __len__(self) -> int:
        return self._count

    def step(self, index: int) -> float:
        """Go to a step; the time is not known here."""
        self._at = index
        return 0.0

    def read(self, offset: int, kind: TensorType) -> Array:
        """A value that the manifest lists for this step."""
        found: Array = np.frombuffer(self._values[self._at, offset], np.uint8)
        return found[: kind.nbytes].view(kind.dtype).reshape(kind.shape)


class Model(Protocol):
    """What runs, here or on a board."""

    inputs: dict[str, TensorType]
    outputs: dict[str, TensorType]

    @property
    def manifest(self) -> dict[str, Any]:
        """What the library says of itself."""
        ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once."""
        ...

    def steps(self, feeds: Mapping[str, Array]) -> Steps:
        """Run kernel by kernel."""
        ...


class LocalModel(Model, Protocol):
    """What runs on this machine."""

    def seconds(self, feeds: Mapping[str, Array], repeat: int) -> list[float]:
        """Wall time of single runs [s]."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class CompiledModel:
    """One instance of a compiled model.

    Args:
        path: ``model.so``, or the artifact folder that holds it.
        threads: threads that a run uses, this one included.

    Raises:
        ArtifactError: missing, damaged, or built for another machine.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        self.path = library_file(path).resolve()
        self._handle: Any = None
        self._library = _open(self.path)
        _check_instructions(self.path, self.manifest.get("target", {}))
        self.threads = threads
        handle = ctypes.c_void_p()
        size = int(self._library.mpqc_scratch_bytes(threads))
        self._scratch = np.empty(size + ALIGNMENT, np.uint8)
        start = self._scratch.ctypes.data
        start += -start % ALIGNMENT
        status = self._library.mpqc_create_in(threads, start, size, ctypes.byref(handle))
        self._check(status, "cannot start the model")
        self._handle = handle
        self.inputs = self._tensors("input")
        self.outputs = self._tensors("output")

    def _check(self, status: int, what: str) -> None:
        if status:
            kind = EnvironmentLacks if status == NO_DEVICE else ArtifactError
            raise kind(f"{self.path}: {what}: {self._library.mpqc_message(status).decode()}")

    def _tensors(self, side: str) -> dict[str, TensorType]:
        described = {}
        for index in range(getattr(self._library, f"mpqc_{side}_count")()):
            tensor = _Tensor()
            describe = getattr(self._library, f"mpqc_describe_{side}")
            self._check(describe(index, ctypes.byref(tensor)), "cannot describe the model")
            shape = tuple(tensor.shape[axis] for axis in range(tensor.rank))
            described[tensor.name.decode()] = TensorType(tensor.dtype.decode(), shape)
        return described

    @property
    def manifest(self) -> dict[str, Any]:
        """What the library says of itself: layers, kernels, buffers, versions."""
        size = ctypes.c_size_t()
        start = self._library.mpqc_manifest(ctypes.byref(size))
        manifest: dict[str, Any] = json.loads(ctypes.string_at(start, size.value))
        return manifest

    @property
    def about(self) -> About:
        """Which model this is, and of which version."""
        found = _About()
        self._check(self._library.mpqc_describe(ctypes.byref(found)), "cannot describe the model")
        model, sha256, compiler, target = (
            text.decode() for text in (found.model, found.sha256, found.compiler, found.target)
        )
        return About(model, sha256, compiler, target, found.most_threads)

    @property
    def memory(self) -> Memory:
        """What this instance occupies, and how much of it was needed."""
        found = _Memory()
        status = self._library.mpqc_describe_memory(self._handle, ctypes.byref(found))
        self._check(status, "cannot describe the memory")
        return Memory(*(int(getattr(found, name)) for name, *_ in _Memory._fields_))

    @property
    def scratch_bytes(self) -> int:
        return int(self._library.mpqc_scratch_bytes(self.threads))

    @property
    def device_seconds(self) -> float:
        """Time that the GPU took for the last run or step, copies included [s].

        Raises:
            UsageError: the model runs on the CPU.
        """
        if not self.on_gpu:
            raise UsageError(f"{self.path} runs on the CPU: time it from outside")
        found = ctypes.c_double()
        function = self._library.mpqc_device_seconds
        function.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_double))
        self._check(function(self._handle, ctypes.byref(found)), "cannot read the GPU's time")
        return found.value

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU runs the model."""
        return hasattr(self._library, "mpqc_time_step")

    def time_step(self, index: int, times: int) -> float:
        """Mean time that the GPU takes for a step that runs so many times in a row [s].

        The runs start together, as all steps of a whole run do. Values inside the model mean
        nothing afterwards.

        Raises:
            UsageError: the model runs on the CPU.
        """
        if not self.on_gpu:
            raise UsageError(f"{self.path} runs on the CPU: time it from outside")
        found = ctypes.c_double()
        function = self._library.mpqc_time_step
        function.argtypes = (
            ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_double),
        )  # fmt: skip
        status = function(self._handle, index, times, ctypes.byref(found))
        self._check(status, f"cannot time step {index}")
        return found.value

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Args:
            feeds: every input by name, in the model's dtype and shape.

        Returns:
            Every output by name.

        Raises:
            DataError: names, shapes or dtypes differ from the model's.
        """
        arrays = self._arrange(feeds)
        results = {name: np.empty(t.shape, t.dtype) for name, t in self.outputs.items()}
        status = self._library.mpqc_run(
            self._handle, _pointers(arrays), None, _pointers(list(results.values())), None
        )
        self._check(status, "the run failed")
        return results

    def _arrange(self, feeds: Mapping[str, Array]) -> list[Array]:
        if feeds.keys() != self.inputs.keys():
            raise DataError(f"the model takes {sorted(self.inputs)}, got {sorted(feeds)}")
        arrays = []
        for name, kind in self.inputs.items():
            array = np.asarray(feeds[name])
            if TensorType.of(array) != kind:
                raise DataError(f"input {name!r} is {TensorType.of(array)}, the model takes {kind}")
            arrays.append(np.ascontiguousarray(array))
        return arrays

    def steps(self, feeds: Mapping[str, Array]) -> "Stepper":
        """Run kernel by kernel: for profiles and for looking at intermediate values."""
        return Stepper(self, self._arrange(feeds))

    def seconds(self, feeds: Mapping[str, Array], repeat: int) -> list[float]:
        """Wall time of single runs [s], without the copies into numpy results."""
        arrays = self._arrange(feeds)
        results = [np.empty(t.shape, t.dtype) for t in self.outputs.values()]
        inputs, outputs = _pointers(arrays), _pointers(results)
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            status = self._library.mpqc_run(self._handle, inputs, None, outputs, None)
            times.append(time.perf_counter() - start)
            self._check(status, "the run failed")
        return times

    def close(self) -> None:
        """Free the instance; a second call does nothing."""
        if self._handle is not None:
            self._library.mpqc_destroy(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()


class Stepper:
    """A run that stops after every kernel."""

    def __init__(self, model: CompiledModel, arrays: list[Array]) -> None:
        self._model = model
        self._arrays = arrays
        self.results = [np.empty(t.shape, t.dtype) for t in model.outputs.values()]
        self._library = model._library
        status = self._library.mpqc_bind(model._handle, _pointers(arrays), _pointers(self.results))
        model._check(status, "cannot bind buffers")

    def __len__(self) -> int:
        return int(self._library.mpqc_step_count())

    def step(self, index: int) -> float:
        """Run one kernel; returns its wall time [s]."""
        start = time.perf_counter()
        status = self._library.mpqc_step(self._model._handle, index)
        elapsed = time.perf_counter() - start
        self._model._check(status, f"step {index} failed")
        return elapsed

    def read(self, offset: int, kind: TensorType) -> Array:
        """A buffer of the arena."""
        result = np.empty(kind.shape, kind.dtype)
        status = self._library.mpqc_read(
            self._model._handle, offset, result.ctypes.data_as(ctypes.c_void_p), result.nbytes
        )
        self._model._check(status, "cannot read the arena")
        return result


def _pointers(arrays: Sequence[Array]) -> Any:
    return (ctypes.c_void_p * max(1, len(arrays)))(*[array.ctypes.data for array in arrays])


def load(path: str | Path, threads: int = 1) -> CompiledModel:
    """Open an artifact: a folder, or its ``model.so``."""
    return CompiledModel(path, threads)


def open_model(path: str | Path, threads: int = 1) -> LocalModel:
    """The same for either runtime, freestanding or TVM's (``mpqc compile --runtime tvm``)."""
    file = library_file(path)
    if not is_for_tvm(file):
        return CompiledModel(file, threads)
    from mpqc.relax_model import RelaxModel

    return RelaxModel(file.resolve(), threads)


def library_file(path: str | Path) -> Path:
    """``model.so`` of an artifact.

    Raises:
        ArtifactError: there is none.
    """
    file = Path(path)
    file = file / "model.so" if file.is_dir() else file
    if not file.exists():
        raise ArtifactError(f"{file} does not exist: compile the model first")
    return file


def is_for_tvm(path: Path) -> bool:
    """Whether a library needs TVM's runtime: it exports a Relax executable."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(b"\0__tvm_ffi__library_bin\0") >= 0
