"""Trained models: import, passes and export change no output."""

from pathlib import Path

import numpy as np
import pytest

from mpqc import reference
from mpqc.errors import ModelError
from mpqc.graph import Array, Graph
from mpqc.importer import load
from mpqc.onnx_export import to_onnx
from mpqc.ort import Session
from mpqc.passes.base import run
from mpqc.passes.drop_dead import DropDead
from mpqc.passes.fold_batch_norm import FoldBatchNorm
from mpqc.passes.fold_pad import FoldPad

FLOAT = [
    "ad01_autoencoder",
    "cifar10_resnet20",
    "cifar10_resnet8",
    "espcn_x2_float",
    "magika_standard_v3_3",
    "mnist_cnn",
    "mobilenet_v1_0.25_224",
    "mobilenet_v2_1.0_224",
    "ppocr_v2_angle_cls",
    "squeezenet1.0_sparse",
    "ultraface_rfb320",
    "ultraface_rfb320_simplified",
]
QUANTIZED = [
    "TFC_1W1A",
    "TFC_2W2A",
    "cifar10_resnet8_int8_qdq",
    "espcn_x2_qonnx",
    "jettagging_qkeras",
    "mobilenet_v2_1.0_224_uint8_qdq",
]
DIMS = {"ppocr_v2_angle_cls": {"x:2": 48, "x:3": 192}}


def read(folder: Path, name: str) -> Graph:
    return load(folder / f"{name}.onnx", DIMS.get(name))


def feeds_of(graph: Graph) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 256, kind.shape).astype(kind.dtype)
        if kind.dtype.startswith("int")
        else rng.random(kind.shape, np.float32)
        for name, kind in graph.inputs.items()
    }


@pytest.mark.parametrize("name", FLOAT)
def test_float_models_mean_the_same(shared_models: Path, name: str) -> None:
    graph = read(shared_models, name)
    feeds = feeds_of(graph)
    want = Session((shared_models / f"{name}.onnx").read_bytes()).run(feeds)
    folded = run(graph, FoldBatchNorm(), FoldPad(), DropDead())
    assert all(node.op != "BatchNormalization" for node in folded)
    for made in (graph, folded):
        got = Session(to_onnx(made)).run(feeds)
        assert list(got) == list(want)
        for key, array in want.items():
            np.testing.assert_allclose(
                got[key], array, rtol=1e-4, atol=1e-4 * float(np.abs(array).max())
            )


@pytest.mark.parametrize("name", ["cifar10_resnet8", "magika_standard_v3_3", "ppocr_v2_angle_cls"])
def test_the_oracle_agrees_with_onnx_runtime(shared_models: Path, name: str) -> None:
    graph = read(shared_models, name)
    feeds = feeds_of(graph)
    want = Session(to_onnx(graph)).run(feeds)
    for key, array in reference.run(graph, feeds).items():
        np.testing.assert_allclose(array, want[key], atol=1e-4 * float(np.abs(array).max()))


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_models_are_read(shared_models: Path, name: str) -> None:
    graph = read(shared_models, name)
    quantizers = {"DequantizeLinear", "Quant", "BipolarQuant"}
    assert any(node.op.rpartition("::")[2] in quantizers for node in graph)


def test_resnet20_holds_only_what_it_needs(shared_models: Path) -> None:
    graph = run(read(shared_models, "cifar10_resnet20"), FoldBatchNorm(), FoldPad(), DropDead())
    assert {node.op for node in graph} == {
        *("Conv", "Relu", "Add", "Slice", "Pad"),
        *("GlobalAveragePool", "Flatten", "Gemm"),
    }


def test_mobilenet_pads_by_itself(shared_models: Path) -> None:
    graph = run(read(shared_models, "mobilenet_v1_0.25_224"), FoldBatchNorm(), FoldPad())
    assert all(node.op != "Pad" for node in graph)


def test_batches_are_bound(shared_models: Path) -> None:
    graph = load(shared_models / "cifar10_resnet8.onnx", batch=4)
    assert graph.shape(graph.outputs[0]) == (4, 10)


def test_open_picture_sizes_are_named(shared_models: Path) -> None:
    with pytest.raises(ModelError, match="--dim x:2=VALUE --dim x:3=VALUE"):
        load(shared_models / "ppocr_v2_angle_cls.onnx")
