"""The freestanding library beside the same kernels under TVM's runtime, in turn.

    python -m benchmarks.runtime MODEL.onnx ... [--bits w2a2] [--threads 1 2] [--dim NAME=N]

TVM's side is what ``mpqc compile --runtime tvm`` makes: its virtual machine calls the kernels, on
its own thread pool.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpqc import pipeline
from mpqc.build import build
from mpqc.cli_options import parse_dims
from mpqc.data import open_data
from mpqc.graph import Array, Graph, Precision
from mpqc.model_source import Form
from mpqc.pipeline import Options
from mpqc.plan import Plan
from mpqc.program import Program, plan_memory
from mpqc.runtime import LocalModel, open_model
from mpqc.target import native

ROUNDS, REPEAT = 40, 3
REST = 0.002  # seconds between turns: threads that spin go to sleep


def quantized_program(
    model: Path, bits: str, dims: Mapping[str, int] | None = None
) -> tuple[Program, dict[str, Array]]:
    """A real model with random calibration data, and an input."""
    graph = pipeline.import_model(model, dims)
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
        library, runtime: best times of the freestanding library and of TVM's runtime [s].
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


def manifest(program: Program) -> dict[str, Any]:
    """The least that a library needs to say of itself."""
    ends = {"inputs": program.inputs, "outputs": program.outputs}
    return {
        **{
            side: {n: {"dtype": kind.dtype, "shape": kind.shape} for n, kind in kinds.items()}
            for side, kinds in ends.items()
        },
        "steps": [{} for _ in program.steps],
        "taps": {},
    }


def compare(
    model: Path,
    bits: str,
    threads: int,
    rounds: int = ROUNDS,
    repeat: int = REPEAT,
    dims: Mapping[str, int] | None = None,
) -> Row:
    """Run a model both ways in turn; minima, since a disturbance only slows."""
    program, fed = quantized_program(model, bits, dims)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.so" for name in ("library", "runtime")}
        build(program, plan_memory(program), native(), manifest(program), paths["library"])
        build(program, plan_memory(program), native(), manifest(program), paths["runtime"],
              Form(runtime="tvm"))  # fmt: skip
        with (
            open_model(paths["library"], threads) as library,
            open_model(paths["runtime"], threads) as runtime,
        ):
            sides = {"library": library, "runtime": runtime}
            best = fastest(sides, fed, rounds, repeat)
            got, expected = library.run(fed), runtime.run(fed)
    same = all(np.array_equal(got[name], expected[name], equal_nan=True) for name in expected)
    return Row(model.stem, threads, best["library"], best["runtime"], same)


def fastest(
    sides: Mapping[str, LocalModel], fed: Mapping[str, Array], rounds: int, repeat: int
) -> dict[str, float]:
    """Least time of a run of each [s]."""
    best = dict.fromkeys(sides, float("inf"))
    for turn in range(rounds):
        for name in sorted(sides, reverse=turn % 2 == 1):
            time.sleep(REST)
            best[name] = min(best[name], *sides[name].seconds(fed, repeat + 1)[1:])
    return best


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and write JSON where asked to; exit 1 where bits differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--bits", default="w2a2")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dim", action="append", help="NAME=VALUE of an open dimension")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    rows, dims = [], parse_dims(options.dim)
    print(f"{'model':32} threads   library     TVM's runtime   ratio")
    for model in options.models:
        for threads in options.threads:
            row = compare(model, options.bits, threads, options.rounds, dims=dims)
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
