"""The trained network as an ONNX file with quantizers computes what the module does."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc import importer
from mpqc.calibration import calibrate
from mpqc.data import open_data
from mpqc.graph import Array, Graph, Precision
from mpqc.onnx_parts import open_batch
from mpqc.onnx_quantized import layer_widths
from mpqc.ort import Session
from mpqc.passes.find_layers import shared_tensors
from mpqc.passes.quantize_layers import tensors_to_calibrate
from mpqc.passes.read_quantizers import read_quantizers
from mpqc.plan import LayerPlan, Plan
from mpqc.train import GraphModule, Quantizers, folded, quantize_module
from mpqc.train.export import batch_is_open, fake_quantized, to_qcdq
from mpqc.train.quantized_layer import WeightScheme
from tests.train.conftest import NETWORK
from tests.train.test_quantized_layer import BLOCK, setting

Made = tuple[GraphModule, bytes, dict[str, Array]]


def made(text: str, plan: Plan, weights: WeightScheme = "lsq") -> Made:
    graph, calibration, arrays = setting(text, plan)
    module = GraphModule(graph)
    quantize_module(module, plan, calibration, None, Quantizers(weights))
    with torch.no_grad():  # as if trained
        for parameter in module.tensors.parameters():
            parameter.add_(0.1)
    return module.eval(), to_qcdq(module, plan), arrays


def check(module: GraphModule, model: bytes, x: Array) -> None:
    session = Session(model)
    (name,) = session.inputs
    batch = module.graph.inputs[name].shape[0]
    with torch.no_grad():
        got = module({name: torch.from_numpy(x[:batch])})
    for value, array in session.run({name: x[:batch]}).items():
        # a float product on the border of two codes may round the other way
        assert np.isclose(got[value].numpy(), array, rtol=1e-4, atol=1e-5).mean() > 0.9


@pytest.mark.parametrize("weights", ["lsq", "lsq-odd", "dorefa", "dorefa-modified"])
@pytest.mark.parametrize("bits", ["w1a1", "w2a3", "w4a4", "w8a8"])
def test_onnx_runtime_computes_the_trained_network(bits: str, weights: WeightScheme) -> None:
    plan = Plan.uniform(Graph.parse(NETWORK), Precision.parse(bits), None)
    module, model, arrays = made(NETWORK, plan, weights)
    check(module, model, arrays["x"])


@pytest.mark.parametrize("bits", ["w2a2", "w8a8"])
def test_matrix_products_of_any_rank(bits: str) -> None:
    plan = Plan.uniform(Graph.parse(BLOCK), Precision.parse(bits), None)
    module, model, arrays = made(BLOCK, plan)
    check(module, model, arrays["x"])


def test_shared_tensors_and_layers_in_float() -> None:
    graph = Graph.parse(NETWORK)
    layers = {
        "depthwise": LayerPlan(weight_bits=3, activation_bits=4),
        "pointwise": LayerPlan(weight_bits=2, activation_bits=5),
    }
    plan = Plan(model_sha256="0" * 64, layers=layers)
    plan = plan.with_tensors(shared_tensors(folded(graph), plan.layers), 5)
    module, model, arrays = made(NETWORK, plan)
    check(module, model, arrays["x"])
    told = fake_quantized(module, plan)
    assert told["conv1"].inputs[0] == "x"
    (narrowed,) = module.rules().values()
    quantizers = [node for node in told if node.op == "Quantize" and node.int_attr("bits") == 5]
    assert {node.float_attr("scale") for node in quantizers} == {narrowed.scale}


@pytest.mark.parametrize("weights", ["lsq", "lsq-odd", "dorefa", "dorefa-modified"])
@pytest.mark.parametrize("bits", ["w1a1", "w2a3", "w5a4", "w8a8"])
def test_reading_the_file_gives_the_trained_integers(
    bits: str, weights: WeightScheme, tmp_path: Path
) -> None:
    plan = Plan.uniform(Graph.parse(NETWORK), Precision.parse(bits), None)
    module, model, _ = made(NETWORK, plan, weights)
    (tmp_path / "m.onnx").write_bytes(model)
    graph = read_quantizers(importer.load(tmp_path / "m.onnx")).graph
    for name, layer in module.rounded().items():
        told = [graph.producer(value) for value in graph[name].inputs[:2]]
        assert told[0] is not None
        assert told[1] is not None
        values, scale = (graph.constants[value] for value in told[1].inputs)
        np.testing.assert_array_equal(values, layer.weights.values)
        np.testing.assert_array_equal(scale, layer.weights.scale)
        np.testing.assert_array_equal(graph.constants[graph[name].inputs[2]], layer.bias)
        source = graph.producer(told[0].inputs[0])
        assert source is not None
        attrs = source.float_attr("scale"), source.int_attr("zero_point"), source.int_attr("bits")
        assert attrs == (layer.rule.scale, layer.rule.zero_point, layer.rule.bits)
        if layer.weights.levels == "signed" and layer.weights.bits > 1:
            assert told[1].int_attr("bits") == layer.weights.bits


def test_the_widths_are_those_of_the_plan() -> None:
    plan = Plan.uniform(Graph.parse(NETWORK), Precision(3, 2), None)
    module, _, _ = made(NETWORK, plan)
    assert {tuple(found.values()) for found in layer_widths(fake_quantized(module, plan)).values()
            if "weight_bits" in found} == {(3, 2)}  # fmt: skip


def test_the_batch_opens_where_no_constant_holds_it() -> None:
    plan = Plan.uniform(Graph.parse(NETWORK), Precision(4, 4), None)
    module, model, arrays = made(NETWORK, plan)
    opened = Session(open_batch(model))
    given = arrays["x"][:7]
    with torch.no_grad():
        got = module({"x": torch.from_numpy(given)})["y"].numpy()
    assert np.isclose(opened.run({"x": given})["y"], got, atol=1e-5).mean() > 0.9
    one = Graph.parse(NETWORK.replace("[4,", "[1,"))
    assert batch_is_open(one, Graph.parse(NETWORK)) == all(
        np.array_equal(one.constants[name], array)
        for name, array in Graph.parse(NETWORK).constants.items()
    )


def test_a_constant_that_holds_the_batch_keeps_it_closed() -> None:
    def graph(batch: int) -> Graph:
        return Graph.parse(
            f"""
            %x = Input() : f32[{batch},4]
            %s = Constant() {{value=[{batch}, 2, 2]}} : i64[3]
            %y = Reshape(%x, %s) : f32[{batch},2,2]
            return %y
            """
        )

    assert batch_is_open(graph(1), graph(1))
    assert not batch_is_open(graph(1), graph(2))


def test_calibration_is_enough_to_start() -> None:
    graph = Graph.parse(NETWORK)
    plan = Plan.uniform(graph, Precision(4, 4), None)
    data = open_data({"x": np.zeros((4, 3, 6, 6), np.float32)}, folded(graph))
    calibration = calibrate(folded(graph), data, tensors_to_calibrate(folded(graph), plan))
    module = GraphModule(graph)
    quantize_module(module, plan, calibration)
    assert np.isfinite(module.eval()({"x": torch.zeros(4, 3, 6, 6)})["y"].detach().numpy()).all()
