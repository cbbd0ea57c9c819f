"""The trainer that searches get."""

import pickle
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.graph import Precision
from mpqc.search.problem import Trainer
from mpqc.train import GraphModule
from mpqc.train.loop import Recipe
from mpqc.train.trainer import PlanTrainer

Files = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def trainer(request: pytest.FixtureRequest) -> PlanTrainer:
    import mpqc.demo

    model, train, test = mpqc.demo.files()
    recipe = Recipe(batch_size=20, lr=0.002, step_lr=0.002)
    return PlanTrainer.open(model, train, validate=test, recipe=recipe, device="cpu")


def widths(trainer: PlanTrainer, bits: int, **others: int) -> dict[str, Precision]:
    names = GraphModule(trainer.graph).layers
    return {name: Precision(others.get(name, bits), bits) for name in names}


def test_trains_from_the_float_model(trainer: PlanTrainer) -> None:
    rounded = trainer.train(widths(trainer, 2), 0)
    trained = trainer.train(widths(trainer, 2), 2)
    assert rounded > 0.9
    assert trained > 0.9
    assert trained == trainer.train(widths(trainer, 2), 2), "the seed decides"
    assert trained != rounded


def test_goes_on_from_a_checkpoint_and_keeps_what_keeps_its_width(trainer: PlanTrainer) -> None:
    four = trainer.network(trainer.plan(widths(trainer, 4)))
    trainer.fit(four, 0.5)
    again = trainer.network(trainer.plan(widths(trainer, 4)), four)
    assert all(
        (again.rounded()[name].weights.values == layer.weights.values).all()
        and again.rounded()[name].rule == layer.rule
        for name, layer in four.rounded().items()
    )
    mixed = trainer.network(trainer.plan(widths(trainer, 4, down=2)), four)
    for name in ("down", "pointwise"):
        old, new = four.hooks.find(name), mixed.hooks.find(name)
        same = torch.equal(old.weight.log_step, new.weight.log_step)
        assert same == (name == "pointwise")
        assert new.data.rule() == old.data.rule()
    assert mixed.rounded()["down"].weights.values.max() <= 1
    np.testing.assert_array_equal(
        mixed.to_graph().constants["down.weight"], four.to_graph().constants["down.weight"]
    )


def test_travels_to_another_process(trainer: PlanTrainer) -> None:
    handle: Trainer = trainer  # as search problems take it
    here = handle.train(widths(trainer, 3), 0.5)
    there = pickle.loads(pickle.dumps(trainer))
    assert there.train(widths(trainer, 3), 0.5) == here


def test_a_float_network_is_measured_too(trainer: PlanTrainer) -> None:
    assert trainer.measure(trainer.network()) == pytest.approx(0.9899, abs=1e-3)
