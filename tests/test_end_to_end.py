"""Whole compilations: the library computes what its reference says, value by value."""

from pathlib import Path

import numpy as np
import pytest

from mpqc import compute, packing, pipeline
from mpqc.artifact import Artifact
from mpqc.data import Data, open_data
from mpqc.demo import files
from mpqc.graph import Array, Precision
from mpqc.importer import sha256
from mpqc.passes.find_layers import find_layers
from mpqc.pipeline import Options, compile_model, import_model
from mpqc.plan import LayerPlan, Plan
from mpqc.rounding import Accuracy
from mpqc.target import TARGETS, find_target
from mpqc.verify import Verification, verify

DEMO = files()


def opened(model: Path, source: Path | None) -> Data:
    """The file's arrays, or normal random inputs."""
    graph = import_model(model)
    if source is not None:
        return open_data(source, graph)
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.normal(size=(8, *kind.shape[1:])).astype(kind.dtype)
        for name, kind in graph.inputs.items()
    }
    return open_data(arrays, graph)


def compiled(
    model: Path, bits: str, folder: Path, data: Data, target: str = "native", kernel: str = "auto"
) -> Artifact:
    options = Options(find_target(target), kernel, max_samples=32)
    return compile_model(model, folder / "out", options, bits=Precision.parse(bits), data=data)


def demo(bits: str, folder: Path, target: str = "native", kernel: str = "auto") -> Artifact:
    data = opened(DEMO.model, DEMO.calibration)
    return compiled(DEMO.model, bits, folder, data, target, kernel)


def assert_exact(result: Verification) -> None:
    assert result.passed, result.message
    assert {row.status for row in result.rows} == {"exact"}
    assert len(result.layers) >= 4
    kernels = {row.kernel for row in result.layers}
    assert kernels & {"bitplane", "bitplane-lut", "int8"}


@pytest.mark.parametrize("target", ["native", "x86-64-v2"])
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2", "w1a1", "w3a5"])
def test_the_demo_model_is_exact(bits: str, target: str, tmp_path: Path) -> None:
    if target != "native" and not TARGETS[target].runs_here:
        pytest.skip(f"this machine does not run {target}")
    artifact = demo(bits, tmp_path, target)
    assert_exact(verify(artifact, layers=True))
    test = open_data(DEMO.test, import_model(DEMO.model))
    result = verify(artifact, test, layers=True, max_samples=4)
    assert_exact(result)


@pytest.mark.parametrize("kernel", ["bitplane", "bitplane-lut", "int8"])
@pytest.mark.parametrize("bits", ["w2a3", "w5a6"])
def test_every_kernel_gives_the_same_model(bits: str, kernel: str, tmp_path: Path) -> None:
    assert_exact(verify(demo(bits, tmp_path, kernel=kernel), layers=True, max_samples=4))


def test_eight_bits_keep_the_accuracy(tmp_path: Path) -> None:
    test = open_data(DEMO.test, import_model(DEMO.model))
    agreement = verify(demo("w8a8", tmp_path), test, max_samples=597).agreement
    assert agreement is not None
    assert agreement.samples == 597
    assert agreement.float_accuracy == pytest.approx(591 / 597)
    assert agreement.accuracy is not None
    assert agreement.accuracy > 0.98
    assert agreement.top1 is not None
    assert agreement.top1 > 0.99
    assert agreement.sqnr_db["logits"] is not None
    assert agreement.sqnr_db["logits"] > 25


# The check can fail ------------------------------------------------------------------------


def assert_found(result: Verification, layer: str) -> None:
    """The wrong layer is named, and no other."""
    assert not result.passed
    assert result.message.startswith("FAILED")
    wrong = [row.layer for row in result.layers if row.status == "wrong"]
    assert wrong == [layer]
    later = [row.status for row in result.layers if row.layer != layer]
    assert "exact on own inputs" in later  # what follows only passes the error on


def test_a_sign_error_in_one_layer_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = packing.bitplane_weights

    def wrong(codes: Array, *rest: int) -> Array:
        flipped = codes.copy()
        if codes.shape == (64, 32, 3, 3):  # the codes of the smallest weight become the largest
            flipped[codes == 2] = 1
        return packed(flipped, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("mpqc.lowering.bitplane_weights", wrong)
        artifact = demo("w2a2", tmp_path, kernel="bitplane")
    assert_found(verify(artifact), "down")


def test_a_missing_negative_plane_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = compute.bitplane_conv

    def wrong(*args: object, **options: object) -> object:
        return right(*args, **{**options, "negative_top": False})  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(compute, "bitplane_conv", wrong)
        artifact = demo("w2a2", tmp_path, kernel="bitplane")
    result = verify(artifact)
    assert not result.passed
    assert any(row.status == "wrong" for row in result.layers)


# Real models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10_resnet20", "mnist_cnn", "ad01_autoencoder"])
def test_real_models_are_exact(name: str, shared_models: Path, tmp_path: Path) -> None:
    model = shared_models / f"{name}.onnx"
    data = opened(model, None)
    artifact = compiled(model, "w4a4", tmp_path, data)
    result = verify(artifact, data, layers=True, max_samples=4)
    assert result.passed, result.message
    assert all(row.status == "exact" for row in result.rows)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2"])
@pytest.mark.parametrize("target", ["native", "x86-64-v2"])
@pytest.mark.parametrize(
    "name",
    [
        "cifar10_resnet8", "cifar10_resnet20", "mobilenet_v1_0.25_224", "mobilenet_v2_1.0_224",
        "squeezenet1.0_sparse", "ultraface_rfb320", "espcn_x2_float", "magika_standard_v3_3",
    ],
)  # fmt: skip
def test_larger_models_pass(
    name: str, target: str, bits: str, shared_models: Path, tmp_path: Path
) -> None:
    if target != "native" and not TARGETS[target].runs_here:
        pytest.skip(f"this machine does not run {target}")
    model = shared_models / f"{name}.onnx"
    data = opened(model, None)
    result = verify(compiled(model, bits, tmp_path, data, target), data, layers=True, max_samples=2)
    assert result.passed, result.message


@pytest.mark.parametrize("kernel", ["auto", "bitplane"])
def test_channels_of_several_widths_run_as_planned(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel-wise plan with pruned channels: compiled in groups, exact, and told as planned."""
    if kernel == "bitplane":  # layers of the demo are too small for a split to pay
        monkeypatch.setattr(pipeline, "expected_cycles", lambda *_: None)
    graph = import_model(DEMO.model)
    uniform = Plan.uniform(graph, Precision(4, 2), model_sha256=sha256(DEMO.model))
    layers = {
        layer.name: LayerPlan(
            weight_bits=tuple([0, 8, 1, 1, 2, 2, 1, 1] * (layer.channels_out // 8)),
            activation_bits=2,
        )
        if uniform.layers[layer.name].widest == 4
        else uniform.layers[layer.name]
        for layer in find_layers(graph)
    }
    plan = uniform.model_copy(update={"layers": layers})
    options = Options(
        find_target("native"), kernel, max_samples=32, accuracy=Accuracy("nearest", samples=16)
    )
    data = opened(DEMO.model, DEMO.calibration)
    artifact = compile_model(DEMO.model, tmp_path / "out", options, plan=plan, data=data)
    assert_exact(verify(artifact, layers=True, max_samples=4))
    told = {layer["name"]: layer for layer in artifact.manifest["layers"]}
    assert list(told) == [layer.name for layer in find_layers(graph)]
    assert told["block.conv1"]["asked"] == "w0-8a2"
    assert told["block.conv1"]["channels"] == {"0": 4, "1": 16, "2": 8, "8": 4}
    assert told["stem"]["channels"] == {}
    if kernel == "bitplane":
        assert told["block.conv1"]["run"] == "w1+2+8a2"
        assert told["depthwise"]["run"] == "w8a2"
    cost = artifact.report["cost"]
    macs = {layer.name: layer.macs for layer in find_layers(graph)}
    body = sum(count for name, count in macs.items() if layers[name].counts)
    ends = 64 * (macs["stem"] + macs["classifier"])
    assert cost["bitops"] == body * 2 * (8 + 4 + 4) // 8 + ends
