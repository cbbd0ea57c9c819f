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
    options = {"gain": "min", "step": "layer", "times_weights": "true"}  # noqa: RUF012


class TestProgressive(SearchContract):
    method = "progressive"


class TestProgressiveByLayer(SearchContract):
    method = "progressive"
    options = {"granularity": "layer"}  # noqa: RUF012


class TestHawq(SearchContract):
    method = "hawq"


class TestSensitivity(SearchContract):
    method = "sensitivity"


class TestExchange(SearchContract):
    method = "exchange"
    options = {"rounds": "2", "builds": "3"}  # noqa: RUF012


class TestReverse(SearchContract):
    method = "reverse"
    options = {"of": "eagl"}  # noqa: RUF012


class TestRandom(SearchContract):
    method = "random"


@pytest.mark.parametrize("name", base.BUILT_IN)
def test_every_method_is_tested(name: str) -> None:
    tested = {case.method for case in SearchContract.__subclasses__()}
    assert name in tested
