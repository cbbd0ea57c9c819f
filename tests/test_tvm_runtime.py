"""The freestanding library beside TVM's own runtime: the same kernels, called its way."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from mpqc import pipeline
from mpqc.data import open_data
from mpqc.graph import Array, Graph, Precision
from mpqc.pipeline import Options
from mpqc.plan import Plan
from mpqc.program import Program
from mpqc.target import Target, llvm_target, native
from tests.graph_runner import built, feeds, lower, parse
from tests.test_lowering import CHAIN, RESIDUAL, SHORTCUTS


class TvmRuntime:
    """A program whose steps run as packed functions on TVM's tensors."""

    def __init__(self, program: Program, target: Target) -> None:
        self.program = program
        functions = {
            name: func.with_attr("global_symbol", name) for name, func in program.kernels.items()
        }
        self.module = tvm.compile(tvm.IRModule(functions), target=llvm_target(target)).mod
        self.types = {
            name: [
                (str(param.ty.dtype), tuple(int(extent) for extent in param.ty.shape))
                for param in func.params
            ]
            for name, func in program.kernels.items()
        }

    def run(self, fed: Mapping[str, Array]) -> dict[str, Array]:
        program = self.program
        values: dict[str, Array] = {
            name: np.ascontiguousarray(a).reshape(-1).view(np.uint8)
            for name, a in {**program.constants, **fed}.items()
            if a.size
        }
        for step in program.steps:
            names = [program.root(name) for name in (*step.inputs, *step.outputs)]
            tensors = []
            for name, (dtype, shape) in zip(names, self.types[step.kernel], strict=True):
                size = int(np.prod(shape)) * np.dtype(dtype).itemsize
                data = values.get(name, np.zeros(size, np.uint8))[:size]
                tensors.append(tvm.runtime.tensor(data.view(dtype).reshape(shape)))
            self.module[step.kernel](*tensors)
            for name, tensor in list(zip(names, tensors, strict=True))[len(step.inputs) :]:
                values[name] = tensor.numpy().reshape(-1).view(np.uint8)
        return {
            name: values[program.root(buffer)].view(program.outputs[name].dtype)
            .reshape(program.outputs[name].shape)
            for name, buffer in program.results.items()
        }  # fmt: skip


@pytest.mark.parametrize("text", [CHAIN, RESIDUAL, SHORTCUTS])
@pytest.mark.parametrize("kernel", ["bitplane", "bitplane-lut", "int8"])
def test_graphs_give_the_same_bits(text: str, kernel: str, tmp_path: Path) -> None:
    graph = parse(text)
    program = lower(graph, kernel=kernel)
    fed = feeds(graph)
    wanted = TvmRuntime(program, native()).run(fed)
    with built(program, tmp_path) as model:
        for name, array in model.run(fed).items():
            np.testing.assert_array_equal(array, wanted[name])


def quantized_program(model: Path, bits: str) -> tuple[Program, dict[str, Array]]:
    """A real model with random calibration data."""
    graph = pipeline.import_model(model)
    options = Options(native(), max_samples=1, latencies=None)
    fed = random_feeds(graph)
    plan = Plan.uniform(graph, Precision.parse(bits), Precision(8, 8))
    calibration = pipeline.calibrate_plan(graph, plan, open_data(fed, graph), options)
    return pipeline.lower(pipeline.quantize(graph, plan, calibration), plan, options), fed


def random_feeds(graph: Graph) -> dict[str, Array]:
    generator = np.random.default_rng(3)
    return {
        name: np.asarray(generator.uniform(0, 1, kind.shape)).astype(kind.dtype)
        if kind.dtype.startswith("float")
        else np.asarray(generator.integers(0, 256, kind.shape)).astype(kind.dtype)
        for name, kind in graph.inputs.items()
    }


@pytest.mark.parametrize(
    "name",
    [
        "mnist_cnn",
        "cifar10_resnet8",
        "magika_standard_v3_3",
        "mobilenet_v1_0.25_224",
        pytest.param("cifar10_resnet20", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2_1.0_224", marks=pytest.mark.slow),
        pytest.param("squeezenet1.0_sparse", marks=pytest.mark.slow),
    ],
)
def test_real_models_give_the_same_bits(name: str, shared_models: Path, tmp_path: Path) -> None:
    program, fed = quantized_program(shared_models / f"{name}.onnx", "w2a2")
    wanted: dict[str, Any] = TvmRuntime(program, native()).run(fed)
    with built(program, tmp_path) as model:
        for output, array in model.run(fed).items():
            np.testing.assert_array_equal(array, wanted[output])
