"""Run a model that was compiled with ``--runtime tvm``: TVM's virtual machine, from Python."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import tvm
from tvm import relax

from mpqc.errors import ArtifactError, DataError
from mpqc.runtime import FetchedSteps
from mpqc.tensor_type import Array, TensorType


class RelaxModel:
    """A compiled model under TVM's runtime, with the face of ``runtime.CompiledModel``.

    Args:
        path: ``model.so``.
        threads: of TVM's pool, which all models of the process share.

    Raises:
        ArtifactError: damaged, or built by another version of TVM.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.path, self.threads = path, threads
        try:
            machine = relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
            self.manifest: dict[str, Any] = json.loads(str(machine["manifest"]()))
        except (RuntimeError, AttributeError, ValueError) as error:
            raise ArtifactError(
                f"{path} cannot be loaded by TVM {tvm.__version__}: {str(error).strip()[-300:]}"
            ) from error
        self._main, self._values = machine["main"], machine["values"]
        self.inputs = _types(self.manifest["inputs"])
        self.outputs = _types(self.manifest["outputs"])

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see ``CompiledModel.run``."""
        self._set_threads()
        found = self._main(*self._arrange(feeds))
        return {name: found[at].numpy() for at, name in enumerate(self.outputs)}

    def seconds(self, feeds: Mapping[str, Array], repeat: int) -> list[float]:
        """Wall time of single runs [s]."""
        self._set_threads()
        tensors, times = self._arrange(feeds), []
        for _ in range(repeat):
            start = time.perf_counter()
            self._main(*tensors)
            times.append(time.perf_counter() - start)
        return times

    def steps(self, feeds: Mapping[str, Array]) -> "FetchedSteps":
        """A run whose inner values are all kept."""
        self._set_threads()
        found = [tensor.numpy() for tensor in self._values(*self._arrange(feeds))]
        taps = sorted(self.manifest["taps"].values(), key=lambda tap: tap["step"])
        values = {
            (tap["step"], tap["offset"]): array
            for tap, array in zip(taps, found[: len(taps)], strict=True)
        }
        return FetchedSteps(len(self.manifest["steps"]), found[len(taps) :], values)

    def _arrange(self, feeds: Mapping[str, Array]) -> list[Any]:
        if feeds.keys() != self.inputs.keys():
            raise DataError(f"the model takes {sorted(self.inputs)}, got {sorted(feeds)}")
        tensors = []
        for name, kind in self.inputs.items():
            array = np.asarray(feeds[name])
            if TensorType.of(array) != kind:
                raise DataError(f"input {name!r} is {TensorType.of(array)}, the model takes {kind}")
            tensors.append(tvm.runtime.tensor(np.ascontiguousarray(array)))
        return tensors

    def _set_threads(self) -> None:
        tvm.get_global_func("runtime.config_threadpool")(1, self.threads)

    def close(self) -> None:
        """TVM frees a model with its last reference."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _types(described: Mapping[str, Any]) -> dict[str, TensorType]:
    return {n: TensorType(kind["dtype"], tuple(kind["shape"])) for n, kind in described.items()}
