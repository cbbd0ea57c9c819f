"""Evaluation is the compiled arithmetic: codes, sums and outputs of every layer."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc import pipeline, reference
from mpqc.calibration import Calibration, calibrate
from mpqc.data import open_data
from mpqc.errors import PlanError, UsageError
from mpqc.graph import Array, Graph, Precision
from mpqc.passes.find_layers import shared_tensors
from mpqc.passes.quantize_layers import QuantizeLayers, tensors_to_calibrate
from mpqc.passes.round_layers import round_layers
from mpqc.plan import LayerPlan, Plan
from mpqc.rounding import Accuracy
from mpqc.train import GraphModule, Quantizers, folded, quantize_module
from tests.train.conftest import NETWORK

BLOCK = """
%x = Input() : f32[2,6,8]
%wq = Constant() : f32[8,8]
%wk = Constant() : f32[8,8]
%bk = Constant() {value=[0.1, -0.2, 0.05, 0.0, 0.1, 0.2, -0.1, 0.0]} : f32[8]
%wo = Constant() : f32[8,16]
%wi = Constant() : f32[16,8]
%one = Constant() {value=[1, 1, 1, 1, 1, 1, 1, 1]} : f32[8]
%nil = Constant() {value=[0, 0, 0, 0, 0, 0, 0, 0]} : f32[8]
%n = LayerNormalization(%x, %one, %nil) {axis=-1} : f32[2,6,8]
%q = MatMul(%n, %wq) : f32[2,6,8] @query
%k0 = MatMul(%n, %wk) : f32[2,6,8] @key
%k = Add(%k0, %bk) : f32[2,6,8]
%kt = Transpose(%k) {perm=[0, 2, 1]} : f32[2,8,6]
%s = MatMul(%q, %kt) : f32[2,6,6]
%p = Softmax(%s) {axis=-1} : f32[2,6,6]
%v = MatMul(%p, %k) : f32[2,6,8]
%r = Add(%x, %v) : f32[2,6,8]
%h0 = MatMul(%r, %wo) : f32[2,6,16] @wide
%h = Gelu(%h0) : f32[2,6,16]
%y0 = MatMul(%h, %wi) : f32[2,6,8] @narrow
%y = Add(%r, %y0) : f32[2,6,8]
return %y
"""


def setting(text: str, plan: Plan, count: int = 16) -> tuple[Graph, Calibration, dict[str, Array]]:
    graph = Graph.parse(text)
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal((count, *kind.shape[1:])).astype(np.float32)
        for name, kind in graph.inputs.items()
    }
    flat = folded(graph)
    data = open_data(arrays, flat)
    return graph, calibrate(flat, data, tensors_to_calibrate(flat, plan)), arrays


def integer_graph(module: GraphModule, plan: Plan, calibration: Calibration) -> Graph:
    flat = folded(module.to_graph())
    return QuantizeLayers(plan, calibration, rounded=module.rounded(), rules=module.rules())(flat)


def check(module: GraphModule, plan: Plan, calibration: Calibration, x: Array) -> None:
    """Every layer in evaluation equals the integer graph: codes, sums, outputs."""
    module.eval()
    integers = integer_graph(module, plan, calibration)
    name = next(iter(module.graph.inputs))
    with torch.no_grad():
        got = module({name: torch.from_numpy(x)})
        deployed = module.deployed()
    assert deployed.keys() == plan.layers.keys()
    wanted = reference.run(integers, {name: x})
    exact = not any(node.op in ("Softmax", "Gelu") for node in integers)
    for value, array in wanted.items():
        found = got[value].numpy()
        if exact:
            np.testing.assert_array_equal(found, array)
        else:  # float operators in between differ in the last place, and then a code may
            assert np.isclose(found, array, rtol=1e-4, atol=1e-5).mean() > 0.9
    for layer, made in deployed.items():
        node = integers[layer]
        codes_name, acc_name = node.inputs[0], node.output
        source = integers.producer(codes_name)
        assert source is not None
        values = reference.run(integers, {name: x}, [source.inputs[0], codes_name, acc_name])
        with torch.no_grad():
            given = torch.from_numpy(values[source.inputs[0]])
            codes = made.codes(given)
            sums = module._product(module.graph[layer])(codes, made.weight, None)
            end = integers.consumers(acc_name)[0].output
            output = module._integers(module.graph[layer], given, made)
        zero = node.int_attr("zero_point")
        np.testing.assert_array_equal(codes.numpy() + zero, values[codes_name])
        np.testing.assert_array_equal(sums.numpy(), values[acc_name])
        affine = reference.run(integers, {name: x}, [end])[end]
        np.testing.assert_array_equal(output.numpy(), affine)


@pytest.mark.parametrize("inputs", ["lsq", "pact"])
@pytest.mark.parametrize("bits", ["w1a1", "w2a2", "w3a4", "w4a3", "w5a6", "w6a1", "w7a7", "w8a8"])
@pytest.mark.parametrize(
    "weights", ["lsq", "lsq-odd", "dorefa", "dorefa-modified", "dorefa-centered"]
)
def test_every_quantizer_and_width_is_the_compilers(weights: str, bits: str, inputs: str) -> None:
    plan = Plan.uniform(Graph.parse(NETWORK), Precision.parse(bits), None)
    graph, calibration, arrays = setting(NETWORK, plan)
    module = GraphModule(graph)
    quantize_module(module, plan, calibration, None, Quantizers(weights, inputs))  # type: ignore[arg-type]
    check(module, plan, calibration, arrays["x"][:4])


def rounded_module(text: str, plan: Plan) -> tuple[GraphModule, Calibration, dict[str, Array]]:
    graph, calibration, arrays = setting(text, plan, 32)
    flat = folded(graph)
    found = round_layers(flat, plan, calibration, open_data(arrays, flat), Accuracy())
    module = GraphModule(graph)
    quantize_module(module, plan, calibration, found)
    made = module.rounded()
    for name, layer in found.items():
        np.testing.assert_array_equal(made[name].weights.values, layer.weights.values)
        np.testing.assert_allclose(made[name].weights.scale, layer.weights.scale, rtol=2e-6)
        np.testing.assert_allclose(made[name].bias, layer.bias, rtol=1e-5, atol=1e-6)
        assert made[name].rule.zero_point == layer.rule.zero_point
        assert made[name].rule.scale == pytest.approx(layer.rule.scale, rel=1e-6)
    return module, calibration, arrays


@pytest.mark.parametrize("text", [NETWORK, BLOCK], ids=["convolutions", "transformer"])
@pytest.mark.parametrize("bits", ["w1a1", "w2a2", "w4a4", "w8a8"])
def test_training_starts_where_compensated_rounding_ends(text: str, bits: str) -> None:
    plan = Plan.uniform(Graph.parse(text), Precision.parse(bits), None)
    module, calibration, arrays = rounded_module(text, plan)
    name = next(iter(arrays))
    batch = module.graph.inputs[name].shape[0]
    check(module, plan, calibration, arrays[name][:batch])


def test_widths_of_channels_and_of_shared_tensors() -> None:
    graph = Graph.parse(NETWORK)
    plan = Plan.uniform(graph, Precision(2, 3), None)
    layers = dict(plan.layers)
    layers["conv1"] = LayerPlan(weight_bits=(1, 2, 2, 3, 8, 4, 2, 1), activation_bits=3)
    plan = plan.model_copy(update={"layers": layers})
    plan = plan.with_tensors(shared_tensors(folded(graph), plan.layers), 5)
    assert plan.tensors
    module, calibration, arrays = rounded_module(NETWORK, plan)
    check(module, plan, calibration, arrays["x"][:4])
    with torch.no_grad():  # as if trained
        for parameter in module.tensors.parameters():
            parameter.add_(0.1)
    check(module, plan, calibration, arrays["x"][:4])


def test_a_trained_network_is_still_the_compilers() -> None:
    plan = Plan.uniform(Graph.parse(NETWORK), Precision(2, 2), None)
    module, calibration, arrays = rounded_module(NETWORK, plan)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    before = module.to_graph().constants["w1"]
    module.train()
    x = torch.from_numpy(arrays["x"])
    for _ in range(10):
        optimizer.zero_grad()
        (module({"x": x})["y"] - 1).square().mean().backward()
        optimizer.step()
    assert (module.to_graph().constants["w1"] != before).any()
    check(module, plan, calibration, arrays["x"][:4])


def test_training_simulates_what_evaluation_computes() -> None:
    plan = Plan.uniform(Graph.parse(NETWORK), Precision(3, 3), None)
    module, _, arrays = rounded_module(NETWORK, plan)
    x = torch.from_numpy(arrays["x"])
    module.eval()
    compiled = module({"x": x})["y"]
    module.train()
    module.freeze_batch_norm = True
    simulated = module({"x": x})["y"]
    # a sum on the border of two codes may round the other way
    assert torch.isclose(compiled, simulated, atol=1e-5).float().mean() > 0.95


def test_the_whole_pipeline_agrees_but_for_ties() -> None:
    plan = Plan.uniform(Graph.parse(NETWORK), Precision(4, 4), None)
    module, calibration, arrays = rounded_module(NETWORK, plan)
    flat = folded(module.to_graph())
    integers = pipeline.quantize(flat, plan, calibration, rounded=module.rounded())
    assert any(node.op == "Requantize" for node in integers)
    module.eval()
    with torch.no_grad():
        got = module({"x": torch.from_numpy(arrays["x"][:4])})["y"].numpy()
    wanted = reference.run(integers, {"x": arrays["x"][:4]})["y"]
    assert np.isclose(got, wanted, atol=1e-5).mean() > 0.95


def test_layers_that_share_an_input_share_its_quantizer() -> None:
    plan = Plan.uniform(Graph.parse(BLOCK), Precision(2, 4), None)
    graph, calibration, _ = setting(BLOCK, plan)
    module = GraphModule(graph)
    quantize_module(module, plan, calibration)
    query, key, wide = (module.hooks.find(name) for name in ("query", "key", "wide"))
    assert query.data is key.data
    assert query.data is not wide.data


def test_what_does_not_fit_is_refused() -> None:
    plan = Plan.uniform(Graph.parse(NETWORK), Precision(2, 2), None)
    graph, calibration, _ = setting(NETWORK, plan)
    stranger = plan.model_copy(
        update={"layers": {"nobody": LayerPlan(weight_bits=2, activation_bits=2)}}
    )
    with pytest.raises(PlanError, match="nobody"):
        quantize_module(GraphModule(graph), stranger, calibration)
    with pytest.raises(UsageError, match="no weight quantizer"):
        Quantizers("other")  # type: ignore[arg-type]
    mixed = dict(plan.layers)
    mixed["conv1"] = LayerPlan(weight_bits=(1, 2, 2, 3, 8, 4, 2, 1), activation_bits=2)
    with pytest.raises(UsageError, match="one width a layer"):
        quantize_module(
            GraphModule(graph), plan.model_copy(update={"layers": mixed}), calibration, None,
            Quantizers("dorefa"),
        )  # fmt: skip


def test_settled_on_data_the_network_computes_what_it_did() -> None:
    """Afterwards statistics of the batch, in training, change nothing but by their noise."""
    plan = Plan.uniform(Graph.parse(NETWORK), Precision(2, 2), None)
    module, _, feeds = rounded_module(NETWORK, plan)
    x = torch.from_numpy(feeds["x"])
    before = module.eval()({"x": x})["y"]
    old = {name: tensor.clone() for name, tensor in module.statistics().items()}
    module.settle_batch_norm([{"x": x}], keep=True)
    assert not module.training
    assert not module.freeze_batch_norm
    torch.testing.assert_close(module({"x": x})["y"], before, atol=1e-4, rtol=1e-4)
    moved = max(float((old[k] - t).abs().max()) for k, t in module.statistics().items())
    assert moved > 0.01
    follows = copy.deepcopy(module).train()({"x": x})["y"]  # the same batch: hardly any noise
    module.train().freeze_batch_norm = True
    torch.testing.assert_close(follows, module({"x": x})["y"], atol=0.05, rtol=0.05)


def test_fixed_batch_norm_in_the_product_trains_as_beside_it() -> None:
    """Outputs and all gradients are those of BatchNormalization as an operator of its own."""
    plan = Plan.uniform(Graph.parse(NETWORK), Precision(3, 3), None)
    module, _, feeds = rounded_module(NETWORK, plan)
    module.train().freeze_batch_norm = True
    x = torch.from_numpy(feeds["x"])
    apart, hooks = copy.deepcopy(module), 0
    for name in apart.hooks.names():
        apart.hooks.find(name).plain = False
        hooks += 1
    assert hooks == 4
    outputs = []
    for network in (module, apart):
        outputs.append(network({"x": x})["y"])
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for (name, one), two in zip(module.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4, msg=name)
    seen = module({"x": x}, ["c1"])["c1"]  # a value that is asked for is not absorbed
    torch.testing.assert_close(seen, apart({"x": x}, ["c1"])["c1"])


def test_settled_without_compensation_batch_norm_takes_the_shift_away() -> None:
    plan = Plan.uniform(Graph.parse(NETWORK), Precision(2, 2), None)
    graph, calibration, feeds = setting(NETWORK, plan)
    module = GraphModule(graph)
    quantize_module(module, plan, calibration, None, Quantizers("lsq-odd"))
    x = torch.from_numpy(feeds["x"])
    wanted = copy.deepcopy(module).train()({"x": x})["y"]
    module.settle_batch_norm([{"x": x}], keep=False)
    module.train().freeze_batch_norm = True
    torch.testing.assert_close(module({"x": x})["y"], wanted, atol=0.05, rtol=0.05)


def test_compensated_codes_do_not_hang_on_a_hair() -> None:
    """A small step of every weight leaves the codes where compensation put them."""
    plan = Plan.uniform(Graph.parse(NETWORK), Precision(3, 3), None)
    module, _, _ = rounded_module(NETWORK, plan)
    for name in plan.layers:
        hook, weight = module.hooks.find(name), module.weight(name).detach()
        codes = hook.weight.integers(weight).values
        step = hook.weight.step.detach()
        for way in (-0.2, 0.2):
            assert np.array_equal(hook.weight.integers(weight + way * step).values, codes)
