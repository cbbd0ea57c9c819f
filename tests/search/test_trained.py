"""Methods that train are listed without PyTorch, and say what they lack."""

from dataclasses import replace
from importlib.util import find_spec

import pytest

from mpqc.errors import BudgetError, EnvironmentLacks, UsageError
from mpqc.search import load, methods
from mpqc.search.testing import toy_problem

TRAINED = ["alps", "ebs", "dnas", "fracbits"]


@pytest.mark.parametrize("name", TRAINED)
def test_listed(name: str) -> None:
    found = methods()[name]
    assert found.needs == {"trainer"}
    assert not found.problem


@pytest.mark.parametrize("name", TRAINED)
def test_needs_a_trainer(name: str) -> None:
    with pytest.raises(UsageError, match="--train data"):
        load(name)(replace(toy_problem(), trainer=None))


@pytest.mark.parametrize("name", TRAINED)
def test_says_that_a_budget_is_too_narrow_before_it_trains(name: str) -> None:
    with pytest.raises(BudgetError, match="cheapest plan"):
        load(name)(toy_problem("size=1B"))


@pytest.mark.skipif(find_spec("torch") is not None, reason="PyTorch is installed")
@pytest.mark.parametrize("name", TRAINED)
def test_names_the_extra_where_pytorch_is_missing(name: str) -> None:
    with pytest.raises(EnvironmentLacks, match=r'pip install "mpqc\[train\]"'):
        load(name)(toy_problem())
