"""DNAS: masks, super-nets with own and shared weights, costs in the loss, sampled plans."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.errors import UsageError
from mpqc.graph import Precision
from mpqc.search import load, precisions
from mpqc.search.constraints import Constraints
from mpqc.search.dnas import Dnas
from mpqc.search.problem import Problem
from mpqc.search.scores import Scores
from mpqc.search.testing import toy_problem
from mpqc.train import GraphModule
from mpqc.train.loop import TrainingDiverged
from mpqc.train.search import base, dnas
from mpqc.train.search.base import Ground
from mpqc.train.search.dnas import Architectures, DnasRelaxation, drawn
from mpqc.train.search.loop import Schedule
from mpqc.train.search.pick import Judge
from tests.train.contract import toy_trainer

CPU = torch.device("cpu")


def problem(budget: str = "bitops=w3a3", **changes: Any) -> Problem:
    return toy_problem(budget, **{"trainer": toy_trainer(), **changes})


def relaxed(method: Dnas | None = None, **changes: Any) -> DnasRelaxation:
    torch.manual_seed(0)
    return DnasRelaxation(Ground.of(problem(**changes), "dnas"), method or Dnas())


class StopError(Exception):
    pass


@pytest.mark.parametrize("temperature", [5.0, 0.5])
def test_masks_sum_to_one(temperature: float) -> None:
    torch.manual_seed(0)
    made = Architectures(problem(), CPU)
    for _ in range(20):
        made.draw(temperature)
        for mask in made.masks.values():
            assert float(mask.detach().sum()) == pytest.approx(1.0, abs=1e-5)
            assert bool((mask >= 0).all())


def test_cold_masks_are_one_hot_and_layers_of_one_input_agree() -> None:
    torch.manual_seed(0)
    given = problem(constraints=Constraints(tie=(("depthwise", "pointwise"),)))
    made = Architectures(given, CPU)
    seen = set()
    for _ in range(40):
        made.draw(1e-4)
        picked: dict[str, Precision] = {}
        for name, mask in made.masks.items():
            assert float(mask.detach().max()) == pytest.approx(1.0, abs=1e-3)
            picked[name] = given.choices[name][int(mask.argmax())]
        assert picked["main"].activation == picked["shortcut"].activation
        assert picked["depthwise"] == picked["pointwise"]
        seen.add(picked["main"])
    assert len(seen) > 5


def test_probabilities_of_layers_that_share_an_input() -> None:
    """P(a) counts what all of them give to a; weight widths follow by themselves."""
    given = problem()
    made = Architectures(given, CPU)
    with torch.no_grad():
        for logits in made.logits.values():
            logits.copy_(torch.randn(logits.shape))
    made.draw(1.0, noisy=False)
    main, shortcut = given.choices["main"], given.choices["shortcut"]
    total: dict[tuple[Precision, Precision], float] = {}
    for i, p in enumerate(main):
        for j, q in enumerate(shortcut):
            if p.activation == q.activation:
                both = made.logits["main"][i] + made.logits["shortcut"][j]
                total[p, q] = float(both.detach().exp())
    whole = sum(total.values())
    losses = made.losses()
    for i, p in enumerate(main):
        share = sum(value for (one, _), value in total.items() if one == p) / whole
        assert float(made.masks["main"][i].detach()) == pytest.approx(share, rel=1e-4)
    for (p, q), value in total.items():
        together = losses["main"][p] + losses["shortcut"][q]
        assert together == pytest.approx(-float(torch.tensor(value / whole).log()), rel=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_a_super_layer_is_the_sum_of_its_operators(shared: bool) -> None:
    net = relaxed(Dnas(share_weights=shared, quantizer="lsq"))
    net.draw(0.0)
    for name in ("main", "depthwise", "classifier"):
        hook = net.module.hooks.find(name)
        layer = net.module.layers[name]
        shape = net.module.graph.shape(layer.input)
        x, weight = torch.randn(2, *shape[1:]), net.module.weight(name)
        bias = net.module.bias(name)
        product = net.module._product(net.module.graph[name])
        expected = 0
        for k, precision in enumerate(hook.precisions):
            own = weight if hook.copies is None else hook.copies[k] * (1 + 0.01 * k)
            if hook.copies is not None:
                hook.copies[k].data.copy_(own)
            data = hook.inputs[hook.widths.index(precision.activation)](x)
            expected = expected + hook.mask()[k] * product(data, hook.weights[k](own), bias)
        found = hook(product, x, weight, bias)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (net.module.hooks.find("main").copies is None) == shared


def test_hard_samples_run_one_operator_and_teach_all_logits() -> None:
    net = relaxed(Dnas(hard_sample=True))
    net.module.train()
    net.learning = False
    net.draw(0.0)
    calls = 0
    hook = net.module.hooks.find("main")

    def product(x: Any, weight: Any, bias: Any) -> Any:
        nonlocal calls
        calls += 1
        return net.module._product(net.module.graph["main"])(x, weight, bias)

    x = torch.randn(2, 8, 8, 8)
    hook(product, x, net.module.weight("main"), None)
    assert calls == 1
    net.learning = True
    net.draw(0.0)
    assert sorted(hook.mask().detach().tolist())[-1] == pytest.approx(1.0)
    hook(product, x, net.module.weight("main"), None).square().sum().backward()
    assert calls == 1 + len(hook.widths)
    assert bool((net.architectures.logits["main"].grad != 0).all())


def test_cost_of_a_cold_mask_is_that_of_the_plan() -> None:
    net = relaxed()
    given = problem()
    net.architectures.draw(1e-5)
    widths = {n: given.choices[n][int(m.argmax())] for n, m in net.architectures.masks.items()}
    for objective in ("bitops", "size"):
        found = float(net._ground.costs.expected(net.shares(), objective))
        assert found == pytest.approx(given.cost(widths, objective), rel=1e-3)


@pytest.mark.parametrize("cost", ["budget", "product"])
def test_cost_in_the_loss(cost: Any) -> None:
    net = relaxed(Dnas(cost=cost), budget="bitops=w2a2")
    net.architectures.draw(1.0, noisy=False)
    loss = net.objective(torch.tensor(2.0))
    if cost == "product":
        assert float(loss) == pytest.approx(2.0, rel=1e-4)  # beta makes C one at the start
    else:
        assert float(loss) > 2.0
    loss.backward()
    grads = net.architectures.logits["main"].grad
    row = problem().choices["main"]
    assert grads[row.index(Precision(8, 8))] > 0 > grads[row.index(Precision(2, 2))]


def test_temperature_falls_whatever_the_number_of_epochs() -> None:
    net = relaxed(Dnas(temperature=5.0))
    epochs = toy_trainer().recipe.epochs
    assert net.temperature(0) == 5.0
    assert net.temperature(epochs) == pytest.approx(0.1)
    assert relaxed(Dnas(cooling=0.045)).temperature(1) == pytest.approx(5 * 0.955997, rel=1e-5)


def test_drawn_plans_keep_the_budget_and_start_with_the_most_probable() -> None:
    given = problem()
    net = relaxed()
    with torch.no_grad():
        for logits in net.architectures.logits.values():
            logits.copy_(torch.randn(logits.shape))
    plans = drawn(given, net.losses(), 6)
    assert len(plans) > 2
    assert all(given.problems(widths) == [] for widths in plans)
    assert plans == drawn(given, net.losses(), 6)


def test_the_best_of_the_drawn_plans_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[dict[str, Precision]] = []
    trained: list[float] = []

    def held_loss(trainer: Any, module: Any, teacher: Any) -> float:
        hooks = {name: module.hooks.find(name) for name in problem().choices}
        tried.append({n: Precision(h.weight.bits, h.data.bits) for n, h in hooks.items()})
        return 1.0 / len(tried)

    monkeypatch.setattr(dnas, "held_loss", held_loss)
    monkeypatch.setattr(
        type(toy_trainer()), "fit", lambda self, module, epochs, *_: trained.append(epochs)
    )
    plan = Dnas(samples=4, short=0.5)(problem())
    assert len(tried) > 1
    assert precisions(plan) == tried[-1]
    assert trained == [0.5] * len(tried)


def test_plans_that_are_not_trained_are_measured_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float] = []
    exact = Judge.__call__

    def watched(self: Judge, module: Any) -> float:
        measured.append(exact(self, module))
        return measured[-1]

    monkeypatch.setattr(Judge, "__call__", watched)
    monkeypatch.setattr(type(toy_trainer()), "fit", None)
    scores = relaxed().losses()
    monkeypatch.setattr(Dnas, "learned", lambda self, given: Scores(scores, "loss"))
    plan = Dnas(samples=3, short=0)(problem())
    assert problem().problems(precisions(plan)) == []
    assert 3 < len(measured) <= 6


def test_resumed_is_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "EVERY", 0.0)
    trainer = replace(toy_trainer(), recipe=replace(toy_trainer().recipe, epochs=3))
    method = load("dnas", {"samples": "0"})
    assert isinstance(method, Dnas)

    def run(cache: Path, stop: int = 0) -> Any:
        calls = 0

        def tell(label: str, done: int, total: int) -> None:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise StopError

        return method.scores(problem(trainer=trainer, cache=cache, progress=tell)).losses

    expected = run(tmp_path / "whole")
    for stop in (5, 3):
        with pytest.raises(StopError):
            run(tmp_path / "parts", stop)
    assert run(tmp_path / "parts") == expected


def test_divergence_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        DnasRelaxation, "objective", lambda self, loss: loss * torch.tensor(float("inf"))
    )
    with pytest.raises(TrainingDiverged, match="dnas diverged at step"):
        Dnas().scores(problem())


def test_copies_learn_and_at_the_rates_of_weights() -> None:
    given, method = problem(), Dnas(samples=0)
    seen: list[DnasRelaxation] = []

    def make(ground: Ground) -> DnasRelaxation:
        seen.append(DnasRelaxation(ground, method))
        return seen[0]

    base.learn(given, method, make, Schedule(turns="epoch", weights_share=0.6))
    before = GraphModule(toy_trainer().graph).weight("main")
    copies = seen[0].module.hooks.find("main").copies
    assert all(not torch.equal(copy, before) for copy in copies)
    assert not torch.equal(copies[0], copies[-1])
    rates = {
        id(tensor): group["lr"]
        for group in seen[0].weight_groups(toy_trainer().recipe)
        for tensor in group["params"]
    }
    size = float(before.square().mean().sqrt())
    assert rates[id(copies[0])] == pytest.approx(toy_trainer().recipe.lr * size, rel=0.5)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"price": -1.0}, {"samples": -1}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="dnas"):
        Dnas(**options)
