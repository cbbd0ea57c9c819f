"""The freestanding library beside the same kernels under TVM's own runtime, in turn.

    python -m benchmarks.runtime MODEL.onnx ... [--bits w2a2] [--threads 1 2] [--json FILE]

TVM's side is its compiled module, called kernel by kernel over one arena with the same plan, on
its own thread pool. Its calls come from Python: what a call of an empty function with as many
arguments takes is taken off, so that the ratio compares kernels, threads and runtimes.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.script import tirx as T  # noqa: N812 - as TVMScript is written

from mpqc import pipeline
from mpqc.build import build
from mpqc.data import open_data
from mpqc.graph import Array, Graph, Precision
from mpqc.pipeline import Options
from mpqc.plan import Plan
from mpqc.program import Program, plan_memory
from mpqc.runtime import CompiledModel
from mpqc.target import Target, llvm_target, native

ROUNDS, REPEAT = 40, 3
REST = 0.002  # seconds between turns: threads that spin go to sleep


class TvmRuntime:
    """A program whose steps run as packed functions on TVM's tensors."""

    def __init__(self, program: Program, target: Target) -> None:
        self.program = program
        functions = {
            name: func.with_attr("global_symbol", name) for name, func in program.kernels.items()
        }
        self.module = tvm.compile(tvm.IRModule(functions), target=llvm_target(target)).mod
        memory = plan_memory(program)
        self._places = {**memory.offsets, **memory.ends}
        self._arena = _aligned(memory.size)
        self._constants = {
            name: _copied(array) for name, array in program.constants.items() if array.size
        }
        types = {name: _types(func) for name, func in program.kernels.items()}
        empty = _empty_functions({len(kinds) for kinds in types.values()})
        self._calls: list[tuple[Any, list[Any]]] = []
        self._nothing: list[tuple[Any, list[Any]]] = []
        for step in program.steps:
            names = [program.root(name) for name in (*step.inputs, *step.outputs)]
            tensors = [
                tvm.runtime.from_dlpack(self._view(name, dtype, shape))
                for name, (dtype, shape) in zip(names, types[step.kernel], strict=True)
            ]
            self._calls.append((self.module[step.kernel], tensors))
            self._nothing.append((empty[len(tensors)], tensors))

    def _view(self, name: str, dtype: str, shape: tuple[int, ...]) -> Array:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        constant = self._constants.get(name)
        start = 0 if constant is not None else self._places[name]
        memory = self._arena if constant is None else constant
        return memory[start : start + size].view(dtype).reshape(shape)

    def run(self, fed: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        self._fill(fed)
        _call(self._calls)
        program = self.program
        return {
            name: self._view(program.root(program.results[name]), kind.dtype, kind.shape).copy()
            for name, kind in program.outputs.items()
        }

    def seconds(self, fed: Mapping[str, Array], repeat: int) -> list[float]:
        """Wall time of single runs [s]; inputs are copied."""
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            self._fill(fed)
            _call(self._calls)
            times.append(time.perf_counter() - start)
        return times

    def overhead(self, repeat: int) -> float:
        """What calls from Python take of a run [s]: the least of the times of empty functions."""
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            _call(self._nothing)
            times.append(time.perf_counter() - start)
        return min(times)

    def _fill(self, fed: Mapping[str, Array]) -> None:
        for name, kind in self.program.inputs.items():
            self._view(name, kind.dtype, kind.shape)[...] = fed[name]


def _call(calls: Sequence[tuple[Any, list[Any]]]) -> None:
    for function, tensors in calls:
        function(*tensors)


def _aligned(size: int) -> Array:
    """Zeros at a multiple of 64 bytes, with memory behind that kernels may read."""
    memory = np.zeros(size + 128, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size + 64]


def _copied(array: Array) -> Array:
    memory = _aligned(array.nbytes)
    memory[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return memory


def _types(func: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (str(param.ty.dtype), tuple(int(extent) for extent in param.ty.shape))
        for param in func.params
    ]


def _empty_functions(counts: set[int]) -> dict[int, Any]:
    """Compiled functions that do nothing, by their number of arguments."""
    made = {}
    for count in counts:
        names = [f"a{index}" for index in range(count)]
        source = "\n".join((
            "@T.prim_func(s_tir=True)",
            f"def nothing({', '.join(f'{name}: T.handle' for name in names)}) -> None:",
            "    T.evaluate(0)",
        ))  # fmt: skip
        func = tvm.script.from_source(source, {"T": T})
        module = tvm.IRModule({"nothing": func.with_attr("global_symbol", "nothing")})
        made[count] = tvm.compile(module, target=llvm_target(native())).mod["nothing"]
    return made


def quantized_program(model: Path, bits: str) -> tuple[Program, dict[str, Array]]:
    """A real model with random calibration data, and an input."""
    graph = pipeline.import_model(model)
    options = Options(native(), max_samples=1, latencies=None)
    fed = random_feeds(graph)
    plan = Plan.uniform(graph, Precision.parse(bits), Precision(8, 8))
    calibration = pipeline.calibrate_plan(graph, plan, open_data(fed, graph), options)
    return pipeline.lower(pipeline.quantize(graph, plan, calibration), plan, options), fed


def random_feeds(graph: Graph) -> dict[str, Array]:
    """Uniform numbers in the shapes of the inputs."""
    generator = np.random.default_rng(3)
    return {
        name: np.asarray(generator.uniform(0, 1, kind.shape)).astype(kind.dtype)
        if kind.dtype.startswith("float")
        else np.asarray(generator.integers(0, 256, kind.shape)).astype(kind.dtype)
        for name, kind in graph.inputs.items()
    }


@dataclass(frozen=True)
class Row:
    """One model at one number of threads.

    Attributes:
        model: file name without its ending.
        threads: of either side.
        library, runtime: best times of the freestanding library and of TVM's runtime [s], the
            latter less its calls from Python.
        same: whether both gave the same bits.
    """

    model: str
    threads: int
    library: float
    runtime: float
    same: bool

    @property
    def ratio(self) -> float:
        """Below 1: the library is faster."""
        return self.library / self.runtime


def compare(
    model: Path, bits: str, threads: int, rounds: int = ROUNDS, repeat: int = REPEAT
) -> Row:
    """Run a model both ways in turn; minima, since a disturbance only slows."""
    program, fed = quantized_program(model, bits)
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    theirs = TvmRuntime(program, native())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.so"
        build(program, plan_memory(program), native(), {}, path)
        with CompiledModel(path, threads) as ours:
            expected, got = theirs.run(fed), ours.run(fed)
            same = all(np.array_equal(got[name], expected[name]) for name in expected)
            sides: dict[str, Callable[[Mapping[str, Array], int], list[float]]] = {
                "library": ours.seconds, "runtime": theirs.seconds,
            }  # fmt: skip
            best = dict.fromkeys(sides, float("inf"))
            for turn in range(rounds):
                for name in sorted(sides, reverse=turn % 2 == 1):
                    time.sleep(REST)
                    best[name] = min(best[name], *sides[name](fed, repeat + 1)[1:])
    return Row(model.stem, threads, best["library"], best["runtime"] - theirs.overhead(1000), same)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and write JSON where asked to; exit 1 where bits differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--bits", default="w2a2")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    rows = []
    print(f"{'model':32} threads   library     TVM's runtime   ratio")
    for model in options.models:
        for threads in options.threads:
            row = compare(model, options.bits, threads, options.rounds)
            rows.append(row)
            print(
                f"{row.model:32} {threads:7} {row.library * 1e6:10.1f} us "
                f"{row.runtime * 1e6:10.1f} us   {row.ratio:.3f}"
                f"{'' if row.same else '  OTHER BITS'}",
                flush=True,
            )
    if options.json:
        content = [{**asdict(row), "ratio": row.ratio} for row in rows]
        options.json.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return 0 if all(row.same for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
