"""Door to ONNX Runtime."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpqc.errors import DataError, EnvironmentLacks, ModelError
from mpqc.graph import Array


class Session:
    """A model in ONNX Runtime on the CPU.

    Args:
        model: bytes of an ONNX file.
        threads: within an operator.
        optimise: let ONNX Runtime rewrite the graph; off, it computes what is written.

    Raises:
        ModelError: ONNX Runtime refuses the model.
        EnvironmentLacks: ONNX Runtime is not installed.
    """

    def __init__(self, model: bytes, threads: int = 1, optimise: bool = False) -> None:
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
                model, options, providers=["CPUExecutionProvider"]
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


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
