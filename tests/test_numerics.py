import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqc.errors import GraphError
from mpqc.numerics import tree_mean, tree_sum, weight_codes, weight_values


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("levels", ["signed", "odd"])
def test_weight_codes_and_values_are_inverse(bits: int, levels: str) -> None:
    codes = np.arange(2**bits)
    values = weight_values(codes, bits, levels)
    np.testing.assert_array_equal(weight_codes(values, bits, levels), codes)
    assert len(set(values.tolist())) == 2**bits


@pytest.mark.parametrize(
    ("value", "levels"), [(4, "signed"), (-5, "signed"), (9, "odd"), (2, "odd")]
)
def test_refuses_integers_that_are_no_level(value: int, levels: str) -> None:
    with pytest.raises(GraphError, match=levels):
        weight_codes(np.array([value]), 3, levels)


@given(st.integers(1, 70), st.integers(0, 2**31))
def test_tree_sum_adds_each_element_once(n: int, seed: int) -> None:
    x = np.random.default_rng(seed).integers(-1000, 1000, (3, n)).astype(np.float32)
    np.testing.assert_array_equal(tree_sum(x), x.sum(axis=1))


def test_tree_sum_keeps_its_order() -> None:
    big = np.float32(2**24)
    # the third and the fourth are no partners: a sum from the left would get the same twice
    np.testing.assert_array_equal(tree_sum(np.array([1, 0, big, -big, 0], np.float32)), 1)
    np.testing.assert_array_equal(tree_sum(np.array([1, -big, 0, big, 0], np.float32)), 0)


def test_tree_mean_divides_by_what_counts() -> None:
    x = np.array([[1, 2, 3], [4, 0, 0]], np.float32)
    np.testing.assert_array_equal(
        tree_mean(x, np.array([3, 1])), [np.float32(6) * np.float32(1 / 3), 4]
    )
