"""Every method that comes with mpqc keeps the contract that is asked of others."""

import pytest

from mpqc.search import base
from mpqc.search.testing import SearchContract


class TestUniform(SearchContract):
    method = "uniform"


class TestEagl(SearchContract):
    method = "eagl"


class TestEaglMin(SearchContract):
    method = "eagl"
    options = {"gain": "min", "step": "lsq", "times_weights": "true"}  # noqa: RUF012


class TestProgressive(SearchContract):
    method = "progressive"


class TestProgressiveByLayer(SearchContract):
    method = "progressive"
    options = {"granularity": "layer"}  # noqa: RUF012


class TestHawq(SearchContract):
    method = "hawq"
    options = {"rounding": "nearest"}  # noqa: RUF012


@pytest.mark.slow
class TestHawqFitted(SearchContract):
    method = "hawq"


class TestSensitivity(SearchContract):
    method = "sensitivity"
    options = {"rounding": "nearest"}  # noqa: RUF012


@pytest.mark.slow
class TestSensitivityFitted(SearchContract):
    method = "sensitivity"


class TestExchange(SearchContract):
    method = "exchange"
    options = {"rounds": "1", "builds": "2"}  # noqa: RUF012


@pytest.mark.slow
class TestExchangeOften(SearchContract):
    method = "exchange"
    options = {"rounds": "3", "builds": "4"}  # noqa: RUF012


class TestReverse(SearchContract):
    method = "reverse"
    options = {"of": "eagl"}  # noqa: RUF012


class TestRandom(SearchContract):
    method = "random"


@pytest.mark.parametrize("name", base.BUILT_IN)
def test_every_method_is_tested(name: str) -> None:
    tested = {case.method for case in SearchContract.__subclasses__()}
    if "trainer" not in base.load(name).needs:  # those are in tests/train
        assert name in tested
