from pathlib import Path

import pytest

from mpqc.budget import parse_budgets
from mpqc.errors import UsageError
from mpqc.graph import Graph, Precision
from mpqc.search.constraints import Constraints
from mpqc.search.make_problem import candidates, make_problem
from mpqc.search.problem import Problem
from mpqc.search.testing import toy_graph


def problem(text: str, tmp_path: Path, widths: tuple[int, ...] = (2, 4)) -> Problem:
    path = tmp_path / "constraints.toml"
    path.write_text(text)
    return make_problem(
        toy_graph(), parse_budgets("bitops=w4a4"), widths, constraints=Constraints.load(path),
    )  # fmt: skip


def shown(problem: Problem, name: str) -> str:
    return " ".join(sorted(map(str, problem.choices[name])))


def test_the_ends_are_pinned_unless_searched() -> None:
    pinned = make_problem(toy_graph(), parse_budgets("bitops=w4a4"), (2, 4))
    assert [n for n, row in pinned.choices.items() if row == (Precision(8, 8),)] == [
        "first",
        "classifier",
    ]
    searched = make_problem(toy_graph(), parse_budgets("bitops=w4a4"), (2, 4), ends=None)
    assert {len(row) for row in searched.choices.values()} == {4}
    assert searched.budgets["bitops"] < pinned.budgets["bitops"]  # its uniform has no 8-bit ends


def test_pins(tmp_path: Path) -> None:
    found = problem('[pin]\nfirst = "w4a4"\n"p*" = "w3"\ndepthwise = "a8"\n', tmp_path)
    assert shown(found, "first") == "w4a4"
    assert shown(found, "pointwise") == "w3a2 w3a4"
    assert shown(found, "depthwise") == "w2a8 w4a8"


def test_bounds(tmp_path: Path) -> None:
    text = '[min]\n"*" = "w3"\ndepthwise = "w2a4"\n[max]\n"*wise" = "w4"\nmain = "a3"\n'
    found = problem(text, tmp_path, (2, 3, 4, 8))
    assert {p.weight for p in found.choices["depthwise"]} == {3, 4}
    assert {p.activation for p in found.choices["depthwise"]} == {4, 8}
    assert {p.weight for p in found.choices["main"]} == {3, 4, 8}
    # the shortcut reads the same value as main, so that bound holds for both
    assert {p.activation for p in found.choices["shortcut"]} == {2, 3}
    assert shown(found, "first") == "w8a8"


def test_exclusion_leaves_a_layer_in_float(tmp_path: Path) -> None:
    found = problem('exclude = ["short*"]', tmp_path)
    assert "shortcut" not in found.choices
    assert [layer.name for layer in found.floats] == ["shortcut"]
    narrow = {name: row[0] for name, row in found.choices.items()}
    shortcut = found.floats[0]
    searched = sum(found.costs["bitops"](layer, narrow[layer.name]) for layer in found.layers)
    assert found.cost(narrow, "bitops") == searched + 1024 * shortcut.macs


def test_ties_join_groups(tmp_path: Path) -> None:
    found = problem('tie = [["main", "pointwise"]]', tmp_path)
    assert found.ties == (("main", "pointwise"),)
    assert set(found.groups[1]) == {"main", "pointwise", "shortcut"}
    split = {name: Precision(2, 2) for name in found.choices} | {"main": Precision(4, 2)}
    assert any("tied" in said for said in found.problems(split))


def test_a_layer_beside_a_pinned_end_takes_its_activations() -> None:
    text = """
    %x = Input() : f32[1,4]
    %a = Constant() : f32[4,4]
    %b = Constant() : f32[4,4]
    %c = Constant() : f32[4,2]
    %p = MatMul(%x, %a) : f32[1,4]
    %h = MatMul(%p, %b) : f32[1,4]
    %q = MatMul(%p, %c) : f32[1,2]
    return %h, %q
    """
    found = make_problem(Graph.parse(text), parse_budgets("size=w4a4"), (2, 4))
    assert found.groups == (("p",), ("h", "q"))
    mixed = make_problem(
        Graph.parse(text), parse_budgets("size=w4a4"), (2, 4),
        constraints=Constraints(pin={"h": "w2a4"}),
    )  # fmt: skip
    assert shown(mixed, "h") == "w2a4"
    assert shown(mixed, "q") == "w8a4"  # eight bits by default gives way to what was asked


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'exclude = ["shortcat"]',
            "no quantizable layer is named 'shortcat'; near names: shortcut",
        ),
        ('[pin]\n"layer9.*" = "w2a2"', "near names:"),
        ('tie = [["main", "x*"]]', "near names"),
        ('[pin]\nmain = "w9a2"', "pin.main"),
        ('[pin]\nmain = "two"', "written w2a4"),
        ("[pins]\n", "pins.*keys are pin, min, max, exclude, tie"),
        ("pin = 3", "pin"),
        ("][", "cannot read the constraints"),
        ('exclude = ["main"]\n[pin]\nmain = "w2a2"', "both pinned and excluded"),
        ('exclude = ["main"]\ntie = [["main", "shortcut"]]', "both tied and excluded"),
        ('[pin]\nmain = "w2a2"\n"ma*" = "w4a4"', "pinned to two widths"),
        ('[min]\nmain = "w5"', "leave layer 'main' no width"),
        ('exclude = ["*"]', "exclude every layer"),
        (
            'tie = [["main", "pointwise"]]\n[pin]\nmain = "w2"\npointwise = "w4"',
            "no width in common",
        ),
        ('[pin]\nmain = "a2"\nshortcut = "a4"', "share an input but no activation width"),
    ],
)
def test_says_what_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        problem(text, tmp_path)


def test_says_when_the_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the constraints"):
        Constraints.load(tmp_path / "none.toml")


def test_candidates() -> None:
    assert [str(p) for p in candidates([2, "4"])] == ["w2a2", "w2a4", "w4a2", "w4a4"]
    assert [str(p) for p in candidates(["w2a8", " W4A4 "])] == ["w2a8", "w4a4"]
    for wrong, said in (([], "needs candidate"), ([9], "from 1 to 8"), (["0"], "from 1 to 8")):
        with pytest.raises(UsageError, match=said):
            candidates(wrong)


def test_a_latency_budget_without_a_table_says_where_one_comes_from() -> None:
    with pytest.raises(UsageError, match="mpqc profile"):
        make_problem(toy_graph(), parse_budgets("latency=5ms"), (2, 4))
    timed = make_problem(
        toy_graph(), parse_budgets("latency=0.5*w4a4"), (2, 4),
        costs={"latency": lambda layer, p: 1e-6 if p is None else 1e-9 * layer.macs * p.weight},
    )  # fmt: skip
    wide = {name: row[-1] for name, row in timed.choices.items()}
    assert timed.budgets["latency"] == pytest.approx(timed.cost(wide, "latency") / 2)
