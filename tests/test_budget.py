import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqc.budget import Budget, parse_budgets, show
from mpqc.errors import UsageError
from mpqc.graph import Precision


@pytest.mark.parametrize(
    ("text", "objective", "amount"),
    [
        ("size=1.5MB", "size", 1.5e6),
        ("size=300kB", "size", 3e5),
        ("size=2MiB", "size", 2 * 2**20),
        ("size=12B", "size", 12),
        ("bitops=22.8G", "bitops", 22.8e9),
        ("bitops=670081024", "bitops", 670081024),
        ("bitops=1e9", "bitops", 1e9),
        ("bitops=5 GBitOPs", "bitops", 5e9),
        (" latency = 5ms ", "latency", 5e-3),
        ("latency=.5s", "latency", 0.5),
        ("latency=800us", "latency", 8e-4),
        ("latency=800µs", "latency", 8e-4),
        ("latency=800\u03bcs", "latency", 8e-4),
    ],
)
def test_reads_amounts(text: str, objective: str, amount: float) -> None:
    budget = Budget.parse(text)
    assert (budget.objective, budget.uniform) == (objective, None)
    assert budget.amount == pytest.approx(amount, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "factor"), [("bitops=w4a4", 1), ("bitops=0.8*w4a4", 0.8), ("bitops=1.5 * W4A4", 1.5)]
)
def test_reads_relative_budgets(text: str, factor: float) -> None:
    budget = Budget.parse(text)
    assert budget == Budget("bitops", factor, Precision(4, 4))
    assert budget.resolve(lambda objective, precision: 1000.0) == factor * 1000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a budget"),
        ("1.5MB", "not a budget.*size=1.5MB"),
        ("energy=5J", "not a budget"),
        ("size=", "no value"),
        ("size=1.5", "no unit.*kB"),
        ("size=1.5Mb", "small b means bits"),
        ("size=5ms", "unit 'ms'.*MB"),
        ("latency=5", "no unit.*ms"),
        ("latency=5MB", "unit 'MB'"),
        ("bitops=5X", "unit 'X'"),
        ("bitops=-5G", "not a number"),
        ("bitops=nan", "not a number"),
        ("bitops=0", "positive"),
        ("bitops=1e999", "positive finite"),
        ("bitops=w9a4", "from 1 to 8"),
        ("bitops=w4a4*0.8", "not a number"),
        ("bitops=0*w4a4", "positive"),
    ],
)
def test_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(Exception, match=said) as caught:
        Budget.parse(text)
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]


def test_reads_several() -> None:
    found = parse_budgets(["size=1MB,bitops=w4a4", "latency=5ms"])
    assert [budget.objective for budget in found] == ["size", "bitops", "latency"]


def test_refuses_none_and_two_of_one_kind() -> None:
    with pytest.raises(UsageError, match="needs a budget"):
        parse_budgets([])
    with pytest.raises(UsageError, match="two budgets for size"):
        parse_budgets("size=1MB,size=2MB")


@given(st.sampled_from(["size", "bitops", "latency"]), st.floats(1e-6, 1e15))
def test_shows_what_it_can_read(objective: str, amount: float) -> None:
    if objective != "latency":
        amount = max(amount, 1.0)
    again = Budget.parse(f"{objective}={show(objective, amount)}")
    assert again.amount == pytest.approx(amount, rel=1e-3)


def test_prints_as_it_was_written() -> None:
    assert str(Budget.parse("bitops=0.8*w4a4")) == "bitops=0.8*w4a4"
    assert str(Budget.parse("latency=5ms")) == "latency=5 ms"
    assert show("size", 1.5e6) == "1.5 MB"
    assert show("bitops", 22.83e9) == "22.83 G"
