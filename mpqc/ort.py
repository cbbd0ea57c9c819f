"""Door to ONNX Runtime."""

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpqc.errors import DataError, EnvironmentLacks, ModelError
from mpqc.graph import Array


class Session:
    """A model in ONNX Runtime on the CPU.

    Args:
        model: bytes of an ONNX file, or its path where weights lie beside it.
        threads: within an operator.
        optimise: let ONNX Runtime rewrite the graph; off, it computes what is written.

    Raises:
        ModelError: ONNX Runtime refuses the model.
        EnvironmentLacks: ONNX Runtime is not installed.
    """

    def __init__(self, model: bytes | Path, threads: int = 1, optimise: bool = False) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise EnvironmentLacks("onnxruntime is missing: pip install onnxruntime") from error
        ort.set_default_logger_severity(4)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = (
            ort.GraphOptimizationLevel.ORT_ENABLE_ALL
            if optimise
            else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        )
        try:
            self._session: Any = ort.InferenceSession(
                model if isinstance(model, bytes) else str(model),
                options,
                providers=["CPUExecutionProvider"],
            )
        except Exception as error:  # pybind maps each status code to a class of its own
            raise ModelError(f"ONNX Runtime refuses the model: {_line(error)}") from error
        self.inputs = tuple(entry.name for entry in self._session.get_inputs())
        self.outputs = tuple(entry.name for entry in self._session.get_outputs())

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Feed every input, get the outputs by name (all by default)."""
        names = list(self.outputs if outputs is None else outputs)
        if strangers := sorted(set(names) - set(self.outputs)):
            raise DataError(f"no output {strangers[0]!r}; the model has: {', '.join(self.outputs)}")
        if missing := sorted(set(self.inputs) - feeds.keys()):
            raise DataError(f"no array for input {missing[0]!r}")
        try:
            found = self._session.run(
                names, {name: np.ascontiguousarray(array) for name, array in feeds.items()}
            )
        except Exception as error:
            raise DataError(f"ONNX Runtime cannot run these inputs: {_line(error)}") from error
        return dict(zip(names, map(np.asarray, found), strict=True))

    def seconds(self, feeds: Mapping[str, Array], repeat: int) -> list[float]:
        """Wall time of single runs [s], outputs fetched as numpy arrays."""
        arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            self._session.run(None, arrays)
            times.append(time.perf_counter() - start)
        return times


def quantize_static(model: Path, feeds: Sequence[Mapping[str, Array]]) -> bytes:
    """Quantize a float model as ONNX Runtime's users do, the opponent of benchmarks.

    QDQ, uint8 activations, int8 weights per output channel, ranges by minimum and maximum.

    Args:
        model: float ONNX file.
        feeds: calibration data.

    Returns:
        The quantized model, weights inside.

    Raises:
        EnvironmentLacks: the quantizer is not installed.
        ModelError: it refuses the model.
    """
    try:
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise EnvironmentLacks(
            f"onnxruntime.quantization cannot be loaded ({error}): pip install onnxruntime onnx"
        ) from error

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = iter(feeds)

        def get_next(self) -> dict[str, Array] | None:
            feed = next(self._feeds, None)
            return None if feed is None else dict(feed)

    with tempfile.TemporaryDirectory(prefix="mpqc-") as folder, _quiet():
        prepared, quantized = Path(folder, "prepared.onnx"), Path(folder, "int8.onnx")
        try:
            quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
            quantization.quantize_static(
                str(prepared),
                str(quantized),
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                calibrate_method=quantization.CalibrationMethod.MinMax,
            )
        except Exception as error:  # it raises whatever it meets
            raise ModelError(f"ONNX Runtime cannot quantize {model}: {_line(error)}") from error
        return quantized.read_bytes()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer logs advice to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
