"""Constants at the width of their values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqc.narrow import LEAST_SAVING, narrow


@given(
    st.sampled_from(["uint8", "int8", "int16", "uint16"]),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(-40, 40),
    st.integers(0, 2**32 - 1),
)
def test_widening_gives_the_same_values(
    dtype: str, bits: int, scale: int, low: int, seed: int
) -> None:
    bounds = np.iinfo(dtype)
    codes = np.random.default_rng(seed).integers(0, 2**bits, (7, 600))
    values = np.clip(low + scale * codes, bounds.min, bounds.max).astype(dtype)
    small = narrow(values)
    if small is None:
        # nearly as wide as its type already
        assert np.ptp(values.astype(int)).item().bit_length() >= 6
        return
    assert len(small.data) == -(-values.size * small.bits // 8)
    assert len(small.data) <= values.nbytes - LEAST_SAVING
    widened = small.widen(dtype)
    assert widened.dtype == values.dtype
    np.testing.assert_array_equal(widened, values.reshape(-1))


@pytest.mark.parametrize(
    ("values", "bits"),
    [([-2, -1, 0, 1], 2), ([-3, -1, 1, 3], 2), ([-1, 1], 1), ([0], 1), ([-3, -1, 0, 1, 3], 3),
     ([0, 255], 1), ([0, 128, 255], 8)],
)  # fmt: skip
def test_takes_the_bits_that_the_values_need(values: list[int], bits: int) -> None:
    array = np.resize(np.array(values, np.int16), 5000)
    small = narrow(array)
    assert small is not None
    assert small.bits == bits


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(5000, np.float32),
        np.zeros(5000, np.int32),
        np.zeros(0, np.int8),
        np.zeros(LEAST_SAVING, np.int8),
        np.arange(5000).astype(np.int8),
    ],
)
def test_leaves_what_would_not_pay(array: np.ndarray) -> None:
    assert narrow(array) is None
