"""The package's own tests: pytest check_contract.py, where mpqc and this package are installed."""

from mpqc.search.testing import SearchContract


class TestThrifty(SearchContract):
    method = "thrifty"
