"""FracBits: interpolation and its derivative, costs, channels, pruning, budgets, resuming."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.errors import UsageError
from mpqc.graph import Precision
from mpqc.plan import Plan
from mpqc.search import load
from mpqc.search.channels import plan_cost, plan_problems
from mpqc.search.constraints import Constraints
from mpqc.search.fracbits import FracBits, FracScores
from mpqc.search.problem import Problem
from mpqc.search.testing import toy_problem
from mpqc.train import GraphModule, QuantizedLayer
from mpqc.train.loop import TrainingDiverged
from mpqc.train.search import base
from mpqc.train.search.base import Ground
from mpqc.train.search.fracbits import FracRelaxation, Fraction, lost, shares_of
from tests.train.contract import toy_trainer

KERNEL = {"granularity": "kernel"}
PRUNED = {**KERNEL, "prune": "true"}


def problem(budget: str = "bitops=w3a3", **changes: Any) -> Problem:
    return toy_problem(budget, **{"trainer": toy_trainer(), **changes})


def relaxed(method: FracBits | None = None, **changes: Any) -> FracRelaxation:
    torch.manual_seed(0)
    return FracRelaxation(Ground.of(problem(**changes), "fracbits"), method or FracBits())


def made(options: dict[str, str]) -> FracBits:
    found = load("fracbits", options)
    assert isinstance(found, FracBits)
    return found


class StopError(Exception):
    pass


def test_shares_of_neighbours() -> None:
    """At a candidate the next wider one counts too: its share has a slope."""
    width = torch.tensor([2.0, 2.25, 3.0, 5.0, 8.0, 0.5], requires_grad=True)
    shares = shares_of(width, (0, 1, 2, 3, 4, 8))
    expected = [
        [0, 0, 1, 0, 0, 0], [0, 0, 0.75, 0.25, 0, 0], [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0.75, 0.25], [0, 0, 0, 0, 0, 1], [0.5, 0.5, 0, 0, 0, 0],
    ]  # fmt: skip
    torch.testing.assert_close(shares, torch.tensor(expected))
    values = torch.arange(6.0) ** 2
    (shares @ values).sum().backward()  # slope of the way to the next, also at 2 and at 3
    torch.testing.assert_close(width.grad, torch.tensor([5.0, 5.0, 7.0, 9 / 4, 9 / 4, 1.0]))
    assert shares_of(torch.tensor([8.0]), (8,)).tolist() == [[1.0]]


@pytest.mark.parametrize("method", [FracBits(), FracBits("kernel"), FracBits("kernel", prune=True)])
@pytest.mark.parametrize("quantizer", ["dorefa", "lsq"])
def test_derivative_is_the_difference_of_neighbours(method: FracBits, quantizer: Any) -> None:
    """dL/d(width) = <dL/dW, Q_above(W) - Q_below(W)>, at whole widths too."""
    mixed = relaxed(replace(method, quantizer=quantizer))
    hook = mixed.module.hooks.find("main")
    weight = mixed.module.weight("main").detach()
    slope = torch.randn_like(weight)
    for width, (below, above) in ((3.0, (3, 4)), (3.4, (3, 4)), (2.0, (2, 3)), (8.0, (4, 8))):
        hook.width.set(width)
        hook.width.value.grad = None
        (hook.interpolated(weight) * slope).sum().backward()
        ladder = [bits for bits in hook.width.ladder if bits]
        levels = [hook.weights[ladder.index(bits)](weight).detach() for bits in (below, above)]
        each = ((levels[1] - levels[0]) * slope).flatten(1).sum(1) / (above - below)
        wanted = each if len(hook.width.value) > 1 else each.sum(0, keepdim=True)
        torch.testing.assert_close(hook.width.value.grad, wanted, rtol=1e-4, atol=1e-5)


def test_losses_of_a_mixture_fall_by_the_price_of_a_bit() -> None:
    fraction = Fraction((2, 3, 4, 8), 1, torch.device("cpu"))
    fraction.set(3.5)
    found = lost(fraction, 0.2)
    assert found[3] - found[4] == pytest.approx(0.2)  # half way the two cost the same
    assert found[2] - found[3] == pytest.approx(0.8)
    assert found[8] == 0
    assert found[4] == pytest.approx(0.2 / 3, rel=0.01)
    assert lost(Fraction((8,), 1, torch.device("cpu")), 0.2) == {8: 0.0}


@pytest.mark.parametrize("options", [{}, KERNEL, {"quantizer": "dorefa"}])
def test_whole_widths_are_the_plain_quantizers(options: dict[str, str]) -> None:
    mixed = relaxed(made(options))
    plain = GraphModule(mixed.module.graph)
    for fraction in (*mixed.weights.values(), *mixed.inputs.values()):
        fraction.set(4.0 if 4 in fraction.ladder else 8.0)
    for name in mixed.module.hooks.names():
        hook = mixed.module.hooks.find(name)
        index = next(hook.width.ladder.index(b) for b in (4, 8) if b in hook.width.ladder)
        inputs = hook.data.width.ladder
        place = next(inputs.index(b) for b in (4, 8) if b in inputs)
        plain.hooks.put(name, QuantizedLayer(hook.weights[index], hook.data.quantizers[place]))
    x = torch.randn(4, 3, 8, 8)
    mixed.module.train()
    plain.train()
    assert torch.equal(mixed.module(x)["y"], plain(x)["y"])
    reference = GraphModule(mixed.module.graph).train()
    assert not torch.equal(reference(x)["y"], plain(x)["y"])


def test_width_zero_is_a_channel_of_zeros_that_can_come_back() -> None:
    mixed = relaxed(FracBits("kernel", prune=True))
    hook, weight = mixed.module.hooks.find("main"), mixed.module.weight("main").detach()
    assert hook.width.ladder == (0, 2, 3, 4, 8)
    hook.width.set(0.0)
    got = hook.interpolated(weight)
    assert not got.any()
    (got * weight).sum().backward()
    assert (hook.width.value.grad > 0).all()  # a wider channel fits these weights better
    assert mixed.module.hooks.find("classifier").width.ladder == (8,)


@pytest.mark.parametrize("options", [{}, KERNEL, PRUNED])
def test_expected_cost_is_that_of_the_fractions(options: dict[str, str]) -> None:
    """Bilinear in mean weight width and input width, wherever they lie between candidates."""
    mixed = relaxed(made(options), budget="bitops=w3a3,size=w3a3")
    rng = np.random.default_rng(0)
    for fraction in (*mixed.weights.values(), *mixed.inputs.values()):
        with torch.no_grad():
            drawn = rng.uniform(fraction.ladder[0], fraction.ladder[-1], len(fraction.value))
            fraction.value.copy_(torch.from_numpy(drawn))
        fraction.draw()
    given, space = problem(), mixed._ground.space
    means = {
        n: (float(mixed.weights[space.weight_key[n]].value.detach().mean()),
            float(mixed.inputs[space.input_key[n]].value.detach()))
        for n in given.choices
    }  # fmt: skip
    bitops = sum(given.layer(n).macs * w * a for n, (w, a) in means.items())
    size = sum(given.layer(n).weights * w / 8 for n, (w, _) in means.items())
    costs, shares = mixed._ground.costs, mixed.shares()
    assert float(costs.expected(shares, "bitops").detach()) == pytest.approx(bitops, rel=1e-5)
    assert float(costs.expected(shares, "size").detach()) == pytest.approx(size, rel=1e-5)


def test_starts_above_the_uniform_width_of_the_budget() -> None:
    mixed = relaxed(FracBits(start=0.5), budget="bitops=w3a3")
    assert float(mixed.weights["main"].value.detach()[0]) == pytest.approx(3.5, abs=0.01)
    assert float(relaxed(FracBits(start=0)).dearest().detach()) == pytest.approx(1.0, abs=1e-3)
    mixed.objective(torch.zeros(())).backward()
    grad = mixed.weights["main"].value.grad
    assert grad is not None
    assert (grad > 0).all()  # over the budget: down
    for fraction in (*mixed.weights.values(), *mixed.inputs.values()):
        fraction.set(2.0)
        fraction.value.grad = None
    mixed.objective(torch.zeros(())).backward()
    grad = mixed.weights["main"].value.grad
    assert grad is not None
    assert (grad < 0).all()  # budget to spare: up


def test_layers_that_share_an_input_share_its_width() -> None:
    mixed = relaxed()
    main, shortcut = (mixed.module.hooks.find(name) for name in ("main", "shortcut"))
    assert main.data is shortcut.data
    assert "shortcut" not in mixed.inputs
    assert isinstance(main.data.width, Fraction)


@pytest.mark.parametrize("options", [KERNEL, PRUNED])
@pytest.mark.parametrize(
    "constraints",
    [Constraints(), Constraints(tie=(("main", "shortcut"),)),
     Constraints(tie=(("depthwise", "pointwise"),)), Constraints(pin={"main": "w3"})],
    ids=["free", "tied", "uneven", "pinned"],
)  # fmt: skip
def test_channels_keep_the_budgets(options: dict[str, str], constraints: Constraints) -> None:
    given = problem("bitops=w3a3,size=w3a3", constraints=constraints)
    plan = made(options)(given)
    assert plan_problems(given, plan) == []
    assert plan.search is not None
    assert plan.search.cost["bitops"] == pytest.approx(plan_cost(given, plan, "bitops"))
    spent = max(plan.search.cost[n] / limit for n, limit in given.budgets.items())
    assert 0.97 < spent <= 1
    assert Plan.parse(plan.text()) == plan
    if constraints == Constraints():
        assert any(not isinstance(p.weight_bits, int) for p in plan.layers.values())
    if constraints.pin:
        assert plan.layers["main"].weight_bits == 3
    if constraints.tie == (("main", "shortcut"),):
        assert plan.layers["main"].weight_bits == plan.layers["shortcut"].weight_bits


def test_channels_get_the_widths_that_they_learned() -> None:
    given = problem("bitops=w2a4")
    rows = {
        n: {p: (p.activation - 4.0) ** 2 + 0.1 * p.weight for p in row}
        for n, row in given.choices.items()
    }
    wide = {
        layer.name: [8.0]
        if len(given.choices[layer.name]) == 1
        else [0.2, 3.9, 2.1, 3.0] * (layer.channels_out // 4)
        for layer in given.layers
    }
    scores = FracScores(
        rows, "", {n: tuple(row) for n, row in wide.items()}, dict.fromkeys(rows, 1.0),
        frozenset({"main", "pointwise"}),
    )  # fmt: skip
    plan = FracBits("kernel", prune=True).plan(given, scores)
    assert plan_problems(given, plan) == []
    bits = plan.layers["main"].weight_bits
    assert not isinstance(bits, int)
    assert all(0 <= bits[i] <= bits[i + 2] <= bits[i + 3] <= bits[i + 1] for i in range(0, 16, 4))
    assert 0 in bits
    others = plan.layers["depthwise"].weight_bits
    assert isinstance(others, int) or 0 not in others


@pytest.mark.parametrize("options", [{}, PRUNED])
def test_equal_seeds_give_equal_plans(options: dict[str, str]) -> None:
    method = made(options)
    plans = [method(problem(seed=seed)).layers for seed in (1, 1)]
    assert plans[0] == plans[1]
    scores = [method.scores(problem(seed=seed)).losses["main"] for seed in (1, 2)]
    assert scores[0] != scores[1]


@pytest.mark.parametrize("options", [{}, PRUNED])
def test_resumed_is_uninterrupted(
    options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "EVERY", 0.0)  # a checkpoint a step
    trainer = replace(toy_trainer(), recipe=replace(toy_trainer().recipe, epochs=4))
    method = made(options)

    def run(cache: Path, stop: int = 0) -> Any:
        calls = 0

        def tell(label: str, done: int, total: int) -> None:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise StopError

        found = method.scores(problem(trainer=trainer, cache=cache, progress=tell))
        assert isinstance(found, FracScores)
        return found.losses, found.weights, found.prices, found.pruned

    expected = run(tmp_path / "whole")
    for stop in (3, 2):
        with pytest.raises(StopError):
            run(tmp_path / "parts", stop)
        assert list((tmp_path / "parts").glob("*.pt"))
    assert run(tmp_path / "parts") == expected
    assert run(tmp_path / "parts") == expected  # from the cache
    (kept,) = (tmp_path / "parts").glob("*.json")
    assert json.loads(kept.read_text())["weights"].keys() == expected[1].keys()
    kept.unlink()
    assert run(tmp_path / "parts") == expected  # trained again


def test_divergence_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        FracRelaxation, "objective", lambda self, loss: loss * float("nan"), raising=True
    )
    with pytest.raises(TrainingDiverged, match="fracbits diverged at step 1 of"):
        FracBits().scores(problem(cache=tmp_path))
    with pytest.raises(TrainingDiverged):
        FracBits("kernel", warmup=0.5).scores(problem(cache=tmp_path))


def test_measured_costs_are_interpolated() -> None:
    """A table that is no product of widths: linear between its entries, exact at them."""
    latency = {
        "latency": lambda layer, p: 1.0 if p is None else layer.macs * (p.weight > 3) + p.activation
    }
    given = replace(problem(), costs={**problem().costs, **latency})
    mixed = FracRelaxation(Ground.of(given, "fracbits"), FracBits())
    for fraction in (*mixed.weights.values(), *mixed.inputs.values()):
        fraction.set(3.5)
    tables = mixed._ground.costs
    found = float(tables.expected(mixed.shares(), "latency").detach())
    whole = []
    for bits in (3, 4):
        widths = {n: Precision(*(min((p for p in row), key=lambda p: abs(p.weight - bits)).weight,
                                 min((p for p in row), key=lambda p: abs(p.activation - bits))
                                 .activation)) for n, row in given.choices.items()}  # fmt: skip
        whole.append(given.cost(widths, "latency"))
    assert found == pytest.approx(sum(whole) / 2)


@pytest.mark.parametrize(
    "options", [{"price": -1.0}, {"width_lr": -1.0}, {"warmup": 1.0}, {"prune": True}]
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="fracbits"):
        FracBits(**options)
