"""What sets one method apart from the others; what they share is in test_contract.py."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpqc.data import open_data
from mpqc.errors import UsageError
from mpqc.graph import Precision
from mpqc.passes.measure_entropy import measure_entropy
from mpqc.search import base, precisions
from mpqc.search.base import ScoreSearch, load, methods
from mpqc.search.baselines import spread
from mpqc.search.confirm import held_out, judge
from mpqc.search.constraints import Constraints
from mpqc.search.eagl import Eagl
from mpqc.search.progressive import Progressive, round_up, separation
from mpqc.search.sensitivity import Sensitivity
from mpqc.search.testing import between, toy_data, toy_graph, toy_problem

BODY = ("main", "shortcut", "depthwise", "pointwise")


def test_uniform_is_the_widest_that_fits() -> None:
    for bits in (2, 3, 4, 8):
        plan = load("uniform")(toy_problem(f"bitops=w{bits}a{bits}"))
        assert {precisions(plan)[name] for name in BODY} == {Precision(bits, bits)}
    between = load("uniform")(toy_problem("bitops=0.99*w4a4"))
    assert {precisions(between)[name] for name in BODY} == {Precision(3, 4)}
    by_size = load("uniform")(toy_problem("size=w3a3"))  # activations are free
    assert {precisions(by_size)[name] for name in BODY} == {Precision(3, 8)}


def test_eagl_with_two_widths_is_the_knapsack_of_the_paper() -> None:
    problem = between(toy_problem(), {"bitops": 0.13})
    two = replace(
        problem,
        choices={
            name: (Precision(2, 2), Precision(4, 4)) if name in BODY else row
            for name, row in problem.choices.items()
        },
    )
    entropies = measure_entropy(toy_graph(), BODY)
    best, gain = None, -1.0
    for bits in np.ndindex(2, 2, 2):  # main and shortcut share one variable
        kept = {"main": bits[0], "shortcut": bits[0], "depthwise": bits[1], "pointwise": bits[2]}
        widths = {name: Precision(8, 8) for name in two.choices} | {
            name: Precision(4, 4) if keep else Precision(2, 2) for name, keep in kept.items()
        }
        total = sum(entropies[name] for name, keep in kept.items() if keep)
        if two.fits(widths) and total > gain:
            best, gain = widths, total
    assert best is not None
    assert len({best[name] for name in BODY}) == 2
    assert precisions(Eagl()(two)) == best


def test_eagl_gains_with_more_widths() -> None:
    problem = toy_problem()
    entropy = measure_entropy(toy_graph(), ["main"])["main"]
    row = Eagl(gain="min").scores(problem).losses["main"]
    assert row[Precision(8, 8)] == -entropy
    assert row[Precision(2, 2)] == -2
    assert {str(p) for p in row} == {"w2a2", "w3a3", "w4a4", "w8a8"}
    scaled = Eagl().scores(problem).losses["main"]
    assert scaled[Precision(8, 8)] == -entropy
    assert scaled[Precision(2, 2)] == 0
    assert scaled[Precision(8, 8)] < scaled[Precision(4, 4)] < scaled[Precision(3, 3)] < 0
    times = Eagl(times_weights=True).scores(problem).losses["main"]
    assert times[Precision(8, 8)] == -entropy * problem.layer("main").weights


def test_eagl_gives_activations_the_width_of_the_weights() -> None:
    for share in (0.1, 0.2, 0.4):
        plan = Eagl()(between(toy_problem(), {"bitops": share}))
        assert all(p.weight == p.activation for p in precisions(plan).values())


def test_eagl_counts_the_narrower_width_where_a_constraint_parts_them() -> None:
    problem = toy_problem(constraints=Constraints(pin={"main": "w4"}))
    row = Eagl(gain="min").scores(problem).losses["main"]
    assert row[Precision(4, 2)] == -2
    assert row[Precision(4, 8)] == row[Precision(4, 4)] < row[Precision(4, 3)]


@pytest.fixture
def rising(monkeypatch: pytest.MonkeyPatch) -> None:
    """Separation that rises with depth, with one setback."""
    known = {"x": 1.0, "r1": 2.0, "r2": 5.0, "r3": 4.0, "f": 9.0}
    monkeypatch.setattr(
        "mpqc.search.progressive.measure_separability",
        lambda graph, data, values, progress: {v: known.get(v, 6.0) for v in values},
    )


@pytest.mark.parametrize("granularity", ["stage", "layer"])
@pytest.mark.parametrize(
    "shares", [{"size": 0.3}, {"bitops": 0.2}, {"bitops": 0.5, "size": 0.6}], ids=str
)
@pytest.mark.usefixtures("rising")
def test_progressive_widths_never_rise_with_depth(
    granularity: str, shares: dict[str, float]
) -> None:
    problem = between(toy_problem(), shares)
    plan = load("progressive", {"granularity": granularity})(problem)
    bits = [precisions(plan)[name].weight for name in BODY]
    assert bits == sorted(bits, reverse=True)
    widest = load("uniform")(problem)  # of which it is the generalisation
    first = next(iter(shares))
    if {p.weight == p.activation for p in precisions(widest).values()} == {True}:
        assert problem.cost(precisions(plan), first) >= problem.cost(precisions(widest), first)


@pytest.mark.usefixtures("rising")
def test_progressive_narrows_late_layers_first() -> None:
    plan = load("progressive", {"granularity": "layer"})(between(toy_problem(), {"size": 0.3}))
    bits = [precisions(plan)[name].weight for name in BODY]
    assert bits[0] > bits[-1]


@pytest.mark.usefixtures("rising")
def test_separation_is_the_running_maximum_from_0_to_1() -> None:
    places = separation(toy_problem(), Progressive(granularity="layer"))
    assert list(places.values()) == [0, 1 / 8, 1 / 8, 4 / 8, 4 / 8, 1]
    stages = separation(toy_problem(), Progressive())
    assert len({stages[name] for name in BODY}) == 1


def test_rounding_to_candidates() -> None:
    assert [round_up([2, 3, 4, 8], b) for b in (1.2, 2.4, 2.6, 4.4, 4.6, 8)] == [2, 2, 3, 4, 8, 8]


def test_reverse_gives_the_strongest_layer_the_weakest_losses() -> None:
    problem = toy_problem()
    straight = Sensitivity().scores(problem)
    turned = load("reverse").scores(problem)  # type: ignore[attr-defined]
    alone = ["depthwise", "pointwise"]  # untied, same candidates
    order = sorted(alone, key=lambda name: spread(straight, name))
    assert sorted(alone, key=lambda name: spread(turned, name)) == order[::-1]
    assert turned.losses[order[0]] == straight.losses[order[-1]]


def test_reverse_needs_something_to_reverse() -> None:
    with pytest.raises(UsageError, match="'uniform' has no scores"):
        load("reverse", {"of": "uniform"})(toy_problem())
    with pytest.raises(UsageError, match="of=eagl"):
        load("reverse", {"of": "reverse"})
    with pytest.raises(UsageError, match="needs calibration data"):
        load("reverse")(toy_problem(data=None))


def test_random_plans_depend_on_the_seed() -> None:
    plans = {load("random")(toy_problem(seed=seed)).text() for seed in range(5)}
    assert len(plans) > 1


def test_every_method_describes_itself() -> None:
    found = methods()
    assert base.BUILT_IN.keys() <= found.keys()
    for name in base.BUILT_IN:
        method = found[name]
        assert (method.problem, method.origin) == ("", "mpqc")
        assert len(method.summary) > 20
        assert method.widths
    assert found["eagl"].needs == frozenset()
    assert found["eagl"].widths == (2, 4)
    assert found["sensitivity"].needs == {"data"}


def test_options() -> None:
    assert load("eagl", {"code_bits": "8", "gain": "min", "times_weights": "True"}) == Eagl(
        8, gain="min", times_weights=True
    )
    for options, said in (
        ({"bits": "4"}, "no option 'bits'; options: code_bits"),
        ({"code_bits": "four"}, "wants int"),
        ({"code_bits": "9"}, "from 2 to 8"),
        ({"gain": "max"}, "one of scaled, min"),
        ({"times_weights": "maybe"}, "true or false"),
    ):
        with pytest.raises(UsageError, match=said):
            load("eagl", options)
    for name in ("sensitivity", "hawq", "progressive", "exchange"):
        with pytest.raises(UsageError, match="samples is at least 1"):
            load(name, {"samples": "0"})
    with pytest.raises(UsageError, match="probes"):
        load("hawq", {"probes": "0"})
    with pytest.raises(UsageError, match="builds is at least 1"):
        load("exchange", {"builds": "0"})
    with pytest.raises(UsageError, match="no search method 'eagle'; installed: alps"):
        load("eagle")


def test_scores_measure_more_loss_for_narrower_layers() -> None:
    for name in ("sensitivity", "hawq"):
        method = load(name)
        assert isinstance(method, ScoreSearch)
        for row in method.scores(toy_problem()).losses.values():
            narrow, wide = (min(row, key=str), max(row, key=str))
            assert len(row) == 1 or row[narrow] > row[wide] > 0


def test_exchange_ends_no_worse_than_where_it_starts(tmp_path: Path) -> None:
    problem = replace(toy_problem("bitops=w3a3"), cache=tmp_path)
    noise = judge(problem)
    found = load("exchange", {"rounds": "1", "builds": "4"})(problem)
    starts = [load(name)(problem) for name in ("uniform", "sensitivity")]
    assert noise(found) <= min(map(noise, starts))
    assert found.search is not None
    assert found.search.method == "exchange"


def test_networks_are_judged_on_samples_that_they_were_not_fitted_to() -> None:
    data = toy_data()
    few = replace(data, batch=1, chosen=np.arange(3))  # type: ignore[type-var]
    assert len(held_out(few, 0, 8)) == 3  # too few to part
    graph = toy_graph(1)
    many = open_data({"x": np.zeros((300, 3, 8, 8), np.float32)}, graph)
    assert len(held_out(many, 0, 512)) == 256 - 128  # of compile's 256, what rounding left
    more = open_data({"x": np.zeros((900, 3, 8, 8), np.float32)}, graph)
    assert len(held_out(more, 0, 512)) == 512
