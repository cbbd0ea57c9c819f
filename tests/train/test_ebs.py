"""EBS: mixtures over shared weights, expected costs, budgets, seeds, resuming, any network."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.errors import UsageError
from mpqc.graph import Precision
from mpqc.search import load, precisions
from mpqc.search.ebs import Ebs
from mpqc.search.problem import Problem
from mpqc.search.repair import repair
from mpqc.search.testing import toy_problem
from mpqc.train import DoReFaWeights, GraphModule, QuantizedLayer
from mpqc.train.loop import TrainingDiverged
from mpqc.train.search import base
from mpqc.train.search.base import Ground
from mpqc.train.search.costs import CORNER, CostTables, Space, joint, rounded
from mpqc.train.search.ebs import EbsRelaxation
from mpqc.train.search.loop import Schedule
from mpqc.train.search.mixed_layer import gumbel_softmax
from tests.train.contract import toy_trainer


def problem(budget: str = "bitops=w3a3", **changes: Any) -> Problem:
    return toy_problem(budget, **{"trainer": toy_trainer(), **changes})


def relaxed(method: Ebs | None = None, **changes: Any) -> EbsRelaxation:
    torch.manual_seed(0)
    return EbsRelaxation(Ground.of(problem(**changes), "ebs"), method or Ebs())


class StopError(Exception):
    pass


@pytest.mark.parametrize("quantizer", ["dorefa", "lsq"])
def test_one_hot_strengths_are_the_plain_quantizers(quantizer: Any) -> None:
    mixed = relaxed(Ebs(quantizer=quantizer))
    sizes = {name: len(logits) for name, logits in mixed.weights.logits.items()}
    mixed.weights.set({name: size // 2 for name, size in sizes.items()})
    mixed.inputs.set({name: len(t) - 1 for name, t in mixed.inputs.logits.items()})
    plain = GraphModule(mixed.module.graph)
    for name in mixed.module.hooks.names():
        hook = mixed.module.hooks.find(name)
        single = QuantizedLayer(hook.weights[sizes[name] // 2], hook.data.quantizers[-1])
        plain.hooks.put(name, single)
    x = torch.randn(4, 3, 8, 8)
    mixed.module.train()
    plain.train()
    assert torch.equal(mixed.module(x)["y"], plain(x)["y"])
    reference = GraphModule(mixed.module.graph).train()
    assert not torch.equal(reference(x)["y"], plain(x)["y"])


def test_gradients_of_strengths_are_those_of_the_mixture() -> None:
    """dL/dp_i = <dL/dW, Q_i(W)>, and the weights get the sum of all branches."""
    mixed = relaxed()
    hook, name = mixed.module.hooks.find("main"), "main"
    weight = mixed.module.weight(name).detach().requires_grad_()
    shares = torch.tensor([0.2, 0.3, 0.1, 0.4], requires_grad=True)
    hook.shares = lambda: shares
    hook.data.shares = lambda: torch.tensor([0.0, 0.0, 0.0, 1.0])
    seen: list[Any] = []

    def product(x: Any, w: Any, bias: Any) -> Any:
        w.retain_grad()
        seen.append(w)
        return (w * x.mean()).square().sum()

    hook(product, torch.ones(1, 8, 8, 8), weight, None).backward()
    levels = [quantizer(weight.detach()) for quantizer in hook.weights]
    expected = torch.stack([(seen[0].grad * level).sum() for level in levels])
    torch.testing.assert_close(shares.grad, expected)
    assert weight.grad.abs().sum() > 0


def test_expected_cost_is_bilinear() -> None:
    given = problem("bitops=w3a3,size=w3a3")
    space = Space.of(given)
    tables = CostTables(given, space, torch.device("cpu"))
    rng = np.random.default_rng(0)
    free = [name for name, row in given.choices.items() if len(row) > 1]

    def shares(table: dict[str, Any]) -> dict[str, Any]:
        return {name: joint(*table[name]) for name in given.choices}

    def random(count: int) -> Any:
        return torch.from_numpy(rng.dirichlet(np.ones(count)))

    point = {n: (random(len(space.weights[n])), random(len(space.inputs[n]))) for n in free}
    point |= {n: (torch.ones(1), torch.ones(1)) for n in given.choices if n not in free}
    wide = {name: (np.array(space.weights[name]), np.array(space.inputs[name])) for name in free}
    means = {n: [float(point[n][i].numpy() @ wide[n][i]) for i in (0, 1)] for n in free}
    bitops = sum(given.layer(n).macs * w * a for n, (w, a) in means.items())
    bitops += sum(given.layer(n).macs * 64 for n in given.choices if n not in free)
    size = sum(given.layer(n).weights * w / 8 for n, (w, _) in means.items())
    size += sum(given.layer(n).weights for n in given.choices if n not in free)
    assert float(tables.expected(shares(point), "bitops")) == pytest.approx(bitops)
    assert float(tables.expected(shares(point), "size")) == pytest.approx(size)
    one, other = random(4), random(4)
    costs = [
        float(tables.expected(shares(point | {"main": (w, point["main"][1])}), "bitops"))
        for w in (one, other, 0.25 * one + 0.75 * other)
    ]
    assert costs[2] == pytest.approx(0.25 * costs[0] + 0.75 * costs[1])
    parts = [
        max(0.0, c / b - 1) for c, b in zip((bitops, size), given.budgets.values(), strict=True)
    ]
    over = sum(x - CORNER / 2 if x > CORNER else x * x / (2 * CORNER) for x in parts)
    assert float(tables.excess(shares(point))) == pytest.approx(over, rel=1e-5)


def test_the_price_rises_from_nothing_at_the_budget() -> None:
    x = torch.tensor([0.0, 0.5 * CORNER, CORNER, 3 * CORNER, -CORNER], requires_grad=True)
    y = rounded(x)
    expected = [0.0, CORNER / 8, CORNER / 2, 2.5 * CORNER, CORNER / 2]
    torch.testing.assert_close(y.detach(), torch.tensor(expected))
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0.5, 1.0, 1.0, -1.0]))


def test_one_hot_cost_is_that_of_the_plan() -> None:
    """Also for a measured objective, which is no product of widths."""
    latency = {
        "latency": lambda layer, p: 1.0 if p is None else layer.macs * (p.weight > 3) + p.activation
    }
    given = replace(problem(), costs={**problem().costs, **latency})
    mixed = EbsRelaxation(Ground.of(given, "ebs"), Ebs())
    mixed.weights.set({name: len(t) - 1 for name, t in mixed.weights.logits.items()})
    mixed.inputs.set({name: 0 for name in mixed.inputs.logits})
    widths = {n: Precision(row[-1].weight, row[0].activation) for n, row in given.choices.items()}
    tables = CostTables(given, Space.of(given), torch.device("cpu"))
    for objective in ("bitops", "size", "latency"):
        found = float(tables.expected(mixed.shares(), objective))
        assert found == pytest.approx(given.cost(widths, objective))


def test_layers_that_share_an_input_share_its_strengths() -> None:
    mixed = relaxed()
    main, shortcut = (mixed.module.hooks.find(name) for name in ("main", "shortcut"))
    assert main.data is shortcut.data
    assert "shortcut" not in mixed.inputs.logits
    rows = mixed.losses()
    assert set(rows["main"]) == set(problem().choices["main"])


def test_gumbel_samples() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0])
    soft = torch.stack([gumbel_softmax(logits, 0.5) for _ in range(200)])
    assert torch.allclose(soft.sum(1), torch.ones(200))
    cold = torch.stack([gumbel_softmax(logits, 1e-3) for _ in range(3000)])
    assert float((cold.max(1).values > 0.99).float().mean()) > 0.99
    torch.testing.assert_close(cold.mean(0), logits.softmax(0), atol=0.03, rtol=0)
    hard = gumbel_softmax(logits, 2.0, hard=True)
    assert sorted(hard.tolist()) == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)


def test_stochastic_strengths_are_drawn_anew_and_end_cold() -> None:
    mixed = relaxed(Ebs(strengths="stochastic"))
    mixed.draw(0.0)
    first = mixed.weights.shares["main"].detach()
    mixed.draw(0.0)
    assert not torch.equal(first, mixed.weights.shares["main"])
    with torch.no_grad():
        for _ in range(5):
            mixed.draw(1.0)
    certain = relaxed(Ebs(start="even"))
    certain.draw(0.0)
    assert torch.allclose(certain.weights.shares["main"], torch.full((4,), 0.25))


@pytest.mark.parametrize("budget", ["bitops=w3a3", "bitops=w4a4,size=w3a3"])
def test_starts_at_the_budget(budget: str) -> None:
    mixed = relaxed(budget=budget)
    costs = mixed._ground.costs
    shares = {name: share.detach() for name, share in mixed.shares().items()}
    spent = [float(costs.expected(shares, n)) / b for n, b in costs.budgets.items()]
    assert max(spent) == pytest.approx(1.0, abs=1e-3)
    logits = mixed.weights.logits["main"].detach()  # candidates 2, 3, 4, 8
    torch.testing.assert_close(logits.diff(), (logits[1] - logits[0]) * torch.tensor([1.0, 1, 4]))


def test_losses_are_those_of_single_widths() -> None:
    """Shares at rest under a quadratic loss give back half the differences of errors' powers."""
    mixed = relaxed(budget="bitops=w3a3")
    hook = next(name for name, row in mixed._ground.space.weights.items() if len(row) == 4)
    with torch.no_grad():
        for part in (mixed.weights, mixed.inputs):
            for logits in part.logits.values():
                logits.copy_(torch.linspace(0.3, -0.3, len(logits)) if len(logits) > 1 else logits)
        mixed.draw(0.0)
    shares = mixed.weights.shares[hook].detach().requires_grad_()
    mixed.weights.shares[hook] = shares
    (budget,) = mixed._ground.costs.budgets.values()
    (mixed._ground.costs.expected(mixed.shares(), "bitops") / budget).backward()
    assert shares.grad is not None
    below = shares.detach().cumsum(0)[:-1]
    powers = shares.grad.diff() / below  # D_i, for which these shares are at rest
    row = mixed.losses()[hook]
    same = sorted((p for p in row if p.activation == 2), key=lambda p: p.weight)
    lost = torch.tensor([row[p] for p in same]).diff()
    torch.testing.assert_close(lost.float(), -powers.float() / 2, rtol=1e-4, atol=0.0)
    likeliest = relaxed(Ebs(choice="likeliest"), budget="bitops=w3a3").losses()[hook]
    assert likeliest != row


def test_strengths_go_where_the_objective_falls() -> None:
    """Over the budget, the price alone moves them to narrow widths; within it, nothing does."""
    for budget, sign in (("bitops=w2a2", 1), ("bitops=w8a8", 0)):
        mixed = relaxed(Ebs(price=1.0), budget=budget)
        mixed.draw(0.0)
        mixed.objective(torch.zeros(())).backward()
        grads = mixed.weights.logits["main"].grad
        assert (grads is not None and grads[-1] > 0 > grads[0]) == bool(sign)


def test_repair_is_exact_and_uses_the_budget_up() -> None:
    given = problem("bitops=w4a4")
    rng = np.random.default_rng(2)
    losses = {n: {p: float(rng.random()) for p in row} for n, row in given.choices.items()}
    widths = repair(given, losses)
    assert given.problems(widths) == []
    narrow = {n: {p: float(p.weight + p.activation) for p in row} for n, row in losses.items()}
    raised = repair(given, narrow)
    assert given.problems(raised) == []
    assert given.cost(raised, "bitops") > 0.8 * given.budgets["bitops"]
    loose = replace(given, budgets={})
    assert repair(loose, losses).keys() == losses.keys()


def test_equal_seeds_give_equal_plans_and_other_seeds_other_strengths() -> None:
    method = load("ebs", {"strengths": "stochastic"})
    assert isinstance(method, Ebs)
    scores = [method.scores(problem(seed=seed)).losses["main"] for seed in (1, 1, 2)]
    assert scores[0] == scores[1]
    assert scores[0] != scores[2]


@pytest.mark.parametrize("options", [{}, {"strengths": "stochastic", "level": "one"}])
def test_resumed_is_uninterrupted(
    options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "EVERY", 0.0)  # a checkpoint a step
    trainer = replace(toy_trainer(), recipe=replace(toy_trainer().recipe, epochs=4))
    method = load("ebs", options)
    assert isinstance(method, Ebs)

    def run(cache: Path, stop: int = 0) -> Any:
        calls = 0

        def tell(label: str, done: int, total: int) -> None:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise StopError

        return method.scores(problem(trainer=trainer, cache=cache, progress=tell)).losses

    expected = run(tmp_path / "whole")
    for stop in (3, 2):
        with pytest.raises(StopError):
            run(tmp_path / "parts", stop)
        assert list((tmp_path / "parts").glob("*.pt"))
    assert run(tmp_path / "parts") == expected
    assert not list((tmp_path / "parts").glob("*.pt"))


def test_divergence_is_an_error_and_the_last_good_state_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "EVERY", 0.0)
    calls = 0
    whole = EbsRelaxation.objective

    def objective(self: EbsRelaxation, loss: Any) -> Any:
        nonlocal calls
        calls += 1
        return whole(self, loss) * (float("nan") if calls == 1 else 1.0)

    monkeypatch.setattr(EbsRelaxation, "objective", objective)
    with pytest.raises(TrainingDiverged, match=r"ebs diverged at step \d+ .*last good state is in"):
        Ebs().scores(problem(cache=tmp_path))
    (kept,) = tmp_path.glob("*.pt")
    state = torch.load(kept, weights_only=True)["state"]
    assert state["turn"] > 0
    assert all(torch.isfinite(tensor).all() for tensor in state["strengths"])
    monkeypatch.setattr(EbsRelaxation, "objective", whole)
    resumed = Ebs().scores(problem(cache=tmp_path)).losses
    assert resumed == Ebs().scores(problem()).losses


def test_the_trainer_has_to_fit() -> None:
    with pytest.raises(UsageError, match="--train data"):
        Ebs().scores(problem(trainer=None))
    with pytest.raises(UsageError, match=r"trainer of mpqc\.train"):
        Ebs().scores(toy_problem())


@pytest.mark.parametrize(
    "options", [{"price": -1.0}, {"temperature": 0.0}, {"warmup": 1.0}, {"weights_share": 0.0}]
)
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="ebs"):
        Ebs(**options)  # type: ignore[arg-type]


def test_meta_weights_and_quantizers_are_trained() -> None:
    given = problem()
    method = Ebs(quantizer="dorefa")
    seen: list[EbsRelaxation] = []

    def make(ground: Ground) -> EbsRelaxation:
        seen.append(EbsRelaxation(ground, method))
        return seen[0]

    base.learn(given, method, make, Schedule())
    before = GraphModule(toy_trainer().graph)
    assert not torch.equal(seen[0].module.raw("w2"), before.raw("w2"))
    made = seen[0].module.hooks.find("main").weights
    assert all(isinstance(quantizer, DoReFaWeights) for quantizer in made[:3])
    assert precisions(method(given)).keys() == given.choices.keys()
