from functools import cache
from math import prod

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks.models import MODELS


@cache
def model(name: str) -> onnx.ModelProto:
    return MODELS[name](0)


def count(proto: onnx.ModelProto) -> tuple[int, int]:
    """MACs of one picture, and weights, of convolutions and the classifier."""
    proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    graph = proto.graph
    dims = {
        value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.value_info, *graph.output]
    }
    shapes = {constant.name: list(constant.dims) for constant in graph.initializer}
    layers = [node for node in graph.node if node.op_type in {"Conv", "Gemm"}]
    weights = [shapes[node.input[1]] for node in layers]
    outputs = [dims[node.output[0]] for node in layers]
    macs = sum(prod(out) * prod(w[1:]) for out, w in zip(outputs, weights, strict=True))
    return macs, sum(map(prod, weights))


@pytest.mark.parametrize(
    ("name", "macs", "weights"),
    [
        ("resnet18", 1814.1e6, 11.679e6),
        ("resnet50", 4089.2e6, 25.503e6),
        ("mobilenet_v1", 568.7e6, 4.209e6),
        ("mobilenet_v2", 300.8e6, 3.470e6),
        ("ds_cnn", 2.657e6, 0.022016e6),
        ("cifar_resnet20", 40.55e6, 0.268336e6),
    ],
)
def test_macs_and_weights_are_those_of_the_papers(name: str, macs: float, weights: float) -> None:
    found_macs, found_weights = count(model(name))
    assert found_macs == pytest.approx(macs, rel=2e-4)
    assert found_weights == pytest.approx(weights, rel=2e-4)


@pytest.mark.parametrize(
    "name", sorted(MODELS.keys() - {"resnet50"})
)  # too slow for the default run
def test_runs_and_tells_inputs_apart(name: str) -> None:
    session = onnxruntime.InferenceSession(
        model(name).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    shape = [dim if isinstance(dim, int) else 2 for dim in session.get_inputs()[0].shape]
    images = np.random.default_rng(1).standard_normal(shape, np.float32)
    (logits,) = session.run(["logits"], {"input": images})
    assert 0.02 < logits.std() < 20
    # What changes between two pictures is no rounding noise beside what they share.
    assert np.abs(logits[0] - logits[1]).mean() > 0.05 * logits.std()


def test_the_same_seed_gives_the_same_file() -> None:
    first, again = MODELS["ds_cnn"](3), MODELS["ds_cnn"](3)
    assert first.SerializeToString() == again.SerializeToString()
    assert first.SerializeToString() != MODELS["ds_cnn"](4).SerializeToString()


def test_node_names_are_unique() -> None:
    names = [node.name for node in model("mobilenet_v2").graph.node]
    assert len(names) == len(set(names))
