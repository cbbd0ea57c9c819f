"""Any float graph as a module: real networks, batches, weights there and back."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.errors import GraphError, ModelError
from mpqc.graph import Array, Graph
from mpqc.onnx_export import to_onnx
from mpqc.ort import Session
from mpqc.train import GraphModule, LayerHook, Product, check_batching, folded, load_graph
from tests.train.conftest import NETWORK, pictures

REAL = (
    "ad01_autoencoder", "cifar10_resnet20", "cifar10_resnet8", "espcn_x2_float",
    "magika_standard_v3_3", "mnist_cnn", "mobilenet_v1_0.25_224", "mobilenet_v2_1.0_224",
    "ppocr_v2_angle_cls", "squeezenet1.0_sparse", "ultraface_rfb320",
    "ultraface_rfb320_simplified",
)  # fmt: skip


def feeds(graph: Graph, copies: int = 1) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        name: (
            rng.standard_normal((kind.shape[0] * copies, *kind.shape[1:])).astype(np.float32)
            if kind.dtype == "float32"
            else rng.integers(0, 256, (kind.shape[0] * copies, *kind.shape[1:])).astype(kind.dtype)
        )
        for name, kind in graph.inputs.items()
    }


def tensors(arrays: dict[str, Array]) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def close(got: dict[str, Any], wanted: dict[str, Array], share: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        difference = np.abs(got[name].detach().numpy() - array).max()
        assert difference <= share * np.abs(array).max(), name


def check(graph: Graph) -> None:
    """The module computes what ONNX Runtime does, and gives its graph back as it was."""
    given = feeds(graph)
    wanted = Session(to_onnx(graph)).run(given)
    module = GraphModule(graph).eval()
    with torch.no_grad():
        close(module(tensors(given)), wanted)
    assert to_onnx(module.to_graph()) == to_onnx(graph)
    check_batching(module, feeds(graph, 2))


@pytest.mark.parametrize("name", REAL)
def test_real_networks_compute_as_in_onnx_runtime(name: str, shared_models: Path) -> None:
    dims = {"x:2": 48, "x:3": 192} if name.startswith("ppocr") else None
    check(load_graph(shared_models / f"{name}.onnx", dims))


def test_the_demo_network_computes_as_in_onnx_runtime(demo: tuple[Path, Path, Path]) -> None:
    check(load_graph(demo[0]))


def test_any_multiple_of_the_batch_runs(demo: tuple[Path, Path, Path]) -> None:
    three = load_graph(demo[0], batch=3)
    module = GraphModule(load_graph(demo[0])).eval()
    given = feeds(three)
    with torch.no_grad():
        close(module(tensors(given)), Session(to_onnx(three)).run(given))


def test_samples_that_see_each_other_are_refused() -> None:
    graph = Graph.parse(
        """
        %x = Input() : f32[1,4]
        %m = ReduceMax(%x) {keepdims=0} : f32[]
        %w = Constant() : f32[4,2]
        %d = Sub(%x, %m) : f32[1,4]
        %y = MatMul(%d, %w) : f32[1,2]
        return %y
        """
    )
    with pytest.raises(ModelError, match="depends on the other samples"):
        check_batching(GraphModule(graph), feeds(graph, 2))


def test_batch_norm_takes_the_batch_in_training_and_its_own_statistics_else() -> None:
    graph = Graph.parse(NETWORK)
    module = GraphModule(graph)
    x = torch.from_numpy(pictures(4)["x"])
    module.train()
    normed = module({"x": x}, ["n1"])["n1"]
    scale, shift = (module.constant(name).detach() for name in ("g1", "s1"))
    assert torch.allclose(normed.mean((0, 2, 3)), shift, atol=1e-5)
    assert torch.allclose(normed.std((0, 2, 3), unbiased=False), scale.abs(), atol=1e-4)
    moved = module.raw("m1").clone()
    assert not np.allclose(moved.numpy(), graph.constants["m1"])
    module.freeze_batch_norm = True
    module({"x": x})
    assert torch.equal(module.raw("m1"), moved)
    np.testing.assert_array_equal(module.to_graph().constants["m1"], moved.numpy())


def test_trained_weights_reach_the_folded_graph_and_onnx() -> None:
    graph = Graph.parse(NETWORK)
    module = GraphModule(graph)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.from_numpy(pictures(8)["x"])
    for _ in range(3):
        optimizer.zero_grad()
        module({"x": x})["y"].square().mean().backward()
        optimizer.step()
    given = {"x": pictures(4, 1)["x"]}
    module.eval()
    with torch.no_grad():
        got = module(tensors(given))
    close(got, Session(to_onnx(module.to_graph())).run(given))
    close(got, Session(to_onnx(folded(module.to_graph()))).run(given))
    changed = module.to_graph().constants
    assert all((changed[name] != graph.constants[name]).any() for name in ("w1", "w2", "w4", "g1"))


def test_scales_of_batch_norm_turn_positive_without_a_change() -> None:
    module = GraphModule(Graph.parse(NETWORK)).eval()
    x = torch.from_numpy(pictures(4)["x"])
    before = module({"x": x})["y"]
    assert module.make_positive("conv1")
    assert (module.raw("g1") > 0).all()
    assert torch.allclose(module({"x": x})["y"], before, atol=1e-6)
    assert not module.make_positive("classifier")
    with torch.no_grad():
        module.raw("g1")[0] = -0.5
    assert float(module.to_graph().constants["g1"][0]) == 0.5


def test_hooks_replace_what_a_layer_computes() -> None:
    class Twice(LayerHook):
        def forward(
            self, product: Product, x: Any, weight: Any,
            bias: Any,
        ) -> Any:  # fmt: skip
            assert weight.shape[0] == 5
            return product(x, weight, None) + product(x, weight, bias)

    module = GraphModule(Graph.parse(NETWORK)).eval()
    x = torch.from_numpy(pictures(4)["x"])
    values = module({"x": x}, ["f", "y"])
    module.hooks.put("classifier", Twice())
    twice = module({"x": x})["y"]
    assert torch.allclose(twice, 2 * values["y"] - module.constant("b4"), atol=1e-5)
    assert module.hooks.names() == ["classifier"]
    module.hooks.drop("classifier")
    assert torch.equal(module({"x": x})["y"], values["y"])


@pytest.mark.parametrize("names", [["a.b", "a/b", "a%2Eb", "keys", "", "a b"]])
def test_layers_may_have_any_name(names: list[str]) -> None:
    module = GraphModule(Graph.parse(NETWORK))
    for name in names:
        module.hooks.put(name, LayerHook())
    assert module.hooks.names() == names
    assert module.hooks.find("a.c") is None


def test_copies_are_independent_and_travel() -> None:
    module = GraphModule(Graph.parse(NETWORK)).eval()
    twin = copy.deepcopy(module)
    sent = pickle.loads(pickle.dumps(module))
    x = torch.from_numpy(pictures(4)["x"])
    before = module({"x": x})["y"]
    with torch.no_grad():
        twin.raw("w4").zero_()
    assert torch.equal(module({"x": x})["y"], before)
    assert torch.equal(sent({"x": x})["y"], before)


def test_what_cannot_be_trained_is_named() -> None:
    graph = Graph.parse(
        """
        %x = Input() : f32[1,4]
        %s = Constant() {value=[0.1]} : f32[]
        %z = Constant() {value=[3]} : u8[]
        %q = QuantizeLinear(%x, %s, %z) : u8[1,4] @quantizer
        %y = DequantizeLinear(%q, %s, %z) : f32[1,4]
        return %y
        """
    )
    with pytest.raises(ModelError, match=r"QuantizeLinear \(as .* cannot be trained"):
        GraphModule(graph)
    with pytest.raises(GraphError, match="no operator of the network reads"):
        GraphModule(Graph.parse(NETWORK)).constant("nothing")
