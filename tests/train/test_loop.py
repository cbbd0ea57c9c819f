"""Training: it learns, resumes to the bit, and stops in a state that can be used."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.calibration import calibrate
from mpqc.data import open_data
from mpqc.errors import DataError, EnvironmentLacks, OutputError, UsageError
from mpqc.graph import Array, Graph, Precision
from mpqc.passes.quantize_layers import tensors_to_calibrate
from mpqc.plan import Plan
from mpqc.train import GraphModule, checkpoint, folded, quantize_module
from mpqc.train.batches import Augment, TrainingSet
from mpqc.train.loop import (
    Recipe,
    Status,
    Teacher,
    Training,
    TrainingDiverged,
    evaluate,
    find_device,
)
from mpqc.train.objective import Objective
from tests.train.conftest import NETWORK, pictures

RECIPE = Recipe(epochs=3, batch_size=4, augment=Augment(flip=True), freeze=0.3)


def training(
    recipe: Recipe = RECIPE, arrays: dict[str, Array] | None = None, text: str = NETWORK
) -> Training:
    graph = Graph.parse(text)
    data = open_data(arrays or pictures(24), folded(graph))
    samples, held = TrainingSet.read(data, graph).split(0.2, 4, 0)
    plan = Plan.uniform(folded(graph), Precision(2, 2), None)
    calibration = calibrate(folded(graph), data, tensors_to_calibrate(folded(graph), plan))
    module = GraphModule(graph)
    quantize_module(module, plan, calibration)
    objective = Objective.of(graph, True)
    return Training(module, objective, samples, held, recipe, Teacher(GraphModule(graph)))


def same(a: GraphModule, b: GraphModule) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def distance(work: Training) -> float:
    """Of the network as compiled from its teacher, on the training samples."""
    samples = {"x": torch.from_numpy(work.training.arrays["x"])}
    with torch.no_grad():
        wanted = GraphModule(work.module.graph).eval()(samples)
        return float(work.objective.loss(work.module.eval()(samples), wanted, None))


def test_distillation_brings_the_network_to_its_teacher() -> None:
    work = training(Recipe(epochs=15, batch_size=4, lr=0.02, step_lr=0.02, freeze=0.5))
    before = distance(work)
    history = work.run()
    assert not work.module.training
    assert [record.epoch for record in history] == list(range(1, 16))
    assert history[-1].validation is not None
    assert distance(work) < 0.5 * before


def test_known_outputs_are_of_the_training_samples_only() -> None:
    """Without labels, held-out samples are judged by the float model, not by rows it never made."""
    work = training()
    exact = GraphModule(work.module.graph)
    unlabelled = replace(work.validation, labels=None)
    knowing = Teacher(exact, work.training, 4)
    assert evaluate(exact, unlabelled, work.objective, knowing) == 1.0
    (batch,) = unlabelled.batches(len(unlabelled))
    for name, values in Teacher(exact).anew(batch).items():
        assert torch.equal(knowing.anew(batch)[name], values)
        assert not torch.equal(knowing(batch)[name], values)


@pytest.mark.parametrize("stop", [1, 7, 10])
def test_resumed_is_uninterrupted(stop: int, tmp_path: Path) -> None:
    whole = training()
    whole.run()
    path = tmp_path / "c.pt"
    first = training()
    first.run(path=path, about={"a": "b"}, every=0.0, stop=stop)
    assert first.step == stop
    second = training()
    second.restore(checkpoint.load(path, {"a": "b"}))
    second.run()
    assert same(whole.module, second.module)
    assert not same(whole.module, first.module)
    assert [r.loss for r in whole.history] == [r.loss for r in second.history]
    assert [r.validation for r in whole.history] == [r.validation for r in second.history]


def test_interrupted_between_steps_is_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole = training()
    whole.run()
    path = tmp_path / "c.pt"

    def interrupt(status: Status) -> None:
        if status.step == 8:
            raise KeyboardInterrupt

    first = training()
    with pytest.raises(KeyboardInterrupt):
        first.run(interrupt, path, every=0.0)
    second = training()
    second.restore(checkpoint.load(path, {}))
    assert 0 < second.step <= 8
    second.run()
    assert same(whole.module, second.module)


def test_seeds_decide() -> None:
    a, b = training(), training(Recipe(epochs=3, batch_size=4, freeze=0.3, seed=1))
    a.run()
    b.run()
    assert not same(a.module, b.module)


def test_divergence_is_an_error_and_the_last_good_state_stays(tmp_path: Path) -> None:
    work = training()
    path = tmp_path / "c.pt"
    work.run(path=path, stop=5, every=0.0)
    good = path.read_bytes()
    with torch.no_grad():
        work.module.raw("w4")[0, 0] = torch.nan
    with pytest.raises(TrainingDiverged, match=r"at step 5 of .* last good state is in .*c\.pt"):
        work.run(path=path, every=0.0)
    assert path.read_bytes() == good
    state = checkpoint.load(path, {})
    assert all(torch.isfinite(t).all() for t in state["average"].values())


def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = training()
    path = tmp_path / "c.pt"
    work.run(path=path, stop=2, every=0.0)
    good = path.read_bytes()

    def full(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"No space left.*last good checkpoint stays.*--resume"):
        work.run(path=path, every=0.0)
    assert path.read_bytes() == good
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


def test_checkpoints_of_other_runs_and_damaged_ones(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"step": 3}, {"the plan": "a"})
    assert checkpoint.load(path, {"the plan": "a"}) == {"step": 3}
    with pytest.raises(UsageError, match="the plan was a, now it is b"):
        checkpoint.load(path, {"the plan": "b"})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match="cannot resume from"):
        checkpoint.load(path, {})
    with pytest.raises(UsageError, match="cannot resume from"):
        checkpoint.load(tmp_path / "none.pt", {})


def test_the_average_is_what_is_kept() -> None:
    work = training(Recipe(epochs=1, batch_size=4, ema=0.9))
    work.run(stop=3)
    own = work.module.raw("w1").detach().clone()
    with work.averaged():
        assert not torch.equal(work.module.raw("w1"), own)
    assert torch.equal(work.module.raw("w1"), own)
    plain = training(Recipe(epochs=1, batch_size=4, ema=0.0))
    plain.run(stop=3)
    with plain.averaged():
        assert torch.equal(plain.module.raw("w1"), own)


def test_infinite_constants_stay_as_they_are() -> None:
    text = NETWORK.replace("%r1 = Relu(%n1)", "%i = Constant() {value=[-Infinity]} : f32[1]\n"
                           "%r0 = Max(%n1, %i) : f32[4,8,6,6]\n%r1 = Relu(%r0)")  # fmt: skip
    work = training(RECIPE, text=text)
    work.run()
    assert work.module.constant("i").tolist() == [-torch.inf]
    assert set(work.module.statistics()) == {"m1", "v1"}


def test_rates_rise_and_fall() -> None:
    recipe = Recipe(warmup=0.1)
    rates = [recipe.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[-1] < 0.01
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_known_targets_are_those_of_each_batch() -> None:
    work = training()
    module = GraphModule(work.module.graph)
    batch = next(iter(work.training.epoch(4, 0, 0)))
    known = Teacher(module, work.training, 4)(batch)
    for name, tensor in Teacher(module)(batch).items():
        assert torch.allclose(known[name], tensor, atol=1e-6)


def test_epochs_may_be_a_fraction() -> None:
    work = training(Recipe(epochs=0.5, batch_size=4))
    history = work.run()
    assert (work.step, len(history)) == (2, 1)


def test_too_few_samples_and_wrong_labels_are_said_before_the_work() -> None:
    with pytest.raises(DataError, match="do not fill a batch of 64"):
        training(Recipe(batch_size=64))
    arrays = pictures(24)
    arrays["labels"] = arrays["labels"] + 3
    with pytest.raises(DataError, match="out of range"):
        training(arrays=arrays)


def test_devices() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda")
    with pytest.raises(UsageError, match="no device 'abacus'"):
        find_device("abacus")
    with pytest.raises(EnvironmentLacks, match="--device cpu"):
        find_device("cuda:99")
    with pytest.raises(UsageError, match="no device"):
        find_device("meta")


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"lr": -1.0}, {"ema": 1.0}, {"optimizer": "other"}]
)
def test_recipes_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Recipe(**wrong)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_optimizers(optimizer: Any) -> None:
    work = training(Recipe(epochs=1, batch_size=4, optimizer=optimizer, clip=1.0))
    before = work.module.raw("w1").detach().clone()
    work.run()
    assert not torch.equal(work.module.raw("w1"), before)
    assert 0 <= evaluate(work.module, work.validation, work.objective) <= 1
