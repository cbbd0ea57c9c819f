"""ONNX Runtime's CUDA provider: an opponent on the GPU."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpqc.errors import DataError, EnvironmentLacks, ModelError
from mpqc.graph import Array

PROVIDER = "CUDAExecutionProvider"


class CudaSession:
    """A model in ONNX Runtime on this machine's GPU, recorded as a CUDA graph where it can be.

    Inputs are copied to the GPU and outputs from it within the time of a run, as for a library of
    ours.

    Args:
        model: ONNX file.

    Raises:
        EnvironmentLacks: no ONNX Runtime, none with the CUDA provider, or one that falls back to
            the CPU because libraries are missing.
        ModelError: it refuses the model.
    """

    def __init__(self, model: Path) -> None:
        self._ort = _with_provider()
        self._model = model
        self._plain = self._open(graph=False)
        self._bound: tuple[Any, Any, dict[str, Any], dict[str, Any]] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Feed every input, get all outputs by name."""
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        try:
            self._prepare(arrays)
            return self._run(arrays)
        except ModelError:
            raise
        except Exception as error:
            raise DataError(f"ONNX Runtime cannot run these inputs: {_line(error)}") from error

    def seconds(self, feeds: Mapping[str, Array], repeat: int) -> list[float]:
        """Wall time of single runs [s], outputs fetched as numpy arrays."""
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        self._prepare(arrays)
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            self._run(arrays)
            times.append(time.perf_counter() - start)
        return times

    def _run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        assert self._bound is not None
        session, binding, inputs, outputs = self._bound
        for name, value in inputs.items():
            value.update_inplace(arrays[name])
        session.run_with_iobinding(binding)
        return {name: np.asarray(value.numpy()) for name, value in outputs.items()}

    def _prepare(self, arrays: Mapping[str, Array]) -> None:
        """Place inputs and outputs on the GPU, once for each set of shapes."""
        shapes = {name: array.shape for name, array in arrays.items()}
        if self._bound is not None and self._shapes == shapes:
            return
        names = [entry.name for entry in self._plain.get_outputs()]
        first = self._plain.run(names, dict(arrays))
        self._bound = self._first_that_runs(arrays, dict(zip(names, first, strict=True)))
        self._shapes = shapes

    def _first_that_runs(
        self, arrays: Mapping[str, Array], results: Mapping[str, Array]
    ) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
        """As a graph; or without, where operators are left to the CPU."""
        try:
            return self._bind(self._open(graph=True), arrays, results)
        except Exception:  # its class depends on what could not be recorded
            return self._bind(self._plain, arrays, results)

    def _bind(
        self, session: Any, arrays: Mapping[str, Array], results: Mapping[str, Array]
    ) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
        binding, value = session.io_binding(), self._ort.OrtValue.ortvalue_from_numpy
        inputs = {name: value(array, "cuda", 0) for name, array in arrays.items()}
        outputs = {
            name: value(np.ascontiguousarray(array), "cuda", 0) for name, array in results.items()
        }
        for name, held in inputs.items():
            binding.bind_ortvalue_input(name, held)
        for name, held in outputs.items():
            binding.bind_ortvalue_output(name, held)
        for _ in range(2):  # the first records
            session.run_with_iobinding(binding)
        return session, binding, inputs, outputs

    def _open(self, graph: bool) -> Any:
        ort = self._ort
        options = ort.SessionOptions()
        options.log_severity_level = 4
        provider = (PROVIDER, {"device_id": "0", "enable_cuda_graph": "1" if graph else "0"})
        try:
            session = ort.InferenceSession(
                str(self._model), options, providers=[provider, "CPUExecutionProvider"]
            )
        except Exception as error:  # pybind maps each status code to a class of its own
            raise ModelError(f"ONNX Runtime refuses the model: {_line(error)}") from error
        if PROVIDER not in session.get_providers():
            raise EnvironmentLacks(
                "ONNX Runtime has a CUDA provider but cannot load its libraries (CUDA, cuDNN) and "
                "falls back to the CPU: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        return session


def _with_provider() -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise EnvironmentLacks(
            "ort-cuda needs ONNX Runtime with its CUDA provider: pip install onnxruntime-gpu"
        ) from error
    if PROVIDER not in ort.get_available_providers():
        raise EnvironmentLacks(
            "this ONNX Runtime has no CUDA provider: pip uninstall onnxruntime, then pip install "
            "onnxruntime-gpu"
        )
    ort.set_default_logger_severity(4)
    if hasattr(ort, "preload_dlls"):  # CUDA and cuDNN from NVIDIA's wheels
        ort.preload_dlls()
    return ort


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
