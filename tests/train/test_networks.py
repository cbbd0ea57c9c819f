"""Training needs no word about the network: transformers, depthwise convolutions, detectors."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc import reference
from mpqc.calibration import Calibration, calibrate
from mpqc.data import open_data
from mpqc.graph import Array, Graph, Precision
from mpqc.passes.quantize_layers import QuantizeLayers, tensors_to_calibrate
from mpqc.plan import Plan
from mpqc.train import GraphModule, folded, load_graph, quantize_module, source
from mpqc.train.batches import TrainingSet
from mpqc.train.loop import Recipe, Teacher, Training, run
from mpqc.train.objective import Objective
from mpqc.train.trainer import PlanTrainer
from tests.train.test_quantized_layer import BLOCK


def train(graph: Graph, bits: str, count: int, steps: int) -> tuple[Training, Plan, list[float]]:
    """A few steps from plain calibration, and the loss before each."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    for name, kind in graph.inputs.items():
        shape = (count, *kind.shape[1:])
        if kind.dtype == "float32":
            arrays[name] = rng.standard_normal(shape).astype(np.float32)
        else:
            arrays[name] = rng.integers(0, 256, shape).astype(kind.dtype)
    flat = folded(graph)
    data = open_data(arrays, flat)
    plan = Plan.uniform(flat, Precision.parse(bits), Precision(8, 8))
    calibration = calibrate(flat, data, tensors_to_calibrate(flat, plan))
    module = GraphModule(graph)
    quantize_module(module, plan, calibration)
    samples = TrainingSet.read(data, graph)
    batch = graph.inputs[next(iter(graph.inputs))].shape[0]
    recipe = Recipe(epochs=steps * batch / count, batch_size=batch, lr=0.003, freeze=0.0, warmup=0)
    held = samples.split(0.0, 0, 0)[1]
    teacher = Teacher(GraphModule(graph))
    work = Training(module, Objective.of(graph, False), samples, held, recipe, teacher)
    losses: list[float] = []
    work.run(lambda status: losses.append(status.loss))
    assert work.step == steps
    assert np.isfinite(losses).all()
    return work, plan, losses


def exact(work: Training, plan: Plan) -> None:
    """The trained layers compute as the integer graph says."""
    module = work.module.eval()
    flat = folded(module.to_graph())
    integers = QuantizeLayers(plan, _none(), rounded=module.rounded())(flat)
    name, kind = next(iter(flat.inputs.items()))
    x = work.training.arrays[name][: kind.shape[0]]
    with torch.no_grad():
        got = module({name: torch.from_numpy(np.array(x))})
    for value, array in reference.run(integers, {name: x}).items():
        spread = float(array.std()) or 1.0
        # float operators in between differ in the last place, and then a code may
        assert np.abs(got[value].numpy() - array).mean() < 0.05 * spread, value


def _none() -> Calibration:

    return Calibration({}, 0)


def test_a_transformer_block_trains() -> None:
    work, plan, losses = train(Graph.parse(BLOCK), "w4a4", 16, 24)
    assert len(losses) == 24
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    exact(work, plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("mobilenet_v2_1.0_224", "w4a4"),
        ("mobilenet_v1_0.25_224", "w4a8"),
        ("squeezenet1.0_sparse", "w3a4"),
        ("ppocr_v2_angle_cls", "w4a4"),
        ("ultraface_rfb320", "w4a4"),
        ("magika_standard_v3_3", "w4a4"),
        ("espcn_x2_float", "w4a4"),
        ("mnist_cnn", "w2a2"),
        ("ad01_autoencoder", "w2a4"),
    ],
)
def test_real_networks_train_for_a_few_steps(name: str, bits: str, shared_models: Path) -> None:
    dims = {"x:2": 48, "x:3": 192} if name.startswith("ppocr") else None
    work, plan, _ = train(load_graph(shared_models / f"{name}.onnx", dims, 2), bits, 4, 3)
    exact(work, plan)


def attention(batch: int) -> str:
    """Positions first, as older exporters write attention: the batch is in the middle."""
    return f"""
    %x = Input() : f32[{batch},6,8]
    %w = Constant() : f32[8,8]
    %head = Constant() {{value=[6, {2 * batch}, 4]}} : i64[3]
    %back = Constant() {{value=[6, {batch}, 8]}} : i64[3]
    %t = Transpose(%x) {{perm=[1, 0, 2]}} : f32[6,{batch},8]
    %q = MatMul(%t, %w) : f32[6,{batch},8] @query
    %h = Reshape(%q, %head) : f32[6,{2 * batch},4]
    %a = Transpose(%h) {{perm=[1, 0, 2]}} : f32[{2 * batch},6,4]
    %b = Transpose(%h) {{perm=[1, 2, 0]}} : f32[{2 * batch},4,6]
    %s = MatMul(%a, %b) : f32[{2 * batch},6,6]
    %p = Softmax(%s) {{axis=-1}} : f32[{2 * batch},6,6]
    %v = MatMul(%p, %a) : f32[{2 * batch},6,4]
    %u = Transpose(%v) {{perm=[1, 0, 2]}} : f32[6,{2 * batch},4]
    %m = Reshape(%u, %back) : f32[6,{batch},8]
    %y = Transpose(%m) {{perm=[1, 0, 2]}} : f32[{batch},6,8]
    return %y
    """


def test_a_batch_in_the_middle_of_shapes_trains_at_its_own_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = {batch: Graph.parse(attention(batch)) for batch in (1, 2, 4, 8)}

    def load(path: Path, dims: object = None, batch: int = 1) -> Graph:
        return graphs[batch]

    monkeypatch.setattr(source, "load_graph", load)
    monkeypatch.setattr("mpqc.importer.sha256", lambda path: "0" * 64)
    x = np.random.default_rng(0).standard_normal((22, 6, 8)).astype(np.float32)
    trainer = PlanTrainer.open(
        "model.onnx", {"x": x}, recipe=Recipe(batch_size=4), device="cpu", validate={"x": x[:6]}
    )
    assert trainer.graph is graphs[4]
    before = trainer.train({"query": Precision(2, 4)}, 0)
    after = trainer.train({"query": Precision(2, 4)}, 8)
    assert before < after <= 1
    module = GraphModule(graphs[4]).eval()
    with torch.no_grad():
        whole = module({"x": torch.from_numpy(x[:4])})["y"]
        part = run(module, TrainingSet({"x": x}, None, np.arange(22)).take(np.arange(3)))["y"]
    assert torch.allclose(whole[:3], part, atol=1e-6)


def test_a_network_takes_any_batch_where_it_can() -> None:
    graph = Graph.parse(
        """
        %x = Input() : f32[4,6]
        %s = Constant() {value=[4, 3, 2]} : i64[3]
        %y = Reshape(%x, %s) : f32[4,3,2]
        return %y
        """
    )
    module = GraphModule(graph)
    for count in (1, 3, 4, 9):
        assert module({"x": torch.zeros(count, 6)})["y"].shape == (count, 3, 2)
