"""Time the steps of libraries on this machine's GPU: what its latency tables are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mpqc.profile_layers import Times, random_feeds, take_turns
from mpqc.runtime import CompiledModel
from mpqc.target import gpu

TOGETHER = 20  # runs of a step between two looks at the clock


@dataclass(frozen=True)
class DeviceRunner:
    """Runs libraries for GPUs in this process.

    A step is timed by the GPU's own clock, ``TOGETHER`` runs of it started as one graph: alone it
    would take no longer than it takes to start it.
    """

    def machine(self) -> str:
        """As the driver names the GPU."""
        return gpu().name

    def measure(self, libraries: Sequence[Path], repeat: int) -> list[Times]:
        """Time the libraries in turn."""
        models: list[CompiledModel] = []
        try:
            for library in libraries:
                models.append(CompiledModel(library))
            contestants = [_Contestant(model) for model in models]
            take_turns([contestant.run for contestant in contestants], repeat)
            return [contestant.times() for contestant in contestants]
        finally:
            for model in models:
                model.close()


class _Contestant:
    def __init__(self, model: CompiledModel) -> None:
        self._model = model
        self._feeds = random_feeds(model)
        self._count = len(model.steps(self._feeds))
        self._steps: list[list[float]] = []
        self._wholes: list[float] = []
        self._around: list[float] = []
        model.seconds(self._feeds, 3)  # warm up

    def run(self) -> None:
        (whole,) = self._model.seconds(self._feeds, 1)
        self._wholes.append(whole)
        self._around.append(max(0.0, whole - self._model.device_seconds))
        self._steps.append([
            self._model.time_step(index, TOGETHER) for index in range(self._count)
        ])  # fmt: skip

    def times(self) -> Times:
        steps = tuple((min(found), median(found)) for found in zip(*self._steps, strict=True))
        return Times(
            steps,
            (min(self._wholes), median(self._wholes)),
            (min(self._around), median(self._around)),
        )
